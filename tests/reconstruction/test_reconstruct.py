"""reconstruct: consumers are refitted when units go; what it promises, against direct least squares."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from channel_nets import NETS, Net, behind_stem, conv, images
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from tiny_models import mlp, tokens
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune as stock

import torch_rsst
from torch_rsst import apply_mask, compact, extract_mask, find_groups, reconstruct, regroup
from torch_rsst.groups.groups import GroupLayer, Groups, Member
from torch_rsst.testing import models_with_groups


def error(model: nn.Module, target: Tensor, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(inputs) - target).double().square().sum())


def cut(model: nn.Module, groups: Any, mask: Any, batches: Any, **kwargs: Any) -> nn.Module:
    made = copy.deepcopy(model)
    if kwargs.pop("plain", False):
        apply_mask(made, mask)
    else:
        reconstruct(made, groups, mask, batches=batches, **kwargs)
    return made


def lstsq_error(a: Tensor, target: Tensor, constant: bool) -> float:
    if constant:
        a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], 1)
    solution = torch.linalg.lstsq(a, target, driver="gelsd").solution
    return float((a @ solution - target).square().sum())


# Against direct least squares


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_against_lstsq(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3, bias=bias)).double()
    groups, batches = find_groups(model), [tokens(i, 20, 6).double() for i in range(3)]
    mask, x = regroup(model, groups, amount=0.5), torch.cat(batches)
    target = model(x).detach()
    made = cut(model, groups, mask, batches, damping=0.0)
    hidden = model[:2](x).detach()[:, mask["2.weight"].any(0)]
    expected = lstsq_error(hidden, target, bias)
    assert error(made, target, x) == pytest.approx(expected)
    assert expected < 0.9 * error(cut(model, groups, mask, batches, plain=True), target, x)
    assert all(torch.equal(extract_mask(made)[k], m) for k, m in mask.items())


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_against_lstsq_over_its_windows(bias):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), conv(4, 8), nn.ReLU(), conv(8, 5, bias=bias)
    )
    model = model.double()
    groups = find_groups(model, ["channels"], on_unsupported="ignore")
    layer = next(layer for layer in groups.layers if layer.name == "2")
    mask, x = regroup(model, [layer], amount=0.5), images()
    target = model(x).detach()
    made = cut(model, [layer], mask, [x], damping=0.0)
    kept = mask["4.weight"].flatten(1).any(0).view(8, 9)[:, 0]
    windows = F.unfold(model[:4](x).detach()[:, kept], 3, padding=1).mT.flatten(0, 1)
    expected = lstsq_error(windows, target.movedim(1, -1).reshape(-1, 5), bias)
    assert error(made, target, x) == pytest.approx(expected)
    assert expected < 0.9 * error(cut(model, [layer], mask, [x], plain=True), target, x)


def test_the_mean_alone_restores_the_mean_of_the_outputs():
    model, batches = mlp().double(), [tokens(i, 20, 4).double() for i in range(2)]
    groups, x = find_groups(model), torch.cat(batches)
    mask = regroup(model, groups, amount=0.5)
    made = cut(model, groups, mask, batches, method="mean")
    torch.testing.assert_close(made(x).mean(0), model(x).mean(0))
    assert torch.equal(made[2].weight_orig, model[2].weight)
    assert torch.equal(made[0].bias_orig, model[0].bias)
    plain = error(cut(model, groups, mask, batches, plain=True), model(x), x)
    assert error(cut(model, groups, mask, batches), model(x), x) < error(made, model(x), x) < plain


def test_more_damping_keeps_weights_nearer():
    model, batches = mlp().double(), [tokens(0, 20, 4).double()]
    groups = find_groups(model)
    mask = regroup(model, groups, amount=0.5)
    weight = model[2].weight.detach()
    moved = [
        float(
            (cut(model, groups, mask, batches, damping=d)[2].weight_orig.detach() - weight).norm()
        )
        for d in (0.0, 1e-2, 1.0, 100.0)
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.1 * moved[0]


# Properties


@given(
    drawn=models_with_groups(),
    amount=st.floats(0, 1),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    method=st.sampled_from(["least_squares", "mean"]),
)
@settings(max_examples=25)
def test_the_error_on_the_batches_never_grows(drawn, amount, sizes, method):
    """Of the outputs of a model's last MLP, whose consumer is the model's last layer."""
    model, groups = drawn
    last = Groups(groups.layers[-1:])
    mask = regroup(model, last, amount=amount, min_keep=0)
    batches = [tokens(i, n, model[0].in_features) for i, n in enumerate(sizes)]
    x = torch.cat(batches)
    with torch.no_grad():
        target = model(x)
    made = cut(model, last, mask, batches, method=method)
    plain = error(cut(model, last, mask, batches, plain=True), target, x)
    assert error(made, target, x) <= plain * (1 + 1e-4) + 1e-9
    assert all(torch.equal(extract_mask(made)[k], m) for k, m in mask.items())


@given(drawn=models_with_groups(), method=st.sampled_from(["least_squares", "mean"]))
@settings(max_examples=15)
def test_nothing_going_changes_nothing(drawn, method):
    model, groups = drawn
    groups = Groups(groups.layers[1:])
    mask = {**regroup(model, groups, amount=0), **extract_mask(model)}

    def batches() -> list[Tensor]:
        raise AssertionError("drawn")

    made = cut(model, groups, mask, batches, method=method)
    expected = cut(model, groups, mask, batches, plain=True)
    for (name, a), (other, b) in zip(
        made.state_dict().items(), expected.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)


def test_layers_whose_units_stay_keep_their_weights(tiny_transformer):
    model = tiny_transformer()
    groups, batches = find_groups(model), [tokens(0, 4, 5, 16)]
    heads = Groups(groups.layers[:1])
    made = cut(model, groups, regroup(model, heads, amount=0.5), batches)
    before = torch_rsst.masking.names.named_weights(model)
    after = torch_rsst.masking.names.named_weights(made)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"blocks.0.attn.proj.weight", "blocks.0.attn.proj.bias"}


def test_later_consumers_make_up_for_earlier_ones(tiny_transformer):
    torch.manual_seed(0)
    model = tiny_transformer().double().eval()
    groups, x = find_groups(model), tokens(0, 30, 5, 16).double()
    mask = regroup(model, groups, amount=0.5, importance="variance", batches=[x])
    target = model(x).detach()
    by_method = [
        error(cut(model, groups, mask, [x], **how), target, x)
        for how in ({"plain": True}, {"method": "mean"}, {"method": "least_squares"})
    ]
    assert by_method[2] < by_method[1] < by_method[0]


def test_a_compacted_model_has_the_same_outputs():
    model, x = mlp().double(), tokens(0, 20, 4).double()
    groups = find_groups(model)
    made = cut(model, groups, regroup(model, groups, amount=0.5), [x])
    small = compact(made, groups)
    assert small[2].in_features == 4
    torch.testing.assert_close(small(x), made(x))


# Kinds of layers


@pytest.mark.parametrize("name", list(NETS))
def test_channels_of_all_kinds_of_nets(name):
    torch.manual_seed(0)
    net = behind_stem(NETS[name]()).double().train()
    for i in range(5):
        net(images() + i)  # batch norms get statistics
    net.eval()
    groups = find_groups(net, ["channels"], on_unsupported="ignore")
    for layer in groups.layers:
        mask, x = regroup(net, [layer], amount=0.5), images()
        target = net(x).detach()
        plain = error(cut(net, [layer], mask, [x], plain=True), target, x)
        made = cut(net, [layer], mask, [x])
        if len([m for m in layer.members if m.consumes]) == 1:
            outputs = [error(cut(net, [layer], mask, [x], method="mean"), target, x), plain]
            assert error(made, target, x) <= min(outputs) * 1.5  # behind activations, no promise
        assert {k for k, _ in made.named_parameters() if not k.endswith("_orig")} <= {
            k for k, _ in net.named_parameters()
        }


def test_a_grouped_convolution_whose_input_channels_go():
    """Groups made by hand: channel 0 or 1 of each of its four groups."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), conv(8, 12, groups=4)).double()
    unit = torch.arange(8) % 2
    members = (
        Member("0.weight", 0, unit, True),
        Member("0.bias", 0, unit, False),
        Member("2.weight", 1, torch.arange(2), True, consumes=True),
    )
    layer, x = GroupLayer("", "channels", 2, members), images()
    mask, target = regroup(model, [layer], amount=1), model(x).detach()
    made = cut(model, [layer], mask, [x], damping=0.0)
    kept = mask["2.weight"][0, :, 0, 0]
    windows = F.unfold(model[:2](x).detach(), 3, padding=1).mT.unflatten(2, (4, 2, 9))
    windows = windows[..., kept, :].flatten(3).flatten(0, 1)
    wanted = target.movedim(1, -1).reshape(-1, 4, 3)
    expected = sum(lstsq_error(windows[:, g], wanted[:, g], True) for g in range(4))
    assert error(made, target, x) == pytest.approx(expected)


