"""One parameter and its mask: mask it, restore it; all or nothing.

This is the only room that touches PyTorch's reparametrization: ``weight`` becomes the parameter
``weight_orig`` (the same object, at the same place in the parameter order), the buffer
``weight_mask`` and their product ``weight``, with a pruning hook as PyTorch leaves one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod, PruningContainer

from torch_rsst.distributed.dtensor import is_sharded, local, placed_like
from torch_rsst.distributed.fsdp import rename_parameter
from torch_rsst.distributed.replicas import agreed
from torch_rsst.masking.entry_blocks import as_bytes
from torch_rsst.masking.freezing import end_freeze, frozen_now
from torch_rsst.masking.live_weight import (
    MASK,
    ORIG,
    PICKLE_FORMAT,
    check_pickle,
    is_live,
    make_live,
    make_plain,
    product,
)
from torch_rsst.masking.mask_undo import is_writable
from torch_rsst.masking.mask_values import check_binary, is_full
from torch_rsst.masking.masked_product import is_in_graph
from torch_rsst.masking.parameter_ref import ParameterRef, check_ref, check_scores
from torch_rsst.masking.rollback import AllOrNothing, place_kept
from torch_rsst.masking.tied import by_parameter, masked_with, masks_of_several, sharing
from torch_rsst.utils.errors import refuse
from torch_rsst.utils.large_pages import with_large_pages


@dataclass(frozen=True)
class NewMasks:
    """Masks that exist once, where they are used.

    Attributes:
        write: sets tensors to them, of whatever dtype.
    """

    write: Callable[[Sequence[Tensor]], object]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> NewMasks:
        """Tensors of zeros and ones."""

        def write(outs: Sequence[Tensor]) -> None:
            for out, alive in zip(outs, tensors, strict=True):
                local(out).copy_(as_bytes(local(placed_like(alive, out))))

        return cls(write)

    def as_tensors(self, refs: Sequence[ParameterRef]) -> list[Tensor]:
        """By themselves, as bool, one for each parameter."""
        originals = [places[0].original for places in by_parameter(refs)]
        alive = [torch.empty_like(each, dtype=torch.bool) for each in originals]
        self.write(alive)
        return alive


class _Masked(BasePruningMethod):
    """How a hook of ours gives the masked weight and makes it permanent."""

    def __call__(self, module: nn.Module, inputs: object) -> None:
        """Before a forward pass; only recurrent layers, which read a list of weights, need it."""
        if isinstance(module, nn.RNNBase):
            setattr(module, self._tensor_name, self.apply_mask(module))

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The masked weight; see :func:`torch_rsst.masking.live_weight.product`."""
        return product(module, self._tensor_name)

    def remove(self, module: nn.Module) -> None:
        """Make the pruning permanent: ``weight`` is a parameter again, zero where it was masked.

        As with the stock methods, the caller deletes the hook: :func:`torch.nn.utils.prune.remove`
        and other libraries do. Other modules that share the parameter lose mask and hook, too.
        """
        ref = ParameterRef(module, self._tensor_name)
        others = masked_with([ref])
        own = module._parameters
        restore([other for other in others if other.module._parameters is not own])
        original, mask = ref.original, ref.mask
        set_plain(ref, original)
        zero(original, mask)
        for other in others:  # copies by copy.copy() have the same dicts
            make_plain(other.module, other.name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles of masked models name public paths only; see :data:`PICKLE_FORMAT`."""
        kind = next((kind for kind, cls in _HOOKS.items() if type(self) is cls), None)
        if kind is None:
            return super().__reduce_ex__(protocol)
        return _rebuild_mask_hook, (PICKLE_FORMAT, kind, vars(self))


class MaskHook(_Masked):
    """The hook that marks a parameter as masked, and what our pruning methods share.

    Unlike the stock methods it holds no tensor, keeps the order of parameters, scores
    ``weight_orig`` instead of the product, changes nothing when it fails, and replaces its own
    earlier state instead of stacking. Subclasses override :meth:`compute_mask`, which is pure;
    what they leave in the model is a plain hook, so that a pruned model pickles whatever
    arguments they had.
    """

    PRUNING_TYPE = "global"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask as it is."""
        return default_mask

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        *args: Any,
        importance_scores: Tensor | None = None,
        process_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> BasePruningMethod:
        """Mask one parameter, as :meth:`torch.nn.utils.prune.BasePruningMethod.apply` does.

        With a ``process_group``, all its ranks must choose the same mask, or all raise.
        """

        def choose() -> tuple[MaskHook, ParameterRef, Tensor]:
            method, ref = cls(*args, **kwargs), check_ref(module, name)
            return method, ref, method._choose(ref, importance_scores)

        method, ref, alive = agreed(
            process_group, choose, lambda chosen: [(str(chosen[1]), chosen[2])]
        )
        method._install(ref, alive)
        method._tensor_name = name
        return method

    def _choose(self, ref: ParameterRef, importance_scores: Tensor | None) -> Tensor:
        """What is to be alive; nothing is touched."""
        scores = check_scores(ref, importance_scores)
        check_binary(ref.mask, ref)
        default = torch.ones_like(ref.original) if ref.mask is None else ref.mask.clone()
        mask = self._new_mask(scores, default.detach(), given=importance_scores is not None)
        return mask != 0

    def _install(self, ref: ParameterRef, alive: Tensor) -> None:
        install([ref], NewMasks.of([alive]))

    def _new_mask(self, scores: Tensor, mask: Tensor, *, given: bool) -> Tensor:
        """The mask from the weights, or from scores that the caller has given."""
        return self.compute_mask(scores, default_mask=mask)


class MaskContainer(_Masked, PruningContainer):
    """Stock methods that came first and ours, as PyTorch composes them."""


_HOOKS: dict[str, type[_Masked]] = {"mask": MaskHook, "container": MaskContainer}


def _rebuild_mask_hook(version: int, kind: str, attributes: dict[str, Any]) -> BasePruningMethod:
    """What a pickle calls, by the path ``torch_rsst._rebuild_mask_hook``, for a hook of ours."""
    check_pickle(version)
    hook = _HOOKS[kind].__new__(_HOOKS[kind])
    hook.__dict__.update(attributes)
    return hook


_rebuild_mask_hook.__module__ = "torch_rsst"


def install(refs: Sequence[ParameterRef], new: NewMasks) -> None:
    """Set masks exactly, in place, all or none.

    Args:
        refs: where to; all modules that share a parameter share its mask, listed or not.
        new: the masks, one for each parameter in the order of ``refs``.

    Raises:
        ValueError: where one that is not listed cannot be masked.
    """
    refs = [*refs, *(check_ref(ref.module, ref.name) for ref in sharing(refs))]
    # A mask made in inference mode could not be changed outside it.
    with torch.inference_mode(False), torch.no_grad():
        several = masks_of_several(refs)
        masks = {
            id(tied[0].original): _mask_buffer(tied[0], several) for tied in by_parameter(refs)
        }
        changed = [ref for ref in refs if not _holds(ref, masks[id(ref.original)])]
        dense = [ref for ref in changed if not ref.is_masked]
        with AllOrNothing(changed, written=refs) as undo:
            undo.append(frozen_now(dense))
            for ref in changed:
                reparametrize(ref, masks[id(ref.original)])
            hooks = [set_hook(ref) for ref in changed]
            new.write(list(masks.values()))
            for ref, hook in zip(changed, hooks, strict=True):
                hook(ref.module, ())
            for ref in dense:
                end_freeze(ref)


def share_mask(ref: ParameterRef, others: Sequence[ParameterRef]) -> None:
    """Mask other places of a parameter as this one is, all with hooks of ours, which undo it for all."""
    mask = ref.mask
    assert mask is not None, "only masks that are there are shared"
    for each in [ref, *others] if others else []:
        reparametrize(each, mask)
        set_hook(each)(each.module, ())


def _holds(ref: ParameterRef, mask: Tensor) -> bool:
    """Whether a parameter has this mask, and all else that we leave in a module."""
    if ref.mask is not mask or isinstance(ref.module, nn.RNNBase):
        return False
    found = find_hook(ref)
    return found is not None and isinstance(found[1], _Masked) and is_live(ref.module, ref.name)


def _mask_buffer(ref: ParameterRef, several: Container[int]) -> Tensor:
    """The parameter's mask; a new one where there is none, or where the id of its mask is in ``several``."""
    mask, original = ref.mask, ref.original
    if mask is None:
        return with_large_pages(torch.empty_like(original, requires_grad=False))
    if is_sharded(original) and not is_sharded(mask):
        return placed_like(mask, original).clone()  # masked before it was sharded
    if not is_writable(mask):
        return mask.clone(memory_format=torch.contiguous_format)
    # A backward pass that is still to come needs the mask of its forward pass.
    return mask.clone() if is_in_graph(mask) or id(mask) in several else mask


def find_hook(ref: ParameterRef) -> tuple[int, BasePruningMethod] | None:
    """The pruning hook of a parameter and its key."""
    for key, hook in ref.module._forward_pre_hooks.items():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == ref.name:
            return key, hook
    return None


def reparametrize(ref: ParameterRef, mask: Tensor) -> None:
    """``name_orig``, ``name_mask`` and the live ``name``; no hook."""
    if not ref.is_masked:
        registry = ref.module._parameters
        with place_kept(ref):
            registry[ref.name + ORIG] = registry.pop(ref.name)
            ref.module.register_buffer(ref.name + MASK, mask)
        rename_parameter(ref.module, ref.name, ref.name + ORIG)
    elif ref.mask is not mask:
        ref.module._buffers[ref.name + MASK] = mask
    make_live(ref.module, ref.name)


def set_hook(ref: ParameterRef) -> _Masked:
    """Leave one hook of ours, alone or behind the stock methods that came before."""
    found = find_hook(ref)
    if found is not None and isinstance(found[1], MaskHook):
        return found[1]
    hook = MaskHook()
    hook._tensor_name = ref.name
    if found is None:
        ref.module.register_forward_pre_hook(hook)
        return hook
    key, present = found
    earlier = tuple(present) if isinstance(present, PruningContainer) else (present,)
    stock = [method for method in earlier if not isinstance(method, MaskHook)]
    container = MaskContainer()
    container._tensor_name = ref.name
    for method in (*stock, hook):
        container.add_pruning_method(method)
    ref.module._forward_pre_hooks[key] = container
    return container


def restore(refs: Sequence[ParameterRef], *, last: Callable[[], object] | None = None) -> None:
    """Make the pruning of masked refs permanent and delete their hooks, ours or stock; all or none.

    Args:
        refs: masked ones, with values.
        last: called as the last step; where it raises, everything is put back.
    """
    masked = [(ref.original, ref.mask) for ref in refs]  # before they go
    for ref, (_, mask) in zip(refs, masked, strict=True):
        if mask is not None and mask.is_meta:
            got, remedy = "one on the meta device", "Materialize the model first."
            refuse(ValueError, f"mask of {ref}", "values", got, remedy)
        check_binary(mask, ref)
    with torch.no_grad(), AllOrNothing(refs) as undo:
        undo.append(frozen_now(refs))
        for ref in refs:
            found = find_hook(ref)
            set_plain(ref, ref.original)
            if found is not None:
                del ref.module._forward_pre_hooks[found[0]]
        for original, mask in masked:
            if not is_full(mask):
                own, dead = local(original), local(_dead(original, mask))
                undo.append(partial(own.index_put_, (dead,), own[dead]))
                zero(original, mask)
        if last is not None:
            last()


def zero(original: nn.Parameter, mask: Tensor | None) -> None:
    """Set a parameter to 0 where its mask is 0."""
    with torch.no_grad():
        local(original).masked_fill_(local(_dead(original, mask)), 0.0)


def _dead(original: nn.Parameter, mask: Tensor | None) -> Tensor:
    assert mask is not None, "only masked refs are made permanent"
    return placed_like(mask == 0, original)


def set_plain(ref: ParameterRef, parameter: nn.Parameter) -> None:
    """A parameter under its dense name, at its place; no mask, no property, no stored product."""
    module = ref.module
    rename_parameter(module, ref.name + ORIG, ref.name)
    make_plain(module, ref.name)
    module.__dict__.pop(ref.name, None)
    if not ref.is_masked:  # by now, through a copy by copy.copy(), which has the same dicts
        return
    del module._buffers[ref.name + MASK]
    with place_kept(ref):
        del module._parameters[ref.name + ORIG]
        # Through setattr, which recurrent layers listen to.
        setattr(module, ref.name, parameter)
