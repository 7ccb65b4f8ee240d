"""EfficientViT of Microsoft: heads that pass what they put out to the next one."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from dataclasses import replace

import torch
from timm.models.efficientvit_msra import CascadedGroupAttention
from torch import Tensor, nn

from torch_rsst.discovery.adapter import Unsupported
from torch_rsst.discovery.head_math import unflatten
from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes
from torch_rsst.groups.groups import GroupLayer, Member
from torch_rsst.masking.names import named_buffers, named_weights


class SlimCascadedGroupAttention(CascadedGroupAttention):
    """With any number of heads but none; heads that are gone put nothing out, to the next one either."""

    def forward(self, x: Tensor) -> Tensor:
        """See timm."""
        parts = x.chunk(self.all_heads, dim=1)
        biases = self.get_attention_biases(x.device)
        outputs: list[Tensor] = []
        before = -1
        for head, bias in zip(self.kept_heads, biases, strict=True):
            part = parts[head] + outputs[-1] if before == head - 1 and outputs else parts[head]
            outputs.append(self._of_head(head, part, bias))
            before = head
        out: Tensor = self.proj(torch.cat(outputs, dim=1))
        return out

    def _of_head(self, head: int, x: Tensor, bias: Tensor) -> Tensor:
        widths = [self.key_dim, self.key_dim, self.val_dim]
        q, k, v = self.qkvs[head](x).split(widths, dim=1)
        q = self.dws[head](q).flatten(2) * self.scale
        weights = (q.mT @ k.flatten(2) + bias).softmax(-1)
        return unflatten(v.flatten(2) @ weights.mT, -1, x.shape[2:])


class CascadedHeads(HeadAdapter):
    """``timm.models.efficientvit_msra.CascadedGroupAttention``.

    A head reaches the output by way of the next one, too: it is dead only where all of it is, so that
    each of its ranked members counts as one that could still be heard.
    """

    classes = (CascadedGroupAttention,)
    parts = (Part("attention_biases"), *consumes("proj.1.conv"))
    least = 1
    slim = (SlimCascadedGroupAttention,)
    recalls = True

    def found(self, module: nn.Module) -> GroupLayer | Unsupported:
        """See :class:`HeadAdapter`."""
        found = super().found(module)
        if isinstance(found, Unsupported):
            return found
        members, buffers = [], []
        for unit, head in enumerate(vars(module).get("kept_heads", range(found.units))):
            stems = (f"qkvs.{head}.", f"dws.{head}.")
            for name, weight in named_weights(module).items():
                if name.startswith(stems):
                    ranked, own = weight.ndim > 1, torch.full(weight.shape[:1], unit)
                    members.append(Member(name, 0, own, ranked, consumes=ranked))
            for name, place in named_buffers(module).items():
                if name.startswith(stems) and place.buffer.ndim:
                    own = torch.full(place.buffer.shape[:1], unit)
                    buffers.append(Member(name, 0, own, ranked=False))
        return replace(found, members=(*members, *found.members), buffers=tuple(buffers))
