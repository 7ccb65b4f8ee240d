"""Faults of ``torch.nn.utils.prune`` that are not repeated here; what stock does stands beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune as stock

import torch_rsst
from torch_rsst.testing import assert_mask_invariants

Fingerprint = Callable[[nn.Module], list[Any]]


def layer_of(*weight: float) -> nn.Linear:
    layer = nn.Linear(len(weight), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weight]))
    return layer


# What is ranked is the weight of now


def _step(layer: nn.Linear) -> None:
    """One optimizer step that makes the largest weight the smallest."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer.weight_orig.grad = layer.weight_orig.detach() - torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    optimizer.step()


def _load(layer: nn.Linear) -> None:
    layer.load_state_dict({**layer.state_dict(), "weight_orig": torch.tensor([[4.0, 3, 2, 1]])})


def _call_with_foreign_weights(layer: nn.Linear) -> None:
    _load(layer)
    layer(torch.ones(1, 4))
    functional_call(layer, {"weight_orig": torch.tensor([[1.0, 2, 3, 4]])}, (torch.ones(1, 4),))


@pytest.mark.parametrize("change", [_step, _load, _call_with_foreign_weights])
def test_what_is_pruned_next_is_lowest_now_where_stock_goes_by_a_stored_product(
    change: Callable[[nn.Linear], None],
) -> None:
    def masked_by(prune: Callable[[nn.Linear], Any], first: Callable[[nn.Linear], Any]) -> Any:
        layer = layer_of(1.0, 2.0, 3.0, 4.0)
        first(layer)
        change(layer)
        prune(layer)
        return layer.weight_mask.tolist()

    def stock_local(layer: nn.Linear) -> None:
        stock.l1_unstructured(layer, "weight", 1)

    def stock_global(layer: nn.Linear) -> None:
        stock.global_unstructured([(layer, "weight")], stock.L1Unstructured, amount=1)

    def our_global(layer: nn.Linear) -> None:
        torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=1)

    def our_method(layer: nn.Linear) -> None:
        torch_rsst.GlobalL1.apply(layer, "weight", 1)

    def stock_called_here(layer: nn.Linear) -> None:
        torch_rsst.l1_unstructured(layer, "weight", 1)

    def dense_by(module: Any) -> Callable[[nn.Linear], None]:
        return lambda layer: module.identity(layer, "weight")

    for stale in (stock_local, stock_global):
        assert masked_by(stale, dense_by(stock)) == [[0, 1, 1, 1]]  # the lowest of before
    for live in (our_global, our_method, stock_called_here):
        assert masked_by(live, dense_by(torch_rsst)) == [[1, 1, 1, 0]]
    for live in (our_global, our_method):
        assert masked_by(live, dense_by(stock)) == [[1, 1, 1, 0]]


# A call that fails changes nothing


def twelve_layers(*, recurrent: bool = False) -> nn.Sequential:
    """Some masked by us, some by stock, some dense; gradients everywhere; hooks of others."""
    layers: list[nn.Module] = [nn.Linear(4, 4) for _ in range(12)]
    if recurrent:
        layers[3] = nn.LSTM(4, 1)
    model = nn.Sequential(*layers)
    torch_rsst.apply_mask(model, {f"{i}.weight": torch.eye(4) for i in (0, 6, 7)})
    for i in (1, 6, 8):
        stock.random_unstructured(model[i], "weight", 3)
    torch_rsst.custom_from_mask(model[9], "bias", torch.tensor([0, 1, 1, 1]))
    for i in (2, 6):
        model[i].register_forward_pre_hook(lambda *_: None)
    model[6].register_buffer("scale", torch.ones(2))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    return model


def _pairs(model: nn.Sequential) -> list[tuple[nn.Module, str]]:
    return [(layer, "weight") for layer in model]


def _masks(model: nn.Sequential) -> dict[str, Tensor]:
    return {f"{i}.weight": torch.ones(4, 4) for i in range(12)}


def _apply_with_a_bad_mask_of_layer_7(model: nn.Sequential, bad: Any) -> None:
    torch_rsst.apply_mask(model, {**_masks(model), "7.weight": bad})


def _rank_with_bad_scores_of_layer_7(model: nn.Sequential, bad: Any) -> None:
    torch_rsst.global_unstructured(
        _pairs(model), torch_rsst.GlobalL1, {(model[7], "weight"): bad}, amount=1
    )


def _rank_with_a_bad_amount(model: nn.Sequential, bad: Any) -> None:
    torch_rsst.global_unstructured(_pairs(model), torch_rsst.GlobalL1, amount=bad)


def _rank_with_a_stock_rule_and_a_bad_amount(model: nn.Sequential, bad: Any) -> None:
    torch_rsst.global_unstructured(_pairs(model), torch_rsst.RandomUnstructured, amount=bad)


def _prune_layer_7(model: nn.Sequential, bad: Any) -> None:
    torch_rsst.GlobalL1.apply(model[7], "weight", bad)


