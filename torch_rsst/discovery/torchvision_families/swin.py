"""Heads of torchvision's Swin Transformers, both versions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from torch_rsst.discovery.head_math import unflatten
from torch_rsst.discovery.head_parts import HeadAdapter, Part, consumes, produces

_FAR = -100.0
"""What torchvision adds to the score of two tokens that the shift has brought into one window."""


class ReducedShiftedWindowAttention(ShiftedWindowAttention):  # type: ignore[misc] # untyped
    """Window attention whose heads make less than the width of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Attention within shifted windows of a map (batch, height, width, features)."""
        height, width = x.shape[1:3]
        window = self.window_size
        x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
        extent = x.shape[1:3]
        shift = [
            0 if size >= whole else by
            for by, size, whole in zip(self.shift_size, window, extent, strict=True)
        ]
        windows = _windows(x.roll((-shift[0], -shift[1]), (1, 2)), window)
        mask = _strangers(extent, window, shift, x) if any(shift) else None
        qkv = unflatten(self._projected(windows), -1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (batch, windows, heads, tokens, features)
        scores = self._scores(q, k) + self.get_relative_position_bias()
        scores = scores if mask is None else scores + mask
        weights = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        out = self.proj((weights @ v).transpose(-3, -2).flatten(-2))
        back = _map(F.dropout(out, self.dropout, self.training), extent, window)
        return back.roll((shift[0], shift[1]), (1, 2))[:, :height, :width].contiguous()

    def _projected(self, windows: Tensor) -> Tensor:
        out: Tensor = self.qkv(windows)
        return out

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores: Tensor = q @ k.mT * q.shape[-1] ** -0.5
        return scores


class ReducedShiftedWindowAttentionV2(
    ReducedShiftedWindowAttention,
    ShiftedWindowAttentionV2,  # type: ignore[misc] # untyped
):
    """The second version: cosines, times a learned scale, and keys without a bias."""

    def _projected(self, windows: Tensor) -> Tensor:
        weight, bias = self.qkv.weight, self.qkv.bias
        if bias is not None:
            q, k, v = bias.chunk(3)
            bias = torch.cat([q, torch.zeros_like(k), v])
        return F.linear(windows, weight, bias)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scale: Tensor = self.logit_scale.clamp(max=math.log(100.0)).exp()
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale


class TorchvisionSwinAttention(HeadAdapter):
    """A head owns its column of the table of position biases, or of the MLP that makes them, as well."""

    classes = (ShiftedWindowAttention,)
    parts = (
        *produces("qkv", 3),
        Part("logit_scale"),
        Part("cpb_mlp.2.weight"),
        Part("relative_position_bias_table", 1),
        *consumes(),
    )
    slim = (ReducedShiftedWindowAttentionV2, ReducedShiftedWindowAttention)

    def why_not(self, module: nn.Module) -> str | None:
        """See :class:`HeadAdapter`."""
        known = (cls for slim in self.slim for cls in (slim, slim.__bases__[-1]))
        if type(module).forward in {cls.forward for cls in known}:
            return None
        return "its class changes what torchvision's window attention computes"


def _windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """A map → (batch, windows, tokens, features)."""
    batch, height, width, features = x.shape
    tall, wide = window
    tiles = x.reshape(batch, height // tall, tall, width // wide, wide, features)
    return tiles.transpose(2, 3).reshape(batch, -1, tall * wide, features)


def _map(windows: Tensor, extent: Sequence[int], window: Sequence[int]) -> Tensor:
    """Undo :func:`_windows`."""
    batch, features = windows.shape[0], windows.shape[-1]
    (height, width), (tall, wide) = extent, window
    tiles = windows.reshape(batch, height // tall, width // wide, tall, wide, features)
    return tiles.transpose(2, 3).reshape(batch, height, width, features)


def _strangers(
    extent: Sequence[int], window: Sequence[int], shift: Sequence[int], like: Tensor
) -> Tensor:
    """Scores to add where tokens of one window were apart before the shift: (windows, 1, tokens, tokens)."""
    regions = []
    for size, inside, by in zip(extent, window, shift, strict=True):
        place = torch.arange(size, device=like.device)
        regions.append((place >= size - inside).long() + (place >= size - by).long() * bool(by))
    where = 3 * regions[0][:, None] + regions[1]
    tokens = _windows(where[None, :, :, None], window)[0, :, None, :, 0]
    apart = tokens[..., None] != tokens[..., None, :]
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, _FAR)
