"""Mask sets: dicts from dense parameter names to bool tensors. Extract, apply, combine, check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_rsst.distributed.dtensor import local, placed_like
from torch_rsst.distributed.replicas import agreed, replica_group
from torch_rsst.masking.live_weight import MASK, ORIG, make_live
from torch_rsst.masking.mask_values import AVERAGED, check_binary, check_shape, is_binary
from torch_rsst.masking.masked_parameter import NewMasks, find_hook, install
from torch_rsst.masking.names import (
    dense_keys,
    first_names,
    found_among,
    named_refs,
    places_of,
    unwrap,
)
from torch_rsst.masking.parameter_ref import ParameterRef, check_ref, masked_refs
from torch_rsst.masking.tied import check_one_mask, check_shared
from torch_rsst.utils.amounts import check_flag
from torch_rsst.utils.errors import (
    MissingNameError,
    check_type,
    closest,
    listing,
    refuse,
    refuse_name,
)

Masks: TypeAlias = dict[str, Tensor]

THRESHOLD = "Compare with a threshold first: mask > 0.5."


def extract_mask(model_or_state_dict: nn.Module | Mapping[str, Tensor]) -> Masks:
    """Read the masks of a model or of its state dict.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = torch_rsst.custom_from_mask(layer, "weight", torch.tensor([[1, 0]]))
        >>> torch_rsst.extract_mask(layer)
        {'weight': tensor([[ True, False]])}

    A key ``K`` exists only where both ``K_orig`` and ``K_mask`` do. Prefixes of wrappers
    (``module.``, ``_orig_mod.``) are stripped, of a state dict also those of a model's only child, were it called
    ``module``: :func:`apply_mask` knows it by both names. A tied tensor appears once, under its first name.

    Returns:
        bool tensors, new memory, on the devices of the masks.

    Raises:
        TypeError: for anything but a module or a mapping.
        ValueError: where a mask holds values other than 0 and 1, or a tied tensor has several masks, or
            one for some of its names only; where two parameters of a model lie in one memory.
    """
    if isinstance(model_or_state_dict, nn.Module):
        found: Mapping[str, Tensor] = _mask_buffers(model_or_state_dict)
    elif isinstance(model_or_state_dict, Mapping) and all(
        isinstance(key, str) for key in model_or_state_dict
    ):
        found = _masks_of_state_dict(model_or_state_dict)
    else:
        got = type(model_or_state_dict).__name__
        remedy = "Pass the model or model.state_dict()."
        refuse(TypeError, "extract_mask", "a model or state dict", got, remedy)
    return {name: as_bool(mask, name, remedy=AVERAGED) for name, mask in found.items()}


class ModelMasks(Mapping[str, Tensor]):
    """The masks of a model, not copied before they are asked for: then they are bool.

    Code that can read any dtype gets the buffers themselves from ``mask_of``.

    Raises:
        ValueError: where a mask holds values other than 0 and 1.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers = _mask_buffers(model)
        for name, mask in self.buffers.items():
            _checked(mask, name, AVERAGED)

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name].bool()

    def __iter__(self) -> Iterator[str]:
        return iter(self.buffers)

    def __len__(self) -> int:
        return len(self.buffers)


def _mask_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The mask buffers themselves, by dense name, distributed as their parameters are."""
    return {
        name: placed_like(mask, places[0].original)
        for name, places in named_refs(model).items()
        if (mask := places[0].mask) is not None
    }


def _masks_of_state_dict(state: Mapping[str, Tensor]) -> Masks:
    if state and not any(isinstance(value, Tensor) for value in state.values()):
        inner = [key for key, value in state.items() if isinstance(value, Mapping)]
        remedy = (
            f"Pass the model's own, such as checkpoint[{inner[0]!r}]."
            if inner
            else "Pass model.state_dict()."
        )
        refuse(ValueError, "state dict", "tensors", f"none in {listing(state)}", remedy)
    first_names: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    found: dict[str, list[Tensor | None]] = {}
    for name, original, mask in entries_of(state):
        # Sharded and meta tensors have no address of their own; extra state is no tensor.
        if (
            isinstance(original, Tensor)
            and original.layout == torch.strided
            and original.data_ptr()
        ):
            place = (original.data_ptr(), original.shape, original.stride())
            name = first_names.setdefault(place, name)
        found.setdefault(name, []).append(mask)
    for name, masks in found.items():
        check_one_mask(name, masks)
    return {name: masks[0] for name, masks in found.items() if masks[0] is not None}


def entries_of(state: Mapping[str, Any]) -> Iterator[tuple[str, Any, Tensor | None]]:
    """Dense name, value and mask of each entry of a state dict; None for a mask where it is dense."""
    dense_key = dense_keys(state)
    for key, value in state.items():
        own = key.removesuffix(ORIG)
        if own != key and own + MASK in state:
            yield dense_key[key].removesuffix(ORIG), value, state[own + MASK]
        else:
            yield dense_key[key], value, None


def as_bool(mask: Tensor, name: str, *, remedy: str = THRESHOLD) -> Tensor:
    """A 0/1 tensor of any dtype as a new bool tensor.

    Args:
        mask: the tensor.
        name: of its parameter, for messages.
        remedy: what to do about other values.

    Raises:
        TypeError: unless given a tensor.
        ValueError: for other values than 0 and 1.
    """
    _checked(mask, name, remedy)
    return mask.clone() if mask.dtype == torch.bool else mask.bool()


def _checked(mask: Tensor, name: str, remedy: str) -> Tensor:
    """The mask itself, whatever its dtype; raises as :func:`as_bool` does."""
    subject = f"mask of {name!r}"
    check_type(mask, Tensor, subject, "a tensor", "A mask set maps parameter names to tensors.")
    if mask.layout != torch.strided:
        refuse(ValueError, subject, "a dense tensor", mask.layout, "Call to_dense() first.")
    if mask.is_meta:
        got, way_out = "a mask on the meta device", "Materialize the model first."
        refuse(ValueError, subject, "values", got, way_out)
    if mask.dtype != torch.bool and not is_binary(mask):
        refuse(ValueError, subject, "zeros and ones", "other values", remedy)
    return mask


def as_masks(masks: Mapping[str, Tensor]) -> Masks:
    """A mask set as new bool tensors.

    Raises:
        TypeError: unless given a mapping from strings to tensors.
        ValueError: for other values than 0 and 1.
    """
    return {name: as_bool(mask, name) for name, mask in _binary(masks).items()}


def _binary(masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A mask set as it is; raises as ``as_masks`` does."""
    wrong = (
        [f"the name {name!r}" for name in masks if not isinstance(name, str)]
        if isinstance(masks, Mapping)
        else [type(masks).__name__]
    )
    if wrong:
        remedy = "A mask set maps parameter names to tensors."
        refuse(TypeError, "masks", "a mask set", wrong[0], remedy)
    return {name: _checked(mask, name, THRESHOLD) for name, mask in masks.items()}


