"""Sums over the steps of a schedule: each step where they are few, points with weights where they are many."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from torch_rsst.schedules import Schedule

_EACH = 1 << 16  # so many steps are looked at one by one
_BLOCKS = 256  # of more, at first: no narrow peak is missed
_POINTS = 8  # of a block
_ALIKE = 1e-11  # the relative difference of a block and its halves from which on it is divided


@dataclass(frozen=True, eq=False)
class StepSums:
    """The values of a schedule at the first steps of a training.

    Attributes:
        values: float64, at steps or between them.
        weights: how many steps a value stands for; 1 where each step has its own.
        peak: the highest of all steps.
    """

    values: Tensor
    weights: Tensor
    peak: float

    @classmethod
    def of(cls, schedule: Schedule, total_steps: int, until: float) -> StepSums:
        """What a schedule is at the steps k with k / total_steps ≤ ``until``."""
        steps = _last_step(total_steps, until)
        if steps <= _EACH:
            values = _values(schedule, torch.arange(1, steps + 1).double(), total_steps)
            weights = torch.ones_like(values)
        else:
            values, weights = _sampled(schedule, total_steps, steps)
        ends = [schedule(step / total_steps) for step in (1, steps) if steps]
        return cls(values, weights, max([*values.tolist(), *ends], default=0.0))

    def log_product(self, scale: float) -> float:
        """Σ log(1 − scale · λ) over the steps."""
        return math.fsum((self.weights * torch.log1p(-scale * self.values)).tolist())


def _last_step(total_steps: int, until: float) -> int:
    """The last k with k / total_steps ≤ until, 0 where there is none."""
    low, high = 0, total_steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle / total_steps <= until else (low, middle - 1)
    return low


def _values(schedule: Schedule, steps: Tensor, total_steps: int) -> Tensor:
    return torch.tensor([schedule(k / total_steps) for k in steps.tolist()], dtype=torch.float64)


def _sampled(schedule: Schedule, total_steps: int, steps: int) -> tuple[Tensor, Tensor]:
    """Values and weights of points, close to each other where the schedule is not smooth."""

    def points(first: int, count: int) -> tuple[Tensor, Tensor]:
        offsets, weights = _rule(count)
        return _values(schedule, float(first) + offsets, total_steps), weights

    edges = [1 + steps * i // _BLOCKS for i in range(_BLOCKS + 1)]
    blocks = [(a, b - a) for a, b in pairwise(edges)]
    found = []
    while blocks:
        first, count = blocks.pop()
        values, weights = points(first, count)
        if count > _POINTS:
            halves = [(first, count // 2), (first + count // 2, count - count // 2)]
            parts = [points(*half) for half in halves]
            whole, divided = float(values @ weights), float(sum(v @ w for v, w in parts))
            if math.isfinite(whole) and not math.isclose(whole, divided, rel_tol=_ALIKE):
                blocks += halves
                continue
        found.append((values, weights))
    values, weights = (torch.cat(each) for each in zip(*found, strict=True))
    return values, weights


@lru_cache(maxsize=256)
def _rule(count: int) -> tuple[Tensor, Tensor]:
    """Points among so many consecutive steps, from 0, and their weights: a sum over few for the sum over all.

    Gauss's rule for sums in place of integrals (its polynomials are Gram's): exact where what is summed is a polynomial of a
    degree below twice the number of points.
    """
    if count <= _POINTS:
        return torch.arange(count).double(), torch.ones(count, dtype=torch.float64)
    order = torch.arange(1, _POINTS).double()
    beside = order / 2 * ((1 - (order / count) ** 2) / (4 * order**2 - 1)).sqrt()
    places, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (count - 1) / 2 + count * places, count * vectors[0] ** 2
