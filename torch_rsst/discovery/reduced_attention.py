"""``nn.MultiheadAttention`` with fewer heads than its width is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name


class ReducedMultiheadAttention(nn.MultiheadAttention):
    """What is left of an ``nn.MultiheadAttention`` some of whose heads were cut.

    Called as the whole one, it returns the same, the weights of attention included: there, heads that
    are gone count as ones that attend evenly, as heads do whose queries and keys are 0. Encoder and
    decoder layers of PyTorch take it; their fused path, which knows no width but its own, does not.

    Instances are made by :func:`torch_rsst.compact`.

    Attributes:
        num_heads: how many are left.
        head_dim: the width of one.
        embed_dim: the width of queries and outputs.
        whole_heads: how many there were.
        left: which of these are left, one after the other as in the parameters.
    """

    whole_heads: int
    left: tuple[int, ...]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`torch.nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says what attn_mask is; pass the mask as well")
        if query.is_nested:
            return self._one_by_one(query, key, value), None
        batched = query.dim() == 3
        if not batched:
            axis = 0 if self.batch_first else 1
            query, key, value = (t.unsqueeze(axis) for t in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._projected(query, key, value)
        bias = self._mask(attn_mask, key_padding_mask, q, k.shape[2] - key.shape[1])
        out, weights = self._attend(q, k, v, bias, need_weights)
        if not self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if batched:
            return out, weights
        return out.squeeze(axis), None if weights is None else weights.squeeze(0)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value of every head that is left: (batch, heads, length, features)."""
        if self.in_proj_weight is not None:
            matrices = self.in_proj_weight.chunk(3)
        else:
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        given = zip((query, key, value), matrices, biases, strict=True)
        q, k, v = (F.linear(x, matrix, bias) for x, matrix, bias in given)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        shape = (self.num_heads, self.head_dim)
        return tuple(t.reshape(*t.shape[:2], *shape).transpose(1, 2) for t in (q, k, v))

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, query: Tensor, added: int
    ) -> Tensor | None:
        """Both masks as what is added to scores: (batch or 1, heads, 1 or all heads, targets, keys)."""
        masks = []
        if attn_mask is not None:
            mask = _additive(attn_mask, query)
            if mask.dim() == 3:
                mask = mask.reshape(query.shape[0], -1, *mask.shape[1:])
            masks.append(mask if mask.dim() == 4 else mask[None, None])
        if padding is not None:
            masks.append(_additive(padding, query)[:, None, None])
        return F.pad(sum(masks[1:], masks[0]), (0, added)) if masks else None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The output, batch first, and the weights of all heads that there were."""
        dropout = self.dropout if self.training else 0.0
        own, left = mask, torch.tensor(self.left, dtype=torch.long, device=q.device)
        if mask is not None and mask.shape[1] == self.whole_heads and self.whole_heads > 1:
            own = mask.index_select(1, left)
        weights = None
        if need_weights:
            scores = q.new_zeros(q.shape[0], self.whole_heads, q.shape[2], k.shape[2])
            scores = scores.index_copy(1, left, q @ k.mT * self.head_dim**-0.5)
            scores = scores if mask is None else scores + mask
            weights = F.dropout(scores.softmax(-1), dropout)
            attended = weights.index_select(1, left) @ v
        elif self.num_heads:
            attended = F.scaled_dot_product_attention(q, k, v, own, dropout)
        else:
            attended = q  # of no heads at all
        return self.out_proj(attended.transpose(1, 2).flatten(2)), weights

    def _one_by_one(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Sequences of different lengths, as an encoder passes them on where it skips padding."""
        rows = zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
        return torch.nested.as_nested_tensor(
            [self(*(t[None] for t in row), need_weights=False)[0][0] for row in rows]
        )


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
