"""Regroup: groups + scores + budget → refill mask. Pure: the model is read, never changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_, or_
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from torch_rsst.distributed.dtensor import total
from torch_rsst.distributed.replicas import replica_group
from torch_rsst.groups.groups import Group, GroupLayer, Groups, Member, as_groups, check_groups
from torch_rsst.importance.batches import Batches, DataSource, Forward, LossFn
from torch_rsst.importance.combinations import choose_importance
from torch_rsst.importance.measuring import measured
from torch_rsst.importance.registry import name_of, resolve_importance
from torch_rsst.importance.weights import Importance, remain, score_units
from torch_rsst.masking.mask_sets import Masks, ModelMasks, alive_in, check_masks
from torch_rsst.masking.names import named_weights, unwrap
from torch_rsst.regrouping.history import Rules, Verdicts
from torch_rsst.regrouping.keep_units import ScopeBudget, ScoredLayer, Selection, keep_units
from torch_rsst.selection.topk import lowest
from torch_rsst.utils.amounts import Amount, check_amount, check_count, check_fraction, to_count
from torch_rsst.utils.errors import check_choice, refuse

Scope: TypeAlias = Literal["auto", "layer", "size", "type", "global"]
Ungrouped: TypeAlias = Literal["keep", "element"]
SCOPES = ("auto", "layer", "size", "type", "global")
UNGROUPED = ("keep", "element")
_Plan = TypeVar("_Plan", bound="RegroupPlan")


@dataclass(frozen=True, eq=False)
class Decision:
    """Which units stay.

    Attributes:
        kept: per layer of the groups, a bool tensor, True for units kept.
        budgets: per scope.
        selections: per scope, with the positions of its layers and the units of each of their ranks: what
            it came from.
    """

    kept: tuple[Tensor, ...]
    budgets: tuple[ScopeBudget, ...]
    selections: tuple[tuple[tuple[int, ...], tuple[Tensor, ...], Selection], ...]

    def verdicts(self) -> tuple[Verdicts, ...]:
        """Per layer of the groups: scores as they were compared, and what decided."""
        found = {
            position: Verdicts(*(_of_units(each, order) for each in columns))
            for positions, orders, chosen in self.selections
            for position, order, *columns in zip(
                positions, orders, chosen.keys, chosen.kept, chosen.reasons(), strict=True
            )
        }
        return tuple(found[position] for position in range(len(self.kept)))


@dataclass(frozen=True)
class RegroupPlan:
    """The checked arguments of :func:`torch_rsst.regroup`, for use over many rounds."""

    importance: str | Importance = "magnitude"
    scope: Scope = "layer"
    fillback_rate: float = 0.0
    min_keep: int = 1
    round_to: int | None = None
    ungrouped: Ungrouped = "keep"

    def __post_init__(self) -> None:
        resolve_importance(self.importance)
        check_choice("scope", self.scope, SCOPES)
        check_choice("ungrouped", self.ungrouped, UNGROUPED)
        own = vars(self)
        own["fillback_rate"] = check_fraction(self.fillback_rate, "fillback_rate")
        own["min_keep"] = check_count(self.min_keep, "min_keep", at_least=0)
        if self.round_to is not None:
            own["round_to"] = check_count(self.round_to, "round_to", at_least=1)

    def choose_scope(self: _Plan, groups: Groups) -> _Plan:
        """The plan with the scope that ``"auto"`` stands for."""
        if self.scope != "auto":
            return self
        across = getattr(resolve_importance(self.importance), "across_layers", False)
        # Layers of channels add to no stream that all share: what is much in one is little in another.
        alike = all(layer.kind != "channels" for layer in groups.layers)
        return replace(self, scope="size" if across and alike else "layer")

    def rules(self, groups: Groups, weights: Mapping[str, Tensor]) -> Rules:
        """The plan as a record of decisions about these groups names it."""
        competitors = {
            each: tuple(positions)
            for positions in scopes_of(groups, self.scope, sizes_of(groups, weights)).values()
            for each in positions
        }
        every = tuple(competitors[position] for position in range(len(groups.layers)))
        return Rules(name_of(self.importance), self.scope, every)


def regroup(
    model: nn.Module,
    groups: Groups | Iterable[Group] | Iterable[GroupLayer],
    *,
    amount: Amount | None = 0.5,
    importance: str | Importance = "magnitude",
    scope: Scope = "layer",
    current_mask: Mapping[str, Tensor] | None = None,
    fillback_rate: float = 0.0,
    min_keep: int = 1,
    round_to: int | None = None,
    ungrouped: Ungrouped = "keep",
    batches: Batches | None = None,
    forward: Forward | None = None,
    loss_fn: LossFn | None = None,
) -> Masks:
    """Regroup a mask to whole units: what *should* be alive.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> refill_mask = torch_rsst.regroup(mlp, torch_rsst.find_groups(mlp), amount=0.25)
        >>> refill_mask["0.weight"].all(dim=1).sum()
        tensor(6)

    Every unit is scored on the entries that are alive in ``current_mask`` (a dead unit scores 0
    and goes first) and the best are kept. The refill mask is 1 on entries all of whose units are
    kept, also where they are masked now, and 0 on entries of a unit that goes.

    Args:
        model: gives the weights (``weight_orig`` where masked); not changed.
        groups: from :func:`find_groups`, or a selection of its items.
        amount: the fraction of *all* units of a scope, dead ones included, that are absent from the
            refill mask; an int counts units per scope, of experts in each. None takes the budget from the density:
            ``round(d + fillback_rate · (n − d))`` units stay, d = Σ alive ranked entries / size.
        importance: a name from ``torch_rsst.importance.IMPORTANCES``, such as ``"magnitude"`` or, with
            ``batches``, ``"variance"``; ``"auto"``, which is ``"variance"`` with ``batches`` and
            ``"magnitude"`` without; or a callable, see :mod:`torch_rsst.importance`.
        scope: what units compete with: those of their ``"layer"``, of their ``"type"`` and ``"size"`` (layers whose
            units have as many weights), of their ``"type"``, or all (``"global"``; scores are then compared per
            ranked entry). ``"auto"`` is ``"size"`` with ``importance="obs"`` and without channels, else ``"layer"``.
        current_mask: what is alive now; the model's own masks by default.
        fillback_rate: the share of what would go that is given back.
        min_keep: units per layer that stay whatever the budget.
        round_to: raise the kept units of each layer to a multiple of this.
        ungrouped: entries in no group ``"keep"`` their current mask, or ``"element"``: each
            such parameter of ``current_mask`` loses ``amount`` of its alive entries, the smallest.
        batches: for an importance that needs data: what ``model(batch)`` takes, an iterable or a
            function that returns one. See :func:`measure_importance`, also for how the model is run.
        forward: ``(model, batch) → output``, for batches that ``model(batch)`` does not take.
        loss_fn: ``(output, batch) → loss``, for ``"taylor"``.

    Returns:
        bool masks on the parameters' devices, for every group member and every key of
        ``current_mask``.

    Raises:
        KeyError: for groups or masks of parameters that the model does not have.
        ValueError: for an unknown name, an amount out of range, shapes that do not fit, NaN scores;
            for data that the importance lacks or has no use for.
        TypeError: for batches that the model does not take.
    """
    importance = choose_importance(importance, data=batches is not None)
    groups = as_groups(groups)
    plan = RegroupPlan(importance, scope, fillback_rate, min_keep, round_to, ungrouped)
    plan = plan.choose_scope(groups)
    weights = named_weights(model)
    current: Mapping[str, Tensor] = (
        ModelMasks(model) if current_mask is None else check_masks(weights, current_mask)
    )
    if amount is not None:
        check_amount(amount)
    check_groups(weights, groups)
    data = DataSource(batches, forward, loss_fn)
    known = measured(unwrap(model), groups, importance, data, current, replica_group(model))
    plan = replace(plan, importance=known)
    decision = decide(weights, groups, current, amount, plan)
    return refill_from(decision, weights, groups, current, amount, plan)


def decide(
    weights: Mapping[str, Tensor],
    groups: Groups,
    current: Mapping[str, Tensor],
    amount: Amount | None,
    plan: RegroupPlan,
    trained: Mapping[str, Tensor] | None = None,
) -> Decision:
    """Choose the units that stay, scope by scope; see ``score_layers`` for ``trained``."""
    if amount is not None:
        check_amount(amount)
    check_groups(weights, groups)
    return choose(groups, score_layers(weights, groups, current, plan, trained), amount, plan)


def score_layers(
    weights: Mapping[str, Tensor],
    groups: Groups,
    current: Mapping[str, Tensor],
    plan: RegroupPlan,
    trained: Mapping[str, Tensor] | None = None,
) -> list[ScoredLayer]:
    """Score the units of every layer.

    Args:
        weights: by dense name.
        groups: whose units.
        current: what is alive: scores of weights and the density count these entries.
        plan: by what units are scored.
        trained: what the model trains with, where that is more than ``current``: units that are dead in it
            score 0, not those without an entry in ``current``.
    """
    importance = resolve_importance(plan.importance)
    scored = []
    for layer in groups.layers:
        alive = remain(layer, weights, current)
        living = alive if trained is None else remain(layer, weights, trained)
        scores = score_units(importance, layer, weights, current, living)
        scored.append(ScoredLayer(scores, alive, remain(layer, weights, {}), dead=living == 0))
    if plan.scope != "layer" and getattr(importance, "relative", False):
        return [layer.normalized() for layer in scored]
    return scored


def choose(
    groups: Groups, scored: Sequence[ScoredLayer], amount: Amount | None, plan: RegroupPlan
) -> Decision:
    """The units that stay, scope by scope, of layers that have been scored."""
    kept: dict[int, Tensor] = {}
    budgets, selections = [], []
    sizes = [layer.sizes for layer in scored]
    for (label, kind), positions in scopes_of(groups, plan.scope, sizes).items():
        own = [groups.layers[i] for i in positions]
        pairs = zip(own, (scored[i] for i in positions), strict=True)
        stacked = [scores.stacked(layer.parts, layer.multiple) for layer, scores in pairs]
        layers, orders = zip(*stacked, strict=True)
        chosen = keep_units(
            layers,
            amount=amount,
            fillback_rate=plan.fillback_rate,
            min_keep=plan.min_keep,
            round_to=plan.round_to,
            per_entry=plan.scope == "global",
            of=f"{kind} of {label or 'the model'}",
        )
        kept.update(zip(positions, map(_of_units, chosen.kept, orders), strict=True))
        units = sum(layer.scores.numel() for layer in layers)
        realized = sum(int(k.sum()) for k in chosen.kept)
        budgets.append(ScopeBudget(label, kind, units, chosen.requested, realized))
        selections.append((tuple(positions), orders, chosen))
    every = tuple(kept[i] for i in range(len(groups.layers)))
    return Decision(every, tuple(budgets), tuple(selections))


def _of_units(values: Tensor, order: Tensor) -> Tensor:
    """A value for each unit, from one for each rank; see :meth:`ScoredLayer.stacked`."""
    of_units = values.new_empty(order.numel())
    of_units[order] = values
    return of_units


def sizes_of(groups: Groups, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Ranked entries of each unit of every layer."""
    return [remain(layer, weights, {}) for layer in groups.layers]


