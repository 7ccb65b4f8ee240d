"""Why one unit stayed or went: the numbers of the decision, the penalty's work, the rounds before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch_rsst.regrouping.history import NO_PENALTY, DecidedRound, DecisionLog
from torch_rsst.regrouping.keep_units import REASONS
from torch_rsst.utils.tables import aligned


@dataclass(frozen=True)
class UnitDecision:
    """What one round decided about one unit, and what its penalty did to it.

    Attributes:
        round: the index of the round.
        stays: whether the unit was to stay.
        decided_by: ``"score"``; ``"fillback_rate"`` where the unit stays in the share that is given
            back; ``"min_keep"`` or ``"round_to"`` where that holds a unit which would go by its score, or
            where a unit gives way to one that ``min_keep`` holds in another layer; ``"dead"`` where
            it goes without an alive ranked entry.
        score: as it was compared: per ranked entry under ``scope="global"``; 0 for a dead unit.
        rank: among the units of its scope, 1 for the best; of equals the earliest comes last.
        cut: of a unit that stays by its score, the best of its scope that goes; of one that ``min_keep`` or
            ``round_to`` hold, the lowest of its scope that stays by its score; of one that goes, the
            lowest that stays, in its layer or by its score in its scope. Living units only; None where
            there is none, and for a dead unit.
        margin: score − cut; below 0 for units that go, and for those that only ``min_keep`` or
            ``round_to`` hold.
        penalized: the unit's entries that the penalty was aimed at, biases included.
        norm_before: their L2 norm when the round began.
        norm_after: the same when it ended; in an open round, when the report was made. None where
            the round was left before anything was measured.
        mode: ``"coupled"``, ``"decoupled"``, ``"auto"`` where optimizers differ in it; ``"none"`` where
            nothing of the unit was penalized.
        strength: λ, at the end of the round or when the report was made.
    """

    round: int
    stays: bool
    decided_by: str
    score: float
    rank: int
    cut: float | None
    margin: float | None
    penalized: int
    norm_before: float
    norm_after: float | None
    mode: str
    strength: float


@dataclass(frozen=True)
class Explanation:
    """Why a unit stayed or went; see :meth:`torch_rsst.SparsityReport.explain`.

    ``str(explanation)`` is a text; ``explanation.to_dict()`` holds plain Python for JSON.

    Attributes:
        layer: the layer's dotted name.
        kind: ``"heads"``, ``"neurons"``, ``"channels"``.
        unit: its number in the layer.
        gone: whether all its entries, biases included, are masked or exactly 0.
        decision: the one that made it so: of the last round; where the unit was dead by then, of
            the round that chose it to go.
        importance: the name of the score.
        scope: what it competed with: ``"layer"``, ``"size"``, ``"type"`` or ``"global"``.
        competitors: how many units the scope has, this one included.
        history: every round's decision about it.
    """

    layer: str
    kind: str
    unit: int
    gone: bool
    decision: UnitDecision
    importance: str
    scope: str
    competitors: int
    history: tuple[UnitDecision, ...]

    # The numbers of the decision, under their own names.

    @property
    def round(self) -> int:
        """The round that made the decision."""
        return self.decision.round

    @property
    def since(self) -> int:
        """The first of the rounds without a break, up to the last, that decided the same."""
        rounds = list(self.history)
        while len(rounds) > 1 and rounds[-2].stays == rounds[-1].stays:
            rounds.pop()
        return rounds[-1].round

    @property
    def stays(self) -> bool:
        """Whether the unit was to stay."""
        return self.decision.stays

    @property
    def decided_by(self) -> str:
        """What decided, see :class:`UnitDecision`."""
        return self.decision.decided_by

    @property
    def score(self) -> float:
        """Its score, as it was compared."""
        return self.decision.score

    @property
    def rank(self) -> int:
        """Its rank in its scope, 1 for the best."""
        return self.decision.rank

    @property
    def margin(self) -> float | None:
        """How far the score is from the cut."""
        return self.decision.margin

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; what is not finite becomes None, as in strict JSON."""
        return {
            **asdict(self),
            "decision": _strict(self.decision),
            "history": [_strict(each) for each in self.history],
        }

    def __str__(self) -> str:
        lines = [_headline(self), _competition(self), _penalty(self)]
        if len(self.history) > 1:
            lines += ["", *_table(self.history)]
        return "\n".join(lines)


