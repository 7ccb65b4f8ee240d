"""The contract of adapters, on the modules that the shipped ones know by structure alone."""

from __future__ import annotations

import pytest
import torch
from contract import assert_contract
from torch import nn


@pytest.mark.parametrize("amount", [0.5, 0.75, 1.0, 1])
def test_two_layer_mlps(amount: float) -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    )
    inputs = torch.randn(3, 4, dtype=torch.float64)
    assert_contract(model, inputs, kinds=["neurons"], amounts=[amount])


@pytest.mark.needs_timm
@pytest.mark.parametrize("amount", [0.5, 1.0])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"qkv_bias": False}])
def test_timms_vision_transformer(amount: float, options: dict[str, bool]) -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=3, **options
    )
    inputs = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert_contract(model, inputs, kinds=["heads", "neurons"], amounts=[amount])
