"""State dicts between dense and masked models: the masks are made to fit, or chosen, never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from torch_rsst.distributed.dtensor import is_sharded, placed_like
from torch_rsst.masking.dense_scope import check_masks_in_place
from torch_rsst.masking.live_weight import MASK, ORIG
from torch_rsst.masking.mask_sets import apply_mask, entries_of, extract_mask
from torch_rsst.masking.mask_undo import is_writable
from torch_rsst.masking.mask_values import check_binary
from torch_rsst.masking.names import (
    dense_keys,
    first_names,
    found_among,
    masked_names,
    masked_places,
    unwrap,
    without_wrappers,
)
from torch_rsst.masking.removal import remove_all
from torch_rsst.masking.rollback import AllOrNothing
from torch_rsst.utils.errors import MissingNameError, check_choice, check_type, listing, refuse

MaskChoice: TypeAlias = Literal["keep", "zeros", "remove"]
MASK_CHOICES = ("keep", "zeros", "remove")


def prepare_from_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Give a model the masks of a state dict, so that ``load_state_dict(strict=True)`` works.

    Example:
        >>> pruned, fresh = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> torch_rsst.apply_mask(pruned, {"weight": torch.tensor([[True, False]])})
        >>> _ = torch_rsst.prepare_from_state_dict(fresh, pruned.state_dict())
        >>> fresh.load_state_dict(pruned.state_dict())
        <All keys matched successfully>

    Changes the model as :func:`apply_mask` does, and raises as it does. Parameters that are tied in the state dict
    need not be tied in the model: each gets the mask.

    Returns:
        the model that was given.

    Raises:
        ValueError: where a parameter is masked in the model and dense in the state dict: what
            becomes of its mask is yours to say, see :func:`load_dense_state_dict`. Where parameters that are tied
            in the model are masked and dense in the state dict.
    """
    extract_mask(state_dict)  # refuses what is no state dict, and masks that contradict each other
    masks = {name: mask for name, _, mask in entries_of(state_dict) if mask is not None}
    names = first_names(model)
    given = {
        names[found]: name for name in masks if (found := found_among(name, names)) is not None
    }
    for name, _, mask in entries_of(state_dict):
        first = names.get(found_among(name, names) or "") if mask is None else None
        if first in given:
            expected = f"a mask, as {given[first]!r} has, which it is tied to in the model"
            remedy = "Build the model without this tie, or mask both before the state dict is made."
            refuse(ValueError, f"state_dict: {name!r}", expected, "dense weights", remedy)
    if left := masked_names(model) - given.keys():
        expected = "a mask for every parameter that the model masks"
        got = f"dense weights for {listing(sorted(left))}"
        remedy = "Call load_dense_state_dict(model, state_dict, mask='keep'), 'zeros' or 'remove'."
        refuse(ValueError, "state_dict", expected, got, remedy)
    apply_mask(model, masks)
    return model


def load_dense_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, mask: MaskChoice
) -> nn.Module:
    """Load a dense state dict into a masked model, in place, all of it or nothing.

    Example:
        >>> trained, pruned = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> torch_rsst.apply_mask(pruned, {"weight": torch.tensor([[True, False]])})
        >>> _ = torch_rsst.load_dense_state_dict(pruned, trained.state_dict(), mask="keep")
        >>> torch.equal(pruned.weight_orig, trained.weight), pruned.weight_mask
        (True, tensor([[1., 0.]]))

    Args:
        model: the model; wrapped or not.
        state_dict: of the dense model; its keys must be the model's dense names.
        mask: what becomes of the masks: ``"keep"`` them, masking the loaded weights;
            ``"zeros"`` masks what is exactly 0 in the loaded weights of the parameters that are
            masked now (the state dict of a model after :func:`remove_all`); ``"remove"`` them.

    Returns:
        the model that was given.

    Raises:
        KeyError: for keys that are missing or unknown.
        ValueError: for other shapes, another choice, different values for the names of one tied parameter, or a state
            dict that holds masks itself.
    """
    check_choice("mask", mask, MASK_CHOICES)
    check_type(state_dict, Mapping, "state_dict", "a dict", "Pass dense_model.state_dict().")
    inner = unwrap(model)
    check_masks_in_place("load_dense_state_dict", inner.modules())
    shapes = _dense_shapes(inner)
    loaded = {name: state_dict[key] for key, name in dense_keys(state_dict, shapes).items()}
    loaded = _under_all_names(inner, loaded)
    _check_fits(shapes, loaded)
    for ref in masked_places(inner):
        check_binary(ref.mask, ref)
    tensors = [*inner.parameters(), *inner.buffers()]
    before = [(t, t.detach().clone()) for t in tensors if not t.is_meta and is_writable(t)]
    with torch.no_grad(), AllOrNothing(masked_places(model)) as undo:
        undo += [partial(tensor.copy_, value) for tensor, value in before]
        _load(inner, loaded, mask)
    return model


