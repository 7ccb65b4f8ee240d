"""One round in training: its masks, its penalty, what it has decided and what became of that."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from torch_rsst.groups.groups import Groups
from torch_rsst.masking.mask_sets import Masks, check_masks, named_weights, penalty_mask
from torch_rsst.penalty.hooks import Optimizers
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


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a round has ranked and regrouped.

    Attributes:
        current_mask: what is alive.
        refill_mask: what should be alive.
        budgets: units requested and realized, per scope.
        verdicts: about each unit, per layer; empty where nothing was decided, or that is known already.
    """

    current_mask: Masks
    refill_mask: Masks
    budgets: tuple[ScopeBudget, ...] = ()
    verdicts: tuple[Verdicts, ...] = ()

    def masks(self) -> list[tuple[str, Tensor]]:
        """Every mask with a name for it."""
        refill = [(f"refill {name}", mask) for name, mask in self.refill_mask.items()]
        return [*self.current_mask.items(), *refill]


@dataclass(frozen=True, eq=False)
class Round:
    """One round, ready to be trained.

    Attributes:
        index: 0 … rounds − 1; −1 for the unpenalized round of ``train_first``.
        start_step: optimizer steps already made in it: 0, or more after a resume.
        current_mask: what is alive, as ranked for this round.
        refill_mask: what should be alive.
        budgets: units requested and realized, per scope.
        pruner: counts the steps and, in RSST, carries the penalty.
    """

    index: int
    start_step: int
    current_mask: Masks
    refill_mask: Masks
    budgets: tuple[ScopeBudget, ...]
    pruner: RegularizedPruner
    _model: nn.Module
    _groups: Groups
    _alive_to_penalize: Masks
    _history: DecisionHistory

    def __repr__(self) -> str:
        return f"<Round {self.index}: {self.pruner.steps} of {self.pruner.total_steps} steps>"

    def attach(self, optimizer: Optimizers) -> None:
        """Let an optimizer that is made inside the loop, or a list, carry penalty and step count.

        Raises:
            RuntimeError: where one is attached already.
            ValueError: where a penalized parameter is in no optimizer, or in two.
        """
        self.pruner.attach(optimizer)

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
        mode, strength = self.pruner.mode, self.pruner.strength
        return replace(with_norms_now(decided, _norms(self)), mode=mode, strength=strength)


def record_decision(opened: Round, verdicts: tuple[Verdicts, ...]) -> None:
    """Note what a round decides, with the norms that its penalty starts from."""
    pruner = opened.pruner
    opened._history.begin(
        DecidedRound(opened.index, verdicts, _norms(opened), pruner.mode, pruner.strength)
    )


def record_end(closing: Round) -> None:
    """Note what the penalty of a round has done."""
    closing._history.update(closing.index, closing._penalty_now)


def _norms(of: Round) -> tuple[UnitNorms, ...]:
    weights = named_weights(of._model)
    penalized = penalty_mask(of._alive_to_penalize, of.refill_mask)
    return measure_norms(of._groups, weights, check_masks(weights, penalized))
