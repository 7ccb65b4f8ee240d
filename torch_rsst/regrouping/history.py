"""What rounds decided about every unit, and what their penalty did to it: small, plain, kept for good.

A few numbers per unit and round: enough to say later why a unit stayed or went, long after scores and
weights have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_rsst.groups.groups import Groups
from torch_rsst.regrouping.keep_units import REASONS, ranks
from torch_rsst.utils.errors import check_keys, check_kinds, refuse

NO_PENALTY = "none"


@dataclass(frozen=True, eq=False)
class Verdicts:
    """The decision about the units of one layer, a value each.

    Attributes:
        keys: float64, scores as they were compared; -inf for dead units.
        kept: True for units that stay.
        reasons: uint8, what decided: positions in :data:`torch_rsst.regrouping.keep_units.REASONS`.
    """

    keys: Tensor
    kept: Tensor
    reasons: Tensor

    @property
    def dead(self) -> Tensor:
        """Units without an alive ranked entry when it was decided."""
        return self.keys == -torch.inf

    @property
    def by_score(self) -> Tensor:
        """Units that stay without the help of ``min_keep`` or ``round_to``."""
        helped = [REASONS.index("min_keep"), REASONS.index("round_to")]
        return self.kept & ~torch.isin(self.reasons, torch.tensor(helped, dtype=torch.uint8))


@dataclass(frozen=True, eq=False)
class UnitNorms:
    """The penalized entries of each unit of one layer, biases included.

    Attributes:
        entries: int32, how many a unit has.
        before: float32, their L2 norm when the round began.
        after: the same when it ended; None while it is open.
    """

    entries: Tensor
    before: Tensor
    after: Tensor | None = None


@dataclass(frozen=True, eq=False)
class DecidedRound:
    """One round: its decision, then its penalty.

    Attributes:
        index: of the round.
        verdicts: per layer of the groups.
        norms: per layer of the groups; empty without a penalty.
        mode: how the penalty acts: ``"coupled"``, ``"decoupled"``, ``"auto"`` where optimizers differ
            in it, ``"none"`` where nothing is penalized.
        strength: λ, the latest known.
        below: the step at which the norm of P was first seen below 1 % of what it was when the round
            began; None where it was not.
        asked: the step by which P was to be shrunk.
    """

    index: int
    verdicts: tuple[Verdicts, ...]
    norms: tuple[UnitNorms, ...] = ()
    mode: str = NO_PENALTY
    strength: float = 0.0
    below: int | None = None
    asked: int = 0

    @property
    def too_soon(self) -> bool:
        """Whether P fell below 1 % of its norm before half of the steps that it was to take."""
        return self.below is not None and 2 * self.below < self.asked

    def state(self) -> dict[str, Any]:
        """Plain Python and tensors (copies), for a checkpoint."""
        return {
            **vars(self),
            "verdicts": [_copied(layer) for layer in self.verdicts],
            "norms": [_copied(layer) for layer in self.norms],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], groups: Groups) -> DecidedRound:
        """The round of a checkpoint.

        Raises:
            ValueError: unless it fits the groups.
        """
        check_keys(state, ("index", "mode", "strength", "verdicts", "norms"), _SUBJECT)
        check_kinds(state, {"index": int, "mode": str, "strength": float}, _SUBJECT)
        units = [layer.units for layer in groups.layers]
        decided = cls(
            index=state["index"],
            verdicts=_read(Verdicts, state["verdicts"], units),
            norms=_read(UnitNorms, state["norms"], units) if state["norms"] else (),
            mode=state["mode"],
            strength=state["strength"],
            below=state.get("below"),  # older states have neither
            asked=int(state.get("asked", 0)),
        )
        unknown = [layer.reasons[layer.reasons >= len(REASONS)] for layer in decided.verdicts]
        if any(each.numel() for each in unknown):
            expected = f"reasons from 0 to {len(REASONS) - 1}"
            got = torch.cat(unknown).tolist()[:5]
            refuse(ValueError, _SUBJECT, expected, got, _REMEDY)
        return decided


_SUBJECT = "decisions of a round"
_REMEDY = "Pass what state_dict() has returned, with groups of the same units."
_DTYPES = {
    "keys": torch.float64,
    "kept": torch.bool,
    "reasons": torch.uint8,
    "entries": torch.int32,
    "before": torch.float32,
    "after": torch.float32,
}
T = TypeVar("T", Verdicts, UnitNorms)


def _copied(record: Verdicts | UnitNorms) -> dict[str, Tensor | None]:
    return {key: None if value is None else value.clone() for key, value in vars(record).items()}


def _read(kind: type[T], states: Sequence[Mapping[str, Any]], units: list[int]) -> tuple[T, ...]:
    """The values of each layer, copied: one per unit, all there but those of a round's end."""
    names = [each.name for each in fields(kind)]
    sizes = []
    for state in states:
        check_keys(state, names, _SUBJECT)
        needed = [name for name in names if name != "after" or state[name] is not None]
        sizes.append({len(state[name]) for name in needed})
    if sizes != [{count} for count in units]:
        got = f"values for {[max(each) for each in sizes]}"
        expected = f"one value for each of {units}"
        refuse(ValueError, _SUBJECT, expected, got, _REMEDY)
    return tuple(kind(**{name: _tensor(state[name], name) for name in names}) for state in states)


