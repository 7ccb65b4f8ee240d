"""The masked weight as one elementwise operation, in the forward pass and in the backward pass.

A product would let an inf or NaN under the mask through (0 · NaN is NaN), and ``torch.where`` takes many
times as long on a CPU. ``threshold_backward(weight, mask, 0)``, the gradient of a ReLU whose input is
the mask, selects at the price of a product: ``weight`` where ``mask > 0``, else 0. It is its own derivative.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from torch_rsst.distributed.dtensor import is_sharded, placed_like

_select = torch.ops.aten.threshold_backward


def masked(original: Tensor, mask: Tensor, *, sparse: bool = False) -> Tensor:
    """``original`` where ``mask`` is 1, and 0 elsewhere, whatever stands there.

    Args:
        original: the weight.
        mask: zeros and ones. Where FSDP2 has put the whole parameter in place of a rank's part, the
            mask, which stays in parts, is gathered.
        sparse: whether gradients may be sparse, as those of ``nn.Embedding(sparse=True)`` are.
    """
    if is_sharded(mask) or is_sharded(original):
        return torch.where(placed_like(mask == 0, original), 0.0, original)
    if not torch.compiler.is_compiling():
        # The TorchScript exporter to ONNX has no threshold_backward.
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return torch.where(torch.eq(mask, original.new_zeros(())), 0.0, original)
        traced = not isinstance(original, Tensor)  # by torch.fx
        if not traced and original.requires_grad and torch.is_grad_enabled():
            return _in_training(original, mask, sparse)
    return _product(original, mask, sparse)


def _in_training(original: Tensor, mask: Tensor, sparse: bool) -> Tensor:
    _in_graph[id(mask)] = saved = mask.detach()
    made = _product(original, saved, sparse)
    if made.device.type == "cpu":
        _memory[mask] = made.detach()
    return made


def _product(original: Tensor, mask: Tensor, sparse: bool) -> Tensor:
    mask = mask.to(original.dtype)
    if sparse:
        return _SparseGradient.apply(original, mask)  # type: ignore[no-any-return]
    return _select(original, mask, 0)  # type: ignore[no-any-return]


def masked_operand(function: Any, args: tuple[Any, ...]) -> Any:
    """The weight that a call makes 0 where masked, as a ``TorchFunctionMode`` sees calls; None for others."""
    if function is _select:
        return args[0]
    return args[2] if function is torch.where and len(args) == 3 else None


# By the id of a mask: the alias of it that the graph of the last forward pass holds, while it does.
_in_graph: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

# The last product of each mask, which the next one replaces. Nothing reads it: were all products freed
# after a backward pass, C libraries would return the memory, and each step would ask for it again.
_memory: Any = WeakTensorKeyDictionary()


def is_in_graph(mask: Tensor) -> bool:
    """Whether a backward pass may still need the present values of a mask."""
    return id(mask) in _in_graph


class _SparseGradient(torch.autograd.Function):
    """The same selection, for gradients that hold some rows of an embedding."""

    @staticmethod
    def forward(original: Tensor, mask: Tensor) -> Tensor:
        return _select(original, mask, 0)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        if not gradient.is_sparse:
            return _select(gradient, mask, 0), None
        rows = gradient._indices()
        values = _select(gradient._values(), mask[tuple(rows)], 0)
        shape = gradient.shape
        return torch.sparse_coo_tensor(rows, values, shape, check_invariants=False), None
