"""What optimizers hold, and their steps, as the hooks see them that PyTorch runs around each."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch.optim import Optimizer


def held_by(*optimizers: Optimizer) -> list[Any]:
    """The parameters in the groups of optimizers, in the order in which state dicts number them."""
    return [p for each in optimizers for group in each.param_groups for p in group["params"]]


def is_nested(optimizer: Optimizer, step: FrameType) -> bool:
    """Whether a step, given by the frame that runs its hooks, was called from a step of the same optimizer.

    A subclass whose step() calls super().step() runs the hooks twice.
    """
    return any(outer is optimizer for outer in steps_around(step))


def steps_around(step: FrameType) -> Iterator[Optimizer]:
    """The optimizers from whose steps a step, given by the frame that runs its hooks, was called.

    The stack tells: a counter would stay up for good after a step that raised.
    """
    outer = step.f_back
    while outer is not None:
        if outer.f_code is step.f_code:
            yield outer.f_locals["self"]
        outer = outer.f_back
