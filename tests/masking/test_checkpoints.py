"""State dicts between dense and masked models: nothing is guessed, nothing half loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import linear, mlp, same, tokens
from torch import Tensor, nn
from torch.nn.utils import prune as stock

import torch_rsst
from torch_rsst.testing import assert_mask_invariants

Fingerprint = Callable[[nn.Module], list[Any]]
KEEP = {"0.weight": torch.eye(8, 4).bool(), "2.bias": torch.tensor([True, False])}


def pruned(seed: int = 7) -> nn.Sequential:
    model = mlp(seed=seed)
    torch_rsst.apply_mask(model, KEEP)
    return model


def test_a_fresh_model_is_rebuilt_strictly() -> None:
    old, new = pruned(), mlp(seed=3)
    torch_rsst.prepare_from_state_dict(new, old.state_dict())
    new.load_state_dict(old.state_dict(), strict=True)
    assert same(new(tokens(0, 5, 4)), old(tokens(0, 5, 4)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize("saved", [dict, lambda s: {k: v.clone() for k, v in s.items()}])
def test_a_module_that_is_registered_twice_is_rebuilt(saved: Any) -> None:
    old, new = Twice(), Twice()
    torch_rsst.apply_mask(old, {"b.weight": torch.eye(4).bool()})
    state = saved(old.state_dict())
    torch_rsst.prepare_from_state_dict(new, state)
    new.load_state_dict(state, strict=True)
    assert same(new(tokens(0, 5, 4)), old(tokens(0, 5, 4)))
    assert_mask_invariants(new)


def test_dense_weights_for_a_masked_parameter_need_a_choice(fingerprint: Fingerprint) -> None:
    model, state = pruned(), mlp().state_dict()
    before = fingerprint(model)
    with pytest.raises(
        ValueError, match=r"got dense weights for '0.weight', '2.bias'. Call load_dense"
    ):
        torch_rsst.prepare_from_state_dict(model, state)
    assert fingerprint(model) == before


def test_keeping_the_masks() -> None:
    model, dense = pruned(), mlp(seed=1)
    assert torch_rsst.load_dense_state_dict(model, dense.state_dict(), mask="keep") is model
    assert torch.equal(torch_rsst.extract_mask(model)["0.weight"], KEEP["0.weight"])
    assert same(model[0].weight_orig, dense[0].weight)
    assert same(model[0].weight, dense[0].weight * KEEP["0.weight"])
    assert same(model[2].weight, dense[2].weight)
    assert model[2].bias.tolist()[1] == 0.0


def test_masking_the_zeros() -> None:
    saved = torch_rsst.remove_all(pruned(seed=2), freeze_zeros=False).state_dict()
    saved["0.weight"][0, 0] = 0.0
    saved["2.weight"][0, 0] = 0.0  # of a parameter that has no mask
    model = pruned()
    torch_rsst.load_dense_state_dict(model, saved, mask="zeros")
    masks = torch_rsst.extract_mask(model)
    expected = KEEP["0.weight"].clone()
    expected[0, 0] = False
    assert masks.keys() == KEEP.keys()
    assert torch.equal(masks["0.weight"], expected)
    assert same(model[0].weight, saved["0.weight"])


def test_removing_the_masks() -> None:
    model, dense = pruned(), mlp(seed=1)
    torch_rsst.load_dense_state_dict(model, dense.state_dict(), mask="remove")
    assert not torch_rsst.is_pruned(model)
    assert all(same(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("mask", ["keep", "zeros", "remove"])
def test_wrappers_tied_weights_and_buffers(mask: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.second = linear(4, 4), nn.BatchNorm1d(4), linear(4, 4)
            self.second.weight = self.first.weight

    model, dense = Tied(), Tied()
    torch_rsst.apply_mask(model, {"first.weight": torch.eye(4)})
    with torch.no_grad():
        dense.first.weight.fill_(2.0)
        dense.norm.running_mean.fill_(3.0)
    state = {f"module.{key}": value for key, value in dense.state_dict().items()}
    torch_rsst.load_dense_state_dict(nn.DataParallel(model), state, mask=mask)  # type: ignore[arg-type]
    assert model.norm.running_mean.tolist() == [3.0] * 4
    assert model.second.weight.tolist() == model.first.weight.tolist()
    expected = {
        "keep": torch.eye(4) * 2,
        "zeros": torch.full((4, 4), 2.0),
        "remove": torch.full((4, 4), 2.0),
    }
    assert torch.equal(model.first.weight, expected[mask])


def _without(key: str) -> dict[str, Any]:
    return {k: v for k, v in mlp().state_dict().items() if k != key}


@pytest.mark.parametrize(
    ("state", "mask", "error", "text"),
    [
        (
            mlp().state_dict(),
            "kept",
            ValueError,
            "mask: expected one of 'keep', 'zeros', 'remove', got",
        ),
        (
            _without("0.bias"),
            "keep",
            KeyError,
            "the model's keys, got none of '0.bias'. Pass the full",
        ),
        (
            {**_without("0.bias"), "x": torch.ones(1)},
            "remove",
            KeyError,
            "the model's keys, got none of '0.bias' and unknown 'x'. Pass",
        ),
        (
            {**mlp().state_dict(), "0.weight": torch.ones(4, 8)},
            "remove",
            ValueError,
            r"state_dict: '0.weight': expected torch.Size\(\[8, 4\]\), got torch.Size\(\[4, 8\]\)",
        ),
        ({**mlp().state_dict(), "0.weight": None}, "keep", ValueError, r"got NoneType"),
        (
            pruned().state_dict(),
            "keep",
            ValueError,
            "a dense one, got one with masks of its own. Call",
        ),
        (3, "keep", TypeError, "state_dict: expected a dict, got int"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    state: Any, mask: Any, error: type[Exception], text: str, fingerprint: Fingerprint
) -> None:
    model = pruned()
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        torch_rsst.load_dense_state_dict(model, copy.copy(state), mask=mask)
    assert fingerprint(model) == before


def test_refresh_renews_what_stock_hooks_have_stored() -> None:
    from torch.nn.utils import prune as stock

    layer = linear()
    stock.l1_unstructured(layer, "weight", amount=1)
    state = layer.state_dict()
    layer.load_state_dict({**state, "weight_orig": 2 * state["weight_orig"]})
    stale = layer.weight.detach().clone()
    assert torch_rsst.refresh(layer) is layer
    assert same(layer.weight, layer.weight_orig * layer.weight_mask)
    assert not same(layer.weight, stale)


def test_a_mask_that_a_stock_class_has_set_by_itself_can_be_copied_once_refreshed() -> None:
    from torch.nn.utils.prune import BasePruningMethod, L1Unstructured

    class Checkered(BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            return (torch.arange(t.numel()).reshape(t.shape) % 2).to(default_mask)

    for apply in (
        lambda layer: Checkered.apply(layer, "weight"),
        lambda layer: L1Unstructured.apply(layer, "weight", 0.5),
    ):
        model = nn.Sequential(linear())
        apply(model[0])
        model(tokens(0, 2, 4)).sum().backward()
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(model)
        twin = copy.deepcopy(torch_rsst.refresh(model))
        assert_mask_invariants(twin, torch_rsst.extract_mask(model))
        assert same(twin(tokens(0, 2, 4)), model(tokens(0, 2, 4)))
        assert isinstance(torch_rsst.remove_all(twin, freeze_zeros=False)[0].weight, nn.Parameter)
        assert type(twin[0]) is nn.Linear


def test_refresh_renews_the_list_that_recurrent_layers_keep() -> None:
    recurrent = nn.LSTM(2, 3)
    torch_rsst.apply_mask(recurrent, {"weight_hh_l0": torch.zeros(12, 3)})
    with torch.no_grad():
        recurrent.weight_hh_l0_mask.fill_(1.0)
    torch_rsst.refresh(recurrent)
    assert same(recurrent._flat_weights[1], recurrent.weight_hh_l0_orig)


def test_refresh_refuses_an_averaged_mask_by_its_name_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    stock.l1_unstructured(model[0], "weight", 0.5)
    model[0].weight_mask.fill_(0.5)
    product = model[0].weight
    with pytest.raises(ValueError, match=r"^mask of .*weight.*: expected zeros and ones"):
        torch_rsst.refresh(model)
    assert model[0].weight is product


def test_refresh_of_a_dense_model_does_nothing(fingerprint: Fingerprint) -> None:
    model = mlp()
    before = fingerprint(model)
    assert torch_rsst.refresh(model) is model
    assert fingerprint(model) == before


@pytest.mark.parametrize("mask", ["keep", "zeros", "remove"])
def test_a_load_that_fails_late_changes_nothing(mask: Any, fingerprint: Fingerprint) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return 1

        def set_extra_state(self, state: Any) -> None:
            raise RuntimeError("late")

    model = nn.Sequential(linear(), Extra(3, 2))
    torch_rsst.apply_mask(model, {"0.weight": torch.eye(3, 4)})
    state = nn.Sequential(linear(seed=1), Extra(3, 2)).state_dict()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="late"):
        torch_rsst.load_dense_state_dict(model, state, mask=mask)
    assert fingerprint(model) == before


@pytest.mark.parametrize("choice", ["keep", "zeros", "remove"])
def test_masks_made_in_inference_mode_are_no_obstacle(choice: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.inference_mode():
        stock.l1_unstructured(model[0], "weight", amount=2)
    dense = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).state_dict()
    torch_rsst.load_dense_state_dict(model, dense, mask=choice)
    weight = model[0].weight if choice == "remove" else model[0].weight_orig
    assert torch.equal(weight, dense["0.weight"])


class Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
        if tied:
            self.head.weight = self.table.weight


@pytest.mark.parametrize("mask", ["keep", "zeros", "remove"])
def test_a_dense_state_dict_that_unties_tied_weights_is_refused(mask, fingerprint) -> None:
    model, loose = Tied(True), Tied(False)
    torch_rsst.l1_unstructured(model.head, "weight", amount=0.5)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"one value, .* 'table\.weight' and 'head\.weight'"):
        torch_rsst.load_dense_state_dict(model, loose.state_dict(), mask=mask)
    assert fingerprint(model) == before


@pytest.mark.parametrize("mask", ["keep", "zeros", "remove"])
@pytest.mark.parametrize("left_out", ["table.weight", "head.weight"])
def test_a_dense_state_dict_may_hold_one_name_of_a_tied_weight(mask, left_out) -> None:
    model, trained = Tied(True), Tied(True).state_dict()
    torch_rsst.l1_unstructured(model.head, "weight", amount=0.5)
    value = trained["head.weight"].clone()
    value[0] = 0.0
    torch_rsst.load_dense_state_dict(
        model, {name: value for name in trained if name != left_out}, mask=mask
    )
    alive = torch_rsst.extract_mask(model).get("table.weight", torch.ones_like(value))
    assert torch.equal(model.table.weight, value * alive)
    assert torch.equal(model.head.weight, model.table.weight)
    if mask == "zeros":
        assert torch.equal(alive, value != 0)


class Wrapper(nn.Module):
    """As averages of timm are, and wrappers of one's own: the model is a child called ``module``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.module = mlp(seed=seed)


