"""Importance from data, recomputed one unit at a time; what several test files need for it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_rsst
from torch_rsst import find_groups, measure_importance
from torch_rsst.groups.groups import GroupLayer, Groups
from torch_rsst.groups.surgery import module_at
from torch_rsst.importance import Variance
from torch_rsst.masking.names import named_weights

NAMES = ["activation_l1", "activation_l2", "taylor", "variance"]


def loss_fn(output: Any, batch: Any) -> Tensor:
    return output.sin().mul(3.0).square().sum()


def measured(model: nn.Module, groups: Any, name: Any, batches: Any, **kwargs: Any) -> Any:
    """Scores of each layer, by its text."""
    found = measure_importance(model, groups, name, batches=batches, loss_fn=loss_fn, **kwargs)
    weights = named_weights(model)
    return {
        str(layer): found(layer, weights, {})
        for layer in torch_rsst.groups.groups.as_groups(groups).layers
    }


# The slow oracle: hooks on a dense copy, and the gradient of one unit's slice at a time


def dense_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).eval()
    torch_rsst.remove_all(copied, freeze_zeros=False)
    return copied


def one_unit(model: nn.Module, layer: GroupLayer, unit: int, batches: Any, call: Any) -> list[Any]:
    """(values, gradients) of a unit at each of its consumers, for each batch and call."""
    seen = []
    for member in layer.members:
        if not member.consumes:
            continue
        module = module_at(model, member.parameter.rpartition(".")[0])
        axis = 1 if isinstance(module, nn.Conv2d) else -1
        index = (member.unit_of == unit).nonzero().flatten()
        for batch in batches:
            values: list[Tensor] = []
            shifts: list[
                Tensor
            ] = []  # zeros, whose gradient is that of the slice they are added to

            def shift(
                _: Any, args: Any, axis: int = axis, index: Any = index, to: Any = (values, shifts)
            ) -> Any:
                values, shifts = to
                values.append(args[0].index_select(axis, index).detach())
                shifts.append(torch.zeros_like(values[-1], requires_grad=True))
                return (args[0].index_add(axis % args[0].ndim, index, shifts[-1]), *args[1:])

            handle = module.register_forward_pre_hook(shift)
            loss = loss_fn(call(model, batch), batch)
            handle.remove()
            seen += zip(values, torch.autograd.grad(loss, shifts), strict=True)
    return seen


def expected_loss(
    model: nn.Module, layer: GroupLayer, unit: int, batches: Any, call: Any, *, centered: bool
) -> float:
    """Σ over consumers and features of Var(a)·‖w‖², or E[a²]·‖w‖²: one feature after the other."""
    total = []
    for member in (m for m in layer.members if m.consumes):
        module = module_at(model, member.parameter.rpartition(".")[0])
        axis = 1 if isinstance(module, nn.Conv2d) else -1
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(
            lambda _, args, kwargs, to=seen: to.append(
                (args[0] if args else kwargs["input"]).clone()  # some are written to later
            ),
            with_kwargs=True,
        )
        with torch.no_grad():
            for batch in batches:
                call(model, batch)
        handle.remove()
        for feature in (member.unit_of == unit).nonzero().flatten().tolist():
            parts = [x.select(axis, feature).double().flatten().tolist() for x in seen]
            values = [value for part in parts for value in part]
            mean = math.fsum(values) / len(values) if centered else 0.0
            spread = math.fsum((value - mean) ** 2 for value in values) / len(values)
            weights = module.weight.select(member.dim, feature).double().flatten().tolist()
            total.append(spread * math.fsum(w * w for w in weights))
    return math.fsum(total)


def by_oracle(
    name: Any, model: nn.Module, layer: GroupLayer, batches: Any, call: Any
) -> list[float]:
    dense, scores = dense_copy(model), []
    for unit in range(layer.units):
        if name == "variance" or isinstance(name, Variance):
            centered = isinstance(name, Variance) and bool(name.reconstruct)
            arguments = (dense, layer, unit, batches, call)
            scores.append(expected_loss(*arguments, centered=centered))
            continue
        seen = one_unit(dense, layer, unit, batches, call)
        values = [v for activation, _ in seen for v in activation.double().flatten().tolist()]
        slopes = [g for _, gradient in seen for g in gradient.double().flatten().tolist()]
        if name == "activation_l1":
            scores.append(math.fsum(map(abs, values)) / len(values))
        elif name == "activation_l2":
            scores.append(math.sqrt(math.fsum(v * v for v in values) / len(values)))
        else:
            scores.append(math.fsum(abs(v * g) for v, g in zip(values, slopes, strict=True)))
    return scores


def check_against_oracle(
    model: nn.Module,
    groups: Groups,
    batches: Any,
    *,
    oracle_model: nn.Module | None = None,
    call: Any = None,
    tolerance: float = 1e-9,
) -> None:
    for name in (*NAMES, Variance(reconstruct=True)):
        got = measured(model, groups, name, batches, **({} if call is None else {"forward": call}))
        for layer in groups.layers:
            reference = oracle_model or model
            run = call or (lambda m, b: m(b))
            expected = by_oracle(name, reference, layer, batches, run)
            assert got[str(layer)].dtype == torch.float64
            assert got[str(layer)].tolist() == pytest.approx(expected, rel=tolerance, abs=1e-12), (
                name
            )


def literal() -> tuple[nn.Sequential, Groups]:
    """Three neurons: x, 2x and −x, of which the last puts out nothing for x > 0; loss = sum of outputs."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
        model[2].weight.copy_(torch.tensor([[10.0, -1.0, 5.0]]))
    return model, find_groups(model)