def scopes_of(
    groups: Groups, scope: Scope, sizes: Sequence[Tensor]
) -> dict[tuple[str, str], list[int]]:
    """(label, kind) of each scope → positions of its layers.

    Args:
        groups: whose units.
        scope: other than ``"auto"``.
        sizes: see :func:`sizes_of`.
    """
    scopes: dict[tuple[str, str], list[int]] = {}
    for position, layer in enumerate(groups.layers):
        label = {
            "layer": (layer.name, layer.kind),
            "size": (_with_size(sizes[position]), layer.kind),
            "type": ("all", layer.kind),
            "global": ("all", "units"),
        }[scope]
        scopes.setdefault(label, []).append(position)
    return scopes


def _with_size(sizes: Tensor) -> str:
    least, most = (int(each) for each in sizes.aminmax())
    return f"all of {least:,} weights" if least == most else f"all of {least:,} to {most:,} weights"


def refill_from(
    decision: Decision,
    weights: Mapping[str, Tensor],
    groups: Groups,
    current: Mapping[str, Tensor],
    amount: Amount | None,
    plan: RegroupPlan,
) -> Masks:
    """Lay a decision out over the entries of all members and masked parameters."""
    places: dict[str, list[tuple[Member, Tensor]]] = {}
    for layer, kept in zip(groups.layers, decision.kept, strict=True):
        for member in layer.members:
            places.setdefault(member.parameter, []).append((member, kept))
    for name in current:
        places.setdefault(name, [])

    def laid_out(name: str, units: Sequence[tuple[Member, Tensor]]) -> Tensor:
        weight = weights[name]
        stays = [member.spread(kept, weight) for member, kept in units]
        if not all(member.leaves_some for member, _ in units):
            # A dropped unit wins where the units of two dimensions overlap.
            return reduce(and_, stays[1:], stays[0].contiguous())
        owned = [member.owned(weight) for member, _ in units]
        free = ~reduce(or_, owned) if owned else torch.ones_like(weight, dtype=torch.bool)
        rest = alive_in(weights, current, name)
        if plan.ungrouped == "element" and name in current and int(total(free)) > 0:
            rest = _without_smallest(weight, rest & free, amount, name)
        return torch.where(free, rest, reduce(and_, stays)) if stays else rest.clone()

    return {name: laid_out(name, units) for name, units in places.items()}


def _without_smallest(weight: Tensor, alive: Tensor, amount: Amount | None, name: str) -> Tensor:
    if amount is None:
        remedy = "Pass amount, or ungrouped='keep'."
        refuse(ValueError, "ungrouped='element'", "an amount to drop", "amount=None", remedy)
    count = to_count(amount, int(total(alive)), of=f"alive entries of {name!r} in no group")
    return alive & ~lowest([weight], count, among=[alive], absolute=True, names=[repr(name)])[0]
