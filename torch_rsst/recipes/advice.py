"""What a run warns of: another share than was asked for, results that say little, a cut that is not free."""

from __future__ import annotations

import warnings

from torch import nn

from torch_rsst.groups.groups import Groups
from torch_rsst.recipes.config import RunConfig
from torch_rsst.regrouping.regrouping import RegroupPlan
from torch_rsst.regrouping.rounding import far_roundings
from torch_rsst.rounds.engine import Rounds
from torch_rsst.utils.errors import RSSTWarning

_NEAR_CHANCE = 1.5  # times the accuracy of guessing


def warn_of_rounding(config: RunConfig, model: nn.Module, groups: Groups) -> None:
    """Warn where whole units of each layer make much more or much less than the share that was asked for.

    Args:
        config: of the run.
        model: of the run; only how many units it has matters.
        groups: its units.
    """
    if config.budget:  # which is met by the numbers of units as they are
        return
    fillback = config.fillback_rate if config.method == "refill" else 0.0
    plan = RegroupPlan("magnitude", config.scope_of(groups), fillback, round_to=config.round_to)
    for rounding in far_roundings(model, groups, config.regroup_amount, plan):
        text = rounding.text(amount="--regroup-amount", scope="--scope type")
        warnings.warn(text, RSSTWarning, stacklevel=2)


def warn_near_chance(accuracy: float, classes: int, *, distilled: bool) -> None:
    """Warn where the dense model has learned next to nothing.

    Args:
        accuracy: on held-out images, in percent.
        classes: how many there are.
        distilled: whether its predictions will be in the loss.
    """
    chance = 100.0 / classes
    if accuracy < _NEAR_CHANCE * chance:
        warnings.warn(
            f"The dense model's accuracy is {accuracy:.1f} %, where chance gives {chance:.1f} %: what "
            "pruning costs cannot be told from it. Train longer (--dense-epochs), or change --learning-rate."
            + (" Rounds would learn its predictions, too: pass --distill 0." if distilled else ""),
            RSSTWarning,
            stacklevel=2,
        )


def warn_of_costly_cut(rounds: Rounds) -> None:
    """Warn, before the cut, where the penalty has left much of the weights that go."""
    left = rounds.report().penalized_norm_ratio
    if left > rounds.free_share:
        lever = lever_text(shrinks_to=rounds.penalty.shrink_to is not None)
        warnings.warn(
            f"The penalty has left {left:.0%} of the norm of the weights that go: cutting them will "
            f"change the accuracy. {lever}",
            RSSTWarning,
            stacklevel=2,
        )


def lever_text(*, shrinks_to: bool) -> str:
    """What makes the penalty leave less.

    Args:
        shrinks_to: whether the penalty was given its outcome, not a strength.
    """
    return f"{'Lower --shrink-to' if shrinks_to else 'Raise --strength'}, or raise --epochs."