def test_a_constant_goes_to_the_batch_norm_behind():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), conv(8, 5, bias=False), nn.BatchNorm2d(5)
    ).double()
    for i in range(9):
        model(images() + i)
    model.eval()
    unit = torch.arange(8)
    members = (
        Member("0.weight", 0, unit, True),
        Member("2.weight", 1, unit, True, consumes=True),
    )
    layer, x = GroupLayer("", "channels", 8, members), images()
    mask, target = regroup(model, [layer], amount=0.5), model[:3](x).detach()
    made = cut(model, [layer], mask, [x], damping=0.0)
    shift = model[3].running_mean - made[3].running_mean
    with torch.no_grad():
        outputs = made[:3](x) + shift.view(-1, 1, 1)
    kept = mask["2.weight"][0, :, 0, 0]
    windows = F.unfold(made[:2](x).detach()[:, kept], 3, padding=1).mT.flatten(0, 1)
    expected = lstsq_error(windows, target.movedim(1, -1).reshape(-1, 5), True)
    assert float((outputs - target).square().sum()) == pytest.approx(expected)
    assert torch.equal(model[3].running_var, made[3].running_var)


def test_a_batch_norm_that_is_not_all_the_outputs_go_to_stays():
    def run(net: Any, x: Tensor) -> Tensor:
        hidden = net.inner(net.first(x).relu())
        return net.norm(hidden) + hidden

    torch.manual_seed(0)
    model = Net(run, first=nn.Conv2d(3, 8, 1), inner=conv(8, 5, bias=False), norm=nn.BatchNorm2d(5))
    model = model.double().eval()
    unit = torch.arange(8)
    members = (
        Member("first.weight", 0, unit, True),
        Member("inner.weight", 1, unit, True, consumes=True),
    )
    layer = GroupLayer("", "channels", 8, members)
    made = cut(model, [layer], regroup(model, [layer], amount=0.5), [images()])
    assert torch.equal(made.norm.running_mean, model.norm.running_mean)
    assert not torch.equal(made.inner.weight, model.inner.weight)


