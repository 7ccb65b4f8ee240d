"""Heads of torchvision's MaxViT."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention

from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, produces


class ReducedRelativeAttention(RelativePositionalMultiHeadAttention):  # type: ignore[misc] # untyped
    """Attention within partitions whose heads make less than the width of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Attention among the tokens of each partition: (batch, partitions, tokens, features)."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(-3)
        q, k, v = (t.transpose(-3, -2) for t in (q, k * self.scale_factor, v))
        weights = F.softmax(q @ k.mT + self.get_relative_positional_bias(), dim=-1)
        out: Tensor = self.merge((weights @ v).transpose(-3, -2).flatten(-2))
        return out


class MaxVitAttention(HeadAdapter):
    """A head owns its column of the table of position biases as well."""

    classes = (RelativePositionalMultiHeadAttention,)
    parts = (
        *produces("to_qkv", 3),
        Part("relative_position_bias_table", 1),
        *consumes("merge"),
    )
    output = "merge"
    slim = (ReducedRelativeAttention,)
