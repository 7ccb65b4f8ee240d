"""Sums over the inputs of the layers that consume units, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from torch_rsst.distributed.dtensor import Ranks, gathered, is_sharded
from torch_rsst.distributed.replicas import summed
from torch_rsst.groups.groups import Groups, Member
from torch_rsst.importance.data_importance import DataImportance, FeatureSums
from torch_rsst.importance.input_hooks import HookedInput
from torch_rsst.masking.mask_sets import alive_in
from torch_rsst.utils.errors import refuse


@dataclass(frozen=True, eq=False)
class InputSums:
    """Sums at one hooked input, float64 on the CPU.

    Attributes:
        hooked: the input.
        sums: for each statistic, a tensor of shape (terms, features).
        count: how many entries of each feature were summed; one number.
        moments: Σ a·aᵀ, shape (features, features); None where no statistic asks for it.
    """

    hooked: HookedInput
    sums: tuple[Tensor, ...]
    count: Tensor
    moments: Tensor | None

    @classmethod
    def zeros(cls, hooked: HookedInput, statistics: Sequence[DataImportance]) -> InputSums:
        """Sums of nothing."""
        shapes = [(statistic.terms, hooked.size) for statistic in statistics]
        sums = tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        moments = None
        if any(statistic.moments for statistic in statistics):
            moments = torch.zeros(hooked.size, hooked.size, dtype=torch.float64)
        return cls(hooked, sums, torch.zeros((), dtype=torch.float64), moments)

    @property
    def tensors(self) -> list[Tensor]:
        """All sums."""
        return [*self.sums, self.count, *([] if self.moments is None else [self.moments])]


def add_over_ranks(
    inputs: Sequence[InputSums], replicas: dist.ProcessGroup | None, shards: Ranks
) -> None:
    """Replace sums by those over all ranks that hold replicas or shards of the model."""
    if (replicas is None and shards.mesh is None) or not inputs:
        return
    tensors = [tensor for each in inputs for tensor in each.tensors]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    summed(flat, replicas)
    flat = shards.add_up(flat).cpu()
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def check_recorded(inputs: Sequence[InputSums], groups: Groups) -> None:
    """Raise for units whose outputs were never recorded."""
    for position, layer in enumerate(groups.layers):
        count = torch.zeros(layer.units, dtype=torch.float64)
        for each in inputs:
            for share in each.hooked.shares:
                if share.layer == position:
                    count.index_add_(0, share.unit, each.count.expand(share.unit.shape))
        if bool((count == 0).any()):
            consumers = sorted({m.parameter for m in layer.members if m.consumes})
            which = (count == 0).nonzero().flatten().tolist()
            refuse(
                ValueError,
                f"activations of {layer}",
                "some",
                f"none for unit(s) {which[:5]} at {', '.join(consumers)}",
                "Pass a forward that runs this layer and batches that are not empty, or leave its "
                "groups out; every expert needs tokens that are routed to it. Inputs are recorded where a "
                "module is called or its weight is passed to F.linear or a product of matrices, nowhere else.",
            )


def feature_sums(
    inputs: Sequence[InputSums],
    position: int,
    row: int,
    norms: Mapping[str, Tensor],
    matrix: Callable[[HookedInput], Tensor] | None,
) -> Iterator[FeatureSums]:
    """The sums of one statistic for the units of one layer, at each of its consumers.

    Args:
        inputs: sums at all consumers.
        position: of the layer among the groups.
        row: of the statistic.
        norms: from :func:`weight_norms`.
        matrix: the weights that meet an input, see :func:`weight_matrix`; None where the statistic has no
            ``moments``.
    """
    for each in inputs:
        for share in each.hooked.shares:
            if share.layer == position:
                index = share.index
                yield FeatureSums(
                    share.unit,
                    each.sums[row][:, index],
                    float(each.count),
                    _of_stack(norms[each.hooked.name], each.hooked)[index],
                    each.moments[index][:, index] if matrix and each.moments is not None else None,
                    matrix(each.hooked)[:, index] if matrix else None,
                )


def _of_stack(values: Tensor, hooked: HookedInput) -> Tensor:
    return values if hooked.stack is None else values[hooked.stack]


def weight_matrix(
    weights: Mapping[str, Tensor], current: Mapping[str, Tensor], hooked: HookedInput
) -> Tensor:
    """The alive weights that meet an input, 0 where masked: float64 of shape (outputs, features)."""
    alive = plain(alive_in(weights, current, hooked.name))
    values = _of_stack(plain(weights[hooked.name]).masked_fill(~alive, 0.0), hooked)
    dim = hooked.dim if hooked.stack is None else hooked.dim - 1
    return values.movedim(dim, -1).flatten(0, -2).cpu().double()


def weight_norms(
    inputs: Sequence[InputSums], weights: Mapping[str, Tensor], current: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Σ w² over the alive weights that read each input feature, by the name of the weight.

    Of stacked weights, a row for each.
    """
    norms = {}
    for hooked in {each.hooked.name: each.hooked for each in inputs}.values():
        weight = weights[hooked.name]
        alive = alive_in(weights, current, hooked.name)
        wide = weight if weight.device.type == "mps" else weight.double()
        shape = (hooked.size,) if hooked.stack is None else (weight.shape[0], hooked.size)
        features = torch.arange(math.prod(shape)).view(shape)
        every = Member(hooked.name, hooked.dim, features, ranked=True)
        squares = wide.masked_fill(~alive, 0.0).square()
        norms[hooked.name] = every.sum_per_unit(squares, features.numel()).view(shape)
    return norms