def test_attention_that_passes_its_output_weight_to_a_function():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 10, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double().eval()
    x = tokens(0, 20, 4, 12).double()
    groups = find_groups(model, example_inputs=x)
    mask, target = regroup(model, groups, amount=0.5), model(x).detach()
    plain = error(cut(model, groups, mask, [x], plain=True), target, x)
    made = cut(model, groups, mask, [x])
    assert error(made, target, x) < 0.8 * plain
    assert not torch.equal(
        made.layers[0].self_attn.out_proj.bias, model.layers[0].self_attn.out_proj.bias
    )


@pytest.mark.needs_timm
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_grouped_queries_gated_mlps_and_transposed_weights(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=17,
        )  # fmt: skip
        model = transformers.LlamaModel(config)
    else:
        config = transformers.GPT2Config(
            n_embd=16, n_head=4, n_layer=2, n_inner=24, vocab_size=17, n_positions=16
        )
        model = transformers.GPT2Model(config)
    model = model.double().eval()
    ids = torch.randint(17, (40, 8), generator=torch.Generator().manual_seed(0))
    groups = find_groups(model)
    assert {layer.kind for layer in groups.layers} == {"heads", "neurons"}

    def run(m: nn.Module, b: Tensor) -> Tensor:
        return m(input_ids=b)[0]

    mask, target = regroup(model, groups, amount=0.5), run(model, ids).detach()

    def error_of(made: nn.Module) -> float:
        return float((run(made.eval(), ids).detach() - target).square().sum())

    plain = error_of(cut(model, groups, mask, [ids], plain=True))
    assert error_of(cut(model, groups, mask, [ids], forward=run)) < 0.8 * plain


