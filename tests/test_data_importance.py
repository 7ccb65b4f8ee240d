"""Importance from data: against one unit at a time, and without leaving a trace."""

from __future__ import annotations

import copy
import math
import random
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from tiny_models import mlp, tokens
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune as stock
from torch.utils.checkpoint import checkpoint

import torch_rsst
from torch_rsst import RSST, Refill, find_groups, head_layer, measure_importance, regroup
from torch_rsst.groups import GroupLayer, Groups, Member
from torch_rsst.importance import (
    DataImportance,
    magnitude,
    name_of,
    rank_average,
    remain,
    resolve_importance,
    weighted_sum,
)
from torch_rsst.masks import named_weights
from torch_rsst.surgery import module_at
from torch_rsst.testing import models_with_groups

NAMES = ["activation_l1", "activation_l2", "taylor"]


def loss_fn(output: Any, batch: Any) -> Tensor:
    return output.sin().mul(3.0).square().sum()


def measured(model: nn.Module, groups: Any, name: Any, batches: Any, **kwargs: Any) -> Any:
    """Scores of each layer, by its text."""
    found = measure_importance(model, groups, name, batches=batches, loss_fn=loss_fn, **kwargs)
    weights = named_weights(model)
    return {
        str(layer): found(layer, weights, {})
        for layer in torch_rsst.groups.as_groups(groups).layers
    }


# The slow oracle: hooks on a dense copy, and the gradient of one unit's slice at a time


def dense_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model).eval()
    torch_rsst.remove_all(copied, freeze_zeros=False)
    return copied


def one_unit(model: nn.Module, layer: GroupLayer, unit: int, batches: Any, call: Any) -> list[Any]:
    """(values, gradients) of a unit at each layer that takes it in, for each batch and call."""
    seen = []
    for member in layer.members:
        if not member.consumes:
            continue
        module = module_at(model, member.parameter.rpartition(".")[0])
        axis = 1 if isinstance(module, nn.Conv2d) else -1
        index = (member.unit_of == unit).nonzero().flatten()
        for batch in batches:
            values: list[Tensor] = []
            shifts: list[
                Tensor
            ] = []  # zeros, whose gradient is that of the slice they are added to

            def shift(
                _: Any, args: Any, axis: int = axis, index: Any = index, to: Any = (values, shifts)
            ) -> Any:
                values, shifts = to
                values.append(args[0].index_select(axis, index).detach())
                shifts.append(torch.zeros_like(values[-1], requires_grad=True))
                return (args[0].index_add(axis % args[0].ndim, index, shifts[-1]), *args[1:])

            handle = module.register_forward_pre_hook(shift)
            loss = loss_fn(call(model, batch), batch)
            handle.remove()
            seen += zip(values, torch.autograd.grad(loss, shifts), strict=True)
    return seen


def by_oracle(
    name: str, model: nn.Module, layer: GroupLayer, batches: Any, call: Any
) -> list[float]:
    dense, scores = dense_copy(model), []
    for unit in range(layer.units):
        seen = one_unit(dense, layer, unit, batches, call)
        values = [v for activation, _ in seen for v in activation.double().flatten().tolist()]
        slopes = [g for _, gradient in seen for g in gradient.double().flatten().tolist()]
        if name == "activation_l1":
            scores.append(math.fsum(map(abs, values)) / len(values))
        elif name == "activation_l2":
            scores.append(math.sqrt(math.fsum(v * v for v in values) / len(values)))
        else:
            scores.append(math.fsum(abs(v * g) for v, g in zip(values, slopes, strict=True)))
    return scores


def check_against_oracle(
    model: nn.Module,
    groups: Groups,
    batches: Any,
    *,
    oracle_model: nn.Module | None = None,
    call: Any = None,
    tolerance: float = 1e-9,
) -> None:
    for name in NAMES:
        got = measured(model, groups, name, batches, **({} if call is None else {"forward": call}))
        for layer in groups.layers:
            reference = oracle_model or model
            run = call or (lambda m, b: m(b))
            expected = by_oracle(name, reference, layer, batches, run)
            assert got[str(layer)].dtype == torch.float64
            assert got[str(layer)].tolist() == pytest.approx(expected, rel=tolerance, abs=1e-12), (
                name
            )


