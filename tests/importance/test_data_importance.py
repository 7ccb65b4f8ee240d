"""Importance from data: against one unit at a time."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from activation_oracle import NAMES, check_against_oracle, dense_copy, literal, measured
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import mlp, tokens
from torch import Tensor, nn
from torch.nn.utils import prune as stock
from torch.utils.checkpoint import checkpoint

import torch_rsst
from torch_rsst import find_groups, measure_importance, regroup
from torch_rsst.groups.groups import GroupLayer, Groups, Member
from torch_rsst.importance import DataImportance, Variance
from torch_rsst.masking.names import named_weights
from torch_rsst.testing import models_with_groups


class Residual(nn.Module):
    """Channels that go to two convolutions, a skip and a classifier."""

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
def test_channels_with_several_consumers_against_one_unit_at_a_time(with_masks):
    torch.manual_seed(0)
    model = Residual().double()
    channel = torch.arange(6)
    rows = [Member(f"{name}.weight", 0, channel, ranked=True) for name in ("stem", "outer")]
    columns = [
        Member(f"{name}.weight", 1, channel, True, consumes=True) for name in ("inner", "last")
    ]
    layer = GroupLayer("stem", "channels", 6, (*rows, *columns))
    groups = Groups((layer,))
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
    with torch.no_grad():
        for parameter in model.parameters():  # biases begin at zero
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return model, find_groups(model, example_inputs=tokens(0, 2, 4, 12).double())


@pytest.mark.parametrize("with_masks", [False, True])
def test_attention_that_passes_its_output_weight_to_a_function(with_masks):
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


def test_an_encoder_with_nested_tensors_has_its_units_recorded():
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


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("activation_l1", [2.0, 4.0, 0.0]),
        ("l1", [2.0, 4.0, 0.0]),
        ("activation_l2", [math.sqrt(14 / 3), math.sqrt(56 / 3), 0.0]),
        ("l2", [math.sqrt(14 / 3), math.sqrt(56 / 3), 0.0]),
        ("taylor", [60.0, 12.0, 0.0]),
        ("saliency", [60.0, 12.0, 0.0]),
        ("variance", [14 / 3 * 100, 56 / 3, 0.0]),
        ("auto", [14 / 3 * 100, 56 / 3, 0.0]),
        (Variance(), [14 / 3 * 100, 56 / 3, 0.0]),
        (Variance(reconstruct=False), [14 / 3 * 100, 56 / 3, 0.0]),
        (Variance(reconstruct=True), [2 / 3 * 100, 8 / 3, 0.0]),
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


def test_a_layer_that_is_called_twice_is_recorded_twice():
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


def test_tied_weights_are_recorded_at_both_places():
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


def test_checkpointed_parts_are_recorded_once():
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    class Mean(DataImportance):
        needs_gradient = True

        def entries(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
            return activation.abs()

    plain = mlp().double()
    model = Checkpointed(*plain)
    batches, groups = [tokens(i, 5, 4).double() for i in range(2)], find_groups(plain)
    for name in (*NAMES, Mean()):
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


def test_inputs_by_keyword_and_weights_passed_to_functions():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.third = mlp(4, 5), mlp(4, 6, seed=2), mlp(4, 7, seed=4)

        def forward(self, x: Tensor) -> Tensor:
            by_keyword = self.one[2](input=self.one[:2](x))
            weight, bias = self.other[2].weight, self.other[2].bias
            by_function = nn.functional.linear(self.other[:2](x), weight, bias)
            weight, bias = self.third[2].weight, self.third[2].bias
            all_named = nn.functional.linear(input=self.third[:2](x), weight=weight, bias=bias)
            return by_keyword + by_function + all_named

    class Plain(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x) + self.third(x)

    model, groups = Odd().double(), find_groups(Odd())
    plain = Plain().double()
    for each in (model, plain):
        rows = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
        torch_rsst.apply_mask(each, {"other.2.weight": rows})
    check_against_oracle(model, groups, [tokens(0, 3, 4).double()], oracle_model=plain)


def test_inputs_of_an_unexpected_size():
    model = nn.Sequential(nn.Linear(4, 6), nn.LazyLinear(2))
    model[1] = nn.Conv1d(1, 2, 1)
    unit = torch.arange(3)
    rows = Member("0.weight", 0, torch.arange(6) // 2, ranked=True)
    layer = GroupLayer("", "neurons", 3, (rows, Member("1.weight", 1, unit[:1], True, True)))
    with pytest.raises(ValueError, match="got 5 along dim -2") as e:
        measured(model, [layer], "l1", [tokens(0, 5, 4)], forward=lambda m, b: m[1](m[0](b)[None]))
    assert "input of '1.weight': expected 1 features, got 5 along dim -2. Find the" in str(e.value)
