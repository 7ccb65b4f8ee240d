"""Attention between channels in place of tokens: XCiT and EdgeNeXt."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from typing import Any

from timm.models.edgenext import CrossCovarianceAttn
from timm.models.xcit import XCA
from torch import Tensor
from torch.nn import functional

from torch_rsst.discovery.head_math import put_out, split_heads
from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, produces


def _forward(self: Any, x: Tensor) -> Tensor:
    """See timm."""
    q, k, v = split_heads(self.qkv(x), 3, self.num_heads).mT  # (…, heads, width, tokens)
    scores = functional.normalize(q, dim=-1) @ functional.normalize(k, dim=-1).mT
    weights = self.attn_drop((scores * self.temperature).softmax(-1))
    return put_out(self, (weights @ v).mT)


class SlimXCA(XCA):
    """With any number of heads."""

    forward = _forward


class SlimCrossCovarianceAttn(CrossCovarianceAttn):
    """With any number of heads."""

    forward = _forward


class CrossCovariance(HeadAdapter):
    """``timm.models.xcit.XCA`` and ``timm.models.edgenext.CrossCovarianceAttn``."""

    classes = (XCA, CrossCovarianceAttn)
    parts = (*produces("qkv", 3), Part("temperature"), *consumes())
    slim = (SlimXCA, SlimCrossCovarianceAttn)
