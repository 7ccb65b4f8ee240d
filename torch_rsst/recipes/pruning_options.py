"""The options for pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from torch_rsst.schedules import ALIASES, SCHEDULES
from torch_rsst.utils.amounts import check_count, check_fraction, check_number
from torch_rsst.utils.errors import refuse

TARGETS = {"target_parameters": "params", "target_macs": "macs", "target_latency": "latency"}
"""Option → the budget of :func:`torch_rsst.plan`."""

Kind = Literal["heads", "neurons", "channels"]


def _importances() -> Any:
    from torch_rsst import importance  # imports torch, which --help alone does not need

    return importance


def _one_of_importances(default: str) -> str:
    return f"(one of: {', '.join(_importances().importance_names())}; default: {default})"


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
    """rsst: a growing penalty, then a cut of what has shrunk. refill: mask at once, then train."""
    kinds: tuple[Kind, ...] = ("heads", "neurons", "channels")
    """Kinds of units to prune, of those that the model has."""
    rounds: int = 4
    """Rounds of ranking, regrouping and training."""
    amount: float = 0.2
    """Share of the alive weights that each round prunes."""
    regroup_amount: float = 0.5
    """Share of all units to remove, rounded to whole units; with --scope layer, those of each layer: 2 of 3 heads."""
    target_parameters: float | None = None
    """Share of the dense model's parameters that the compacted one may have, in place of --regroup-amount."""
    target_macs: float | None = None
    """Share of the dense model's multiply-adds, likewise."""
    target_latency: float | None = None
    """Share of the dense model's time for a batch, likewise; measured where the run is."""
    round_to: int = 1
    """Keep a number of units in each layer that is a multiple of this."""
    importance: Annotated[str, _named(_one_of_importances)] = "auto"
    """How units are scored: by their weights, or by their outputs on training images; auto: obs."""
    importance_batches: int = 8
    """Batches of training images, for importances that need data and for --reconstruct."""
    scope: Literal["auto", "layer", "size", "type", "global"] = "auto"
    """Which units are compared: those of a layer, of all layers with units of one size, of a type, or all; auto: size with obs, unless there are channels, else layer."""
    schedule: Annotated[str, _named(_one_of_schedules)] = "late_exponential"
    """How the penalty grows over a round (RSST)."""
    shrink_to: float | None = None
    """Share of their norm that the penalty alone leaves of the weights that go, over a round: 0.01, unless --strength is given (RSST)."""
    strength: float | None = None
    """Strength of the penalty at the end of a round, in place of --shrink-to (RSST)."""
    mode: Literal["auto", "coupled", "decoupled"] = "auto"
    """decoupled shrinks weights after the step, coupled adds the penalty to gradients, by --strength (0.5 unless it is given); auto is decoupled, or with --strength what the optimizer does with weight decay (RSST)."""
    kept_units: Literal["dense", "sparse"] = "dense"
    """sparse: also mask single weights in units that stay (RSST)."""
    reconstruct: Literal["auto", "none", "mean", "least_squares"] = "auto"
    """How the layers that consume units are refitted on training images when the units are masked; auto: least_squares with Refill, unless it rewinds."""
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
        """Whether pruning runs the model on data."""
        return self.scores_on_data or self.reconstruction is not None

    @property
    def scores_on_data(self) -> bool:
        """Whether units are scored by what they do on data."""
        return bool(self._data_parts)

    @property
    def reconstruction(self) -> Literal["mean", "least_squares"] | None:
        """How consumers are refitted."""
        if self.reconstruct == "auto":
            hard = self.method == "refill" and self.rewind == "none"
            return "least_squares" if hard else None
        return None if self.reconstruct == "none" else self.reconstruct

    @property
    def needs_loss(self) -> bool:
        """Whether they are scored by gradients of the loss."""
        return any(part.needs_gradient for part in self._data_parts)

    def scope_of(self, groups: Any) -> Any:
        """What units compete with: the scope that "auto" stands for in rounds."""
        from torch_rsst.regrouping.regrouping import RegroupPlan  # imports torch, see above

        return RegroupPlan(self._chosen_importance, self.scope).choose_scope(groups).scope

    @property
    def _chosen_importance(self) -> Any:
        return _importances().choose_importance(self.importance, data=True, rounds=True)

    @property
    def _data_parts(self) -> list[Any]:
        return list(_importances().data_parts(self._chosen_importance))

    @property
    def penalty(self) -> dict[str, Any]:
        """The arguments of the penalty; those that are not given have the library's defaults."""
        given = {"strength": self.strength, "shrink_to": self.shrink_to}
        chosen = {name: value for name, value in given.items() if value is not None}
        return {"schedule": self.schedule, "mode": self.mode, **chosen}

    @property
    def budget(self) -> dict[str, float]:
        """The target, as :func:`torch_rsst.plan` takes it; empty where there is none."""
        given = {budget: getattr(self, option) for option, budget in TARGETS.items()}
        return {budget: value for budget, value in given.items() if value is not None}

    def _check_target(self) -> None:
        options = [name for name in TARGETS if getattr(self, name) is not None]
        if len(options) > 1:
            got, remedy = " and ".join(options), "Pass the one that matters most."
            refuse(ValueError, "target", "one of them", got, remedy)
        for name in options:
            check_number(value := getattr(self, name), name, above=0.0)
            if value > 1:
                expected, remedy = "a share of the dense model, at most 1", "Pass 0.5 for half."
                refuse(ValueError, name, expected, value, remedy)
            if self.fillback_rate:
                got, remedy = (
                    f"{self.fillback_rate}, beside --{name.replace('_', '-')}",
                    "Leave one away.",
                )
                refuse(ValueError, "fillback_rate", "0, so that the target is met", got, remedy)

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
        self._check_target()
        from torch_rsst.penalty.penalty_arguments import Penalty  # imports torch

        Penalty(**self.penalty)  # for what it refuses
