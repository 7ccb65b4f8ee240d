"""The sparsity report: counts of what is really there, as data. Never prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst.groups.groups import KINDS, Group, GroupLayer, Groups, as_groups, check_groups
from torch_rsst.masking.mask_sets import ModelMasks, check_masks, mask_of
from torch_rsst.masking.names import named_weights
from torch_rsst.regrouping.history import DecisionLog
from torch_rsst.regrouping.keep_units import ScopeBudget
from torch_rsst.report.entry_counts import EntryCounts, count_entries, summed
from torch_rsst.report.explanation import (
    Explanation,
    explain_unit,
    finite,
    last_decisions,
    penalty_notes,
)
from torch_rsst.utils.errors import check_choice, refuse
from torch_rsst.utils.tables import aligned


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What is counted of every part of a model."""

    elements: int
    zeros: int
    penalized: int
    penalized_norm: float
    kept_norm: float

    @property
    def element_sparsity(self) -> float:
        """The share of the counted entries that are masked or exactly 0."""
        return self.zeros / self.elements if self.elements else 0.0


@dataclass(frozen=True, kw_only=True)
class LayerReport(Counts):
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
    dropped: int | None


@dataclass(frozen=True, kw_only=True)
class ParameterReport(Counts):
    """One masked parameter.

    Attributes:
        name: its dense name.
        in_units: whether units have a part in it, so that the report of their layer counts it too.
        elements: its entries.
        masked: how many of them are masked.
        zeros: how many are masked or exactly 0.
        penalized: entries in P.
        penalized_norm: the L2 norm of the weights in P.
        kept_norm: the L2 norm of the weights that are alive and meant to stay.
    """

    name: str
    in_units: bool
    masked: int


@dataclass(frozen=True, kw_only=True)
class SparsityReport(Counts):
    """What is gone, what is meant to go, per layer and in total.

    ``str(report)`` is a table; ``report.to_dict()`` holds plain Python for JSON.

    Attributes:
        layers: per layer of units.
        parameters: every masked parameter.
        elements: entries that are counted, each once: ranked ones, and those of masked parameters in
            which no unit has a part.
        zeros: how many of them are masked or exactly 0.
        penalized: entries in P.
        penalized_norm: the L2 norm of the weights in P.
        kept_norm: the L2 norm of the weights alive and meant to stay.
        budgets: units requested and realized, per scope; empty where no round chose them.
        decisions: what rounds decided about each unit; None where none did. :meth:`explain` reads it.
    """

    layers: tuple[LayerReport, ...]
    parameters: tuple[ParameterReport, ...]
    budgets: tuple[ScopeBudget, ...]
    decisions: DecisionLog | None = field(default=None, repr=False, compare=False)

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
        check_choice("kind", kind, known)
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
            penalty: decoupled, strength 0.99; 2 penalized entries went from norm 1.41 to 1.41 in round 0
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
        check_choice("layer", name, dict.fromkeys(layer.name for layer in self.layers))
        if kind is not None:
            check_choice(f"kind of units in {name!r}", kind, named)
            return named[kind]
        if len(named) > 1:
            kinds = " or ".join(map(repr, named))
            remedy = f"Pass kind={next(iter(named))!r}, or the other."
            got = f"{name!r}, which has both" if len(named) == 2 else f"{name!r}, which has all"
            refuse(ValueError, "explain", f"kind={kinds}", got, remedy)
        return next(iter(named.values()))

    def to_dict(self, *, decisions: bool = False) -> dict[str, Any]:
        """Plain dicts, lists and numbers; what is not finite becomes None, as in strict JSON.

        Args:
            decisions: also the last round's decision about every unit, under ``"decisions"``: scores
                as they were compared (None for dead units), ranks, who stays, what decided.
        """
        data = asdict(replace(self, decisions=None))
        del data["decisions"]
        data |= {key: list(data[key]) for key in ("layers", "parameters", "budgets")}
        if decisions:
            names = [(layer.name, layer.kind) for layer in self.layers]
            data["decisions"] = self.decisions and last_decisions(self.decisions, names)
        for part in (data, *data["layers"], *data["parameters"]):
            for norm in ("penalized_norm", "kept_norm"):
                part[norm] = finite(part[norm])
        for layer in data["layers"]:
            layer["alive_share"] = list(layer["alive_share"])
            layer["gone_units"] = list(layer["gone_units"])
        return {
            "element_sparsity": self.element_sparsity,
            "penalized_norm_ratio": finite(self.penalized_norm_ratio),
            "kinds": {
                kind: {
                    "units": self.units(kind),
                    "gone": self.gone(kind),
                    "sparsity": self.unit_sparsity(kind),
                }
                for kind in self.kinds
            },
            **data,
        }

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return _table(self)


def _check_unit(unit: object, layer: LayerReport) -> None:
    expected = f"0 to {layer.units - 1}, for the {layer.units} {layer.kind} of {layer.name!r}"
    remedy = "Units are numbered within their layer."
    if isinstance(unit, bool) or not isinstance(unit, Integral):
        refuse(TypeError, "unit", expected, f"{type(unit).__name__} {unit!r}", remedy)
    if not 0 <= int(unit) < layer.units:
        refuse(IndexError, "unit", expected, unit, remedy)


