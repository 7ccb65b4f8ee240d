"""The sparsity report: counts of what is really there, as data. Never prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst.distributed.dtensor import total
from torch_rsst.groups.groups import KINDS, Group, GroupLayer, Groups, as_groups, check_groups
from torch_rsst.masking.mask_sets import (
    Masks,
    alive_in,
    check_masks,
    extract_mask,
    named_weights,
    penalty_mask,
)
from torch_rsst.regrouping.history import DecisionLog
from torch_rsst.regrouping.keep_units import ScopeBudget
from torch_rsst.report.explanation import (
    Explanation,
    explain_unit,
    last_decisions,
    penalty_notes,
)
from torch_rsst.utils.errors import refuse, unknown_choice
from torch_rsst.utils.tables import aligned


@dataclass(frozen=True)
class LayerReport:
    """One layer of units.

    Attributes:
        name: the layer's dotted name.
        kind: ``"heads"``, ``"neurons"``, ``"channels"``.
        units: how many there are.
        gone: units whose every entry, biases included, is masked or exactly 0.
        gone_units: which these are.
        alive_share: per unit, the share of ranked entries that are not masked and not 0.
        elements: ranked entries of all units.
        zeros: how many of them are masked or exactly 0.
        penalized: entries in P, biases included.
        penalized_norm: the L2 norm of the weights in P.
        kept_norm: the L2 norm of the weights that are alive and meant to stay.
        dropped: units absent from the refill mask; None without one.
    """

    name: str
    kind: str
    units: int
    gone: int
    gone_units: tuple[int, ...]
    alive_share: tuple[float, ...]
    elements: int
    zeros: int
    penalized: int
    penalized_norm: float
    kept_norm: float
    dropped: int | None

    @property
    def element_sparsity(self) -> float:
        """The share of ranked entries that are masked or exactly 0."""
        return self.zeros / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """What is gone, what is meant to go, per layer and in total.

    ``str(report)`` is a table; ``report.to_dict()`` holds plain Python for JSON.

    Attributes:
        layers: per layer of units.
        elements: ranked entries of the model, each counted once.
        zeros: how many of them are masked or exactly 0.
        penalized: entries in P.
        penalized_norm: the L2 norm of the weights in P.
        kept_norm: the L2 norm of the weights alive and meant to stay.
        budgets: units requested and realized, per scope; empty where no round chose them.
        decisions: what rounds decided about each unit; None where none did. :meth:`explain` reads it.
    """

    layers: tuple[LayerReport, ...]
    elements: int
    zeros: int
    penalized: int
    penalized_norm: float
    kept_norm: float
    budgets: tuple[ScopeBudget, ...]
    decisions: DecisionLog | None = field(default=None, repr=False, compare=False)

    @property
    def element_sparsity(self) -> float:
        """The share of ranked entries that are masked or exactly 0."""
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def penalized_norm_ratio(self) -> float:
        """‖w‖ on P relative to ‖w‖ on what is kept; NaN where nothing is kept."""
        return self.penalized_norm / self.kept_norm if self.kept_norm else math.nan

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units, in order of appearance."""
        return tuple(dict.fromkeys(layer.kind for layer in self.layers))

    def units(self, kind: str) -> int:
        """How many units of a kind there are.

        Raises:
            ValueError: for a kind that neither this library nor the model knows.
        """
        return sum(layer.units for layer in self._of_kind(kind))

    def gone(self, kind: str) -> int:
        """How many units of a kind are gone; raises as :meth:`units` does."""
        return sum(layer.gone for layer in self._of_kind(kind))

    def _of_kind(self, kind: str) -> list[LayerReport]:
        known = tuple(dict.fromkeys((*KINDS, *(layer.kind for layer in self.layers))))
        if kind not in known:
            raise ValueError(unknown_choice("kind", kind, known))
        return [layer for layer in self.layers if layer.kind == kind]

    def unit_sparsity(self, kind: str) -> float:
        """The share of units of a kind that are gone; 0 where there are none."""
        return self.gone(kind) / self.units(kind) if self.units(kind) else 0.0

    def explain(self, layer: str, unit: int, *, kind: str | None = None) -> Explanation:
        """Why a unit stayed or went: its score, rank and margin, and what the penalty did to it.

        Example:
            >>> up, down = torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 1)
            >>> with torch.no_grad():
            ...     _ = up.weight.copy_(torch.tensor([[3.0], [1.0]]))
            ...     _ = down.weight.copy_(torch.tensor([[1.0, 1.0]]))
            >>> mlp = torch.nn.Sequential(up, torch.nn.GELU(), down)
            >>> rsst = torch_rsst.RSST(
            ...     mlp, torch_rsst.find_groups(mlp), rounds=1, steps_per_round=1, amount=0.0
            ... )
            >>> report = next(rsst).report()
            >>> print(report.explain("", 1))
            neuron 1 of the model is to go: round 0 chose so, by its score
            score: 2 (magnitude), rank 2 of 2 in its layer, 2 below the lowest that stays (4)
            penalty: coupled, strength 0.5; 2 penalized entries went from norm 1.41 to 1.41 in round 0
            >>> report.explain("", 0).margin
            2.0

        Only reports of rounds can: ``rsst.report()`` and ``rnd.report()``.

        Args:
            layer: the dotted name of a layer in the report, "" for the model itself.
            unit: the number of one of its units.
            kind: ``"heads"``, ``"neurons"`` or ``"channels"``, where the layer has several.

        Raises:
            ValueError: for an unknown layer or kind, or where a kind must be given.
            TypeError, IndexError: for a unit that the layer does not have.
            RuntimeError: where no round has made a decision.
        """
        position = self._position(layer, kind)
        found = self.layers[position]
        _check_unit(unit, found)
        if self.decisions is None:
            expected, got = "a report of rounds that have chosen units", "one without decisions"
            remedy = (
                "Ask rsst.report() or rnd.report(), once a round has ranked and regrouped: "
                "sparsity_report(model, groups) sees what is gone, not why."
            )
            refuse(RuntimeError, "explain", expected, got, remedy)
        gone = unit in found.gone_units
        return explain_unit(
            self.decisions, position, int(unit), layer=found.name, kind=found.kind, gone=gone
        )

    def _position(self, name: str, kind: str | None) -> int:
        """Where in the report the layer is."""
        named = {layer.kind: i for i, layer in enumerate(self.layers) if layer.name == name}
        if not named:
            names = dict.fromkeys(layer.name for layer in self.layers)
            raise ValueError(unknown_choice("layer", name, names))
        if kind is None and len(named) > 1:
            kinds = " or ".join(map(repr, named))
            remedy = f"Pass kind={next(iter(named))!r}, or the other."
            got = f"{name!r}, which has both" if len(named) == 2 else f"{name!r}, which has all"
            refuse(ValueError, "explain", f"kind={kinds}", got, remedy)
        if kind is not None and kind not in named:
            raise ValueError(unknown_choice(f"kind of units in {name!r}", kind, named))
        return next(iter(named.values())) if kind is None else named[kind]

    def to_dict(self, *, decisions: bool = False) -> dict[str, Any]:
        """Plain dicts, lists and numbers; what is not finite becomes None, as in strict JSON.

        Args:
            decisions: also the last round's decision about every unit, under ``"decisions"``: scores
                as they were compared (None for dead units), ranks, who stays, what decided.
        """
        data = asdict(replace(self, decisions=None))
        del data["decisions"]
        if decisions:
            names = [(layer.name, layer.kind) for layer in self.layers]
            data["decisions"] = self.decisions and last_decisions(self.decisions, names)
        return {
            "element_sparsity": self.element_sparsity,
            "penalized_norm_ratio": _finite(self.penalized_norm_ratio),
            "kinds": {
                kind: {
                    "units": self.units(kind),
                    "gone": self.gone(kind),
                    "sparsity": self.unit_sparsity(kind),
                }
                for kind in self.kinds
            },
            **data,
            "penalized_norm": _finite(self.penalized_norm),
            "kept_norm": _finite(self.kept_norm),
            "layers": [
                {
                    **asdict(layer),
                    "alive_share": list(layer.alive_share),
                    "gone_units": list(layer.gone_units),
                    "penalized_norm": _finite(layer.penalized_norm),
                    "kept_norm": _finite(layer.kept_norm),
                }
                for layer in self.layers
            ],
            "budgets": [asdict(budget) for budget in self.budgets],
        }

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return _table(self)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check_unit(unit: object, layer: LayerReport) -> None:
    expected = f"0 to {layer.units - 1}, for the {layer.units} {layer.kind} of {layer.name!r}"
    remedy = "Units are numbered within their layer."
    if isinstance(unit, bool) or not isinstance(unit, Integral):
        refuse(TypeError, "unit", expected, f"{type(unit).__name__} {unit!r}", remedy)
    if not 0 <= int(unit) < layer.units:
        refuse(IndexError, "unit", expected, unit, remedy)


