"""Copies of a whole model with random weights, and their runs in both modes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map

from torch_rsst.discovery.probe import run_on
from torch_rsst.discovery.trial import one_line, randomized

LARGE = 300_000_000
"""Models of more parameters are checked in single precision, for memory."""


def copies(model: nn.Module) -> Iterator[nn.Module]:
    """Dense ones with random weights, in double precision if that runs and is not too large."""
    copy = randomized(model)
    small = sum(parameter.numel() for parameter in model.parameters()) < LARGE
    if small and all(p.device.type in ("cpu", "cuda") for p in model.parameters()):
        yield copy.double()
    yield copy.float()


def like(example: Any, model: nn.Module) -> Any:
    """Example inputs, copied, in the precision of a model."""
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def converted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().to(kind if value.is_floating_point() else value.dtype)

    return tree_map(converted, example)


class Run:
    """Runs of a model on the same inputs, in both modes."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model = model
        self.example = example
        self.trains = False
        self.error = ""
        self.statistics: dict[Tensor, Tensor] = {}

    def call(self, model: nn.Module) -> Any:
        """The outputs of a model for copies of the inputs."""
        copied = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, self.example)
        return run_on(model, copied)

    def training(self) -> Any:
        """In training mode, where parts of the model may run that do not otherwise; if it can."""
        norms = [m for m in self.model.modules() if isinstance(m, _NormBase)]
        for norm in norms:
            norm.momentum = 1.0
        try:
            out = self.call(self.model.train())
        except Exception as failure:
            self.error = one_line(failure)
            return None
        self.trains = True
        self.statistics = {b: b.clone() for n in norms for b in n.buffers() if b.ndim}
        return out

    def settle(self) -> None:
        """Let the statistics of batch norms be those of the run in training mode: no channel drowns."""
        for buffer, value in self.statistics.items():
            if bool(value.isfinite().all()):
                buffer.copy_(value)

    def evaluating(self) -> Any:
        """In eval mode."""
        return self.call(self.model.eval())