def apply_mask(model: nn.Module, masks: Mapping[str, Tensor], *, strict: bool = False) -> None:
    """Set the masks of a model exactly, in place; entries can also come back to 1.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> torch_rsst.apply_mask(layer, {"weight": torch.tensor([[True, False]])})
        >>> layer.weight_mask
        tensor([[1., 0.]])

    For each name: ``name`` is replaced by the parameter ``name_orig`` (the same object, at the
    same place), the buffer ``name_mask`` (the parameter's dtype) and a forward pre-hook; where
    they exist, the buffer is overwritten. A tied parameter is masked in all modules that share it, in
    ``model`` or not. Parameters that ``masks`` does not name are left alone. Either all masks are set or, after an error, none.

    Args:
        model: the model, wrapped or not. In a ``DistributedDataParallel`` it is a collective call:
            all ranks must pass the same masks, or all raise.
        masks: dense parameter name → tensor of zeros and ones, of the parameter's shape. A tied parameter
            may have any of its names.
        strict: also require that every parameter that is masked now is named.

    Raises:
        KeyError: for a name that the model does not have, or, if strict, lacks in ``masks``.
        ValueError: for a mask of another shape or with values other than 0 and 1; where modules that share
            a parameter cannot all be masked, or two parameters lie in one memory.
        RuntimeError: where the ranks of a ``DistributedDataParallel`` pass different masks.
    """
    work = agreed(
        replica_group(model),
        lambda: _sites_to_mask(model, masks, strict=check_flag(strict, "strict")),
        lambda work: ((name, mask) for name, _, mask in work),
    )
    of_each: dict[int, Tensor] = {}
    for _, ref, mask in work:
        of_each.setdefault(id(ref.original), mask)
    install([ref for _, ref, _ in work], NewMasks.of(list(of_each.values())))


def _sites_to_mask(
    model: nn.Module, masks: Mapping[str, Tensor], *, strict: bool
) -> list[tuple[str, ParameterRef, Tensor]]:
    refs = places_of(model)
    chosen, names = _binary(masks), first_names(model)
    resolved = {name: _resolve(name, names) for name in chosen}
    _check_one_each(chosen, resolved)
    others = {name: refs[name] for name in refs.keys() - resolved.values()}
    check_shared(others)
    if strict and (left := [name for name, places in others.items() if places[0].is_masked]):
        got = f"none for {listing(sorted(left))}"
        remedy = "Add them, or pass strict=False to leave them as they are."
        refuse(MissingNameError, "masks", "every masked parameter", got, remedy)
    overwritten = {_address(ref.mask) for ref in masked_refs(unwrap(model).modules())}
    work: list[tuple[str, ParameterRef, Tensor]] = []
    for name, mask in chosen.items():
        if mask.is_complex() or _address(mask) in overwritten:
            # A copy of a mask of the model, which may be written before it is read.
            mask = mask != 0
        for ref in refs[resolved[name]]:
            check_ref(ref.module, ref.name)
            remedy = "Masks are made for one architecture; extract them from the same one."
            check_shape(f"mask of {name!r}", mask, ref.original, remedy)
            work.append((resolved[name], ref, mask))
    return work


