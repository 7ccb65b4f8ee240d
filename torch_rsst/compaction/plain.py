"""Masks made permanent: plain parameters, with zeros where they were masked."""

from __future__ import annotations

import warnings

from torch import nn

from torch_rsst.masking.masked_parameter import restore
from torch_rsst.masking.parameter_ref import masked_refs
from torch_rsst.utils.errors import UnfrozenZerosWarning, refuse


def check_keep_masks(keep_masks: object) -> None:
    """Raise a TypeError unless ``keep_masks`` is True, False or None."""
    if keep_masks is not None and not isinstance(keep_masks, bool):
        remedy = "True keeps masks, False makes them permanent, None decides by the optimizer."
        refuse(TypeError, "keep_masks", "True, False or None", repr(keep_masks), remedy)


def make_plain(model: nn.Module, subject: str, keep_masks: bool | None) -> None:
    """Make all masks of a model permanent, in place, unless ``keep_masks``.

    Warns:
        UnfrozenZerosWarning: for ``keep_masks=None``, where masked weights became zeros.
    """
    refs = masked_refs(model.modules())
    if keep_masks or not refs:
        return
    masks = {ref.original: ref.mask for ref in refs if ref.mask is not None}
    zeros = sum(mask.numel() - int(mask.count_nonzero()) for mask in masks.values())
    restore(refs)
    if keep_masks is None:
        warn_of_zeros(subject, zeros, stacklevel=4)


def warn_of_zeros(subject: str, zeros: int, *, stacklevel: int = 3) -> None:
    """Warn that so many masked weights are ordinary zeros from now on."""
    if zeros:
        text = (
            f"{subject}: {zeros:,} masked weights that were not cut out are ordinary zeros now, and can "
            "become nonzero if you train on. Pass keep_masks=True to keep their masks, or "
            "keep_masks=False if you do not train on."
        )
        warnings.warn(text, UnfrozenZerosWarning, stacklevel=stacklevel)


def warn_of_held(subject: str, zeros: int) -> None:
    """Warn that so many zeros that are frozen in a model are not so in what was made of it."""
    if zeros:
        text = (
            f"{subject}: {zeros:,} zeros that freeze_zeros=True holds in the model are ordinary zeros in "
            "the result, and can become nonzero if you train on. Pass optimizer= or keep_masks=True to "
            "hold them there, too, or keep_masks=False if you do not train on."
        )
        warnings.warn(text, UnfrozenZerosWarning, stacklevel=3)
