"""The saved state of rounds: written as plain data, read back and checked before anything is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from torch import Tensor

from torch_rsst.groups.groups import Groups
from torch_rsst.masking.mask_sets import Masks, check_masks
from torch_rsst.masking.rewind import Snapshot
from torch_rsst.regrouping.history import DecidedRound
from torch_rsst.regrouping.keep_units import ScopeBudget
from torch_rsst.rounds.reference import Reference
from torch_rsst.utils.errors import check_keys, message, refuse

SUBJECT = "state of rounds"


@dataclass(frozen=True, eq=False)
class RoundState:
    """A round, open or closed.

    Attributes:
        index: of the round.
        open: whether it is in training.
        current_mask: what is alive, as ranked for it.
        refill_mask: what should be alive.
        budgets: units requested and realized, per scope.
        pruner: the state of its regularizer.
    """

    index: int
    open: bool
    current_mask: Masks
    refill_mask: Masks
    budgets: tuple[ScopeBudget, ...]
    pruner: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python and tensors (copies)."""
        return {
            "index": self.index,
            "open": self.open,
            "current_mask": {k: v.clone() for k, v in self.current_mask.items()},
            "refill_mask": {k: v.clone() for k, v in self.refill_mask.items()},
            "budgets": [asdict(budget) for budget in self.budgets],
            "pruner": dict(self.pruner),
        }

    @classmethod
    def read(cls, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> RoundState:
        """What :meth:`to_dict` has made, for a model with these weights."""
        parts = ("index", "open", "current_mask", "refill_mask", "budgets", "pruner")
        check_keys(state, parts, "state of a round")
        return cls(
            index=state["index"],
            open=state["open"],
            current_mask=check_masks(weights, state["current_mask"]),
            refill_mask=check_masks(weights, state["refill_mask"]),
            budgets=tuple(ScopeBudget(**budget) for budget in state["budgets"]),
            pruner=state["pruner"],
        )


@dataclass(frozen=True, eq=False)
class RoundsState:
    """Everything that rounds need to continue.

    Attributes:
        settings: what must be equal for it to fit, from :func:`plain_settings`.
        next_index: of the round to come.
        finalized: whether the last masks were applied for good.
        snapshot: what weights are rewound to.
        masks: the model's, before the first round.
        round: the latest, None before the first.
        decisions: of the rounds so far; none in states that were written before these were kept.
        reference: the model as it was when the last round opened; None unless it is needed.
    """

    settings: Mapping[str, Any]
    next_index: int
    finalized: bool
    snapshot: Snapshot
    masks: Masks
    round: RoundState | None
    decisions: Sequence[DecidedRound]
    reference: Reference | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain Python and tensors (copies)."""
        return {
            "settings": dict(self.settings),
            "next_index": self.next_index,
            "finalized": self.finalized,
            "snapshot": self.snapshot.state(),
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
            masks=check_masks(weights, state["masks"]),
            round=None if saved is None else round_,
            decisions=[DecidedRound.from_state(d, groups) for d in state.get("decisions", ())],
            reference=Reference.from_state(state.get("reference")),
        )


def _check_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if saved == own:
        return
    differing = [key for key in own if saved.get(key) != own[key]]
    refuse(
        ValueError,
        SUBJECT,
        ", ".join(f"{key}={own[key]!r}" for key in differing),
        ", ".join(f"{key}={saved.get(key)!r}" for key in differing),
        "Build the rounds with the arguments of the saved ones.",
    )


@contextmanager
def damage_reported() -> Iterator[None]:
    """Turn what a damaged state makes fail into an error that says so."""
    try:
        yield
    except (AttributeError, IndexError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
        remedy = "The file is damaged: load another one."
        expected = "what state_dict() has returned"
        raise ValueError(message(SUBJECT, expected=expected, got=got, remedy=remedy)) from error


def plain_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings as plain values, callables by their name, for comparison after a resume."""
    return {key: _plain(value) for key, value in settings.items()}


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, str, list)):
        return value
    if is_dataclass(value):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)  # repr may hold an address
