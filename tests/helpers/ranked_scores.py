"""Scores to rank, awkward ones among them, and the slow way to rank them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from torch_rsst.selection import bracket, topk
from torch_rsst.selection.topk import Ranking
from torch_rsst.testing import masks, weights
from torch_rsst.utils import threads

Problem: TypeAlias = tuple[list[Tensor], list[Tensor | None], int]
INF = math.inf
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def in_small(
    patch: pytest.MonkeyPatch, *, block: int, sample: int = 1 << 17, collected: float = 1 / 32
) -> None:
    """Make small tensors go the way of large ones, several threads included."""
    patch.setattr(topk, "_BLOCK", block)
    patch.setattr(topk, "_BLOCK_ELSEWHERE", block)
    patch.setattr(threads, "_ENTRIES_EACH", 2)
    patch.setattr(bracket, "_SAMPLE", sample)
    patch.setattr(bracket, "_COLLECTED", collected)


def by_sorting(
    scores: Sequence[Tensor], k: int, among: Sequence[Tensor | None] | None, absolute: bool
) -> list[list[bool]]:
    """The slow oracle: sort all competitors on (score, position) and take the first k."""
    among = among or [None] * len(scores)
    entries = []
    for which, (score, mask) in enumerate(zip(scores, among, strict=True)):
        competes = [True] * score.numel() if mask is None else (mask != 0).reshape(-1).tolist()
        values = score.double().reshape(-1).tolist()
        for position, (value, competing) in enumerate(zip(values, competes, strict=True)):
            if competing:
                entries.append((abs(value) if absolute else value, which, position))
    goes = {(which, position) for _, which, position in sorted(entries)[:k]}
    return [[(which, i) in goes for i in range(s.numel())] for which, s in enumerate(scores)]


def flat(marked: Sequence[Tensor]) -> list[list[bool]]:
    return [m.reshape(-1).tolist() for m in marked]


@st.composite
def problems(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> Problem:
    """Scores, which of them compete, and how many are to be marked."""
    some = weights(dtypes=dtypes, allow_infinity=True)
    scores = draw(st.lists(some, min_size=1, max_size=4))
    among = [draw(st.one_of(st.none(), masks(tuple(s.shape)))) for s in scores]
    competing = sum(
        s.numel() if m is None else int(m.sum()) for s, m in zip(scores, among, strict=True)
    )
    k = draw(st.one_of(st.integers(0, competing), st.sampled_from((0, competing))))
    return scores, among, k


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
    "columns first": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "channels last": lambda t: t.contiguous(
        memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format
    ),
}
SHAPES = [(), (0,), (1,), (7,), (3, 0), (1, 9), (4, 5), (2, 3, 4), (2, 3, 2, 2), (3, 1, 2, 1)]
DTYPES = [*FLOATS, torch.int8, torch.uint8, torch.int32, torch.int64]


@st.composite
def awkward_problems(draw: st.DrawFn) -> Problem:
    """Ties, zeros of both signs, infinity, NaN that does not compete; all dtypes, shapes and layouts."""
    values = draw(st.sampled_from([(1.0,), (0.0, -0.0), (0, -0.0, 1, -1, 2, -3, 0.5, INF, -INF)]))
    scores, among = [], []
    for shape in draw(st.lists(st.sampled_from(SHAPES), max_size=4)):
        dtype, size = draw(st.sampled_from(DTYPES)), math.prod(shape)
        numbers = draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))
        marks = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        score = torch.tensor(numbers, dtype=torch.float64).reshape(shape)
        mask = torch.tensor(marks, dtype=torch.bool).reshape(shape)
        score = score if dtype.is_floating_point else score.abs().clamp(max=9).round()
        masked = draw(st.booleans())
        if masked and dtype.is_floating_point:
            score = score.masked_fill(~mask, torch.nan)
        layout, other = (LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))] for _ in range(2))
        scores.append(layout(score.to(dtype)))
        of_masks = draw(st.sampled_from([torch.bool, torch.float32, dtype]))
        among.append(other(mask.to(of_masks)) if masked else None)
    competing = sum(
        s.numel() if m is None else int((m != 0).sum()) for s, m in zip(scores, among, strict=True)
    )
    k = draw(st.one_of(st.sampled_from((0, competing)), st.integers(0, competing)))
    return scores, among, k


def assert_sorts(ranking: Ranking, problem: Problem, absolute: bool) -> None:
    """What goes, stays and competes is what sorting says."""
    scores, among, k = problem
    cut = ranking.cut(k)
    goes, stays = ([mask.cpu() for mask in marks] for marks in (cut.goes(), cut.stays()))
    assert flat(goes) == by_sorting(scores, k, among, absolute)
    competes = [
        torch.ones_like(g) if a is None else a != 0 for g, a in zip(goes, among, strict=True)
    ]
    assert ranking.available == sum(int(mask.sum()) for mask in competes)
    for stay, mask, go in zip(stays, competes, goes, strict=True):
        assert torch.equal(stay, mask & ~go)


def uniform(n: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(n)) - 0.5


def misleading(n: int) -> Tensor:
    """High at every place that a sample of 256 looks at, low elsewhere."""
    stride = n // 256
    while math.gcd(stride, 30) > 1:
        stride += 1
    score = uniform(n).abs()
    score[::stride] += 100
    return score


DISTRIBUTIONS: dict[str, Callable[[int], Tensor]] = {
    "uniform": uniform,
    "all equal": lambda n: torch.full((n,), -3.0),
    "all zero": lambda n: torch.zeros(n),
    "zeros of both signs": lambda n: torch.zeros(n) * uniform(n),
    "two values": lambda n: torch.where(uniform(n) < 0.1, 1.0, 2.0),
    "three in ten tie": lambda n: torch.where(uniform(n) < -0.2, 0.25, uniform(n)),
    "denormal": lambda n: (uniform(n) * 2**20).round() * 2.0**-149,
    "sorted": lambda n: torch.arange(n) / n,
    "sorted down": lambda n: -torch.arange(n) / n,
    "constant blocks": lambda n: (torch.arange(n) // 1000).float(),
    "mostly infinite": lambda n: uniform(n).masked_fill(uniform(n) < 0.4, torch.inf),
    "infinite of both signs": lambda n: (uniform(n) * 1e40).float(),
    "misleading": misleading,
    "periodic": lambda n: (torch.arange(n) % 79).float(),
}
