"""Confirm in the whole model what was found in its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from torch_rsst.discovery.channels.base import Survey
from torch_rsst.discovery.channels.runs import Run, copies, like
from torch_rsst.discovery.channels.verify import Trials, trials_of
from torch_rsst.discovery.trial import dense_copy, randomized
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
    quick = _trials(model, example_inputs, _in_single)
    if quick is not None and quick.are_exact(tried):
        return list(layers), Survey()
    trials = _trials(model, example_inputs, copies) or _trials(model, example_inputs, _with_own)
    if trials is None:
        return list(layers), Survey()
    exact = trials.exact(tried)
    left = [layer for layer in layers if layer not in tried or layer in exact]
    return left, Survey(refused=tuple(trials.refused), reasons=trials.reasons)


def _in_single(model: nn.Module) -> Iterator[nn.Module]:
    """In single precision, which is fast: differences that it leaves open are looked at in double."""
    yield randomized(model).float()


def _with_own(model: nn.Module) -> Iterator[nn.Module]:
    """With weights and types of the model's own, for models that run with no others."""
    yield dense_copy(model)


def _trials(
    model: nn.Module, example_inputs: Any, made: Callable[[nn.Module], Iterator[nn.Module]]
) -> Trials | None:
    """Of the first copy that runs; None where none does."""
    with suppress(Exception):  # of what cannot be copied
        for copy in made(model):
            _without_dropout(copy)
            run = Run(copy, example_inputs if made is _with_own else like(example_inputs, copy))
            with torch.no_grad():
                run.training()
            with suppress(Exception):
                with torch.no_grad():
                    run.evaluating()
                run.settle()
                return Trials(copy, model, run.call, run.trains, True, _IN_DOUBLE)
    return None


def _without_dropout(model: nn.Module) -> None:
    """Let nothing be dropped in training mode, in place: what is random cannot be compared."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(
                value, float
            ):  # of attentions, recurrent layers, paths
                vars(module)[name] = 0.0
