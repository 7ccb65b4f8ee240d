"""PyTorch's own pruning functions, made safe: the same call and result, without their known faults.

Around each stock function: the parameter keeps its place, so that optimizer state stays with it; the
masked ``weight`` is live, so that it is never stale and can be copied; a call that fails changes
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.prune import BasePruningMethod

from torch_rsst.distributed.dtensor import is_sharded
from torch_rsst.distributed.fsdp import reshard
from torch_rsst.masking.freezing import end_freeze, frozen_now
from torch_rsst.masking.freezing import freeze_zeros as hold_at_zero
from torch_rsst.masking.live_weight import ORIG, make_live, make_plain
from torch_rsst.masking.mask_values import check_binary
from torch_rsst.masking.masked_parameter import MaskHook, find_hook, restore, zero
from torch_rsst.masking.parameter_ref import ParameterRef
from torch_rsst.masking.removal import warn_unfrozen
from torch_rsst.masking.rollback import AllOrNothing, place_kept
from torch_rsst.utils.errors import refuse

F = TypeVar("F", bound=Callable[..., Any])


def _safe(function: F) -> F:
    """A stock function ``f(module, name, …)`` that keeps place and product, and is all or nothing."""

    @functools.wraps(function)
    def safe(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(module, nn.Module):  # PyTorch's own error
            return function(module, name, *args, **kwargs)
        ref = ParameterRef(module, name)
        if function is not prune.remove:
            _refuse_shards(module, name)
            reshard([module])
        mask = ref.mask
        check_binary(mask, ref)
        with AllOrNothing([ref]) as undo, place_kept(ref):
            undo.append(frozen_now([ref]))
            result = function(module, name, *args, **kwargs)
            (make_live if ref.is_masked else make_plain)(module, name)
            if mask is None and ref.is_masked:
                end_freeze(ref)
            if mask is not None and not ref.is_masked:
                zero(ref.original, mask)  # PyTorch multiplies, and NaN · 0 is NaN
        return result

    safe.__module__ = __name__  # pickled by reference to this one
    return safe  # type: ignore[return-value] # functools.wraps keeps the signature


def _refuse_shards(module: nn.Module, name: str) -> None:
    held = [module._parameters.get(key) for key in (name, name + ORIG)]
    if any(is_sharded(parameter) for parameter in held):
        remedy = "Use global_unstructured with GlobalL1, fillback or apply_mask: they know shards."
        got = "one in parts on several ranks"
        refuse(ValueError, f"parameter {name!r}", "a whole tensor", got, remedy)


# How hooks are removed that restore() does the same for.
_KNOWN = (BasePruningMethod.remove, MaskHook.remove)

identity = _safe(prune.identity)
random_unstructured = _safe(prune.random_unstructured)
l1_unstructured = _safe(prune.l1_unstructured)
random_structured = _safe(prune.random_structured)
ln_structured = _safe(prune.ln_structured)
custom_from_mask = _safe(prune.custom_from_mask)


@functools.wraps(prune.remove)
def remove(module: nn.Module, name: str, *, freeze_zeros: bool | None = None) -> nn.Module:
    """As PyTorch's, and ``freeze_zeros`` as :func:`torch_rsst.remove_all` has it, with its warning.

    A hook whose own ``remove`` is not known here may do anything: PyTorch calls it.
    """
    ref = ParameterRef(module, name) if isinstance(module, nn.Module) else None
    found = find_hook(ref) if ref is not None and ref.is_masked else None
    alive = None if ref is None else ref.alive
    zeros = [] if ref is None or alive is None else [(ref, ~alive)]
    hold_zeros = partial(hold_at_zero, zeros) if freeze_zeros else None
    if ref is None or found is None or type(found[1]).remove not in _KNOWN:
        _safe(prune.remove)(module, name)  # type: ignore[no-untyped-call]
        if hold_zeros is not None:
            hold_zeros()
    else:
        restore([ref], hold_zeros=hold_zeros)
    if freeze_zeros is None:
        warn_unfrozen(dead for _, dead in zeros)
    return module


remove.__module__ = __name__
