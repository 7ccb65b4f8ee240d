"""What a run warns of: results that say little, and a cut that is not free."""

from __future__ import annotations

import warnings

from torch_rsst.rounds.engine import Rounds
from torch_rsst.utils.errors import RSSTWarning

_NEAR_CHANCE = 1.5  # times the accuracy of guessing


def warn_near_chance(accuracy: float, classes: int) -> None:
    """Warn where the dense model has learned next to nothing.

    Args:
        accuracy: on held-out images, in percent.
        classes: how many there are.
    """
    chance = 100.0 / classes
    if accuracy < _NEAR_CHANCE * chance:
        warnings.warn(
            f"The dense model's accuracy is {accuracy:.1f} %, where chance gives {chance:.1f} %: what "
            "pruning costs cannot be told from it. Train longer (--dense-epochs), or change --learning-rate.",
            RSSTWarning,
            stacklevel=2,
        )


def warn_of_costly_cut(rounds: Rounds) -> None:
    """Warn, before the cut, where the penalty has left much of the weights that go."""
    left = rounds.report().penalized_norm_ratio
    if left > rounds.free_share:
        warnings.warn(
            f"The penalty has left {left:.0%} of the norm of the weights that go: cutting them will "
            "change the accuracy. Lower --shrink-to, raise --strength, or raise --epochs.",
            RSSTWarning,
            stacklevel=2,
        )
