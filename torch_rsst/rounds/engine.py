"""What RSST and Refill share: rank → regroup → yield. The iterator is the state.

It owns no optimizer, device or data.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor, nn

from torch_rsst.distributed.replicas import agreed, replica_group
from torch_rsst.groups.groups import Group, GroupLayer, Groups, as_groups, check_groups
from torch_rsst.importance.batches import Batches, DataSource
from torch_rsst.importance.combinations import choose_importance, data_parts
from torch_rsst.importance.measuring import check_source, measured
from torch_rsst.importance.registry import name_of
from torch_rsst.masking.freezing import freeze_latents
from torch_rsst.masking.mask_sets import (
    Masks,
    apply_mask,
    extract_mask,
    named_refs,
    named_weights,
    unwrap,
)
from torch_rsst.masking.optimizer_state import reset_returned
from torch_rsst.masking.parameter_ref import Parameter, masked_refs
from torch_rsst.masking.rewind import Snapshot
from torch_rsst.masking.rollback import AllOrNothing
from torch_rsst.penalty.hooks import Optimizers, as_optimizers
from torch_rsst.penalty.regularizer import RegularizedPruner, check_settings
from torch_rsst.reconstruction.reconstruction import (
    Method,
    Reconstruction,
    check_reconstruction,
    reconstruct_towards,
)
from torch_rsst.regrouping.history import DecisionHistory
from torch_rsst.regrouping.ranking import rank, ranked_names
from torch_rsst.regrouping.regrouping import RegroupPlan, decide, refill_from
from torch_rsst.report.sparsity import SparsityReport, sparsity_report
from torch_rsst.rounds.reference import Reference
from torch_rsst.rounds.round import Chosen, Round, record_decision, record_end
from torch_rsst.rounds.state import RoundsState, RoundState, damage_reported, plain_settings
from torch_rsst.utils.amounts import Amount, check_amount, check_count, plain_amount
from torch_rsst.utils.errors import RoundWarning, refuse

__all__ = ["Chosen", "RegroupAmount", "Rewind", "Round", "Rounds"]

RegroupAmount: TypeAlias = Amount | Callable[[int], Amount] | None
Rewind: TypeAlias = Literal["init"] | Mapping[str, Tensor] | None


class Rounds(ABC):
    """What RSST and Refill share: rank → regroup → yield; explicit, resumable state."""

    _refits_on_opening: ClassVar[bool] = False
    """Whether ``reconstruct=`` refits consumers when a round opens, not at the end."""

    def __init__(
        self,
        model: nn.Module,
        groups: Groups | Iterable[Group] | Iterable[GroupLayer],
        plan: RegroupPlan,
        *,
        optimizer: Optimizers | None,
        steps_per_round: int,
        rounds: int,
        amount: Amount,
        regroup_amount: RegroupAmount,
        rewind: Rewind,
        train_first: bool,
        parameters: Iterable[Parameter | str] | None,
        penalty: Mapping[str, Any],
        freeze_masked: bool = False,
        reset_moments: bool = False,
        data: DataSource = DataSource(),  # noqa: B008 - frozen
        reconstruct: Method | None = None,
    ) -> None:
        self._reconstruction = None if reconstruct is None else Reconstruction(reconstruct)
        importance = choose_importance(
            plan.importance, data=data.batches is not None, reconstruct=reconstruct is not None
        )
        plan = replace(plan, importance=importance)
        if reconstruct is not None and rewind is not None:
            remedy = "Rewinding would undo the refit: leave out one of them."
            refuse(ValueError, "reconstruct", "rewind=None", "both", remedy)
        check_count(steps_per_round, "steps_per_round", at_least=1)
        check_count(rounds, "rounds", at_least=1)
        check_settings(steps_per_round, **penalty)
        if reset_moments and optimizer is None:
            remedy = "Pass the optimizer to Refill, or reset_moments=False."
            refuse(ValueError, "reset_moments", "an optimizer", "none", remedy)
        check_amount(amount)
        if regroup_amount is None:
            if plan.ungrouped == "element":
                remedy = "Pass regroup_amount, or ungrouped='keep'."
                got = "regroup_amount=None"
                refuse(ValueError, "ungrouped='element'", "an amount", got, remedy)
        elif not callable(regroup_amount):
            check_amount(regroup_amount, "regroup_amount")
        self._model, self._groups, self._plan = unwrap(model), as_groups(groups), plan
        check_groups(named_weights(model), self._groups)
        if self._reconstruction is not None:
            check_reconstruction(self._model, data)
        if self._reconstruction is None or any(data_parts(importance)):
            check_source(importance, data, rounds)
        self._data = data
        self._ranked = ranked_names(model, self._groups, parameters)
        self._snapshot = Snapshot.of(model, rewind)
        self._optimizer = optimizer
        self._optimizers = [] if optimizer is None else as_optimizers(optimizer)
        self._penalty = dict(penalty)
        self._replicas = replica_group(model)
        self.freeze_masked, self.reset_moments = freeze_masked, reset_moments
        self.steps_per_round, self.rounds = int(steps_per_round), int(rounds)
        self.amount = plain_amount(amount)
        self.regroup_amount = (
            regroup_amount
            if regroup_amount is None or callable(regroup_amount)
            else plain_amount(regroup_amount)
        )
        self._history = DecisionHistory(plan.rules(self._groups))
        self._next_index = -1 if train_first else 0
        self._round: Round | None = None  # the one in training
        self._last: Round | None = None  # the latest, open or closed
        self._reference: Reference | None = None  # what consumers are refitted towards at the end
        self._resumed = False
        self._finalized = False

    # What the two methods differ in

    @abstractmethod
    def _training_mask(self, current: Masks, refill: Masks) -> Masks:
        """The mask that the round trains under."""

    @abstractmethod
    def _alive_to_penalize(self, current: Masks, refill: Masks) -> Masks:
        """The current mask that the penalized set is computed from."""

    @abstractmethod
    def _final_mask(self, current: Masks, refill: Masks) -> Masks:
        """The mask that the model ends with."""

    def _mask_to_rank(self) -> Masks:
        """What is alive before the next ranking."""
        return extract_mask(self._model)

    # The iterator

    def __iter__(self) -> Iterator[Round]:
        return self

    def __next__(self) -> Round:
        if self._resumed and self._round is not None:
            self._resumed = False
            return self._round
        self._close()
        if self._next_index >= self.rounds or self._finalized:
            raise StopIteration
        index = self._next_index
        plan = self._plan_of(index)
        chosen = agreed(self._replicas, lambda: self._choose(index, plan), Chosen.masks)
        opened = self._open(index, chosen, rewind=index >= 0)
        self._next_index = index + 1
        return opened

    @property
    def round(self) -> Round | None:
        """The latest round, open or closed; None before the first."""
        return self._last

    def finalize(
        self, *, reconstruct: Method | None = None, batches: Batches | None = None
    ) -> None:
        """Close the open round and apply the last masks for good; ranks nothing.

        RSST masks whatever the last refill mask does not keep; Refill already has. Masks stay
        masks: :func:`torch_rsst.remove_all` makes them permanent.

        Args:
            reconstruct: refit the layers that consume what is masked now, as :func:`torch_rsst.reconstruct`
                does; by default what the rounds were given. Rounds with ``reconstruct=`` refit towards the
                model as it was when the last round opened; others keep no copy of it, and refit towards the
                model as it is before the cut.
            batches: to reconstruct on; by default those of the rounds.

        Raises:
            RuntimeError: before the first round.
            ValueError, TypeError: for batches that are missing or do not fit; nothing is masked then.
        """
        if self._last is None:
            remedy = "Train at least one: for rnd in rsst: …"
            refuse(RuntimeError, "finalize", "a round", "none yet", remedy)
        how = self._reconstruction if reconstruct is None else Reconstruction(reconstruct)
        data = self._data if batches is None else replace(self._data, batches=batches)
        if how is not None:
            check_reconstruction(self._model, data)
        elif batches is not None:
            remedy = "Leave them out, or pass reconstruct='least_squares'."
            refuse(ValueError, "batches", "none where nothing is reconstructed", "some", remedy)
        self._close()
        masks = self._final_mask(self._last.current_mask, self._last.refill_mask)
        self._mask(masks, how, data)
        self._finalized, self._reference = True, None

    def report(self) -> SparsityReport:
        """The sparsity of the model as it is now."""
        if self._last is None:
            return sparsity_report(self._model, self._groups)
        return self._last.report()

    # A round's life

    def _plan_of(self, index: int) -> RegroupPlan:
        """The plan of a round, with scores in place of what needs data.

        Units are scored under the mask that this round's ranking makes. Not within :meth:`_choose`: there
        ranks talk when all are done, here as well.
        """
        if index < 0 or not any(data_parts(self._plan.importance)):
            return self._plan
        current = agreed(self._replicas, self._rank, dict.items)
        found = measured(
            self._model,
            self._groups,
            self._plan.importance,
            self._data,
            current,
            self._replicas,
        )
        return replace(self._plan, importance=found)

    def _rank(self) -> Masks:
        weights = named_weights(self._model)
        return rank(weights, self._mask_to_rank(), self._groups, self._ranked, self.amount)

    def _choose(self, index: int, plan: RegroupPlan) -> Chosen:
        """Rank and regroup; reads the model only."""
        if index < 0:
            alive = self._mask_to_rank()
            return Chosen(alive, alive)
        weights, current = named_weights(self._model), self._rank()
        amount = (
            self.regroup_amount(index) if callable(self.regroup_amount) else self.regroup_amount
        )
        if amount is not None:
            check_amount(amount, f"regroup_amount of round {index}")
        decision = decide(weights, self._groups, current, amount, plan)
        refill = refill_from(decision, weights, self._groups, current, amount, plan)
        return Chosen(current, refill, decision.budgets, decision.verdicts())

    def _open(self, index: int, chosen: Chosen, *, rewind: bool) -> Round:
        current, refill = chosen.current_mask, chosen.refill_mask
        alive = self._alive_to_penalize(current, refill)
        # The regularizer comes first: whatever can fail does so before the model is touched.
        pruner = RegularizedPruner(
            self._model,
            refill,
            current_mask=alive,
            total_steps=self.steps_per_round,
            optimizer=self._optimizer,
            **self._penalty,
        )
        parts = (self._model, self._groups, alive, self._history)
        opened = Round(index, 0, current, refill, chosen.budgets, pruner, *parts)
        try:
            refits = rewind and self._refits_on_opening
            how = self._reconstruction if refits else None
            self._mask(self._training_mask(current, refill), how, self._data)
            if rewind:
                self._snapshot.restore(self._model)
                pruner.reset()
                if self._reconstruction is not None and not refits:
                    self._reference = Reference.of(self._model)
            if chosen.verdicts:
                record_decision(opened, chosen.verdicts)
        except BaseException:
            pruner.detach()
            raise
        self._round = self._last = opened
        return opened

    def _close(self) -> None:
        if self._round is None:
            return
        record_end(self._round)
        index, pruner, self._round = self._round.index, self._round.pruner, None
        try:
            if pruner.steps < self.steps_per_round:
                remedy = (
                    "Train longer, or lower steps_per_round."
                    if pruner.steps
                    else "Train in the round with the optimizer passed as optimizer= or to "
                    "rnd.attach(), or call rnd.pruner.step() after each step, which counts them."
                )
                early = ", before the penalty has its full strength" if pruner.start_norm else ""
                warnings.warn(
                    f"Round {index} closed after {pruner.steps} of steps_per_round="
                    f"{self.steps_per_round} optimizer steps{early}. {remedy}",
                    RoundWarning,
                    stacklevel=3,
                )
        finally:  # also where warnings are errors
            pruner.remove()

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs, as plain Python and tensors (copies).

        Round, step, both masks, the rewind snapshot and the settings. Weights, optimizer, RNG and
        the order of data are yours to save.
        """
        last = self._last
        return RoundsState(
            settings=self._settings(),
            next_index=self._next_index,
            finalized=self._finalized,
            snapshot=self._snapshot,
            masks=extract_mask(self._model) if last is None else {},
            round=None
            if last is None
            else RoundState(
                index=last.index,
                open=self._round is not None,
                current_mask=last.current_mask,
                refill_mask=last.refill_mask,
                budgets=last.budgets,
                pruner=last.pruner.state_dict(),
            ),
            decisions=self._history.rounds,
            reference=self._reference,
        ).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken: call it before loading model, optimizer and RNG.

        Masks and hooks are created again, so that the model's state dict fits; the next ``for``
        yields the same round with ``start_step`` set.

        Raises:
            ValueError: for the state of rounds with other settings or of another model, or a damaged
                one; the model's masks are as before then.
        """
        refs = [ref for places in named_refs(self._model).values() for ref in places]
        with damage_reported():
            saved = RoundsState.read(
                state,
                settings=self._settings(),
                weights=named_weights(self._model),
                groups=self._groups,
                check_pruner=self._check_pruner,
            )
            with AllOrNothing(refs):
                self._continue(saved)

    def _check_pruner(self, state: Mapping[str, Any]) -> None:
        optimizers = len(self._optimizers) or None
        RegularizedPruner.check_state(state, self.steps_per_round, optimizers=optimizers)

    def _continue(self, saved: RoundsState) -> None:
        if self._round is not None:
            self._round.pruner.detach()
        self._round, self._last, self._resumed = None, None, False
        if saved.round is None:
            apply_mask(self._model, saved.masks)
        else:
            self._reopen(saved.round, finalized=saved.finalized)
        self._history.load(saved.decisions)
        self._snapshot, self._reference = saved.snapshot, saved.reference
        self._next_index, self._finalized = saved.next_index, saved.finalized

    def _reopen(self, saved: RoundState, *, finalized: bool) -> None:
        chosen = Chosen(saved.current_mask, saved.refill_mask, saved.budgets)
        opened = self._open(saved.index, chosen, rewind=False)
        try:
            opened.pruner.load_state_dict(saved.pruner)
        except BaseException:
            opened.pruner.detach()
            self._round = self._last = None
            raise
        self._last = replace(opened, start_step=opened.pruner.steps)
        if saved.open:
            self._round, self._resumed = self._last, True
            return
        opened.pruner.detach()
        self._round = None
        if finalized:
            self._mask(self._final_mask(saved.current_mask, saved.refill_mask))

    def _mask(
        self, masks: Masks, how: Reconstruction | None = None, data: DataSource | None = None
    ) -> None:
        """Apply masks, freeze what they mask, let returning weights start without a memory.

        With ``how`` and ``data``, consumers of what goes are refitted: towards the reference, or the model
        as it is.
        """
        before = extract_mask(self._model) if self.reset_moments else {}
        if how is None or data is None:
            apply_mask(self._model, masks)
        else:
            kept = self._reference
            towards = self._model if kept is None else kept.applied_to(self._model)
            parts = (self._model, self._groups, masks, how, data)
            reconstruct_towards(*parts, reference=towards, replicas=self._replicas)
        reset_returned(self._optimizers, self._model, before)
        if self.freeze_masked:
            freeze_latents(masked_refs(self._model.modules()))

    def _settings(self) -> dict[str, Any]:
        """What must be equal for a state to fit: plain values, callables by their name."""
        return plain_settings(
            {
                "method": type(self).__name__,
                "rounds": self.rounds,
                "steps_per_round": self.steps_per_round,
                "amount": self.amount,
                "regroup_amount": self.regroup_amount,
                "parameters": self._ranked,
                "rewind": bool(self._snapshot.weights),
                **vars(self._plan),
                "importance": name_of(self._plan.importance),
                **self._penalty,
                **({} if self._reconstruction is None else {"reconstruct": self._reconstruction}),
                "groups": [str(layer) for layer in self._groups.layers],
            }
        )
