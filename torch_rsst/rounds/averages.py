"""Averages of a model's weights (EMA, SWA): masked, shrunk, rewound and cut as the model is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from torch_rsst.masking.dense_scope import check_masks_in_place
from torch_rsst.masking.mask_sets import apply_mask, extract_mask
from torch_rsst.masking.masked_parameter import restore
from torch_rsst.masking.names import (
    all_places,
    named_refs,
    named_weights,
    unwrap,
    without_wrappers,
)
from torch_rsst.masking.rollback import AllOrNothing, reorder
from torch_rsst.utils.errors import check_type, listing, refuse
from torch_rsst.utils.iterables import items


def averages_in(model: nn.Module, followers: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """The averages of a model's weights, out of their wrappers.

    Raises:
        TypeError: for what is no list, or one that is no module.
        ValueError: for one that has other parameters than the model, is the model, or shares parameters with it.
    """
    weights = named_weights(model)
    listed = None if isinstance(followers, nn.Module) else items(followers)
    if listed is None:
        remedy = "Pass a list: follow=[average]."
        refuse(TypeError, "follow", "a list of modules", type(followers).__name__, remedy)
    found = [_inside(follower, unwrap(model), weights) for follower in listed]
    held = {id(p): name for name, p in unwrap(model).named_parameters()}
    for module in found:
        if shared := [held[id(p)] for p in module.parameters() if id(p) in held]:
            remedy = "Pass an average, which has copies."
            got = f"{listing(shared)} of the model itself"
            refuse(ValueError, "follow", "parameters of its own", got, remedy)
    return tuple(dict.fromkeys(found))  # each once, also where a wrapper is given with it


def follow(model: nn.Module, followers: Iterable[nn.Module]) -> None:
    """Mask averages of a model's weights as the model is masked.

    Example:
        >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        >>> model = torch.nn.Linear(3, 1)
        >>> average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        >>> torch_rsst.l1_unstructured(model, "weight", amount=1)
        Linear(in_features=3, out_features=1, bias=True)
        >>> torch_rsst.follow(model, [average])
        >>> average.update_parameters(model)
        >>> int(average.module.weight_mask.sum())
        2

    Averages go through the parameters and buffers of both models in parallel, so both must be masked, alike and in the same
    order; masks that the model has no more are made permanent. Call it whenever masks have changed; ``RSST(follow=[average])`` and ``Refill(follow=[average])`` do.

    Args:
        model: has the masks; not changed.
        followers: modules with the same parameters, changed in place: ``AveragedModel`` of PyTorch,
            ``ModelEmaV2`` and ``ModelEmaV3`` of timm, or the averaged modules themselves.

    Raises:
        TypeError, ValueError: for a follower that is no module or has other parameters; nothing is changed then.
    """
    masks, averages = extract_mask(model), averages_in(model, followers)
    check_masks_in_place("follow", model.modules())
    with AllOrNothing(all_places(*averages)):
        for module in averages:
            apply_mask(module, masks)
        restore(
            [
                ref
                for module in averages
                for name, places in named_refs(module).items()
                for ref in places
                if name not in masks and ref.is_masked
            ]
        )
        for module in averages:
            _order_buffers(module, unwrap(model))


def _order_buffers(average: nn.Module, model: nn.Module) -> None:
    """Let the buffers of each module stand as in the model's module of that name."""
    modules = {without_wrappers(path): module for path, module in model.named_modules()}
    for path, module in average.named_modules():
        if without_wrappers(path) in modules:
            reorder(module._buffers, modules[without_wrappers(path)]._buffers)


def _inside(follower: Any, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The average within a wrapper that keeps it as ``module``."""
    remedy = "Pass the average, such as an AveragedModel."
    check_type(follower, nn.Module, "follow", "modules", remedy)
    shapes = {name: weight.shape for name, weight in weights.items()}
    inner: object = follower
    while isinstance(inner, nn.Module):
        own = unwrap(inner)
        if own is not model and shapes == {n: w.shape for n, w in named_weights(own).items()}:
            return own
        inner = own._modules.get("module")
    differing = shapes.keys() ^ named_weights(follower).keys()
    only = f": {listing(sorted(differing))} only in one" if differing else ""
    itself = unwrap(follower) is model
    got = "the model itself" if itself else f"{type(follower).__name__} with others{only}"
    remedy = "Pass an average of this very model: same names, same shapes."
    refuse(ValueError, "follow", "a module with the model's parameters", got, remedy)
