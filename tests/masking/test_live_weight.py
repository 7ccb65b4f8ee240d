"""``module.weight`` is the present product, whoever reads it, and a masked module can be copied."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune as stock

import torch_rsst
from torch_rsst.testing import assert_mask_invariants


def half_masked(module, *names):
    """Mask every other entry of the parameters, all of them by default."""
    generator = torch.Generator().manual_seed(0)
    parameters = {n.removesuffix("_orig"): p for n, p in module.named_parameters()}
    names = names or tuple(parameters)
    masks = {n: torch.rand(parameters[n].shape, generator=generator) > 0.5 for n in names}
    torch_rsst.apply_mask(module, masks)
    return module


def product(module, name="weight"):
    return getattr(module, f"{name}_orig") * getattr(module, f"{name}_mask")


def test_weight_follows_an_optimizer_step_without_a_forward_pass():
    layer = half_masked(nn.Linear(3, 2), "weight")
    with torch.no_grad():
        layer.weight_orig.fill_(7.0)
    assert torch.equal(layer.weight, product(layer))


def test_weight_follows_load_state_dict_without_a_forward_pass():
    layer, other = half_masked(nn.Linear(3, 2)), half_masked(nn.Linear(3, 2))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight)


def test_class_name_and_isinstance_stay_and_removal_brings_the_class_back():
    layer = half_masked(nn.Linear(3, 2))
    assert isinstance(layer, nn.Linear)
    assert repr(layer) == repr(nn.Linear(3, 2))
    torch_rsst.remove_all(layer, freeze_zeros=False)
    assert type(layer) is nn.Linear
    assert "weight" not in vars(layer)


def test_a_failing_call_leaves_the_class(monkeypatch):
    from torch_rsst.masking import masked_parameter

    def failing(ref):
        raise MemoryError

    monkeypatch.setattr(masked_parameter, "set_hook", failing)
    layer = nn.Linear(3, 2)
    with pytest.raises(MemoryError):
        half_masked(layer)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("moment", ["masked", "after forward", "after backward", "removed"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), lambda: nn.LSTM(3, 2)])
def test_copies_are_independent_and_equal(make, moment):
    module, inputs = half_masked(make()), torch.randn(4, 3)
    if moment.startswith("after"):
        out = module(inputs)
        if moment == "after backward":
            (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
    if moment == "removed":
        torch_rsst.remove_all(module, freeze_zeros=False)
    twin = copy.deepcopy(module)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    pickled = pickle.loads(pickle.dumps(module))
    for other in (twin, loaded, pickled):
        assert_mask_invariants(other)
        assert all(
            torch.equal(a, b)
            for a, b in zip(first(module(inputs)), first(other(inputs)), strict=True)
        )
        before = module.state_dict()
        before = {name: value.clone() for name, value in before.items()}
        first(other(inputs)).sum().backward()
        with torch.no_grad():
            for parameter in other.parameters():
                assert parameter.grad is not None
                parameter.add_(1.0)
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def test_averaged_model_of_a_masked_model():
    model = half_masked(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)))
    model(torch.randn(2, 3)).sum().backward()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    x = torch.randn(2, 3)
    torch.testing.assert_close(averaged(x), model(x))


def assert_trains_only_alive_entries(model, forward, name):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outputs = []
    for _ in range(3):
        optimizer.zero_grad()
        out = forward()
        outputs.append(out.detach().clone())
        out.square().sum().backward()
        grad, mask = (model.get_parameter(f"{name}_orig").grad, model.get_buffer(f"{name}_mask"))
        assert bool((grad[mask == 0] == 0).all())
        assert bool((grad[mask == 1] != 0).any())
        optimizer.step()
    assert not torch.equal(outputs[0], outputs[-1])


def test_multihead_attention_output_projection_trains():
    """Stock: its forward never runs, so that the second backward raises."""
    attention = half_masked(nn.MultiheadAttention(8, 2, batch_first=True), "out_proj.weight")
    x = torch.randn(2, 3, 8)
    assert_trains_only_alive_entries(attention, lambda: attention(x, x, x)[0], "out_proj.weight")


def test_transformer_layer_agrees_in_training_and_in_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    half_masked(layer, "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    x = torch.randn(2, 3, 8)
    assert_trains_only_alive_entries(layer, lambda: layer(x), "self_attn.out_proj.weight")
    slow = layer(x)
    with torch.no_grad():
        fast = layer.eval()(x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_train(make):
    layer = half_masked(make(3, 4), "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    assert_trains_only_alive_entries(layer, lambda: layer(x)[0], "weight_hh_l0")


def test_tied_weights_are_masked_for_every_module_that_shares_them():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = half_masked(nn.Sequential(embedding, head), "0.weight")
    assert embedding.weight_orig is head.weight_orig
    assert embedding.weight_mask is head.weight_mask
    assert torch.equal(embedding.weight, head.weight)
    assert_trains_only_alive_entries(model, lambda: model(torch.arange(5)), "0.weight")


def test_functional_call_sees_its_own_weights():
    layer = half_masked(nn.Linear(3, 2), "weight")
    x, weight = torch.randn(4, 3), torch.randn(2, 3)
    out = functional_call(layer, {"weight_orig": weight}, (x,))
    torch.testing.assert_close(out, x @ (weight * layer.weight_mask).T + layer.bias)
    assert torch.equal(layer.weight, product(layer))


def test_compiled_without_graph_breaks_and_after_another_mask():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(2, 3)
    compiled(x)
    for _ in range(2):  # masked after compilation, then masked differently
        half_masked(model)
        torch.testing.assert_close(compiled(x), model(x))
        torch_rsst.apply_mask(model, {"0.weight": torch.ones(4, 3)})


def test_exported_program_agrees():
    model = half_masked(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))).eval()
    x = torch.randn(2, 3)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-6)


def test_stock_methods_on_top_and_stock_removal():
    layer = half_masked(nn.Linear(4, 4), "weight")
    alive = int(layer.weight_mask.sum())
    stock.l1_unstructured(layer, "weight", amount=2)
    assert int(layer.weight_mask.sum()) == alive - 2
    assert torch.equal(layer.weight, product(layer))
    expected = layer.weight.detach().clone()
    stock.remove(layer, "weight")
    assert torch.equal(layer.weight, expected)
    assert isinstance(layer.weight, nn.Parameter)


def test_a_missing_weight_is_an_attribute_error():
    layer = half_masked(nn.Linear(2, 2), "weight")
    del layer._buffers["weight_mask"]
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'weight'"):
        layer.weight  # noqa: B018 - reading it is the test
