"""Compiled, exported, autocast and checkpointed: a pruned model gives what it gives eagerly."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_rsst
from torch_rsst.testing import assert_mask_invariants


def batch(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Attends(nn.Module):
    """Self-attention with one input and one output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def _linear() -> tuple[nn.Module, Tensor]:
    return nn.Linear(4, 3), batch(2, 4)


def _convolution() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(2, 3, 3), batch(2, 2, 5, 5)


def _convolutions() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.Conv2d(3, 2, 2)), batch(2, 2, 5, 5)


def _mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)), batch(2, 4)


def _attention() -> tuple[nn.Module, Tensor]:
    return Attends(), batch(2, 3, 8)


def _encoder_layer() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return layer, batch(2, 3, 8)


def _timm_vit() -> tuple[nn.Module, Tensor]:
    import timm

    options: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 8}
    model = timm.models.VisionTransformer(depth=1, num_heads=2, num_classes=3, **options)
    return model, batch(2, 3, 16, 16)


CASES = [
    pytest.param(_linear, id="linear"),
    pytest.param(_convolution, id="convolution"),
    pytest.param(_mlp, id="mlp"),
    pytest.param(_attention, id="attention"),
    pytest.param(_encoder_layer, id="transformer layer"),
    pytest.param(_timm_vit, id="timm vit", marks=pytest.mark.needs_timm),
]
Make = Callable[[], tuple[nn.Module, Tensor]]


def made(make: Make) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def matrices(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """All weights of two and more dimensions, masked already or not."""
    return [
        (module, key.removesuffix("_orig"))
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim > 1
    ]


def prune(model: nn.Module, amount: float = 0.4) -> None:
    torch_rsst.global_unstructured(matrices(model), torch_rsst.GlobalL1, amount=amount)


def turn_masks(model: nn.Module) -> None:
    """Other masks with as many zeros."""
    masks = torch_rsst.extract_mask(model)
    torch_rsst.apply_mask(model, {name: mask.roll(1, -1) for name, mask in masks.items()})


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.float().square().mean().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def assert_masked_gradients_are_zero(model: nn.Module, grads: dict[str, Tensor]) -> None:
    masks = {k: b for k, b in model.named_buffers() if k.endswith("_mask")}
    assert masks
    for key, mask in masks.items():
        grad = grads[key.removesuffix("_mask") + "_orig"]
        assert bool((grad[mask == 0] == 0).all()), key
        assert bool((grad[mask == 1] != 0).any()) or not bool(mask.any()), key


class Backend:
    """Runs graphs as they are and counts how many it was given."""

    def __init__(self) -> None:
        self.compilations = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.compilations += 1
        return graph.forward


@pytest.fixture
def backend() -> Iterator[Backend]:
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


@pytest.mark.parametrize("make", CASES)
def test_a_pruned_model_compiles_as_one_graph_that_trains_as_eager_does(
    make: Make, backend: Backend
) -> None:
    model, x = made(make)
    prune(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = gradients(model, model(x))
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)
    got = gradients(model, compiled(x))
    assert_masked_gradients_are_zero(model, got)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5).add_(0.1)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)
    assert backend.compilations == 1


@pytest.mark.parametrize("make", CASES)
def test_pruning_after_compilation_costs_one_recompilation_and_other_masks_none(
    make: Make, backend: Backend
) -> None:
    model, x = made(make)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    dense = compiled(x)
    assert backend.compilations == 1
    prune(model)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)
    assert not torch.equal(compiled(x), dense)
    assert backend.compilations == 2
    for change in (prune, turn_masks, prune):  # the same buffers hold other masks
        before = compiled(x)
        change(model)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)
        assert not torch.equal(compiled(x), before)
    assert backend.compilations == 2
    torch_rsst.remove_all(model, freeze_zeros=False)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)
    assert backend.compilations <= 3


def test_a_mask_for_one_more_parameter_costs_one_recompilation(backend: Backend) -> None:
    model, x = made(_mlp)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(x)
    for count, name in enumerate(["0.weight", "2.weight", "2.bias"], start=2):
        size = model.get_parameter(name).shape
        torch_rsst.apply_mask(model, {name: torch.arange(size.numel()).reshape(size) % 2})
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-6)
        assert backend.compilations == count