def last_decisions(log: DecisionLog, layers: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """The last round's decision about every unit, column by column, for JSON.

    Args:
        log: of the rounds so far.
        layers: name and kind of each layer.
    """
    last = log.rounds[-1]
    return [
        {
            "layer": name,
            "kind": kind,
            "round": last.index,
            "score": [finite(score) for score in verdicts.keys.tolist()],
            "rank": log.ranks(last, position).tolist(),
            "stays": verdicts.kept.tolist(),
            "decided_by": [REASONS[reason] for reason in verdicts.reasons.tolist()],
        }
        for position, ((name, kind), verdicts) in enumerate(zip(layers, last.verdicts, strict=True))
    ]


def penalty_notes(log: DecisionLog | None) -> list[str]:
    """A line where the penalty of the last round has left less than 1 % of the norm that it began with."""
    if log is None or (last := log.rounds[-1]).below is None:
        return []
    early = ", before half of them: cut rather than shrunk" if last.too_soon else ""
    return [
        f"round {last.index}: the penalized weights fell below 1 % of their norm at step {last.below} of "
        f"the {last.asked} over which they were to shrink{early}"
    ]


def _strict(decision: UnitDecision) -> dict[str, Any]:
    return {key: finite(value) for key, value in asdict(decision).items()}


def finite(value: Any) -> Any:
    """A value, None for a number that strict JSON does not know."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def explain_unit(
    log: DecisionLog, position: int, unit: int, *, layer: str, kind: str, gone: bool
) -> Explanation:
    """What a log of decisions says of one unit.

    Args:
        log: of the rounds so far, at least one.
        position: of the unit's layer among those of the log.
        unit: its number in the layer.
        layer: the layer's name.
        kind: of its units.
        gone: whether it is gone by now.
    """
    history = tuple(_decision(log, decided, position, unit) for decided in log.rounds)
    return Explanation(
        layer=layer,
        kind=kind,
        unit=unit,
        gone=gone,
        decision=_decisive(history),
        importance=log.rules.importance,
        scope=log.rules.scope,
        competitors=log.units(position),
        history=history,
    )


def _decision(log: DecisionLog, decided: DecidedRound, position: int, unit: int) -> UnitDecision:
    verdicts = decided.verdicts[position]
    dead, stays = bool(verdicts.dead[unit]), bool(verdicts.kept[unit])
    score = 0.0 if dead else float(verdicts.keys[unit])
    cut = log.cut(decided, position, unit)
    norms = decided.norms[position] if decided.norms else None
    penalized = 0 if norms is None else int(norms.entries[unit])
    after = None if norms is None or norms.after is None else float(norms.after[unit])
    return UnitDecision(
        round=decided.index,
        stays=stays,
        decided_by=REASONS[int(verdicts.reasons[unit])],
        score=score,
        rank=int(log.ranks(decided, position)[unit]),
        cut=cut,
        margin=None if cut is None else score - cut,
        penalized=penalized,
        norm_before=0.0 if norms is None else float(norms.before[unit]),
        norm_after=after,
        mode=decided.mode if penalized else NO_PENALTY,
        strength=decided.strength if penalized else 0.0,
    )


def _decisive(history: Sequence[UnitDecision]) -> UnitDecision:
    """The last decision; of a unit that was dead by then, the one by which it went."""
    last = history[-1]
    if last.stays or last.decided_by != "dead":
        return last
    for earlier in reversed(history):
        if earlier.stays:
            break
        last = earlier
        if last.decided_by != "dead":
            break
    return last


# As text

_STAYS_BY = {
    "score": "by its score",
    "fillback_rate": "in the share that fillback_rate gives back",
    "min_keep": "held by min_keep: by its score it would go",
    "round_to": "held by round_to: by its score it would go",
}
_GOES_BY = {
    "score": "by its score",
    "min_keep": "in place of units that min_keep holds in other layers; its score would do",
    "dead": "as it was dead already, without an alive entry to score",
}
_AMONG = {
    "layer": "in its layer",
    "size": "among all {kind} of its size",
    "type": "among all {kind}",
    "global": "among all units",
}


def _headline(found: Explanation) -> str:
    name = f"{found.kind.removesuffix('s')} {found.unit} of {found.layer or 'the model'}"
    why = (_STAYS_BY if found.stays else _GOES_BY)[found.decided_by]
    last = found.history[-1].round
    before = f", like every round since {found.since}" if found.since < found.round else ""
    if found.stays:
        fate = "is gone, as nothing of it is left; yet" if found.gone else "stays:"
        return f"{name} {fate} round {found.round} kept it, {why}{before}"
    fate = "is gone" if found.gone else "is to go"
    later = f"; it was dead from then on, to round {last}" if last > found.round else ""
    return f"{name} {fate}: round {found.round} chose so, {why}{before}{later}"


def _competition(found: Explanation) -> str:
    decision = found.decision
    unit = " per entry" if found.scope == "global" else ""
    among = _AMONG[found.scope].format(kind=found.kind)
    rank = f"rank {decision.rank:,} of {found.competitors:,} {among}"
    text = f"score: {decision.score:.4g} ({found.importance}{unit}), {rank}"
    held = decision.stays and decision.decided_by in ("min_keep", "round_to")
    if decision.margin is None or decision.cut is None:
        dead, verb = decision.decided_by == "dead", "goes" if decision.stays else "stays"
        verb = "stays by its score" if held else verb
        return text if dead else f"{text}; no living unit {verb}"
    side = "above" if decision.margin >= 0 else "below"
    other = "the best that goes" if decision.stays else "the lowest that stays"
    other = "the lowest that stays by its score" if held else other
    return f"{text}, {abs(decision.margin):.4g} {side} {other} ({decision.cut:.4g})"


def _penalty(found: Explanation) -> str:
    decision = found.decision
    if not decision.penalized:
        if decision.stays or decision.decided_by == "dead":
            return "penalty: none on it"
        before = next((d for d in found.history if d.round == decision.round - 1), None)
        if before is None or not before.penalized:
            return "penalty: none, it was masked at once"
        masked = f"masked when round {decision.round} opened"
        return f"{_penalty(replace(found, decision=before))}; {masked}"
    entries = (
        f"{decision.penalized:,} penalized {'entry' if decision.penalized == 1 else 'entries'}"
    )
    how = f"{decision.mode}, strength {decision.strength:.3g}"
    if decision.norm_after is None:
        return f"penalty: {how}; {entries} of norm {decision.norm_before:.3g} at the start"
    norms = f"from norm {decision.norm_before:.3g} to {decision.norm_after:.3g}"
    return f"penalty: {how}; {entries} went {norms} in round {decision.round}"


def _table(history: Sequence[UnitDecision]) -> list[str]:
    rows = [("round", "decision", "score", "rank", "margin", "decided by", "penalized", "norm")]
    for each in history:
        after = "" if each.norm_after is None else f" → {each.norm_after:.2g}"
        rows.append(
            (
                f"{each.round}",
                "stays" if each.stays else "goes",
                f"{each.score:.4g}",
                f"{each.rank}",
                "" if each.margin is None else f"{each.margin:+.3g}",
                each.decided_by,
                f"{each.penalized}" if each.penalized else "",
                f"{each.norm_before:.2g}{after}" if each.penalized else "",
            )
        )
    shown = rows if any(each.penalized for each in history) else [row[:6] for row in rows]
    return [line.rstrip() for line in aligned(shown, left={1, 5, 7})]
