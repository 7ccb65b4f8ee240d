"""What the callbacks share: open, close and finalize rounds by optimizer steps; log, save, resume."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from torch_rsst.compaction.compaction import compact
from torch_rsst.discovery.finder import find_groups
from torch_rsst.groups.groups import KINDS, Groups
from torch_rsst.integrations.batch import inputs_of, moved, run
from torch_rsst.integrations.timetable import Asked, Timetable, Training
from torch_rsst.masking.mask_sets import Masks, extract_mask
from torch_rsst.penalty.hooks import as_optimizers
from torch_rsst.regrouping.rounding import far_roundings
from torch_rsst.rounds.engine import Rounds
from torch_rsst.rounds.rsst import RSST
from torch_rsst.saving.build_check import check_build
from torch_rsst.saving.builders import Build, as_build
from torch_rsst.saving.compact_folder import check_target, save_compact
from torch_rsst.saving.info import CompactInfo, as_info
from torch_rsst.utils.errors import RoundWarning, check_choice, check_keys, listing, refuse
from torch_rsst.utils.optimizer_hooks import held_by


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What becomes of the model once the last round is done.

    Attributes:
        force: cut even where the penalty has left much of the weights that go.
        compact_to: folder for the compacted model.
        build: how its dense model is built, see :func:`torch_rsst.save_compact`.
        info: its classes, images and metrics.

    Raises:
        TypeError, ValueError, OSError, ModuleNotFoundError: where the folder cannot be saved to, or the build is
            not allowed.
    """

    force: bool = False
    compact_to: str | Path | None = None
    build: Build | None = None
    info: CompactInfo | None = None

    def __post_init__(self) -> None:
        if self.compact_to is not None:
            check_target(self.compact_to)
        if self.build is not None:
            as_build(self.build)
        as_info(self.info)


@dataclass(frozen=True, kw_only=True)
class Units:
    """Which units of the model the rounds prune.

    Attributes:
        groups: from :func:`torch_rsst.find_groups`; None finds them.
        kinds: of units to find.
        example_inputs: to find and compact them with; None takes a batch of the training data.
    """

    groups: Groups | None = None
    kinds: Sequence[str] = KINDS
    example_inputs: Any = None


