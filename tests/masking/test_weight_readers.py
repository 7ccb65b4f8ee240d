"""Modules that read ``.weight`` of a child, or keep a list of weights, always see the present product."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import torch_rsst
from torch_rsst.testing import assert_mask_invariants

Forward = Callable[[nn.Module], Tensor]
Case = tuple[nn.Module, Forward, list[str]]


def batch(*shape: int) -> Tensor:
    """In double precision, as the models: what differs then differs by more than rounding."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _attention() -> Case:
    x = batch(2, 3, 8)
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    return module, lambda m: m(x, x, x)[0], ["in_proj_weight", "out_proj.weight"]


def _attention_of_three_widths() -> Case:
    module = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)
    q, k, v = batch(2, 3, 8), batch(2, 5, 4), batch(2, 5, 6)
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    return module, lambda m: m(q, k, v)[0], names


def _encoder_layer() -> Case:
    x = batch(2, 3, 8)
    module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"]
    return module, lambda m: m(x), [*names, "linear2.weight", "norm1.weight"]


def _torchvision_vit() -> Case:
    from torchvision.models import VisionTransformer

    module = VisionTransformer(
        image_size=8,
        patch_size=4,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=12,
        num_classes=3,
    )
    for zero_at_first in (module.heads.head.weight, module.class_token):
        nn.init.normal_(zero_at_first)
    x = batch(2, 3, 8, 8)
    block = "encoder.layers.encoder_layer_0"
    names = ["conv_proj.weight", f"{block}.self_attention.in_proj_weight"]
    names += [f"{block}.self_attention.out_proj.weight", f"{block}.mlp.0.weight", "class_token"]
    return module, lambda m: m(x), names


def _recurrent(kind: type[nn.RNNBase], **options: Any) -> Callable[[], Case]:
    def make() -> Case:
        module = kind(3, 4, num_layers=2, bidirectional=True, **options)
        x = batch(5, 2, 3)
        names = [name for name, _ in module.named_parameters() if name.startswith("weight")]
        return module, lambda m: m(x)[0], names

    return make


def _tied_linears() -> Case:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    x = batch(5, 4)
    return nn.Sequential(first, nn.Tanh(), second), lambda m: m(x), ["0.weight"]


def _tied_embedding() -> Case:
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    return nn.Sequential(embedding, nn.Tanh(), head), lambda m: m(torch.arange(6)), ["0.weight"]


CASES = [
    pytest.param(_attention, id="attention"),
    pytest.param(_attention_of_three_widths, id="attention with kdim and vdim"),
    pytest.param(_encoder_layer, id="transformer layer"),
    pytest.param(_torchvision_vit, id="torchvision vit", marks=pytest.mark.needs_timm),
    pytest.param(_recurrent(nn.LSTM), id="lstm"),
    pytest.param(_recurrent(nn.LSTM, proj_size=2), id="lstm with projection"),
    pytest.param(_recurrent(nn.GRU), id="gru"),
    pytest.param(_tied_linears, id="tied linears"),
    pytest.param(_tied_embedding, id="tied embedding"),
]


def place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def by_rank(model: nn.Module, names: list[str]) -> None:
    chosen = {id(getattr(*place(model, name))) for name in names}
    everywhere = [
        (m, key) for m in model.modules() for key, p in m._parameters.items() if id(p) in chosen
    ]
    torch_rsst.global_unstructured(everywhere, torch_rsst.GlobalL1, amount=0.4)


def by_mask(model: nn.Module, names: list[str]) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = {name: getattr(*place(model, name)).shape for name in names}
    masks = {name: torch.rand(shape, generator=generator) > 0.4 for name, shape in shapes.items()}
    torch_rsst.apply_mask(model, masks)


