"""GlobalL1, HeadRegroup and Fillback: pure rules, alone and inside PyTorch's containers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as stock

from torch_rsst import Fillback, GlobalL1, HeadRegroup, apply_mask, fillback
from torch_rsst.masking.masked_parameter import MaskHook
from torch_rsst.testing import assert_mask_invariants, masks, shapes, weights

Fingerprint = Callable[[nn.Module], list[Any]]


def parameter(*values: float) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(values))
    return module


@st.composite
def weight_and_mask(draw: st.DrawFn, **options: Any) -> tuple[Tensor, Tensor]:
    weight = draw(weights(shapes(max_dims=3, max_side=4), **options))
    return weight, draw(masks(tuple(weight.shape))).to(weight.dtype)


EXAMPLE_1 = [0.8, 0.1, 0.5, 0.7, 0.05, 0.6, 0.9, 0.4, 0.02, 0.3]


@pytest.mark.parametrize(
    ("weight", "alive", "amount", "after"),
    [
        (EXAMPLE_1, [1] * 10, 3, [1, 0, 1, 1, 0, 1, 1, 1, 0, 1]),
        (EXAMPLE_1, [1] * 10, 0.3, [1, 0, 1, 1, 0, 1, 1, 1, 0, 1]),
        (EXAMPLE_1, [1, 0, 1, 1, 0, 1, 1, 1, 0, 1], 0.3, [1, 0, 1, 1, 0, 1, 1, 0, 0, 0]),
        ([2.0] * 5, [1] * 5, 2, [0, 0, 1, 1, 1]),
        ([2.0, -2.0, 2.0, -2.0], [0, 1, 1, 1], 2, [0, 0, 0, 1]),
        ([3.0, -1.0, 2.0], [1, 1, 1], 0, [1, 1, 1]),
        ([3.0, -1.0, 2.0], [1, 1, 1], 1.0, [0, 0, 0]),
        ([3.0, -1.0, 2.0], [0, 0, 0], 0.5, [0, 0, 0]),
        ([math.nan, -1.0, 2.0], [0, 1, 1], 1, [0, 0, 1]),
        ([math.inf, -1.0, -math.inf], [1, 1, 1], 2, [0, 0, 1]),
        ([-0.0, 0.0, 0.0], [1, 1, 1], 1, [0, 1, 1]),
    ],
)
def test_global_l1_literally(
    weight: list[float], alive: list[int], amount: float, after: list[int]
) -> None:
    mask = torch.tensor(alive, dtype=torch.float32)
    found = GlobalL1(amount).compute_mask(torch.tensor(weight), default_mask=mask)
    assert found.tolist() == after
    assert found.dtype == mask.dtype
    assert mask.tolist() == alive


def test_example_1_by_apply_on_a_linear_layer() -> None:
    layer = nn.Linear(10, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([EXAMPLE_1]))
    GlobalL1.apply(layer, "weight", 3)
    assert layer.weight_mask.tolist() == [[1, 0, 1, 1, 0, 1, 1, 1, 0, 1]]
    assert_mask_invariants(layer)


def test_example_1_by_apply_on_a_vector() -> None:
    module = parameter(*EXAMPLE_1)
    GlobalL1.apply(module, "weight", amount=3)
    assert module.weight_mask.tolist() == [1, 0, 1, 1, 0, 1, 1, 1, 0, 1]
    assert module.weight.tolist() == pytest.approx([0.8, 0, 0.5, 0.7, 0, 0.6, 0.9, 0.4, 0, 0.3])


@given(weight_and_mask(), st.floats(0, 1))
def test_global_l1_against_sorting(drawn: tuple[Tensor, Tensor], amount: float) -> None:
    weight, mask = drawn
    found = GlobalL1(amount).compute_mask(weight, mask)
    flat, alive = weight.double().abs().reshape(-1), mask.reshape(-1) != 0
    candidates = sorted((float(flat[i]), i) for i in range(flat.numel()) if alive[i])
    goes = {i for _, i in candidates[: round(amount * len(candidates))]}
    expected = [bool(alive[i]) and i not in goes for i in range(flat.numel())]
    assert (found.reshape(-1) != 0).tolist() == expected


def test_repeated_rates_multiply() -> None:
    module = parameter(*[float(i + 1) for i in range(1000)])
    for n in range(1, 5):
        GlobalL1.apply(module, "weight", 0.2)
        assert int(module.weight_mask.sum()) == pytest.approx(1000 * 0.8**n, abs=1)
    assert len(module._forward_pre_hooks) == 1


@given(weight_and_mask(), st.floats(0, 1))
def test_fillback_gives_the_largest_masked_back_and_takes_nothing(
    drawn: tuple[Tensor, Tensor], rate: float
) -> None:
    weight, mask = drawn
    found = Fillback(rate).compute_mask(weight, mask)
    alive, after = mask.reshape(-1) != 0, found.reshape(-1) != 0
    returned = after & ~alive
    assert bool(after[alive].all())
    assert int(returned.sum()) == round(rate * int((~alive).sum()))
    magnitude, stay = weight.double().abs().reshape(-1), ~after
    if bool(returned.any()) and bool(stay.any()):
        assert magnitude[returned].min() >= magnitude[stay].max()


@pytest.mark.parametrize(
    ("rate", "after"),
    [
        (0.0, [0, 0, 1, 0]),
        (1, [0, 1, 1, 0]),
        (2, [0, 1, 1, 1]),
        (0.5, [0, 1, 1, 1]),
        (1.0, [1, 1, 1, 1]),
        (3, [1, 1, 1, 1]),
    ],
)
def test_fillback_literally(rate: float, after: list[int]) -> None:
    weight, mask = torch.tensor([1.0, -3.0, 9.0, 2.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert Fillback(rate).compute_mask(weight, mask).tolist() == after
    assert mask.tolist() == [0.0, 0.0, 1.0, 0.0]


def masked(*alive: int) -> nn.Module:
    module = parameter(*[float(i + 1) for i in range(len(alive))])
    MaskHook.apply(module, "weight")
    with torch.no_grad():
        module.weight_mask.copy_(torch.tensor(alive))
    return module


@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({}, [0.0, 2.0, 3.0]),
        ({"policy": "zero"}, [0.0, 0.0, 3.0]),
        ({"policy": "snapshot", "snapshot": {"weight": torch.tensor([7.0, 8.0, 9.0])}}, [0, 8, 3]),
        ({"policy": "snapshot", "snapshot": {"weight_orig": torch.tensor([7, 8, 9])}}, [0, 8, 3]),
    ],
)
def test_the_policy_says_which_value_returns(options: dict[str, Any], weight: list[float]) -> None:
    module = masked(0, 0, 1)
    original = module.weight_orig
    Fillback.apply(module, "weight", 1, **options)
    assert module.weight.tolist() == weight
    assert module.weight_orig is original
    assert float(original.detach()[0]) == 1.0
    assert_mask_invariants(module, {"weight": torch.tensor([0, 1, 1])})


def test_fillback_takes_the_callers_scores() -> None:
    module = masked(0, 0, 1)
    Fillback.apply(module, "weight", 1, importance_scores=torch.tensor([5.0, 1.0, 0.0]))
    assert module.weight_mask.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((1.5,), ValueError, "rate: expected an int"),
        (("all",), TypeError, "rate: expected an int"),
        ((4,), ValueError, "as many masked entries as there are, got 4"),
        ((1, {"policy": "latest"}), ValueError, "policy: .*Did you mean 'latent'"),
        ((1, {"policy": "snapshot"}), ValueError, "a state dict for policy='snapshot'"),
        ((1, {"snapshot": {}}), ValueError, "policy='latent' with one"),
        ((1, {"policy": "snapshot", "snapshot": {}}), ValueError, "no such entry"),
        (
            (1, {"policy": "snapshot", "snapshot": {"weight": torch.ones(2)}}),
            ValueError,
            r"of shape \(3,\), got shape \(2,\)",
        ),
        ((1, {"policy": "snapshot", "snapshot": [1]}), TypeError, "a state dict, got list"),
        ((1, {"importance_scores": torch.ones(2)}), ValueError, r"shape \(3,\), got shape \(2,\)"),
        ((1, {"importance_scores": [1, 2, 3]}), TypeError, "a tensor of numbers, got list"),
        (
            (1, {"importance_scores": torch.tensor([True] * 3)}),
            TypeError,
            "a tensor of numbers, got torch.bool",
        ),
        ((1, {"importance_scores": torch.tensor([math.nan] * 3)}), ValueError, "2 NaN"),
    ],
)
def test_bad_fillbacks_change_nothing(
    arguments: tuple[Any, ...], error: type[Exception], text: str, fingerprint: Fingerprint
) -> None:
    module = masked(0, 0, 1)
    before = fingerprint(module)
    rate, options = (*arguments, {})[:2]
    with pytest.raises(error, match=text):
        Fillback.apply(module, "weight", rate, **options)
    assert fingerprint(module) == before


def test_nothing_to_give_back_in_a_dense_parameter(fingerprint: Fingerprint) -> None:
    module = parameter(1.0, 2.0)
    before = fingerprint(module)
    with pytest.raises(ValueError, match="a masked parameter, got a dense one"):
        Fillback.apply(module, "weight", 0.5)
    assert fingerprint(module) == before


def example_2() -> tuple[Tensor, Tensor]:
    """Three heads of 64 with 50, 60 and 30 alive entries."""
    alive = torch.zeros(192, 1)
    for head, count in enumerate((50, 60, 30)):
        alive[64 * head : 64 * head + count] = 1.0
    return torch.randn(192, 1, generator=torch.Generator().manual_seed(0)), alive


@pytest.mark.parametrize("amount", [0.3, 1, None])
def test_example_2(amount: float | None) -> None:
    weight, alive = example_2()
    method = HeadRegroup(amount, num_heads=3, projections=1, importance="remain")
    refill = method.compute_mask(weight, alive)
    assert refill.reshape(3, 64).sum(1).tolist() == [64, 64, 0]
    penalized = (refill == 0) & (alive == 1)
    assert penalized.reshape(3, 64).sum(1).tolist() == [0, 0, 30]


@pytest.mark.parametrize(
    ("weight", "alive", "amount", "kept"),
    [
        ([1, 2, 3, 4], [1, 1, 1, 1], 0.5, [0, 0, 1, 1]),
        ([4, 3, 2, 1], [1, 1, 1, 1], 0.5, [1, 1, 0, 0]),
        ([4, 3, 2, 1], [0, 0, 1, 1], 0.5, [0, 0, 1, 1]),  # scored on what is alive
        ([1, 1, 1, 1], [1, 1, 1, 1], 0.5, [0, 0, 1, 1]),  # ties: the earliest goes
        ([1, 1, 1, 1], [0, 0, 0, 0], 0.5, [0, 0, 1, 1]),
        ([1, 2, 3, 4], [1, 1, 1, 1], 1.0, [0, 0, 1, 1]),  # one head always stays
        ([1, 2, 3, 4], [1, 0, 0, 0], 0, [1, 1, 1, 1]),
        ([-4, 3, 2, 1], [1, 1, 1, 1], 1, [1, 1, 0, 0]),
    ],
)
def test_two_heads_literally(
    weight: list[float], alive: list[int], amount: float, kept: list[int]
) -> None:
    method = HeadRegroup(amount, num_heads=2, projections=1)
    w, mask = torch.tensor(weight).float()[:, None], torch.tensor(alive).float()[:, None]
    assert method.compute_mask(w, mask).flatten().tolist() == kept
    by_columns = HeadRegroup(amount, num_heads=2, projections=1, dim=1)
    assert by_columns.compute_mask(w.T, mask.T).flatten().tolist() == kept
    assert (
        HeadRegroup(amount, num_heads=2, projections=1, dim=-1)
        .compute_mask(w.T, mask.T)
        .flatten()
        .tolist()
        == kept
    )


@given(st.data())
def test_heads_against_python_loops(data: st.DataObject) -> None:
    heads, head_dim, projections = (data.draw(st.integers(1, n)) for n in (4, 3, 3))
    columns = data.draw(st.integers(1, 3))
    weight = data.draw(weights((projections * heads * head_dim, columns), dtypes=[torch.float64]))
    alive = data.draw(masks(tuple(weight.shape)))
    amount = data.draw(st.one_of(st.floats(0, 1), st.integers(0, heads)))
    found = HeadRegroup(amount, heads, projections=projections).compute_mask(weight, alive.double())
    score = [(0, 0.0)] * heads
    for row in range(weight.shape[0]):
        head = row // head_dim % heads
        for column in range(columns):
            if alive[row, column]:
                score[head] = (1, score[head][1] + abs(float(weight[row, column])))
    drop = min(amount if isinstance(amount, int) else round(amount * heads), heads - 1)
    goes = sorted(range(heads), key=lambda head: (*score[head], head))[:drop]
    for row in range(weight.shape[0]):
        assert (
            bool(found[row].all())
            == bool(found[row].any())
            == (row // head_dim % heads not in goes)
        )


@given(st.integers(0, 3), st.integers(0, 2))
def test_heads_of_empty_weights_are_dead(head_dim: int, columns: int) -> None:
    weight = torch.ones(2 * head_dim, columns)
    found = HeadRegroup(None, 2, projections=1).compute_mask(weight, torch.ones_like(weight))
    assert found.shape == weight.shape
    assert bool(found.all())


def test_a_callable_scores_heads() -> None:
    method = HeadRegroup(1, 2, projections=1, importance=lambda *_: torch.tensor([1.0, -5.0]))
    assert method.compute_mask(torch.ones(4, 1), torch.ones(4, 1)).flatten().tolist() == [
        1,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: HeadRegroup(1.5, 2), ValueError, "amount: expected"),
        (lambda: HeadRegroup("x", 2), TypeError, "amount: expected"),
        (
            lambda: HeadRegroup(0.5, 2, importance="magnitud"),
            ValueError,
            "Did you mean 'magnitude'",
        ),
        (lambda: HeadRegroup(0.5, 2, importance=3), TypeError, "a name or a callable"),
    ],
)
def test_bad_settings_fail_at_once(
    make: Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_heads": 5}, ValueError, r"divides the 12 rows of 3 projection\(s\), got 5"),
        ({"num_heads": 4, "projections": 5}, ValueError, "divides the 12 rows of 5"),
        ({"num_heads": 0}, ValueError, "num_heads: expected an int >= 1"),
        ({"num_heads": 2.0}, TypeError, "num_heads: expected an int >= 1"),
        ({"num_heads": 2, "projections": 0}, ValueError, "projections: expected an int >= 1"),
        *(
            (
                {"num_heads": 2, "dim": dim},
                TypeError,
                r"dim: expected an int, got .* Heads are split",
            )
            for dim in (None, "0", 1.5, True, torch.tensor(0.5))
        ),
        ({"num_heads": 2, "dim": 2}, IndexError, r"dim: expected -2 to 1 for shape \(12, 4\)"),
        ({"num_heads": 2, "dim": -3}, IndexError, "dim: expected"),
        ({"num_heads": 4, "amount": 5}, ValueError, "as many units as there are, got 5"),
    ],
)
def test_heads_that_do_not_fit_change_nothing(
    options: dict[str, Any], error: type[Exception], text: str, fingerprint: Fingerprint
) -> None:
    layer = nn.Linear(4, 12)
    before = fingerprint(layer)
    with pytest.raises(error, match=text):
        HeadRegroup.apply(layer, "weight", **{"amount": 0.5, **options})
    assert fingerprint(layer) == before


def container_of(*methods: stock.BasePruningMethod) -> stock.PruningContainer:
    container = stock.PruningContainer()
    container._tensor_name = "weight"
    for method in methods:
        method._tensor_name = "weight"
        container.add_pruning_method(method)
    return container


@given(weight_and_mask(dtypes=[torch.float32, torch.float64]), st.floats(0, 1))
def test_fillback_restores_exactly_inside_a_stock_container(
    drawn: tuple[Tensor, Tensor], rate: float
) -> None:
    weight, mask = drawn
    container = container_of(stock.L1Unstructured(0.5), Fillback(rate))
    expected = Fillback(rate).compute_mask(weight, mask.clone())
    assert torch.equal(container.compute_mask(weight, mask.clone()), expected)


def test_heads_come_back_inside_a_stock_container() -> None:
    weight, alive = example_2()
    container = container_of(
        stock.L1Unstructured(10), HeadRegroup(0.3, 3, projections=1, importance="remain")
    )
    found = container.compute_mask(weight, alive.clone())
    assert found.reshape(3, 64).sum(1).tolist() == [64, 64, 0]


@given(weight_and_mask(dtypes=[torch.float32]), st.floats(0, 1))
def test_global_l1_inside_a_stock_container_ranks_what_is_alive(
    drawn: tuple[Tensor, Tensor], amount: float
) -> None:
    weight, mask = drawn
    expected = GlobalL1(amount).compute_mask(weight, mask.clone())
    found = container_of(GlobalL1(amount)).compute_mask(weight, mask.clone())
    assert torch.equal(found, expected)


def test_ours_on_stock_and_stock_on_ours() -> None:
    layer = nn.Linear(4, 3)
    stock.l1_unstructured(layer, "weight", 2)
    GlobalL1.apply(layer, "weight", 2)
    assert int((layer.weight_mask == 0).sum()) == 4
    stock.ln_structured(layer, "weight", 1, n=2, dim=0)
    stock.l1_unstructured(layer, "weight", 1)
    (container,) = layer._forward_pre_hooks.values()
    assert isinstance(container, stock.PruningContainer)
    gone = int((layer.weight_mask == 0).sum())
    assert 6 <= gone <= 9
    Fillback.apply(layer, "weight", 1.0)
    assert int((layer.weight_mask == 0).sum()) == 0
    assert torch.equal(layer.weight, layer.weight_orig)
    assert_mask_invariants(layer)
    stock.remove(layer, "weight")
    assert not stock.is_pruned(layer)


@pytest.mark.parametrize(
    ("method", "kind"), [(GlobalL1, "unstructured"), (HeadRegroup, "global"), (Fillback, "global")]
)
def test_pruning_types(method: type[stock.BasePruningMethod], kind: str) -> None:
    assert kind == method.PRUNING_TYPE
    assert issubclass(method, stock.BasePruningMethod)


def test_methods_score_the_latent_not_a_stale_product() -> None:
    module = parameter(3.0, 1.0, 2.0)
    stock.l1_unstructured(module, "weight", 0)  # stock stores a product that goes stale
    with torch.no_grad():
        module.weight_orig.copy_(torch.tensor([1.0, 3.0, 2.0]))
    assert module.weight.tolist() == [3.0, 1.0, 2.0]
    GlobalL1.apply(module, "weight", 1)
    assert module.weight_mask.tolist() == [0, 1, 1]


def test_a_nan_that_is_alive_is_an_error_and_under_the_mask_is_not(
    fingerprint: Fingerprint,
) -> None:
    module = parameter(3.0, math.nan, 2.0)
    before = fingerprint(module)
    with pytest.raises(ValueError, match="1 NaN among the entries to rank"):
        GlobalL1.apply(module, "weight", 1)
    assert fingerprint(module) == before
    MaskHook.apply(module, "weight")
    with torch.no_grad():
        module.weight_mask[1] = 0.0
    GlobalL1.apply(module, "weight", 1)
    assert module.weight_mask.tolist() == [1, 0, 0]


def test_a_user_subclass_needs_three_lines() -> None:
    class KeepFirst(GlobalL1):
        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            return super().compute_mask(torch.arange(t.numel(), 0, -1), default_mask)

    module = parameter(1.0, 2.0, 3.0)
    KeepFirst.apply(module, "weight", 2)
    assert module.weight_mask.tolist() == [1, 0, 0]


def test_fillback_ranks_the_scores_it_is_given_with_their_sign() -> None:
    module = nn.Linear(3, 1, bias=False)
    apply_mask(module, {"weight": torch.zeros(1, 3)})
    fillback(module, "weight", 1, importance_scores=torch.tensor([[-9.0, 2.0, 1.0]]))
    assert module.weight_mask.tolist() == [[0.0, 1.0, 0.0]]


def test_a_fillback_that_fails_at_its_end_changes_nothing(
    fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Linear(3, 1, bias=False)
    apply_mask(module, {"weight": torch.tensor([[1.0, 0.0, 0.0]])})
    before = fingerprint(module)

    def failing(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "where", failing)
    with pytest.raises(MemoryError):
        fillback(module, "weight", 1, policy="zero")
    monkeypatch.undo()
    assert fingerprint(module) == before
