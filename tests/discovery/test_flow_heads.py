"""Attention with separate queries, keys and values, and fused 1×1 convolutions, found from data flow."""

from __future__ import annotations

import pytest
import torch
from contract import assert_contract
from torch import nn

import torch_rsst
from torch_rsst.discovery import survey


class Separate(nn.Module):
    """As people write it: its width is told by its layers."""

    def __init__(
        self, heads: int = 3, kv_heads: int = 3, norm: bool = False, after: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.inner_dim = heads, kv_heads, 4 * heads
        self.to_q = nn.Linear(8, 4 * heads, bias=False)
        self.to_k, self.to_v = nn.Linear(8, 4 * kv_heads), nn.Linear(8, 4 * kv_heads)
        self.k_norm = nn.LayerNorm(4)
        self.norm = nn.LayerNorm(4 * heads) if norm else after or nn.Identity()
        self.to_out = nn.Sequential(nn.Linear(4 * heads, 8), nn.Dropout(0.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q = self.to_q(x).view(batch, tokens, self.num_heads, 4).transpose(1, 2)
        k, v = (
            layer(x).view(batch, tokens, self.num_kv_heads, 4).transpose(1, 2)
            for layer in (self.to_k, self.to_v)
        )
        each = self.num_heads // self.num_kv_heads
        k, v = (part.repeat_interleave(each, dim=1) for part in (self.k_norm(k), v))
        weights = (q @ k.mT).softmax(-1)
        return self.to_out(
            self.norm((weights @ v).transpose(1, 2).reshape(batch, tokens, self.inner_dim))
        )


class ByHand(Separate):
    """No function of PyTorch makes its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, 4)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        weights = self.positive(q @ k.mT)
        out = weights / weights.sum(-1, keepdim=True) @ v
        return self.to_out(out.transpose(1, 2).flatten(2))

    def positive(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores - scores.amax(-1, keepdim=True)).exp()


class LinearByHand(ByHand):
    def positive(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.relu() + 1e-3


class Shifted(ByHand):
    """It makes a tensor with values when it runs."""

    def positive(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores + torch.ones(scores.shape, device="cpu")).exp()


class FixedWidth(nn.Module):
    """Its output is as wide as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q, self.kv, self.proj = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q = self.q(x).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(batch, tokens, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        context = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2)
        return self.proj(context.reshape(batch, tokens, width))


class OnMaps(nn.Module):
    """A fused projection by a 1×1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.qkv, self.proj = nn.Conv2d(8, 36, 1), nn.Conv2d(12, 8, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        out = v @ (q.mT @ k).softmax(-1).mT
        return self.proj(out.flatten(1, 2).unflatten(-1, x.shape[2:]))


@pytest.mark.parametrize("amount", [1, 1.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 3)])
def test_separate_projections(heads: int, kv_heads: int, amount: float) -> None:
    model = nn.Sequential(nn.Linear(5, 8), Separate(heads, kv_heads))
    inputs = torch.randn(2, 6, 5, dtype=torch.float64)
    (layer,) = assert_contract(model, inputs, kinds=["heads"], amounts=[amount]).layers
    assert layer.units == kv_heads
    assert layer.family == "FlowHeads"


@pytest.mark.parametrize(
    "after", [nn.ReLU(), nn.Hardswish(inplace=True), nn.ReLU6(), nn.Hardtanh()]
)
def test_activations_that_are_flat_on_all_tokens_hide_nothing(after: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(5, 8), Separate(after=after)).double()
    groups = torch_rsst.find_groups(model, "heads", example_inputs=torch.randn(1, 2, 5).double())
    (layer,) = groups.layers
    assert {member.parameter: int((member.unit_of >= 0).sum()) for member in layer.members} == {
        "1.to_q.weight": 12,
        **{f"1.{name}.{part}": 12 for name in ("to_k", "to_v") for part in ("weight", "bias")},
        "1.to_out.0.weight": 12,
    }


@pytest.mark.parametrize("kind", [ByHand, LinearByHand])
def test_weights_made_by_hand(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(5, 8), kind())
    inputs = torch.randn(2, 6, 5, dtype=torch.float64)
    (layer,) = assert_contract(model, inputs, kinds=["heads"], amounts=[1]).layers
    assert (layer.units, layer.family) == (3, "FlowHeads")


def test_numbers_follow() -> None:
    model = Separate(6, 3)
    groups = torch_rsst.find_groups(model, "heads")
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=1))
    small = torch_rsst.compact(model, groups)
    assert (small.num_heads, small.num_kv_heads, small.inner_dim) == (4, 2, 16)


class Clipped(nn.Module):
    """A projection in a module of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).clamp(-9, 9)


class Encoder(nn.Module):
    """Two blocks of attention whose projections are wrapped, between layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = (
            nn.Linear(5, 8),
            nn.ModuleList([Separate(3, 3), Separate(4, 2)]),
        )
        for attention in self.attention:
            for name in ("to_q", "to_k", "to_v", "to_out"):
                setattr(attention, name, Clipped(getattr(attention, name)))
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for attention in self.attention:
            x = x + attention(x)
        return self.last(x)


def test_projections_in_modules_of_their_own_belong_to_the_attention_around_them() -> None:
    inputs = torch.randn(2, 6, 5, dtype=torch.float64)
    groups = assert_contract(Encoder(), inputs, kinds=["heads"], amounts=[1])
    found = [(layer.name, layer.units, layer.fixed) for layer in groups.layers]
    assert found == [("attention.0", 3, ""), ("attention.1", 2, "")]


def test_a_forward_that_fixes_the_width_is_masked_only() -> None:
    (layer,) = torch_rsst.find_groups(FixedWidth(), "heads").layers
    assert layer.units == 2
    assert layer.fixed.startswith("it does not run without some of its units, as where its forward")
    assert "(RuntimeError: shape '[2, 4, 8]'" in layer.fixed


def test_a_norm_over_all_heads_is_refused() -> None:
    reason = "its units mix before the output layer, so that none can be removed exactly"
    with pytest.raises(ValueError, match="got none") as caught:
        torch_rsst.find_groups(Separate(norm=True), "heads", on_unsupported="ignore")
    assert reason in str(caught.value)


@pytest.mark.parametrize("kind", [Separate, Shifted])
def test_attention_on_the_meta_device_is_refused(kind: type[nn.Module]) -> None:
    reason = "its weights are on the meta device, so that it cannot be run"
    with pytest.raises(ValueError, match="got none") as caught:
        torch_rsst.find_groups(kind().to("meta"), "heads", on_unsupported="ignore")
    assert reason in str(caught.value)


@pytest.mark.parametrize("amount", [1, 1.0])
def test_convolutions(amount: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), OnMaps(), nn.Conv2d(8, 2, 1))
    inputs = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    found = assert_contract(model, inputs, kinds=["heads"], amounts=[amount])
    assert found.layers[0].family == "FusedAttention"


def test_many_numbers_that_could_count_heads_end_in_a_refusal_soon() -> None:
    """Which numbers follow is tried some times, not in all of their combinations."""
    model = nn.Sequential(FixedWidth().double())
    for place in range(40):
        setattr(model[0], f"size_{place}", 2 * (place + 1))
    with pytest.warns(torch_rsst.UnsupportedModuleWarning, match="masked but not cut"):
        torch_rsst.find_groups(model, "heads", example_inputs=torch.randn(2, 5, 8).double())


@pytest.mark.parametrize("rnn", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_no_attention(rnn: type[nn.RNNBase]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(12, 3)
            self.rnn = rnn(8, 6, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.rnn(self.first(x))[0])

    _, refused = survey(Recurrent(), example_inputs=torch.randn(2, 4, 5))
    assert not [item for item in refused if item.kind == "heads"]


class Latent(nn.Module):
    """DeepSeek's, by hand: a latent that all heads share, and one rotated key for all of them."""

    def __init__(self, heads: int, rope: int = 4) -> None:
        super().__init__()
        self.h, self.latent, self.rope = heads, 6, rope
        self.q_a, self.q_b = nn.Linear(8, 6), nn.Linear(6, heads * (3 + rope))
        self.kv_a, self.kv_b = nn.Linear(8, 6 + rope), nn.Linear(6, heads * 5)
        self.norm, self.o = nn.RMSNorm(6), nn.Linear(heads * 2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q_b(self.q_a(x)).unflatten(-1, (self.h, -1)).transpose(1, 2)
        latent, key = self.kv_a(x).split([self.latent, self.rope], -1)
        kv = self.kv_b(self.norm(latent)).unflatten(-1, (self.h, -1)).transpose(1, 2)
        (q, q_rope), (k, v) = q.split([3, self.rope], -1), kv.split([3, 2], -1)
        weights = (q @ k.mT + q_rope @ key[:, None].mT).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", [2, 3, 5])
def test_heads_are_cut_however_large_what_they_share_is(heads: int) -> None:
    model = nn.Sequential(nn.Linear(5, 8), Latent(heads))
    inputs = torch.randn(2, 6, 5, dtype=torch.float64)
    (layer,) = assert_contract(model, inputs, kinds=["heads"], amounts=[1]).layers
    assert (layer.units, layer.fixed) == (heads, "")


def test_a_query_norm_over_all_heads_is_refused_by_the_name_of_what_they_share() -> None:
    attention = Separate()
    attention.to_q = nn.Sequential(attention.to_q, nn.LayerNorm(12))
    with pytest.raises(
        ValueError, match=r"its to_q\.0\.weight serves all of its heads: it does not"
    ):
        torch_rsst.find_groups(attention, "heads", on_unsupported="ignore")


class Talking(nn.Module):
    """Its scores are mixed across heads before the softmax, its weights after it."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.h = heads
        self.q, self.k, self.v = (nn.Linear(8, 4 * heads) for _ in range(3))
        self.pre, self.post = (nn.Linear(heads, heads, bias=False) for _ in range(2))
        self.o = nn.Linear(4 * heads, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            z(x).view(*x.shape[:2], self.h, -1).transpose(1, 2) for z in (self.q, self.k, self.v)
        )
        weights = self.pre((q @ k.mT).movedim(1, -1)).softmax(-2)
        return self.o((self.post(weights).movedim(-1, 1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", [2, 4])
def test_heads_that_talk_are_cut_together_with_the_number_that_counts_them(heads: int) -> None:
    """Scores' heads and values' heads are different ones, but one number counts both."""
    model = nn.Sequential(nn.Linear(5, 8), Talking(heads))
    inputs = torch.randn(2, 6, 5, dtype=torch.float64)
    (layer,) = assert_contract(model, inputs, kinds=["heads"], amounts=[1]).layers
    assert (layer.name, layer.units) == ("1", heads)
    assert {m.parameter for m in layer.members if m.consumes} == {"1.pre.weight", "1.o.weight"}


class TwoAttentions(nn.Module):
    """The second of two attentions has a norm over all of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Separate(), Separate(norm=True)
        for name, part in [*self.first._modules.items()]:
            self.add_module(f"first_{name}", part)
        for name, part in [*self.second._modules.items()]:
            self.add_module(f"second_{name}", part)
        del self._modules["first"], self._modules["second"]

    def _attended(self, x: torch.Tensor, which: str) -> torch.Tensor:
        part = {n.removeprefix(which): m for n, m in self._modules.items() if n.startswith(which)}
        q, k, v = (part[f"to_{n}"](x).unflatten(-1, (-1, 4)).transpose(1, 2) for n in "qkv")
        mixed = ((q @ part["k_norm"](k).mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return part["to_out"](part["norm"](mixed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._attended(x, "first_") + self._attended(x, "second_")


def test_of_several_attentions_the_refused_one_is_named_by_its_output_layer() -> None:
    groups, refused = survey(TwoAttentions(), ("heads",), example_inputs=torch.randn(2, 4, 8))
    assert [(layer.name, layer.units, layer.fixed) for layer in groups.layers] == [
        ("first_to_out.0", 3, "")
    ]
    assert [(item.layer, item.reason[:13]) for item in refused] == [
        ("second_to_out.0", "its units mix")
    ]


class OneHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 4, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.q(x) @ self.k(x).mT / 4**0.5).softmax(-1) @ self.v(x)


class ListOfHeads(nn.Module):
    """Every head is a module of its own, as tutorials write it."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.proj = (
            nn.ModuleList(OneHead() for _ in range(heads)),
            nn.Linear(4 * heads, 8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], -1))


@pytest.mark.parametrize("amount", [1, 1.0])
def test_heads_that_are_modules_of_their_own_are_cut(amount: float) -> None:
    model = nn.Sequential(nn.Linear(5, 8), ListOfHeads())
    inputs = torch.randn(2, 6, 5, dtype=torch.float64)
    (layer,) = assert_contract(model, inputs, kinds=["heads"], amounts=[amount]).layers
    assert (layer.name, layer.units) == ("1", 3)


class Parallel(nn.Module):
    """One matrix makes queries, keys, values and hidden neurons; one takes heads and neurons in."""

    def __init__(self, heads: int = 3, neurons: int = 10, neurons_first: bool = False) -> None:
        super().__init__()
        self.h, self.wide, self.neurons, self.first = heads, 12 * heads, neurons, neurons_first
        self.inner, self.outer = (
            nn.Linear(8, 12 * heads + neurons),
            nn.Linear(4 * heads + neurons, 8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv, hidden = self.inner(x).split([self.wide, self.neurons], -1)
        q, k, v = qkv.unflatten(-1, (3, self.h, -1)).permute(2, 0, 3, 1, 4)
        parts = [((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2), hidden.tanh()]
        return self.outer(torch.cat(parts[::-1] if self.first else parts, -1))


@pytest.mark.parametrize("neurons_first", [False, True])
def test_heads_beside_neurons_of_the_same_layers_are_cut(neurons_first: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 8), Parallel(neurons_first=neurons_first))
    inputs = torch.randn(2, 6, 5, dtype=torch.float64)
    (layer,) = assert_contract(model, inputs, kinds=["heads"], amounts=[1]).layers
    owned = {m.parameter: int((m.unit_of >= 0).sum()) for m in layer.members}
    assert owned == {"1.inner.weight": 36, "1.inner.bias": 36, "1.outer.weight": 12}


class ListOfParameters(nn.Module):
    """Every head has an output matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.ParameterList(torch.randn(8, 4) for _ in range(3)) for _ in range(3)
        )
        self.o = nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(
            ((x @ q) @ (x @ k).mT).softmax(-1) @ (x @ v) @ o
            for q, k, v, o in zip(self.q, self.k, self.v, self.o, strict=True)
        )


def test_one_head_is_said_to_be_needed_whatever_its_number_is_called() -> None:
    _, refused = survey(ListOfHeads(1), ("heads",), example_inputs=torch.randn(2, 4, 8))
    assert [item.reason for item in refused] == ["it has no more heads than it needs to run (1)"]


def test_attentions_of_one_module_that_are_refused_alike_are_named_once() -> None:
    _, refused = survey(ListOfParameters(), ("heads",), example_inputs=torch.randn(2, 4, 8))
    assert [item.reason for item in refused] == [
        "of each of its 3 attentions: it has no more heads than it needs to run (1)"
    ]


class Cached(nn.Module):
    """It keeps keys and values in buffers, and attends to these."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.qkv, self.o = 3, nn.Linear(8, 36), nn.Linear(12, 8)
        self.register_buffer("keys", torch.zeros(2, 16, 3, 4))
        self.register_buffer("values", torch.zeros(2, 16, 3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.h, -1)).unbind(2)
        self.keys[:batch, :tokens], self.values[:batch, :tokens] = k.detach(), v.detach()
        k, v = (kept[:batch, :tokens].transpose(1, 2) for kept in (self.keys, self.values))
        out = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v)
        return self.o(out.transpose(1, 2).flatten(2))


def test_keys_and_values_that_are_kept_in_buffers_are_followed_and_cut() -> None:
    model = nn.Sequential(nn.Linear(5, 8), Cached())
    inputs = torch.randn(2, 6, 5, dtype=torch.float64)
    # Without gradients of keys and values: they are detached.
    found = assert_contract(model, inputs, kinds=["heads"], amounts=[1], train=False)
    assert [m.parameter for m in found.layers[0].buffers] == ["1.h", "1.keys", "1.values"]
    assert not bool(model[1].keys.any())


class Functional(nn.Module):
    """It calls the function that nn.MultiheadAttention is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.out = nn.Parameter(torch.randn(24, 8)), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, out = (8, 2, self.given, None, None, None, False, 0.0), self.out
        return nn.functional.multi_head_attention_forward(x, x, x, *own, out.weight, out.bias)[0]


class Rooted(ByHand):
    """Whether the square root of its temperature is finite, the sign of a small number decides."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.full((3, 1, 1), 1e-4))

    def positive(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores * self.temperature.sqrt()).softmax(-1)


def test_weights_that_must_stay_positive_are_tried_positive() -> None:
    model = nn.Sequential(Rooted(), nn.Linear(8, 3))
    found = torch_rsst.find_groups(model, "heads", example_inputs=torch.randn(4, 2, 8))
    assert [(layer.units, layer.fixed) for layer in found.layers] == [(3, "")]


class Unsteady(ByHand):
    """Its scores are never finite."""

    def positive(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores / scores.mul(0)).softmax(-1)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (Functional, "it calls multi_head_attention_forward, which fixes how wide all heads are"),
        (Unsteady, "its outputs are not finite with the random weights on which it is tried"),
    ],
)
def test_attention_is_refused_for_its_own_reason(attention: type[nn.Module], reason: str) -> None:
    model = nn.Sequential(attention(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=reason):
        torch_rsst.find_groups(
            model, "heads", example_inputs=torch.randn(4, 2, 8), on_unsupported="ignore"
        )


class Routed(nn.Module):
    """All experts see all tokens; a softmax weighs what they put out."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 3), nn.Parameter(torch.randn(3, 8, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        each = torch.bmm(torch.einsum("tc,ech->eth", x.flatten(0, 1), self.up).tanh(), self.down)
        weights = self.gate(x.flatten(0, 1)).softmax(-1)
        return torch.einsum("etc,te->tc", each, weights).view_as(x)


def test_a_mixture_that_looks_like_an_attention_is_not_called_one() -> None:
    _, refused = survey(Routed(), ("heads",), example_inputs=torch.randn(2, 4, 8))
    assert [item.reason for item in refused] == [
        "activations are multiplied with each other in it, as in an attention, but what comes of it "
        "reaches no layer of its own that could take heads in"
    ]
