"""What a run prunes, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch_rsst.schedules import resolve_schedule
from torch_rsst.utils.amounts import check_count, check_fraction
from torch_rsst.utils.errors import refuse

Kind = Literal["heads", "neurons", "channels"]

# Data importances are measured on batches; the others look at weights alone.
MEASURED = ("activation_l1", "activation_l2", "taylor")


@dataclass(frozen=True)
class PruningOptions:
    """What is pruned, and how."""

    method: Literal["rsst", "refill"] = "rsst"
    """rsst: a growing penalty, then a cut that costs nothing. refill: mask at once, train on."""
    kinds: tuple[Kind, ...] = ("heads", "neurons", "channels")
    """Which units may go; all three: those of them that the model has."""
    rounds: int = 4
    """Rounds of rank, regroup, train."""
    amount: float = 0.2
    """Share of the weights still alive that each ranking prunes."""
    regroup_amount: float = 0.5
    """Share of all units that is to go, rounded to whole units: of 3 heads in a layer, 2."""
    round_to: int = 1
    """Keep so many units in each layer that their number is a multiple of this."""
    importance: Literal["magnitude", "remain", "activation_l1", "activation_l2", "taylor"] = (
        "magnitude"
    )
    """How units are scored; the last three are measured on training images."""
    importance_batches: int = 8
    """Batches that activation_l1, activation_l2 and taylor are measured on."""
    scope: Literal["layer", "type", "global"] = "layer"
    """What units compete with: their layer, their type, or everything."""
    schedule: str = "exp_custom_exponents"
    """How the penalty grows over a round: linear, quadratic, cubic, exponential, exp_custom or
    exp_custom_exponents (RSST)."""
    strength: float = 0.5
    """Strength of the penalty at the end of a round (RSST)."""
    mode: Literal["auto", "coupled", "decoupled"] = "auto"
    """Whether the penalty goes through the gradient (RSST); auto: only for plain SGD."""
    fillback_rate: float = 0.0
    """Share of what would go that is given back (Refill)."""
    rewind: Literal["none", "init"] = "none"
    """Put surviving weights back to those of the dense model after each choice of a mask."""

    @property
    def measures(self) -> bool:
        """Whether units are scored on data."""
        return self.importance in MEASURED

    def check(self) -> None:
        """Raise unless every option is in its range."""
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
