"""Attention within windows: Swin, Swin V2 and its variant of Christoph Reich."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

import math

import torch
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor
from torch.nn import functional

from torch_rsst.discovery.head_math import put_out, split_heads, unflatten
from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, produces
from torch_rsst.discovery.timm_families._bias import BIASED_QKV, biased_qkv

_LARGEST_SCALE = math.log(100.0)


def _cosines(q: Tensor, k: Tensor, logit_scale: Tensor) -> Tensor:
    """Scores from the angles between queries and keys, scaled per head."""
    scale = logit_scale.clamp(max=_LARGEST_SCALE).exp().reshape(-1, 1, 1)
    return functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT * scale


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (images · windows, heads, tokens, tokens) with a mask (windows, tokens, tokens) added."""
    if mask is None:
        return scores
    per_image = unflatten(scores, 0, (-1, mask.shape[0]))
    return (per_image + mask[None, :, None]).flatten(0, 1)


class SlimSwinV2Attention(swin_transformer_v2.WindowAttention):
    """With any number of heads."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See timm."""
        tokens = x.shape[1]
        q, k, v = split_heads(biased_qkv(self, x), 3, self.num_heads)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        bias = unflatten(table[self.relative_position_index.flatten()], 0, (tokens, tokens))
        scores = _cosines(q, k, self.logit_scale) + 16 * torch.sigmoid(bias.permute(2, 0, 1))
        weights = self.attn_drop(self.softmax(_masked(scores, mask)))
        return put_out(self, weights @ v)


class SlimSwinV2CrAttention(swin_transformer_v2_cr.WindowMultiHeadAttention):
    """With any number of heads."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See timm."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        scores = _cosines(q, k, self.logit_scale) + self._relative_positional_encodings()
        weights = self.attn_drop(_masked(scores, mask).softmax(-1))
        return put_out(self, weights @ v)


class SwinAttention(HeadAdapter):
    """``timm.models.swin_transformer.WindowAttention``: runs with any number of heads."""

    classes = (swin_transformer.WindowAttention,)
    parts = (*produces("qkv", 3), Part("relative_position_bias_table", 1), *consumes())


class SwinV2Attention(HeadAdapter):
    """``timm.models.swin_transformer_v2.WindowAttention``; rows of its position MLP go along."""

    classes = (swin_transformer_v2.WindowAttention,)
    parts = (*BIASED_QKV, Part("logit_scale"), Part("cpb_mlp.2.weight"), *consumes())
    slim = (SlimSwinV2Attention,)


class SwinV2CrAttention(HeadAdapter):
    """``timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention``."""

    classes = (swin_transformer_v2_cr.WindowMultiHeadAttention,)
    parts = (
        *produces("qkv", 3),
        Part("logit_scale"),
        Part("meta_mlp.fc2.weight"),
        Part("meta_mlp.fc2.bias"),
        *consumes(),
    )
    slim = (SlimSwinV2CrAttention,)
