"""Importance: a layer of units in, a score per unit out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from torch_rsst import Groups, head_layer
from torch_rsst.groups.groups import GroupLayer, Member
from torch_rsst.importance import (
    ALIASES,
    IMPORTANCES,
    importance_names,
    magnitude,
    remain,
    resolve_importance,
    score_units,
)
from torch_rsst.masking.mask_sets import extract_mask
from torch_rsst.masking.names import named_weights
from torch_rsst.testing import models_with_groups

LAYER = head_layer("w", rows=4, num_heads=2, projections=1)
OF_WEIGHTS = ["magnitude", "remain"]


def by_loops(name: str, layer: GroupLayer, weights: Any, masks: Any) -> list[float]:
    scores = [0.0] * layer.units
    for member in layer.members:
        if not member.ranked:
            continue
        weight = weights[member.parameter].double()
        alive = masks.get(member.parameter, torch.ones_like(weight))
        for index in range(weight.shape[member.dim]):
            row, living = (t.select(member.dim, index).reshape(-1) for t in (weight, alive))
            for value, lives in zip(row.tolist(), living.tolist(), strict=True):
                if lives:
                    scores[int(member.unit_of[index])] += 1.0 if name == "remain" else abs(value)
    return scores


@pytest.mark.parametrize("name", OF_WEIGHTS)
@given(drawn=models_with_groups())
def test_importances_against_loops(name: str, drawn: tuple[nn.Module, Groups]) -> None:
    model, groups = drawn
    weights, masks = named_weights(model), extract_mask(model)
    for layer in groups.layers:
        found = IMPORTANCES[name](layer, weights, masks)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(by_loops(name, layer, weights, masks), abs=1e-9)


@pytest.mark.parametrize("name", OF_WEIGHTS)
@given(drawn=models_with_groups())
def test_importances_are_pure(name: str, drawn: tuple[nn.Module, Groups]) -> None:
    model, groups = drawn
    weights, masks = named_weights(model), extract_mask(model)
    before = {k: v.clone() for k, v in {**weights, **masks}.items()}
    for layer in groups.layers:
        IMPORTANCES[name](layer, weights, masks)
    assert all(torch.equal(v, before[k]) for k, v in {**weights, **masks}.items())


@pytest.mark.parametrize(
    ("importance", "weight", "mask", "scores"),
    [
        (remain, [1, -2, 3, -4], [1, 1, 1, 1], [2, 2]),
        (remain, [0, 0, 0, 0], [1, 0, 0, 0], [1, 0]),
        (magnitude, [1, -2, 3, -4], [1, 1, 1, 1], [3, 7]),
        (magnitude, [1, -2, 3, -4], [0, 1, 1, 0], [2, 3]),
        (magnitude, [5, 5, 5, 5], [1, 1, 1, 1], [10, 10]),
        (magnitude, [1, float("nan"), 3, float("inf")], [1, 0, 1, 0], [1, 3]),
    ],
)
def test_literal_scores(importance: Any, weight: Any, mask: Any, scores: Any) -> None:
    weights = {"w": torch.tensor(weight).float()[:, None]}
    found = importance(LAYER, weights, {"w": torch.tensor(mask)[:, None] != 0})
    assert found.tolist() == scores


def test_followers_do_not_count() -> None:
    bias = Member("b", 0, torch.tensor([0, 0, 1, 1]), ranked=False)
    layer = GroupLayer("l", "heads", 2, (*LAYER.members, bias))
    weights = {"w": torch.ones(4, 1), "b": torch.full((4,), 100.0)}
    assert magnitude(layer, weights, {}).tolist() == [2, 2]
    assert remain(layer, weights, {}).tolist() == [2, 2]


def test_half_precision_weights_are_summed_in_float64() -> None:
    layer = head_layer("w", rows=2, num_heads=2, projections=1)
    weights = {"w": torch.ones(2, 5000, dtype=torch.bfloat16)}
    assert magnitude(layer, weights, {}).tolist() == [5000.0, 5000.0]


@pytest.mark.parametrize("page", ["theory.md"])
def test_the_tables_of_the_docs_list_every_name(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    start = text.index("| `importance` |")
    table = text[start : text.index("\n\n", start)]
    listed = re.findall(r'`"(\w+)"`', "\n".join(row.split("|")[1] for row in table.splitlines()))
    assert {*importance_names(), *ALIASES} == set(listed)


def test_names_and_callables_resolve() -> None:
    assert resolve_importance("remain") is remain

    def mine(*_: Any) -> Tensor:
        return torch.zeros(2)

    assert resolve_importance(mine) is mine
    with pytest.raises(ValueError, match=r"importance: .*Did you mean 'magnitude'"):
        resolve_importance("magnitud")
    with pytest.raises(TypeError, match="a name or a callable, got None"):
        resolve_importance(None)


def scored(scores: Any, alive: tuple[int, int] = (1, 1)) -> Tensor:
    return score_units(lambda *_: scores, LAYER, {}, {}, torch.tensor(alive).double())


def test_scores_may_be_any_numbers() -> None:
    for scores in ([1, -2], torch.tensor([1, -2]), torch.tensor([1.0, -2.0], requires_grad=True)):
        found = scored(scores)
        assert found.tolist() == [1.0, -2.0]
        assert found.dtype == torch.float64
        assert not found.requires_grad


def test_dead_units_score_exactly_zero() -> None:
    assert scored([float("nan"), -5.0], alive=(0, 3)).tolist() == [0.0, -5.0]


@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ([1.0], r"importance of w \(2 heads\): expected shape \(2,\), got shape \(1,\)"),
        (3.0, r"got shape \(\)"),
        ([[1.0, 2.0]], r"got shape \(1, 2\)"),
        ([1.0, float("nan")], r"expected numbers, got NaN for unit\(s\) \[1\]"),
    ],
)
def test_scores_that_do_not_rank(scores: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        scored(scores)
