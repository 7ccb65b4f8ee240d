"""PyTorch's own pruning functions, made safe: the same call and result, without their known faults.

Around each stock function: the parameter keeps its place, so that optimizer state stays with it; the
masked ``weight`` is live, so that it is never stale and can be copied; a call that fails changes
nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.prune import BasePruningMethod

from torch_rsst.distributed.dtensor import is_sharded
from torch_rsst.distributed.fsdp import reshard
from torch_rsst.distributed.replicas import agreed, agreed_on_first, warn_of_draws
from torch_rsst.masking.dense_scope import check_masks_in_place
from torch_rsst.masking.freezing import end_freeze, frozen_now
from torch_rsst.masking.live_weight import make_live, make_plain
from torch_rsst.masking.mask_sets import THRESHOLD
from torch_rsst.masking.mask_values import check_binary, is_binary
from torch_rsst.masking.masked_parameter import MaskHook, find_hook, restore, share_mask, zero
from torch_rsst.masking.parameter_ref import ParameterRef, check_not_parametrized, check_ref
from torch_rsst.masking.removal import what_becomes_of
from torch_rsst.masking.rollback import AllOrNothing, place_kept
from torch_rsst.masking.tied import masked_with, sharing
from torch_rsst.utils.errors import check_type, refuse


def _ref(module: nn.Module, name: object) -> ParameterRef:
    check_type(name, str, "name", "the name of a parameter", "Pass its name, as in 'weight'.")
    return ParameterRef(module, str(name))


def _without_graph(value: Any) -> Any:
    """Masks and scores take no gradients, and what the hook keeps of them must be copied with the module."""
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def _safe(function: Callable[..., Any], *, draws: bool = False) -> Callable[..., Any]:
    """A stock function ``f(module, name, …)`` that keeps place and product, and is all or nothing.

    Args:
        function: of :mod:`torch.nn.utils.prune`.
        draws: whether it draws random numbers.
    """

    @functools.wraps(function)
    def safe(
        module: nn.Module,
        name: str,
        *args: Any,
        process_group: dist.ProcessGroup | None = None,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(module, nn.Module):  # PyTorch's own error
            return function(module, name, *args, **kwargs)
        ref = _ref(module, name)
        if draws:
            warn_of_draws(function.__name__, process_group)
        check_masks_in_place(function.__name__, [module])
        reshard([module])
        args = tuple(map(_without_graph, args))
        kwargs = {key: _without_graph(value) for key, value in kwargs.items()}
        mask, others = ref.mask, sharing([ref]) if ref.held is not None else []

        def act() -> Any:
            if function is not prune.remove:
                check_not_parametrized(ref)
                _refuse_shards(ref)
            check_binary(mask, ref)
            for other in others:
                check_ref(other.module, other.name)
            if function is prune.custom_from_mask:
                refuse_fractions(args[0] if args else kwargs.get("mask"), ref)
            result = function(module, name, *args, **kwargs)
            refuse_fractions(ref.mask, ref)
            return result

        # A mask made in inference mode could not be changed outside it.
        kept = AllOrNothing([ref, *others])
        with torch.inference_mode(False), torch.no_grad(), kept as undo, place_kept(ref):
            undo.append(frozen_now([ref, *others]))
            result = (agreed_on_first if draws else agreed)(
                process_group, act, lambda _: [] if ref.mask is None else [(str(ref), ref.mask)]
            )
            if ref.is_masked:
                make_live(module, name)
                if mask is None:
                    end_freeze(ref)
                share_mask(ref, others)
            else:
                restore([other for other in others if other.is_masked])
                for each in (ref, *others):
                    make_plain(each.module, each.name)
                if mask is not None:
                    zero(ref.original, mask)  # PyTorch multiplies, and NaN · 0 is NaN
        return result

    safe.__module__ = __name__  # pickled by reference to this one
    safe.__doc__ = f"{function.__doc__}{_GROUP}"
    safe.__signature__ = _with_process_group(function)  # type: ignore[attr-defined] # inspect's
    return safe


_GROUP = """
    process_group: for replicas of one model on several ranks: all ranks must choose the same entries,
        or all raise. What a random method chooses on the first rank is taken on all; without a group
        it warns there. Other modules that share the parameter are masked, too, unless ``gc.freeze()`` hides them.
"""


def _with_process_group(function: Callable[..., Any]) -> inspect.Signature:
    known = inspect.signature(function)
    group = inspect.Parameter("process_group", inspect.Parameter.KEYWORD_ONLY, default=None)
    return known.replace(parameters=[*known.parameters.values(), group])


def _refuse_shards(ref: ParameterRef) -> None:
    if is_sharded(ref.held):
        remedy = "Use global_unstructured with GlobalL1, fillback or apply_mask: they know shards."
        got = "one in parts on several ranks"
        refuse(ValueError, f"parameter {ref}", "a whole tensor", got, remedy)


def refuse_fractions(mask: object, subject: object) -> None:
    """Raise a ValueError for a mask that is to be set and holds other values than 0 and 1."""
    if not isinstance(mask, Tensor) or mask.is_meta or mask.layout != torch.strided:
        return  # PyTorch's own errors, if any
    if mask.dtype != torch.bool and not is_binary(mask):
        refuse(ValueError, f"mask of {subject}", "zeros and ones", "other values", THRESHOLD)


# How hooks are removed that restore() does the same for.
_KNOWN = (BasePruningMethod.remove, MaskHook.remove)

identity = _safe(prune.identity)
random_unstructured = _safe(prune.random_unstructured, draws=True)
l1_unstructured = _safe(prune.l1_unstructured)
random_structured = _safe(prune.random_structured, draws=True)
ln_structured = _safe(prune.ln_structured)
custom_from_mask = _safe(prune.custom_from_mask)
_remove = _safe(prune.remove)


@functools.wraps(prune.remove)
def remove(module: nn.Module, name: str, *, freeze_zeros: bool | None = None) -> nn.Module:
    """As PyTorch's, and ``freeze_zeros`` as :func:`torch_rsst.remove_all` has it, with its warning.

    A hook whose own ``remove`` is not known here may do anything: PyTorch calls it.
    """
    ref = _ref(module, name) if isinstance(module, nn.Module) else None
    found = find_hook(ref) if ref is not None and ref.is_masked else None
    alive = None if ref is None else ref.alive
    zeros = [] if ref is None or alive is None else [(ref, ~alive)]
    last = what_becomes_of(zeros, freeze_zeros)
    if ref is None or found is None or type(found[1]).remove not in _KNOWN:
        _remove(module, name)
        if last is not None:
            last()
    else:
        restore([ref, *masked_with([ref])], last=last)
    return module


remove.__module__ = __name__