class Recorder:
    """Adds up inputs, with their gradients where a statistic needs these."""

    def __init__(
        self,
        groups: Groups,
        hooked: Sequence[HookedInput],
        statistics: tuple[DataImportance, ...],
    ) -> None:
        self.inputs = [InputSums.zeros(each, statistics) for each in hooked]
        self.gradients = any(statistic.needs_gradient for statistic in statistics)
        self.batch = -1
        self._groups, self._statistics = groups, statistics
        self._sums_of = {id(each.hooked): each for each in self.inputs}
        self._waiting: list[tuple[HookedInput, Tensor]] = []  # for their gradients
        self._used: set[int] = set()  # layers on which a loss depends
        self._paused = False

    def record(self, hooked: HookedInput, activation: Tensor) -> Tensor:
        """Add the input of a layer; returns the input that the layer is to be called with."""
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
        """Add the inputs that were recorded since the last loss, with their gradients."""
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
                self._used.update(share.layer for share in hooked.shares)
            self._add(hooked, own, torch.zeros_like(own) if gradient is None else gradient)

    def check_used(self) -> None:
        """Raise for layers on which no loss depends, though they ran."""
        ran = {s.layer for each in self.inputs if each.count for s in each.hooked.shares}
        for position in sorted(ran - self._used):
            remedy = "Do not detach what the loss is computed from, or leave out the groups of this layer."
            subject = f"gradients of {self._groups.layers[position]}"
            expected, got = "a loss that depends on its units", "losses that do not"
            refuse(ValueError, subject, expected, got, remedy)

    @torch.no_grad()
    def _add(self, hooked: HookedInput, activation: Tensor, gradient: Tensor | None) -> None:
        value = plain(activation)
        slope = None if gradient is None else plain(gradient)
        others = [d for d in range(value.ndim) if d != hooked.axis % value.ndim]
        size = value.shape[hooked.axis]
        check_size(hooked, size)
        into = self._sums_of[id(hooked)]
        into.count.add_(value.numel() // size if size else 0)
        # MPS has no float64.
        wide = torch.float32 if value.device.type == "mps" else torch.float64
        if into.moments is not None:
            rows = value.movedim(hooked.axis, -1).reshape(-1, size).to(wide)
            into.moments.add_((rows.mT @ rows).cpu())
        for statistic, sums in zip(self._statistics, into.sums, strict=True):
            made = statistic.entries(value, slope if statistic.needs_gradient else None)
            terms = made if isinstance(made, tuple) else (made,)
            self._check_terms(statistic, terms, value)
            for total, term in zip(sums, terms, strict=True):
                along = term.sum(others, dtype=wide) if others else term.to(wide)
                along = along.cpu().double()
                self._check_finite(hooked, along)
                total += along

    def _check_terms(
        self, statistic: DataImportance, terms: tuple[Tensor, ...], value: Tensor
    ) -> None:
        subject = f"entries of {type(statistic).__name__}"
        if len(terms) != statistic.terms:
            remedy = "Set terms in the class to how many there are."
            refuse(ValueError, subject, f"{statistic.terms} tensors", f"{len(terms)}", remedy)
        for term in terms:
            if term.shape != value.shape:
                expected, got = f"shape {tuple(value.shape)}", f"shape {tuple(term.shape)}"
                remedy = "Return one number for each entry of the activation."
                refuse(ValueError, subject, expected, got, remedy)

    def _check_finite(self, hooked: HookedInput, values: Tensor) -> None:
        for share in hooked.shares:
            if not bool(values[share.index].isfinite().all()):
                layer = self._groups.layers[share.layer]
                remedy = "Look at this batch, or where training diverged; float16 overflows beyond 65504."
                subject = f"activations of {layer}, batch {self.batch}"
                refuse(ValueError, subject, "finite numbers", "NaN or infinity", remedy)


def check_size(hooked: HookedInput, size: int) -> None:
    """Raise where an input has another number of features than the groups say."""
    if size != hooked.size:
        subject = f"input of {hooked.name!r}"
        expected, got = f"{hooked.size} features", f"{size} along dim {hooked.axis}"
        remedy = "Find the groups of this very model: find_groups(model)."
        refuse(ValueError, subject, expected, got, remedy)


def plain(tensor: Tensor) -> Tensor:
    """Detached, whole where ranks hold parts, float32 where it is of 16 bits."""
    tensor = tensor.detach()
    tensor = gathered(tensor) if is_sharded(tensor) else tensor
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
