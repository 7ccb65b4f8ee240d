"""Make pruning permanent: plain parameters with zeros in them, which stay zero only if held."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor, nn

from torch_rsst.masking.dense_scope import check_masks_in_place
from torch_rsst.masking.freezing import freeze_zeros as hold_at_zero
from torch_rsst.masking.masked_parameter import restore
from torch_rsst.masking.names import masked_places
from torch_rsst.masking.parameter_ref import ParameterRef
from torch_rsst.masking.tied import masked_with
from torch_rsst.utils.amounts import check_flag
from torch_rsst.utils.errors import UnfrozenZerosWarning


def remove_all(model: nn.Module, *, freeze_zeros: bool | None = None) -> nn.Module:
    """Make all pruning permanent, in place: plain parameters, zero where they were masked.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> torch_rsst.apply_mask(layer, {"weight": torch.tensor([[True, False]])})
        >>> _ = torch_rsst.remove_all(layer, freeze_zeros=True)
        >>> [name for name, _ in layer.named_parameters()]
        ['weight', 'bias']

    Whatever pruned a parameter, ours or stock, ``name_orig`` becomes ``name`` again (the same
    object, its gradient and place kept) and ``name_mask`` and the hook go. Calling it again does
    nothing. Either all parameters become plain or, after an error, none. Modules outside of ``model``
    that share a parameter with it lose its mask, too.

    Args:
        model: the model, wrapped or not.
        freeze_zeros: a plain parameter has no mask, so its zeros come back to life if you train on.
            True holds them at 0, whatever optimizer trains their parameter, in whatever module it
            is, until it is masked again; where it is replaced by parameters of other shapes, or its module by another
            one, the next step of an optimizer warns. What writes to it otherwise than a step of an optimizer does is not
            seen, see the limits in :doc:`/trust`: keep the masks then. False lets them go; None does that too, with a warning.

    Returns:
        the model that was given.

    Raises:
        TypeError: for another ``freeze_zeros``.
        ValueError: where a tied parameter is masked for some of its modules only, or by different masks.

    Warns:
        UnfrozenZerosWarning: for ``freeze_zeros=None``, where masked entries became zeros.
    """
    refs = masked_places(model)
    check_masks_in_place("remove_all", model.modules())
    refs += masked_with(refs)
    zeros = [(ref, ~alive) for ref in refs if (alive := ref.alive) is not None]
    restore(refs, last=what_becomes_of(zeros, freeze_zeros, within=model))
    return model


def what_becomes_of(
    zeros: Sequence[tuple[ParameterRef, Tensor]],
    freeze_zeros: bool | None,
    *,
    within: nn.Module | None = None,
) -> Callable[[], object] | None:
    """The last step of a removal: freeze what was masked, warn of it, or nothing."""
    if freeze_zeros is None:
        return partial(_warn_unfrozen, zeros)
    held = check_flag(freeze_zeros, "freeze_zeros")
    return partial(hold_at_zero, zeros, within=within) if held else None


def _warn_unfrozen(zeros: Iterable[tuple[ParameterRef, Tensor]]) -> None:
    if any(bool(dead.any()) for _, dead in zeros):
        warnings.warn(
            "Without masks their zeros are ordinary weights, which come back to life if you "
            "train on. Pass freeze_zeros=True to hold them at 0, or freeze_zeros=False if you do "
            "not train on.",
            UnfrozenZerosWarning,
            stacklevel=4,  # through the removal and the public function
        )
