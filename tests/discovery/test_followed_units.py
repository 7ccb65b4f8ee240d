"""Units of modules whose structure no adapter knows, and outputs and states that are no plain tensors."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 # as PyTorch calls it
from contract import assert_compacts
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import torch_rsst
from torch_rsst import find_groups
from torch_rsst.groups.groups import Groups

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def assert_halves(model: nn.Module, groups: Groups, x: Tensor = X) -> None:
    model.double()
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    assert_compacts(model, groups, x.double(), tolerance=1e-10, train=True)


# Modules


class Around(nn.Module):
    """A block of a transformer around one part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.norm, self.part, self.head = nn.LayerNorm(16), part, nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.part(self.norm(x)))


class SwiGLU(nn.Module):
    """As wide inside as outside, registered in the order of LLaMA."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class OutputFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.inner = nn.Linear(32, 16), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.inner(x)))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


def scaled() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), Scale(), nn.ReLU(), nn.Linear(32, 16))


@pytest.mark.parametrize(("make", "units"), [(SwiGLU, 16), (OutputFirst, 32), (scaled, 32)])
def test_hidden_neurons_are_followed_where_no_adapter_knows_the_module(
    make: Callable[[], nn.Module], units: int
) -> None:
    model = Around(make())
    groups = find_groups(model, example_inputs=X)
    assert str(groups) == f"{units} neurons in 1 layer"
    assert_halves(model, groups)


class OwnParameters(nn.Module):
    """A sparse autoencoder whose weights are the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (
            nn.Parameter(torch.randn(shape) * 0.3) for shape in ((16, 48), (48, 16))
        )
        self.bias = nn.Parameter(torch.zeros(48))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.encoder + self.bias) @ self.decoder


def test_neurons_of_parameters_of_the_model_itself() -> None:
    model = OwnParameters()
    groups = find_groups(model, example_inputs=X)
    assert str(groups) == "48 neurons in 1 layer"
    assert_halves(model, groups)


class GatedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project_in = nn.Conv2d(16, 40, 1)
        self.dwconv = nn.Conv2d(40, 40, 3, padding=1, groups=40)
        self.project_out = nn.Conv2d(20, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.dwconv(self.project_in(x)).chunk(2, 1)
        return self.project_out(F.gelu(a) * b)


class Restored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.out = (
            nn.Conv2d(3, 16, 3, padding=1),
            GatedConvolution(),
            nn.Conv2d(16, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(x + self.body(x))


def test_a_module_whose_units_are_channels_is_not_said_to_stay_whole() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = find_groups(Restored(), example_inputs=torch.randn(2, 3, 8, 8))
    assert str(groups) == "20 channels in 1 layer"


class HandWrittenGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = 20
        self.given, self.state = nn.Linear(16, 60), nn.Linear(20, 60)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.hidden)
        for step in x.unbind(1):
            a, b, c = self.given(step).chunk(3, 1)
            d, e, f = self.state(h).chunk(3, 1)
            keep = (b + e).sigmoid()
            h = (1 - keep) * (c + (a + d).sigmoid() * f).tanh() + keep * h
        return self.head(h)


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = 20
        self.cell, self.head = nn.LSTMCell(16, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.hidden)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        return self.head(h)


class Elman(nn.Module):
    """Its one layer reads input and state, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 20
        self.layer, self.head = nn.Linear(36, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), self.hidden, dtype=x.dtype)
        for step in x.unbind(1):
            h = self.layer(torch.cat([step, h], 1)).tanh()
        return self.head(h)


@pytest.mark.parametrize("make", [HandWrittenGRU, Cells, Elman])
def test_hidden_units_of_recurrent_layers_written_by_hand(make: Callable[[], nn.Module]) -> None:
    model = make()
    groups = find_groups(model, example_inputs=X)
    assert str(groups) == "20 neurons in 1 layer"
    assert_halves(model, groups, torch.randn(3, 7, 16))
    assert_compacts(model, groups, torch.randn(1, 2, 16, dtype=torch.float64), tolerance=1e-10)


class Cached(nn.Module):
    """Keys and values in buffers, of as many sequences as there are heads."""

    def __init__(self, sequences: int, length: int) -> None:
        super().__init__()
        self.n_heads = 4
        self.wqkv, self.wo = nn.Linear(16, 48), nn.Linear(16, 16)
        for key in ("cache_k", "cache_v"):
            self.register_buffer(key, torch.zeros(sequences, length, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (p.view(n, t, self.n_heads, -1) for p in self.wqkv(x).chunk(3, -1))
        self.cache_k[:n, :t], self.cache_v[:n, :t] = k.detach(), v.detach()
        k, v = self.cache_k[:n, :t], self.cache_v[:n, :t]
        made = F.scaled_dot_product_attention(*(p.transpose(1, 2) for p in (q, k, v)))
        return self.wo(made.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("sequences", "length"), [(4, 16), (8, 4)])
def test_a_cache_is_cut_along_its_heads_alone(sequences: int, length: int) -> None:
    model = Around(Cached(sequences, length))
    groups = find_groups(model, example_inputs=X[:1, :4])
    buffers = {(m.parameter, m.dim) for m in groups.layers[0].buffers if "cache" in m.parameter}
    assert buffers == {("part.cache_k", 2), ("part.cache_v", 2)}
    assert_halves(model, groups, torch.randn(4, 3, 16))


# Outputs


@dataclass
class Output:
    logits: Tensor
    features: Tensor


class Dotted(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Plain:
    def __init__(self, **values: Tensor) -> None:
        vars(self).update(values)


class Net(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 12), nn.Linear(12, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        features = self.b(self.a(x).relu()).relu()
        return self.wrap(logits=self.c(features), features=features)


@pytest.mark.parametrize("wrap", [dict, Output, Dotted, SimpleNamespace, Plain])
def test_what_an_object_puts_out_stays_whole(wrap: Any) -> None:
    groups = find_groups(Net(wrap), example_inputs=X)
    assert {m.parameter for layer in groups.layers for m in layer.ranked} == {
        "a.weight",
        "b.weight",
    }
    assert str(groups) == "24 neurons in 1 layer"


class Read(nn.Module):
    """What stands outside of an MLP reads its weight."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap((x + self.inner(x)) * self.inner[0].weight.square().mean())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: torch.distributions.Categorical(logits=y),
        lambda y: torch.distributions.Normal(y, 1.0),
        lambda y: torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()),
        lambda y: (y * 100).long(),
    ],
)
def test_units_are_told_by_distributions_and_by_complex_and_whole_numbers(
    wrap: Callable[[Tensor], Any],
) -> None:
    with pytest.raises(ValueError, match="the model's output differs without some of them"):
        find_groups(Read(wrap), example_inputs=X)


