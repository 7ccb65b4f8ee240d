"""Narrowing the search on the CPU: when it helps, and that it is noticed when it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranked_scores import DISTRIBUTIONS, in_small, uniform

from torch_rsst.selection import topk
from torch_rsst.selection.bracket import Collected, _bracket, _stride
from torch_rsst.selection.topk import lowest


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was searched in each call."""
    found: list[Any] = []
    narrowed = topk.narrowed

    def recorded(*args: Any, **kwargs: Any) -> Any:
        search, nan = narrowed(*args, **kwargs)
        found.append(search)
        return search, nan

    monkeypatch.setattr(topk, "narrowed", recorded)
    return found


@pytest.mark.parametrize(
    ("distribution", "collected"),
    [("uniform", True), ("sorted", True), ("misleading", False), ("all equal", False)],
)
def test_all_entries_are_searched_where_the_sample_does_not_help(
    distribution: str, collected: bool, searches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small(monkeypatch, block=3000, sample=256, collected=0.6)
    n = 40_000
    score = DISTRIBUTIONS[distribution](n)
    marked = lowest([score], n // 5, absolute=True)[0]
    expected = torch.zeros(n, dtype=torch.bool)
    expected[torch.sort(score.abs(), stable=True).indices[: n // 5]] = True
    assert torch.equal(marked, expected)
    (search,) = searches
    assert isinstance(search.blocks[0], Collected) == collected


def test_too_many_to_collect_are_searched_between_the_two_keys(
    searches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_small(monkeypatch, block=3000, sample=256, collected=0)
    score = uniform(40_000).abs()
    assert int(lowest([score], 8000)[0].sum()) == 8000
    (search,) = searches
    assert not isinstance(search.blocks[0], Collected)
    assert 0 < search.low < search.high < torch.tensor(0.5).view(torch.int32)


def test_few_entries_are_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small(monkeypatch, block=3000, sample=256)
    assert [_stride(entries) for entries in (0, 255, 511)] == [0, 0, 1]
    assert [_stride(256 * n) for n in (2, 7, 9, 24)] == [7, 7, 11, 29]


def test_the_sample_contains_the_entry_with_room_to_spare() -> None:
    assert _bracket(10_000, 0.5) == (4796, 5205)
    assert _bracket(10_000, 0.0) == (-4, 5)
    assert _bracket(10_000, 1.0) == (9996, 10_005)
    assert _bracket(0, 0.5) == (-4, 5)
