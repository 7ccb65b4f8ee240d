"""The masked weight is one elementwise operation, exact in every dtype, layout and kind of derivative."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import linear, mlp, same, tokens
from torch import Tensor, nn
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.nn.utils import prune as stock
from torch.utils._python_dispatch import TorchDispatchMode

import torch_rsst
from torch_rsst.masking import live_weight
from torch_rsst.masking.masked_product import is_in_graph, masked

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


class Operations(TorchDispatchMode):
    """Lists the operations that reach a device; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.on_bools = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in (*args, result) if isinstance(each, Tensor)]
        self.on_bools |= any(each.dtype == torch.bool for each in tensors)
        name = func.overloadpacket.__name__
        if name not in ("detach", "t", "view", "transpose", "alias", "_unsafe_view", "expand"):
            self.names.append(name)
        return result


def half_mask(shape: torch.Size) -> Tensor:
    return torch.arange(shape.numel()).reshape(shape) % 2 == 0


def half_masked(module: nn.Module, name: str = "weight") -> nn.Module:
    torch_rsst.apply_mask(module, {name: half_mask(module.get_parameter(name).shape)})
    return module


@pytest.mark.parametrize("grad", [True, False])
def test_a_masked_forward_pass_has_one_elementwise_operation_more_than_a_dense_one(
    grad: bool,
) -> None:
    dense, x = linear(bias=False), tokens(0, 2, 4)
    layer = half_masked(copy.deepcopy(dense))
    with torch.set_grad_enabled(grad):
        with Operations() as expected:
            dense(x)
        with Operations() as counted:
            layer(x)
    assert sorted(counted.names) == sorted([*expected.names, "threshold_backward"])
    assert not counted.on_bools


