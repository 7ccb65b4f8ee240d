"""The README promises what the package holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import torch_rsst

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_named_functions_exist():
    names = set(re.findall(r"torch_rsst\.(\w+)\(", README)) | set(
        re.findall(r"prune\.(\w+)", README)
    )
    names.discard("nn")
    assert names
    assert [name for name in names if not hasattr(torch_rsst, name)] == []


def test_documented_units_are_what_is_found():
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    model = timm.create_model("vit_small_patch16_224")
    assert str(torch_rsst.find_groups(model)) in README


def test_ci_runs_the_test_line():
    assert README.count("<!-- test line -->") == 1
    assert "<!-- test line -->" in (ROOT / ".ci" / "run").read_text()


def test_every_public_name_is_on_an_api_page():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    names = [name for name in torch_rsst.__all__ if not name.startswith("__")]
    assert [name for name in names if not re.search(rf"torch_rsst\.{name}\b", pages)] == []


def snippets() -> list[str]:
    return re.findall(r"```python\n(.+?)```", README, re.S)


@pytest.mark.filterwarnings("ignore::torch_rsst.RSSTWarning")
def test_the_api_in_ten_lines_runs_as_printed(monkeypatch):
    """With a small model, and 2 steps in place of 1000."""
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    create = timm.create_model

    def small(name: str, pretrained: bool) -> torch.nn.Module:
        assert (name, pretrained) == ("vit_small_patch16_224", True)
        return create("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)

    def batches(count: int, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.randn(2, 3, 32, 32), torch.randint(10, (2,))) for _ in range(start, count)]

    monkeypatch.setattr(timm, "create_model", small)
    loop, drop_in = (code for code in snippets() if "safetensors" not in code)
    names = {"batches": batches, "some_images": [torch.randn(2, 3, 32, 32) for _ in range(2)]}
    exec(loop.replace("1000", "2"), names)
    half = torch_rsst.sparsity_report(names["model"], names["groups"])
    assert (half.gone("heads"), half.gone("neurons")) == (3, 768)
    assert sum(p.numel() for p in names["small"].parameters()) < 0.6 * sum(
        p.numel() for p in small("vit_small_patch16_224", True).parameters()
    )
    model = small("vit_small_patch16_224", True)
    attention = model.blocks[0].attn
    attention.qkv = torch.nn.Linear(192, 6 * 3 * 32)
    names = {"prune": torch_rsst, "layers": [model.blocks[1].mlp.fc1], "attention": attention}
    exec(drop_in, names)
    assert torch_rsst.extract_mask(model).keys() == {
        "blocks.0.attn.qkv.weight",
        "blocks.1.mlp.fc1.weight",
    }
