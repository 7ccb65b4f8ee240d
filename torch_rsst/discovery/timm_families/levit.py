"""LeViT: projections with a batch norm, values wider than keys, positions per head."""

from __future__ import annotations

from timm.models.levit import Attention, AttentionDownsample

from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, normed, produces


class LevitAttention(HeadAdapter):
    """``Attention`` and ``AttentionDownsample`` of ``timm.models.levit``, on tokens or on maps.

    They run with any number of heads but none. Query, key and value of one head lie side by side.
    """

    classes = (Attention, AttentionDownsample)
    parts = (
        *(
            part
            for name in ("qkv", "kv", "q.ln")
            for part in (*produces(f"{name}.linear"), *normed(f"{name}.bn"))
        ),
        Part("attention_biases"),
        *consumes("proj.ln.linear"),
    )
    scaled = ("key_attn_dim", "val_attn_dim")
    least = 1