def test_a_masked_backward_pass_has_one_elementwise_operation_more_than_a_dense_one() -> None:
    dense, x = linear(bias=False), tokens(0, 2, 4)
    layer = half_masked(copy.deepcopy(dense))
    counts = []
    for model in (dense, layer):
        loss = model(x).sum()
        with Operations() as counted:
            loss.backward()
        counts.append(sorted(counted.names))
        assert not counted.on_bools
    assert counts[1] == sorted([*counts[0], "threshold_backward"])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_diverged_under_a_mask_reaches_nothing_in_any_dtype_and_layout(
    dtype: torch.dtype, layout: Callable[[Tensor], Tensor], poison: float
) -> None:
    shape = torch.Size((4, 3, 2, 2))
    alive, values = half_mask(shape), tokens(0, *shape).to(dtype)
    weight = layout(torch.where(alive, values, poison)).requires_grad_()
    result = masked(weight, layout(alive.to(dtype)))
    assert result.dtype == dtype
    assert result.stride() == weight.stride()
    assert same(result, torch.where(alive, values, 0.0))
    result.backward(torch.where(alive, 2.0, poison).to(dtype))
    assert weight.grad is not None
    assert same(weight.grad, torch.where(alive, 2.0, 0.0).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_weight_has_the_parameters_dtype_whatever_dtype_the_mask_has(
    dtype: torch.dtype,
) -> None:
    # Mixed precision may cast parameters, and leave buffers as they are.
    weight, alive = tokens(0, 3, 4).to(dtype), half_mask(torch.Size((3, 4)))
    for other in (*FLOATS, torch.bool):
        result = masked(weight, alive.to(other))
        assert result.dtype == dtype
        assert same(result, torch.where(alive, weight, 0.0))


def test_derivatives_of_every_kind_are_those_of_the_product() -> None:
    weight = tokens(0, 3, 4).double().requires_grad_()
    mask = half_mask(weight.shape).double()

    def squared(weight: Tensor) -> Tensor:
        return masked(weight, mask) * weight

    options: dict[str, Any] = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(squared, (weight,), **options)
    assert torch.autograd.gradgradcheck(squared, (weight,))


def test_function_transforms_agree_with_a_plain_product() -> None:
    models = [half_masked(linear(bias=False, seed=seed)) for seed in range(3)]
    weights, buffers = stack_module_state(models)
    x = tokens(0, 2, 4)

    def output(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(models[0], (weights, buffers), (x,))
        return result

    expected = torch.stack([model(x) for model in models])
    torch.testing.assert_close(vmap(output)(weights, buffers), expected)
    own, kept = dict(models[0].named_parameters()), dict(models[0].named_buffers())
    ones = {"weight_orig": torch.ones_like(own["weight_orig"])}
    _, tangent = jvp(lambda weights: output(weights, kept), (own,), (ones,))
    torch.testing.assert_close(tangent, x @ kept["weight_mask"].T)


def test_a_masked_model_on_the_meta_device_runs() -> None:
    model = half_masked(mlp(), "0.weight").to("meta")
    assert model(torch.empty(2, 4, device="meta")).shape == (2, 2)


@pytest.mark.filterwarnings("ignore")
def test_the_older_exporter_to_onnx_agrees() -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, x, stored = half_masked(mlp(), "0.weight").eval(), tokens(0, 2, 4), io.BytesIO()
    torch.onnx.export(model, (x,), stored, dynamo=False)
    session = runtime.InferenceSession(stored.getvalue())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach())


def test_a_mask_is_known_to_be_in_a_graph_for_as_long_as_the_graph_lives() -> None:
    layer, x = half_masked(linear()), tokens(0, 2, 4)
    assert not is_in_graph(layer.weight_mask)
    with torch.no_grad():
        layer(x)
    assert not is_in_graph(layer.weight_mask)
    loss = layer(x).sum()
    assert is_in_graph(layer.weight_mask)
    loss.backward()
    assert not is_in_graph(layer.weight_mask)
    loss = layer(x).sum()
    del loss
    assert not is_in_graph(layer.weight_mask)


def test_writing_a_mask_between_forward_and_backward_is_an_error_not_another_gradient() -> None:
    layer = half_masked(linear())
    loss = layer(tokens(0, 2, 4)).sum()
    layer.weight_mask.fill_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Sparse gradients of embeddings


def _embedding() -> nn.Module:
    return nn.Embedding(10, 4, sparse=True)


def _padded_embedding() -> nn.Module:
    return nn.Embedding(10, 4, sparse=True, padding_idx=1)


def _bag() -> nn.Module:
    return nn.EmbeddingBag(10, 4, sparse=True, mode="sum")


TABLES = [_embedding, _padded_embedding, _bag]


def trained_table(prune: Any, make: Callable[[], nn.Module], poison: float | None = None) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        table = make()
    prune.l1_unstructured(table, "weight", amount=0.5)
    if poison is not None:
        with torch.no_grad():
            table.weight_orig.masked_fill_(table.weight_mask == 0, poison)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    for number in range(3):
        optimizer.zero_grad()
        table(torch.tensor([[1, 2, 2], [number, 1, 4]])).square().sum().backward()
        assert table.weight_orig.grad.is_sparse
        optimizer.step()
    with torch.no_grad():
        table(torch.tensor([[1]]))  # stock stores its product in a forward pass
    weight: Tensor = table.weight.detach()
    return weight


@pytest.mark.parametrize("make", TABLES)
def test_embeddings_with_sparse_gradients_train_as_they_do_with_stock(
    make: Callable[[], nn.Module],
) -> None:
    assert same(trained_table(torch_rsst, make), trained_table(stock, make))


@pytest.mark.parametrize("make", TABLES)
def test_what_diverged_under_the_mask_of_a_sparse_table_reaches_nothing(
    make: Callable[[], nn.Module],
) -> None:
    expected = trained_table(torch_rsst, make)
    assert same(trained_table(torch_rsst, make, poison=float("nan")), expected)


def test_a_sparse_table_that_is_tied_to_a_dense_layer_trains() -> None:
    table, head = nn.Embedding(6, 4, sparse=True), nn.Linear(4, 6, bias=False)
    head.weight = table.weight
    model = half_masked(nn.Sequential(table, head), "0.weight")
    model(torch.arange(3)).sum().backward()
    gradient = table.weight_orig.grad
    assert gradient is not None
    gradient = gradient.to_dense()
    assert bool((gradient[table.weight_mask == 0] == 0).all())
    assert bool((gradient[table.weight_mask == 1] != 0).all())


@pytest.mark.parametrize("make", TABLES)
def test_a_compiled_sparse_table_agrees(make: Callable[[], nn.Module]) -> None:
    table, ids = half_masked(make()), torch.tensor([[1, 2]])
    torch._dynamo.reset()
    compiled = torch.compile(table, backend="eager")
    torch.testing.assert_close(compiled(ids), table(ids))
    torch._dynamo.reset()


def sparse_table(mask: Any) -> nn.Embedding:
    """Of stock or of ours."""
    torch.manual_seed(0)
    table = nn.Embedding(4, 3, sparse=True, dtype=torch.float64)
    mask(table, "weight", half_mask(table.weight.shape))
    return table


def penalized_gradient(mask: Any) -> list[Tensor]:
    torch.manual_seed(1)
    table, head = sparse_table(mask), nn.Linear(3, 1).double()
    loss = head(table(torch.tensor([0, 1, 1]))).pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, [table.weight_orig], create_graph=True)
    assert gradient.requires_grad
    (loss + gradient.to_dense().square().sum()).backward()
    return [head.weight.grad, table.weight_orig.grad.to_dense()]


