"""One round in training: its masks, its penalty, what it has decided and what became of that."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

from torch import Tensor, nn

from torch_rsst.groups.groups import Groups
from torch_rsst.masking.mask_sets import Masks, check_masks, penalty_mask
from torch_rsst.masking.names import named_weights
from torch_rsst.penalty.hooks import Optimizers, as_optimizers
from torch_rsst.penalty.regularizer import RegularizedPruner
from torch_rsst.regrouping.history import (
    DecidedRound,
    DecisionHistory,
    UnitNorms,
    Verdicts,
    measure_norms,
    with_norms_now,
)
from torch_rsst.regrouping.keep_units import ScopeBudget
from torch_rsst.report.sparsity import SparsityReport, sparsity_report
from torch_rsst.rounds.optimizer_rewind import OptimizerRewind
from torch_rsst.utils.errors import RoundWarning, refuse


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a round has ranked and regrouped.

    Attributes:
        ranked_mask: what the ranking leaves.
        current_mask: what is alive.
        refill_mask: what should be alive.
        budgets: units requested and realized, per scope.
        verdicts: about each unit, per layer; empty where nothing was decided, or that is known already.
    """

    ranked_mask: Masks
    current_mask: Masks
    refill_mask: Masks
    budgets: tuple[ScopeBudget, ...] = ()
    verdicts: tuple[Verdicts, ...] = ()

    def masks(self) -> list[tuple[str, Tensor]]:
        """Every mask with a name for it."""
        of_each = {"ranked": self.ranked_mask, "": self.current_mask, "refill": self.refill_mask}
        return [
            (f"{kind} {name}".strip(), mask)
            for kind, masks in of_each.items()
            for name, mask in masks.items()
        ]


@dataclass(frozen=True, eq=False)
class Round:
    """One round, ready to be trained.

    Attributes:
        index: 0 … rounds − 1; −1 for the unpenalized round of ``train_first``.
        start_step: optimizer steps already made in it: 0, or more after a resume.
        chosen: what was ranked and regrouped for it.
        pruner: counts the steps and, in RSST, carries the penalty.
    """

    index: int
    start_step: int
    chosen: Chosen
    pruner: RegularizedPruner
    _model: nn.Module
    _groups: Groups
    _trained: Masks
    _history: DecisionHistory
    _optimizer_rewind: OptimizerRewind

    def __repr__(self) -> str:
        return f"<Round {self.index}: {self.pruner.steps} of {self.pruner.total_steps} steps>"

    @property
    def ranked_mask(self) -> Masks:
        """What the ranking leaves; with ``kept_units="dense"`` it masks nothing."""
        return self.chosen.ranked_mask

    @property
    def current_mask(self) -> Masks:
        """What is alive in this round; in Refill, before the refill mask is applied."""
        return self.chosen.current_mask

    @property
    def refill_mask(self) -> Masks:
        """What should be alive."""
        return self.chosen.refill_mask

    @property
    def budgets(self) -> tuple[ScopeBudget, ...]:
        """Units requested and realized, per scope."""
        return self.chosen.budgets

    def attach(self, optimizer: Optimizers) -> None:
        """Let an optimizer that is made inside the loop, or a list, carry penalty and step count.

        It takes the place of the optimizer that was passed to the rounds. Where weights were rewound for this
        round, its state is too, as ``rewind_optimizer`` says.

        Raises:
            RuntimeError: after a step with another one.
            ValueError: where a penalized parameter is in no optimizer, or in two; where ``rewind_optimizer`` does not
                fit.
        """
        optimizers = as_optimizers(optimizer)
        self._optimizer_rewind.check(self._model, optimizers)
        self.pruner.attach(optimizers, replace=True)
        if self.start_step == 0:
            self._optimizer_rewind.apply(self._model, optimizers)

    def report(self) -> SparsityReport:
        """The sparsity of the model as it is now, with this round's refill mask and budgets."""
        return sparsity_report(
            self._model,
            self._groups,
            refill_mask=self.refill_mask,
            budgets=self.budgets,
            decisions=self._history.up_to(self.index, self._penalty_now),
        )

    def _penalty_now(self, decided: DecidedRound) -> DecidedRound:
        """With what the penalty has done by now, unless the round has ended."""
        if not decided.norms or decided.norms[0].after is not None:
            return decided
        pruner = self.pruner
        return replace(
            with_norms_now(decided, _norms(self)),
            mode=pruner.mode,
            strength=pruner.strength,
            below=pruner.fell_below,
            asked=pruner.steps_to_shrink,
        )


def record_decision(opened: Round) -> None:
    """Note what a round decides, with the norms that its penalty starts from."""
    pruner, verdicts = opened.pruner, opened.chosen.verdicts
    opened._history.begin(
        DecidedRound(opened.index, verdicts, _norms(opened), pruner.mode, pruner.strength)
    )


def check_cut_is_free(last: Round, limit: float) -> None:
    """Raise a RuntimeError where what a round penalizes has more left of its norm than ``limit``."""
    pruner = last.pruner
    start, norm = pruner.start_norm, pruner.penalized_norm()
    if not norm <= limit * start:  # nor where it is no number
        refuse(
            RuntimeError,
            "finalize",
            f"penalized weights that have shrunk to {limit:.0%} of their norm or less",
            f"{norm / start if start else math.inf:.1%} ({start:.4g} when round {last.index} opened, {norm:.4g} after "
            f"{pruner.steps} of {pruner.total_steps} steps)",
            "Train the round to its end, with the optimizer passed as optimizer= or to rnd.attach(); "
            "lower shrink_to, raise strength or pass block_loss_grad=True; or pass force=True to "
            "cut what is left.",
        )


def warn_of_end(closing: Round) -> None:
    """Warn of a round that was left early, or whose penalty was done too soon."""
    pruner = closing.pruner
    if pruner.steps < pruner.total_steps:
        remedy = (
            "Train longer, or lower steps_per_round."
            if pruner.steps
            else "Train in the round with the optimizer passed as optimizer= or to "
            "rnd.attach(), or call rnd.pruner.step() after each step, which counts them."
        )
        early = ", before the penalty has its full strength" if pruner.start_norm else ""
        warnings.warn(
            f"Round {closing.index} closed after {pruner.steps} of steps_per_round="
            f"{pruner.total_steps} optimizer steps{early}. {remedy}",
            RoundWarning,
            stacklevel=4,
        )
    below, asked = pruner.fell_below, pruner.steps_to_shrink
    if below is not None and 2 * below < asked:
        warnings.warn(
            f"Round {closing.index}: the norm of the penalized weights fell below 1 % at step "
            f"{below} of the {asked} over which it was to shrink, before half of them: they were cut rather "
            f"than shrunk. Pass shrink_to instead of strength, or lower the strength.",
            RoundWarning,
            stacklevel=4,
        )


def _norms(of: Round) -> tuple[UnitNorms, ...]:
    weights = named_weights(of._model)
    penalized = penalty_mask(of._trained, of.refill_mask)
    return measure_norms(of._groups, weights, check_masks(weights, penalized))
