"""Masks are made before masked weights are loaded, whoever calls ``load_state_dict``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_rsst.masking.live_weight import MASK, ORIG
from torch_rsst.masking.mask_sets import apply_mask, extract_mask
from torch_rsst.masking.names import masked_names, named_weights
from torch_rsst.utils.errors import listing, refuse


def masks_first(model: nn.Module) -> RemovableHandle:
    """Let ``model.load_state_dict`` make the masks that a state dict holds, before it loads them.

    ``load_state_dict`` then raises a ValueError, before anything is loaded, where the state dict holds weights
    without their masks, or dense weights of parameters that the model masks. Names that the model does not have
    are left to it.
    """
    handle: RemovableHandle = model.register_load_state_dict_pre_hook(_prepare)  # type: ignore[no-untyped-call]
    return handle


def _prepare(model: nn.Module, state: dict[str, Tensor], *rest: Any) -> None:
    masks, known = extract_mask(state), named_weights(model).keys()
    halves = {key for key in state for end in (ORIG, MASK) if key.removesuffix(end) in known}
    wrong = [
        *(key for key in sorted(halves - known) if key.rpartition("_")[0] not in masks),
        *sorted(masked_names(model) & state.keys()),
    ]
    if wrong:
        expected = "every masked weight together with its mask"
        remedy = (
            "Load a checkpoint of this very model, in one piece: raise max_shard_size. For dense weights, "
            "call load_dense_state_dict(model, state_dict, mask=…)."
        )
        refuse(ValueError, "state_dict", expected, f"{listing(wrong)} without one", remedy)
    apply_mask(model, {name: mask for name, mask in masks.items() if name in known})