def sparsity_report(
    model: nn.Module,
    groups: Groups | Iterable[Group] | Iterable[GroupLayer],
    *,
    refill_mask: Mapping[str, Tensor] | None = None,
    budgets: Sequence[ScopeBudget] = (),
    decisions: DecisionLog | None = None,
) -> SparsityReport:
    """Count what is gone in a model, layer by layer.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> groups = torch_rsst.find_groups(mlp)
        >>> torch_rsst.apply_mask(mlp, torch_rsst.regroup(mlp, groups, amount=0.25))
        >>> report = torch_rsst.sparsity_report(mlp, groups)
        >>> report.gone("neurons"), report.element_sparsity
        (2, 0.25)

    Every number is counted on the weights as they act: an entry is zero where it is masked or
    exactly 0, whether or not a mask is still attached.

    Args:
        model: dense or pruned; not changed.
        groups: from :func:`find_groups`.
        refill_mask: what is meant to stay; the penalized set P is what is alive outside it.
        budgets: from a round, for units requested and realized.
        decisions: from rounds, for :meth:`SparsityReport.explain`; ``rsst.report()`` passes them.

    Raises:
        KeyError, ValueError: for groups or masks of another model.
    """
    groups = as_groups(groups)
    weights = named_weights(model)
    check_groups(weights, groups)
    refill = None if refill_mask is None else check_masks(weights, refill_mask)
    entries = _Entries(weights, extract_mask(model), refill)
    ranked = dict.fromkeys(m.parameter for layer in groups.layers for m in layer.ranked)
    members = dict.fromkeys(m.parameter for layer in groups.layers for m in layer.members)
    everything = dict.fromkeys([*members, *(refill or {})])
    return SparsityReport(
        layers=tuple(_layer_report(layer, entries) for layer in groups.layers),
        elements=sum(weights[name].numel() for name in ranked),
        zeros=sum(weights[name].numel() - int(total(entries.nonzero(name))) for name in ranked),
        penalized=sum(int(total(entries.penalized(name))) for name in everything),
        penalized_norm=entries.norm(everything, penalized=True),
        kept_norm=entries.norm(everything, penalized=False),
        budgets=tuple(budgets),
        decisions=decisions,
    )


