"""What the tests of the penalty's multiplier share: a model, its penalized half, and the measuring.

The multiplier is what a penalty did to a weight, divided by what it should have done once: 1.
``pytest --multipliers`` lists what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tiny_models import mlp, tokens, weights_of
from torch import Tensor, nn

from torch_rsst import RegularizedPruner

STRENGTH = 0.375

Record = Callable[[str, object], None]  # pytest's record_property


def penalized(model: nn.Module) -> dict[str, Tensor]:
    """P: every other entry of the weights; the biases are left out."""
    return {
        name: (torch.arange(w.numel()) % 2 == 0).reshape(w.shape)
        for name, w in weights_of(model).items()
        if name.endswith("weight")
    }


def attach(model: nn.Module, **kwargs: Any) -> RegularizedPruner:
    refill = {name: ~goes for name, goes in penalized(mlp()).items()}
    settings = {"total_steps": 1, "schedule": "linear", "strength": STRENGTH, **kwargs}
    return RegularizedPruner(model, refill, **settings)


def loss_of(model: nn.Module, number: int) -> Tensor:
    return model(tokens(number, 5, 4).to(next(model.parameters()).dtype)).square().mean()


def check_multiplier(
    record: Record, case: str, mode: str, measured: Mapping[str, Tensor], *, tolerance: float = 1e-6
) -> None:
    """Record the multiplier in P that is furthest from 1; it must be 1 there, and 0 elsewhere."""
    inside, outside, goes = [], [], penalized(mlp())
    for name, multiplier in measured.items():
        inside.append(multiplier[goes[name]])
        outside.append(multiplier[~goes[name]])
    all_inside = torch.cat(inside)
    record("multiplier", [case, mode, float(all_inside[(all_inside - 1).abs().argmax()])])
    torch.testing.assert_close(
        all_inside, torch.ones_like(all_inside), rtol=0, atol=tolerance, msg=f"{case}: P"
    )
    rest = torch.cat(outside)
    torch.testing.assert_close(
        rest, torch.zeros_like(rest), rtol=0, atol=tolerance, msg=f"{case}: outside of P"
    )
