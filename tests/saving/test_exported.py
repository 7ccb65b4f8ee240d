"""Files that run without this library: programs of torch.export and ONNX, compared with the model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_rsst
from torch_rsst.saving.exported import export_onnx, export_program

pytest.importorskip("safetensors")


def masked() -> nn.Module:
    """With a mask of single weights that no compaction removes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).eval()
    groups = torch_rsst.find_groups(model)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    alive = torch_rsst.extract_mask(model)["2.weight"].clone()
    alive[0] = False
    torch_rsst.apply_mask(model, {"2.weight": alive})
    return torch_rsst.compact(model, groups, keep_masks=True)


def onnx_runtime() -> Any:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def test_both_files_are_without_masks_and_take_batches_of_any_size(tmp_path: Path) -> None:
    runtime = onnx_runtime()
    small, x = masked(), torch.randn(3, 4)
    receipt = torch_rsst.save_compact(
        small, tmp_path, example_inputs=torch.randn(1, 4), export=True, onnx=True, keep_masks=True
    )
    assert "2.weight_mask" in small.state_dict()
    assert receipt["exported"].keys() == {"model.pt2", "model.onnx"}
    assert all(error <= 1e-5 for error in receipt["exported"].values())
    program = torch.export.load(tmp_path / "model.pt2")
    assert not any("mask" in name for name in program.state_dict)
    torch.testing.assert_close(program.module()(x), small(x))
    assert b"mask" not in (tmp_path / "model.onnx").read_bytes()
    session = runtime.InferenceSession((tmp_path / "model.onnx").read_bytes())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), small(x).detach(), rtol=1e-5, atol=1e-6)
    torch_rsst.save_compact(small, tmp_path, keep_masks=True)
    assert not (tmp_path / "model.onnx").exists()
    assert not (tmp_path / "model.pt2").exists()


def test_several_inputs_by_name_reach_onnx() -> None:
    onnx_runtime()

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"y": self.layer(x) * scale, "x": x}

    inputs = {"x": torch.randn(2, 4), "scale": torch.randn(2, 1)}
    assert export_onnx(Two().eval(), inputs).max_error < 1e-5


@pytest.mark.parametrize("make", [export_program, export_onnx])
def test_a_file_that_puts_out_something_else_is_refused(make: Any) -> None:
    if make is export_onnx:
        onnx_runtime()

    class Counting(nn.Module):
        """The program keeps the number that the model had when it was traced."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.runs = nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                self.runs += 1
            return self.layer(x) + self.runs

    with pytest.raises(
        RuntimeError, match=r"export: expected the same outputs, got others, by [1-9]"
    ):
        make(Counting().eval(), torch.randn(2, 4))


def test_a_model_that_holds_tensors_of_a_graph_is_exported() -> None:
    model = masked()
    model.seen = [model[0](torch.randn(2, 4))]
    assert export_program(model, torch.randn(2, 4)).max_error < 1e-5


def test_what_onnx_cannot_express_is_told(tmp_path: Path) -> None:
    onnx_runtime()

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    words = r"onnx: expected a model that ONNX can express, got .*Leave onnx out; torch\.export"
    with pytest.raises(RuntimeError, match=words):
        export_onnx(Odd().eval(), torch.randn(2, 4))


def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx_runtime()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    words = r"onnx: expected onnxruntime, got none\. pip install 'torch-rsst\[onnx\]'"
    with pytest.raises(ModuleNotFoundError, match=words):
        torch_rsst.save_compact(
            masked(),
            tmp_path / "small",
            example_inputs=torch.randn(1, 4),
            onnx=True,
            keep_masks=True,
        )
    assert not (tmp_path / "small").exists()
    with pytest.raises(ValueError, match="export: expected example_inputs to trace, got none"):
        torch_rsst.save_compact(masked(), tmp_path / "small", onnx=True, keep_masks=True)


# Files that load by the names of other packages, as docs/saving.md says


@pytest.mark.needs_timm
def test_half_of_the_neurons_is_another_mlp_ratio_of_timm(tmp_path: Path) -> None:
    import timm

    name, options, x = "test_vit", {"num_classes": 3, "img_size": 32}, torch.randn(2, 3, 32, 32)
    model = timm.create_model(name, **options).eval()
    ratio = model.blocks[0].mlp.fc1.out_features / model.embed_dim
    groups = torch_rsst.find_groups(model, ("neurons",))
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = torch_rsst.compact(model, groups)
    torch_rsst.save_compact(small, tmp_path)
    file = tmp_path / "model.safetensors"
    again = timm.create_model(name, **options, mlp_ratio=ratio / 2, checkpoint_path=str(file))
    assert torch.equal(again.eval()(x), small(x))


@pytest.mark.needs_timm
@pytest.mark.parametrize("family", ["ViT", "Llama"])
def test_the_same_share_of_each_layer_is_another_configuration(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    sizes = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    }  # fmt: skip
    if family == "ViT":
        cls, kinds, after = transformers.ViTForImageClassification, ["neurons"], {}
        sizes |= {"image_size": 8, "patch_size": 4}
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    else:
        cls, kinds = transformers.LlamaForCausalLM, ["neurons", "heads"]
        sizes |= {"num_key_value_heads": 4, "head_dim": 4, "vocab_size": 11}
        after = {"num_attention_heads": 2, "num_key_value_heads": 2}
        inputs = {"input_ids": torch.arange(8).view(2, 4)}
    model = cls(cls.config_class(**sizes)).eval()
    groups = torch_rsst.find_groups(model, kinds, example_inputs=inputs)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = torch_rsst.compact(model, groups, example_inputs=inputs)
    torch_rsst.save_compact(small, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    config = cls.config_class(**{**sizes, **after, "intermediate_size": 16})
    again = cls.from_pretrained(None, config=config, state_dict=state).eval()
    torch.testing.assert_close(again(**inputs).logits, small(**inputs).logits)
