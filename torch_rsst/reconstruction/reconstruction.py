"""Reconstruction: mask units, and refit the layers that consume them so that their outputs stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_rsst.distributed.dtensor import is_sharded
from torch_rsst.distributed.replicas import agreed, replica_group
from torch_rsst.groups.groups import Group, GroupLayer, Groups, as_groups, check_groups
from torch_rsst.importance.batches import Batches, DataSource, Forward
from torch_rsst.masking.mask_sets import Masks, alive_in, apply_mask, check_masks, extract_mask
from torch_rsst.masking.names import all_places, named_weights, unwrap
from torch_rsst.masking.rollback import AllOrNothing
from torch_rsst.reconstruction.refit import Refit
from torch_rsst.utils.amounts import check_number
from torch_rsst.utils.errors import check_choice, refuse
from torch_rsst.utils.module_state import deep_copy

Method: TypeAlias = Literal["least_squares", "mean"]
METHODS = ("least_squares", "mean")


@dataclass(frozen=True)
class Reconstruction:
    """How consumers are refitted: the checked arguments of :func:`torch_rsst.reconstruct`."""

    method: Method = "least_squares"
    damping: float = 1e-4

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_number(self.damping, "damping", above=0, or_equal=True)


def reconstruct(
    model: nn.Module,
    groups: Groups | Iterable[Group] | Iterable[GroupLayer],
    refill_mask: Mapping[str, Tensor],
    *,
    batches: Batches,
    forward: Forward | None = None,
    method: Method = "least_squares",
    damping: float = 1e-4,
) -> None:
    r"""Apply a refill mask, and refit the layers that consume the masked units, in place.

    Example:
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        >>> groups, batches = torch_rsst.find_groups(mlp), [torch.randn(16, 4) for _ in range(3)]
        >>> refill_mask = torch_rsst.regroup(mlp, groups, importance="auto", batches=batches)
        >>> torch_rsst.reconstruct(mlp, groups, refill_mask, batches=batches)
        >>> torch_rsst.sparsity_report(mlp, groups).gone("neurons")
        4

    Each consumer of units that go is fitted by damped least squares to the outputs it has in the model as it
    is before the call. With Y these outputs, a the inputs that the consumer receives in the masked model,
    S its entries that stay and C = Σ a_S·a_Sᵀ,

        W'_S = W_S + (Σ (Y − W_S·a_S − b)·a_Sᵀ) · (C + damping · mean(diag C) · I)⁻¹.

    Consumers are refitted in the order in which they run, so that later ones make up for what earlier ones
    could not. A constant is fitted along with the weights, without damping: it goes to the bias of the
    layer or, of a layer without one, to the running mean of the batch norm that receives its outputs; where
    there is neither, none is fitted. ``method="mean"`` fits the constant alone, which restores the mean
    of the outputs.

    Consumers may be linear layers (those of MLPs, gated MLPs and attention, with grouped queries too) and
    convolutions of any kernel size and number of groups. A layer whose squared error on the batches would
    not fall keeps its weights. Where no units go, no weight changes. In a ``DistributedDataParallel`` it is
    a collective call: each rank brings its own batches, and the sums are those over all ranks.

    The batches are drawn once and held until the last consumer is refitted. For each consumer the model runs
    twice on each batch, before and after the cut, in eval mode and with the same random numbers. Sums are
    kept in float64; for one consumer at a time, (features + 1)² numbers.

    Args:
        model: is masked and refitted in place, ``weight_orig`` where masked. Biases and running means of
            consumers change; no parameter is added.
        groups: from :func:`find_groups`, or a selection of its items; only their consumers are refitted.
        refill_mask: what should be alive, from :func:`regroup`.
        batches: what ``model(batch)`` takes: an iterable, or a function that returns one; each batch an object
            of its own, as all are held. A few hundred samples without augmentation do.
        forward: ``(model, batch) → output``, for batches that ``model(batch)`` does not take.
        method: ``"least_squares"`` or ``"mean"``.
        damping: relative to the mean squared input; more keeps weights nearer to what they were.

    Raises:
        ValueError: for sharded models, layers of another kind than the above, consumers that do not run,
            values that are not finite, arguments out of range.
        TypeError: for batches that the model does not take.
        KeyError: for groups or masks of parameters that the model does not have.
            The model is as it was before the call then.

    .. note::
        Fitting the remaining weights to the layer's outputs is the reconstruction of channel pruning (He et
        al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017); the damped normal
        equations are those of OBC (Frantar and Alistarh, NeurIPS 2022); the mean alone, FLAP (An et al.,
        AAAI 2024).
    """
    how, data = Reconstruction(method, damping), DataSource(batches, forward)
    found = as_groups(groups)
    weights = named_weights(model)
    check_groups(weights, found)
    masks = check_masks(weights, refill_mask)
    bare, replicas = unwrap(model), replica_group(model)
    check_reconstruction(bare, data)
    reconstruct_towards(bare, found, masks, how, data, reference=bare, replicas=replicas)


def check_reconstruction(model: nn.Module, data: DataSource, again: str = "") -> None:
    """Raise unless there are batches, and each rank holds whole weights.

    Args:
        model: without wrappers.
        data: what it is to run on.
        again: see :meth:`DataSource.check_batches`.
    """
    data.check_batches("reconstruct", again)
    if any(is_sharded(weight) for weight in named_weights(model).values()):
        remedy = "Reconstruct before fully_shard, or on one device."
        refuse(ValueError, "reconstruct", "whole parameters on every rank", "sharded ones", remedy)


def reconstruct_towards(
    model: nn.Module,
    groups: Groups,
    masks: Masks,
    how: Reconstruction,
    data: DataSource,
    *,
    reference: nn.Module,
    replicas: dist.ProcessGroup | None,
) -> None:
    """Apply masks and refit consumers towards another model's outputs, in place; all or nothing.

    Args:
        model: is masked and refitted; without wrappers.
        groups: of the model, checked.
        masks: what should be alive, checked.
        how: method and damping.
        data: what both models run on, see ``check_reconstruction``.
        reference: a model of the same structure, such as a copy from before; it may be the model itself,
            as it is before the call. It is not changed.
        replicas: ranks whose sums are added up.
    """
    affected = agreed(replicas, lambda: _affected(model, groups, masks), lambda _: masks.items())
    values: list[tuple[Tensor, Tensor]] = []
    if affected.layers:
        with torch.inference_mode(False), torch.no_grad():
            cut = deep_copy(model)
            own = {
                id(copy): each for copy, each in zip(_tensors(cut), _tensors(model), strict=True)
            }
            apply_mask(cut, masks)
            refit = Refit(reference, cut, affected, data, replicas)
            changed = refit.run(means_only=how.method == "mean", damping=how.damping)
            values = [(own[id(tensor)], tensor.detach()) for tensor in changed]
    with AllOrNothing(all_places(model)) as undo, torch.no_grad():
        apply_mask(model, masks)
        for tensor, value in values:
            undo.append(partial(tensor.copy_, tensor.clone()))
            tensor.copy_(value)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, in an order that a copy of the model has, too."""
    return [*model.parameters(), *model.buffers()]


def _affected(model: nn.Module, groups: Groups, masks: Masks) -> Groups:
    """The layers some of whose units lose entries that are alive."""
    weights, current = named_weights(model), extract_mask(model)

    def loses(layer: GroupLayer) -> bool:
        for member in layer.members:
            if member.parameter in masks:
                goes = alive_in(weights, current, member.parameter) & ~masks[member.parameter]
                if bool((goes & member.owned(weights[member.parameter])).any()):
                    return True
        return False

    return Groups(tuple(layer for layer in groups.layers if loses(layer)))
