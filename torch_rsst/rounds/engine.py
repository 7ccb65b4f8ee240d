"""What RSST and Refill share: rank → regroup → yield. The iterator is the state.

It owns no optimizer, device or data.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
import torch.distributed as dist
from torch import nn

from torch_rsst.distributed.replicas import agreed, check_process_group, replica_group
from torch_rsst.groups.groups import Group, GroupLayer, Groups, as_groups, check_groups
from torch_rsst.importance.batches import Batches, DataSource
from torch_rsst.importance.combinations import choose_importance, data_parts
from torch_rsst.importance.measuring import check_source, measured
from torch_rsst.importance.registry import name_of
from torch_rsst.importance.weights import remain
from torch_rsst.masking.dense_scope import check_masks_in_place
from torch_rsst.masking.freezing import freeze_latents
from torch_rsst.masking.mask_sets import Masks, apply_mask, extract_mask
from torch_rsst.masking.names import all_places, named_weights, unwrap
from torch_rsst.masking.optimizer_state import reset_returned
from torch_rsst.masking.parameter_ref import masked_refs
from torch_rsst.masking.rewind import Snapshot
from torch_rsst.masking.rollback import AllOrNothing
from torch_rsst.penalty.hooks import Optimizers, as_optimizers
from torch_rsst.penalty.penalty_arguments import Penalty
from torch_rsst.penalty.regularizer import RegularizedPruner
from torch_rsst.reconstruction.reconstruction import (
    Method,
    Reconstruction,
    check_reconstruction,
    reconstruct_towards,
)
from torch_rsst.regrouping.history import DecisionHistory
from torch_rsst.regrouping.ranking import rank, ranked_names
from torch_rsst.regrouping.regrouping import Decision, RegroupPlan, decide, refill_from
from torch_rsst.report.sparsity import SparsityReport, sparsity_report
from torch_rsst.rounds.averages import averages_in
from torch_rsst.rounds.optimizer_rewind import OptimizerRewind, restore_callback
from torch_rsst.rounds.round import (
    Chosen,
    Round,
    check_cut_is_free,
    record_decision,
    warn_of_end,
)
from torch_rsst.rounds.round_arguments import Course, Ranking, Regrouping
from torch_rsst.rounds.round_start import Reference
from torch_rsst.rounds.state import RoundsState, RoundState, damage_reported, plain_settings
from torch_rsst.utils.errors import RoundWarning, refuse

__all__ = ["Chosen", "Round", "Rounds"]

_Refit: TypeAlias = Callable[[nn.Module, Masks, nn.Module], None]
_FREE = 0.05  # of its norm: what may be left of P where it is cut without force=True


class Rounds(ABC):
    """What RSST and Refill share: rank → regroup → yield; explicit, resumable state."""

    _refits_on_opening: ClassVar[bool] = False
    """Whether ``reconstruct=`` refits consumers when a round opens, not at the end."""
    _gives_back: ClassVar[bool] = False
    """Whether a ranking may choose from what an earlier one has pruned."""

    def __init__(
        self,
        model: nn.Module,
        groups: Groups | Iterable[Group] | Iterable[GroupLayer],
        *,
        optimizer: Optimizers | None,
        course: Course,
        ranking: Ranking,
        regrouping: Regrouping,
        penalty: Penalty,
        data: DataSource,
        follow: Iterable[nn.Module] = (),
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if course.reset_moments and optimizer is None:
            remedy = "Pass the optimizer to Refill, or reset_moments=False."
            refuse(ValueError, "reset_moments", "an optimizer", "none", remedy)
        penalty.schedule_of(course.steps_per_round)  # for what it refuses
        check_process_group(process_group)
        self._model, self._groups = unwrap(model), as_groups(groups)
        self._check_masks_in_place()
        weights = named_weights(model)
        check_groups(weights, self._groups)
        reconstructs = course.reconstruct is not None
        importance = choose_importance(
            regrouping.importance,
            data=data.batches is not None,
            reconstruct=reconstructs,
            rounds=True,
        )
        regrouping = replace(regrouping, importance=importance).choose_scope(self._groups)
        if reconstructs:
            check_reconstruction(self._model, data, again="in each round")
        if not reconstructs or any(data_parts(importance)):
            check_source(importance, data, course.rounds)
        self._ranked = ranked_names(model, self._groups, ranking.parameters)
        times = 1 if self._gives_back else course.rounds
        ranking.check({n: weights[n] for n in self._ranked}, extract_mask(model), times)
        regrouping.check(self._groups, weights)
        self._followers = averages_in(model, follow)
        self._snapshot = Snapshot.of(model, course.rewind)
        self._optimizer = optimizer
        self._optimizers = [] if optimizer is None else as_optimizers(optimizer)
        asked = "keep" if course.rewind is None else course.rewind_optimizer
        self._optimizer_rewind = OptimizerRewind.of(asked, self._model, self._optimizers)
        self._replicas = replica_group(model) if process_group is None else process_group
        self.course, self.ranking, self.regrouping = course, ranking, regrouping
        self.penalty, self.data = penalty, data
        self._history = DecisionHistory(regrouping.rules(self._groups, weights))
        self._next_index = -1 if course.train_first else 0
        self._round: Round | None = None  # the one in training
        self._last: Round | None = None  # the latest, open or closed
        self._reference: Reference | None = None  # what consumers are refitted towards at the end
        self._resumed = False
        self._finalized = False

    @property
    def rounds(self) -> int:
        """How many rankings and trainings."""
        return self.course.rounds

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps of a round."""
        return self.course.steps_per_round

    # What the methods differ in

    @abstractmethod
    def _trained_with(self, chosen: Chosen) -> Masks:
        """The mask of a round's training; what it keeps and the refill mask does not is penalized."""

    def _alive(self, ranked: Masks) -> Masks:
        """What is alive once a ranking is made."""
        return ranked

    def _without_gone(self, alive: Masks, refill: Masks, decision: Decision) -> Masks:
        """What is left alive once units are chosen."""
        return alive

    def _mask_to_rank(self) -> Masks:
        """The entries that the next ranking chooses from."""
        return extract_mask(self._model)

    # The iterator

    def __iter__(self) -> Iterator[Round]:
        return self

    def __next__(self) -> Round:
        self._check_masks_in_place()
        if self._resumed and self._round is not None:
            self._resumed = False
            return self._round
        self._close()
        if self._next_index >= self.course.rounds or self._finalized:
            raise StopIteration
        index = self._next_index
        chosen = self._choose(index)
        if index >= 0:
            self._warn_of_unranked(index, chosen)
        opened = self._open(index, chosen, new=index >= 0)
        self._next_index = index + 1
        return opened

    @property
    def round(self) -> Round | None:
        """The latest round, open or closed; None before the first."""
        return self._last

    def finalize(
        self,
        *,
        reconstruct: Method | None = None,
        batches: Batches | None = None,
        force: bool = False,
    ) -> None:
        """Close the open round and mask for good what the last refill mask does not keep; ranks nothing.

        Masks stay masks: :func:`torch_rsst.remove_all` makes them permanent. Refill has masked all of it when
        the round opened.

        Args:
            reconstruct: refit the layers that consume what is masked now, as :func:`torch_rsst.reconstruct`
                does; by default what the rounds were given. Rounds with ``reconstruct=`` refit towards the
                model as it was when the last round opened; others keep no copy of it, and refit towards the
                model as it is before the cut.
            batches: to reconstruct on; by default those of the rounds.
            force: cut even where the penalty has left much of the weights that go.

        Raises:
            ValueError, TypeError: for batches that are missing or do not fit; nothing is masked then, and the round is
                still open, as after whatever else is raised, warnings that are errors included.
            RuntimeError: before the first round; without ``force`` or ``reconstruct``, where the L2 norm of the weights in P is
                above 5 % of what it was when the round opened, or above 2 · ``shrink_to`` if that is more.
                Nothing has been changed then, and the round is still open.
        """
        if self._last is None:
            remedy = "Train at least one: for rnd in rsst: …"
            refuse(RuntimeError, "finalize", "a round", "none yet", remedy)
        self._check_masks_in_place()
        data = self.data if batches is None else replace(self.data, batches=batches)
        refit = self._refit(self.course.reconstruct if reconstruct is None else reconstruct, data)
        if refit is not None:
            check_reconstruction(self._model, data)
        elif batches is not None:
            remedy = "Leave them out, or pass reconstruct='least_squares'."
            refuse(ValueError, "batches", "none where nothing is reconstructed", "some", remedy)
        if not (force or refit or self._finalized):
            check_cut_is_free(self._last, self.free_share)
        take_back = self._as_now()
        try:
            self._close()
            self._apply(self._final_mask(self._last.chosen), refit)
        except BaseException:
            take_back()
            raise
        self._finalized, self._reference = True, None

    @property
    def free_share(self) -> float:
        """What P may have left of its norm where it is cut, max(0.05, 2 · ``shrink_to``)."""
        return max(_FREE, 2.0 * (self.penalty.shrink_to or 0.0))

    def _refit(self, method: Method | None, data: DataSource) -> _Refit | None:
        """What masks a module and refits the consumers of what goes, towards another; None without a method."""
        if method is None:
            return None
        how, replicas = Reconstruction(method), self._replicas
        return lambda module, masks, towards: reconstruct_towards(
            module, self._groups, masks, how, data, reference=towards, replicas=replicas
        )

    def _final_mask(self, chosen: Chosen) -> Masks:
        return intersection(self._trained_with(chosen), chosen.refill_mask)

    def report(self) -> SparsityReport:
        """The sparsity of the model as it is now."""
        if self._last is None:
            return sparsity_report(self._model, self._groups)
        return self._last.report()

    def _check_masks_in_place(self) -> None:
        check_masks_in_place(type(self).__name__, self._model.modules())

    # A round's life

    def _choose(self, index: int) -> Chosen:
        """Rank and regroup; reads the model only."""
        if index < 0:
            alive = self._mask_to_rank()
            return Chosen(alive, alive, alive)
        ranked = agreed(self._replicas, self._rank, dict.items)
        alive = self._alive(ranked)
        # Not within what ranks agree on: there they talk when all are done, here as well.
        plan = self._measured(alive)
        return agreed(
            self._replicas, lambda: self._decide(index, ranked, alive, plan), Chosen.masks
        )

    def _rank(self) -> Masks:
        weights = named_weights(self._model)
        check_groups(weights, self._groups)  # layers may have been replaced since the last round
        alive = self._mask_to_rank()
        return rank(weights, alive, self._groups, self._ranked, self.ranking.amount)

    def _measured(self, alive: Masks) -> RegroupPlan:
        """The plan of a round, with scores in place of what needs data."""
        plan = self.regrouping
        if not any(data_parts(plan.importance)):
            return plan
        parts = (plan.importance, self.data, alive, self._replicas)
        return replace(plan, importance=measured(self._model, self._groups, *parts))

    def _decide(self, index: int, ranked: Masks, alive: Masks, plan: RegroupPlan) -> Chosen:
        weights, amount = named_weights(self._model), self.regrouping.amount_of(index)
        decision = decide(weights, self._groups, ranked, amount, plan, alive)
        refill = refill_from(decision, weights, self._groups, alive, amount, plan)
        current = self._without_gone(alive, refill, decision)
        return Chosen(ranked, current, refill, decision.budgets, decision.verdicts())

    def _warn_of_unranked(self, index: int, chosen: Chosen) -> None:
        """Warn of layers that a ranking has left no weight, where some units go and others stay all the same."""
        weights, found = named_weights(self._model), []
        before, final = extract_mask(self._model), self._final_mask(chosen)
        for layer, verdicts in zip(self._groups.layers, chosen.verdicts, strict=True):
            if not bool((remain(layer, weights, chosen.ranked_mask) > 0).any()):
                living, stays = (remain(layer, weights, masks) > 0 for masks in (before, final))
                alike = torch.isin(verdicts.keys, verdicts.keys[living & stays])
                if bool((living & ~verdicts.kept & alike).any()):
                    found.append(str(layer))
        if found:
            warnings.warn(
                f"Round {index}: the ranking leaves layers no weight, so that their units score alike and the first "
                f"of them go: {'; '.join(found[:5])}. Lower amount, or pass an importance that needs batches.",
                RoundWarning,
                stacklevel=3,
            )

    def _open(self, index: int, chosen: Chosen, *, new: bool) -> Round:
        """Open a round, a new one or one that is resumed: all of it, or nothing is changed."""
        trained = self._trained_with(chosen)
        memory = self._optimizer_rewind if index >= 0 else OptimizerRewind("keep")
        if new and self._snapshot.weights:
            for module in (self._model, *self._followers):
                self._snapshot.check(module)
            memory.check(self._model, self._optimizers)
        with AllOrNothing(all_places(self._model, *self._followers)) as undo:
            undo += self._weights_back() if new else ()
            # The regularizer comes first: whatever can fail does so before the model is touched.
            pruner = RegularizedPruner(
                self._model,
                chosen.refill_mask,
                current_mask=trained,
                total_steps=self.course.steps_per_round,
                optimizer=self._optimizer,
                **vars(self.penalty),
            )
            try:
                parts = (self._model, self._groups, trained, self._history, memory)
                opened = Round(index, 0, chosen, pruner, *parts)
                self._begin(opened, new=new)
            except BaseException:
                pruner.detach()
                raise
        self._round = self._last = opened
        return opened

    def _begin(self, opened: Round, *, new: bool) -> None:
        """Mask, refit and rewind what a round begins with."""
        pruner, trained = opened.pruner, opened._trained
        refits = new and self._refits_on_opening
        refit = self._refit(self.course.reconstruct, self.data)
        self._apply(trained, refit if refits else None)
        if new and refit is not None and not refits:
            self._reference = Reference.of(self._model)
        pruner.follow(self._followers)
        if new and self._snapshot.weights:
            for module in (self._model, *self._followers):
                self._snapshot.restore(module)
            opened._optimizer_rewind.apply(self._model, self._optimizers)
            pruner.reset()
        if opened.chosen.verdicts:
            record_decision(opened)

    def _weights_back(self) -> Iterator[Callable[[], object]]:
        """What undoes a rewind or a refit, which change values in place: called with the masks of then."""
        if self._snapshot.weights or (self._refits_on_opening and self.course.reconstruct):
            for module in (self._model, *self._followers):
                yield partial(Snapshot.of(module, "init").restore, module)
            yield from map(restore_callback, self._optimizers)

    def _close(self) -> None:
        closing = self._round
        if closing is None:
            return
        # Where it cannot be noted, the round stays open with its penalty.
        self._history.update(closing.index, closing._penalty_now)
        self._round = None
        try:
            warn_of_end(closing)
        finally:  # also where warnings are errors
            closing.pruner.remove()

    # State

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles of an open round would have neither its hooks nor its optimizer."""
        if self._round is not None:
            name, got = type(self).__name__, "a copy or a pickle of an open round"
            remedy = "Save its state_dict(), or close the round first."
            refuse(TypeError, name, "rounds that are closed", got, remedy)
        return super().__reduce_ex__(protocol)

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs, as plain Python and tensors (copies).

        Round, step, masks, what rewinding puts back, the settings and the version of this format. Weights,
        optimizer, RNG and the order of data are yours to save.
        """
        self._check_masks_in_place()
        last = self._last
        return RoundsState(
            settings=self._settings(),
            next_index=self._next_index,
            finalized=self._finalized,
            snapshot=self._snapshot,
            optimizer_states=self._optimizer_rewind.states,
            optimizer_names=self._optimizer_rewind.names,
            masks=extract_mask(self._model) if last is None else {},
            round=None
            if last is None
            else RoundState(
                index=last.index,
                open=self._round is not None,
                chosen=last.chosen,
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
        self._check_masks_in_place()
        # What reads a state does nothing else: a RuntimeError there is of tensors where numbers belong.
        with damage_reported(RuntimeError):
            saved = RoundsState.read(
                state,
                settings=self._settings(),
                weights=named_weights(self._model),
                groups=self._groups,
                check_pruner=self._check_pruner,
            )
            saved.snapshot.check(self._model)
        refs = all_places(self._model, *self._followers)
        with damage_reported(), AllOrNothing(refs) as undo:
            undo.append(self._as_now())
            self._continue(saved)

    def _as_now(self) -> Callable[[], None]:
        """What makes the rounds be as they are now, an open one with its penalty."""
        before, decided = dict(vars(self)), self._history.rounds

        def take_back() -> None:
            vars(self).update(before)
            self._history.rounds = decided
            if self._round is None:
                return
            pruner = self._round.pruner
            if RegularizedPruner.attached_to(self._model) is not pruner:
                pruner.reattach()

        return take_back

    def _check_pruner(self, state: Mapping[str, Any]) -> None:
        optimizers = len(self._optimizers) or None
        RegularizedPruner.check_state(state, self.course.steps_per_round, optimizers=optimizers)

    def _continue(self, saved: RoundsState) -> None:
        if self._round is not None:
            self._round.pruner.detach()
        self._round, self._last, self._resumed = None, None, False
        self._snapshot, self._reference = saved.snapshot, saved.reference
        memory = replace(
            self._optimizer_rewind, states=saved.optimizer_states, names=saved.optimizer_names
        )
        # States that were written before these names were kept are of the optimizers as they are.
        self._optimizer_rewind = memory.named(self._model, self._optimizers)
        if saved.round is None:
            self._mask_all(saved.masks)
        else:
            self._reopen(saved.round, finalized=saved.finalized)
        self._history.rounds = tuple(saved.decisions)
        self._next_index, self._finalized = saved.next_index, saved.finalized

    def _reopen(self, saved: RoundState, *, finalized: bool) -> None:
        opened = self._open(saved.index, replace(saved.chosen, verdicts=()), new=False)
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
            self._apply(self._final_mask(saved.chosen))

    def _apply(self, masks: Masks, refit: _Refit | None = None) -> None:
        """Apply masks, freeze what they mask, let returning weights start without a memory.

        With ``refit``, consumers of what goes are refitted: towards the reference, or the model as it is.
        """
        before = extract_mask(self._model) if self.course.reset_moments else {}
        self._mask_all(masks, refit)
        reset_returned(self._optimizers, self._model, before)
        if self.course.freeze_masked:
            freeze_latents(masked_refs(self._model.modules()))

    def _mask_all(self, masks: Masks, refit: _Refit | None = None) -> None:
        """The followers first, which are put back where the model's turn fails."""
        with AllOrNothing(all_places(*self._followers)) as undo:
            for module in (*self._followers, self._model):
                if refit is None:
                    apply_mask(module, masks)
                elif module is self._model:
                    kept = self._reference
                    refit(module, masks, module if kept is None else kept.applied_to(module))
                else:
                    undo.append(partial(Snapshot.of(module, "init").restore, module))
                    refit(module, masks, module)

    def _settings(self) -> dict[str, Any]:
        """What must be equal for a state to fit: plain values, callables by their name."""
        return plain_settings(
            {
                "method": type(self).__name__,
                "rounds": self.course.rounds,
                "steps_per_round": self.course.steps_per_round,
                "amount": self.ranking.amount,
                "parameters": self._ranked,
                "rewind": bool(self._snapshot.weights),
                "rewind_optimizer": self._optimizer_rewind.choice,
                **vars(self.regrouping),
                "importance": name_of(self.regrouping.importance),
                "reconstruct": self.course.reconstruct,
                "groups": [str(layer) for layer in self._groups.layers],
            }
        )


def intersection(a: Masks, b: Masks) -> Masks:
    """A key in one of them only: wholly alive in the other."""
    both = {name: a[name] & b[name] for name in a.keys() & b.keys()}
    return {**a, **b, **both}