class Residual(nn.Module):
    """Channels that two convolutions, a skip and a classifier take in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.outer = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        return self.head(self.last(x).relu().mean((2, 3)))


def masked(model: nn.Module, groups: Groups, amount: float = 0.3) -> nn.Module:
    torch_rsst.apply_mask(model, regroup(model, groups, amount=amount))
    first = next(name for name in named_weights(model) if name.endswith("weight"))
    mask = (
        torch.rand(named_weights(model)[first].shape, generator=torch.Generator().manual_seed(3))
        < 0.7
    )
    torch_rsst.apply_mask(model, {first: mask & torch_rsst.extract_mask(model).get(first, mask)})
    return model


@pytest.mark.parametrize("with_masks", [False, True])
def test_heads_and_neurons_against_one_unit_at_a_time(tiny_transformer, with_masks):
    model = tiny_transformer().double()
    groups = find_groups(model)
    assert {layer.kind for layer in groups.layers} == {"heads", "neurons"}
    if with_masks:
        masked(model, groups)
    batches = [tokens(0, 2, 3, 16).double(), tokens(1, 1, 5, 16).double()]
    check_against_oracle(model, Groups(groups.layers[:2]), batches)


@pytest.mark.parametrize("with_masks", [False, True])
def test_channels_that_several_layers_take_in_against_one_unit_at_a_time(with_masks):
    torch.manual_seed(0)
    model = Residual().double()
    groups = find_groups(model, ("channels",), example_inputs=tokens(0, 2, 3, 6, 6).double())
    consumers = [sum(m.consumes for m in layer.members) for layer in groups.layers]
    assert sorted(consumers) == [1, 1, 2]
    if with_masks:
        masked(model, groups)
    check_against_oracle(model, groups, [tokens(i, 2, 3, 6, 6).double() for i in range(2)])


class SlowAttention(nn.Module):
    """What nn.MultiheadAttention computes, by explicit steps, its output layer called."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj, self.heads = attention.out_proj, attention.num_heads
        self.batch_first, self._qkv_same_embed_dim = attention.batch_first, False

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        assert self.batch_first
        made = nn.functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = made.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None


def encoder(layers: int = 1) -> tuple[nn.TransformerEncoder, Groups]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 10, batch_first=True, dropout=0.2)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).double()
    return model, find_groups(model, example_inputs=tokens(0, 2, 4, 12).double())


@pytest.mark.parametrize("with_masks", [False, True])
def test_attention_that_hands_its_output_weight_to_a_function(with_masks):
    model, groups = encoder()
    assert {layer.kind for layer in groups.layers} == {"heads", "neurons"}
    if with_masks:
        masked(model, groups)
    slow = dense_copy(model)
    slow.layers[0].self_attn = SlowAttention(slow.layers[0].self_attn)
    batches = [tokens(i, 2, 4, 12).double() for i in range(2)]
    with torch.no_grad():
        torch.testing.assert_close(slow(batches[0]), dense_copy(model)(batches[0]))
    check_against_oracle(model, groups, batches, oracle_model=slow)


def test_fused_paths_of_an_encoder_do_not_hide_its_units():
    model, groups = encoder()
    model.enable_nested_tensor = True
    padding = torch.tensor([[False] * 4, [False, False, True, True]])
    batches = [tokens(0, 2, 4, 12).double()]
    run = measured(
        model, groups, "l1", batches, forward=lambda m, b: m(b, src_key_padding_mask=padding)
    )
    assert all(bool((scores > 0).all()) for scores in run.values())


@pytest.mark.needs_timm
@pytest.mark.parametrize("with_masks", [False, True])
def test_attention_of_torchvision_that_is_a_function(with_masks):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    cls = torchvision.models.swin_transformer.ShiftedWindowAttention
    model = nn.Sequential(cls(8, [2, 2], [1, 1], 2)).double()
    groups = find_groups(model, ("heads",), example_inputs=tokens(0, 1, 4, 4, 8).double())
    if with_masks:
        torch_rsst.apply_mask(model, {"0.proj.weight": torch.rand(8, 8) < 0.6})
    seen: list[Tensor] = []
    batch = tokens(0, 1, 4, 4, 8).double()
    # Its output is linear in what heads put out: solve for that, with a projection that has an inverse.
    dense = dense_copy(model)
    with torch.no_grad():
        dense[0].proj.weight.copy_(torch.eye(8))
        dense[0].proj.bias.zero_()
        seen.append(dense(batch))
    expected = [float(seen[0][..., 4 * head : 4 * head + 4].abs().mean()) for head in range(2)]
    (scores,) = measured(model, groups, "activation_l1", [batch]).values()
    assert scores.tolist() == pytest.approx(expected)


@pytest.mark.needs_timm
def test_weights_that_are_stored_the_other_way_round():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=8, n_head=2, n_layer=1, n_inner=6, vocab_size=11, n_positions=8
    )
    model = transformers.GPT2Model(config).double()
    groups = find_groups(model, ("neurons",))
    batches = [torch.arange(6).reshape(2, 3), torch.arange(3, 9).reshape(2, 3)]
    check_against_oracle(model, groups, batches, call=lambda m, b: m(input_ids=b)[0])


@given(drawn=models_with_groups(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3))
@settings(max_examples=12)
def test_any_model_against_one_unit_at_a_time(
    drawn: tuple[nn.Module, Groups], sizes: list[int]
) -> None:
    model, groups = drawn
    width = model[0].in_features
    batches = [tokens(i, size, width) for i, size in enumerate(sizes)]
    check_against_oracle(model, Groups(groups.layers[1:]), batches, tolerance=1e-4)


# What is measured


