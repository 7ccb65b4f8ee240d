"""Plan: a budget in parameters, multiply-adds or time → the amount that regroup needs. A dry run."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from numbers import Real
from typing import Any, NoReturn

from torch import nn

from torch_rsst.compaction.compaction import check_compactable, padded
from torch_rsst.compaction.cost import (
    count_parameters,
    guess_inputs,
    measure_cost,
    shapes_of,
    time_in_turns,
)
from torch_rsst.discovery.cutting import cut_out
from torch_rsst.groups.dead_units import dead_units
from torch_rsst.groups.groups import Group, GroupLayer, Groups, as_groups
from torch_rsst.groups.surgery import Removal
from torch_rsst.importance.registry import name_of
from torch_rsst.importance.weights import Importance
from torch_rsst.masking.mask_sets import extract_mask
from torch_rsst.masking.masked_parameter import restore
from torch_rsst.masking.names import named_weights, unwrap
from torch_rsst.masking.parameter_ref import masked_refs
from torch_rsst.regrouping.regrouping import RegroupPlan, Scope, choose, score_layers
from torch_rsst.utils.amounts import check_count
from torch_rsst.utils.errors import check_choice, refuse
from torch_rsst.utils.module_state import deep_copy

BUDGETS = {"macs": "multiply-adds", "params": "parameters", "latency": "latency"}
"""Name of a budget → what it limits."""
_ALSO_CALLED = {"macs": ("flops", "gflops", "mult_adds"), "latency": ("time", "speed", "seconds")}
_STEPS = {"macs": 10_000, "params": 10_000, "latency": 100}  # how finely amounts are searched
_MIN_REPEATS = 3

Counts = tuple[int, int | None]
"""Parameters, and multiply-adds where there is an example to run on."""


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of units, as it is and as it will be.

    Attributes:
        name: of the module that owns the units, "" for the model itself.
        kind: of its units.
        before: how many there are.
        after: how many stay.
        fixed: why none can be cut; "" where they can.
    """

    name: str
    kind: str
    before: int
    after: int
    fixed: str = ""

    def __str__(self) -> str:
        counts = f"{self.name or 'the model'}: {self.before} {self.kind}"
        return f"{counts}, all stay: {self.fixed}" if self.fixed else f"{counts}, {self.after} stay"


@dataclass(frozen=True)
class Plan:
    """What becomes of a model under a budget; see :func:`torch_rsst.plan`.

    Attributes:
        budget: the name of what was limited, and to which fraction of the dense model.
        amount: what :func:`torch_rsst.regroup` needs: the smallest that meets the budget.
        importance: how units are scored, as :func:`torch_rsst.plan` got it, like the next three.
        scope: what units compete with.
        min_keep: units per layer that stay in any case.
        round_to: what the units of each layer are raised to a multiple of.
        layers: what becomes of each layer of units.
        parameters: before and after.
        multiply_adds: of one run on the example, before and after; None where none was at hand.
        latency: seconds of one run on the example, before and after; None unless it was the budget.
    """

    budget: tuple[str, float]
    amount: float
    importance: str | Importance
    scope: Scope
    min_keep: int
    round_to: int | None
    layers: tuple[PlannedLayer, ...]
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int] | None = None
    latency: tuple[float, float] | None = None

    @property
    def amounts(self) -> dict[str, float]:
        """Kind of units → amount, the same for all."""
        return {layer.kind: self.amount for layer in self.layers}

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments with which :func:`torch_rsst.regroup` carries the plan out."""
        names = ("amount", "importance", "scope", "min_keep", "round_to")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, fit for JSON; a callable importance by its name."""
        name = getattr(self.importance, "__qualname__", None) or name_of(self.importance)
        return {
            "budget": dict([self.budget]),
            **self.arguments,
            "importance": name,
            "layers": [asdict(layer) for layer in self.layers],
            **{
                what: pair and {"before": pair[0], "after": pair[1]}
                for what, pair in self._costs().items()
            },
        }

    def __str__(self) -> str:
        what, limit = self.budget
        width = max((len(layer.name or "the model") for layer in self.layers), default=0)
        lines = [f"{BUDGETS[what]} ≤ {limit:.1%} of the dense model: amount={self.amount:g}"]
        for each in self.layers:
            reason = f"  stays whole: {each.fixed}" if each.fixed else ""
            counts = f"{each.kind:<8}  {each.before:>6} → {each.after:>6}{reason}"
            lines.append(f"{each.name or 'the model':<{width}}  {counts}")
        for label, pair in self._costs().items():
            if pair is not None:
                shown = [f"{1e3 * v:,.2f} ms" if label == "latency" else f"{v:,}" for v in pair]
                share = pair[1] / pair[0] if pair[0] else 1.0
                lines.append(f"{label.replace('_', '-')}: {shown[0]} → {shown[1]} ({share:.1%})")
        return "\n".join(lines)

    def _costs(self) -> dict[str, tuple[float, float] | None]:
        names = ("parameters", "multiply_adds", "latency")
        return {name: getattr(self, name) for name in names}


