"""CaiT: talking heads, and a class token that asks all others."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from timm.models.cait import ClassAttn, TalkingHeadAttn
from torch import Tensor

from torch_rsst.discovery.emptied_token import BiasOnlyToken
from torch_rsst.discovery.head_math import attend, put_out, split_heads
from torch_rsst.discovery.head_parts import HeadAdapter, consumes, produces


class SlimClassAttn(ClassAttn):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        q, k, v = (
            split_heads(layer(tokens), 1, self.num_heads)[0]
            for layer, tokens in ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        )
        return put_out(self, attend(self, q, k, v))


class SlimTalkingHeadAttn(TalkingHeadAttn):
    """With any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        scores = ((q * self.scale) @ k.mT).movedim(1, -1)
        weights = self.proj_l(scores).movedim(-1, 1).softmax(-1)
        weights = self.attn_drop(self.proj_w(weights.movedim(1, -1)).movedim(-1, 1))
        return put_out(self, weights @ v)


class CaitClassAttention(HeadAdapter):
    """``timm.models.cait.ClassAttn``, which XCiT uses, too."""

    classes = (ClassAttn,)
    slim = (SlimClassAttn,)
    left = BiasOnlyToken


class CaitTalkingHeads(HeadAdapter):
    """``timm.models.cait.TalkingHeadAttn``.

    Head *h* is the *h*-th query, key and value, the *h*-th map that reaches ``proj_w`` and the one that
    leaves it. A head is heard by way of the others' maps, too: it takes part in all columns.
    """

    classes = (TalkingHeadAttn,)
    parts = (
        *produces("qkv", 3),
        *(part for name in ("proj_l", "proj_w") for part in (*produces(name), *consumes(name))),
        *consumes(),
    )
    slim = (SlimTalkingHeadAttn,)