def _under_all_names(model: nn.Module, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Values with those of tied parameters under each of their names, of which files may hold one."""
    first, found = first_names(model), dict(loaded)
    held: dict[str, str] = {}
    for name in (name for name in first if name in loaded):
        other = held.setdefault(first[name], name)
        if not _same(loaded[name], loaded[other]):
            expected = f"one value, as the model ties them, for {other!r} and {name!r}"
            remedy = "Untie the model's parameters, or leave one of the names out."
            refuse(ValueError, "state_dict", expected, "different ones", remedy)
    return found | {name: loaded[held[own]] for name, own in first.items() if own in held}


def _same(one: Any, other: Any) -> bool:
    if one is other or not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return one is other
    if one.shape != other.shape or one.is_meta or other.is_meta:
        return one.shape == other.shape
    other = other.to(one.device)
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _load(model: nn.Module, loaded: Mapping[str, Tensor], mask: MaskChoice) -> None:
    if mask == "zeros":
        apply_mask(model, {name: loaded[name] != 0 for name in extract_mask(model)})
    elif mask == "remove":
        remove_all(model, freeze_zeros=False)
    own = model.state_dict()
    given = {
        key: placed_like(loaded[name], own[key]) if is_sharded(own[key]) else loaded[name]
        for key, name in _dense_names(own).items()
        if name in loaded
    }
    model.load_state_dict(given, strict=False)  # what is not there is a mask, and stays


def _dense_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Each key of the model's own state dict → the name it has in the dense model; masks are left out."""
    names = {key: without_wrappers(key) for key in state}
    masked = {key.removesuffix(ORIG) for key in state if key.endswith(ORIG)}
    masked = {key for key in masked if key + MASK in state}
    return {
        key: name.removesuffix(ORIG) if key.removesuffix(ORIG) in masked else name
        for key, name in names.items()
        if key.removesuffix(MASK) not in masked
    }


def _dense_shapes(model: nn.Module) -> dict[str, torch.Size | None]:
    state = model.state_dict()
    return {name: getattr(state[key], "shape", None) for key, name in _dense_names(state).items()}


def _check_fits(expected: Mapping[str, torch.Size | None], loaded: Mapping[str, Any]) -> None:
    subject = "state_dict"
    if extract_mask(loaded):
        remedy = "Call prepare_from_state_dict(model, state_dict), then model.load_state_dict."
        got = "one with masks of its own"
        refuse(ValueError, subject, "a dense one", got, remedy)
    remedy = "Pass the full state dict of the same architecture."
    if wrong := expected.keys() ^ loaded.keys():
        missing, unknown = sorted(wrong - loaded.keys()), sorted(wrong - expected.keys())
        got = " and ".join(
            [f"none of {listing(missing)}"] * bool(missing)
            + [f"unknown {listing(unknown)}"] * bool(unknown)
        )
        refuse(MissingNameError, subject, "the model's keys", got, remedy)
    for name, shape in expected.items():
        if getattr(loaded[name], "shape", None) != shape:
            got = f"{getattr(loaded[name], 'shape', type(loaded[name]).__name__)}"
            refuse(ValueError, f"{subject}: {name!r}", f"{shape}", got, remedy)
