"""Attention between tensors that are split into heads, for modules whose own forward fixes their width."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """``x.unflatten(dim, sizes)``, with types."""
    out: Tensor = x.unflatten(dim, tuple(sizes))
    return out


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """(…, tokens, parts · heads · width) → (parts, …, heads, tokens, width)."""
    width = x.shape[-1] // max(1, parts * heads)
    return unflatten(x, -1, (parts, heads, width)).movedim(-3, 0).transpose(-3, -2)


def join_heads(x: Tensor) -> Tensor:
    """(…, heads, tokens, width) → (…, tokens, heads · width)."""
    return x.transpose(-3, -2).flatten(-2)


def put_out(module: Any, context: Tensor) -> Tensor:
    """(…, heads, tokens, width), joined and passed through the output layer of a module."""
    out: Tensor = module.proj_drop(module.proj(join_heads(context)))
    return out


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Softmax attention, computed the way that a module of timm is set up to.

    Args:
        module: tells ``scale``, ``attn_drop`` and whether ``fused_attn`` is wanted.
        q: (…, heads, tokens, width), as are ``k`` and ``v``.
        k: keys.
        v: values.
        bias: added to the scores, or False where no score is allowed.
        is_causal: whether tokens see earlier ones only; ``bias`` is then left out.
    """
    drop = getattr(module, "attn_drop", None)
    rate = float(drop.p) if isinstance(drop, nn.Dropout) and module.training else 0.0
    if getattr(module, "fused_attn", False):
        mask = None if is_causal else bias
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=rate, is_causal=is_causal
        )
    scores = (q * float(getattr(module, "scale", 1.0))) @ k.transpose(-2, -1)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    elif bias is not None:
        scores = (
            scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
        )
    return functional.dropout(scores.softmax(-1), rate) @ v


def kept(module: nn.Module, per_head: Tensor, dim: int) -> Tensor:
    """The part of a tensor, handed to a module, that belongs to the heads which it still has.

    A tensor that has one entry for all heads along ``dim`` stays as it is.
    """
    heads: tuple[int, ...] = module.__dict__.get("kept_heads", ())
    before: int = module.__dict__.get("all_heads", 0)
    if before == len(heads) or per_head.shape[dim] != before:
        return per_head
    return per_head.index_select(dim, torch.tensor(heads, device=per_head.device))