class RoundsDriver:
    """Rounds driven by a trainer: begin, advance after each optimizer step, finish."""

    def __init__(
        self,
        method: Callable[..., Rounds],
        *,
        asked: Asked,
        units: Units,
        outcome: Outcome,
        arguments: Mapping[str, Any],
    ) -> None:
        _check_arguments(method, arguments)
        self._method, self._asked, self._units = method, asked, units
        self._outcome, self._arguments = outcome, dict(arguments)
        if "batches" in arguments:
            self._arguments.setdefault("forward", run)
        self._saved: Mapping[str, Any] | None = None
        self._model: nn.Module | None = None
        self._timetable: Timetable | None = None
        self._example: Any = None
        self.rounds: Rounds | None = None
        self.groups: Groups | None = None
        self.compacted: nn.Module | None = None
        self.finalized = False

    def begin(
        self,
        model: nn.Module,
        optimizers: Sequence[Any],
        training: Training,
        draw: Callable[[], Any],
        *,
        steps: int,
    ) -> None:
        """Make the rounds, or those that were saved, and open the first if it is time.

        Args:
            model: with its weights, on its device; where the training is resumed, with their masks.
            optimizers: of the training; those of other parameters are left out.
            training: its length.
            draw: returns a batch of training data, or None.
            steps: optimizer steps made so far.

        Raises:
            RuntimeError: where the model does not have the masks of the state that was loaded.
        """
        self.abandon()
        saved, self._saved, self.finalized = self._saved, None, False
        rounds = None if saved is None else saved["rounds"]
        timetable = self._asked.timetable(training, rounds)
        self._model, self._timetable = model, timetable
        if self._outcome.compact_to is not None and saved is None:
            check_build(model, self._outcome.build, stacklevel=3)
        if (example := self._units.example_inputs) is None:
            example = inputs_of(draw())
        self._example = moved(example, model)
        self.groups = self._units.groups or find_groups(
            model, self._units.kinds, example_inputs=self._example
        )
        self.rounds = self._method(
            model,
            self.groups,
            optimizer=_of_model(model, optimizers),
            steps_per_round=timetable.steps_per_round,
            rounds=timetable.rounds,
            process_group=_every_rank(),
            **self._arguments,
        )
        if saved is not None:
            self._resume(self.rounds, model, saved)
        else:
            _warn_of_rounding(self.rounds, model, self.groups)
        self.advance(steps)

    def advance(self, steps: int) -> None:
        """Open the next round, or finalize, where it is time; call it after each optimizer step.

        Args:
            steps: optimizer steps of the training so far; rounds count their own.
        """
        if self.rounds is None or self._timetable is None or self.finalized:
            return
        now = self.rounds.round
        if now is None:
            due = steps >= self._timetable.start_step
        else:
            due = now.pruner.steps >= self._timetable.steps_per_round
        if not due:
            return
        if now is not None and now.index + 1 >= self._timetable.rounds:
            self.rounds.finalize(force=self._outcome.force)
            self.finalized = True
        else:
            next(self.rounds)

    def finish(self, *, save: bool = True) -> None:
        """End the training: compact and save, or say that the rounds are not done.

        Args:
            save: False on all ranks but one.

        Warns:
            RoundWarning: where the last round was not reached, or not trained to its end.
        """
        if self.rounds is None or self._timetable is None or self._model is None:
            return
        if not self.finalized:
            now = self.rounds.round
            where = "before the first" if now is None else f"within round {now.index}"
            warnings.warn(
                f"The training ended {where} of {self._timetable.rounds} rounds: nothing was finalized"
                f"{' or compacted' if self._outcome.compact_to else ''}. Resume from its last checkpoint.",
                RoundWarning,
                stacklevel=3,
            )
            self.abandon()
        elif save and self._outcome.compact_to is not None and self.groups is not None:
            self.compacted = self._compact(self._model, self.groups, self._outcome.compact_to)

    def abandon(self) -> None:
        """Take the hooks of an open round off model and optimizers; the masks stay."""
        if self.rounds is not None and self.rounds.round is not None:
            self.rounds.round.pruner.detach()

    def metrics(self) -> dict[str, float]:
        """What trainers log; empty before :meth:`begin`."""
        if self.rounds is None:
            return {}
        report, now = self.rounds.report(), self.rounds.round
        values = {"round": math.nan if now is None else float(now.index)}
        if isinstance(self.rounds, RSST):
            acting = now is not None and now.pruner.attached
            values["strength"] = now.pruner.strength if now is not None and acting else 0.0
            values["penalized_norm_ratio"] = report.penalized_norm_ratio
        values |= {f"{kind}_gone": report.unit_sparsity(kind) for kind in report.kinds}
        values["sparsity"] = report.element_sparsity
        name = type(self.rounds).__name__.lower()
        return {f"{name}/{key}": value for key, value in values.items() if value == value}

    def state_dict(self) -> dict[str, Any]:
        """Plain Python and tensors for the trainer's checkpoint; empty before :meth:`begin`."""
        if self.rounds is None:
            return {}
        return {"rounds": self.rounds.rounds, "state": self.rounds.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a state for :meth:`begin`, with ``"weights"`` that the trainer does not load by itself.

        Raises:
            ValueError: for anything else than a state.
        """
        check_keys(state, ("rounds", "state"), "state of the callback")
        self._saved = state

    def _resume(self, rounds: Rounds, model: nn.Module, saved: Mapping[str, Any]) -> None:
        rest = saved.get("weights", {})
        loaded = {**extract_mask(model), **extract_mask(rest)}
        rounds.load_state_dict(saved["state"])
        if not _equal(loaded, extract_mask(model)):
            self.abandon()
            expected = "the masks of its rounds to be loaded together with the weights"
            remedy = (
                "Pass the callback when the trainer is made, and the checkpoint to the trainer."
            )
            refuse(RuntimeError, "resumed model", expected, "other masks, or none", remedy)
        if unknown := model.load_state_dict(rest, strict=False).unexpected_keys:
            remedy = "Resume with the model of the checkpoint."
            got = f"none named {listing(unknown)}"
            refuse(RuntimeError, "resumed model", "every weight that was saved", got, remedy)
        self.finalized = bool(saved["state"]["finalized"])
        if rounds.round is not None and not self.finalized:
            next(rounds)  # the round that was open

    def _compact(self, model: nn.Module, groups: Groups, folder: str | Path) -> nn.Module:
        small = compact(model, groups, example_inputs=self._example, keep_masks=False)
        save_compact(
            small,
            folder,
            masked=model,
            groups=groups,
            example_inputs=self._example,
            build=self._outcome.build,
            info=self._outcome.info,
            keep_masks=False,
        )
        return small


def _check_arguments(method: Callable[..., Rounds], arguments: Mapping[str, Any]) -> None:
    ours = {"model", "groups", "optimizer", "steps_per_round", "rounds", "process_group"}
    known = [name for name in inspect.signature(method).parameters if name not in ours]
    for name in arguments:
        check_choice("argument", name, known, TypeError)


def _warn_of_rounding(rounds: Rounds, model: nn.Module, groups: Groups) -> None:
    """Warn where whole units make another share than was asked for; trainings are long."""
    amount = rounds.regrouping.regroup_amount
    if isinstance(amount, float):
        for rounding in far_roundings(model, groups, amount, rounds.regrouping):
            text = rounding.text(amount="regroup_amount", scope='scope="type"')
            warnings.warn(text, RoundWarning, stacklevel=3)


def _every_rank() -> dist.ProcessGroup | None:
    """The ranks of the training: trainers hand out the model unwrapped."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _of_model(model: nn.Module, optimizers: Sequence[Any]) -> list[Optimizer]:
    """The optimizers that update parameters of a model."""
    own = {id(parameter) for parameter in model.parameters()}
    return [
        optimizer
        for optimizer in as_optimizers(optimizers)
        if any(id(p) in own for p in held_by(optimizer))
    ]


def _equal(one: Masks, other: Masks) -> bool:
    return one.keys() == other.keys() and all(bool((one[n] == other[n]).all()) for n in one)
