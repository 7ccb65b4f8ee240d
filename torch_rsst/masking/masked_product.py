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

from torch_rsst.distributed.dtensor import is_sharded, placed_like

_select = torch.ops.aten.threshold_backward
# The types of numbers that it takes.
_SELECTED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
            mask = _alias_for_graph(mask)
    if isinstance(original, Tensor) and original.dtype not in _SELECTED:  # torch.fx has none
        return torch.where(
            mask == 0, torch.zeros((), dtype=original.dtype, device=original.device), original
        )
    mask = mask.to(original.dtype)
    if sparse:
        # Of the operations that let no NaN through, none takes a sparse gradient: a product meets it first.
        # In compiled graphs nothing else may, so that there a NaN under the mask gets through.
        if not torch.compiler.is_compiling():
            original = _WithoutMasked.apply(original, mask)
        return original * mask
    return _select(original, mask, 0)  # type: ignore[no-any-return]


def masked_gradient(gradient: Tensor, mask: Tensor) -> Tensor:
    """A gradient, which may hold some rows only, with 0 where it is masked."""
    if not gradient.is_sparse:
        return masked(gradient, mask)
    gradient = gradient.coalesce()
    rows = gradient.indices()
    values = masked(gradient.values(), mask[tuple(rows)])
    return torch.sparse_coo_tensor(
        rows, values, gradient.shape, is_coalesced=True, check_invariants=False
    )


def masked_operand(function: Any, args: tuple[Any, ...]) -> Any:
    """The weight that a call makes 0 where masked, as a ``TorchFunctionMode`` sees calls; None for others."""
    if function is _select:
        return args[0]
    return args[2] if function is torch.where and len(args) == 3 else None


# By the id of a mask: the aliases of it that graphs of forward passes hold, while they do.
_in_graph: dict[int, dict[int, weakref.ref[Tensor]]] = {}


def _alias_for_graph(mask: Tensor) -> Tensor:
    saved = mask.detach()
    of, own = id(mask), id(saved)

    def forget(_: object) -> None:
        held = _in_graph.get(of, {})
        held.pop(own, None)
        if not held:
            _in_graph.pop(of, None)

    _in_graph.setdefault(of, {})[own] = weakref.ref(saved, forget)
    return saved


def is_in_graph(mask: Tensor) -> bool:
    """Whether a backward pass may still need the present values of a mask. Compiled ones are not known."""
    return id(mask) in _in_graph


class _WithoutMasked(torch.autograd.Function):
    """0 where masked, with the gradient of what it is given: the product with the mask comes behind."""

    generate_vmap_rule = True

    @staticmethod
    def forward(original: Tensor, mask: Tensor) -> Tensor:
        return _select(original, mask, 0)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: object) -> Tensor:
        return tangent
