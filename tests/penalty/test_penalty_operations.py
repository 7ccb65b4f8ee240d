"""What a penalty step asks of the device: no wait, no copy between devices, no data-dependent shape."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import mlp, weights_of
from torch.utils._python_dispatch import TorchDispatchMode

from torch_rsst import RegularizedPruner, apply_mask

WAITS = {"aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal"}
DATA_DEPENDENT = {"aten.nonzero", "aten.masked_select", "aten.unique", "aten.where.self_only"}


class Recorder(TorchDispatchMode):
    """Counts every operator that runs, and looks at those whose arguments matter."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.moved: list[str] = []
        self.bool_indexed: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        self.names[name] += 1
        if name == "aten._to_copy" and kwargs.get("device") not in (None, args[0].device):
            self.moved.append(str(func))
        if name in ("aten.index", "aten.index_put", "aten.index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            self.bool_indexed.append(str(func))
        return func(*args, **kwargs)


def attached(
    mode: str, by_hooks: bool, block: bool, total_steps: int = 4
) -> tuple[Any, Any, RegularizedPruner]:
    model = mlp()
    apply_mask(model, {"0.weight": torch.arange(32).reshape(8, 4) % 3 > 0})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    refill = {
        n: (torch.arange(w.numel()) % 2 > 0).reshape(w.shape) for n, w in weights_of(model).items()
    }
    pruner = RegularizedPruner(
        model,
        refill,
        total_steps=total_steps,
        mode=mode,
        block_loss_grad=block,
        optimizer=None if by_hooks else optimizer,
    )
    return model, optimizer, pruner


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("by_hooks", [False, True])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_penalty_step_never_waits_for_the_device(mode, by_hooks, block):
    model, optimizer, pruner = attached(mode, by_hooks, block)
    loss = model(torch.ones(5, 4)).square().mean()
    before = weights_of(model)
    with Recorder() as recorder:
        loss.backward()
        optimizer.step()
        if by_hooks:
            pruner.step()
    assert not recorder.names.keys() & (WAITS | DATA_DEPENDENT)
    assert not recorder.moved
    assert not recorder.bool_indexed
    assert pruner.steps == 1
    assert not torch.equal(before["2.weight"], model[2].weight)
    pruner.detach()


def test_the_recorder_sees_what_it_looks_for():
    x = torch.ones(3)
    with Recorder() as recorder:
        float(x.sum())
        x[x > 0]
        x[x > 0] = 2.0
        x.nonzero()
        x.to("meta")
    assert recorder.names.keys() >= {"aten._local_scalar_dense", "aten.nonzero"}
    assert len(recorder.bool_indexed) == 2
    assert len(recorder.moved) == 1


def make_gradients(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_penalty_costs_at_most_four_operations_a_parameter(mode):
    # Of so many steps the second is not one after which the norm is looked at.
    _, optimizer, pruner = attached(mode, by_hooks=False, block=False, total_steps=400)
    make_gradients(optimizer)
    optimizer.step()  # makes what all others use again
    with Recorder() as recorder:
        optimizer.step()
    pruner.detach()
    with Recorder() as without:
        optimizer.step()
    extra = recorder.names - without.names
    for other in ("aten.detach", "aten.slice", "aten.view", "aten.promote_types"):  # no kernels
        extra.pop(other, None)
    assert 0 < sum(extra.values()) <= 4 * 4


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_step_in_inference_mode_leaves_nothing_that_later_ones_cannot_use(mode):
    _, optimizer, pruner = attached(mode, by_hooks=False, block=False)
    make_gradients(optimizer)
    with torch.inference_mode():
        optimizer.step()
    optimizer.step()
    assert pruner.steps == 2
    pruner.detach()
