"""Attention as people write it themselves: found whatever its attributes are called, cut exactly or masked and told."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 # as PyTorch calls it
from contract import assert_compacts, difference, randomize
from torch import Tensor, nn

import torch_rsst

WIDTH, HEADS, EACH = 16, 4, 4
TOKENS = (5, 7)


class SplitByWidth(nn.Module):
    """nanoGPT: one fused layer, split and put together by the width of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.n_head, self.n_embd = HEADS, WIDTH

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        parts = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (p.view(b, t, self.n_head, c // self.n_head).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, c))


class ViewByWidth(nn.Module):
    """DINO: a view by the width of the input, a softmax of its own, and the weights returned."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = HEADS, EACH**-0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class ScaledBoth(nn.Module):
    """Whisper: separate layers, one without a bias, queries and keys scaled alike."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = HEADS
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).view(*x.shape[:2], self.n_head, -1).permute(0, 2, 1, 3)
            for layer in (self.query, self.key, self.value)
        )
        scale = EACH**-0.25
        weights = ((q * scale) @ (k * scale).mT).softmax(-1)
        return self.out((weights @ v).permute(0, 2, 1, 3).flatten(start_dim=2))


class GroupedQueries(nn.Module):
    """LLaMA: rotated queries and keys, of which several share a key and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.n_q, self.n_kv, self.d = HEADS, HEADS // 2, EACH
        self.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        angle = torch.arange(t, dtype=x.dtype)[:, None] / 10.0 ** torch.arange(EACH // 2)
        sin, cos = angle.sin()[:, None], angle.cos()[:, None]

        def rotated(z: Tensor) -> Tensor:
            one, two = z.chunk(2, -1)
            return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)

        q = rotated(self.wq(x).view(b, t, self.n_q, self.d))
        k, v = (layer(x).view(b, t, self.n_kv, self.d) for layer in (self.wk, self.wv))
        k, v = (z.repeat_interleave(self.n_q // self.n_kv, 2) for z in (rotated(k), v))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        weights = F.softmax(q @ k.transpose(2, 3) / math.sqrt(self.d), -1)
        return self.wo((weights @ v).transpose(1, 2).reshape(b, t, -1))


class Cross(nn.Module):
    """diffusers: queries from one sequence, keys and values from another, the output in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.context = HEADS, nn.Parameter(torch.randn(3, 6))
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k, self.to_v = (nn.Linear(6, WIDTH, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        given = self.context.expand(b, -1, -1)
        inner = self.to_k(given).shape[-1]
        q, k, v = (
            z.view(b, -1, self.heads, inner // self.heads).transpose(1, 2)
            for z in (self.to_q(x), self.to_k(given), self.to_v(given))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, inner)
        return self.to_out[1](self.to_out[0](out))


class Sums(nn.Module):
    """einsum: every product is one, the sizes are told by unflatten."""

    def __init__(self) -> None:
        super().__init__()
        self.h = HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z(x).unflatten(-1, (self.h, -1)) for z in (self.q, self.k, self.v))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).div(2).softmax(-1)
        return self.o(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class Chunked(nn.Module):
    """vit-pytorch: one fused layer without a bias, in three chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.amount, self.to_qkv = HEADS, nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            z.unflatten(-1, (self.amount, -1)).transpose(1, 2)
            for z in self.to_qkv(x).chunk(3, dim=-1)
        )
        weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / 2, dim=-1)
        return self.to_out(torch.matmul(weights, v).transpose(1, 2).flatten(2))


class Parameters(nn.Module):
    """The original transformer's notation: a parameter of (heads, inputs, features) for each projection."""

    def __init__(self) -> None:
        super().__init__()
        self.w_q, self.w_k, self.w_v = (
            nn.Parameter(torch.randn(HEADS, WIDTH, EACH) / 4) for _ in range(3)
        )
        self.w_o = nn.Parameter(torch.randn(HEADS, EACH, WIDTH) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,hcd->bhnd", x, w) for w in (self.w_q, self.w_k, self.w_v))
        context = (q @ k.mT / 2).softmax(-1) @ v
        return torch.einsum("bhnd,hdc->bnc", context, self.w_o)


CUT = {ScaledBoth: 4, GroupedQueries: 2, Cross: 4, Sums: 4, Chunked: 4, Parameters: 4}
MASKED = (SplitByWidth, ViewByWidth)


class Layer(nn.Module):
    """Where such an attention stands."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


def model_of(attention: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(attention()), Layer(attention()), nn.Linear(WIDTH, 3))
    return randomize(model).double().eval()


def inputs_of(tokens: int) -> Tensor:
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize(
    ("attention", "heads"), CUT.items(), ids=lambda v: getattr(v, "__name__", v)
)
def test_heads_of_any_attention_are_cut_exactly(attention: type[nn.Module], heads: int) -> None:
    model = model_of(attention)
    groups = torch_rsst.find_groups(model, "heads", example_inputs=inputs_of(TOKENS[0]))
    assert [(layer.units, layer.fixed) for layer in groups.layers] == [(heads, "")] * 2
    dense = copy.deepcopy(model)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = assert_compacts(model, groups, inputs_of(TOKENS[0]), tolerance=1e-12, train=True)
    assert difference(model.eval(), small.eval(), inputs_of(TOKENS[1])) < 1e-12
    assert difference(model, dense, inputs_of(TOKENS[1])) > 1e-3
    owned = sum(p.numel() for layer in dense[:2] for p in layer.attention.parameters())
    gone = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in small.parameters())
    assert gone > 0.4 * owned


@pytest.mark.parametrize("attention", MASKED, ids=lambda v: v.__name__)
def test_heads_of_a_fixed_width_are_masked_and_the_remedy_is_told(
    attention: type[nn.Module],
) -> None:
    model = model_of(attention)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = torch_rsst.find_groups(model, "heads", example_inputs=inputs_of(TOKENS[0]))
    assert [layer.units for layer in groups.layers] == [4, 4]
    assert "let sizes follow from the tensors: view(B, T, num_heads, -1) for the heads" in str(
        caught[0].message
    )
    assert "8 to mask only" in str(groups)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    assert torch_rsst.sparsity_report(model, groups).gone("heads") == 4