def test_tied_weights_are_fitted_at_all_their_places():
    torch.manual_seed(0)
    model = nn.Sequential(mlp(4, 6), nn.Linear(2, 4), mlp(4, 6)).double()
    model[2][0].weight, model[2][2].weight = model[0][0].weight, model[0][2].weight
    layer = find_groups(model[0]).layers[0]
    members = tuple(
        Member(f"0.{m.parameter}", m.dim, m.unit_of, m.ranked, m.consumes) for m in layer.members
    )
    groups, x = Groups((GroupLayer("0", "neurons", 6, members),)), tokens(0, 30, 4).double()
    mask = regroup(model, groups, amount=0.5)
    made = cut(model, groups, mask, [x], damping=0.0)
    assert made[0][2].weight_orig is made[2][2].weight_orig
    assert torch.equal(made[0][2].bias, model[0][2].bias)  # its biases are two: no constant
    kept = mask["0.2.weight"].any(0)
    plain = cut(model, groups, mask, [x], plain=True)
    first = model[0][:2](x), model[0](x) - model[0][2].bias
    second = model[2][:2](model[:2](x)), model(x) - model[2][2].bias
    # The inputs of the second place depend on the first: compare with the inputs before the refit.
    seen: list[Tensor] = []
    plain[2][2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    plain(x)
    rows = torch.cat([first[0][:, kept], seen[0][:, kept]]).detach()
    wanted = torch.cat([first[1], second[1]]).detach()
    solution = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(made[0][2].weight_orig[:, kept], solution)


def test_weights_masked_within_kept_units_stay_masked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3)).double()
    groups, x = find_groups(model), tokens(0, 60, 6).double()
    mask = regroup(model, groups, amount=0.4)
    mask["2.weight"] &= torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) < 0.7
    target, made = model(x).detach(), cut(model, groups, mask, [x], damping=0.0)
    latent = ~mask["2.weight"]
    assert torch.equal(made[2].weight_orig[latent], model[2].weight[latent])
    hidden = model[:2](x).detach()
    expected = sum(
        lstsq_error(hidden[:, mask["2.weight"][row]], target[:, row : row + 1], True)
        for row in range(3)
    )
    assert error(made, target, x) == pytest.approx(expected)