def plan(
    model: nn.Module,
    groups: Groups | Iterable[Group] | Iterable[GroupLayer],
    *,
    budget: Mapping[str, float],
    importance: str | Importance = "magnitude",
    example_inputs: Any = None,
    scope: Scope = "layer",
    min_keep: int = 1,
    round_to: int | None = None,
    repeats: int = 10,
) -> Plan:
    """Find the amount that meets a budget, and what the model becomes; nothing is changed.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> groups = torch_rsst.find_groups(mlp)
        >>> planned = torch_rsst.plan(mlp, groups, budget={"params": 0.5})
        >>> print(planned)
        parameters ≤ 50.0% of the dense model: amount=0.5626
        the model  neurons        8 →      3
        parameters: 76 → 31 (40.8%)
        >>> torch_rsst.apply_mask(mlp, torch_rsst.regroup(mlp, groups, **planned.arguments))
        >>> sum(p.numel() for p in torch_rsst.compact(mlp, groups).parameters())
        31

    One amount for all layers is searched by halving: a multiple of 0.0001, or of 0.01 where time is
    measured. Copies without values are cut and counted; only time needs copies that run.

    Args:
        model: gives the weights, masked or not; not changed.
        groups: from :func:`find_groups` for this very model.
        budget: one of ``{"macs": 0.5}`` (multiply-adds), ``{"params": 0.5}`` and
            ``{"latency": 0.5}`` (measured here and now): a fraction of the dense model.
        importance: as for :func:`regroup`; one that needs data as :func:`measure_importance` returns it.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for the model;
            None: one sample, guessed from what the model says of itself.
        scope: as for :func:`regroup`.
        min_keep: units per layer that stay whatever the budget.
        round_to: leave the units of each layer a multiple of this.
        repeats: timed runs of each model, where time is measured.

    Returns:
        the plan. ``regroup(model, groups, **plan.arguments)``, ``apply_mask`` and ``compact`` carry
        it out.

    Raises:
        KeyError, TypeError, ValueError: for an unknown budget, a fraction out of range, groups of
            another model; where no example is at hand, or the budget cannot be met.
    """
    what, limit = _check_budget(budget)
    check_count(repeats, "repeats", at_least=_MIN_REPEATS)
    bare, groups = unwrap(model), as_groups(groups)
    rules = RegroupPlan(importance, scope, min_keep=min_keep, round_to=round_to)
    rules = rules.choose_scope(groups)
    check_compactable(bare, groups)
    inputs = guess_inputs(bare) if example_inputs is None else example_inputs
    if inputs is None and what != "params":
        remedy = "Pass example_inputs: a tensor, a tuple or a dict of arguments for the model."
        got = "none, and no guess that the model runs on"
        refuse(ValueError, "plan", "an example to run on", got, remedy)
    trials = _Trials(bare, groups, rules, inputs, repeats)
    measure = cache(lambda amount: trials.measure(what, trials.removals(amount)))

    def share(step: int) -> float:
        before, after = measure(step / steps)
        return after / before if before else 0.0

    steps = _STEPS[what]
    if share(steps) > limit:
        _refuse_out_of_reach(what, limit, share(steps), min_keep)
    amount = bisect_left(range(steps), True, key=lambda step: share(step) <= limit) / steps
    removals = trials.removals(amount)
    (parameters, adds), (parameters_left, adds_left) = trials.whole, trials.count(removals)
    return Plan(
        budget=(what, limit),
        amount=amount,
        importance=importance,
        scope=scope,
        min_keep=min_keep,
        round_to=round_to,
        layers=tuple(
            PlannedLayer(
                r.layer.name, r.layer.kind, r.layer.units, r.layer.units - r.count, r.layer.fixed
            )
            for r in removals
        ),
        parameters=(parameters, parameters_left),
        multiply_adds=None if adds is None or adds_left is None else (adds, adds_left),
        latency=measure(amount) if what == "latency" else None,
    )


