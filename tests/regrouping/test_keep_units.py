"""Which units of one scope stay."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_rsst.regrouping.keep_units import REASONS, ScopeBudget, ScoredLayer, keep_units, ranks
from torch_rsst.utils.amounts import units_to_keep


def layer(scores: list[float], alive: list[int] | None = None, size: int = 4) -> ScoredLayer:
    n = len(scores)
    return ScoredLayer(
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor([size] * n if alive is None else alive, dtype=torch.float64),
        torch.full((n,), size, dtype=torch.float64),
    )


def kept(layers: list[ScoredLayer], **options: Any) -> list[list[int]]:
    return [k.int().tolist() for k in keep_units(layers, **options).kept]


@pytest.mark.parametrize(
    ("scores", "alive", "options", "stays"),
    [
        ([1, 2, 3, 4], None, {"amount": 0.5}, [0, 0, 1, 1]),
        ([5, 5, 5, 5], None, {"amount": 0.5}, [0, 0, 1, 1]),
        ([5, 5, 5, 5], None, {"amount": 1.0}, [0, 0, 0, 1]),
        ([5, 5, 5, 5], None, {"amount": 1.0, "min_keep": 0}, [0, 0, 0, 0]),
        ([1, 2, 3, 4], None, {"amount": 3, "min_keep": 2}, [0, 0, 1, 1]),
        ([1, 2, 3, 4], None, {"amount": 3, "min_keep": 9}, [1, 1, 1, 1]),
        ([1, 2, 3, 4], None, {"amount": 2, "round_to": 3}, [0, 1, 1, 1]),
        ([1, 2, 3, 4], None, {"amount": 1, "round_to": 3}, [0, 1, 1, 1]),
        ([1, 2, 3, 4], None, {"amount": 3, "round_to": 8}, [1, 1, 1, 1]),
        ([1, 2, 3, 4], None, {"amount": 4, "round_to": 2, "min_keep": 0}, [0, 0, 0, 0]),
        ([-1, -2, -3, -4], [1, 1, 1, 0], {"amount": 1}, [1, 1, 1, 0]),  # the dead go first
        ([0, 0, 9, 9], [0, 0, 4, 4], {"amount": 0.5}, [0, 0, 1, 1]),
        ([0, 0, 9, 9], [0, 0, 4, 4], {"amount": 0.25}, [0, 1, 1, 1]),
        ([1, 2, 3, 4], [1, 2, 3, 2], {"amount": None}, [0, 0, 1, 1]),  # 8 of 16: 2 units
        ([1, 2, 3, 4], [0, 0, 0, 0], {"amount": None}, [0, 0, 0, 1]),
        ([1, 2, 3, 4], None, {"amount": 1.0, "fillback_rate": 0.5}, [0, 0, 1, 1]),
    ],
)
def test_one_layer_literally(
    scores: list[float], alive: list[int] | None, options: dict[str, Any], stays: list[int]
) -> None:
    assert kept([layer(scores, alive)], **options) == [stays]


def test_layers_of_one_scope_compete() -> None:
    layers = [layer([1, 2, 3]), layer([10, 20, 30])]
    assert kept(layers, amount=3, min_keep=0) == [[0, 0, 0], [1, 1, 1]]
    assert kept(layers, amount=3) == [[0, 0, 1], [0, 1, 1]]  # one unit a layer stays


def test_units_of_different_size_compete_per_entry() -> None:
    layers = [layer([8, 9], size=8), layer([2, 3], size=1, alive=[1, 1])]
    assert kept(layers, amount=2, min_keep=0) == [[1, 1], [0, 0]]
    assert kept(layers, amount=2, min_keep=0, per_entry=True) == [[0, 0], [1, 1]]


def test_requested_is_what_the_budget_alone_would_keep() -> None:
    found = keep_units([layer([1, 2, 3, 4])], amount=1.0, min_keep=2, round_to=4)
    assert found.requested == 0


def test_units_without_ranked_entries_are_dead() -> None:
    empty = ScoredLayer(*(torch.zeros(2, dtype=torch.float64) for _ in range(3)))
    assert kept([empty, layer([1, 2])], amount=None, min_keep=0) == [[0, 0], [1, 1]]
    assert kept([empty], amount=None, per_entry=True, min_keep=0) == [[0, 0]]


@pytest.mark.parametrize(
    ("layers", "options", "stays", "decided_by"),
    [
        ([[1, 2, 3, 4]], {"amount": 0.5}, [[0, 0, 1, 1]], [["score"] * 4]),
        ([[5, 5, 5, 5]], {"amount": 0.5}, [[0, 0, 1, 1]], [["score"] * 4]),
        ([[1, 2]], {"amount": 0.0}, [[1, 1]], [["score"] * 2]),
        ([[1, 2]], {"amount": 1.0}, [[0, 1]], [["score", "min_keep"]]),
        (
            [[1, 2, 3, 4]],
            {"amount": 3, "round_to": 3},
            [[0, 1, 1, 1]],
            [["score", "round_to", "round_to", "score"]],
        ),
        (
            [[1, 2, 3, 4]],
            {"amount": 2, "fillback_rate": 0.5},
            [[0, 1, 1, 1]],
            [["score", "fillback_rate", "score", "score"]],
        ),
        # 1 is held in a layer of its own, 7 makes room for it.
        (
            [[10, 9, 7], [1]],
            {"amount": 1},
            [[1, 1, 0], [1]],
            [["score", "score", "min_keep"], ["min_keep"]],
        ),
        # So does 7 where 1 and 6 are both held; by the budget alone 6 would stay as well.
        (
            [[10, 9, 7], [6], [1]],
            {"amount": 1},
            [[1, 1, 0], [1], [1]],
            [["score", "score", "min_keep"], ["min_keep"], ["min_keep"]],
        ),
        ([[-torch.inf, 2, 3]], {"amount": 2}, [[0, 0, 1]], [["dead", "score", "score"]]),
        ([[-torch.inf, 2]], {"amount": 0}, [[1, 1]], [["score", "score"]]),
    ],
)
def test_what_decided_literally(
    layers: list[list[float]], options: Any, stays: list[Any], decided_by: list[list[str]]
) -> None:
    found = keep_units([layer(scores) for scores in layers], **options)
    assert [k.int().tolist() for k in found.kept] == stays
    assert [[REASONS[i] for i in each.tolist()] for each in found.reasons()] == decided_by


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=1, max_size=3))
def test_ranks_against_sorting(scores: list[list[int]]) -> None:
    """The best has rank 1; of equals the earliest goes first, so it ranks lowest."""
    units = [(s, i, u) for i, each in enumerate(scores) for u, s in enumerate(each)]
    best_first = sorted(units, reverse=True)
    expected = [
        [1 + best_first.index((s, i, u)) for u, s in enumerate(each)]
        for i, each in enumerate(scores)
    ]
    found = ranks([torch.tensor(each, dtype=torch.float64) for each in scores])
    assert [each.tolist() for each in found] == expected


scored_layers = st.lists(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(-2, 3), min_size=n, max_size=n),
            st.lists(st.integers(0, 4), min_size=n, max_size=n),
            st.lists(st.integers(4, 6), min_size=n, max_size=n),
        )
    ),
    min_size=1,
    max_size=3,
)


def by_loops(
    layers: list[tuple[list[int], list[int], list[int]]],
    amount: float | None,
    fillback: float,
    min_keep: int,
    round_to: int | None,
    per_entry: bool,
) -> list[list[bool]]:
    """The slow oracle: drop the worst droppable unit until the budget is met."""
    worst_first = []
    alive_of_size: dict[int, int] = {}
    for which, (scores, alive, sizes) in enumerate(layers):
        for unit, (score, living, size) in enumerate(zip(scores, alive, sizes, strict=True)):
            alive_of_size[size] = alive_of_size.get(size, 0) + living
            value = Fraction(score, size) if per_entry else Fraction(score)
            worst_first.append((living > 0, value if living else 0, which, unit))
    worst_first.sort()
    budget = units_to_keep(amount, len(worst_first), alive_of_size, fillback)
    left = [len(scores) for scores, _, _ in layers]
    stays = [[True] * len(scores) for scores, _, _ in layers]
    for _, _, which, unit in worst_first:
        if sum(left) > budget and left[which] > min_keep:
            stays[which][unit] = False
            left[which] -= 1
    if round_to is not None:
        for _, _, which, unit in reversed(worst_first):
            if sum(stays[which]) % round_to and not stays[which][unit]:
                stays[which][unit] = True
    return stays


@given(
    scored_layers,
    st.one_of(st.none(), st.floats(0, 1), st.integers(0, 2)),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(1, 4)),
    st.booleans(),
)
def test_selection_against_loops(
    layers: Any,
    amount: float | None,
    fillback: float,
    min_keep: int,
    round_to: int | None,
    per_entry: bool,
) -> None:
    units = sum(len(scores) for scores, _, _ in layers)
    if isinstance(amount, int):
        amount = min(amount, units)
    tensors = [
        ScoredLayer(*(torch.tensor(t, dtype=torch.float64) for t in each)) for each in layers
    ]
    found = keep_units(
        tensors,
        amount=amount,
        fillback_rate=fillback,
        min_keep=min_keep,
        round_to=round_to,
        per_entry=per_entry,
    )
    expected = by_loops(layers, amount, fillback, min_keep, round_to, per_entry)
    assert [k.tolist() for k in found.kept] == expected
    assert 0 <= found.requested <= units


def test_more_units_than_there_are() -> None:
    with pytest.raises(ValueError, match="at most 4, as many units as there are, got 5"):
        keep_units([layer([1, 2, 3, 4])], amount=5)


def test_a_budget_says_what_was_asked_and_what_was_done() -> None:
    budget = ScopeBudget("blocks.0.mlp", "neurons", 8, requested=3, realized=4)
    assert str(budget) == "blocks.0.mlp: 3 of 8 neurons were to stay, 4 do"
    assert str(ScopeBudget("", "heads", 2, 1, 1)).startswith("the model: ")


@given(
    st.integers(1, 4).flatmap(
        lambda parts: st.lists(
            st.lists(st.integers(-2, 3), min_size=parts, max_size=parts), min_size=1, max_size=6
        )
    ),
    st.integers(0, 6),
)
def test_units_of_stacked_weights_go_by_their_rank_in_each(
    rows: list[list[int]], drop: int
) -> None:
    scores = torch.tensor(rows, dtype=torch.float64).T.contiguous()  # (parts, units of each)
    parts = torch.arange(scores.numel()).view(scores.shape)
    every = layer(scores.flatten().tolist())
    stacked, order = every.stacked(parts)
    assert stacked.sizes.tolist() == [4.0 * len(parts)] * len(rows)
    assert bool((stacked.scores.diff() >= 0).all())
    stays = keep_units([stacked], amount=min(drop, len(rows)), min_keep=0).kept[0]
    for own, units in zip(scores, order % len(rows), strict=True):
        goes = sorted(range(len(rows)), key=lambda i: (float(own[i]), i))[: min(drop, len(rows))]
        assert sorted(units[~stays].tolist()) == sorted(goes)


def test_a_rank_is_dead_where_all_its_units_are_and_multiples_hold() -> None:
    one = layer([9.0, 1.0, 2.0, 3.0, -1.0, 5.0], alive=[0, 4, 4, 0, 0, 4])
    stacked, order = one.stacked(torch.arange(6).view(2, 3), multiple=2)
    assert order.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert stacked.sort_keys.tolist() == [-torch.inf, 12.0, 12.0]
    assert keep_units([stacked], amount=2).kept[0].tolist() == [False, True, True]