def literal() -> tuple[nn.Sequential, Groups]:
    """Three neurons: x, 2x and −x, of which the last is never heard; loss = sum of outputs."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
        model[2].weight.copy_(torch.tensor([[10.0, -1.0, 5.0]]))
    return model, find_groups(model)


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("activation_l1", [2.0, 4.0, 0.0]),
        ("l1", [2.0, 4.0, 0.0]),
        ("activation_l2", [math.sqrt(14 / 3), math.sqrt(56 / 3), 0.0]),
        ("l2", [math.sqrt(14 / 3), math.sqrt(56 / 3), 0.0]),
        ("taylor", [60.0, 12.0, 0.0]),
        ("saliency", [60.0, 12.0, 0.0]),
    ],
)
def test_literal_scores(name, scores):
    model, groups = literal()
    batches = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])]
    found = measure_importance(
        model, groups, name, batches=batches, loss_fn=lambda output, _: output.sum()
    )
    assert found(groups.layers[0], {}, {}).tolist() == pytest.approx(scores)


def test_the_best_units_stay():
    model, groups = literal()
    batches = [torch.tensor([[1.0]])]
    by_activation = regroup(model, groups, amount=2, importance="l1", batches=batches)
    assert by_activation["2.weight"].tolist() == [[False, True, False]]
    by_loss = regroup(
        model, groups, amount=2, importance="taylor", batches=batches, loss_fn=lambda o, b: o.sum()
    )
    assert by_loss["2.weight"].tolist() == [[True, False, False]]


def test_layers_are_measured_each_by_its_own_input(tiny_transformer):
    model = tiny_transformer()
    groups = find_groups(model)
    together = measured(model, groups, "l2", [tokens(0, 2, 3, 16)])
    alone = [measured(model, [layer], "l2", [tokens(0, 2, 3, 16)]) for layer in groups.layers]
    assert all(torch.equal(together[name], s) for one in alone for name, s in one.items())
    assert len({tuple(s.tolist()) for s in together.values()}) == len(groups.layers)


def test_some_units_of_a_layer_can_be_measured_alone():
    model, groups = literal()
    found = measured(model, [groups[2], groups[1]], "l1", [torch.tensor([[3.0]])])
    assert [s.tolist() for s in found.values()] == [[0.0, 6.0]]


def test_dead_units_score_zero_and_go_first():
    model = mlp()
    with torch.no_grad():
        model[0].bias.fill_(3.0)  # alive after its weights are masked
    rows = torch.ones(8, 4, dtype=torch.bool)
    columns = torch.ones(2, 8, dtype=torch.bool)
    rows[5], columns[:, 5] = False, False
    torch_rsst.apply_mask(model, {"0.weight": rows, "2.weight": columns})
    groups = find_groups(model)
    refill = regroup(model, groups, amount=1, importance="l1", batches=[tokens(0, 5, 4)])
    assert (~refill["0.weight"].any(1)).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("name", NAMES)
def test_another_current_mask_is_in_force_while_the_model_runs(name):
    model, batches = mlp().double(), [tokens(0, 5, 4).double()]
    groups = find_groups(model)
    torch_rsst.apply_mask(model, {"0.weight": torch.rand(8, 4) < 0.5})
    current = {"0.weight": torch.rand(8, 4) < 0.5, "2.weight": torch.rand(2, 8) < 0.5}
    other = copy.deepcopy(model)
    torch_rsst.apply_mask(other, current)
    expected = measured(other, groups, name, batches)
    got = measured(model, groups, name, batches, current_mask=current)
    assert all(torch.equal(got[k], expected[k]) for k in expected)
    free = measured(model, groups, name, batches, current_mask={})
    plain = mlp().double()
    assert all(torch.equal(free[k], s) for k, s in measured(plain, groups, name, batches).items())


def test_models_that_stock_pruning_has_masked():
    model = mlp()
    groups = find_groups(model)
    stock.l1_unstructured(model[0], "weight", 0.5)
    stock.l1_unstructured(model[2], "weight", 0.3)
    same = mlp()
    torch_rsst.apply_mask(same, torch_rsst.extract_mask(model))
    check_against_oracle(model, groups, [tokens(0, 5, 4)], oracle_model=same, tolerance=1e-5)


def test_a_layer_that_is_used_twice_is_heard_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp(4, 6)
            self.back = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.back(self.mlp(x)))

    torch.manual_seed(0)
    model = Twice().double()
    check_against_oracle(model, find_groups(model), [tokens(0, 3, 4).double()])


def test_tied_weights_are_heard_at_both_places():
    model = nn.Sequential(mlp(4, 6), nn.Linear(2, 4), mlp(4, 6))
    model[2][0].weight, model[2][2].weight = model[0][0].weight, model[0][2].weight
    layer = find_groups(model[0]).layers[0]
    members = tuple(
        Member(f"0.{m.parameter}", m.dim, m.unit_of, m.ranked, m.consumes) for m in layer.members
    )
    groups = Groups((GroupLayer("0", "neurons", 6, members),))
    seen: list[Tensor] = []
    for part in (model[0], model[2]):
        part[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    (scores,) = measured(model, groups, "l1", [tokens(0, 3, 4)]).values()
    assert scores.tolist() == pytest.approx(torch.cat(seen).abs().mean(0).tolist())
    assert len(seen) == 2


def test_frozen_parameters_and_outer_modes_do_not_matter():
    model, batches = mlp().double(), [tokens(0, 5, 4).double()]
    groups = find_groups(model)
    expected = measured(model, groups, "taylor", batches)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            got = measured(model, groups, "taylor", batches)
        assert all(torch.allclose(got[k], expected[k], rtol=1e-12) for k in expected)


@pytest.mark.parametrize("reentrant", [False])
def test_checkpointed_parts_are_heard_once(reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    plain = mlp().double()
    model = Checkpointed(*plain)
    batches, groups = [tokens(0, 5, 4).double()], find_groups(plain)
    for name in NAMES:
        expected = measured(plain, groups, name, batches)
        got = measured(model, groups, name, batches)
        assert all(torch.allclose(got[k], expected[k], rtol=1e-12) for k in expected)


def test_inputs_that_are_written_to_later_keep_their_gradients():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).tanh() * 1.0
            out = self.second(hidden)
            hidden.mul_(0.0)
            return out

    torch.manual_seed(0)
    model = InPlace().double().requires_grad_(False)
    groups = Groups((find_groups(nn.Sequential(model.first, model.second)).layers[0],))
    members = tuple(
        Member(
            {"0": "first", "1": "second"}[m.parameter[0]] + m.parameter[1:],
            m.dim,
            m.unit_of,
            m.ranked,
            m.consumes,
        )
        for m in groups.layers[0].members
    )
    groups = Groups((GroupLayer("", "neurons", 4, members),))
    check_against_oracle(model, groups, [tokens(0, 3, 4).double()])


# Streaming


def test_one_batch_is_held_at_a_time():
    model, groups = mlp(), find_groups(mlp())
    refs: list[Any] = []
    outputs: list[Any] = []
    alive: list[int] = []

    def batches() -> Iterator[Tensor]:
        for number in range(12):
            alive.append(sum(ref() is not None for ref in (*refs, *outputs)))
            batch = tokens(number, 5, 4)
            refs.append(weakref.ref(batch))
            yield batch
            del batch

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        output = model(batch)
        outputs.append(weakref.ref(output))
        return output

    measured(model, groups, "taylor", batches, forward=forward)
    assert len(alive) == 12
    assert max(alive) <= 1  # the batch that the loop has not let go of yet


# No trace


def restless() -> nn.Sequential:
    """Part of it in training mode, gradients there, one hook of the user's, masks."""
    model = nn.Sequential(mlp(4, 6), nn.Dropout(0.5), nn.Linear(2, 4), nn.BatchNorm1d(4), mlp(4, 8))
    model[0].eval()
    model(tokens(0, 5, 4)).sum().backward()
    model[0][2].register_forward_pre_hook(lambda *_: None)
    torch_rsst.apply_mask(model, {"0.0.weight": torch.rand(6, 4) < 0.5})
    return model


