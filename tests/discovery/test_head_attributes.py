"""Whatever an attention calls the number of its heads, they are found, cut and counted anew."""

from __future__ import annotations

import pytest
import torch
from contract import assert_contract
from torch import Tensor, nn

import torch_rsst
from torch_rsst.discovery.head_attributes import (
    CUT,
    HEAD_WIDTHS,
    HEADS,
    KEY_VALUE_HEADS,
    TOTAL_WIDTHS,
    head_count,
    head_width,
    is_attention,
)

WIDTH = 4  # of one head


class Attention(nn.Module):
    """Written by hand; the attributes have the names that it is given.

    Args:
        names: of the numbers of heads and of key/value heads and of the width of all heads; "" for none.
        heads: how many there are.
        kv_heads: of keys and values.
        fused: whether one layer makes queries, keys and values.
    """

    def __init__(
        self, *names: str, heads: int = 4, kv_heads: int | None = None, fused: bool = False
    ) -> None:
        super().__init__()
        self.names, kv_heads = names, kv_heads or heads
        for name, value in zip(names, (heads, kv_heads, heads * WIDTH), strict=False):
            if name:
                setattr(self, name, value)
        if fused:
            self.qkv, self.proj = nn.Linear(8, 3 * heads * WIDTH), nn.Linear(heads * WIDTH, 8)
        else:
            self.q_proj, self.out_proj = nn.Linear(8, heads * WIDTH), nn.Linear(heads * WIDTH, 8)
            self.k_proj, self.v_proj = (nn.Linear(8, kv_heads * WIDTH) for _ in range(2))

    def _noted(self, place: int) -> int | None:
        named = place < len(self.names) and self.names[place]
        return getattr(self, self.names[place]) if named else None

    def forward(self, x: Tensor) -> Tensor:
        heads, kv_heads, width = map(self._noted, range(3))
        heads = heads or kv_heads
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(x).unflatten(-1, (3, heads, WIDTH)).unbind(2)
        else:
            q = self.q_proj(x).unflatten(-1, (heads, WIDTH))
            k, v = (
                layer(x).unflatten(-1, (kv_heads or heads, WIDTH))
                for layer in (self.k_proj, self.v_proj)
            )
            k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], 2) for part in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores, v)
        out = mixed.reshape(*x.shape[:2], width or -1) if heads else mixed.flatten(2)
        return (self.proj if hasattr(self, "qkv") else self.out_proj)(out)


def check(attention: Attention, units: int, family: str) -> None:
    model = nn.Sequential(nn.Linear(5, 8), attention)
    inputs = torch.randn(2, 6, 5, dtype=torch.float64)
    (layer,) = assert_contract(model, inputs, kinds=["heads"], amounts=[1, 1.0]).layers
    assert (layer.units, layer.family, layer.fixed) == (units, family, "")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_found_and_cut_by_every_name_of_their_number(name: str, fused: bool) -> None:
    family = "FusedAttention" if fused else "FlowHeads"
    check(Attention(name, fused=fused), 4, family)


@pytest.mark.parametrize(
    ("name", "kv_name"),
    [*((name, KEY_VALUE_HEADS[0]) for name in HEADS), *((HEADS[0], kv) for kv in KEY_VALUE_HEADS)],
)
def test_query_heads_go_with_the_key_heads_that_they_share(name: str, kv_name: str) -> None:
    check(Attention(name, kv_name, heads=4, kv_heads=2), 2, "FlowHeads")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", TOTAL_WIDTHS)
def test_the_width_of_all_heads_follows_under_every_name(name: str, fused: bool) -> None:
    family = "FusedAttention" if fused else "FlowHeads"
    check(Attention("num_heads", "", name, fused=fused), 4, family)


def test_all_that_a_module_notes_about_its_heads_is_set() -> None:
    attention = Attention("n_heads", "n_kv_heads", "inner_dim", heads=6, kv_heads=3)
    attention.n_local_heads, attention.n_local_kv_heads, attention.head_dim = 6, 3, WIDTH
    groups = torch_rsst.find_groups(attention, "heads")
    torch_rsst.apply_mask(attention, torch_rsst.regroup(attention, groups, amount=1))
    small = torch_rsst.compact(attention, groups)
    noted = {name: vars(small)[name] for name in (*CUT, *HEAD_WIDTHS) if name in vars(small)}
    assert noted == {
        "n_heads": 4,
        "n_local_heads": 4,
        "n_kv_heads": 2,
        "n_local_kv_heads": 2,
        "inner_dim": 4 * WIDTH,
        "head_dim": WIDTH,
    }


class NoAttention(nn.Module):
    """Two layers in a row."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        setattr(self, name, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


@pytest.mark.parametrize("name", [*HEADS, *KEY_VALUE_HEADS])
def test_a_number_of_heads_without_an_attention_is_named_with_the_reason(name: str) -> None:
    reason = "no adapter knows the attention of NoAttention: nothing is attended in it"
    with pytest.raises(ValueError, match=reason):
        torch_rsst.find_groups(nn.Sequential(NoAttention(name)), "heads", on_unsupported="ignore")


def test_attention_that_does_not_run_is_named_with_the_error() -> None:
    attention = Attention("n_head", "n_kv_head", heads=4, kv_heads=2, fused=True)
    attention.qkv = nn.Linear(8, 32)
    with pytest.raises(ValueError, match=r"Attention: it cannot be run alone \(unflatten"):
        torch_rsst.find_groups(attention, "heads", on_unsupported="ignore")


@pytest.mark.parametrize("name", HEAD_WIDTHS)
def test_the_width_of_one_head_is_read_by_every_name(name: str) -> None:
    module = nn.Module()
    assert (head_count(module), head_width(module), is_attention(module)) == (None, 0, False)
    setattr(module, name, 16)
    assert (head_count(module), head_width(module), is_attention(module)) == (None, 16, True)


def test_what_is_no_number_counts_no_heads() -> None:
    module = nn.Module()
    module.heads, module.nhead = nn.Linear(2, 2), True
    assert head_count(module) is None
    module.num_heads = 3
    assert head_count(module) == 3


def test_every_name_is_listed_once() -> None:
    names = [*CUT, *HEAD_WIDTHS]
    assert len(set(names)) == len(names)
