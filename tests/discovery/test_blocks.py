"""Whole residual sublayers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import difference, randomize
from decoders import (
    ATTENTION,
    LATENT,
    MAMBA,
    MIXTRAL,
    SIZES,
    assert_serves,
    decoder,
    halved,
)
from torch import Tensor, nn

import torch_rsst
from torch_rsst.discovery.blocks import Nothing

LLAMA = {**SIZES, **ATTENTION, "intermediate_size": 24}


class Block(nn.Module):
    def __init__(self, dim: int, scale: bool = False) -> None:
        super().__init__()
        self.before, self.then = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 12), nn.GELU(), nn.Linear(12, dim))
        self.scale = nn.Parameter(torch.ones(dim)) if scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + self.attn(y, y, y, need_weights=False)[0] * self.scale
        return x + self.mlp(self.then(x))


class Gated(nn.Module):
    """No residual: the MLP's output multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x * self.mlp(x))


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def paths(model: nn.Module, groups: Any) -> list[str]:
    small = copy.deepcopy(model)
    torch_rsst.apply_mask(small, torch_rsst.regroup(small, groups, amount=1.0, min_keep=0))
    small = torch_rsst.compact(small, groups)
    return [path for path, module in small.named_modules() if isinstance(module, Nothing)]


@pytest.mark.parametrize(
    ("name", "options", "blocks"),
    [
        ("Llama", LLAMA, ["self_attn", "mlp"]),
        ("Gemma2", {**LLAMA, "head_dim": 4}, ["self_attn", "mlp"]),
        ("Mixtral", MIXTRAL, ["self_attn", "mlp"]),
        ("DeepseekV3", LATENT, ["self_attn", "mlp"]),
        ("Mamba", MAMBA, ["mixer"]),
    ],
)
def test_decoders_without_half_of_their_sublayers(
    name: str, options: dict[str, Any], blocks: list[str], tmp_path: Path
) -> None:
    model = decoder(name, options)
    groups = torch_rsst.find_groups(model, kinds=("blocks",))
    stem = "backbone" if name == "Mamba" else "model"
    assert paths(model, groups) == [f"{stem}.layers.{i}.{block}" for i in range(2) for block in blocks]  # fmt: skip
    assert_serves(*halved(model, groups), tmp_path)
    masked, small = halved(model, groups, scope="global")
    assert_serves(masked, small, tmp_path / "global")
    assert len(torch_rsst.find_groups(small, kinds="blocks")) == len(groups) // 2


def test_blocks_of_a_model_written_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Block(8), Block(8, scale=True), nn.Linear(8, 3))
    randomize(model.double().eval())
    groups = torch_rsst.find_groups(model, kinds="blocks")
    assert paths(model, groups) == ["1.attn", "1.mlp", "2.attn", "2.mlp"]
    assert {m.parameter for m in groups[1].members} == {
        f"1.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }
    masked, small = halved(model, groups)
    assert difference(masked, small, X) <= 1e-12
    with pytest.raises(ValueError, match=r"activations of the model \(4 blocks\).*magnitude and"):
        torch_rsst.regroup(model, groups, importance="variance", batches=[X])
    refill = torch_rsst.regroup(model, groups)
    with pytest.raises(ValueError, match=r"activations of the model \(4 blocks\)"):
        torch_rsst.reconstruct(model, groups, refill, batches=[X])


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_attentions_of_an_encoder_of_pytorch_are_blocks(norm_first: bool) -> None:
    """The encoder asks them whether batches come first, and for their biases."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = randomize(nn.Sequential(encoder, nn.Linear(8, 3)).double().eval())
    groups = torch_rsst.find_groups(model, kinds="blocks", example_inputs=X)
    assert paths(model, groups) == ["0.layers.0.self_attn", "0.layers.1.self_attn"]
    masked, small = halved(model, groups)
    assert difference(masked, small, X) <= 1e-12
    assert difference(masked.train(), small.train(), X) <= 1e-12


class Asked(Block):
    """It asks its attention for what a module of zeros has not."""

    def forward(self, x: Tensor) -> Tensor:
        self.attn.in_proj_weight.sum()
        return super().forward(x)


def test_blocks_that_are_asked_for_more_are_refused_with_the_cause() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Asked(8), nn.Linear(8, 3)).double()
    with pytest.warns(
        torch_rsst.UnsupportedModuleWarning, match=r"attn .blocks.: .*AttributeError"
    ):
        groups = torch_rsst.find_groups(model, kinds="blocks", example_inputs=X)
    assert paths(model, groups) == ["1.mlp"]


def test_a_bias_alone_keeps_its_block() -> None:
    model = randomize(nn.Sequential(nn.Linear(8, 8), Block(8), nn.Linear(8, 3)).double().eval())
    groups = torch_rsst.find_groups(model, kinds="blocks")
    names = [m.parameter for m in groups[1].members if m.ranked]
    weights = dict(model.named_parameters())
    torch_rsst.apply_mask(model, {n: torch.zeros_like(weights[n]).bool() for n in names})
    with pytest.warns(torch_rsst.CompactionWarning, match="Nothing was cut"):
        small = torch_rsst.compact(model, groups, keep_masks=True)
    assert difference(model, small, X) == 0.0


def test_other_kinds_are_not_asked_for_together_and_never_by_default() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Block(8), nn.Linear(8, 3))
    assert {layer.kind for layer in torch_rsst.find_groups(model).layers} == {"heads", "neurons"}
    with pytest.raises(ValueError, match=r"blocks without other kinds, got .*find_groups.model"):
        torch_rsst.find_groups(model, kinds=("blocks", "heads"))


def test_models_without_residual_modules_say_so() -> None:
    for model in (Gated(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))):
        with pytest.raises(ValueError, match="no module of it puts out what is added to its own"):
            torch_rsst.find_groups(model, kinds="blocks")
    with pytest.raises(ValueError, match="pass example_inputs"):
        torch_rsst.find_groups(nn.Identity(), kinds="blocks")