def _check_budget(budget: object) -> tuple[str, float]:
    listed = " or ".join(f"{{{name!r}: 0.5}}" for name in BUDGETS)
    remedy = "The number is a fraction of the dense model."
    if not isinstance(budget, Mapping):
        refuse(TypeError, "budget", f"a dict, {listed}", f"{budget!r}", remedy)
    if len(budget) != 1:
        if budget:
            remedy = "Plan for each of them; the largest amount of the plans meets them all."
        refuse(TypeError, "budget", f"one limit, {listed}", repr(budget), remedy)
    ((what, limit),) = budget.items()
    for known, words in _ALSO_CALLED.items():
        if what in words:
            listed = ", ".join(map(repr, BUDGETS))
            refuse(ValueError, "budget", f"one of {listed}", repr(what), f"Did you mean {known!r}?")
    check_choice("budget", what, BUDGETS)
    subject = f"budget[{what!r}]"
    if isinstance(limit, bool) or not isinstance(limit, Real):
        refuse(TypeError, subject, "a number above 0, up to 1", repr(limit), remedy)
    if not 0.0 < float(limit) <= 1.0:
        refuse(ValueError, subject, "a fraction above 0, up to 1", repr(limit), remedy)
    return str(what), float(limit)


def _refuse_out_of_reach(what: str, limit: float, least: float, min_keep: int) -> NoReturn:
    left = f"with {min_keep} unit(s) left in each layer" if min_keep else "without any unit"
    expected = f"at least {least:.4f}, the share of the {BUDGETS[what]} {left}"
    remedy = f"Raise it, {'lower min_keep, ' if min_keep else ''}or find more groups."
    refuse(ValueError, f"budget[{what!r}]", expected, limit, remedy)


class _Trials:
    """What a model costs without some of its units, found out on copies."""

    def __init__(
        self, model: nn.Module, groups: Groups, rules: RegroupPlan, inputs: Any, repeats: int
    ) -> None:
        self._model, self._groups, self._rules = model, groups, rules
        self._inputs, self._repeats = inputs, repeats
        weights = named_weights(model)
        # Scored once: an amount only says how many go.
        self._scored = score_layers(weights, groups, extract_mask(model), rules)
        # Compaction takes units whose weights are all 0, whatever the mask.
        self._silent = [dead_units(layer, weights, {}).silent for layer in groups.layers]
        # Shapes do, and cost no memory, unless a family reads values.
        self._sources = [shapes_of(model), model]

    def removals(self, amount: float) -> list[Removal]:
        """What :func:`torch_rsst.compact` cuts once :func:`torch_rsst.regroup` masked by an amount."""
        kept = choose(self._groups, self._scored, amount, self._rules).kept
        return [
            Removal(layer, padded(~stays | silent, silent, layer))
            for layer, stays, silent in zip(self._groups.layers, kept, self._silent, strict=True)
        ]

    def measure(self, what: str, removals: Sequence[Removal]) -> tuple[float, float]:
        """What a budget limits, of the dense model and of the one without these units."""
        if what == "latency":
            models = [self._dense, _cut(self._dense, removals)]
            runs = time_in_turns(models, self._inputs, repeats=self._repeats)
            before, after = map(statistics.median, runs)
            return before, after
        if what == "params":
            return count_parameters(self._model), self.count(removals, run=False)[0]
        return self.whole[1] or 0, self.count(removals)[1] or 0

    def count(self, removals: Sequence[Removal], *, run: bool = True) -> Counts:
        """Parameters, and multiply-adds where there is an example to ``run`` on, without these units."""
        try:
            small = _cut(self._sources[0], removals)
            if not run or self._inputs is None:
                return count_parameters(small), None
            cost = measure_cost(small, self._inputs)
            return cost.parameters, cost.multiply_adds
        except Exception:
            if len(self._sources) == 1:
                raise
            del self._sources[0]
            return self.count(removals, run=run)

    @cached_property
    def whole(self) -> Counts:
        """As :meth:`count`, of the whole model."""
        return self.count([])

    @cached_property
    def _dense(self) -> nn.Module:
        dense = deep_copy(self._model)
        restore(masked_refs(dense.modules()))  # a dense model applies no masks
        return dense


def _cut(model: nn.Module, removals: Sequence[Removal]) -> nn.Module:
    small, _ = cut_out(deep_copy(model), removals)
    return small


__all__ = ["BUDGETS", "Plan", "PlannedLayer", "plan"]