@pytest.mark.parametrize("make", CASES)
def test_a_pruned_model_has_no_graph_breaks(make: Make) -> None:
    model, x = made(make)
    prune(model)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(x)
    torch._dynamo.reset()
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1


def test_ahead_of_time_autograd_gives_the_same_gradients() -> None:
    model, x = made(_mlp)
    prune(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, got = gradients(model, model(x)), gradients(model, compiled(x))
    torch._dynamo.reset()
    assert_masked_gradients_are_zero(model, got)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_model_compiled_in_place_follows_its_masks_and_can_be_copied(backend: Backend) -> None:
    model, x = made(_attention)  # a class of its own: some versions skip torch's containers
    model.compile(fullgraph=True, backend=backend)
    model(x)
    prune(model)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-6)
    assert backend.compilations == 2
    assert_mask_invariants(twin)


@pytest.mark.parametrize("make", CASES)
def test_an_exported_program_agrees(make: Make) -> None:
    model, x = made(make)
    prune(model)
    program = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-6)
    names = set(program.state_dict)
    assert {key for key, _ in model.named_parameters()} <= names
    assert {key for key, _ in model.named_buffers()} <= names


@pytest.mark.parametrize("make", [_mlp, _convolution, _attention])
def test_an_onnx_model_agrees(make: Make) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = made(make)
    prune(model)
    program = torch.onnx.export(model.eval(), (x,), dynamo=True, verbose=False)
    assert program is not None
    stored = io.BytesIO()
    program.save(stored)
    session = runtime.InferenceSession(stored.getvalue())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=1e-5, atol=1e-6)


def _traced(model: nn.Module, x: Tensor) -> Callable[..., Tensor]:
    traced: Callable[..., Tensor] = torch.jit.trace(model, x)
    return traced


def _symbolically_traced(model: nn.Module, _: Tensor) -> Callable[..., Tensor]:
    return torch.fx.symbolic_trace(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("trace", [_traced, _symbolically_traced])
@pytest.mark.parametrize("make", [_mlp, _convolutions])
def test_a_traced_model_follows_weights_and_masks_and_trains(make: Make, trace: Any) -> None:
    model, x = made(make)
    prune(model)
    traced = trace(model, x)
    torch.testing.assert_close(traced(x), model(x))
    before = traced(x).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5).add_(0.1)
    torch.testing.assert_close(traced(x), model(x))
    turn_masks(model)
    torch.testing.assert_close(traced(x), model(x))
    assert not torch.equal(traced(x), before)
    expected = gradients(model, model(x))
    torch.testing.assert_close(gradients(model, traced(x)), expected)
    assert {id(p) for p in traced.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(8), nn.LSTM(8, 8), nn.InstanceNorm1d(8, affine=True)]
)
def test_layers_that_branch_on_their_input_stay_whole_in_a_symbolic_trace(layer: nn.Module) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), layer).eval(), torch.randn(8, 4)
    name = next(name for name, _ in layer.named_parameters())
    torch_rsst.l1_unstructured(layer, name, 0.5)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "call_module" in [node.op for node in torch.fx.symbolic_trace(one).graph.nodes]
    traced = torch.fx.symbolic_trace(model)
    turn_masks(model)
    torch.testing.assert_close(traced(x), model(x))
    torch_rsst.remove_all(model, freeze_zeros=False)
    assert "__module__" not in vars(layer)


@pytest.mark.needs_timm
def test_torchvisions_feature_extractor_follows_weights_and_masks() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = made(_mlp)
    prune(model)
    names = create_feature_extractor(nn.Sequential(nn.Linear(4, 8), nn.GELU()), {"0": "hidden"})
    extractor = create_feature_extractor(model, {"0": "hidden"})
    assert list(extractor(x)) == list(names(x)) == ["hidden"]
    turn_masks(model)
    with torch.no_grad():
        model[0].weight_orig.add_(0.1)
    torch.testing.assert_close(extractor(x)["hidden"], model[0](x))


