"""Optimal Brain Surgeon for whole units: the error that is left once consumers have been refitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch_rsst.importance.data_importance import DataImportance, FeatureSums
from torch_rsst.utils.amounts import check_number

_CANDIDATES, _CANDIDATES_SHARE = 64, 8
_LEAST_VARIANCE, _LEAST = 1e-12, 1e-100
"""What features are taken to vary at the least, of their mean square and at all: constant ones rank by their weights."""
_LATER = 1 + 1e-12
"""By how much a unit scores more than one that was removed before it, where their errors do not tell."""


@dataclass(frozen=True)
class OBS(DataImportance):
    """The squared error that removing a unit adds to the outputs of its consumers, once they are refitted.

    Units are removed one at a time, always the one that adds the least error; a unit's score is what it has
    added. So of two units with the same outputs one scores 0, and the other what both are worth.

    With C the damped covariance of the features that stay, W the weights by which the consumer reads them and u the
    features of one unit, its error, and what follows once it is removed, are

        tr(W_u · ((C⁻¹)_uu)⁻¹ · W_uᵀ),    W ← W − W_u · ((C⁻¹)_uu)⁻¹ · (C⁻¹)_u,

    and the same for the rows of C⁻¹. Of a convolution, each position of its kernel is a consumer of its own. With several
    consumers their errors are added. For each consumer features² numbers are kept; time is of the order of
    features³.

    The formulas are those of Optimal Brain Surgeon (Hassibi and Stork, NeurIPS 1992) for a layer's outputs, as in OBC
    (Frantar and Alistarh, NeurIPS 2022) for single weights and ZipLM (Kurtic et al., NeurIPS 2023) for heads and
    neurons. Here the covariance takes the place of the second moments, as :func:`torch_rsst.reconstruct` fits a
    constant as well.

    Args:
        damping: relative to the mean variance of a feature.
    """

    moments: ClassVar[bool] = True
    across_layers: ClassVar[bool] = True

    damping: float = 1e-3

    def __post_init__(self) -> None:
        check_number(self.damping, "damping", above=0)

    def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """See :class:`DataImportance`."""
        return activation

    def unit_scores(self, inputs: Sequence[FeatureSums], units: int) -> Tensor:
        """See :class:`DataImportance`."""
        read = [Reader.of(each, self.damping) for each in inputs if each.count]
        scores, last = torch.zeros(units, dtype=torch.float64), 0.0
        for unit, error in removals(read, units):
            last = max(error, last * _LATER)
            scores[unit] = last
        return scores


@dataclass(frozen=True, eq=False)
class Reader:
    """A consumer that is refitted whenever features go.

    Attributes:
        gram: WᵀW, of the weights W by which it reads the features that are left: float64 of shape (features, features).
        inverse: of the features' damped covariance, of the same shape.
        unit: of each feature.
    """

    gram: Tensor
    inverse: Tensor
    unit: Tensor

    @classmethod
    def of(cls, inputs: FeatureSums, damping: float) -> Reader:
        """Of what a consumer has received."""
        assert inputs.moments is not None, "they are asked for"
        assert inputs.weight is not None, "it comes with them"
        mean = inputs.sums[0] / inputs.count
        square = inputs.moments / inputs.count
        covariance = square - torch.outer(mean, mean)
        diagonal = covariance.diagonal()
        least = max(_LEAST, _LEAST_VARIANCE * float(square.diagonal().mean()))
        diagonal += damping * diagonal.mean().clamp_min(least)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if int(failed):  # by rounding alone
            inverse = torch.linalg.pinv(covariance, hermitian=True)
        else:
            inverse = torch.cholesky_inverse(factor)
        return cls(inputs.weight.T @ inputs.weight, inverse, inputs.unit)

    def errors(self, units: int) -> Tensor:
        """What removing each unit adds to the squared error; 0 for units that are not read."""
        found = torch.zeros(units, dtype=torch.float64)
        counts = torch.bincount(self.unit, minlength=units)
        by_unit = self.unit.argsort(stable=True)
        for size in sorted({*counts.tolist()} - {0}):
            some = (counts == size).nonzero().flatten()
            own = by_unit[counts[self.unit[by_unit]] == size].view(-1, size)
            blocks = own[:, :, None], own[:, None, :]
            solved = torch.linalg.solve(self.inverse[blocks], self.gram[blocks])
            found[some] = solved.diagonal(dim1=1, dim2=2).sum(1)
        return found

    def of_units(self, units: Tensor) -> Reader:
        """What is read of some units alone."""
        own = torch.isin(self.unit, units)
        return Reader(self.gram[own][:, own], self.inverse[own][:, own], self.unit[own])

    def without(self, units: Tensor) -> Reader:
        """The consumer, refitted to the features of all other units."""
        goes = torch.isin(self.unit, units)
        stays = ~goes
        shared = torch.linalg.solve(self.inverse[goes][:, goes], self.inverse[goes][:, stays])
        inverse = self.inverse[stays][:, stays] - self.inverse[stays][:, goes] @ shared
        moved = self.gram[stays][:, goes] @ shared
        gram = self.gram[stays][:, stays] - moved - moved.T
        gram += shared.T @ self.gram[goes][:, goes] @ shared
        return Reader(gram, inverse, self.unit[stays])


def removals(readers: Sequence[Reader], units: int) -> list[tuple[int, float]]:
    """All units in the order in which they are best removed, with the error that each adds.

    Of many units the next are sought among the eighth that adds least; which these are is looked at anew after each
    half of them.
    """
    found: list[tuple[int, float]] = []
    left = torch.arange(units)
    while left.numel():
        few, count = left, left.numel()
        if count > _CANDIDATES:
            candidates = max(_CANDIDATES, count // _CANDIDATES_SHARE)
            few = left[_errors(readers, units)[left].argsort()[:candidates]]
            count = candidates // 2
        next_ones = _one_by_one([each.of_units(few) for each in readers], units, few, count)
        found += next_ones
        gone = torch.tensor([unit for unit, _ in next_ones])
        left = left[~torch.isin(left, gone)]
        if left.numel():
            readers = [each.without(gone) for each in readers]
    return found


def _one_by_one(
    readers: Sequence[Reader], units: int, few: Tensor, count: int
) -> list[tuple[int, float]]:
    found: list[tuple[int, float]] = []
    waiting = torch.full((units,), math.inf, dtype=torch.float64)
    waiting[few] = 0.0
    for _ in range(count):
        errors = _errors(readers, units) + waiting
        unit = int(errors.argmin())
        found.append((unit, float(errors[unit])))
        waiting[unit] = math.inf
        readers = [each.without(torch.tensor([unit])) for each in readers]
    return found


def _errors(readers: Sequence[Reader], units: int) -> Tensor:
    return sum((each.errors(units) for each in readers), torch.zeros(units, dtype=torch.float64))