def pruned(make: Callable[[], Case], prune: Any = by_mask) -> tuple[nn.Module, Forward, nn.Module]:
    """The pruned model, how to call it, and a dense model of the same kind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, forward, names = make()
    model.double()
    dense = copy.deepcopy(model)
    prune(model, names)
    assert sum(int((~mask).sum()) for mask in torch_rsst.extract_mask(model).values()) > 0
    return model, forward, dense


def products(model: nn.Module) -> dict[str, Tensor]:
    """What the dense parameters must hold, worked out by hand from the parameters and masks."""
    masks = dict(model.named_buffers())
    found = {}
    for key, parameter in model.named_parameters():
        name = key.removesuffix("_orig")
        value = parameter.detach()
        found[name] = value * masks[f"{name}_mask"] if f"{name}_mask" in masks else value.clone()
    return found


def assert_reads_the_product(model: nn.Module, forward: Forward, dense: nn.Module) -> None:
    """Output and all gradients are those of a dense model that holds the product."""
    holder = dict(dense.named_parameters())
    with torch.no_grad():
        for name, value in products(model).items():
            holder[name].copy_(value)
        torch.testing.assert_close(forward(model), forward(dense), rtol=0, atol=1e-9)
    output, expected = forward(model), forward(dense)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
    dense.zero_grad()
    expected.square().sum().backward()
    kept = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    output.square().sum().backward()
    for key, parameter in model.named_parameters():
        name = key.removesuffix("_orig")
        alive = dict(model.named_buffers()).get(f"{name}_mask")
        wanted = holder[name].grad
        assert parameter.grad is not None, key
        assert wanted is not None, key
        if alive is not None:
            assert bool((parameter.grad[alive == 0] == 0).all()), key
            assert bool((parameter.grad[alive == 1] != 0).any()), key
            wanted = wanted * alive
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-9)
        parameter.grad = kept[key]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("prune", [by_rank, by_mask])
@pytest.mark.parametrize("make", CASES)
def test_training_trains_only_alive_entries_and_every_forward_sees_the_last_step(
    make: Callable[[], Case], prune: Any, optimizer: str
) -> None:
    model, forward, dense = pruned(make, prune)
    step = (
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if optimizer == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    )
    before = forward(model).detach()
    for _ in range(3):
        assert_reads_the_product(model, forward, dense)
        step.zero_grad()
        forward(model).square().sum().backward()
        step.step()
    assert_reads_the_product(model, forward, dense)
    assert not torch.equal(forward(model), before)
    assert_mask_invariants(model)


def _edited(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.5).add_(0.1)


def _loaded(model: nn.Module) -> None:
    state = {key: 0.1 - 0.5 * value for key, value in model.state_dict().items()}
    masks = {key: value.flip(0) for key, value in model.state_dict().items() if "_mask" in key}
    model.load_state_dict({**state, **masks})


def _masked_anew(model: nn.Module) -> None:
    masks = torch_rsst.extract_mask(model)
    torch_rsst.apply_mask(model, {name: mask.flip(0) for name, mask in masks.items()})


@pytest.mark.parametrize("change", [_edited, _loaded, _masked_anew])
@pytest.mark.parametrize("make", CASES)
def test_a_forward_pass_right_after_a_change_sees_it(
    make: Callable[[], Case], change: Callable[[nn.Module], None]
) -> None:
    model, forward, dense = pruned(make)
    forward(model)
    for training in (True, False):
        change(model)
        model.train(training)
        dense.train(training)
        assert_reads_the_product(model, forward, dense)


@pytest.mark.parametrize("make", CASES)
def test_functional_call_reads_what_it_is_given_and_leaves_no_trace(
    make: Callable[[], Case],
) -> None:
    model, forward, dense = pruned(make)
    own = forward(model).detach()
    given = {key: (0.1 - 0.5 * p).detach() for key, p in model.named_parameters()}
    with torch.no_grad():
        other = copy.deepcopy(model)
        other.load_state_dict(given, strict=False)
        holder = dict(dense.named_parameters())
        for name, value in products(other).items():
            holder[name].copy_(value)

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return forward(self.model)

    prefixed = {f"model.{key}": value.requires_grad_() for key, value in given.items()}
    output = functional_call(Call(), prefixed, ())
    torch.testing.assert_close(output, forward(dense), rtol=0, atol=1e-9)
    gradients = torch.autograd.grad(output.square().sum(), list(given.values()))
    for (name, gradient), key in zip(zip(given, gradients, strict=True), given, strict=True):
        mask = dict(model.named_buffers()).get(f"{key.removesuffix('_orig')}_mask")
        assert mask is None or bool((gradient[mask == 0] == 0).all()), name
    torch.testing.assert_close(forward(model), own, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def _counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    calls: list[str] = []
    function = getattr(torch, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(torch, name, counting)
    return calls


def test_the_fast_path_of_attention_gives_what_the_slow_one_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _, _ = pruned(_attention)
    calls = _counted(monkeypatch, "_native_multi_head_attention")
    x = batch(2, 3, 8)
    slow = model(x, x, x, need_weights=False)[0]
    assert not calls
    with torch.no_grad():
        fast = model.eval()(x, x, x, need_weights=False)[0]
        assert calls
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)
        model.out_proj.weight_orig.mul_(2.0)
        changed = model(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(
        changed, model.train()(x, x, x, need_weights=False)[0], rtol=0, atol=1e-9
    )
    assert not torch.equal(changed, fast)


def test_a_transformer_layer_evaluates_alike_pruned_and_in_its_fast_path_once_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, forward, _ = pruned(_encoder_layer)
    calls = _counted(monkeypatch, "_transformer_encoder_layer_fwd")
    slow = forward(model)
    with torch.no_grad():
        torch.testing.assert_close(forward(model.eval()), slow, rtol=0, atol=1e-9)
        assert not calls  # a module with hooks takes the slow path
        torch_rsst.remove_all(model, freeze_zeros=False)
        fast = forward(model)
    assert calls
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)


def test_a_stack_of_transformer_layers_with_padding_evaluates_as_it_trains() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double()
    by_mask(model, ["layers.0.linear1.weight", "layers.1.self_attn.in_proj_weight"])
    x, padding = batch(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    trained = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        evaluated = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated[~padding], trained[~padding], rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", [_tied_linears, _tied_embedding])
def test_a_tied_weight_is_counted_once_and_masked_for_all_that_share_it(
    make: Callable[[], Case],
) -> None:
    model, _, _ = make()
    other = nn.Linear(3, 2)
    size = model[0].weight.numel()
    refs = [(model[0], "weight"), (model[2], "weight"), (other, "weight")]
    torch_rsst.global_unstructured(refs, torch_rsst.GlobalL1, amount=0.5)
    masked = int((model[0].weight_mask == 0).sum()) + int((other.weight_mask == 0).sum())
    assert masked == round(0.5 * (size + 6))
    assert model[0].weight_orig is model[2].weight_orig
    assert model[0].weight_mask is model[2].weight_mask
    assert list(torch_rsst.extract_mask(model)) == ["0.weight"]
    assert sum(1 for name, _ in model.named_buffers() if name.endswith("_mask")) == 1
    torch_rsst.remove_all(model, freeze_zeros=False)
    assert model[0].weight is model[2].weight
    assert torch_rsst.extract_mask(model) == {}


def test_evaluation_under_no_grad_holds_no_graph() -> None:
    model, forward, _ = pruned(_recurrent(nn.LSTM))
    with torch.no_grad():
        assert not forward(model).requires_grad
    assert forward(model).requires_grad
