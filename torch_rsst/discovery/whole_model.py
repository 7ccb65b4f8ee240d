"""Confirm in the whole model what was found in its modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from torch_rsst.discovery.channels.base import Survey
from torch_rsst.discovery.channels.runs import Run, copies, like
from torch_rsst.discovery.channels.verify import Trials, trials_of
from torch_rsst.discovery.trial import randomized, tensors_of
from torch_rsst.groups.groups import GroupLayer

_IN_DOUBLE = 1e-4
"""How much outputs in double precision may differ: attentions and routers may compute in single precision within."""


def confirmed(
    model: nn.Module, example_inputs: Any, layers: Sequence[GroupLayer]
) -> tuple[list[GroupLayer], Survey]:
    """Those of the layers that can be cut exactly from the whole model, not only from the modules that hold them.

    What stands outside a module may read its weights, its sizes or its parts, or call it in other ways. The
    outputs of the model in training mode are compared as well, where nothing is random there.

    Args:
        model: that runs on the inputs; left as it is.
        example_inputs: as for :func:`torch_rsst.find_groups`.
        layers: found in it. Those that can be masked only are not tried.

    Returns:
        the layers that are left, and what is said of the others.
    """
    tried = [layer for layer in layers if not layer.fixed and trials_of(layer)]
    runs = _runs(model, example_inputs)
    first = next(runs, None)
    if first is None or first.are_exact(tried):
        return list(layers), Survey()
    trials = next(runs, first)
    exact = trials.exact(tried)
    left = [layer for layer in layers if layer not in tried or layer in exact]
    return left, Survey(refused=tuple(trials.refused), reasons=trials.reasons)


def _runs(model: nn.Module, example_inputs: Any) -> Iterator[Trials]:
    """Trials on copies that run: in single precision, which is fast, then in double, which tells more."""
    with suppress(Exception):  # of what cannot be copied
        for copy in chain([randomized(model).float()], copies(model)):
            for module in copy.modules():
                if isinstance(module, _DropoutNd):
                    module.p = 0.0
            run = Run(copy, like(example_inputs, copy))
            with torch.no_grad():
                in_training = tensors_of(run.training())
            with suppress(Exception):
                with torch.no_grad():
                    outputs = tensors_of(run.evaluating())
                run.settle()
                # What puts out the same bits in both modes computes the same.
                trains = run.trains and not _are_equal(in_training, outputs)
                yield Trials(copy, model, run.call, trains, True, _IN_DOUBLE)


def _are_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