class _Entries:
    """Facts about every entry of a parameter, by dense name."""

    def __init__(self, weights: Mapping[str, Tensor], current: Masks, refill: Masks | None) -> None:
        self.weights, self.current, self.refill = weights, current, refill
        self.penalty = {} if refill is None else penalty_mask(current, refill)

    def nonzero(self, name: str) -> Tensor:
        return (self.weights[name] != 0) & alive_in(self.weights, self.current, name)

    def penalized(self, name: str) -> Tensor:
        found = self.penalty.get(name)
        return torch.zeros_like(self.weights[name], dtype=torch.bool) if found is None else found

    def norm(self, names: Iterable[str], *, penalized: bool) -> float:
        squares = 0.0
        for name in names:
            p = self.penalized(name)
            where = p if penalized else alive_in(self.weights, self.current, name) & ~p
            squares += float(total(self.weights[name].double().masked_fill(~where, 0.0).square()))
        return math.sqrt(squares)


def _layer_report(layer: GroupLayer, entries: _Entries) -> LayerReport:
    size = torch.zeros(layer.units, dtype=torch.float64)
    ranked, every, stays = size.clone(), size.clone(), size.clone()
    for member in layer.members:
        name = member.parameter
        nonzero = entries.nonzero(name)
        count = member.sum_per_unit(nonzero, layer.units)
        every += count
        if member.ranked:
            ranked += count
            size += member.sum_per_unit(torch.ones_like(nonzero), layer.units)
        if entries.refill is not None:
            refill = alive_in(entries.weights, entries.refill, name)
            stays += member.sum_per_unit(refill, layer.units)
    names = [member.parameter for member in layer.members]
    return LayerReport(
        name=layer.name,
        kind=layer.kind,
        units=layer.units,
        gone=int((every == 0).sum()),
        gone_units=tuple((every == 0).nonzero().flatten().tolist()),
        alive_share=tuple((ranked / size.clamp(min=1)).tolist()),
        elements=int(size.sum()),
        zeros=int((size - ranked).sum()),
        penalized=sum(int(total(entries.penalized(name))) for name in names),
        penalized_norm=entries.norm(names, penalized=True),
        kept_norm=entries.norm(names, penalized=False),
        dropped=None if entries.refill is None else int((stays == 0).sum()),
    )


def _table(report: SparsityReport) -> str:
    header = (
        "layer",
        "kind",
        "units",
        "gone",
        "elements",
        "sparsity",
        "penalized",
        "|P|/|kept|",
        "to go",
    )
    rows = [
        (
            layer.name or "(model)",
            layer.kind,
            f"{layer.units}",
            f"{layer.gone}",
            f"{layer.elements}",
            f"{layer.element_sparsity:.1%}",
            f"{layer.penalized}",
            _ratio(layer.penalized_norm, layer.kept_norm),
            "" if layer.dropped is None else f"{layer.dropped}",
        )
        for layer in report.layers
    ]
    totals = (
        "total",
        "",
        f"{sum(layer.units for layer in report.layers)}",
        f"{sum(layer.gone for layer in report.layers)}",
        f"{report.elements}",
        f"{report.element_sparsity:.1%}",
        f"{report.penalized}",
        _ratio(report.penalized_norm, report.kept_norm),
        ""
        if any(r.dropped is None for r in report.layers)
        else f"{sum(r.dropped or 0 for r in report.layers)}",
    )
    lines = aligned([header, *rows, totals], left={0, 1})
    rule = "─" * len(lines[0])
    text = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    text += [
        f"{kind}: {report.gone(kind)} of {report.units(kind)} gone ({report.unit_sparsity(kind):.1%})"
        for kind in report.kinds
    ]
    text += [str(budget) for budget in report.budgets if budget.requested != budget.realized]
    text += penalty_notes(report.decisions)
    return "\n".join(text)


def _ratio(penalized: float, kept: float) -> str:
    return f"{penalized / kept:.2e}" if kept else "-"
