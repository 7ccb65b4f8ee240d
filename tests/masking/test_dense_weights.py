"""Within the block masked parameters are plain ones; afterwards everything is as it was, or a word is said."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import linear, mlp, same, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as stock
from torch.nn.utils.fusion import fuse_linear_bn_eval

import torch_rsst
from torch_rsst.masking import dense_scope
from torch_rsst.masking import dense_weights as dense_weights_module
from torch_rsst.masking import tied as tied_module
from torch_rsst.testing import assert_mask_invariants, mask_sets, models_with_groups

MASK = torch.tensor(
    [[True, False, True, True], [False, False, True, True], [True, True, True, False]]
)


def masked_layer() -> nn.Linear:
    layer = linear()
    torch_rsst.apply_mask(layer, {"weight": MASK})
    return layer


def masked_mlp() -> nn.Sequential:
    model = mlp()
    pairs = [(model[0], "weight"), (model[2], "weight"), (model[0], "bias")]
    torch_rsst.global_unstructured(pairs, torch_rsst.GlobalL1, amount=0.4)
    return model


def masked_lstm() -> nn.Module:
    model = nn.LSTM(4, 3, num_layers=2)
    torch_rsst.apply_mask(model, {"weight_hh_l1": torch.arange(36).reshape(12, 3) % 2})
    return model


def masked_by_stock() -> nn.Module:
    layer = linear()
    stock.l1_unstructured(layer, "weight", amount=0.5)
    return layer


def masked_by_both() -> nn.Module:
    layer = masked_by_stock()
    torch_rsst.global_unstructured([(layer, "weight")], torch_rsst.GlobalL1, amount=2)
    return layer


def tied() -> nn.Module:
    table, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    model = nn.Sequential(table, head)
    torch_rsst.apply_mask(model, {"0.weight": torch.arange(20).reshape(5, 4) % 3 > 0})
    return model


def normed() -> nn.Sequential:
    model = nn.Sequential(linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    masks = {"0.weight": torch.eye(4), "1.weight": torch.tensor([1, 0, 1, 1])}
    torch_rsst.apply_mask(model, {**masks, "1.bias": torch.tensor([1, 0, 1, 1])})
    return model


MODELS = [masked_layer, masked_mlp, masked_lstm, masked_by_stock, masked_by_both, tied, normed]
every_model = pytest.mark.parametrize("make", MODELS)


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything in a model: objects, order, classes, hooks and copies of all values."""
    found: list[Any] = []
    for path, module in model.named_modules():
        hooks = [(key, id(hook)) for key, hook in module._forward_pre_hooks.items()]
        stored = sorted(key for key in vars(module) if key != "_flat_weights")
        found += [path, id(module), type(module), hooks, stored, module.training]
        for registry in (module._parameters, module._buffers):
            for key, tensor in registry.items():
                value = None if tensor is None else tensor.detach().tolist()
                found += [key, id(tensor), value]
    return found


def outputs(model: nn.Module) -> Tensor:
    x = (
        torch.arange(5)
        if isinstance(next(model.modules()), nn.Sequential) and isinstance(model[0], nn.Embedding)
        else tokens(0, 5, 4)
    )
    output = model.eval()(x)
    model.train()
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found.detach()


def run_inside(model: nn.Module, work: Callable[[nn.Module], object], **options: Any) -> None:
    with torch_rsst.dense_weights(model, **options), torch.no_grad():
        work(model)


