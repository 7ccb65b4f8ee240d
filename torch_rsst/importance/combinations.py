"""Importances made of others: weighted sums, averages of ranks, your own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from torch_rsst.groups.groups import GroupLayer
from torch_rsst.importance.data_importance import DataImportance
from torch_rsst.importance.registry import AUTO, auto_name, name_of, resolve_importance
from torch_rsst.importance.weights import Importance, remain, score_units
from torch_rsst.utils.errors import check_choice, check_type, refuse

Normalize: TypeAlias = Literal["sum", "max"] | None
NORMALIZATIONS = ("sum", "max")
T = TypeVar("T", bound="Combination")


@dataclass(frozen=True, repr=False)
class Combination(ABC):
    """An importance made of others; of data too, where one of them is.

    A subclass says how: see :meth:`combine`.

    Attributes:
        parts: names or callables.
    """

    parts: tuple[str | Importance, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            remedy = "Name at least one."
            expected, subject = "importances to combine", type(self).__name__
            refuse(ValueError, subject, expected, "none", remedy)
        for part in self.parts:
            resolve_importance(part)

    @abstractmethod
    def combine(self, scores: Tensor, alive: Tensor) -> Tensor:
        """One score per unit.

        Args:
            scores: a row per part, a column per unit, float64; 0 for dead units.
            alive: bool, which units are alive.
        """

    def __call__(
        self, layer: GroupLayer, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> Tensor:
        """The combined scores of one layer."""
        alive = remain(layer, weights, masks)
        parts = [resolve_importance(part) for part in self.parts]
        rows = [score_units(part, layer, weights, masks, alive) for part in parts]
        return self.combine(torch.stack(rows), alive > 0)

    def with_parts(self: T, parts: tuple[str | Importance, ...]) -> T:
        """The same combination of other parts."""
        return replace(self, parts=parts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(name_of, self.parts))})"


@dataclass(frozen=True, repr=False)
class WeightedSum(Combination):
    """See :func:`weighted_sum`."""

    weights: tuple[float, ...]
    normalize: Normalize

    def __post_init__(self) -> None:
        super().__post_init__()
        for part, weight in zip(self.parts, self.weights, strict=True):
            if not isinstance(weight, (int, float)) or not math.isfinite(weight):
                subject = f"weighted_sum: weight of {name_of(part)!r}"
                remedy = "Weigh it by a number, such as 1.0."
                refuse(ValueError, subject, "a finite number", repr(weight), remedy)
        if self.normalize is not None:
            check_choice("weighted_sum: normalize", self.normalize, NORMALIZATIONS)

    def combine(self, scores: Tensor, alive: Tensor) -> Tensor:
        """See :class:`Combination`."""
        if self.normalize is not None:
            sizes = scores.abs()
            norm = sizes.sum(1, keepdim=True) if self.normalize == "sum" else sizes.amax(1, True)
            scores = scores / torch.where(norm > 0, norm, 1.0)
        return torch.tensor(self.weights, dtype=torch.float64) @ scores

    def __repr__(self) -> str:
        weighed = zip(map(name_of, self.parts), self.weights, strict=True)
        return f"weighted_sum({dict(weighed)}, normalize={self.normalize!r})"


@dataclass(frozen=True, repr=False)
class RankAverage(Combination):
    """See :func:`rank_average`."""

    def combine(self, scores: Tensor, alive: Tensor) -> Tensor:
        """See :class:`Combination`."""
        living = scores[:, alive]
        ranks = torch.zeros_like(scores)
        for row, values in zip(ranks, living, strict=True):
            _, place, count = values.unique(return_inverse=True, return_counts=True)
            # Of c equal scores after s lower ones, each has the middle of the ranks s + 1 … s + c.
            middle = count.cumsum(0) - (count - 1) / 2
            row[alive] = middle[place].double() / max(1, values.numel())
        return ranks.mean(0)

    def __repr__(self) -> str:
        return f"rank_average({', '.join(map(name_of, self.parts))})"


def weighted_sum(parts: Mapping[Any, float], *, normalize: Normalize = "sum") -> WeightedSum:
    """Σ weight · score.

    Example:
        >>> mixed = weighted_sum({"magnitude": 1.0, "remain": 0.5}, normalize="max")
        >>> layer = torch_rsst.head_layer("weight", rows=2, num_heads=2, projections=1)
        >>> mixed(layer, {"weight": torch.tensor([[1.0], [4.0]])}, {})
        tensor([0.7500, 1.5000], dtype=torch.float64)

    Args:
        parts: importance (name or callable) → its weight.
        normalize: how the scores of a part are made comparable with those of others, in each layer:
            divided by their ``"sum"`` or their largest (``"max"``); None takes them as they are.

    Raises:
        TypeError, ValueError: for an unknown importance, none at all, or a weight that is no number.
    """
    remedy = "Such as {'magnitude': 1.0, 'taylor': 0.5}."
    check_type(parts, Mapping, "weighted_sum", "a dict", remedy)
    return WeightedSum(tuple(parts), tuple(parts.values()), normalize)


def rank_average(*parts: str | Importance) -> RankAverage:
    """The mean of the ranks that units have by each importance.

    Example:
        >>> mixed = rank_average("magnitude", "remain")
        >>> layer = torch_rsst.head_layer("weight", rows=2, num_heads=2, projections=1)
        >>> mixed(layer, {"weight": torch.tensor([[1.0], [4.0]])}, {})
        tensor([0.6250, 0.8750], dtype=torch.float64)

    Ranks are those among the living units of a layer, divided by how many these are: the best has 1.
    Equal scores share the mean of their ranks.

    Args:
        parts: names or callables.

    Raises:
        TypeError, ValueError: for an unknown importance, or none at all.
    """
    return RankAverage(parts)


def data_parts(importance: str | Importance) -> Iterator[DataImportance]:
    """The importances within one that need data, in order."""
    found = resolve_importance(importance)
    if isinstance(found, DataImportance):
        yield found
    elif isinstance(found, Combination):
        for part in found.parts:
            yield from data_parts(part)


def choose_importance(
    importance: str | Importance, *, data: bool, reconstruct: bool = False, rounds: bool = False
) -> str | Importance:
    """The importance that one stands for, given what is there and what follows.

    >>> choose_importance("auto", data=False), choose_importance("auto", data=True)
    ('magnitude', 'variance')
    >>> choose_importance("auto", data=True, rounds=True)
    'obs'
    >>> choose_importance("variance", data=True, reconstruct=True)
    Variance(reconstruct=True)

    Args:
        importance: a name or a callable; for ``"auto"`` see ``auto_name``.
        data: whether there are batches to run the model on.
        reconstruct: whether the layers that consume the units are refitted once units are masked, see
            :meth:`DataImportance.before_reconstruction`.
        rounds: whether it is for rounds, see ``auto_name``.
    """
    if importance == AUTO:
        importance = auto_name(data, rounds)
    found = resolve_importance(importance)
    if isinstance(found, Combination):
        choose = partial(choose_importance, data=data, reconstruct=reconstruct, rounds=rounds)
        return found.with_parts(tuple(map(choose, found.parts)))
    if isinstance(found, DataImportance) and reconstruct:
        return found.before_reconstruction()
    return importance


def with_measured(importance: str | Importance, measured: Iterator[Importance]) -> Importance:
    """An importance in which callables that hold scores stand in for those that need data.

    Args:
        importance: see :func:`data_parts`.
        measured: what stands in for each of these, in the same order.
    """
    found = resolve_importance(importance)
    if isinstance(found, DataImportance):
        return next(measured)
    if isinstance(found, Combination) and next(data_parts(found), None) is not None:
        return found.with_parts(tuple(with_measured(part, measured) for part in found.parts))
    return found
