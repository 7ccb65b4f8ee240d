"""What a run warns of: another share than was asked for, results that say little, a cut that is not free."""

from __future__ import annotations

import warnings

from torch import nn

from torch_rsst.groups.groups import Groups
from torch_rsst.masking.mask_sets import extract_mask
from torch_rsst.masking.names import named_weights
from torch_rsst.recipes.config import RunConfig
from torch_rsst.regrouping.regrouping import RegroupPlan, Scope, choose, score_layers
from torch_rsst.rounds.engine import Rounds
from torch_rsst.utils.errors import RSSTWarning

_NEAR_ASKED = 0.25  # of the share that was asked for
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
    asked = config.regroup_amount * (1.0 - fillback)
    over_all = _going(config, model, groups, "type", fillback)
    for kind, (gone, units) in _going(
        config, model, groups, config.scope_of(groups), fillback
    ).items():
        off, other = abs(gone / units - asked), over_all[kind][0]
        if off <= _NEAR_ASKED * asked:
            continue
        remedy = "Pass another --regroup-amount."
        if abs(other / units - asked) < off:
            remedy = f"--scope type counts over all layers: {other} would go."
        warnings.warn(
            f"{gone} of {units} {kind} will go ({gone / units:.0%}), where {asked:.0%} was asked for: each "
            f"layer has whole units, and keeps one. {remedy}",
            RSSTWarning,
            stacklevel=2,
        )


def _going(
    config: RunConfig, model: nn.Module, groups: Groups, scope: Scope, fillback: float
) -> dict[str, tuple[int, int]]:
    """Kind → how many units go, and how many there are."""
    rules = RegroupPlan("magnitude", scope, fillback, round_to=config.round_to)
    scored = score_layers(named_weights(model), groups, extract_mask(model), rules)
    kept = choose(groups, scored, config.regroup_amount, rules).kept
    counts: dict[str, tuple[int, int]] = {}
    for layer, stays in zip(groups.layers, kept, strict=True):
        gone, units = counts.get(layer.kind, (0, 0))
        counts[layer.kind] = gone + int((~stays).sum()), units + layer.units
    return counts


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
        lever = "Raise --strength" if rounds.penalty.shrink_to is None else "Lower --shrink-to"
        warnings.warn(
            f"The penalty has left {left:.0%} of the norm of the weights that go: cutting them will "
            f"change the accuracy. {lever}, or raise --epochs.",
            RSSTWarning,
            stacklevel=2,
        )
