"""The options for pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from torch_rsst.schedules import ALIASES, SCHEDULES, resolve_schedule
from torch_rsst.utils.amounts import check_count, check_fraction
from torch_rsst.utils.errors import refuse

Kind = Literal["heads", "neurons", "channels"]


def _importances() -> Any:
    from torch_rsst import importance  # imports torch, which --help alone does not need

    return importance


def _one_of_importances(default: str) -> str:
    return f"(one of: {', '.join(_importances().IMPORTANCES)}; default: {default})"


def _one_of_schedules(default: str) -> str:
    return f"(one of: {', '.join(SCHEDULES)}; default: {default})"


def _replace_alias(options: Any, field: str, aliases: Mapping[str, str]) -> None:
    if isinstance(name := getattr(options, field), str):
        object.__setattr__(options, field, aliases.get(name, name))


def _named(choices: Any) -> Any:
    """An option that takes a name of a registry, read when the help is shown."""
    return tyro.conf.arg(metavar="NAME", help_behavior_hint=choices)


@dataclass(frozen=True)
class PruningOptions:
    """What is pruned, and how."""

    method: Literal["rsst", "refill"] = "rsst"
    """rsst: a growing penalty, then a cut that costs nothing. refill: mask at once, then train."""
    kinds: tuple[Kind, ...] = ("heads", "neurons", "channels")
    """Kinds of units to prune, of those that the model has."""
    rounds: int = 4
    """Rounds of ranking, regrouping and training."""
    amount: float = 0.2
    """Share of the alive weights that each round prunes."""
    regroup_amount: float = 0.5
    """Share of all units to remove, rounded to whole units: 2 of 3 heads in a layer."""
    round_to: int = 1
    """Keep a number of units in each layer that is a multiple of this."""
    importance: Annotated[str, _named(_one_of_importances)] = "magnitude"
    """How units are scored: by their weights, or by their outputs on training images."""
    importance_batches: int = 8
    """Batches of training images, for importances that need data."""
    scope: Literal["layer", "type", "global"] = "layer"
    """Which units are compared: those of a layer, of a type, or all."""
    schedule: Annotated[str, _named(_one_of_schedules)] = "late_exponential"
    """How the penalty grows over a round (RSST)."""
    strength: float = 0.5
    """Strength of the penalty at the end of a round (RSST)."""
    mode: Literal["auto", "coupled", "decoupled"] = "auto"
    """coupled adds the penalty to gradients, decoupled shrinks weights after the step, auto is coupled for SGD (RSST)."""
    fillback_rate: float = 0.0
    """Share of the removed units that is given back (Refill)."""
    rewind: Literal["none", "init"] = "none"
    """init: set the weights back to those of the dense model after each choice of a mask."""

    def __post_init__(self) -> None:
        """Replace aliases by the names that are shown, so that both describe the same run."""
        _replace_alias(self, "schedule", ALIASES)
        if self.importance != type(self).importance:
            _replace_alias(self, "importance", _importances().ALIASES)

    @property
    def measures(self) -> bool:
        """Whether units are scored on data."""
        return next(_importances().data_parts(self.importance), None) is not None

    @property
    def needs_loss(self) -> bool:
        """Whether they are scored by gradients of the loss."""
        return any(part.needs_gradient for part in _importances().data_parts(self.importance))

    def check(self) -> None:
        """Raise unless every option is in its range."""
        _importances().resolve_importance(self.importance)
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            got = " ".join(self.kinds) or "none"
            remedy = "Try --kinds heads neurons."
            refuse(ValueError, "kinds", "each kind once", got, remedy)
        check_count(self.rounds, "rounds", at_least=1)
        check_fraction(self.amount, "amount")
        check_fraction(self.regroup_amount, "regroup_amount")
        check_count(self.round_to, "round_to", at_least=1)
        check_count(self.importance_batches, "importance_batches", at_least=1)
        check_fraction(self.fillback_rate, "fillback_rate")
        resolve_schedule(self.schedule, self.strength)