def disturb(model: nn.Module, batch: Tensor) -> Tensor:
    """Draws random numbers of all kinds, and changes modes."""
    random.random()
    torch.rand(3)
    if numpy := pytest.importorskip("numpy"):
        numpy.random.rand()
    model[1].train()
    return model(batch)


class Stop(BaseException):
    pass


def states() -> list[Any]:
    numpy = pytest.importorskip("numpy")
    return [random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["nowhere", "batches", "forward", "loss", "entries"])
def test_everything_is_put_back_whatever_happens(name, where, fingerprint):
    model = restless()
    groups = find_groups(model)
    stock.l1_unstructured(model[4][2], "weight", 0.5)  # after it, stock modules cannot be copied
    current = {"0.0.weight": torch.rand(6, 4) < 0.5, "2.weight": torch.rand(4, 2) < 0.5}

    def batches() -> Iterator[Tensor]:
        torch.rand(1)
        yield tokens(0, 5, 4)
        if where == "batches":
            raise Stop
        yield tokens(1, 5, 4)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        output = disturb(model, batch)
        if where == "forward":
            raise Stop
        return output

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        if where == "loss":
            raise Stop
        return output.sum()

    class Failing(DataImportance):
        needs_gradient = name == "taylor"

        def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
            raise Stop

    importance = Failing() if where == "entries" else name
    before, own = fingerprint(model), states()
    expected = where != "nowhere" and (where != "loss" or name == "taylor")
    arguments = {"batches": batches, "forward": forward, "loss_fn": loss, "current_mask": current}
    if expected:
        with pytest.raises(Stop):
            measure_importance(model, groups, importance, **arguments)
    else:
        measure_importance(model, groups, importance, **arguments)
    assert fingerprint(model) == before
    assert states() == own
    assert torch.overrides._get_current_function_mode() is None
    assert torch.is_grad_enabled()


def test_a_graph_that_waits_for_backward_is_not_broken():
    model = mlp()
    groups = find_groups(model)
    loss = model(tokens(0, 5, 4)).square().sum()
    current = {"0.weight": torch.zeros(8, 4, dtype=torch.bool)}
    measured(model, groups, "taylor", [tokens(1, 5, 4)], current_mask=current)
    loss.backward()
    fresh = mlp()
    fresh(tokens(0, 5, 4)).square().sum().backward()
    assert torch.equal(model[0].weight.grad, fresh[0].weight.grad)


