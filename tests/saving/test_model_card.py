"""The model card: what it says, that a hub can read it, and that nobody's own file is lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_rsst
from torch_rsst.saving.info import CompactInfo

pytest.importorskip("safetensors")


def net() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )


def save(folder: Path, **options: Any) -> None:
    torch.manual_seed(0)
    model = net().eval()
    groups = torch_rsst.find_groups(model)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = torch_rsst.compact(model, groups)
    torch_rsst.save_compact(small, folder, masked=model, groups=groups, **options)


def lines(folder: Path) -> list[str]:
    return (folder / "README.md").read_text(encoding="utf-8").splitlines()


INFO = CompactInfo(
    classes=("cat", "a|b\nc"),
    input_size=(3, 8, 8),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    metrics={"accuracy": {"dense": 97.5, "compacted": 97.0}, "loss": 0.5},
    training="On pets, for a day.",
)


def test_the_card_tells_what_was_removed_how_it_was_trained_and_what_was_measured(
    tmp_path: Path,
) -> None:
    save(tmp_path, info=INFO, example_inputs=torch.randn(2, 3, 8, 8))
    said = lines(tmp_path)
    assert "# Sequential, compacted" in said
    assert "| neurons | 16 | 8 |" in said
    assert "| parameters | 1,634 | 802 |" in said
    assert "| multiply-adds (input 2x3x8x8) | 3,232 | 1,584 |" in said
    assert "On pets, for a day." in said
    assert "| accuracy | 97.50 | 97.00 |" in said
    assert "| loss |  | 0.50 |" in said
    assert "- 2 classes: cat, a\\|b c" in said
    assert "- normalized: images in [0, 1], mean (0.5, 0.5, 0.5), std (0.25, 0.25, 0.25)" in said
    measured = said[said.index("## Measured") + 2]
    pattern = r"- A run on an input of 2x3x8x8 took [\d.]+ ms before, [\d.]+ ms after: medians of runs in turns"
    assert re.match(f"{pattern} on a CPU with 1 thread", measured)


def test_the_card_names_no_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_rsst.saving import receipt

    monkeypatch.setattr(
        receipt,
        "_circumstances",
        lambda *_: {"device": "Brand X900", "threads": 1, "torch": "2.6.0", "inputs": [[2, 192]]},
    )
    save(tmp_path, example_inputs=torch.randn(2, 192))
    text = "\n".join(lines(tmp_path))
    assert "on a GPU, with torch 2.6.0" in text
    assert "X900" not in text
    assert str(tmp_path) not in text


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    save(tmp_path)
    said = lines(tmp_path)
    assert said.count("Not noted.") == 1  # how it was trained
    assert "- Not noted." in said
    assert not {"## Metrics", "## Measured"} & set(said)
    assert not [line for line in said if "None" in line or "predict" in line]
    assert "model = torch_rsst.load_compact(folder, model=…).eval()" in said


def test_the_layers_of_several_compactions_are_counted_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = net().eval()
    for _ in range(2):
        groups = torch_rsst.find_groups(small)
        torch_rsst.apply_mask(small, torch_rsst.regroup(small, groups, amount=0.5))
        small = torch_rsst.compact(small, groups)
    torch_rsst.save_compact(small, tmp_path)
    rows = [line for line in lines(tmp_path) if "| neurons | 8 | 2 |" in line]
    assert len(rows) == 2


def test_a_hub_reads_its_metadata(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    save(tmp_path / "images", info=INFO)
    save(tmp_path / "other")
    expected = {"library_name": "torch-rsst", "tags": ["pruning", "structured-sparsity"]}
    card = hub.ModelCard.load(tmp_path / "images" / "README.md")
    assert card.data.to_dict() == {**expected, "pipeline_tag": "image-classification"}
    assert card.content.startswith("---\nlibrary_name: torch-rsst\n")
    assert hub.ModelCard.load(tmp_path / "other" / "README.md").data.to_dict() == expected


@pytest.mark.needs_timm
def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    from image_files import picture

    model = timm.create_model("test_vit", num_classes=2, img_size=32).eval()
    groups = torch_rsst.find_groups(model)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = torch_rsst.compact(model, groups)
    torch_rsst.save_compact(small, tmp_path, info=CompactInfo(classes=("cat", "dog")))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "# test_vit, compacted" in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    image = picture(1, 0, 40)
    image.save("image.png")
    names: dict[str, Any] = {}
    exec(code[1].replace("path/to/this/folder", str(tmp_path)), names)
    expected = small(torch_rsst.compact_info(tmp_path).transform()(image)[None]).softmax(-1)
    assert torch.equal(names["probabilities"], expected)


@pytest.mark.parametrize("edited", [True, False])
def test_a_card_is_replaced_unless_somebody_wrote_or_edited_it(
    tmp_path: Path, edited: bool
) -> None:
    if edited:
        save(tmp_path)
    card = tmp_path / "README.md"
    card.write_text("Mine.")
    for _ in range(2):
        with pytest.warns(torch_rsst.CompactionWarning, match="edited by hand: it stays. Delete"):
            save(tmp_path)
        assert card.read_text() == "Mine."
    card.unlink()
    save(tmp_path)
    first = card.read_text()
    save(tmp_path, info=INFO)
    assert card.read_text() != first


def test_a_card_beside_a_damaged_description_stays(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "compact.json").write_text("{")
    with pytest.warns(torch_rsst.CompactionWarning, match="it stays"):
        save(tmp_path)
    torch_rsst.load_compact(tmp_path, model=net())