WRAPPED = {f"module.{name}": mask for name, mask in KEEP.items()}


def test_a_wrapper_s_own_state_dict_fits_it_masked_and_fresh() -> None:
    old, new = Wrapper(seed=7), Wrapper(seed=3)
    torch_rsst.apply_mask(old, WRAPPED)
    for model in (old, new):
        torch_rsst.prepare_from_state_dict(model, old.state_dict()).load_state_dict(
            old.state_dict()
        )
    assert torch.equal(torch_rsst.extract_mask(new)["module.2.bias"], KEEP["2.bias"])


@pytest.mark.parametrize("given", ["of the wrapper", "of the model", "of a replicated wrapper"])
@pytest.mark.parametrize("choice", ["keep", "zeros", "remove"])
def test_a_wrapper_takes_dense_weights_under_names_with_and_without_its_own(
    choice: Any, given: str
) -> None:
    model, dense = Wrapper(seed=7), Wrapper(seed=1)
    torch_rsst.apply_mask(model, WRAPPED)
    if given == "of the wrapper":
        state = dense.state_dict()
    elif given == "of the model":
        state = dense.module.state_dict()
    else:
        state = nn.DataParallel(dense).state_dict()
    torch_rsst.load_dense_state_dict(model, state, mask=choice)
    assert same(model.module[0].bias, dense.module[0].bias)
    first = model.module[0]
    assert same(first.weight if choice == "remove" else first.weight_orig, dense.module[0].weight)
    masks = torch_rsst.extract_mask(model)
    assert masks.keys() == (set() if choice == "remove" else WRAPPED.keys())


class Pair(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_state_of_tied_weights_prepares_a_model_that_does_not_tie_them() -> None:
    tied, untied, x = Pair(tied=True), Pair(tied=False), tokens(0, 3, 4)
    torch_rsst.l1_unstructured(tied.a, "weight", 0.5)
    torch_rsst.prepare_from_state_dict(untied, tied.state_dict())
    untied.load_state_dict(tied.state_dict())
    assert torch.equal(untied(x), tied(x))
    assert list(torch_rsst.extract_mask(untied)) == ["a.weight", "b.weight"]


def test_a_state_that_masks_one_of_two_weights_is_refused_by_a_model_that_ties_them(
    fingerprint: Fingerprint,
) -> None:
    untied, tied = Pair(tied=False), Pair(tied=True)
    torch_rsst.l1_unstructured(untied.a, "weight", 0.5)
    before = fingerprint(tied)
    text = (
        "state_dict: 'b.weight': expected a mask, as 'a.weight' has, which it is tied to in the model, got "
        "dense weights. Build the model without this tie"
    )
    with pytest.raises(ValueError, match=text):
        torch_rsst.prepare_from_state_dict(tied, untied.state_dict())
    assert fingerprint(tied) == before