def _tensor(values: Any, name: str) -> Any:
    return None if values is None else values.to("cpu", _DTYPES[name], copy=True)


@dataclass(frozen=True)
class Rules:
    """By what rounds decide.

    Attributes:
        importance: the name of the score.
        scope: what units compete with.
        competitors: for each layer of the groups, the positions of those it competes with, itself
            included.
    """

    importance: str
    scope: str
    competitors: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class DecisionLog:
    """The rounds up to some moment, as data.

    Attributes:
        rules: by what they decided.
        rounds: in order.
    """

    rules: Rules
    rounds: tuple[DecidedRound, ...]

    def ranks(self, decided: DecidedRound, layer: int) -> Tensor:
        """The rank of each unit of a layer in its scope, 1 for the best."""
        positions = self.rules.competitors[layer]
        found = ranks([decided.verdicts[i].keys for i in positions])
        return found[positions.index(layer)]

    def units(self, layer: int) -> int:
        """How many units compete with those of a layer, these included."""
        first = self.rounds[0].verdicts
        return sum(first[i].keys.numel() for i in self.rules.competitors[layer])

    def cut(self, decided: DecidedRound, layer: int, unit: int) -> float | None:
        """The score that a unit's is compared with; None where there is none, and for a dead unit.

        Of living units: for one that stays by its score, the best of its scope that goes; for one that is
        held whatever its score, the lowest of its scope that stays by it; for one that goes, the lowest
        that stays: in its layer, or by its score in its scope.
        """
        scope = [decided.verdicts[i] for i in self.rules.competitors[layer]]
        own = decided.verdicts[layer]
        if own.dead[unit]:
            return None
        passing = [verdict.keys[verdict.by_score & ~verdict.dead] for verdict in scope]
        if own.by_score[unit]:
            going = torch.cat([verdict.keys[~verdict.kept & ~verdict.dead] for verdict in scope])
            return float(going.max()) if going.numel() else None
        if not own.kept[unit]:
            passing.append(own.keys[own.kept & ~own.dead])
        lowest = torch.cat(passing)
        return float(lowest.min()) if lowest.numel() else None


class DecisionHistory:
    """The rounds so far, in order, as they are made. One for all rounds of a model."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.rounds: tuple[DecidedRound, ...] = ()

    def begin(self, decided: DecidedRound) -> None:
        """A round begins; one of the same number, and later ones, are forgotten."""
        self.rounds = (*(r for r in self.rounds if r.index < decided.index), decided)

    def update(self, index: int, change: Callable[[DecidedRound], DecidedRound]) -> None:
        """Put what has become of a round in its place; a round that is not known stays so."""
        self.rounds = tuple(change(r) if r.index == index else r for r in self.rounds)

    def up_to(
        self, index: int, change: Callable[[DecidedRound], DecidedRound]
    ) -> DecisionLog | None:
        """The rounds up to this one, itself changed; None where it was not recorded."""
        rounds = [r for r in self.rounds if r.index <= index]
        if not rounds or rounds[-1].index != index:
            return None
        return DecisionLog(self._rules, (*rounds[:-1], change(rounds[-1])))


def measure_norms(
    groups: Groups, weights: Mapping[str, Tensor], penalized: Mapping[str, Tensor]
) -> tuple[UnitNorms, ...]:
    """The penalized entries of every unit as they are now; nothing where no entry is penalized.

    Of sharded parameters over the parts of all ranks: then it is a collective call.

    Args:
        groups: whose units.
        weights: by dense name.
        penalized: the penalized set, by dense name.
    """
    per_layer = []
    for layer in groups.layers:
        entries, squares = torch.zeros(2, layer.units, dtype=torch.float64)
        for member in layer.members:
            if (p := penalized.get(member.parameter)) is None:
                continue
            count = member.count_per_unit(p, layer.units)
            if not bool(count.any()):
                continue  # the same on all ranks
            entries += count
            weight = weights[member.parameter]
            squares += member.sum_per_unit(weight, layer.units, mask=p, of=Tensor.square_)
        per_layer.append(UnitNorms(entries.to(torch.int32), squares.sqrt().float()))
    some = any(bool(layer.entries.any()) for layer in per_layer)
    return tuple(per_layer) if some else ()


def with_norms_now(decided: DecidedRound, now: Sequence[UnitNorms]) -> DecidedRound:
    """The round with norms measured since; they are the last."""
    norms = tuple(
        replace(then, after=latest.before) for then, latest in zip(decided.norms, now, strict=True)
    )
    return replace(decided, norms=norms)