@pytest.mark.parametrize("make", [_linear, _convolution, _mlp, _attention, _encoder_layer])
def test_autocast_trains_alive_entries_and_keeps_masks_and_weights_in_float32(make: Make) -> None:
    model, x = made(make)
    prune(model)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
        grads = gradients(model, output)
        assert_masked_gradients_are_zero(model, grads)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert_mask_invariants(model)
    torch.testing.assert_close(output.float(), model(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("pruned_inside", [False, True])
def test_a_mask_set_under_autocast_counts_at_once(pruned_inside: bool) -> None:
    # Autocast keeps the casts of leaf weights until it ends.
    layer, x = made(_linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
        if pruned_inside:
            torch_rsst.apply_mask(layer, {"weight": torch.zeros(3, 4)})
    if not pruned_inside:
        torch_rsst.apply_mask(layer, {"weight": torch.zeros(3, 4)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x), layer.bias.bfloat16().expand(2, 3))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [_mlp, _attention, _encoder_layer])
def test_checkpointing_gives_the_gradients_that_plain_training_gives(
    make: Make, use_reentrant: bool
) -> None:
    model, x = made(make)
    prune(model)
    x.requires_grad_()  # reentrant checkpoints look for a gradient in the inputs
    expected = gradients(model, model(x))
    got = gradients(model, checkpoint(model, x, use_reentrant=use_reentrant))
    assert_masked_gradients_are_zero(model, got)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_masks_set_without_autograd_train_and_change_outside(mode: Callable[[], Any]) -> None:
    model, x = made(_mlp)
    first = model[0]
    with mode():
        prune(model)
        torch_rsst.fillback(first, "weight", 0.5)
        torch_rsst.fillback(first, "weight", 1, policy="zero")
        turn_masks(model)
        model(x)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    assert all(parameter.requires_grad for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert_masked_gradients_are_zero(model, gradients(model, model(x)))
    optimizer.step()
    prune(model)
    assert_masked_gradients_are_zero(model, gradients(model, model(x)))
    with mode():
        torch_rsst.remove_all(model, freeze_zeros=False)
    model(x).sum().backward()
    assert_mask_invariants(model, {})


def test_heads_masked_in_inference_mode_train_and_change_outside() -> None:
    layer, x = nn.Linear(4, 6), batch(2, 4)
    with torch.inference_mode():
        torch_rsst.head_structured(layer, "weight", 1, 2)
    torch_rsst.head_structured(layer, "weight", 0, 2)
    assert bool(layer.weight_mask.all())
    torch_rsst.head_structured(layer, "weight", 1, 2)
    assert_masked_gradients_are_zero(layer, gradients(layer, layer(x)))


def test_pruning_between_backward_and_step_keeps_the_gradient_and_the_step_moves_only_latents() -> (
    None
):
    layer, x = made(_linear)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(x).sum().backward()
    weight, gradient = layer.weight, layer.weight.grad
    kept, before = gradient.clone(), weight.detach().clone()
    prune(layer)
    assert layer.weight_orig is weight
    assert weight.grad is gradient
    assert torch.equal(gradient, kept)
    optimizer.step()
    # The step that was under way moves masked entries too, where nothing reads them.
    assert torch.equal(layer.weight_orig, before - 0.5 * kept)
    assert bool((layer.weight[layer.weight_mask == 0] == 0).all())
    grads = gradients(layer, layer(x))
    assert_masked_gradients_are_zero(layer, grads)
    latent = layer.weight_orig.detach().clone()
    optimizer.step()
    masked = layer.weight_mask == 0
    assert torch.equal(layer.weight_orig[masked], latent[masked])


@pytest.mark.parametrize("already", [False, True])
def test_pruning_between_forward_and_backward_leaves_that_backward_its_own_mask(
    already: bool,
) -> None:
    model, x = made(_mlp)
    if already:
        prune(model)
    expected = gradients(model, model(x))
    output = model(x)
    (turn_masks if already else prune)(model)
    got = gradients(model, output)
    torch.testing.assert_close(list(got.values()), list(expected.values()))
    assert_masked_gradients_are_zero(model, gradients(model, model(x)))
