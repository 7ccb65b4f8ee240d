"""find_groups says of all parameters of a model whose they are, or why they stay."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_rsst
from torch_rsst import UnsupportedModuleWarning, find_groups
from torch_rsst.discovery.account import _UNKNOWN
from torch_rsst.groups.groups import NO_UNIT, Groups
from torch_rsst.masking.names import named_weights


def offered_share(model: nn.Module, groups: Groups) -> float:
    """The slow way: entry by entry."""
    total, offered = 0, 0
    for name, weight in named_weights(model).items():
        owned = torch.zeros(weight.shape, dtype=torch.bool)
        for layer in groups.layers:
            for member in layer.members:
                if member.parameter == name:
                    shape = [-1 if d == member.dim else 1 for d in range(weight.ndim)]
                    owned |= (member.unit_of != NO_UNIT).reshape(shape)
        total, offered = total + weight.numel(), offered + int(owned.sum())
    return offered / total


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3)
        self.norm, self.last = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(self.stem(x).relu()).mean((2, 3))))


@pytest.mark.parametrize("seed", [*range(20), 42, 237])
def test_neurons_that_are_hardly_ever_active_are_found_whatever_weights_are_drawn(seed) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(Small(), nn.ReLU(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    groups = find_groups(model, example_inputs=torch.randn(2, 1, 8, 8), on_unsupported="ignore")
    assert [(layer.kind, layer.units) for layer in groups.layers] == [
        ("neurons", 5),
        ("neurons", 3),
    ]


def test_the_parts_of_a_small_network_literally() -> None:
    model = nn.Sequential(Small(), nn.ReLU(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    groups = find_groups(model, example_inputs=torch.randn(2, 1, 8, 8), on_unsupported="ignore")
    total = sum(p.numel() for p in model.parameters())
    assert {(w.name, w.role, round(w.share * total)) for w in groups.whole} == {
        ("0.stem", "input", 20),
        ("0.conv", "left", 76),
        ("0.norm", "left", 8),
        ("4", "output", 2),
    }
    assert str(groups.whole[0]) == (
        f"0.conv ({76 / total:.1%} of the parameters): they are joined by LayerNorm"
    )
    assert offered_share(model, groups) + sum(w.share for w in groups.whole) == pytest.approx(1)


class Experts(nn.Module):
    """Stacked parameters that no adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, 6, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eij->bej", x, self.up).softmax(1).sum(1)


def test_a_large_part_without_units_is_named_with_its_share() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)), Experts())
    with pytest.warns(
        UnsupportedModuleWarning, match=r"These stay whole: 1 \(3\d\.\d% of the param"
    ):
        find_groups(model, example_inputs=torch.randn(2, 4))


