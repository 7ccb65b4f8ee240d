"""A pruned model is copied, stored and averaged like any other, at any moment, and never grows."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock
from torch.nn.utils.prune import BasePruningMethod
from torch.optim.swa_utils import AveragedModel

import torch_rsst
from torch_rsst.testing import assert_mask_invariants

Forward = Callable[[nn.Module], Tensor]
Case = tuple[nn.Module, Forward]


def batch(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _linear() -> Case:
    x = batch(2, 4)
    return nn.Linear(4, 3), lambda m: m(x)


def _convolution() -> Case:
    x = batch(2, 2, 5, 5)
    return nn.Conv2d(2, 3, 3), lambda m: m(x)


def _attention() -> Case:
    x = batch(2, 3, 8)
    return nn.MultiheadAttention(8, 2, batch_first=True), lambda m: m(x, x, x)[0]


def _lstm() -> Case:
    x = batch(5, 2, 3)
    return nn.LSTM(3, 4, num_layers=2, bidirectional=True), lambda m: m(x)[0]


def _tied() -> Case:
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6)
    head.weight = embedding.weight
    return nn.Sequential(embedding, head), lambda m: m(torch.arange(6))


def _timm_vit() -> Case:
    import timm

    options: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 8}
    model = timm.models.VisionTransformer(depth=1, num_heads=2, num_classes=3, **options)
    x = batch(2, 3, 16, 16)
    return model, lambda m: m(x)


CASES = [
    pytest.param(_linear, id="linear"),
    pytest.param(_convolution, id="convolution"),
    pytest.param(_attention, id="attention"),
    pytest.param(_lstm, id="lstm"),
    pytest.param(_tied, id="tied"),
    pytest.param(_timm_vit, id="timm vit", marks=pytest.mark.needs_timm),
]


def matrices(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (module, key.removesuffix("_orig"))
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim > 1
    ]


def prune(model: nn.Module, amount: float = 0.4) -> None:
    torch_rsst.global_unstructured(matrices(model), torch_rsst.GlobalL1, amount=amount)


def pruned(make: Callable[[], Case], moment: str = "pruned") -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, forward = make()
    prune(model)
    if moment != "pruned":
        output = forward(model)
        if moment == "after backward":
            output.square().sum().backward()
    return model, forward


def deep_copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    twin: nn.Module = pickle.loads(pickle.dumps(model))
    return twin


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twin: nn.Module = torch.load(buffer, weights_only=False)
    return twin


def averaged(model: nn.Module) -> nn.Module:
    twin: nn.Module = AveragedModel(model).module
    return twin


def everything(model: nn.Module) -> dict[str, Tensor]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = {f"grad of {k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {**state, **{key: value.clone() for key, value in gradients.items()}}


@pytest.mark.parametrize("moment", ["pruned", "after forward", "after backward"])
@pytest.mark.parametrize("copied", [deep_copied, pickled, saved, averaged])
@pytest.mark.parametrize("make", CASES)
def test_a_copy_is_equal_and_independent_at_any_moment(
    make: Callable[[], Case], copied: Callable[[nn.Module], nn.Module], moment: str
) -> None:
    model, forward = pruned(make, moment)
    twin = copied(model)
    assert torch.equal(forward(twin), forward(model))
    assert [type(m).__name__ for m in twin.modules()] == [type(m).__name__ for m in model.modules()]
    assert repr(twin) == repr(model)
    assert [key for key, _ in twin.named_parameters()] == [
        key for key, _ in model.named_parameters()
    ]
    assert_mask_invariants(twin, torch_rsst.extract_mask(model))
    before, output = everything(model), forward(model).detach()
    prune(twin)
    forward(twin).square().sum().backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert not torch.equal(forward(twin), output)
    after = everything(model)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(forward(model), output)
    torch_rsst.remove_all(twin, freeze_zeros=False)
    assert_mask_invariants(twin, {})
    assert_mask_invariants(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in make()[0].modules()]


@pytest.mark.parametrize("copied", [deep_copied, pickled, saved])
def test_a_copy_goes_on_being_pruned_and_trained(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    model, forward = pruned(_attention, "after backward")
    twin = copied(copied(model))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        forward(twin).square().sum().backward()
        optimizer.step()
        prune(twin)
        assert_mask_invariants(twin)
    alive = sum(int(mask.sum()) for mask in torch_rsst.extract_mask(twin).values())
    size = sum(module.get_parameter(f"{name}_orig").numel() for module, name in matrices(twin))
    assert alive == pytest.approx(size * 0.6**3, abs=2)


@pytest.mark.parametrize("make", CASES)
def test_averaging_follows_weights_and_masks_over_several_updates(
    make: Callable[[], Case],
) -> None:
    model, forward = pruned(make)
    average = AveragedModel(model)
    sums = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    for count in range(1, 4):
        forward(model).square().sum().backward()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.add_(0.1 * count)
                sums[key] += parameter
        prune(model)
        average.update_parameters(model)
        for key, parameter in average.module.named_parameters():
            torch.testing.assert_close(parameter.detach(), sums[key] / count)
        assert_mask_invariants(average.module, torch_rsst.extract_mask(model))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(sums[key] / 3)
    torch.testing.assert_close(forward(average.module), forward(model))


def hooks_and_masks(model: nn.Module) -> list[tuple[int, int]]:
    return [
        (
            sum(isinstance(h, BasePruningMethod) for h in module._forward_pre_hooks.values()),
            sum(key.endswith("_mask") for key in module._buffers),
        )
        for module in model.modules()
    ]


@pytest.mark.parametrize("make", CASES)
def test_twenty_rounds_leave_one_hook_one_mask_and_a_pickle_of_the_same_size(
    make: Callable[[], Case],
) -> None:
    model, forward = pruned(make)
    once, size = hooks_and_masks(model), len(pickle.dumps(model))
    registered = [id(buffer) for buffer in model.buffers()]
    for _ in range(19):
        prune(model, 0.1)
        forward(model).sum().backward()
        model.zero_grad()
    assert hooks_and_masks(model) == once
    assert {hooks for hooks, masks in once if masks} != set()
    assert all(hooks == masks for hooks, masks in once)
    assert [id(buffer) for buffer in model.buffers()] == registered
    assert len(pickle.dumps(model)) == size


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("make", [_linear, _lstm])
def test_every_pickle_protocol_works(make: Callable[[], Case], protocol: int) -> None:
    model, forward = pruned(make)
    twin = pickle.loads(pickle.dumps(model, protocol=protocol))
    assert torch.equal(forward(twin), forward(model))
    assert_mask_invariants(twin, torch_rsst.extract_mask(model))


def test_two_copies_of_one_class_are_masked_in_different_parameters() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    torch_rsst.apply_mask(first, {"weight": torch.eye(2, 3)})
    torch_rsst.apply_mask(second, {"bias": torch.tensor([1, 0])})
    dense = nn.Linear(3, 2)
    for twin in (copy.deepcopy(first), pickled(first)):
        assert isinstance(twin.bias, nn.Parameter)
        assert not isinstance(twin.weight, nn.Parameter)
    for twin in (copy.deepcopy(second), pickled(second)):
        assert isinstance(twin.weight, nn.Parameter)
        assert not isinstance(twin.bias, nn.Parameter)
    assert isinstance(dense.weight, nn.Parameter)
    assert isinstance(dense.bias, nn.Parameter)


@pytest.mark.parametrize("what", [lambda m, p: p, lambda m, p: {"model": m, "pruner": p}])
def test_a_penalty_refuses_to_be_copied_in_place_of_losing_its_hooks(what: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    refill = torch_rsst.regroup(model, torch_rsst.find_groups(model), amount=0.5)
    pruner = torch_rsst.RegularizedPruner(model, refill, total_steps=3)
    text = r"RegularizedPruner: expected to stay with its model, got a copy or a pickle. Copy the model"
    with pytest.raises(TypeError, match=text):
        copy.deepcopy(what(model, pruner))
    assert torch_rsst.RegularizedPruner.attached_to(model) is pruner
    pruner.detach()


@pytest.mark.parametrize("make", [_linear, _convolution, _lstm])
def test_a_replica_of_data_parallel_computes_with_its_own_weights(
    make: Callable[[], Case],
) -> None:
    # What torch.nn.parallel.replicate does on each device: the parameters become attributes.
    model, forward = pruned(make)
    replica = model._replicate_for_data_parallel()
    replica._former_parameters = {}
    for key, parameter in model._parameters.items():
        copied = parameter * 1.0
        setattr(replica, key, copied)
        replica._former_parameters[key] = copied
    for key, buffer in model._buffers.items():
        setattr(replica, key, buffer.clone())
    output = forward(replica)
    torch.testing.assert_close(output, forward(model))
    output.square().sum().backward()
    for key, mask in model.named_buffers():
        gradient = model.get_parameter(key.removesuffix("_mask") + "_orig").grad
        assert gradient is not None
        assert bool((gradient[mask == 0] == 0).all())
        assert bool((gradient[mask == 1] != 0).any())


def masked_by(call: str, layer: nn.Module) -> None:
    if call == "apply_mask":
        torch_rsst.apply_mask(layer, {"weight": torch.eye(3)})
    elif call == "a function of stock":
        torch_rsst.custom_from_mask(layer, "weight", torch.eye(3))
    else:
        torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=6)


def unmasked_by(call: str, layer: nn.Module) -> None:
    if call == "remove_all":
        torch_rsst.remove_all(layer, freeze_zeros=False)
    elif call == "remove":
        torch_rsst.remove(layer, "weight", freeze_zeros=False)
    else:
        stock.remove(layer, "weight")


@pytest.mark.parametrize("asked", ["the original", "the copy"])
@pytest.mark.parametrize("removed", ["remove_all", "remove", "PyTorch's remove"])
@pytest.mark.parametrize("call", ["apply_mask", "a function of stock", "global_unstructured"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_shallow_copy_is_masked_and_plain_with_its_original(
    moment: str, call: str, removed: str, asked: str
) -> None:
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters())
    torch_rsst.identity(nn.Linear(3, 3), "weight")  # all modules have been asked once
    twin = copy.copy(layer) if moment == "before" else layer
    masked_by(call, layer)
    twin = copy.copy(layer) if moment == "after" else twin
    given = torch.ones(2, 3)
    assert torch.equal(twin.weight, layer.weight)
    assert torch.equal(twin(given), layer(given))
    assert int(torch.count_nonzero(twin.weight)) == 3
    with torch_rsst.dense_weights(layer):
        assert isinstance(twin.weight, nn.Parameter)
    assert torch.equal(twin(given), layer(given))
    before = layer(given)
    unmasked_by(removed, layer if asked == "the original" else twin)
    for each in (layer, twin):
        assert type(each) is nn.Linear or removed == "PyTorch's remove"
        assert sorted(name for name, _ in each.named_parameters()) == ["bias", "weight"]
        assert not each._forward_pre_hooks
        assert not each._buffers
        assert torch.equal(each(given), before)
    assert optimizer.param_groups[0]["params"][0] is twin.weight


def test_a_model_with_a_layer_and_its_shallow_copy_is_masked_in_and_outside_of_blocks() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, copy.copy(layer))
    torch_rsst.apply_mask(model, {"0.weight": torch.eye(3)})
    assert list(torch_rsst.extract_mask(model)) == ["0.weight"]
    with torch_rsst.dense_weights(model):
        assert [name for name, _ in model[1].named_parameters()] == ["weight", "bias"]
    for each in model:
        assert [name for name, _ in each.named_parameters()] == ["weight_orig", "bias"]
        assert int(torch.count_nonzero(each.weight)) == 3
    assert_mask_invariants(model)
    torch_rsst.remove_all(model, freeze_zeros=False)
    assert list(model[1]._parameters) == ["weight", "bias"]
