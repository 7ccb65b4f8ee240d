"""Masks hold zeros and ones: what averaging (EMA, SWA) has made of them is found and named."""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from torch_rsst.distributed.dtensor import Ranks, local
from torch_rsst.masking.entry_blocks import Scratch, block_indices
from torch_rsst.utils.errors import FractionalMaskWarning, message, refuse

AVERAGED = (
    "Averaging buffers (EMA, SWA) makes fractions of masks: leave buffers out of the average "
    "(use_buffers=False) or average before pruning, and set the masks again with "
    "torch_rsst.apply_mask(model, masks), from the trained model or a checkpoint."
)


_ORDERED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_binary(mask: Tensor) -> bool:
    """Whether a mask holds nothing but 0 and 1, on all ranks."""
    part = local(mask).detach()
    # Complex numbers have no order, products of integers wrap around.
    if part.dtype not in _ORDERED:
        part = part.float() if part.is_floating_point() else ((part != 0) & (part != 1)).float() * 2
    if part.is_contiguous():
        part = part.view(-1)  # in fewer blocks
    scratch, most = Scratch(part, part.dtype), [part.new_zeros(())]
    for index in block_indices(part):
        own = part[index]
        # m − m²; comparing takes several times as long
        rest = torch.addcmul(own, own, own, value=-1, out=scratch.shaped(own))
        most.append(rest.abs_().amax())
    odd = torch.stack(most).amax() != 0  # of a NaN too
    return not int(Ranks.of([mask]).add_up(odd.int()))


def is_full(mask: Tensor | None) -> bool:
    """Whether a mask has no zeros on this rank."""
    if mask is None:
        return False
    part = local(mask)
    if part.dtype in _ORDERED or part.dtype == torch.bool:  # the least is found faster than zeros
        return not part.numel() or bool(part.amin() > 0)
    return bool((part.float() if part.is_floating_point() else part != 0).all())


def check_binary(mask: Tensor | None, subject: object) -> None:
    """Raise a ValueError for a mask of a model that holds other values than 0 and 1."""
    if mask is not None and not mask.is_meta and mask.dtype != torch.bool and not is_binary(mask):
        refuse(ValueError, f"mask of {subject}", "zeros and ones", "other values", AVERAGED)


def check_shape(
    subject: str, mask: Tensor, like: Tensor, remedy: str, *, of: str = "parameter"
) -> None:
    """Raise a ValueError for a mask of another shape than that of ``like``."""
    if mask.shape != like.shape:
        expected = f"the {of}'s shape {tuple(like.shape)}"
        refuse(ValueError, subject, expected, f"shape {tuple(mask.shape)}", remedy)


# By the id of a mask: a reference that removes the entry, and the version that was looked at.
_seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}


def warn_if_averaged(mask: Tensor, subject: str) -> None:
    """Look at the values of a mask once for each version of it, and warn of fractions.

    Costs a look-up while nothing has written to the mask. Writes through ``.data`` count no version.
    """
    key = id(mask)
    known = _seen.get(key)
    if mask.is_inference() or (known is not None and known[1] == mask._version):
        return
    if mask.is_meta or torch._C._are_functorch_transforms_active():
        return
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return
    _seen[key] = (weakref.ref(mask, lambda _: _seen.pop(key, None)), mask._version)
    with torch.no_grad(), _disable_current_modes():
        binary = mask.dtype == torch.bool or is_binary(mask)
    if not binary:
        text = message(
            f"mask of {subject}", expected="zeros and ones", got="other values", remedy=AVERAGED
        )
        warnings.warn(
            f"{text} Until then entries above 0 count as alive.",
            FractionalMaskWarning,
            stacklevel=2,
        )
