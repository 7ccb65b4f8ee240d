"""What a block of ``dense_weights`` puts back where it, or leaving it, raises."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_rsst.masking.mask_undo import is_writable
from torch_rsst.masking.parameter_ref import masked_refs


def values_back(model: nn.Module) -> list[Any]:
    """What gives parameters and buffers their values again; masked parameters are not written to."""
    refs = masked_refs(model.modules())
    kept = {id(t) for ref in refs for t in (ref.original, ref.mask)}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in kept]
    flags = [partial(p.requires_grad_, p.requires_grad) for p in model.parameters()]
    return [*flags, *(partial(set_data, t, t.detach().clone()) for t in tensors)]


def give_back(
    of: weakref.ref[nn.Module], name: str, former: nn.Parameter, plain: nn.Parameter
) -> None:
    """Give a module that took a plain parameter what it had there."""
    module = of()
    if module is not None and module._parameters.get(name) is plain:
        setattr(module, name, former)


def set_data(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor a value, in place where that can be."""
    alike = (tensor.dtype, tensor.device, tensor.shape) == (value.dtype, value.device, value.shape)
    if alike and torch.equal(tensor, value):
        return  # a write would end the backward passes that are still to come
    if alike and is_writable(tensor):
        tensor.copy_(value)
    else:
        tensor.data = value
