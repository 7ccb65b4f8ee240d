"""The saved state of rounds: written as plain data, read back and checked before anything is touched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from torch_rsst.groups.groups import Groups
from torch_rsst.masking.mask_sets import Masks, as_masks, check_masks
from torch_rsst.masking.rewind import Snapshot
from torch_rsst.regrouping.history import DecidedRound
from torch_rsst.regrouping.keep_units import ScopeBudget
from torch_rsst.rounds.round import Chosen
from torch_rsst.rounds.round_start import Reference
from torch_rsst.utils.errors import check_keys, check_kinds, message, refuse

SUBJECT = "state of rounds"

FORMAT = 2
"""The version of the format. States of version 1 do not say theirs."""

# What a setting that states did not always hold meant before they did.
_BEFORE = {"kept_units": "sparse", "shrink_to": None, "shrink_by": 1.0, "rewind_optimizer": "keep"}


@dataclass(frozen=True, eq=False)
class RoundState:
    """A round, open or closed.

    Attributes:
        index: of the round.
        open: whether it is in training.
        chosen: what was ranked and regrouped for it.
        pruner: the state of its regularizer.
    """

    index: int
    open: bool
    chosen: Chosen
    pruner: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python and tensors (copies)."""
        return {
            "index": self.index,
            "open": self.open,
            **{name: as_masks(getattr(self.chosen, name)) for name in _MASKS},
            "budgets": [asdict(budget) for budget in self.chosen.budgets],
            "pruner": dict(self.pruner),
        }

    @classmethod
    def read(cls, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> RoundState:
        """What :meth:`to_dict` has made, for a model with these weights."""
        check_keys(state, ("index", "open", *_MASKS, "budgets", "pruner"), "state of a round")
        check_kinds(state, {"index": int, "open": bool}, "state of a round")
        budgets = tuple(ScopeBudget(**budget) for budget in state["budgets"])
        ranked, current, refill = (check_masks(weights, as_masks(state[name])) for name in _MASKS)
        chosen = Chosen(ranked, current, refill, budgets)
        return cls(state["index"], state["open"], chosen, state["pruner"])


_MASKS = ("ranked_mask", "current_mask", "refill_mask")


@dataclass(frozen=True, eq=False)
class RoundsState:
    """Everything that rounds need to continue.

    Attributes:
        settings: what must be equal for it to fit, from :func:`plain_settings`.
        next_index: of the round to come.
        finalized: whether the last masks were applied for good.
        snapshot: what weights are rewound to.
        optimizer_states: what optimizers are rewound to.
        optimizer_names: of the parameters of each of these, None for one of another model; none in states that were
            written before these were kept.
        masks: the model's, before the first round.
        round: the latest, None before the first.
        decisions: of the rounds so far; none in states that were written before these were kept.
        reference: the model as it was when the last round opened; None unless it is needed.
    """

    settings: Mapping[str, Any]
    next_index: int
    finalized: bool
    snapshot: Snapshot
    optimizer_states: tuple[Mapping[str, Any], ...]
    masks: Masks
    round: RoundState | None
    decisions: Sequence[DecidedRound]
    reference: Reference | None = None
    optimizer_names: tuple[tuple[str | None, ...], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python and tensors (copies)."""
        return {
            "format": FORMAT,
            "settings": dict(self.settings),
            "next_index": self.next_index,
            "finalized": self.finalized,
            "snapshot": self.snapshot.state(),
            "optimizer_states": copy.deepcopy(list(self.optimizer_states)),
            "optimizer_names": [list(names) for names in self.optimizer_names],
            "masks": self.masks,
            "round": None if self.round is None else self.round.to_dict(),
            "decisions": [decided.state() for decided in self.decisions],
            "reference": None if self.reference is None else self.reference.state(),
        }

    @classmethod
    def read(
        cls,
        state: Mapping[str, Any],
        *,
        settings: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        groups: Groups,
        check_pruner: Callable[[Mapping[str, Any]], None],
    ) -> RoundsState:
        """What :meth:`to_dict` has made, checked.

        Args:
            state: from a checkpoint.
            settings: of the rounds that will continue.
            weights: of the model, by dense name.
            groups: of the rounds.
            check_pruner: raises for the state of a regularizer that does not fit.

        Raises:
            ValueError, KeyError: where it does not fit, or is damaged.
        """
        parts = ("settings", "next_index", "finalized", "snapshot", "masks", "round")
        check_keys(state, parts, SUBJECT)
        state = _up_to_date(state)
        check_kinds(state, {"next_index": int, "finalized": bool}, SUBJECT)
        _check_settings(state["settings"], settings)
        check_keys(state["snapshot"], ("weights", "buffers"), "rewind snapshot")
        saved = state["round"]
        if saved is not None:
            round_ = RoundState.read(saved, weights)
            check_pruner(round_.pruner)
        return cls(
            settings=settings,
            next_index=state["next_index"],
            finalized=state["finalized"],
            snapshot=Snapshot.from_state(state["snapshot"]),
            optimizer_states=tuple(copy.deepcopy(list(state["optimizer_states"]))),
            optimizer_names=_optimizer_names(state),
            masks=check_masks(weights, as_masks(state["masks"])),
            round=None if saved is None else round_,
            decisions=[DecidedRound.from_state(d, groups) for d in state.get("decisions", ())],
            reference=Reference.from_state(state.get("reference")),
        )


def _optimizer_names(state: Mapping[str, Any]) -> tuple[tuple[str | None, ...], ...]:
    """The names of the parameters of optimizers' states, one for each."""
    for own in state["optimizer_states"]:
        check_keys(own, ("state", "param_groups"), f"{SUBJECT}: optimizer_states")
    names = tuple(map(tuple, state.get("optimizer_names", ())))
    sizes = [
        sum(len(group["params"]) for group in own["param_groups"])
        for own in state["optimizer_states"]
    ]
    if names and [len(own) for own in names] != sizes:
        expected, got = f"names of {sizes} parameters", f"{[len(own) for own in names]}"
        remedy = "The file is damaged: load another one."
        refuse(ValueError, f"{SUBJECT}: optimizer_names", expected, got, remedy)
    return names


def _up_to_date(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of any version that is known in the present format."""
    version = state.get("format", 1)
    if not isinstance(version, int) or not 1 <= version <= FORMAT:
        remedy = "It was written by a later torch_rsst: load it with that one."
        refuse(ValueError, SUBJECT, f"format {FORMAT} or older", version, remedy)
    settings = {**_BEFORE, **state["settings"]}
    up_to_date = {"optimizer_states": (), **state, "settings": settings}
    saved = state["round"]
    if version == 1 and isinstance(saved, Mapping) and "current_mask" in saved:
        ranked = current = saved["current_mask"]
        if settings.pop("dense_training", False):
            settings["kept_units"] = "dense"
            kept = saved["refill_mask"]
            current = {n: mask | kept[n] if n in kept else mask for n, mask in ranked.items()}
        up_to_date["round"] = {**saved, "ranked_mask": ranked, "current_mask": current}
    return up_to_date


def _check_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    # A tensor, which no setting is, compares to no truth.
    differing = [k for k in own if isinstance(saved.get(k), Tensor) or saved.get(k) != own[k]]
    if differing:
        expected = ", ".join(f"{key}={own[key]!r}" for key in differing)
        got = ", ".join(f"{key}={saved.get(key)!r}" for key in differing)
        remedy = "Build the rounds with the arguments of the saved ones."
        refuse(ValueError, SUBJECT, expected, got, remedy)


@contextmanager
def damage_reported(*more: type[Exception]) -> Iterator[None]:
    """Turn what a damaged state makes fail, ``more`` as well, into an error that says so."""
    kinds: tuple[type[Exception], ...] = (AttributeError, IndexError, TypeError, *more)
    try:
        yield
    except kinds as error:
        got = f"{type(error).__name__}: {error}"
        remedy = "The file is damaged: load another one."
        expected = "what state_dict() has returned"
        raise ValueError(message(SUBJECT, expected=expected, got=got, remedy=remedy)) from error


def plain_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings as plain values, callables by their name, for comparison after a resume."""
    return {key: _plain(value) for key, value in settings.items()}


def _plain(value: object) -> object:
    """Python's own kinds, no subclasses such as NumPy's numbers: these say nothing to ``weights_only``."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if is_dataclass(value):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)  # repr may hold an address
