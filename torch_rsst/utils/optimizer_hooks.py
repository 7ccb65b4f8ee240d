"""Steps of optimizers, as the hooks see them that PyTorch runs around each."""

from __future__ import annotations

from types import FrameType

from torch.optim import Optimizer


def is_nested(optimizer: Optimizer, step: FrameType) -> bool:
    """Whether a step, given by the frame that runs its hooks, was called from a step of the same optimizer.

    A subclass whose step() calls super().step() runs the hooks twice. The stack tells: a counter
    would stay up for good after a step that raised.
    """
    outer = step.f_back
    while outer is not None:
        if outer.f_code is step.f_code and outer.f_locals.get("self") is optimizer:
            return True
        outer = outer.f_back
    return False