def test_the_model_runs_in_eval_mode_unless_the_forward_says_otherwise():
    model = nn.Sequential(mlp(4, 6), nn.Dropout(0.5)).train()
    modes = []
    groups = find_groups(model)
    for forward in (None, lambda m, b: m.train()(b)):
        handle = model[1].register_forward_pre_hook(lambda m, _: modes.append(m.training))
        measured(model, groups, "l1", [tokens(0, 5, 4)], forward=forward)
        handle.remove()
    assert modes == [False, True]
    assert model[1].training


# Autocast, compiled and replicated models


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    model, batches = mlp(), [tokens(i, 5, 4) for i in range(2)]
    groups = find_groups(model)
    expected = measured(model, groups, name, batches)
    with torch.autocast("cpu", torch.bfloat16):
        model(batches[0])  # weights that autocast keeps converted
        got = measured(model, groups, name, batches)
        model(batches[0]).float().sum().backward()
    assert all(torch.allclose(got[k], s, rtol=0.05) for k, s in expected.items())
    assert not all(torch.equal(got[k], s) for k, s in expected.items())
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_models(name):
    model = mlp().bfloat16()
    batches = [tokens(0, 50, 4).bfloat16()]
    expected = measured(mlp(), find_groups(mlp()), name, [tokens(0, 50, 4)])
    got = measured(model, find_groups(mlp()), name, batches)
    assert all(torch.allclose(got[k], s, rtol=0.05) for k, s in expected.items())


def test_compiled_models(fingerprint):
    plain = nn.Sequential(mlp(4, 6), nn.Linear(2, 4), mlp(4, 8))
    groups, batches = find_groups(plain), [tokens(i, 5, 4) for i in range(2)]
    outside, inside, in_place = (copy.deepcopy(plain) for _ in range(3))
    inside[2] = torch.compile(inside[2], backend="eager")
    in_place.compile(backend="eager")
    for model in (torch.compile(outside, backend="eager"), inside, in_place):
        model(batches[0])  # compiled before anybody listens
        for name in NAMES:
            expected = measured(plain, groups, name, batches)
            got = measured(model, groups, name, batches)
            assert all(torch.equal(got[k], s) for k, s in expected.items())


def replicated(rank: int) -> Any:
    model = DistributedDataParallel(mlp().double())
    groups = find_groups(model.module)

    def batches(failing: int | None = None) -> Iterator[Tensor]:
        if rank == failing:
            raise ValueError("no such file")
        for number in range(1 + rank):  # ranks may have different numbers of them
            yield tokens(10 * rank + number, 5, 4).double()

    names = (*NAMES, weighted_sum({"taylor": 1.0, "l2": 2.0}))
    scores = [regroup_scores(model, groups, name, batches) for name in names]
    failures = []
    rounds = RSST(model, groups, steps_per_round=1, rounds=1, importance="l2", batches=batches)
    broken = RSST(
        model, groups, steps_per_round=1, importance="l2", batches=lambda: batches(failing=1)
    )
    for fails in (
        lambda: regroup(model, groups, importance="l1", batches=lambda: batches(failing=1)),
        lambda: next(broken),
    ):
        try:
            fails()
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    refill = next(rounds).refill_mask
    return scores, {name: mask.tolist() for name, mask in refill.items()}, failures


def regroup_scores(model: nn.Module, groups: Groups, name: Any, batches: Any) -> list[float]:
    (scores,) = measured(model, groups, name, batches).values()
    return scores.tolist()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_ranks_add_up_their_batches_and_all_raise_where_one_fails():
    first, second = on_ranks(2, replicated)
    assert first[:2] == second[:2]
    model = mlp().double()
    batches = [tokens(number, 5, 4).double() for number in (0, 10, 11)]
    for name, got in zip(NAMES, first[0], strict=False):
        expected = regroup_scores(model, find_groups(model), name, batches)
        assert got == pytest.approx(expected, rel=1e-12)
    assert second[2] == ["ValueError: no such file"] * 2
    for failure in first[2]:
        assert failure.startswith("RuntimeError: replicas: ")
        assert "an error on rank(s) [1]: ValueError: no such file" in failure


# Your own, and combinations


@dataclass(frozen=True)
class Power(DataImportance):
    """The p-norm of activations."""

    p: float = 3.0

    def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is None
        return activation.abs() ** self.p

    def score(self, total: Tensor, count: Tensor) -> Tensor:
        return (total / count) ** (1 / self.p)


class SignedTaylor(DataImportance):
    needs_gradient = True

    def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return activation * gradient


def test_importances_of_your_own():
    model, groups = literal()
    batches = [torch.tensor([[1.0], [2.0]])]
    (cubes,) = measured(model, groups, Power(), batches).values()
    assert cubes.tolist() == pytest.approx([4.5 ** (1 / 3), 36 ** (1 / 3), 0.0])
    found = measure_importance(
        model, groups, SignedTaylor(), batches=batches, loss_fn=lambda o, _: o.sum()
    )
    assert found(groups.layers[0], {}, {}).tolist() == pytest.approx([15.0, -3.0, 0.0])
    product = measure_importance(model, groups, "l1", batches=batches)
    refill = regroup(
        model, groups, amount=2, importance=lambda *given: magnitude(*given) * product(*given)
    )
    assert refill["2.weight"].tolist() == [[True, False, False]]