def _address(mask: Tensor | None) -> int:
    return 0 if mask is None else local(mask).untyped_storage().data_ptr()


def _check_one_each(masks: Mapping[str, Tensor], resolved: Mapping[str, str]) -> None:
    """Raise a ValueError where a tied parameter is given different masks under several of its names."""
    given: dict[str, tuple[str, Tensor]] = {}
    for name, mask in masks.items():
        other, first = given.setdefault(resolved[name], (name, mask))
        if first is not mask and not (
            first.shape == mask.shape and torch.equal(local(first) != 0, local(mask) != 0)
        ):
            expected, got = f"that of {other!r}, which it is tied to", "another one"
            refuse(ValueError, f"mask {name!r}", expected, got, "Pass one of the two.")


def _resolve(name: str, names: Mapping[str, str]) -> str:
    found = found_among(name, names)
    if found is not None:
        return names[found]
    plain = name.removesuffix(ORIG)
    near = plain if plain in names else closest(name, names, 0.85)
    refuse_name(f"mask {name!r}", names, f"Did you mean {near!r}? " if near else "")


def penalty_mask(current_mask: Mapping[str, Tensor], refill_mask: Mapping[str, Tensor]) -> Masks:
    """The penalized set P: alive now, meant to go.

    Example:
        >>> current, refill = torch.tensor([True, True, False]), torch.tensor([True, False, False])
        >>> torch_rsst.penalty_mask({"weight": current}, {"weight": refill})
        {'weight': tensor([False,  True, False])}

    P = (refill_mask == 0) & (current_mask == 1). A key only in ``refill_mask`` counts as wholly
    alive; a key only in ``current_mask`` is not penalized and does not appear.

    Raises:
        ValueError: where the shapes of the two masks of a name differ.
    """
    penalized: Masks = {}
    alive = _binary(current_mask)
    for name, refill in _binary(refill_mask).items():
        go = refill.logical_not()
        if name in alive:
            current = alive[name]
            remedy = "Both masks must come from the same model."
            check_shape(f"refill mask of {name!r}", go, current, remedy, of="current mask")
            go &= placed_like(current.bool(), go)
        penalized[name] = go
    return penalized


def mask_of(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The mask of ``name`` as it lies in memory, in whatever dtype; None where there is none.

    On the weight's device and ranks.
    """
    stored = masks.buffers if isinstance(masks, ModelMasks) else masks
    return placed_like(stored[name], weights[name]) if name in stored else None


def alive_in(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], name: str) -> Tensor:
    """The mask of ``name`` as bool, all ones where there is none, on the weight's device and ranks."""
    mask = mask_of(weights, masks, name)
    return torch.ones_like(weights[name], dtype=torch.bool) if mask is None else mask.bool()


def check_masks(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Masks:
    """Masks as bool, on their weights' devices; they share memory with what is given, where they can.

    Raises:
        KeyError: for a name without a weight.
        ValueError: for another shape or other values than 0 and 1.
    """
    checked: Masks = {}
    for name, mask in _binary(masks).items():
        if name not in weights:
            refuse_name(f"mask {name!r}", weights)
        remedy = "Take the masks from the same model."
        check_shape(f"mask of {name!r}", mask, weights[name], remedy)
        checked[name] = placed_like(mask.bool(), weights[name])
    return checked


def refresh(model: nn.Module) -> nn.Module:
    """Renew every stored product of weight and mask, in place, without a forward pass.

    Example:
        >>> recurrent = torch.nn.LSTM(2, 3)
        >>> torch_rsst.apply_mask(recurrent, {"weight_hh_l0": torch.zeros(12, 3)})
        >>> _ = recurrent.load_state_dict({k: v + 1 for k, v in recurrent.state_dict().items()})
        >>> _ = torch_rsst.refresh(recurrent)

    A mask of this library needs it nowhere: ``weight`` is computed when it is read. It serves code
    that reads, before the next forward pass, the list of weights that a recurrent layer keeps, and
    modules that a class of ``torch.nn.utils.prune`` has masked by itself, such as
    ``L1Unstructured.apply(layer, "weight", 0.5)``: their ``weight``, which was stored and cannot be copied, is
    computed from now on, so that :func:`copy.deepcopy` works. Where such a class has masked a tied
    weight for one module only, all that share it get its mask.

    Returns:
        the model that was given.

    Raises:
        ValueError: where modules that share a parameter have different masks for it, or a mask holds other values than 0
            and 1.
    """
    for ref in masked_refs(unwrap(model).modules()):
        check_binary(ref.mask, ref)
    tied = {name: places for name, places in places_of(model).items() if len(places) > 1}
    masked = {n: found for n, p in tied.items() if (found := [ref for ref in p if ref.is_masked])}
    check_shared(masked)
    half = [name for name, found in masked.items() if len(found) < len(tied[name])]
    alive = [mask for name in half if (mask := masked[name][0].alive) is not None]
    install([ref for name in half for ref in tied[name]], NewMasks.of(alive))
    for ref in masked_refs(unwrap(model).modules()):
        make_live(ref.module, ref.name)
        if hook := find_hook(ref):
            hook[1](ref.module, ())
    return model
