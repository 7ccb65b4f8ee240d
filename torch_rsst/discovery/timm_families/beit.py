"""BEiT: biases of queries and values apart, and a table of relative positions per head."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from timm.models.beit import Attention
from torch import Tensor

from torch_rsst.discovery.head_math import attend, kept, put_out, split_heads
from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes
from torch_rsst.discovery.timm_families._bias import BIASED_QKV, biased_qkv


class SlimBeitAttention(Attention):
    """With any number of heads; takes a shared position bias of all the heads there once were."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """See timm."""
        bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        if shared_rel_pos_bias is not None:
            shared = kept(self, shared_rel_pos_bias, -3)
            bias = shared if bias is None else bias + shared
        q, k, v = split_heads(biased_qkv(self, x), 3, self.num_heads)
        return put_out(self, attend(self, q, k, v, bias))


class BeitAttention(HeadAdapter):
    """``timm.models.beit.Attention``."""

    classes = (Attention,)
    parts = (*BIASED_QKV, Part("relative_position_bias_table", 1), *consumes())
    slim = (SlimBeitAttention,)
    recalls = True
