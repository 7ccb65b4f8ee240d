"""Damped least squares from streamed sums. Pure tensor arithmetic in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

_ROUNDING = 1e-12
"""What rounding in single precision makes of 0, as a share of sums of squares: features are computed there."""


@dataclass(frozen=True, eq=False)
class FitSums:
    """Sums over positions that a refit of a layer needs; the constant 1 is the last feature.

    Attributes:
        gram: Σ a·aᵀ, shape (groups, features + 1, features + 1).
        cross: Σ (target − output)·aᵀ, shape (groups, outputs, features + 1).
        error: Σ ‖target − output‖², one number.
    """

    gram: Tensor
    cross: Tensor
    error: Tensor

    @classmethod
    def zeros(cls, groups: int, outputs: int, features: int, device: torch.device) -> FitSums:
        """Sums of nothing."""
        f = features + 1
        sizes = ((groups, f, f), (groups, outputs, f), ())
        made = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]
        return cls(*made)

    def add(self, features: Tensor, residual: Tensor) -> None:
        """Add positions.

        Args:
            features: float64 of shape (groups, positions, features).
            residual: target − output, float64 of shape (groups, positions, outputs).
        """
        augmented = F.pad(features, (0, 1), value=1.0)
        self.gram.baddbmm_(augmented.mT, augmented)
        self.cross.baddbmm_(residual.mT, augmented)
        self.error.add_(residual.square().sum())

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All sums."""
        return self.gram, self.cross, self.error

    def error_after(self, change: Tensor) -> float:
        """Σ ‖target − output‖² once ``change`` is added to the matrix, without looking at the data again.

        Args:
            change: of the shape of ``cross``.
        """
        gain = 2.0 * (change * self.cross).sum() - ((change @ self.gram) * change).sum()
        return float(self.error - gain)


def solve(sums: FitSums, free: Tensor, damping: float) -> Tensor:
    """The change of a matrix that lowers the squared error most, with damping.

    For each row, over its free entries S: R_S · (C_SS + damping · mean(diag C_SS) · I)⁻¹, where the constant is
    not damped and does not count in the mean. 0 elsewhere.

    Args:
        sums: C and R are its ``gram`` and ``cross``.
        free: bool, of the shape of ``sums.cross``: which entries may change.
        damping: 0 or more.
    """
    change = torch.zeros_like(sums.cross)
    for group, rows, entries in _same_entries(free):
        gram = sums.gram[group][entries[:, None], entries]
        features = entries < free.shape[-1] - 1
        diagonal = gram.diagonal()
        if bool(features.any()):
            diagonal[features] += damping * diagonal[features].mean()
        cross = sums.cross[group][rows[:, None], entries]
        change[group, rows[:, None], entries] = _solved(gram, cross)
    return change


def _same_entries(free: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(group, rows, entries) for rows of a group that share the entries which may change."""
    for group, rows in enumerate(free):
        patterns, which = rows.unique(dim=0, return_inverse=True)
        for number, pattern in enumerate(patterns):
            if bool(pattern.any()):
                yield group, (which == number).nonzero().flatten(), pattern.nonzero().flatten()


def _solved(gram: Tensor, cross: Tensor) -> Tensor:
    """The product cross · gram⁻¹; of all solutions the smallest where features are linearly dependent."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    inverse = (
        torch.linalg.pinv(gram, hermitian=True, rtol=_ROUNDING)
        if int(failed) or _has_rounded_pivot(factor, gram)
        else torch.cholesky_inverse(factor)
    )
    return cross @ inverse


def _has_rounded_pivot(factor: Tensor, gram: Tensor) -> bool:
    """Whether what features before it leave of a feature is no more than rounding makes of 0.

    A factorization of linearly dependent features fails, or goes through with such a pivot: that depends on the processor.
    """
    return bool((factor.diagonal().square() <= _ROUNDING * gram.diagonal()).any())