def test_combinations_are_made_of_what_their_parts_say():
    model, groups = literal()
    layer, weights, batches = groups.layers[0], named_weights(model), [torch.tensor([[1.0]])]
    mixed = weighted_sum({"magnitude": 1.0, "l1": 0.5, Power(2.0): -1.0}, normalize=None)
    found = measure_importance(model, groups, mixed, batches=batches)
    assert found(layer, weights, {}).tolist() == pytest.approx([11 - 0.5, 3 - 1.0, 6.0])
    by_sum = weighted_sum({"magnitude": 1.0, "l1": 0.5})
    found = measure_importance(model, groups, by_sum, batches=batches)
    expected = [11 / 20 + 0.5 / 3, 3 / 20 + 1 / 3, 6 / 20]
    assert found(layer, weights, {}).tolist() == pytest.approx(expected)
    ranks = rank_average("magnitude", rank_average("l1", "remain"))
    found = measure_importance(model, groups, ranks, batches=batches)
    inner = [(2 + 2) / 6, (3 + 2) / 6, (1 + 2) / 6]
    expected = [(1 + 2 / 3) / 2, (1 / 3 + 1) / 2, (2 / 3 + 1 / 3) / 2]
    assert sorted(inner) == [0.5, 2 / 3, 5 / 6]
    assert found(layer, weights, {}).tolist() == pytest.approx(expected)


def test_dead_units_rank_below_all_others():
    layer = head_layer("w", rows=4, num_heads=4, projections=1)
    weights = {"w": torch.tensor([[3.0], [-9.0], [1.0], [3.0]])}
    masks = {"w": torch.tensor([[True], [False], [True], [True]])}
    ranks = rank_average("magnitude", lambda *_: torch.tensor([-3.0, 9.0, -1.0, -2.0]))
    assert ranks(layer, weights, masks).tolist() == pytest.approx([3.5 / 6, 0.0, 4 / 6, 4.5 / 6])
    nothing = {"w": torch.zeros(4, 1, dtype=torch.bool)}
    assert ranks(layer, weights, nothing).tolist() == [0.0] * 4
    assert (
        weighted_sum({"magnitude": 1.0}, normalize="max")(layer, weights, nothing).tolist()
        == [0.0] * 4
    )


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_ranks_against_counting(values):
    layer = head_layer("w", rows=len(values), num_heads=len(values), projections=1)
    ranks = rank_average(lambda *_: torch.tensor(values))(
        layer, {"w": torch.ones(len(values), 1)}, {}
    )
    expected = [
        (sum(o < v for o in values) + (sum(o == v for o in values) + 1) / 2) / len(values)
        for v in values
    ]
    assert ranks.tolist() == pytest.approx(expected)