def sparsity_report(
    model: nn.Module,
    groups: Groups | Iterable[Group] | Iterable[GroupLayer] | None = None,
    *,
    refill_mask: Mapping[str, Tensor] | None = None,
    budgets: Sequence[ScopeBudget] = (),
    decisions: DecisionLog | None = None,
) -> SparsityReport:
    """Count what is gone in a model: layer by layer of units, and in every masked parameter.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> groups = torch_rsst.find_groups(mlp)
        >>> torch_rsst.apply_mask(mlp, torch_rsst.regroup(mlp, groups, amount=0.25))
        >>> report = torch_rsst.sparsity_report(mlp, groups)
        >>> report.gone("neurons"), report.element_sparsity
        (2, 0.25)

    Every number is counted on the weights as they act: an entry is zero where it is masked or
    exactly 0, whether or not a mask is still attached. A parameter in which no unit has a part is
    listed where it is masked, and left out where it is not.

    Args:
        model: dense or pruned; not changed.
        groups: from :func:`find_groups`; None for a model without units.
        refill_mask: what is meant to stay; the penalized set P is what is alive outside it.
        budgets: from a round, for units requested and realized.
        decisions: from rounds, for :meth:`SparsityReport.explain`; ``rsst.report()`` passes them.

    Raises:
        KeyError, ValueError: for groups or masks of another model.
    """
    layers = as_groups(() if groups is None else groups).layers
    weights, current = named_weights(model), ModelMasks(model)
    check_groups(weights, Groups(layers))
    refill = None if refill_mask is None else check_masks(weights, refill_mask)
    dims: dict[str, set[tuple[int, ...]]] = {}
    for member in (member for layer in layers for member in layer.members):
        dims.setdefault(member.parameter, set()).add(member.dims)
    counts = {
        name: count_entries(
            weights[name],
            mask_of(weights, current, name),
            (refill or {}).get(name),
            dims.get(name, ()),
        )
        for name in dict.fromkeys([*dims, *(refill or {}), *current])
    }
    counted = {member.parameter for layer in layers for member in layer.ranked}
    counted |= {name for name in current if name not in dims}
    everything, sizes = summed(counts.values()), summed(counts[name] for name in counted)
    return SparsityReport(
        **{**everything, "elements": sizes["elements"], "zeros": sizes["zeros"]},
        layers=tuple(
            _layer_report(layer, weights, counts, with_refill=refill is not None)
            for layer in layers
        ),
        parameters=tuple(
            ParameterReport(
                **summed([counts[name]]),
                name=name,
                in_units=name in dims,
                masked=counts[name].masked,
            )
            for name in current
        ),
        budgets=tuple(budgets),
        decisions=decisions,
    )


def _layer_report(
    layer: GroupLayer,
    weights: Mapping[str, Tensor],
    counts: Mapping[str, EntryCounts],
    *,
    with_refill: bool,
) -> LayerReport:
    size, ranked, every, stays = torch.zeros(4, layer.units, dtype=torch.float64)
    for member in layer.members:
        weight, found = weights[member.parameter], counts[member.parameter]
        of_unit = member.size_per_unit(weight, layer.units)
        nonzero = member.per_unit(found.nonzero_along[member.dims], layer.units, weight)
        every += nonzero
        if member.ranked:
            ranked += nonzero
            size += of_unit
        staying = found.staying_along.get(member.dims)
        stays += of_unit if staying is None else member.per_unit(staying, layer.units, weight)
    together = summed(counts[member.parameter] for member in layer.members)
    gone = every == 0
    return LayerReport(
        **{**together, "elements": int(size.sum()), "zeros": int((size - ranked).sum())},
        name=layer.name,
        kind=layer.kind,
        units=layer.units,
        gone=int(gone.sum()),
        gone_units=tuple(gone.nonzero().flatten().tolist()),
        alive_share=tuple((ranked / size.clamp(min=1)).tolist()),
        dropped=int((stays == 0).sum()) if with_refill else None,
    )


_HEADER = (
    *("layer", "kind", "units", "gone", "elements", "sparsity", "penalized", "|P|/|kept|", "to go"),
)


def _table(report: SparsityReport) -> str:
    layers, dropped = report.layers, [layer.dropped for layer in report.layers]
    to_go = "" if None in dropped or not layers else sum(n or 0 for n in dropped)
    units, gone = sum(layer.units for layer in layers), sum(layer.gone for layer in layers)
    rows = [
        _row(each, each.name or "(model)", each.kind, each.units, each.gone, to_go=each.dropped)
        for each in layers
    ]
    rows += [_row(each, each.name, "weights") for each in report.parameters if not each.in_units]
    lines = aligned(
        [_HEADER, *rows, _row(report, "total", "", units, gone, to_go=to_go)], left={0, 1}
    )
    rule = "─" * len(lines[0])
    text = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    text += [
        f"{kind}: {report.gone(kind)} of {report.units(kind)} gone ({report.unit_sparsity(kind):.1%})"
        for kind in report.kinds
    ]
    text += [str(budget) for budget in report.budgets if budget.requested != budget.realized]
    text += penalty_notes(report.decisions)
    return "\n".join(text)


def _row(
    counts: Counts, name: str, kind: str, *units_and_gone: object, to_go: object = None
) -> tuple[str, ...]:
    units, gone = units_and_gone or ("", "")
    ratio = f"{counts.penalized_norm / counts.kept_norm:.2e}" if counts.kept_norm else "-"
    share = f"{counts.element_sparsity:.1%}"
    cells = (name, kind, units, gone, counts.elements, share, counts.penalized, ratio)
    return tuple(map(str, (*cells, "" if to_go is None else to_go)))