def _cut_heads_of_layer_7(model: nn.Sequential, bad: Any) -> None:
    torch_rsst.head_structured(model[7], "weight", bad, 2, projections=1)


def _fill_layer_7(model: nn.Sequential, bad: Any) -> None:
    torch_rsst.fillback(model[7], "weight", bad, policy="zero")


def _stock_on_layer_7(model: nn.Sequential, bad: Any) -> None:
    torch_rsst.l1_unstructured(model[7], "weight", bad)


def _remove_layer_10(model: nn.Sequential, bad: Any) -> None:
    torch_rsst.remove(model[bad], "weight")


@pytest.mark.parametrize(
    ("call", "bad"),
    [
        (_apply_with_a_bad_mask_of_layer_7, torch.ones(4, 3)),
        (_apply_with_a_bad_mask_of_layer_7, torch.full((4, 4), 0.5)),
        (_apply_with_a_bad_mask_of_layer_7, torch.full((4, 4), math.nan)),
        (_rank_with_bad_scores_of_layer_7, torch.full((4, 4), math.nan)),
        (_rank_with_bad_scores_of_layer_7, torch.ones(16)),
        (_rank_with_a_bad_amount, 1.5),
        (_rank_with_a_bad_amount, 10**6),
        (_rank_with_a_bad_amount, -1),
        (_rank_with_a_bad_amount, math.nan),
        (_rank_with_a_stock_rule_and_a_bad_amount, 10**6),
        (_prune_layer_7, 99),
        (_cut_heads_of_layer_7, 3),
        (_fill_layer_7, 99),
        (_stock_on_layer_7, 99),
        (_remove_layer_10, 10),
    ],
)
def test_a_bad_argument_for_one_of_twelve_layers_changes_none(
    call: Callable[[nn.Sequential, Any], None], bad: Any, fingerprint: Fingerprint
) -> None:
    model = twelve_layers()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"."):
        call(model, bad)
    assert fingerprint(model) == before


def test_a_weight_that_diverged_in_one_of_twelve_layers_changes_none(
    fingerprint: Fingerprint,
) -> None:
    model = twelve_layers()
    with torch.no_grad():
        model[10].weight[1, 1] = math.nan
    before = fingerprint(model)
    with pytest.raises(ValueError, match="1 NaN among the entries to rank"):
        _rank_with_a_bad_amount(model, 3)
    assert fingerprint(model) == before


class InjectedError(Exception):
    pass


def failing_at(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise InjectedError
        return function(*args, **kwargs)

    return wrapped


def _apply_all(model: nn.Sequential) -> None:
    torch_rsst.apply_mask(model, {f"{i}.weight": torch.eye(4).flip(0) for i in (0, 1, 6, 7, 11)})


def _apply_all_of_a_recurrent_layer(model: nn.Sequential) -> None:
    names = {"3.weight_ih_l0": torch.eye(4), "3.weight_hh_l0": torch.zeros(4, 1)}
    torch_rsst.apply_mask(model, {"11.weight": torch.eye(4), **names})


def _rank_all(model: nn.Sequential) -> None:
    pairs = [(layer, "weight") for layer in model if isinstance(layer, nn.Linear)]
    torch_rsst.global_unstructured(pairs, torch_rsst.GlobalL1, amount=0.5)


def _remove(module: nn.Module, name: str) -> None:
    torch_rsst.remove(module, name, freeze_zeros=False)


def _remove_all(model: nn.Module) -> None:
    torch_rsst.remove_all(model, freeze_zeros=False)


def _fill_one(model: nn.Sequential) -> None:
    torch_rsst.fillback(model[6], "weight", 3, policy="zero")


def _cut_one(model: nn.Sequential) -> None:
    torch_rsst.head_structured(model[11], "weight", 1, 2, projections=1)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Module, "register_buffer"),
        (nn.Module, "register_forward_pre_hook"),
        (nn.Module, "register_parameter"),
        (nn.Module, "__setattr__"),
        (nn.Module, "__delattr__"),
        (torch.Tensor, "copy_"),
        (torch.Tensor, "to"),
        (torch.Tensor, "masked_fill_"),
        (torch.Tensor, "masked_fill"),
        (torch, "where"),
    ],
)
@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize(
    "call",
    [_apply_all, _apply_all_of_a_recurrent_layer, _rank_all, _remove_all, _fill_one, _cut_one],
)
def test_an_exception_anywhere_inside_changes_nothing(
    call: Callable[[nn.Sequential], None],
    number: int,
    owner: Any,
    name: str,
    fingerprint: Fingerprint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = twelve_layers(recurrent=True)
    before = fingerprint(model)
    raised = False
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing_at(number, getattr(owner, name)))
        try:
            call(model)
        except InjectedError:
            raised = True
    if raised:
        assert fingerprint(model) == before
        call(model)
    for layer in model:
        if any(isinstance(h, stock.BasePruningMethod) for h in layer._forward_pre_hooks.values()):
            layer(torch.ones(1, 4))  # what a raw stock call stored may be stale until then
    assert_mask_invariants(model)