def test_names_in_messages_and_settings():
    assert name_of("l1") == "activation_l1"
    assert name_of(remain) == "remain"
    mixed = weighted_sum({"magnitude": 1.0, "saliency": 0.5, Power(): 2}, normalize="max")
    text = "weighted_sum({'magnitude': 1.0, 'taylor': 0.5, 'Power(p=3.0)': 2}, normalize='max')"
    assert repr(mixed) == name_of(mixed) == text
    assert repr(rank_average("l2", SignedTaylor())) == "rank_average(activation_l2, SignedTaylor)"
    model, groups = literal()
    found = measure_importance(model, groups, "l1", batches=[torch.ones(1, 1)])
    assert repr(found) == "measured('activation_l1')"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: weighted_sum({}),
            "WeightedSum: expected importances to combine, got none. Name at least one.",
        ),
        (lambda: rank_average(), "RankAverage: expected importances to combine, got none."),
        (lambda: rank_average("magnitud"), r"importance: .* Did you mean 'magnitude'\?"),
        (
            lambda: weighted_sum({"l1": float("nan")}),
            "weighted_sum: weight of 'activation_l1': expected a finite number, got nan.",
        ),
        (
            lambda: weighted_sum({"l1": "2"}),
            "weight of 'activation_l1': expected a finite number, got '2'.",
        ),
        (
            lambda: weighted_sum({"l1": 1.0}, normalize="mean"),
            "weighted_sum: normalize: expected one of 'sum', 'max', got 'mean'.",
        ),
    ],
)
def test_combinations_that_cannot_be(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_combinations_of_wrong_types():
    with pytest.raises(TypeError, match=r"weighted_sum: expected a dict, got list\. Such as"):
        weighted_sum(["l1"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="importance: expected a name or a callable, got <class"):
        resolve_importance(Power)


# What is refused


def refused(error: type[Exception], text: str, importance: Any = "l1", **kwargs: Any) -> None:
    model = kwargs.pop("model", mlp())
    groups = kwargs.pop("groups", None) or find_groups(mlp())
    with pytest.raises(error) as caught:
        regroup(model, groups, importance=importance, **kwargs)
    assert text in str(caught.value)


BATCHES = [torch.zeros(2, 4)]


@pytest.mark.parametrize(
    ("importance", "arguments", "text"),
    [
        ("l1", {}, "batches: expected batches to run on, for importance 'activation_l1', got none. Pass a DataLoader, a list of batches, or a function that returns one."),
        ("taylor", {"batches": BATCHES}, "loss_fn: expected a function, for importance 'taylor', got none. Pass loss_fn=lambda output, batch: …, which returns the loss of a batch."),
        ("magnitude", {"batches": BATCHES}, "batches: expected none: importance 'magnitude' looks at no data, got some. Leave it out, or pass an importance such as 'activation_l1'."),
        ("remain", {"loss_fn": loss_fn}, "loss_fn: expected none: importance 'remain' looks at no data, got some."),
        ("l1", {"batches": []}, "batches: expected at least one, got none. An iterator is used up by its first use"),
        ("l2", {"batches": [torch.zeros(0, 4)]}, "activations of the model (8 neurons): expected some, got none for unit(s) [0, 1, 2, 3, 4] at 2.weight. Pass a forward that runs this layer and batches that are not empty"),
        ("l1", {"batches": [torch.full((2, 4), math.nan)]}, "activations of the model (8 neurons), batch 0: expected finite numbers, got NaN or infinity. Look at this batch"),
        ("l1", {"batches": BATCHES, "forward": lambda m, b: b}, "activations of the model (8 neurons): expected some, got none for unit(s)"),
        ("taylor", {"batches": BATCHES, "loss_fn": lambda o, b: o}, "loss_fn, batch 0: expected a loss: a tensor with one number, got shape (2, 2). Return loss.sum() or loss.mean()."),
        ("taylor", {"batches": BATCHES, "loss_fn": lambda o, b: 1.0}, "loss_fn, batch 0: expected a loss: a tensor with one number, got float."),
        ("taylor", {"batches": BATCHES, "loss_fn": lambda o, b: o.sum() / 0}, "loss_fn, batch 0: expected a finite loss, got"),
        ("taylor", {"batches": BATCHES, "loss_fn": lambda o, b: o.detach().sum()}, "loss_fn, batch 0: expected a loss that depends on the model, got one without a gradient. Do not detach"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit(importance, arguments, text):
    refused(ValueError, text, importance, **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batches": torch.zeros(2, 4)}, "batches: expected an iterable of batches, got one Tensor. For a single batch, pass [batch]."),
        ({"batches": {"x": BATCHES[0]}}, "batches: expected an iterable of batches, got one dict. For a single batch, pass [batch]."),
        ({"batches": 3}, "batches: expected an iterable of batches, got a int. Pass a DataLoader"),
        ({"batches": lambda: torch.zeros(2, 4)}, "batches: expected a function that returns batches, got one Tensor. For a single batch, return [batch]."),
        ({"batches": BATCHES, "forward": 3}, "forward: expected a function, got int. It takes (model, batch), a loss_fn (output, batch)."),
        ({"batches": [(BATCHES[0], 1)]}, "batches: expected what model(batch) takes, got a tuple (TypeError: "),
    ],
)  # fmt: skip
def test_batches_of_wrong_types(arguments, text):
    refused(TypeError, text, **arguments)


def test_the_error_of_a_tensor_that_does_not_fit_is_the_models_own():
    refused(RuntimeError, "mat1 and mat2", batches=[torch.zeros(2, 5)])


def test_units_that_no_layer_takes_in():
    groups = [head_layer("0.weight", rows=8, num_heads=2, projections=1)]
    text = (
        "activations of 0.weight (2 heads): expected a member that takes the units in, got none. Mark "
        "the weight of the layer that takes the units in with consumes=True, as find_groups does"
    )
    refused(ValueError, text, groups=groups, batches=BATCHES)


def test_losses_that_do_not_depend_on_a_layer():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = mlp(), mlp(seed=5)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x).detach()

    model = Two()
    text = "gradients of other (8 neurons): expected a loss that depends on its units, got losses that do not."
    refused(
        ValueError,
        text,
        "taylor",
        model=model,
        groups=find_groups(model),
        batches=BATCHES,
        loss_fn=loss_fn,
    )


def test_entries_of_another_shape():
    class Sums(DataImportance):
        def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
            return activation.sum(-1)

    text = (
        "entries of Sums: expected shape (2, 8), got shape (2,). Return one number for each entry"
    )
    refused(ValueError, text, Sums(), batches=BATCHES)


def test_scores_of_other_groups():
    model, groups = literal()
    found = measure_importance(model, groups, "l1", batches=[torch.ones(1, 1)])
    text = "importance 'activation_l1': expected a layer whose units were measured, got the model (3 neurons). Measure the very groups"
    refused(ValueError, text, found, model=model, groups=[groups[2], groups[1], groups[0]])
    refused(ValueError, "whose units were measured, got the model (8 neurons)", found)


def test_without_data_they_say_what_is_missing():
    text = (
        "importance Taylor of weight (2 heads): expected batches to run on, got none. Pass batches, or "
        "what torch_rsst.measure_importance(model, groups, …) returns."
    )
    with pytest.raises(ValueError, match="importance Taylor") as caught:
        torch_rsst.head_structured(
            nn.Linear(3, 4), "weight", 1, 2, projections=1, importance="taylor"
        )
    assert str(caught.value) == text


# Rounds


def rounds_of(
    method: Any, importance: Any, batches: Any, **kwargs: Any
) -> tuple[Any, nn.Module, Any]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    arguments = {"steps_per_round": 2, "rounds": 3, "regroup_amount": 0.25, **kwargs}
    if importance != "l2":
        arguments["loss_fn"] = loss_fn
    groups = find_groups(model)
    made = method(
        model, groups, optimizer=optimizer, importance=importance, batches=batches, **arguments
    )
    return made, model, optimizer


def train(rnd: Any, model: nn.Module, optimizer: Any) -> None:
    for step in range(rnd.start_step, 2):
        optimizer.zero_grad()
        model(tokens(100 * rnd.index + step, 5, 4)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("method", [RSST, Refill])
@pytest.mark.parametrize(
    "importance", ["l2", "taylor", weighted_sum({"magnitude": 1, "taylor": 1})]
)
def test_rounds_measure_anew_under_the_mask_they_have_ranked(method, importance):
    drawn = []

    def batches() -> list[Tensor]:
        drawn.append(len(drawn))
        return [tokens(len(drawn), 5, 4)]

    rounds, model, optimizer = rounds_of(method, importance, batches)
    for index in range(3):
        then = copy.deepcopy(model)
        rnd = next(rounds)
        expected = regroup(
            then,
            find_groups(mlp()),
            amount=0.25,
            importance=importance,
            current_mask=rnd.current_mask,
            batches=[tokens(index + 1, 5, 4)],
            loss_fn=None if importance == "l2" else loss_fn,
            fillback_rate=0.1 if method is Refill else 0.0,
        )
        assert all(torch.equal(rnd.refill_mask[k], m) for k, m in expected.items())
        train(rnd, model, optimizer)
    rounds.finalize()
    assert drawn == [0, 1, 2]


def test_the_first_unpenalized_round_draws_no_batch():
    def batches() -> list[Tensor]:
        raise AssertionError("drawn")

    rounds, *_ = rounds_of(RSST, "l2", batches, train_first=True)
    assert next(rounds).index == -1


def test_rounds_that_lack_data_or_get_it_in_vain():
    with pytest.raises(
        ValueError, match="batches: expected batches to run on, for importance 'act"
    ):
        rounds_of(RSST, "l2", None)
    with pytest.raises(ValueError, match="expected none: importance 'magnitude' looks at no data"):
        rounds_of(Refill, "magnitude", BATCHES)
    text = "batches: expected batches that can be drawn in each of 3 rounds, got a list_iterator"
    with pytest.raises(TypeError, match=text):
        rounds_of(RSST, "l2", iter(BATCHES))
    rounds, *_ = rounds_of(RSST, "l2", iter(BATCHES), rounds=1)
    next(rounds)


def test_a_round_that_fails_leaves_everything_as_it_was(fingerprint):
    good = [True]

    def batches() -> list[Tensor]:
        return [tokens(0, 5, 4 if good[0] else 3)]

    rounds, model, optimizer = rounds_of(RSST, "l2", batches)
    train(next(rounds), model, optimizer)
    good[0] = False
    masks = torch_rsst.extract_mask(model)
    with pytest.raises(RuntimeError):
        next(rounds)
    assert all(torch.equal(m, masks[k]) for k, m in torch_rsst.extract_mask(model).items())
    good[0] = True
    assert next(rounds).index == 1


@pytest.mark.parametrize("method", [RSST, Refill])
def test_a_resumed_run_ends_as_an_uninterrupted_one(method):
    importance, batches = weighted_sum({"l2": 1.0, "taylor": 1.0}), [tokens(7, 5, 4)]
    whole, model, optimizer = rounds_of(method, importance, batches)
    for rnd in whole:
        train(rnd, model, optimizer)
    first, broken, optimizer = rounds_of(method, importance, batches)
    for rnd in first:
        train(rnd, broken, optimizer)
        if rnd.index == 1:
            break
    state = first.state_dict()
    assert not any(
        "batch" in key or "loss_fn" in key or key == "forward" for key in state["settings"]
    )
    assert state["settings"]["importance"] == repr(importance)
    second, resumed, fresh = rounds_of(method, importance, batches)
    second.load_state_dict(state)
    resumed.load_state_dict(broken.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    for rnd in second:
        train(rnd, resumed, fresh)
    for rounds in (whole, second):
        rounds.finalize()
    for (name, a), (_, b) in zip(model.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    other, *_ = rounds_of(method, "taylor", batches)
    with pytest.raises(ValueError, match="importance='taylor'"):
        other.load_state_dict(state)


def test_a_plan_takes_what_was_measured():
    model = mlp(hidden=16)
    groups = find_groups(model)
    found = measure_importance(model, groups, "l1", batches=[tokens(0, 5, 4)])
    planned = torch_rsst.plan(model, groups, budget={"params": 0.5}, importance=found)
    refill = regroup(model, groups, **planned.arguments)
    scores = found(groups.layers[0], {}, {})
    kept = refill["0.weight"].all(1)
    assert scores[kept].min() > scores[~kept].max()
