"""Let an optimizer go on with other parameters: the surviving slices of its state move along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_rsst.groups.surgery import Kept, Shortened, select
from torch_rsst.utils.errors import check_type, refuse
from torch_rsst.utils.optimizer_hooks import held_by


def move_optimizer(
    optimizer: Optimizer, successors: Mapping[nn.Parameter, Shortened | None]
) -> None:
    """Put successors in the place of an optimizer's parameters, and cut its state; in place.

    Args:
        optimizer: its groups, settings and hooks stay.
        successors: parameter → what it has become; None drops it. Others stay.

    Raises:
        TypeError: unless given an optimizer.
        ValueError: for state that cannot be cut; nothing is changed.
    """
    remedy = "Pass the torch.optim optimizer of the model."
    check_type(optimizer, Optimizer, "optimizer", "an optimizer", remedy)
    if not any(parameter in successors for parameter in held_by(optimizer)):
        got, remedy = "one of other parameters", "Pass the optimizer that trains this model."
        expected = "an optimizer of the model's parameters"
        refuse(ValueError, "optimizer", expected, got, remedy)
    if isinstance(optimizer, torch.optim.LBFGS):
        remedy = "Make a new one for the compacted model: it keeps a list of its parameters apart."
        expected = "an optimizer that holds parameters in its groups"
        refuse(ValueError, "optimizer", expected, "LBFGS", remedy)
    state: dict[Any, dict[str, Any]] = {}
    groups: list[list[Any]] = []
    for group in optimizer.param_groups:
        groups.append([])
        for parameter in group["params"]:
            new = successors.get(parameter, Shortened(parameter, {}))
            if new is None:
                continue
            groups[-1].append(new.parameter)
            if parameter in optimizer.state:
                remembered = optimizer.state[parameter].items()
                state[new.parameter] = {
                    key: _cut(value, parameter, new.kept, f"{type(optimizer).__name__}: {key!r}")
                    for key, value in remembered
                }
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = parameters
    optimizer.state.clear()
    optimizer.state.update(state)


def _cut(value: Any, parameter: Tensor, kept: Kept, subject: str) -> Any:
    if not isinstance(value, Tensor) or not kept or value.numel() <= 1 < parameter.numel():
        return value
    if value.shape != parameter.shape:
        expected = f"state of the parameter's shape {tuple(parameter.shape)}"
        got = f"shape {tuple(value.shape)}"
        remedy = "Make a new optimizer for the compacted model."
        refuse(ValueError, subject, expected, got, remedy)
    return select(value, kept)
