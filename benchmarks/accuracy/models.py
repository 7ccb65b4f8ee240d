"""The small models of the study. Attention and MLP are written as timm writes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 # as PyTorch calls it
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with one layer for queries, keys and values."""

    def __init__(self, width: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, width)`` → the same shape."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(out.transpose(1, 2).reshape(b, n, -1))


class Mlp(nn.Module):
    """Two linear layers and a GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = (
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(…, width)`` → the same shape."""
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, num_heads, causal)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, width)`` → the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """A causal transformer over characters: ids ``(batch, tokens)`` → logits ``(batch, tokens, characters)``."""

    def __init__(
        self, characters: int, tokens: int, width: int = 64, heads: int = 8, depth: int = 3
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next character at each position."""
        x = self.embedding(ids) + self.position[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class SignalTransformer(nn.Module):
    """A vision transformer over a signal of 40 samples: ``(batch, 40)`` → logits of 10 classes."""

    def __init__(self, width: int = 64, heads: int = 8, depth: int = 3, patch: int = 4) -> None:
        super().__init__()
        self.patch, self.embedding = patch, nn.Linear(patch, width)
        self.position = nn.Parameter(torch.randn(40 // patch, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        x = self.embedding(x.unflatten(1, (-1, self.patch))) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class ResidualBlock(nn.Module):
    """Two 1-D convolutions with batch norms, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm1d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv1d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm1d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, inputs, samples)`` → ``(batch, outputs, samples / stride)``."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class SignalResNet(nn.Module):
    """A residual network over a signal of 40 samples: ``(batch, 40)`` → logits of 10 classes."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(1, widths[0], 5, 1, 2, bias=False), nn.BatchNorm1d(widths[0]), nn.ReLU()
        )
        stages, inputs = [], widths[0]
        for place, width in enumerate(widths):
            stages.append(ResidualBlock(inputs, width, 1 if place == 0 else 2))
            stages.append(ResidualBlock(width, width, 1))
            inputs = width
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        return self.head(self.stages(self.stem(x.unsqueeze(1))).mean(-1))