# What lies under a mask stays there


class Mixed(nn.Module):
    """A convolution, a recurrent layer, attention and a linear layer, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.recurrent = nn.Conv1d(3, 4, 1), nn.LSTM(4, 4, batch_first=True)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.recurrent(self.convolution(x).transpose(1, 2))[0]
        return self.head(self.attention(x, x, x)[0])


def _mask_by_us(module: nn.Module, name: str, mask: Tensor) -> None:
    torch_rsst.apply_mask(module, {name: mask})


@pytest.mark.parametrize("latent", [math.nan, math.inf, -math.inf])
def test_a_masked_latent_that_diverged_reaches_no_output_and_no_gradient(latent: float) -> None:
    x = torch.ones(2, 3, 5, requires_grad=True)

    def poisoned(mask: Callable[[nn.Module, str, Tensor], Any]) -> Mixed:
        model = Mixed()
        for module, name in [
            (model.convolution, "weight"),
            (model.recurrent, "weight_hh_l0"),
            (model.attention, "in_proj_weight"),
            (model.attention.out_proj, "weight"),
            (model.head, "weight"),
            (model.head, "bias"),
        ]:
            alive = torch.ones_like(getattr(module, name))
            alive.view(-1)[1] = 0
            mask(module, name, alive)
            with torch.no_grad():
                getattr(module, f"{name}_orig").view(-1)[1] = latent
        return model

    assert not bool(poisoned(stock.custom_from_mask)(x).isfinite().all())
    for mask in (torch_rsst.custom_from_mask, _mask_by_us):
        model = poisoned(mask)
        for _ in range(2):
            model.zero_grad()
            output = model(x)
            output.square().sum().backward()
            assert bool(output.isfinite().all())
            assert x.grad is not None
            assert bool(x.grad.isfinite().all())
            for key, parameter in model.named_parameters():
                assert parameter.grad is not None
                assert bool(parameter.grad.isfinite().all()), key
        assert_mask_invariants(model)


@pytest.mark.parametrize("permanent", [_remove, lambda m, _: _remove_all(m)])
@pytest.mark.parametrize("mask", [torch_rsst.custom_from_mask, _mask_by_us])
def test_a_masked_latent_that_diverged_is_zero_once_pruning_is_permanent(
    mask: Callable[[nn.Module, str, Tensor], Any], permanent: Callable[[nn.Module, str], Any]
) -> None:
    layer = layer_of(1.0, 2.0)
    mask(layer, "weight", torch.tensor([[1.0, 0.0]]))
    with torch.no_grad():
        layer.weight_orig[0, 1] = math.nan
    permanent(layer, "weight")
    assert layer.weight.tolist() == [[1.0, 0.0]]


# Entries can come back


@pytest.mark.parametrize("module", [stock, torch_rsst], ids=["stock", "ours"])
def test_fillback_after_custom_from_mask_restores_exactly_what_was_there(module: Any) -> None:
    layer = nn.Linear(5, 4)
    weight, original = layer.weight, layer.weight.detach().clone()
    module.custom_from_mask(layer, "weight", torch.zeros(4, 5))
    assert not bool(layer(torch.ones(1, 5)).sub(layer.bias).any())
    torch_rsst.fillback(layer, "weight", 1.0)
    assert layer.weight_orig is weight
    assert torch.equal(layer.weight, original)
    assert_mask_invariants(layer)
    module.remove(layer, "weight")
    assert layer.weight is weight
    assert torch.equal(layer.weight, original)


@pytest.mark.parametrize("module", [stock, torch_rsst], ids=["stock", "ours"])
def test_fillback_composes_with_stock_methods_before_and_after(module: Any) -> None:
    layer = layer_of(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    module.l1_unstructured(layer, "weight", 3)
    module.l1_unstructured(layer, "weight", 2)
    assert layer.weight.tolist() == [[0, 0, 0, 0, 0, 6, 7, 8]]
    torch_rsst.fillback(layer, "weight", 2)
    assert layer.weight.tolist() == [[0, 0, 0, 4, 5, 6, 7, 8]]
    module.l1_unstructured(layer, "weight", 1)
    layer(torch.ones(1, 8))
    assert layer.weight.tolist() == [[0, 0, 0, 0, 5, 6, 7, 8]]
    torch_rsst.fillback(layer, "weight", 1.0)
    layer(torch.ones(1, 8))
    assert layer.weight.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    module.ln_structured(layer, "weight", 3, n=1, dim=1)
    layer(torch.ones(1, 8)).sum().backward()
    assert layer.weight.tolist() == [[0, 0, 0, 4, 5, 6, 7, 8]]
    assert layer.weight_orig.grad.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]
    (hook,) = layer._forward_pre_hooks.values()
    assert isinstance(hook, stock.PruningContainer)
    (stock.remove if module is stock else _remove)(layer, "weight")
    assert layer.weight.tolist() == [[0, 0, 0, 4, 5, 6, 7, 8]]
    assert not layer._forward_pre_hooks
