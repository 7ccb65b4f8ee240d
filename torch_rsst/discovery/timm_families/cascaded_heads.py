"""EfficientViT of Microsoft: heads that pass what they put out to the next one."""

# mypy: allow-subclassing-any, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
from timm.models.efficientvit_msra import CascadedGroupAttention
from torch import Tensor, nn

from torch_rsst.discovery.adapter import Adapter, register
from torch_rsst.discovery.change_class import become
from torch_rsst.discovery.head_math import unflatten
from torch_rsst.discovery.head_parts import recall
from torch_rsst.groups.groups import GroupLayer, Member
from torch_rsst.groups.surgery import Removal
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


class CascadedHeads(Adapter):
    """``timm.models.efficientvit_msra.CascadedGroupAttention``.

    A head reaches the output by way of the next one, too: it is dead only where all of it is, so that
    each of its ranked members counts as one that could still be heard.
    """

    kind = "heads"
    least = 1

    def find(self, module: nn.Module) -> GroupLayer | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        if not isinstance(module, CascadedGroupAttention):
            return None
        heads = list(vars(module).get("kept_heads", range(int(module.num_heads))))
        weights, homes = named_weights(module), named_buffers(module)
        whole: list[tuple[str, int]] = []
        buffers = []
        for unit, head in enumerate(heads):
            for stem in (f"qkvs.{head}.", f"dws.{head}."):
                whole += [(name, unit) for name in weights if name.startswith(stem)]
                for name, (*_, buffer) in homes.items():
                    if name.startswith(stem) and buffer.ndim:
                        buffers.append(Member(name, 0, _all_of(unit, buffer), ranked=False))
        members = [
            Member(
                name,
                0,
                _all_of(unit, weights[name]),
                weights[name].ndim > 1,
                weights[name].ndim > 1,
            )
            for name, unit in whole
        ]
        members.append(Member("attention_biases", 0, torch.arange(len(heads)), ranked=False))
        last = "proj.1.conv.weight"
        columns = torch.arange(len(heads)).repeat_interleave(int(module.val_dim))
        members.append(Member(last, 1, columns, ranked=True, consumes=True))
        return GroupLayer("", self.kind, len(heads), tuple(members), tuple(buffers))

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        recall(module, removal.gone)
        _lower(module, removal.count)
        become(module, SlimCascadedGroupAttention)
        return module


def _all_of(unit: int, tensor: Tensor) -> Tensor:
    return torch.full((tensor.shape[0],), unit)


def _lower(module: Any, by: int) -> None:
    module.num_heads -= by


register(CascadedHeads())