def test_all_units_of_a_layer_can_go():
    model, x = mlp().double(), tokens(0, 20, 4).double()
    groups = find_groups(model)
    mask = regroup(model, groups, amount=8, min_keep=0)
    made = cut(model, groups, mask, [x])
    torch.testing.assert_close(made(x), model(x).mean(0).expand(20, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_16_bits(dtype):
    model, x = mlp().to(dtype), tokens(0, 60, 4).to(dtype)
    groups = find_groups(mlp())
    mask = regroup(model, groups, amount=0.5)
    made = cut(model, groups, mask, [x])
    assert made[2].weight_orig.dtype == dtype
    target = model(x).detach()
    assert error(made, target, x) < error(cut(model, groups, mask, [x], plain=True), target, x)


def test_autocast():
    model, x = mlp(), tokens(0, 60, 4)
    groups = find_groups(model)
    mask = regroup(model, groups, amount=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        made = cut(model, groups, mask, [x])
    target = model(x).detach()
    assert error(made, target, x) < error(cut(model, groups, mask, [x], plain=True), target, x)


def test_models_that_stock_pruning_has_masked():
    model, x = mlp(), tokens(0, 60, 4)
    groups = find_groups(model)
    stock.l1_unstructured(model[2], "weight", 0.2)
    target = model(x).detach()
    mask = regroup(model, groups, amount=0.5)
    reconstruct(model, groups, mask, batches=[x])
    other = mlp()
    stock.l1_unstructured(other[2], "weight", 0.2)
    apply_mask(other, mask)
    assert error(model, target, x) < error(other, target, x)


def test_a_forward_with_random_numbers_draws_the_same_for_both_models():
    model, x = mlp().double(), tokens(0, 60, 4).double()
    groups = find_groups(model)
    mask = regroup(model, groups, amount=0.5)
    seen: list[Tensor] = []

    def forward(m: nn.Module, b: Tensor) -> Tensor:
        seen.append(torch.randn(b.shape, dtype=b.dtype))
        return m(b + seen[-1])

    before = torch.get_rng_state()
    cut(model, groups, mask, [x], forward=forward)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(seen) == 3  # the survey, the model, the masked model
    assert torch.equal(seen[1], seen[2])


# What is refused, and that nothing has changed then


class Scaled(nn.Linear):
    """Computes with another weight than its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 1.02 * self.weight, self.bias)


def strange(kind: str) -> nn.Module:
    model = mlp()
    if kind == "scaled":
        layer = Scaled(8, 2)
        layer.load_state_dict(model[2].state_dict())
        model[2] = layer
    return model


GOOD = [tokens(0, 5, 4)]


@pytest.mark.parametrize(
    ("error_type", "text", "arguments"),
    [
        (ValueError, "method: expected one of 'least_squares', 'mean', got 'means'. Did you mean 'mean'?", {"method": "means"}),
        (ValueError, "damping: expected a number >= 0, got -1. Pass a finite number of at least 0.", {"damping": -1}),
        (ValueError, "damping: expected a number >= 0, got nan.", {"damping": float("nan")}),
        (TypeError, "damping: expected a number >= 0, got str '1'.", {"damping": "1"}),
        (ValueError, "batches: expected batches to run on, for reconstruct, got none. Pass a DataLoader", {"batches": None}),
        (TypeError, "batches: expected an iterable of batches, got one Tensor. For a single batch, pass [batch].", {"batches": GOOD[0]}),
        (TypeError, "forward: expected a function, got int.", {"forward": 3}),
        (ValueError, "batches: expected at least one, got none. Pass a list", {"batches": []}),
        (ValueError, "batches: expected at least one sample, got none.", {"batches": [GOOD[0][:0], GOOD[0][:0]]}),
        (ValueError, "reconstruct: inputs of '2.weight': expected finite numbers, got NaN or infinity.", {"batches": [GOOD[0] * float("nan")]}),
        (ValueError, "reconstruct: '2.weight': expected a layer that runs, got one that did not run on the first batch.", {"forward": lambda m, b: m[0](b)}),
        (ValueError, "reconstruct: '2.weight': expected the weight of a linear layer or a convolution, got that of a Scaled, which computes something else. Leave out the groups", {"kind": "scaled"}),
        (RuntimeError, "mat1 and mat2", {"batches": [GOOD[0], tokens(0, 5, 3)]}),
    ],
)  # fmt: skip
def test_what_is_refused_leaves_the_model_as_it_was(error_type, text, arguments, fingerprint):
    model = strange(arguments.pop("kind", ""))
    groups = find_groups(mlp())
    mask, before = regroup(model, groups, amount=0.5), fingerprint(model)
    with pytest.raises(error_type) as caught:
        reconstruct(model, groups, mask, **{"batches": GOOD, **arguments})
    assert text in str(caught.value)
    assert fingerprint(model) == before


def test_masks_and_groups_of_other_models():
    model, groups = mlp(), find_groups(mlp())
    with pytest.raises(KeyError, match="mask 'x': expected a parameter of the model"):
        reconstruct(model, groups, {"x": torch.ones(1)}, batches=GOOD)
    with pytest.raises(ValueError, match="Find the groups of this very model"):
        reconstruct(model, find_groups(mlp(4, 9)), {}, batches=GOOD)


def test_layers_that_receive_other_samples_once_units_are_masked():
    class Routed(nn.Module):
        """Which samples the second layer gets depends on the first."""

        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.mlp[:2](x)
            return self.mlp[2](hidden[hidden.abs().sum(1) > hidden.abs().sum(1)[0]])

    model = Routed()
    groups, x = find_groups(mlp()), tokens(3, 40, 4)
    members = tuple(
        Member(f"mlp.{m.parameter}", m.dim, m.unit_of, m.ranked, m.consumes)
        for m in groups.layers[0].members
    )
    layer = GroupLayer("mlp", "neurons", 8, members)
    mask = regroup(model, [layer], amount=0.5)
    text = (
        "inputs of 'mlp.2.weight': expected the same number of positions before and after the cut"
    )
    with pytest.raises(ValueError, match=text):
        reconstruct(model, [layer], mask, batches=[x])


class Stop(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupt_leaves_everything_as_it_was(after, fingerprint):
    model = mlp()
    groups = find_groups(model)
    apply_mask(model, {"0.weight": torch.rand(8, 4) < 0.8})
    mask, before = regroup(model, groups, amount=0.5), fingerprint(model)
    calls = []

    def forward(m: nn.Module, b: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == after:
            raise Stop
        return m(b)

    with pytest.raises(Stop):
        reconstruct(model, groups, mask, batches=GOOD, forward=forward)
    assert fingerprint(model) == before


def test_modes_hooks_and_gradients_stay():
    model, x = mlp().train(), tokens(0, 20, 4)
    groups = find_groups(model)
    model(x).sum().backward()
    gradient = model[2].bias.grad.clone()
    weight = model[2].weight
    reconstruct(model, groups, regroup(model, groups, amount=0.5), batches=[x])
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(model[2].bias.grad, gradient)
    assert model[2].weight_orig is weight
    assert weight.requires_grad


# Ranks


def replicated(rank: int) -> Any:
    model = DistributedDataParallel(mlp().double())
    groups = find_groups(model.module)
    mask = regroup(model, groups, amount=0.5)

    def batches() -> Any:
        for number in range(1 + rank):  # ranks may have different numbers of them
            yield tokens(10 * rank + number, 5, 4).double()

    def failing() -> Any:
        yield tokens(0, 5, 4).double()
        if rank == 1:
            raise ValueError("no such file")

    try:
        reconstruct(model, groups, mask, batches=failing)
        failure = "none"
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    untouched = not extract_mask(model)
    reconstruct(model, groups, mask, batches=batches)
    weights = {k: v.tolist() for k, v in model.module.state_dict().items()}
    return weights, failure, untouched


def test_ranks_add_up_their_batches_and_all_raise_where_one_fails():
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    first, second = on_ranks(2, replicated)
    assert first[0] == second[0]
    assert first[2]
    assert second[2]
    assert second[1] == "ValueError: no such file"
    assert "an error on rank(s) [1]: ValueError: no such file" in first[1]
    model, groups = mlp().double(), find_groups(mlp())
    batches = [tokens(n, 5, 4).double() for n in (0, 10, 11)]
    reconstruct(model, groups, regroup(model, groups, amount=0.5), batches=batches)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(torch.tensor(first[0][name]).to(value), value)


def test_batches_are_drawn_once_and_seen_by_every_consumer():
    x, drawn = tokens(0, 60, 4).double(), []

    def batches() -> Iterator[Tensor]:
        drawn.append(True)
        yield from x.split(20)

    def deep() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(mlp(), nn.Linear(2, 4), mlp()).double()

    groups = find_groups(deep())
    mask = regroup(deep(), groups, amount=0.5)
    assert len(groups.layers) > 1
    listed, streamed, single = (
        cut(deep(), groups, mask, each) for each in (list(x.split(20)), batches, [x])
    )
    assert drawn == [True]
    for a, b, c in zip(*(m.parameters() for m in (listed, streamed, single)), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


class Remembers(nn.Module):
    """Adds the mean of what it got in its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        last, self.last = self.last, x.mean()
        return x + last


def test_both_models_remember_the_same_earlier_batches():
    """A model that is itself again after the refit, with the same sums as one that is reset by hand."""
    x = tokens(0, 60, 4).double()

    def deep(first: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(first, mlp(), nn.Linear(2, 4), mlp()).double()

    model, batches = deep(Remembers()), list(x.split(20))
    # What the first module gives for these batches, one after the other.
    shifted = [b + (batches[i - 1].mean() if i else 0.0) for i, b in enumerate(batches)]
    plain = deep(nn.Identity())
    groups = find_groups(plain)
    mask = regroup(plain, groups, amount=0.5)
    found, wanted = cut(model, groups, mask, batches), cut(plain, groups, mask, shifted)
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert float(model[0].last) == 0.0


class CopiesItself(nn.Linear):
    """Its copy is made by hand, without a word to copy.deepcopy of the tensors in it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItself:
        made = CopiesItself(self.in_features, self.out_features)
        made.load_state_dict(self.state_dict())
        return made


def test_a_layer_that_copies_itself_is_refitted_as_any_other() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(20, 6)]
    first, last = nn.Linear(6, 12), nn.Linear(12, 3)
    own = CopiesItself(12, 3)
    own.load_state_dict(last.state_dict())
    refitted = []
    for consumer in (last, own):
        model = nn.Sequential(copy.deepcopy(first), nn.GELU(), consumer).eval()
        groups = torch_rsst.find_groups(model)
        refill = torch_rsst.regroup(model, groups, amount=0.5)
        torch_rsst.reconstruct(model, groups, refill, batches=batches)
        refitted.append(model[2].weight.detach())
    assert torch.equal(*refitted)


def test_inference_mode_does_not_keep_a_model_from_being_refitted() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(20, 6)]
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3)).eval()
    twin = copy.deepcopy(model)
    for each, inference in ((model, True), (twin, False)):
        groups = torch_rsst.find_groups(each)
        refill = torch_rsst.regroup(each, groups, amount=0.5)
        with torch.inference_mode(inference):
            torch_rsst.reconstruct(each, groups, refill, batches=batches)
    assert torch.equal(model[2].weight, twin[2].weight)
    model(batches[0]).sum().backward()  # and it trains as before
    assert model[2].weight_orig.grad is not None
