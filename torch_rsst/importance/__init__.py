"""Importance: a layer of units → one score per unit, from weights or from data. The lowest go first."""

from torch_rsst.importance.data_importance import ActivationL1, ActivationL2, DataImportance, Taylor
from torch_rsst.importance.registry import (
    ALIASES,
    IMPORTANCES,
    Combination,
    Importance,
    RankAverage,
    WeightedSum,
    data_parts,
    magnitude,
    name_of,
    rank_average,
    remain,
    resolve_importance,
    score_units,
    weighted_sum,
    with_measured,
)

__all__ = [
    "ALIASES",
    "IMPORTANCES",
    "ActivationL1",
    "ActivationL2",
    "Combination",
    "DataImportance",
    "Importance",
    "RankAverage",
    "Taylor",
    "WeightedSum",
    "data_parts",
    "magnitude",
    "name_of",
    "rank_average",
    "remain",
    "resolve_importance",
    "score_units",
    "weighted_sum",
    "with_measured",
]