class FixedAttention(nn.Module):
    """A vision transformer's attention that writes its width down."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(b, n, c))


def test_units_to_mask_only_are_announced_once_with_the_remedy() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(16), FixedAttention()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(self.norm(x))

    model = nn.Sequential(Block(), Block())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = find_groups(model)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith(
        "Can be masked but not cut: 0.attn (4 heads), 1.attn (4 heads): it does not"
    )
    assert text.endswith(
        "numbers for each head that it keeps belong in a buffer (register_buffer)."
    )
    assert str(groups) == "8 heads (8 to mask only) in 2 layers"


def test_inputs_that_were_given_are_not_asked_for() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
            self.calls = iter(range(1))

        def forward(self, x: Tensor) -> Tensor:
            next(self.calls)
            return self.b(self.a(x))

    with pytest.raises(ValueError, match="it cannot be run") as caught:
        find_groups(Fails(), example_inputs=torch.randn(1, 3, 8, 8))
    assert "pass example_inputs" not in str(caught.value)


class StateSpace(nn.Module):
    """A state space by hand, whose recurrence is written with einsum: it looks like an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 12
        self.in_proj, self.out_proj = nn.Linear(8, 24), nn.Linear(12, 8)
        self.conv1d = nn.Conv1d(12, 12, 4, groups=12, padding=3)
        self.x_proj, self.rate = nn.Linear(12, 24, bias=False), nn.Parameter(torch.rand(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.in_proj(x).split([self.width, self.width], -1)
        u = self.conv1d(u.mT)[..., : x.shape[1]].mT.sigmoid()
        given, taken = self.x_proj(u).chunk(2, -1)
        state, out = x.new_zeros(x.shape[0], self.width, 12), []
        for t in range(x.shape[1]):
            new = torch.einsum("bd,bn->bdn", u[:, t], given[:, t])
            state = state * torch.exp(-self.rate.abs()) + new
            out.append(torch.einsum("bdn,bn->bd", state, taken[:, t]))
        return self.out_proj(torch.stack(out, 1) * gate.sigmoid())


def test_a_mixer_all_of_whose_layers_have_channels_is_no_attention_that_stays_whole() -> None:
    model, inputs = nn.Sequential(StateSpace(), nn.Tanh()), torch.randn(2, 5, 8)
    groups = find_groups(model, example_inputs=inputs, on_unsupported="raise")
    assert [(layer.kind, layer.units, layer.fixed) for layer in groups.layers] == [
        ("channels", 12, "")
    ]


MODELS = [
    "test_vit",
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "test_byobnet",
    "test_mambaout",
]
MORE = ["test_vit3", "test_nfnet", "levit_128s", "edgenext_xx_small", "mobilenetv3_small_050"]


@pytest.mark.needs_timm
@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_nearly_all_parameters_are_offered_or_named(name: str) -> None:
    import timm

    options: dict[str, Any] = {"num_classes": 10}
    model = timm.create_model(name, **options).eval()
    groups = find_groups(model, on_unsupported="ignore")
    offered = offered_share(model, groups)
    named = sum(whole.share for whole in groups.whole if whole.reason != _UNKNOWN)
    assert offered + named >= 0.95
    assert offered + sum(whole.share for whole in groups.whole) == pytest.approx(1)


def test_groups_that_are_chosen_keep_no_account() -> None:
    groups = find_groups(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    assert [(whole.name, whole.role) for whole in groups.whole] == [("2", "output")]
    assert torch_rsst.Groups(groups.layers).whole == ()


class FixedView(nn.Module):
    """Its last convolution, without a bias, feeds a view of a fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, bias=False)
        self.second, self.norm = nn.Conv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32)
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.second(self.first(self.stem(x).relu()).relu())).relu()
        return self.out(x.mean((2, 3)).view(-1, 32))


def test_a_layer_whose_outputs_stay_is_named_although_units_own_all_that_it_takes_in() -> None:
    with pytest.warns(UnsupportedModuleWarning, match=r"second \(channels\): its forward fixes"):
        groups = find_groups(FixedView(), example_inputs=torch.randn(2, 3, 12, 12))
    assert [layer.name for layer in groups.layers] == ["first"]
    reasons = {whole.name: whole.reason for whole in groups.whole}
    assert reasons["norm"].startswith("its forward fixes how many it has")


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 64), nn.Linear(12, 64)
        self.mlp = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.mlp((self.one(x) + self.two(y)).relu())


def test_a_model_that_cannot_be_run_without_example_inputs_says_so_of_what_stays() -> None:
    with pytest.warns(UnsupportedModuleWarning, match=r"missing 1 .*'y'.*; pass example_inputs"):
        groups = find_groups(TwoInputs())
    assert str(groups) == "8 neurons in 1 layer"
    both = (torch.randn(2, 8), torch.randn(2, 12))
    assert str(find_groups(TwoInputs(), example_inputs=both)) == "72 neurons in 2 layers"


def test_what_is_not_understood_is_named_by_size_the_largest_first() -> None:
    layers = [nn.Conv2d(3, 8, 3)]
    for width in (8, 8, 16, 8, 32):
        layers += [nn.Conv2d(layers[-1].out_channels, width, 3), nn.GroupNorm(1, width)]
        layers = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    norms = [nn.GroupNorm(1, layer.out_channels) for layer in layers]
    model = nn.Sequential(*(m for pair in zip(layers, norms, strict=True) for m in pair))
    with pytest.raises(ValueError, match=r"Not understood: 10 \(channels\).*; 6 \(channels\)"):
        find_groups(model, example_inputs=torch.randn(2, 3, 20, 20))


def test_inputs_in_place_of_kinds_are_named() -> None:
    text = r"kinds: expected names of kinds, got a Tensor of shape \(2, 8\)\. Pass inputs by name"
    with pytest.raises(TypeError, match=text):
        find_groups(nn.Linear(8, 8), torch.randn(2, 8))


def test_a_kind_that_is_none_is_named_by_of_kind() -> None:
    groups = find_groups(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    assert not groups.of_kind("heads").layers
    with pytest.raises(
        ValueError, match=r"of_kind: expected one of .*'head'\. Did you mean 'heads'"
    ):
        groups.of_kind("head")
