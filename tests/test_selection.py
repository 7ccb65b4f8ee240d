"""The exact selector against sorting."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_rsst import selection
from torch_rsst.selection import lowest
from torch_rsst.testing import masks, weights

INF, NAN = math.inf, math.nan
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def by_sorting(
    scores: Sequence[Tensor], k: int, among: Sequence[Tensor | None] | None, absolute: bool
) -> list[list[bool]]:
    """The slow oracle: sort all competitors on (score, position) and take the first k."""
    among = among or [None] * len(scores)
    entries = []
    for which, (score, mask) in enumerate(zip(scores, among, strict=True)):
        competes = [True] * score.numel() if mask is None else mask.reshape(-1).tolist()
        values = score.double().reshape(-1).tolist()
        for position, (value, competing) in enumerate(zip(values, competes, strict=True)):
            if competing:
                entries.append((abs(value) if absolute else value, which, position))
    goes = {(which, position) for _, which, position in sorted(entries)[:k]}
    return [[(which, i) in goes for i in range(s.numel())] for which, s in enumerate(scores)]


def flat(marked: Sequence[Tensor]) -> list[list[bool]]:
    return [m.reshape(-1).tolist() for m in marked]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor | None], int]:
    scores = draw(st.lists(weights(allow_infinity=True), min_size=1, max_size=4))
    among = [draw(st.one_of(st.none(), masks(tuple(s.shape)))) for s in scores]
    competing = sum(
        s.numel() if m is None else int(m.sum()) for s, m in zip(scores, among, strict=True)
    )
    k = draw(st.one_of(st.integers(0, competing), st.sampled_from((0, competing))))
    return scores, among, k


@given(problems(), st.booleans())
def test_selection_is_sorting(
    problem: tuple[list[Tensor], list[Tensor | None], int], absolute: bool
) -> None:
    scores, among, k = problem
    marked = lowest(scores, k, among=among, absolute=absolute)
    assert flat(marked) == by_sorting(scores, k, among, absolute)
    assert [m.shape for m in marked] == [s.shape for s in scores]
    assert all(m.dtype == torch.bool for m in marked)
    assert sum(int(m.sum()) for m in marked) == k


@given(problems(), st.booleans(), st.integers(1, 5))
def test_blocks_bound_the_memory_not_the_result(
    problem: tuple[list[Tensor], list[Tensor | None], int], absolute: bool, block: int
) -> None:
    scores, among, k = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_BLOCK", block)
        marked = lowest(scores, k, among=among, absolute=absolute)
    assert flat(marked) == by_sorting(scores, k, among, absolute)


@given(weights(dtypes=FLOATS, allow_infinity=True), st.data())
def test_the_result_does_not_depend_on_the_split(score: Tensor, data: st.DataObject) -> None:
    whole = score.reshape(-1)
    cuts = sorted(data.draw(st.lists(st.integers(0, whole.numel()), max_size=3)))
    parts = [
        whole[a:b] for a, b in zip([0, *cuts], [*cuts, whole.numel()], strict=True)
    ]  # empty parts too
    k = data.draw(st.integers(0, whole.numel()))
    joined = torch.cat(lowest(parts, k))
    assert torch.equal(joined, lowest([whole], k)[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [0, 1, 500, 999, 1000])
def test_heavy_ties_against_a_stable_sort(dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    score = torch.randint(-3, 4, (1000,), generator=generator).to(dtype)
    order = torch.sort(score.abs().double(), stable=True).indices
    expected = torch.zeros(1000, dtype=torch.bool)
    expected[order[:k]] = True
    assert torch.equal(lowest([score], k, absolute=True)[0], expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("score", "k", "marked"),
    [
        ([5, 5, 5, 5], 0, [0, 0, 0, 0]),
        ([5, 5, 5, 5], 1, [1, 0, 0, 0]),
        ([5, 5, 5, 5], 3, [1, 1, 1, 0]),
        ([5, 5, 5, 5], 4, [1, 1, 1, 1]),
        ([0.0, -0.0, 0.0, -0.0], 2, [1, 1, 0, 0]),
        ([-0.0, 0.0, -1, 1], 2, [1, 0, 1, 0]),
        ([INF, -INF, 0, INF], 1, [0, 1, 0, 0]),
        ([INF, -INF, 0, INF], 3, [1, 1, 1, 0]),
        ([-1, -2, -3, 3], 2, [0, 1, 1, 0]),
    ],
)
def test_literal_cases(dtype: torch.dtype, score: list[float], k: int, marked: list[int]) -> None:
    found = lowest([torch.tensor(score, dtype=dtype)], k)
    assert found[0].int().tolist() == marked


@pytest.mark.parametrize(
    ("score", "k", "marked"),
    [
        ([-1, 1, -1, 1], 2, [1, 1, 0, 0]),
        ([INF, -INF, 3, -4], 3, [1, 0, 1, 1]),
        ([-5, 4, -3, 2], 2, [0, 0, 1, 1]),
    ],
)
def test_literal_cases_of_magnitude(score: list[float], k: int, marked: list[int]) -> None:
    found = lowest([torch.tensor(score, dtype=torch.float32)], k, absolute=True)
    assert found[0].int().tolist() == marked


@pytest.mark.parametrize("dtype", FLOATS)
def test_neighbors_and_denormals_are_told_apart(dtype: torch.dtype) -> None:
    tiny = torch.tensor(0.0, dtype=dtype)
    ladder = (
        [tiny := torch.nextafter(tiny, torch.tensor(1.0, dtype=dtype)) for _ in range(4)]
        if (dtype in (torch.float32, torch.float64))
        else [
            torch.tensor(torch.finfo(dtype).smallest_normal * f, dtype=dtype)
            for f in (0.25, 0.5, 1, 2)
        ]
    )
    score = torch.stack([ladder[i] for i in (2, 0, 3, 1)])
    assert lowest([score], 2)[0].tolist() == [False, True, False, True]
    assert lowest([-score], 2)[0].tolist() == [True, False, True, False]


def test_float64_scores_are_not_rounded_to_float32() -> None:
    score = torch.tensor([1.0 + 2.0**-40, 1.0, 1.0 + 2.0**-50], dtype=torch.float64)
    assert lowest([score], 1)[0].tolist() == [False, True, False]
    assert lowest([score], 2)[0].tolist() == [False, True, True]


def test_tensors_of_several_dtypes_compete_by_value() -> None:
    scores = [
        torch.tensor([1.0, 3.0], dtype=torch.bfloat16),
        torch.tensor([2.0, 0.5], dtype=torch.float64),
        torch.tensor([1, 4]),
        torch.tensor([1.0, 0.25], dtype=torch.float16),
    ]
    assert flat(lowest(scores, 4)) == [[True, False], [False, True], [True, False], [False, True]]


def test_integers_are_ranked_too() -> None:
    assert lowest([torch.tensor([3, -2, 0, -2])], 2)[0].tolist() == [False, True, False, True]


def test_channels_last_counts_in_logical_order() -> None:
    score = torch.arange(48.0).sub(20).abs().reshape(2, 3, 4, 2)
    strided = score.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    for k in range(49):
        assert torch.equal(lowest([strided], k)[0], lowest([score], k)[0])


def test_views_and_expanded_tensors() -> None:
    base = torch.tensor([[4.0, 9.0], [1.0, 9.0], [3.0, 9.0]])
    assert lowest([base[:, 0]], 1)[0].tolist() == [False, True, False]
    assert lowest([torch.tensor(2.0).expand(3)], 2)[0].tolist() == [True, True, False]


def test_everything_dead_but_one() -> None:
    alive = torch.zeros(9, dtype=torch.bool)
    alive[5] = True
    marked = lowest([torch.full((9,), -7.0)], 1, among=[alive])
    assert torch.equal(marked[0], alive)


def test_scalars_empty_tensors_and_no_tensors() -> None:
    scalar = torch.tensor(2.0)
    marked = lowest([torch.zeros(0, 3), scalar, torch.tensor([1.0])], 2)
    assert [m.shape for m in marked] == [(0, 3), (), (1,)]
    assert flat(marked) == [[], [True], [True]]
    assert lowest([], 0) == []
    assert lowest([torch.zeros(0)], 0)[0].numel() == 0


def test_many_random_ranks() -> None:
    generator = torch.Generator().manual_seed(1)
    chooser = random.Random(1)
    scores = [torch.randn(n, generator=generator) for n in (5000, 3, 70000)]
    joined = torch.cat(scores)
    order = torch.sort(joined, stable=True).indices
    for k in [chooser.randrange(joined.numel()) for _ in range(5)]:
        expected = torch.zeros_like(joined, dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(torch.cat(lowest(scores, k)), expected)


def test_inputs_are_not_written_to() -> None:
    score, alive = torch.tensor([2.0, -1.0, -0.0]), torch.tensor([True, False, True])
    lowest([score], 1, among=[alive], absolute=True)
    assert score.tolist() == [2.0, -1.0, -0.0]
    assert math.copysign(1.0, score[2].item()) == -1.0
    assert alive.tolist() == [True, False, True]


@pytest.mark.parametrize("k", [-1, 3])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match="k: expected 0 to 2 candidates"):
        lowest([torch.ones(3)], k, among=[torch.tensor([True, True, False])])


@pytest.mark.parametrize("k", [0, 1])
def test_nan_among_competitors_names_the_tensor(k: int) -> None:
    scores = [torch.ones(2), torch.tensor([NAN, 1.0, NAN])]
    with pytest.raises(ValueError, match=r"scores\[1\]: expected numbers, got 2 NaN"):
        lowest(scores, k)
    with pytest.raises(ValueError, match="scores of 'fc'"):
        lowest(scores, k, names=["head", "fc"])


def test_nan_outside_the_competition_is_fine() -> None:
    score, alive = torch.tensor([NAN, 2.0, 1.0]), torch.tensor([False, True, True])
    assert lowest([score], 1, among=[alive])[0].tolist() == [False, False, True]
    assert lowest([score], 2, among=[alive], absolute=True)[0].tolist() == [False, True, True]