# What is left as it was


def spectral(training: bool) -> nn.Module:
    norm = parametrizations.spectral_norm
    model = nn.Sequential(
        nn.Linear(16, 16),
        nn.Sequential(norm(nn.Linear(16, 32)), nn.ReLU(), norm(nn.Linear(32, 16))),
        nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)),
    )
    return model.train(training)


@pytest.mark.parametrize("example", [None, X])
def test_the_iterations_of_spectral_norm_do_not_go_on(example: Tensor | None) -> None:
    model = spectral(training=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_groups(model, example_inputs=example, on_unsupported="ignore")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        random.random()
        np.random.rand()
        return weight + 0.01 * torch.randn_like(weight)


def test_random_numbers_that_a_model_draws_are_not_used_up() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    parametrize.register_parametrization(model[0], "weight", Noisy())
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    with pytest.raises(ValueError, match="Not understood"):
        find_groups(model, example_inputs=X)
    assert random.getstate() == before[0]
    assert np.random.get_state()[2] == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_blocks_under_weight_norm_are_refused_and_do_not_end_the_process() -> None:
    norm = parametrizations.weight_norm

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(norm(nn.Linear(16, 32)), nn.ReLU(), norm(nn.Linear(32, 16)))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    with pytest.raises(ValueError, match="blocks"):
        find_groups(nn.Sequential(nn.Linear(16, 16), Residual()), "blocks", example_inputs=X)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_the_remedy_for_an_older_norm_of_weights_takes_it_off(name: str) -> None:
    norm = getattr(nn.utils, name)
    model = nn.Sequential(norm(nn.Linear(16, 32)), nn.ReLU(), norm(nn.Linear(32, 16)))
    remedy = rf"with torch\.nn\.utils\.remove_{name}\(module, 'weight'\)"
    with pytest.raises(ValueError, match=remedy):
        find_groups(model, example_inputs=X)
    for layer in (model[0], model[2]):
        getattr(nn.utils, f"remove_{name}")(layer, "weight")
    assert str(find_groups(model, example_inputs=X)) == "32 neurons in 1 layer"
