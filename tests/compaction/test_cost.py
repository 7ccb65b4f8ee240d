"""The cost of a model, against numbers worked out by hand; models stay as they were."""

from __future__ import annotations

import copy
import statistics
import warnings
from typing import ClassVar

import pytest
import torch
from tiny_models import mlp, same
from torch import Tensor, nn
from torch.nn.utils import prune

import torch_rsst
from torch_rsst.compaction.cost import (
    Cost,
    count_parameters,
    guess_inputs,
    measure_cost,
    shapes_of,
    time_in_turns,
)


class Products(nn.Module):
    """A batch of matrix products, and attention in one call."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        product: Tensor = torch.bmm(a, b)
        return nn.functional.scaled_dot_product_attention(a, b.mT, b.mT) + product.sum()


class Picky(nn.Module):
    """Its shapes depend on values. What it notes on itself would be put back."""

    modes: ClassVar[list[bool]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.layer(x[x[:, 0] > 0])


LAYERS = {
    # rows · inputs · outputs
    "linear": (nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
    # batch · out · in · kernel · places
    "convolution": (nn.Conv2d(4, 6, 3), (2, 4, 10, 10), 2 * 6 * 4 * 9 * 8 * 8),
    "grouped convolution": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 10, 10), 2 * 6 * 2 * 9 * 8 * 8),
    "no products": (nn.Sequential(nn.LayerNorm(5), nn.GELU()), (3, 5), 0),
}


@pytest.mark.parametrize(("layer", "shape", "expected"), LAYERS.values(), ids=LAYERS)
def test_layers(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert measure_cost(layer, torch.randn(shape)).multiply_adds == expected


@pytest.mark.parametrize("training", [True, False])
def test_products_and_fused_attention_count(training: bool) -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 3)
    # One product of 2 · 3·4·3, and two in the attention.
    model = Products().train(training)
    assert measure_cost(model, (a, b)).multiply_adds == 3 * 2 * 3 * 4 * 3
    assert measure_cost(model, {"a": a, "b": b}).multiply_adds == 3 * 2 * 3 * 4 * 3


@pytest.mark.parametrize("training", [True, False])
def test_pytorchs_encoder_counts_in_both_modes(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(training)
    tokens = torch.randn(3, 5, 8)
    projections, attention, neurons = 4 * 8 * 8, 2 * 5 * 8, 2 * 8 * 16
    expected = 3 * 5 * (projections + attention + neurons)
    assert measure_cost(layer, tokens).multiply_adds == expected


def test_parameters_count_once_and_masked_entries_as_stored() -> None:
    model = mlp()
    assert count_parameters(model) == 8 * 4 + 8 + 2 * 8 + 2
    torch_rsst.l1_unstructured(model[0], "weight", amount=0.5)
    assert count_parameters(model) == 8 * 4 + 8 + 2 * 8 + 2
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert measure_cost(tied, torch.randn(1, 4)) == Cost(parameters=16, multiply_adds=32)


@pytest.mark.parametrize("tool", [prune, torch_rsst], ids=["stock", "ours"])
def test_masked_models_stay_as_they_were(tool: object) -> None:
    model, inputs = mlp(), torch.randn(3, 4)
    tool.l1_unstructured(model[0], "weight", amount=0.5)  # type: ignore[attr-defined]
    model.train()
    before, weight = copy.deepcopy(model.state_dict()), model[0].weight.clone()
    assert measure_cost(model, inputs).multiply_adds == 3 * (4 * 8 + 8 * 2)
    assert model.training
    assert same(model[0].weight, weight)
    assert all(same(value, before[name]) for name, value in model.state_dict().items())


def test_models_that_read_values_are_run_and_put_back() -> None:
    model = Picky().train()
    inputs = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [2.0, 0, 0]])
    state = torch.get_rng_state()
    assert measure_cost(model, inputs) == Cost(parameters=8, multiply_adds=2 * 3 * 2)
    assert set(model.modes) == {False}
    model.modes.clear()
    assert model.training
    assert same(torch.get_rng_state(), state)


def test_a_wrong_example_raises_what_the_model_raises() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        measure_cost(mlp(), torch.randn(3, 5))
    assert torch.backends.mha.get_fastpath_enabled()


def test_wrappers_are_left_out() -> None:
    inputs = torch.randn(3, 4)
    expected = measure_cost(mlp(), inputs)
    assert measure_cost(nn.DataParallel(mlp()), inputs) == expected
    assert measure_cost(torch.compile(mlp()), inputs) == expected  # type: ignore[arg-type]


def test_shapes_take_no_memory_and_keep_ties() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[0].table = torch.zeros(2)  # type: ignore[assignment]
    shapes = shapes_of(model)
    assert all(t.is_meta for t in [*shapes.parameters(), *shapes.buffers(), shapes[0].table])
    assert shapes[0].weight is shapes[2].weight
    assert isinstance(shapes[0].weight, nn.Parameter)
    assert not model[0].weight.is_meta


def test_guesses_are_single_samples() -> None:
    guess = guess_inputs(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert guess.shape[:2] == (1, 3)
    assert guess_inputs(mlp()) is None


def test_latency_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()).train()
    inputs = torch.randn(3, 4)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ((first, *_),) = time_in_turns([model], inputs, repeats=3, warmup=0)
    assert 0.0 < first < 10.0
    assert all(module.training for module in model.modules())
    assert all(same(value, before[name]) for name, value in model.state_dict().items())
    assert same(torch.get_rng_state(), state)


def test_models_take_turns_in_eval_mode_without_gradients() -> None:
    seen: list[tuple[str, bool, bool]] = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.name, self.training, torch.is_grad_enabled()))
            return x

    models = [Noted("a"), Noted("b")]
    runs = time_in_turns(models, torch.zeros(1), repeats=2, warmup=1)
    assert seen == [("a", False, False), ("b", False, False)] * 3
    assert [len(timed) for timed in runs] == [2, 2]


def test_a_larger_model_takes_longer() -> None:
    small, large = (nn.Linear(8, 8), nn.Sequential(*(nn.Linear(512, 512) for _ in range(8))))
    models = [nn.Sequential(nn.Linear(512, 8), small), large]
    quick, slow = time_in_turns(models, torch.randn(64, 512), repeats=9)
    assert statistics.median(quick) < statistics.median(slow)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"repeats": 0}, ValueError, "repeats: expected an int >= 1, got 0. Pass 1 or more."),
        ({"warmup": -1}, ValueError, "warmup: expected an int >= 0, got -1. Pass 0 or more."),
    ],
)
def test_bad_counts(arguments: dict[str, int], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        time_in_turns([mlp()], torch.randn(1, 4), **arguments)
    assert str(raised.value) == text


def test_only_modules_are_timed() -> None:
    with pytest.raises(TypeError) as raised:
        time_in_turns([len], [1])  # type: ignore[list-item]
    assert str(raised.value) == (
        "model: expected a module, got builtin_function_or_method. "
        "Pass the torch.nn.Module to time."
    )


@pytest.mark.needs_timm
@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [
        ("vit_base_patch16_224", 86_567_656, 17.564),
        ("resnet50", 25_557_032, 4.089),
        ("swin_tiny_patch4_window7_224", 28_288_354, 4.491),
    ],
)
def test_known_models(name: str, parameters: int, giga: float) -> None:
    import timm

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # initializing without values does nothing, and says so
        model = timm.create_model(name)
    cost = measure_cost(model, torch.randn(1, 3, 224, 224))
    assert cost.parameters == parameters
    assert cost.multiply_adds / 1e9 == pytest.approx(giga, abs=5e-4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_latency_on_a_gpu() -> None:
    model = mlp().cuda()
    ((first, *_),) = time_in_turns([model], torch.randn(3, 4, device="cuda"), repeats=3)
    assert first > 0.0
    assert measure_cost(model, torch.randn(3, 4, device="cuda")).multiply_adds == 144