def test_a_second_derivative_through_a_sparse_table_is_that_of_stock() -> None:
    for own, of_stock in zip(
        penalized_gradient(torch_rsst.custom_from_mask),
        penalized_gradient(stock.custom_from_mask),
        strict=True,
    ):
        torch.testing.assert_close(own, of_stock)


def test_function_transforms_pass_through_sparse_tables() -> None:
    rows = torch.tensor([0, 1, 1])
    table = sparse_table(torch_rsst.custom_from_mask)
    torch.testing.assert_close(vmap(table.requires_grad_(False))(rows), table(rows))
    values = dict(table.named_parameters())
    tangents = {name: torch.ones_like(value) for name, value in values.items()}
    _, tangent = jvp(lambda p: functional_call(table, p, (rows,)), (values,), (tangents,))
    torch.testing.assert_close(tangent, table.weight_mask[rows].double())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool])
def test_numbers_of_other_types_can_be_masked_read_and_restored(dtype: torch.dtype) -> None:
    layer, mask = nn.Linear(3, 3, bias=False), torch.eye(3)
    weight = torch.ones(3, 3).to(dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    torch_rsst.custom_from_mask(layer, "weight", mask)
    assert torch.equal(layer.weight.to(torch.complex64), mask.to(torch.complex64))
    torch_rsst.remove_all(layer, freeze_zeros=False)
    assert torch.equal(layer.weight.to(torch.complex64), mask.to(torch.complex64))


@pytest.mark.parametrize(
    "between",
    [
        lambda layer, x: layer.weight.norm().item(),
        lambda layer, x: layer(x),
        lambda layer, x: layer(x).sum().backward(),
    ],
    ids=["a norm is logged", "a forward pass is dropped", "another backward pass"],
)
def test_a_pending_backward_pass_keeps_its_mask_whatever_was_read_since(between: Any) -> None:
    layer, x = half_masked(linear()), tokens(0, 2, 4)
    mask, output = layer.weight_mask.clone(), layer(x)
    between(layer, x)
    layer.zero_grad()
    torch_rsst.apply_mask(layer, {"weight": torch.ones_like(mask)})
    output.sum().backward()
    torch.testing.assert_close(layer.weight_orig.grad, mask * x.sum(0))


def test_masking_one_model_leaves_no_reference_to_the_parameters_of_others() -> None:
    bystander, layer = linear(), linear()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    half_masked(layer)
    assert not weakref.getweakrefs(bystander.weight)
    assert optimizer.param_groups[0]["params"][0] is layer.weight_orig


def test_products_are_held_in_training_only() -> None:
    layer, x = half_masked(linear()), tokens(0, 2, 4)
    layer(x).sum().backward()
    assert live_weight._held[layer].keys() == {"weight"}
    with torch.no_grad():
        layer(x)
    assert layer not in live_weight._held
    layer(x).sum().backward()
    with torch_rsst.dense_weights(layer):
        assert layer not in live_weight._held


def test_classes_made_in_functions_are_not_kept() -> None:
    def trial() -> weakref.ref[type]:
        class Mine(nn.Linear):
            pass

        layer = half_masked(Mine(4, 3))
        layer(tokens(0, 2, 4)).sum().backward()
        return weakref.ref(Mine)

    kept = trial()
    gc.collect()
    assert kept() is None
