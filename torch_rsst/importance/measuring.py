"""Runs a model on batches and adds up what its units put out, for importances that need data.

A unit is listened to where it is taken in: at the inputs of its members with ``consumes=True``. One batch
is held at a time; what stays is a float64 sum per unit. Modes, hooks, gradients, masks and random
states are put back, whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_rsst.distributed.dtensor import Ranks, gathered, is_sharded
from torch_rsst.distributed.replicas import agreed, replica_group
from torch_rsst.groups.groups import Group, GroupLayer, Groups, as_groups, check_groups
from torch_rsst.importance.batches import Batches, DataSource, Forward, LossFn
from torch_rsst.importance.data_importance import DataImportance
from torch_rsst.importance.input_hooks import HookedInput, hooked_inputs, recorded, undisturbed
from torch_rsst.importance.registry import (
    Importance,
    data_parts,
    name_of,
    resolve_importance,
    with_measured,
)
from torch_rsst.masking.mask_sets import check_masks, extract_mask, named_weights, unwrap
from torch_rsst.utils.errors import refuse


@dataclass(frozen=True, eq=False)
class MeasuredImportance:
    """Scores of the units of some layers, once measured. A callable as all importances are.

    Attributes:
        name: of the importance.
        scored: each layer with its scores.
    """

    name: str
    scored: tuple[tuple[GroupLayer, Tensor], ...]

    def __call__(
        self, layer: GroupLayer, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> Tensor:
        """The scores of a layer.

        Raises:
            ValueError: for a layer that was not measured.
        """
        for known, scores in self.scored:
            if _alike(known, layer):
                return scores.clone()
        subject, expected = f"importance {self.name!r}", "a layer whose units were measured"
        remedy = "Measure the very groups that are scored."
        refuse(ValueError, subject, expected, str(layer), remedy)

    def __repr__(self) -> str:
        return f"measured({self.name!r})"


def _alike(one: GroupLayer, other: GroupLayer) -> bool:
    """Whether units have the same numbers in both."""
    names = [(layer.name, layer.kind, layer.units, len(layer.members)) for layer in (one, other)]
    return names[0] == names[1] and all(
        a.parameter == b.parameter and torch.equal(a.unit_of, b.unit_of)
        for a, b in zip(one.members, other.members, strict=True)
    )


def measure_importance(
    model: nn.Module,
    groups: Groups | Iterable[Group] | Iterable[GroupLayer],
    importance: str | Importance,
    *,
    batches: Batches,
    forward: Forward | None = None,
    loss_fn: LossFn | None = None,
    current_mask: Mapping[str, Tensor] | None = None,
) -> Importance:
    """Run a model on batches once, and keep what an importance reads from them.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> groups = torch_rsst.find_groups(mlp)
        >>> batches = [torch.randn(16, 4) for _ in range(3)]
        >>> measured = torch_rsst.measure_importance(mlp, groups, "activation_l2", batches=batches)
        >>> for amount in (0.25, 0.5):
        ...     refill_mask = torch_rsst.regroup(mlp, groups, amount=amount, importance=measured)
        ...     print(refill_mask["0.weight"].all(dim=1).sum())
        tensor(6)
        tensor(4)

    What it returns goes wherever a callable importance does: to :func:`regroup` and
    :func:`torch_rsst.plan`, for as many budgets as you like. It does not follow the model's weights.

    The model is run as it is, without wrappers of ``DistributedDataParallel`` and ``torch.compile``, in eval
    mode and under the masks. Modes, hooks, gradients and random states are as before afterwards. In a
    ``DistributedDataParallel`` it is a collective call: each rank brings its own batches, the sums are
    those over all ranks, and all raise where one fails.

    Args:
        model: is run; not changed.
        groups: from :func:`find_groups`, or a selection of its items.
        importance: one that needs data, or a combination in which one does.
        batches: what ``model(batch)`` takes: an iterable, drawn once, or a function that returns one.
        forward: ``(model, batch) → output``, for batches that ``model(batch)`` does not take.
        loss_fn: ``(output, batch) → loss``, for importances that need a gradient; not used by others.
        current_mask: what is alive; the model's own masks by default.

    Returns:
        a callable; of a combination, a combination of these.

    Raises:
        ValueError: without batches or a needed ``loss_fn``; for values that are not finite; for units
            that no layer was seen to take in.
        TypeError: for batches that the model does not take.
    """
    data, found = DataSource(batches, forward, loss_fn), as_groups(groups)
    weights = named_weights(model)
    check_groups(weights, found)
    given = extract_mask(model) if current_mask is None else current_mask
    return measured(
        unwrap(model), found, importance, data, check_masks(weights, given), replica_group(model)
    )


def check_source(importance: str | Importance, data: DataSource, rounds: int = 1) -> None:
    """Raise unless an importance gets the data that it needs, in so many rounds, and no other."""
    data.check(name_of(importance), tuple(data_parts(importance)), rounds)


def measured(
    model: nn.Module,
    groups: Groups,
    importance: str | Importance,
    data: DataSource,
    current: Mapping[str, Tensor],
    replicas: dist.ProcessGroup | None,
) -> Importance:
    """An importance whose need for data is met; one that has none is returned as it is.

    Args:
        model: without wrappers.
        groups: of it, checked.
        importance: a name or a callable.
        data: is checked here.
        current: the masks under which the model runs, checked.
        replicas: ranks whose sums are added up.
    """
    check_source(importance, data)
    statistics = tuple(data_parts(importance))
    if not statistics:
        return resolve_importance(importance)
    with torch.inference_mode(False):
        totals = agreed(
            replicas, lambda: _run(model, groups, statistics, data, current), lambda _: ()
        ).over_ranks(replicas, Ranks.of(named_weights(model).values()))
    totals.check(groups)
    scored = [
        MeasuredImportance(
            name_of(statistic),
            tuple(
                (layer, statistic.score(sums[row].clone(), count.clone()))
                for layer, sums, count in zip(
                    groups.layers, totals.sums, totals.counts, strict=True
                )
            ),
        )
        for row, statistic in enumerate(statistics)
    ]
    return with_measured(importance, iter(scored))


def _run(
    model: nn.Module,
    groups: Groups,
    statistics: tuple[DataImportance, ...],
    data: DataSource,
    current: Mapping[str, Tensor],
) -> _Totals:
    """What all batches add up to on this rank."""
    totals = _Totals.of(groups, len(statistics))
    gradients = any(statistic.needs_gradient for statistic in statistics)
    recorder = _Recorder(groups, statistics, totals, gradients)
    inputs = hooked_inputs(model, groups)
    with undisturbed(model, current), torch.set_grad_enabled(gradients):
        batches = data.draw()
        with recorded(inputs, recorder.record):
            for number, batch in enumerate(batches):
                recorder.batch = number
                _run_batch(model, batch, data, recorder)
    if recorder.batch < 0:
        remedy = "An iterator is used up by its first use: pass a list, a DataLoader or a function."
        refuse(ValueError, "batches", "at least one", "none", remedy)
    if gradients:
        recorder.check_felt()
    return totals


def _run_batch(model: nn.Module, batch: Any, data: DataSource, recorder: _Recorder) -> None:
    """A function of its own, so that outputs and graph are gone when the next batch comes."""
    output = data.output(model, batch)
    if recorder.gradients:
        recorder.take_gradients(data.loss(output, batch, recorder.batch))


@dataclass(frozen=True, eq=False)
class _Totals:
    """Sums per layer (statistics × units) and counts of entries (units), float64."""

    sums: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]

    @classmethod
    def of(cls, groups: Groups, statistics: int) -> _Totals:
        sizes = [layer.units for layer in groups.layers]
        return cls(
            tuple(torch.zeros(statistics, n, dtype=torch.float64) for n in sizes),
            tuple(torch.zeros(n, dtype=torch.float64) for n in sizes),
        )

    def over_ranks(self, replicas: dist.ProcessGroup | None, shards: Ranks) -> _Totals:
        """The sums over all ranks that hold replicas or shards of the model."""
        if (replicas is None and shards.mesh is None) or not self.sums:
            return self
        flat = torch.cat([t.flatten() for t in (*self.sums, *self.counts)])
        if replicas is not None:
            device = torch.device("cuda" if "nccl" in dist.get_backend(replicas) else "cpu")
            flat = flat.to(device)
            dist.all_reduce(flat, group=replicas)
        flat = shards.add_up(flat).cpu()
        parts = iter(torch.split(flat, [t.numel() for t in (*self.sums, *self.counts)]))
        sums = tuple(next(parts).view_as(t) for t in self.sums)
        return _Totals(sums, tuple(next(parts) for _ in self.counts))

    def check(self, groups: Groups) -> None:
        """Raise for units that were never heard."""
        for layer, count in zip(groups.layers, self.counts, strict=True):
            if bool((count == 0).any()):
                taking = sorted({m.parameter for m in layer.members if m.consumes})
                which = (count == 0).nonzero().flatten().tolist()
                refuse(
                    ValueError,
                    f"activations of {layer}",
                    "some",
                    f"none for unit(s) {which[:5]} at {', '.join(taking)}",
                    "Pass a forward that runs this layer and batches that are not empty, or leave its "
                    "groups out. A weight that is used neither by its module nor by F.linear cannot be "
                    "listened to.",
                )


class _Recorder:
    """Adds up what is heard."""

    def __init__(
        self,
        groups: Groups,
        statistics: tuple[DataImportance, ...],
        totals: _Totals,
        gradients: bool,
    ) -> None:
        self.groups, self.statistics, self.totals = groups, statistics, totals
        self.gradients, self.batch = gradients, -1
        self._waiting: list[tuple[HookedInput, Tensor]] = []  # for their gradients
        self._felt: set[int] = set()  # layers on which a loss depends
        self._paused = False

    def record(self, hooked: HookedInput, activation: Tensor) -> Tensor:
        """Take in the input of a layer; returns what the layer gets in its place."""
        if not self.gradients:
            self._add(hooked, activation, None)
            return activation
        # A tensor of its own: its gradient is that through this layer alone, and nobody writes to it.
        own = activation.clone()
        if torch.is_grad_enabled() and not own.requires_grad:
            own.requires_grad_()
        if not self._paused:
            self._waiting.append((hooked, own))
        return own

    def take_gradients(self, loss: Tensor) -> None:
        """Add up what has been heard since the last loss."""
        waiting, self._waiting = self._waiting, []
        inputs = [own for _, own in waiting if own.requires_grad]
        self._paused = True  # checkpointed parts of the model run once more
        try:
            found = torch.autograd.grad(loss, inputs, allow_unused=True) if inputs else ()
        finally:
            self._paused = False
        gradients = iter(found)
        for hooked, own in waiting:
            gradient = next(gradients) if own.requires_grad else None
            if gradient is not None:
                self._felt.update(share.layer for share in hooked.shares)
            self._add(hooked, own, torch.zeros_like(own) if gradient is None else gradient)

    def check_felt(self) -> None:
        """Raise for layers on which no loss depends."""
        for position, layer in enumerate(self.groups.layers):
            if position not in self._felt and bool(self.totals.counts[position].any()):
                remedy = (
                    "Do not detach what the loss is made of, or leave the groups of this layer out."
                )
                subject, expected = f"gradients of {layer}", "a loss that depends on its units"
                got = "losses that do not"
                refuse(ValueError, subject, expected, got, remedy)

    @torch.no_grad()
    def _add(self, hooked: HookedInput, activation: Tensor, gradient: Tensor | None) -> None:
        value = _plain(activation)
        slope = None if gradient is None else _plain(gradient)
        others = [d for d in range(value.ndim) if d != hooked.axis % value.ndim]
        size = value.shape[hooked.axis]
        self._check_size(hooked, size)
        positions = value.numel() // size if size else 0
        for share in hooked.shares:
            self.totals.counts[share.layer].index_add_(
                0, share.unit, torch.full(share.unit.shape, float(positions), dtype=torch.float64)
            )
        # On Apple's GPUs there is no float64.
        wide = torch.float32 if value.device.type == "mps" else torch.float64
        for row, statistic in enumerate(self.statistics):
            entries = statistic.entries(value, slope if statistic.needs_gradient else None)
            if entries.shape != value.shape:
                subject = f"entries of {type(statistic).__name__}"
                expected, got = f"shape {tuple(value.shape)}", f"shape {tuple(entries.shape)}"
                remedy = "Return one number for each entry of the activation."
                refuse(ValueError, subject, expected, got, remedy)
            along = entries.sum(others, dtype=wide) if others else entries.to(wide)
            along = along.cpu().double()
            for share in hooked.shares:
                mine = along[share.index]
                self._check_finite(share.layer, mine)
                self.totals.sums[share.layer][row].index_add_(0, share.unit, mine)

    def _check_size(self, hooked: HookedInput, size: int) -> None:
        if size != hooked.size:
            subject = f"input of {hooked.name!r}"
            expected, got = f"{hooked.size} features", f"{size} along dim {hooked.axis}"
            remedy = "Find the groups of this very model: find_groups(model)."
            refuse(ValueError, subject, expected, got, remedy)

    def _check_finite(self, layer: int, values: Tensor) -> None:
        if not bool(values.isfinite().all()):
            subject = f"activations of {self.groups.layers[layer]}, batch {self.batch}"
            remedy = (
                "Look at this batch, or where training diverged; float16 overflows beyond 65504."
            )
            got = "NaN or infinity"
            refuse(ValueError, subject, "finite numbers", got, remedy)


def _plain(tensor: Tensor) -> Tensor:
    """Detached, whole where ranks hold parts, float32 where it is of 16 bits."""
    tensor = tensor.detach()
    tensor = gathered(tensor) if is_sharded(tensor) else tensor
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
