"""Several queries that share one key and one value, as in MobileNetV4 and V5."""

from __future__ import annotations

from timm.layers.attention2d import MultiQueryAttention2d, MultiQueryAttentionV2

from torch_rsst.discovery.adapter import register
from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, produces


class TimmMultiQuery2d(HeadAdapter):
    """``MultiQueryAttention2d``: a unit is a query head; key and value serve all of them and stay."""

    classes = (MultiQueryAttention2d,)
    parts = (*produces("query.proj"), *consumes("output.proj"))
    least = 1


class TimmMultiQuery(HeadAdapter):
    """``MultiQueryAttentionV2``, whose projections are parameters of its own."""

    classes = (MultiQueryAttentionV2,)
    parts = (
        Part("query_proj", 0, ranked=True),
        Part("out_proj", 1, ranked=True, consumes=True),
    )
    least = 1


for _adapter in (TimmMultiQuery2d(), TimmMultiQuery()):
    register(_adapter)
