"""Runs a model on batches and scores its units, for importances that need data.

The output of a unit is recorded at the inputs of its members with ``consumes=True``. One batch is held at
a time; what is kept is a float64 sum for each input feature, or for each two of them. Modes, hooks, gradients, masks and random
states are put back, whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_rsst.distributed.dtensor import Ranks
from torch_rsst.distributed.replicas import agreed, replica_group
from torch_rsst.groups.groups import Group, GroupLayer, Groups, as_groups, check_groups
from torch_rsst.importance.batches import Batches, DataSource, Forward, LossFn
from torch_rsst.importance.combinations import choose_importance, data_parts, with_measured
from torch_rsst.importance.data_importance import DataImportance
from torch_rsst.importance.input_hooks import hooked_inputs, recorded, undisturbed
from torch_rsst.importance.recorder import (
    InputSums,
    Recorder,
    add_over_ranks,
    check_recorded,
    feature_sums,
    weight_matrix,
    weight_norms,
)
from torch_rsst.importance.registry import name_of, resolve_importance
from torch_rsst.importance.weights import Importance
from torch_rsst.masking.mask_sets import check_masks, extract_mask
from torch_rsst.masking.names import named_weights, unwrap
from torch_rsst.utils.errors import refuse


@dataclass(frozen=True, eq=False)
class MeasuredImportance:
    """Scores of the units of some layers, once measured. A callable as all importances are.

    Attributes:
        name: of the importance.
        scored: each layer with its scores.
        relative: see :class:`torch_rsst.importance.DataImportance`.
        across_layers: likewise.
    """

    name: str
    scored: tuple[tuple[GroupLayer, Tensor], ...]
    relative: bool = False
    across_layers: bool = False

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
    """Run a model on batches once, and keep the scores of its units.

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

    The result can be passed wherever a callable importance can: to :func:`regroup` and
    :func:`torch_rsst.plan`, for as many budgets as you like. It does not change with the model's weights.

    The model is run as it is, without wrappers of ``DistributedDataParallel`` and ``torch.compile``, in eval
    mode and under the masks. Modes, hooks, gradients and random states are as before afterwards. In a
    ``DistributedDataParallel`` it is a collective call: each rank brings its own batches, the sums are
    those over all ranks, and all raise where one fails.

    Args:
        model: is run; not changed.
        groups: from :func:`find_groups`, or a selection of its items.
        importance: one that needs data, or a combination in which one does; ``"auto"`` is ``"variance"``.
        batches: what ``model(batch)`` takes: an iterable, drawn once, or a function that returns one.
        forward: ``(model, batch) → output``, for batches that ``model(batch)`` does not take.
        loss_fn: ``(output, batch) → loss``, for importances that need a gradient; not used by others.
        current_mask: what is alive; the model's own masks by default.

    Returns:
        a callable; of a combination, a combination of these.

    Raises:
        ValueError: without batches or a needed ``loss_fn``; for values that are not finite; for units
            whose consumers did not run.
        TypeError: for batches that the model does not take.
    """
    data, found = DataSource(batches, forward, loss_fn), as_groups(groups)
    importance = choose_importance(importance, data=True)
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
    weights = named_weights(model)
    with torch.inference_mode(False):
        inputs = agreed(
            replicas, lambda: _run(model, groups, statistics, data, current), lambda _: ()
        )
        add_over_ranks(inputs, replicas, Ranks.of(weights.values()))
        check_recorded(inputs, groups)
        norms = weight_norms(inputs, weights, current)
    matrix = partial(weight_matrix, weights, current)

    def scores(row: int, statistic: DataImportance) -> Iterator[tuple[GroupLayer, Tensor]]:
        of_weights = matrix if statistic.moments else None
        for i, layer in enumerate(groups.layers):
            sums = feature_sums(inputs, i, row, norms, of_weights)
            yield layer, statistic.unit_scores([*sums], layer.units)

    scored = (
        MeasuredImportance(
            name_of(each), tuple(scores(row, each)), each.relative, each.across_layers
        )
        for row, each in enumerate(statistics)
    )
    return with_measured(importance, scored)


def _run(
    model: nn.Module,
    groups: Groups,
    statistics: tuple[DataImportance, ...],
    data: DataSource,
    current: Mapping[str, Tensor],
) -> list[InputSums]:
    """The sums over all batches of this rank."""
    recorder = Recorder(groups, hooked_inputs(model, groups), statistics)
    inputs = [each.hooked for each in recorder.inputs]
    with undisturbed(model, current), torch.set_grad_enabled(recorder.gradients):
        batches = data.draw()
        with recorded(inputs, recorder.record):
            for number, batch in enumerate(batches):
                recorder.batch = number
                _run_batch(model, batch, data, recorder)
    if recorder.batch < 0:
        remedy = "An iterator is used up by its first use: pass a list, a DataLoader or a function."
        refuse(ValueError, "batches", "at least one", "none", remedy)
    if recorder.gradients:
        recorder.check_used()
    return recorder.inputs


def _run_batch(model: nn.Module, batch: Any, data: DataSource, recorder: Recorder) -> None:
    """A function of its own, so that outputs and graph are freed before the next batch is drawn."""
    output = data.output(model, batch)
    if recorder.gradients:
        recorder.take_gradients(data.loss(output, batch, recorder.batch))