def _ruins(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.fill_(3.0)
    model.add_module("more", nn.Linear(2, 2))
    for module in model.modules():
        module._parameters.pop("weight", None)
    raise KeyboardInterrupt


def _adds_one(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.add_(1.0)


@every_model
def test_inside_are_plain_parameters_of_the_same_values_and_afterwards_all_is_as_it_was(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    expected, before, masks = outputs(model), fingerprint(model), torch_rsst.extract_mask(model)
    dense_names = [name.removesuffix("_orig") for name, _ in model.named_parameters()]
    with torch_rsst.dense_weights(model) as inside:
        assert inside is model
        assert [name for name, _ in model.named_parameters()] == dense_names
        assert torch_rsst.extract_mask(model) == {}
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert all(type(m).__module__.startswith("torch.nn") for m in model.modules())
        for name, mask in masks.items():
            assert bool((model.get_parameter(name)[~mask] == 0).all())
        torch.testing.assert_close(outputs(model), expected)
    assert fingerprint(model) == before
    assert_mask_invariants(model, masks)
    assert same(outputs(model), expected)


@every_model
@pytest.mark.parametrize("masked_writes", ["error", "drop", "keep"])
def test_whatever_is_raised_inside_the_model_is_as_it_was(
    make: Callable[[], nn.Module], masked_writes: Any
) -> None:
    model = make()
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        run_inside(model, _ruins, masked_writes=masked_writes)
    assert fingerprint(model) == before


@given(st.data(), models_with_groups(pruned=True), st.sampled_from(["drop", "keep"]))
def test_what_is_written_goes_where_the_choice_says(data: Any, drawn: Any, choice: Any) -> None:
    model, _ = drawn
    masks = torch_rsst.extract_mask(model)
    written = data.draw(mask_sets(copy.deepcopy(model)))
    latent = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch_rsst.dense_weights(model, masked_writes=choice), torch.no_grad():
        for name, entries in written.items():
            parameter = model.get_parameter(name.removesuffix("_orig"))
            parameter.copy_(torch.where(entries, 5.0, parameter))
    for key, parameter in model.named_parameters():
        name = key.removesuffix("_orig")
        entries = written.get(key, written.get(name, torch.zeros_like(parameter, dtype=torch.bool)))
        taken = entries & masks[name] if choice == "drop" and name in masks else entries
        assert same(parameter, torch.where(taken, 5.0, latent[key])), key
    assert_mask_invariants(model, masks)


def test_what_is_written_to_masked_entries_is_an_error_and_changes_nothing() -> None:
    model = masked_mlp()
    before = fingerprint(model)
    text = (
        r"dense_weights: expected zeros in masked entries, got other values in "
        r"'0.weight', '0.bias', '2.weight'. Pass masked_writes='drop' to forget them, 'keep'"
    )
    with pytest.raises(RuntimeError, match=text):
        run_inside(model, _adds_one)
    assert fingerprint(model) == before


def test_a_nan_in_a_masked_entry_is_a_write() -> None:
    layer = masked_layer()
    with pytest.raises(RuntimeError, match="zeros in masked entries"):
        run_inside(layer, lambda layer: layer.weight[0, 1].fill_(float("nan")))


def test_nn_init_inside_draws_the_weights_anew_under_the_mask() -> None:
    layer, dense = masked_layer(), linear()
    for each in (layer, dense):
        torch.manual_seed(0)
        with torch_rsst.dense_weights(layer, masked_writes="keep"):
            nn.init.xavier_uniform_(each.weight)
    assert same(layer.weight_orig, dense.weight)
    assert same(layer.weight, dense.weight * MASK)


def test_gradients_of_a_backward_pass_inside_are_those_of_the_masked_model() -> None:
    layer, twin = masked_layer(), masked_layer()
    x = tokens(0, 2, 4)
    for each in (layer, twin):
        each(x).sum().backward()
    with torch_rsst.dense_weights(layer):
        layer(x).square().sum().backward()
    twin(x).square().sum().backward()
    torch.testing.assert_close(layer.weight_orig.grad, twin.weight_orig.grad)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_a_step_of_an_optimizer_inside_is_an_error(when: str) -> None:
    model = masked_mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = fingerprint(model)

    def step(model: nn.Module) -> None:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        (inner if when == "inside" else optimizer).step()

    text = r"dense_weights: expected no training inside, got a step of SGD. Leave the `with` block"
    with pytest.raises(RuntimeError, match=text):
        run_inside(model, step)
    optimizer.step()  # allowed again; there are no gradients
    assert fingerprint(model) == before


@pytest.mark.parametrize("fails", [False, True])
def test_an_optimizer_made_inside_is_refused_afterwards_and_changes_nothing(fails: bool) -> None:
    model = masked_mlp()

    def make_and_fail(model: nn.Module) -> None:
        made.append(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1))
        if fails:
            raise KeyError

    made: list[torch.optim.Optimizer] = []
    with contextlib.suppress(KeyError):
        run_inside(model, make_and_fail)
    model(tokens(0, 2, 4)).sum().backward()
    before = fingerprint(model)
    text = (
        r"step of AdamW: expected parameters of a model, got a plain one of a dense_weights\(\) "
        r"block that has ended, .* Make the optimizer before or after the `with` block"
    )
    with pytest.raises(RuntimeError, match=text):
        made[0].step()
    assert fingerprint(model) == before
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    assert fingerprint(model) != before


def test_nothing_is_remembered_of_parameters_that_nobody_holds_after_a_block() -> None:
    model = masked_mlp()
    block = torch_rsst.dense_weights(model)
    with block:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert len(ids & set(dense_scope._given_up)) == 3
    del optimizer
    gc.collect()
    assert not ids & set(dense_scope._given_up)
    run_inside(model, lambda model: None)
    assert not dense_scope._given_up


@pytest.mark.parametrize("whole", [True, False])
def test_a_plain_parameter_that_a_module_keeps_is_trained_afterwards(whole: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch_rsst.apply_mask(model, {"0.weight": torch.eye(4)})
    with torch_rsst.dense_weights(model if whole else model[0], masked_writes="drop"):
        model[1].weight = model[0].weight
        model[0].weight = nn.Parameter(torch.ones(4, 4))
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    model(tokens(0, 2, 4)).sum().backward()
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert not same(model[1].weight, before)
    assert_mask_invariants(model, {"0.weight": torch.eye(4)})


def test_an_optimizer_of_another_model_steps_inside() -> None:
    model, other = masked_mlp(), masked_mlp()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with torch_rsst.dense_weights(model):
        other(tokens(0, 2, 4)).sum().backward()
        optimizer.step()


def test_a_block_inside_a_block_is_an_error() -> None:
    model, other = masked_mlp(), masked_mlp()
    before = fingerprint(model)
    text = "dense_weights: expected no other block for this model, got one"
    with torch_rsst.dense_weights(model):
        with torch_rsst.dense_weights(other):
            pass
        for each in (model, model[0]):
            with pytest.raises(RuntimeError, match=text), torch_rsst.dense_weights(each):
                pass
    assert fingerprint(model) == before
    with torch_rsst.dense_weights(model):
        pass


def test_copies_made_inside_are_dense_and_independent() -> None:
    model = masked_mlp()
    before = fingerprint(model)
    with torch_rsst.dense_weights(model):
        twin = copy.deepcopy(model)
    assert torch_rsst.extract_mask(twin) == {}
    assert type(twin[0]) is nn.Linear
    with torch.no_grad():
        twin[0].weight.fill_(1.0)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert fingerprint(model) == before


def test_a_model_without_masks_is_left_alone() -> None:
    model = mlp()
    before = fingerprint(model)
    with torch_rsst.dense_weights(model), torch.no_grad():
        model[0].bias.add_(0.0)
    assert fingerprint(model) == before


def test_a_wrapped_model_is_given_back_wrapped() -> None:
    model = masked_mlp()
    wrapped = nn.DataParallel(model)
    with torch_rsst.dense_weights(wrapped) as inside:
        assert inside is wrapped
        assert isinstance(model[0].weight, nn.Parameter)
    assert not isinstance(model[0].weight, nn.Parameter)


# What code that needs a parameter called weight does inside


def test_batch_norms_that_are_converted_inside_keep_their_masks() -> None:
    model = normed()
    masks, originals = torch_rsst.extract_mask(model), dict(model.named_parameters())
    with torch_rsst.dense_weights(model):
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert isinstance(model[1], nn.SyncBatchNorm)
    assert_mask_invariants(model, masks)
    assert all(p is originals[name] for name, p in model.named_parameters())


def test_a_module_that_takes_the_place_of_another_gets_its_masks_by_name() -> None:
    model, other = masked_mlp(), linear(8, 4, seed=5)
    masks = torch_rsst.extract_mask(model)
    with torch_rsst.dense_weights(model, masked_writes="keep"):
        model[0] = other
    assert model[0] is other
    assert_mask_invariants(model, masks)
    assert same(other.weight_orig, linear(8, 4, seed=5).weight)


def test_a_batch_norm_fused_into_a_linear_layer_inside_stays_masked() -> None:
    model = normed().eval()
    x, mask = tokens(0, 3, 4), torch_rsst.extract_mask(model)["0.weight"]
    expected = model(x)
    with torch_rsst.dense_weights(model):
        fused = fuse_linear_bn_eval(model[0], model[1])
        model[0], model[1] = fused, nn.Identity()
        model[1].weight = nn.Parameter(torch.zeros(4))
        model[1].bias = nn.Parameter(torch.zeros(4))
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(torch_rsst.extract_mask(model)["0.weight"], mask)


def test_an_assigned_parameter_becomes_the_original() -> None:
    layer, new = masked_layer(), nn.Parameter(torch.full((3, 4), 2.0))
    latent = layer.weight_orig.detach().clone()
    with torch_rsst.dense_weights(layer, masked_writes="drop"):
        layer.weight = new
    assert layer.weight_orig is new
    assert same(new, torch.where(MASK, 2.0, latent))


def test_weights_that_are_tied_inside_share_the_mask() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch_rsst.apply_mask(model, {"0.weight": torch.eye(4)})
    with torch_rsst.dense_weights(model):
        model[1].weight = model[0].weight
    assert model[1].weight_orig is model[0].weight_orig
    assert model[1].weight_mask is model[0].weight_mask
    assert_mask_invariants(model)


@pytest.mark.parametrize("masked", ["mid", "head", "embed"])
def test_weights_are_tied_inside_while_an_optimizer_holds_them(masked: str) -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(6, 4), "mid": nn.Linear(4, 4), "head": nn.Linear(4, 6, bias=False)}
    )
    optimizer = torch.optim.AdamW(model.parameters())
    torch_rsst.l1_unstructured(model[masked], "weight", amount=0.5)
    with torch_rsst.dense_weights(model, masked_writes="drop"):
        model["head"].weight = model["embed"].weight
    held = "weight" if masked == "mid" else "weight_orig"
    assert model["head"]._parameters[held] is model["embed"]._parameters[held]
    assert optimizer.param_groups  # alive until here


def test_tying_two_masked_weights_takes_the_mask_of_the_parameter_that_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch_rsst.apply_mask(model, {"0.weight": torch.eye(4), "1.weight": torch.ones(4, 4)})
    with torch_rsst.dense_weights(model):
        model[1].weight = model[0].weight
    assert model[1].weight_orig is model[0].weight_orig
    assert torch.equal(torch_rsst.extract_mask(model)["0.weight"], torch.eye(4) != 0)
    assert_mask_invariants(model)


def _masks_inside(layer: nn.Module) -> None:
    stock.custom_from_mask(layer, "weight", MASK)


def _parametrizes(layer: nn.Module) -> None:
    parametrizations.spectral_norm(layer)


def _reshapes(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.zeros(2, 4))


def _deletes(layer: nn.Module) -> None:
    del layer.weight


@pytest.mark.parametrize(
    ("work", "text"),
    [
        (_masks_inside, "got none"),
        (_parametrizes, "got one that was masked or parametrized inside"),
        (_reshapes, r"expected shape \(3, 4\) as before, got shape \(2, 4\)"),
        (_deletes, "expected a parameter there on leaving, got none. Work on a copy"),
    ],
)
def test_what_leaves_no_place_for_a_mask_is_an_error_and_is_undone(
    work: Callable[[nn.Module], None], text: str
) -> None:
    layer = masked_layer()
    before = fingerprint(layer)
    with pytest.raises(RuntimeError, match=text), torch_rsst.dense_weights(layer):
        work(layer)
    assert fingerprint(layer) == before


def test_a_cast_inside_casts_the_original_and_the_mask() -> None:
    layer = masked_layer()
    original = layer.weight_orig
    with torch_rsst.dense_weights(layer):
        layer.double()
    assert layer.weight_orig is original
    assert_mask_invariants(layer, {"weight": MASK})
    assert layer.weight.dtype == torch.float64


def test_gradients_are_left_alone_where_the_block_raises() -> None:
    layer = masked_layer()
    layer(tokens(0, 2, 4)).sum().backward()
    before = layer.weight_orig.grad.clone()

    def work(layer: nn.Module) -> None:
        with torch.enable_grad():
            layer(tokens(0, 2, 4)).sum().backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_inside(layer, work)
    assert same(layer.weight_orig.grad, before)


def test_a_freeze_holds_after_the_block() -> None:
    layer = masked_layer()
    handle = torch_rsst.freeze_masked(layer)
    latent = layer.weight_orig.detach().clone()
    with torch_rsst.dense_weights(layer):
        pass
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(tokens(0, 2, 4)).sum().backward()
    optimizer.step()
    assert same(layer.weight_orig[~MASK], latent[~MASK])
    handle.remove()


def test_an_unknown_choice_is_an_error() -> None:
    with pytest.raises(ValueError, match="masked_writes: expected one of 'error', 'drop', 'keep'"):
        torch_rsst.dense_weights(mlp(), masked_writes="errors")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a module, got int"):
        torch_rsst.dense_weights(3)  # type: ignore[arg-type]


def test_parameters_untied_inside_have_masks_of_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    torch_rsst.apply_mask(model, {"0.weight": torch.eye(4)})
    with torch_rsst.dense_weights(model):
        model[1].weight = nn.Parameter(3.0 * torch.eye(4))
    torch_rsst.apply_mask(model, {"0.weight": torch.ones(4, 4)})
    assert torch.equal(model[1].weight_mask, torch.eye(4))


@pytest.mark.parametrize("fails", [False, True])
def test_what_requires_gradients_is_kept_on_leaving_and_put_back_after_an_error(fails):
    model = nn.Linear(4, 4)
    torch_rsst.apply_mask(model, {"weight": torch.eye(4)})
    try:
        with torch_rsst.dense_weights(model):
            model.requires_grad_(False)
            if fails:
                raise KeyError("mine")
    except KeyError:
        pass
    assert [p.requires_grad for p in model.parameters()] == [fails, fails]


@pytest.mark.parametrize("change", [lambda m: None, lambda m: m.cache.resize_(5)])
def test_buffers_that_cannot_be_written_or_are_resized_do_not_hide_the_error(change):
    model = nn.Linear(4, 4)
    model.register_buffer("position", torch.zeros(1, 4).expand(3, 4))
    model.register_buffer("cache", torch.ones(2))
    torch_rsst.apply_mask(model, {"weight": torch.eye(4)})

    def changed_and_failed():
        with torch_rsst.dense_weights(model):
            change(model)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        changed_and_failed()
    assert model.cache.tolist() == [1.0, 1.0]
    assert model.position.shape == (3, 4)


def test_sparse_gradients_made_inside_are_added_on_leaving() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    mask = torch.arange(12).view(4, 3) % 2 == 0
    torch_rsst.apply_mask(table, {"weight": mask})
    with torch_rsst.dense_weights(table):
        table(torch.tensor([0, 1, 1])).sum().backward()
    expected = torch.tensor([[1.0], [2.0], [0.0], [0.0]]) * mask
    assert torch.equal(table.weight_orig.grad.to_dense(), expected)


def test_an_error_inside_leaves_pending_backward_passes_alone() -> None:
    model, x = masked_mlp(), tokens(0, 2, 4)
    output = model(x)
    with pytest.raises(KeyError), torch_rsst.dense_weights(model):
        raise KeyError
    output.sum().backward()


def test_a_conversion_to_meta_inside_is_refused() -> None:
    layer = masked_layer()
    with (
        pytest.raises(
            RuntimeError, match=r"'weight': expected values on leaving, got a parameter on the meta"
        ),
        torch_rsst.dense_weights(layer),
    ):
        layer.to("meta")
    assert not layer.weight_orig.is_meta


# Ties to modules outside of the block


def tied_inside(model: nn.Sequential, target: int, source: int) -> nn.Sequential:
    """A block of the first module, in which its weight is tied to that of the second, outside."""
    torch_rsst.apply_mask(model[0], {"weight": torch.eye(4)})
    with torch_rsst.dense_weights(model[0], masked_writes="drop"):
        model[target].weight = model[source].weight
    return model


@pytest.mark.parametrize(("target", "source"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Embedding(4, 4)])
def test_a_module_outside_that_is_tied_inside_shares_the_mask(
    make: Callable[[], nn.Module], target: int, source: int
) -> None:
    model = tied_inside(nn.Sequential(nn.Linear(4, 4), make()), target, source)
    assert model[1].weight_orig is model[0].weight_orig
    assert model[1].weight_mask is model[0].weight_mask
    assert_mask_invariants(model, {"0.weight": torch.eye(4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model[0](tokens(0, 4, 4)).sum() + model[1].weight.sum()).backward()
    optimizer.step()
    assert same(model[1].weight, model[0].weight)


@pytest.mark.parametrize("work", [_reshapes, _deletes, None])
def test_a_module_outside_that_is_tied_inside_has_its_own_weight_again_after_an_error(
    work: Callable[[nn.Module], None] | None,
) -> None:
    layer, other = masked_layer(), linear()
    layer.extra = linear()
    torch_rsst.apply_mask(layer.extra, {"weight": MASK})
    before = [fingerprint(each) for each in (layer, other)]

    def tie(layer: nn.Module) -> None:
        other.weight = layer.weight
        if work is None:
            raise KeyError
        work(layer.extra)

    with pytest.raises((RuntimeError, KeyError)):
        run_inside(layer, tie)
    assert [fingerprint(each) for each in (layer, other)] == before


def test_an_error_while_masks_are_put_back_leaves_no_mask_in_a_module_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = fingerprint(model[1])

    def failing(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(dense_weights_module, "move_freeze", failing)
    with pytest.raises(MemoryError):
        tied_inside(model, 1, 0)
    assert fingerprint(model[1]) == before
    assert_mask_invariants(model, {"0.weight": torch.eye(4)})


def test_a_weight_outside_that_has_another_mask_cannot_be_tied_inside() -> None:
    layer, other = masked_layer(), masked_layer()
    before = [fingerprint(each) for each in (layer, other)]
    text = "'weight': expected a plain parameter on leaving, got one that was masked"

    def tie(layer: nn.Module) -> None:
        layer.weight = other.weight_orig

    with pytest.raises(RuntimeError, match=text):
        run_inside(layer, tie, masked_writes="drop")
    assert [fingerprint(each) for each in (layer, other)] == before


@pytest.mark.parametrize("make", [masked_mlp, tied, normed])
def test_leaving_a_block_looks_through_no_heap(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()

    def fail() -> None:
        raise AssertionError

    monkeypatch.setattr(tied_module, "_modules_alive", fail)
    run_inside(model, outputs)


def test_a_program_that_is_exported_inside_stays_dense_and_can_be_trained() -> None:
    model, x = masked_mlp(), tokens(0, 2, 4)
    masks = torch_rsst.extract_mask(model)
    with torch_rsst.dense_weights(model):
        names = [name for name, _ in model.named_parameters()]
        program = torch.export.export(model, (x,)).module()
    assert [name for name, _ in program.named_parameters()] == names
    torch.testing.assert_close(program(x), model(x))
    program(x).sum().backward()
    torch.optim.SGD(program.parameters(), lr=0.1).step()
    assert_mask_invariants(model, masks)


def test_a_buffer_that_a_failing_block_has_made_non_persistent_is_saved_again() -> None:
    layer = nn.Linear(2, 2)
    layer.register_buffer("statistic", torch.ones(2))
    torch_rsst.l1_unstructured(layer, "weight", 0.5)
    keys = list(layer.state_dict())

    def failing() -> None:
        with torch_rsst.dense_weights(layer):
            del layer.statistic
            layer.register_buffer("statistic", torch.zeros(3), persistent=False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert list(layer.state_dict()) == keys
    assert layer.statistic.tolist() == [1.0, 1.0]
