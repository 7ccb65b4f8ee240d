"""Importance: a layer of units → one score per unit, from weights or from data. The lowest go first."""

from torch_rsst.importance.combinations import (
    Combination,
    RankAverage,
    WeightedSum,
    choose_importance,
    data_parts,
    rank_average,
    weighted_sum,
    with_measured,
)
from torch_rsst.importance.data_importance import (
    ActivationL1,
    ActivationL2,
    DataImportance,
    FeatureSums,
    Taylor,
    Variance,
)
from torch_rsst.importance.obs import OBS
from torch_rsst.importance.registry import (
    ALIASES,
    IMPORTANCES,
    importance_names,
    name_of,
    resolve_importance,
)
from torch_rsst.importance.weights import Importance, magnitude, remain, score_units

__all__ = [
    "ALIASES",
    "IMPORTANCES",
    "OBS",
    "ActivationL1",
    "ActivationL2",
    "Combination",
    "DataImportance",
    "FeatureSums",
    "Importance",
    "RankAverage",
    "Taylor",
    "Variance",
    "WeightedSum",
    "choose_importance",
    "data_parts",
    "importance_names",
    "magnitude",
    "name_of",
    "rank_average",
    "remain",
    "resolve_importance",
    "score_units",
    "weighted_sum",
    "with_measured",
]
