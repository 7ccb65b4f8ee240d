"""Momentum stays with its parameter, and starts anew where weights return, if asked for."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import gradient_step, linear, mlp, same
from torch import nn
from torch.nn.utils import prune as stock
from torch.optim import Optimizer

import torch_rsst

MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def norms() -> nn.Sequential:
    """Weights and biases of one shape: a wrong order would load without a word."""
    model = nn.Sequential(nn.LayerNorm(4), linear(4, 4), nn.LayerNorm(4))
    with torch.no_grad():
        for module in (model[0], model[2]):
            module.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
            module.bias.copy_(torch.tensor([0.5, 0.25, 0.125, 2.0]))
    return model


def pruned_by_stock() -> nn.Sequential:
    model = norms()
    for module in model:
        stock.l1_unstructured(module, "weight", amount=1)
    return model


def trained(model: nn.Module, make: Callable[[Any], Optimizer]) -> Optimizer:
    optimizer = make(model.parameters())
    for number in range(3):
        gradient_step(model, optimizer, number)
    return optimizer


def state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    return {name.removesuffix("_orig"): optimizer.state[p] for name, p in model.named_parameters()}


def assert_same_state(a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> None:
    assert a.keys() == b.keys()
    for name, state in a.items():
        assert state.keys() == b[name].keys()
        for key, value in state.items():
            torch.testing.assert_close(b[name][key], value, rtol=0, atol=0)


@every_optimizer
@pytest.mark.parametrize("named", [False, True])
def test_state_saved_under_stock_lands_on_its_parameters(
    make: Callable[[Any], Optimizer], named: bool
) -> None:
    old = pruned_by_stock()
    saved = trained(old, make)
    new = norms()
    torch_rsst.prepare_from_state_dict(new, old.state_dict()).load_state_dict(old.state_dict())
    optimizer = make(new.parameters())
    order = [name for name, _ in old.named_parameters()] if named else "stock"
    state = copy.deepcopy(saved.state_dict())
    optimizer.load_state_dict(torch_rsst.convert_optimizer_state(state, new, order))
    assert_same_state(state_by_name(old, saved), state_by_name(new, optimizer))
    assert state["param_groups"] == saved.state_dict()["param_groups"]  # not changed
    gradient_step(old, saved, 9)
    gradient_step(new, optimizer, 9)
    assert all(same(a.weight_orig, b.weight_orig) for a, b in zip(old, new, strict=True))


def test_without_conversion_momentum_lands_on_another_parameter() -> None:
    old = pruned_by_stock()
    saved = trained(old, MAKERS["sgd"])
    new = norms()
    torch_rsst.prepare_from_state_dict(new, old.state_dict())
    optimizer = MAKERS["sgd"](new.parameters())
    optimizer.load_state_dict(saved.state_dict())  # without a word
    moved = state_by_name(new, optimizer)["0.weight"]["momentum_buffer"]
    assert same(moved, state_by_name(old, saved)["0.bias"]["momentum_buffer"])


def test_several_groups_by_name() -> None:
    old = pruned_by_stock()

    def make(model: nn.Module) -> Optimizer:
        named = list(model.named_parameters())
        weights = [p for n, p in named if "weight" in n]
        biases = [p for n, p in named if "bias" in n]
        return torch.optim.SGD([{"params": weights, "lr": 0.2}, {"params": biases}], 0.1, 0.9)

    saved = make(old)
    gradient_step(old, saved, 0)
    new = norms()
    torch_rsst.prepare_from_state_dict(new, old.state_dict())
    optimizer = make(new)
    names = [name for name, _ in old.named_parameters()]
    order = [n for n in names if "weight" in n] + [n for n in names if "bias" in n]
    converted = torch_rsst.convert_optimizer_state(saved.state_dict(), new, order)
    assert [group["lr"] for group in converted["param_groups"]] == [0.2, 0.1]
    optimizer.load_state_dict(converted)
    assert_same_state(state_by_name(old, saved), state_by_name(new, optimizer))


def test_a_fresh_optimizer_has_nothing_to_move() -> None:
    old, new = pruned_by_stock(), norms()
    torch_rsst.prepare_from_state_dict(new, old.state_dict())
    saved = MAKERS["sgd"](old.parameters()).state_dict()
    assert torch_rsst.convert_optimizer_state(saved, new) == saved


@every_optimizer
@pytest.mark.parametrize("saved_as", ["dense", "pruned", "removed"])
@pytest.mark.parametrize("loaded_as", ["dense", "pruned", "removed"])
def test_our_own_states_load_in_one_another(
    make: Callable[[Any], Optimizer], saved_as: str, loaded_as: str
) -> None:
    def model_as(state: str) -> nn.Module:
        model = norms()
        if state != "dense":
            for module in model:
                torch_rsst.global_unstructured([(module, "weight")], torch_rsst.GlobalL1, amount=1)
        return torch_rsst.remove_all(model, freeze_zeros=False) if state == "removed" else model

    old, new = model_as(saved_as), model_as(loaded_as)
    saved, optimizer = trained(old, make), make(new.parameters())
    optimizer.load_state_dict(saved.state_dict())
    assert_same_state(state_by_name(old, saved), state_by_name(new, optimizer))


def _both_masked() -> nn.Module:
    model = norms()
    ones = torch.ones(4, dtype=torch.bool)
    torch_rsst.apply_mask(model, {"0.weight": ones, "0.bias": ones})
    return model


def _sgd(parameters: Any) -> dict[str, Any]:
    return torch.optim.SGD(parameters, 0.1).state_dict()


@pytest.mark.parametrize(
    ("model", "state", "order", "error", "text"),
    [
        (norms(), {}, "stock", ValueError, "optimizer state: expected a complete state"),
        (norms(), None, "stock", ValueError, "got NoneType"),
        *(
            (
                norms(),
                _sgd(norms().parameters()),
                order,
                TypeError,
                f"from_order: expected 'stock' or a list of names, got {got}. Pass [name for",
            )
            for order, got in [
                (5, "5"),
                (None, "None"),
                (b"stock", "b'stock'"),
                ("dense", "'dense'"),
                ([0.5, 0.5], "[0.5, 0.5]"),
                (torch.tensor(2), "a Tensor of shape ()"),
            ]
        ),
        (
            _both_masked(),
            _sgd(norms().parameters()),
            "stock",
            ValueError,
            "from_order=\"stock\": expected one pruned parameter per module, got '0.weight', "
            "'0.bias'. Pass from_order: the names",
        ),
        (
            norms(),
            _sgd([{"params": [p]} for p in norms().parameters()]),
            "stock",
            ValueError,
            'from_order="stock": expected one parameter group, got 6. Pass from_order',
        ),
        (
            norms(),
            _sgd(linear().parameters()),
            "stock",
            ValueError,
            "expected one name per parameter, got 2 in the state and 6 different names. Name each",
        ),
        (
            linear(),
            _sgd(linear().parameters()),
            ["weight", "weight"],
            ValueError,
            "expected one name per parameter, got 2 in the state and 1 different names",
        ),
        (
            linear(),
            _sgd(linear().parameters()),
            ["weight", "nobody"],
            KeyError,
            "from_order: expected parameters of the model, got 'nobody'. It has 'weight', 'bias'",
        ),
        (
            linear(),
            trained(linear(), MAKERS["sgd"]).state_dict(),
            ["bias", "weight"],
            ValueError,
            "optimizer state of 'bias': expected momentum_buffer of shape (3,), got shape (3, 4). "
            "The order is another one",
        ),
    ],
)
def test_states_that_do_not_fit(
    model: nn.Module, state: Any, order: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        torch_rsst.convert_optimizer_state(state, model, order)


@every_optimizer
@pytest.mark.parametrize("reset", [True, False])
def test_returned_entries_keep_or_lose_their_moments(
    make: Callable[[Any], Optimizer], reset: bool
) -> None:
    layer = linear()
    optimizer = trained(layer, make)
    torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=6)
    before = {k: v.clone() for k, v in optimizer.state[layer.weight_orig].items() if v.ndim}
    masked = layer.weight_mask == 0
    torch_rsst.fillback(layer, "weight", 4, reset_moments=optimizer if reset else None)
    returned = masked & (layer.weight_mask == 1)
    assert int(returned.sum()) == 4
    assert before
    for key, was in before.items():
        expected = was.masked_fill(returned, 0) if reset else was
        assert same(optimizer.state[layer.weight_orig][key], expected)


def test_the_step_count_is_no_moment() -> None:
    layer = nn.Linear(1, 1)
    layer.weight.data = torch.tensor(3.0)  # of the shape that a step count has
    optimizer = torch.optim.Adam([layer.weight])
    layer.weight.grad = torch.tensor(1.0)
    optimizer.step()
    torch_rsst.apply_mask(layer, {"weight": torch.tensor(False)})
    torch_rsst.fillback(layer, "weight", 1.0, reset_moments=optimizer)
    state = optimizer.state[layer.weight_orig]
    assert [float(state[key]) for key in ("step", "exp_avg", "exp_avg_sq")] == [1.0, 0.0, 0.0]


def test_a_fillback_without_an_optimizer_to_reset(
    fingerprint: Callable[[nn.Module], list[Any]],
) -> None:
    layer = linear()
    torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=6)
    before = fingerprint(layer)
    with pytest.raises(TypeError, match="reset_moments: expected a torch optimizer, got bool"):
        torch_rsst.fillback(layer, "weight", 4, reset_moments=True)  # type: ignore[arg-type]
    assert fingerprint(layer) == before


@pytest.mark.parametrize("reset", [True, False])
def test_refill_resets_the_moments_of_what_returns(reset: bool) -> None:
    model = mlp()
    optimizer = trained(model, MAKERS["sgd"])
    groups = torch_rsst.find_groups(model)
    torch_rsst.global_unstructured([(model[0], "weight")], torch_rsst.GlobalL1, amount=0.5)
    masked = model[0].weight_mask == 0
    before = optimizer.state[model[0].weight_orig]["momentum_buffer"].clone()
    refill = torch_rsst.Refill(
        model,
        groups,
        optimizer=optimizer,
        steps_per_round=1,
        rounds=1,
        regroup_amount=0.25,
        reset_moments=reset,
    )
    next(iter(refill)).pruner.detach()
    returned = masked & (model[0].weight_mask == 1)
    assert bool(returned.any())
    after = optimizer.state[model[0].weight_orig]["momentum_buffer"]
    assert same(after, before.masked_fill(returned, 0) if reset else before)


def test_refill_needs_an_optimizer_to_reset() -> None:
    model = mlp()
    groups = torch_rsst.find_groups(model)
    with pytest.raises(
        ValueError, match=r"reset_moments: expected an optimizer, got none\. Pass the"
    ):
        torch_rsst.Refill(model, groups, steps_per_round=1, reset_moments=True)


def test_names_in_the_state_decide_its_order() -> None:
    model = norms()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    gradient_step(model, optimizer, 0)
    for module in model:
        stock.l1_unstructured(module, "weight", amount=1)  # after the optimizer was made
    state = optimizer.state_dict()
    new = torch_rsst.prepare_from_state_dict(norms(), model.state_dict())
    converted = torch_rsst.convert_optimizer_state(state, new)
    assert converted["param_groups"][0]["params"] == state["param_groups"][0]["params"]
    assert all(
        same(converted["state"][i]["momentum_buffer"], state["state"][i]["momentum_buffer"])
        for i in state["state"]
    )


def test_an_optimizer_made_before_pruning_is_told_from_one_made_after() -> None:
    layer = linear()
    optimizer = trained(layer, MAKERS["sgd"])
    stock.l1_unstructured(layer, "weight", amount=1)
    with pytest.raises(
        ValueError, match=r"Made before pruning, an optimizer keeps the dense order"
    ):
        torch_rsst.convert_optimizer_state(optimizer.state_dict(), layer)


def test_an_optimizer_of_something_else_has_nothing_to_reset(
    fingerprint: Callable[[nn.Module], list[Any]],
) -> None:
    layer, stranger = linear(), linear()
    torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=6)
    before = fingerprint(layer)
    optimizer = torch.optim.SGD(stranger.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"every penalized parameter in its groups, got none of 'weight'"
    ):
        torch_rsst.fillback(layer, "weight", 4, reset_moments=optimizer)
    assert fingerprint(layer) == before


def test_several_optimizers_may_be_named() -> None:
    layer = linear()
    weights, biases = (torch.optim.SGD([p], 0.1, 0.9) for p in (layer.weight, layer.bias))
    for optimizer in (weights, biases):
        gradient_step(layer, optimizer, 0)
    torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=6)
    torch_rsst.fillback(layer, "weight", 1.0, reset_moments=[weights, biases])
    assert int((weights.state[layer.weight_orig]["momentum_buffer"] == 0).sum()) == 6
