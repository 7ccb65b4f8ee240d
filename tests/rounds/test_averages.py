"""Averages of a model's weights, made before pruning: alike in masks, penalty and cut."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import gradient_step, mlp, same, tokens
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_rsst
from torch_rsst import RSST, Refill, RegularizedPruner, extract_mask, find_groups
from torch_rsst.masking.names import named_weights
from torch_rsst.rounds.optimizer_rewind import OptimizerRewind

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(optimizer steps|penalty did not act):torch_rsst.utils.errors.RSSTWarning"
)
STEPS = 6


def torch_average(model, *, use_buffers=False):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=use_buffers)


def rounds_following(model, averages, method=RSST, **settings):
    coupled = settings.get("mode") == "coupled"
    kind, rate = (torch.optim.SGD, 0.5) if coupled else (torch.optim.AdamW, 0.01)
    optimizer = kind(model.parameters(), lr=rate)
    rounds = method(
        model, find_groups(model), optimizer=optimizer, steps_per_round=STEPS, rounds=2,
        regroup_amount=0.5, follow=averages, **settings,
    )  # fmt: skip
    return rounds, optimizer


def train(rounds, model, optimizer, update=lambda: None):
    for rnd in rounds:
        for step in range(rnd.start_step, STEPS):
            gradient_step(model, optimizer, 10 * rnd.index + step)
            update()


@pytest.mark.parametrize("method", [RSST, Refill])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_made_before_pruning_ends_with_the_model_s_masks(method, use_buffers):
    model = mlp()
    average = torch_average(model, use_buffers=use_buffers)
    rounds, optimizer = rounds_following(model, [average], method)
    train(rounds, model, optimizer, lambda: average.update_parameters(model))
    rounds.finalize()
    masks, followed = extract_mask(model), extract_mask(average.module)
    assert masks.keys() == followed.keys()
    assert all(same(masks[name], followed[name]) for name in masks)
    small = torch_rsst.compact(average.module, find_groups(mlp()))
    assert small[0].out_features == 4
    torch.testing.assert_close(small(tokens(0, 3, 4)), average(tokens(0, 3, 4)))


@pytest.mark.parametrize(
    "settings", [{}, {"strength": 1.5, "mode": "coupled", "schedule": "linear"}]
)
def test_what_goes_is_as_small_in_the_average_as_in_the_model_when_it_is_cut(settings):
    """By itself an average at 0.999 would still hold most of it."""
    model = mlp()
    average, alone = torch_average(model), torch_average(model)
    rounds, optimizer = rounds_following(model, [average], **settings)
    rnd = next(rounds)
    gone = {name: ~mask for name, mask in rnd.refill_mask.items()}
    torch_rsst.follow(model, [alone])

    def norm(of):
        weights = named_weights(of)
        return sum(float(weights[n][mask].square().sum()) for n, mask in gone.items()) ** 0.5

    before = norm(average.module)
    for step in range(STEPS):
        gradient_step(model, optimizer, step)
        average.update_parameters(model)
        alone.update_parameters(model)
    assert norm(alone.module) > 0.8 * before  # its first update copies the model
    assert norm(average.module) == pytest.approx(norm(model), rel=0.1)
    assert norm(average.module) < 0.15 * before
    one, other = named_weights(average.module), named_weights(alone.module)
    assert all(same(one[name][mask], other[name][mask]) for name, mask in rnd.refill_mask.items())
    rnd.pruner.detach()


@given(stop=st.integers(0, 2 * STEPS - 1))
def test_resuming_gives_an_average_its_masks_again(stop):
    model, again = mlp(), mlp()
    averages = [torch_average(each) for each in (model, again)]
    rounds, optimizer = rounds_following(model, averages[:1])
    for rnd in rounds:
        for step in range(STEPS):
            if rnd.index * STEPS + step == stop:
                break
            gradient_step(model, optimizer, step)
            averages[0].update_parameters(model)
        if rnd.index * STEPS + step == stop:
            break
    file = io.BytesIO()
    torch.save([rounds.state_dict(), model.state_dict(), averages[0].state_dict()], file)
    file.seek(0)
    state, weights, averaged = torch.load(file, weights_only=True)
    resumed, _ = rounds_following(again, averages[1:])
    resumed.load_state_dict(state)
    again.load_state_dict(weights)
    averages[1].load_state_dict(averaged)  # strict: every mask has its place
    for one, other in zip(
        averages[0].state_dict().values(), averages[1].state_dict().values(), strict=True
    ):
        assert same(one, other)
    for each in (rounds, resumed):
        each.round.pruner.detach()


def test_rewinding_puts_the_same_weights_into_the_average():
    model = mlp()
    initial = {name: w.clone() for name, w in named_weights(model).items()}
    average = torch_average(model)
    rounds, optimizer = rounds_following(model, [average], Refill, rewind="init")
    rnd = next(rounds)
    gradient_step(model, optimizer, 0)
    average.update_parameters(model)
    rnd = next(rounds)
    for name, mask in rnd.refill_mask.items():
        assert same(named_weights(average.module)[name][mask], initial[name][mask])
    rnd.pruner.detach()


def test_reconstruction_refits_the_average_too():
    model = mlp()
    average = torch_average(model)
    data = [tokens(1, 64, 4)]
    rounds, _ = rounds_following(
        model, [average], Refill, reconstruct="least_squares", batches=data
    )
    twin = copy.deepcopy(average.module)
    rnd = next(rounds)
    torch_rsst.reconstruct(twin, find_groups(mlp()), rnd.refill_mask, batches=data)
    torch.testing.assert_close(average.module(data[0]), twin(data[0]))
    rnd.pruner.detach()


@pytest.mark.needs_timm
@pytest.mark.parametrize("name", ["ModelEmaV2", "ModelEmaV3"])
def test_averages_of_timm_follow(name):
    import timm.utils

    model = mlp()
    average = getattr(timm.utils, name)(model, decay=0.9)
    rounds, optimizer = rounds_following(model, [average])
    train(rounds, model, optimizer, lambda: average.update(model))
    rounds.finalize()
    masks, followed = extract_mask(model), extract_mask(average.module)
    assert all(same(masks[name], followed[name]) for name in masks)


def test_masks_without_rounds_are_followed():
    model = mlp()
    average = torch_average(model)
    torch_rsst.l1_unstructured(model[0], "weight", amount=0.5)
    torch_rsst.follow(model, [average])
    average.update_parameters(model)
    assert same(average.module[0].weight_mask, model[0].weight_mask)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda model: [model], ValueError, "follow: expected a module with the model's parameters, "
         "got the model itself"),
        (lambda model: [mlp(hidden=3)], ValueError, "got Sequential with others. Pass an average of this"),
        (lambda model: [nn.Linear(1, 1)], ValueError, "only in one"),
        (lambda model: [{}], TypeError, "follow: expected modules, got dict"),
        (lambda model: torch_average(model), TypeError, "expected a list of modules, got AveragedModel"),
    ],
)  # fmt: skip
def test_what_is_no_average_of_the_model_is_refused_before_anything(make, error, text):
    model = mlp()
    with pytest.raises(error, match=text):
        rounds_following(model, make(model))
    assert not extract_mask(model)


def test_followers_are_put_back_where_the_model_cannot_be_masked(monkeypatch, fingerprint):
    from torch_rsst.rounds import engine

    model = mlp()
    average = torch_average(model)
    rounds, _ = rounds_following(model, [average], Refill)
    before, real = fingerprint(average.module), engine.apply_mask

    def failing(module, masks):
        if module is model:
            raise KeyboardInterrupt
        real(module, masks)

    monkeypatch.setattr(engine, "apply_mask", failing)
    with pytest.raises(KeyboardInterrupt):
        next(rounds)
    assert fingerprint(average.module) == before


def test_following_by_hand_is_all_or_nothing(fingerprint):
    model = mlp()
    good, bad = torch_average(model), torch_average(model)
    torch_rsst.l1_unstructured(model[0], "weight", amount=0.5)
    bad.module[0].register_buffer("weight_mask", torch.ones(1))
    before = fingerprint(good)
    with pytest.raises(ValueError, match="weight_mask"):
        torch_rsst.follow(model, [good, bad])
    assert fingerprint(good) == before


def test_an_average_that_is_given_twice_is_shrunk_once():
    model = mlp()
    average = torch_average(model)
    rounds, optimizer = rounds_following(model, [average, average.module])
    rnd = next(rounds)
    gradient_step(model, optimizer, 0)
    name, goes = next((n, ~mask) for n, mask in rnd.refill_mask.items())
    factor = 1 - rnd.pruner._strength_of(1)
    before = named_weights(mlp())[name][goes]
    torch.testing.assert_close(named_weights(average.module)[name][goes], factor * before)
    rnd.pruner.detach()


@pytest.mark.parametrize("given", [5, None, 0.5, "average", torch.tensor(2), mlp()])
def test_what_lists_no_averages_is_refused(given, fingerprint):
    model = mlp()
    torch_rsst.l1_unstructured(model[0], "weight", amount=0.5)
    before = fingerprint(model)
    text = rf"follow: expected a list of modules, got {type(given).__name__}\. Pass a list: follow="
    with pytest.raises(TypeError, match=text):
        torch_rsst.follow(model, given)
    with pytest.raises(TypeError, match=text):
        RSST(model, find_groups(model), steps_per_round=1, follow=given)
    assert fingerprint(model) == before


def test_an_average_that_shares_parameters_with_the_model_is_refused():
    model = mlp()
    other = copy.deepcopy(model)
    other[0].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'0\.weight' of the model itself"):
        rounds_following(model, [other])


class Caching(nn.Module):
    """Keeps a buffer whose shape is that of the batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(3))

    def forward(self, x):
        self.cache = torch.ones(len(x))
        return x


def test_rewinding_gives_a_cache_its_former_shape():
    model = nn.Sequential(*mlp(), Caching())
    average = torch_average(model)
    del average.module[3]._buffers["cache"]
    optimizer = torch.optim.AdamW(model.parameters())
    rounds = Refill(
        model, find_groups(mlp()), optimizer=optimizer, steps_per_round=1, rounds=2,
        regroup_amount=0.5, rewind="init", follow=[average],
    )  # fmt: skip
    model(tokens(0, 7, 4))
    next(rounds)
    assert model[3].cache.tolist() == [0.0] * 3
    rounds.round.pruner.detach()


class WithOddBuffers(nn.Sequential):
    """Buffers that cannot be written to in place."""

    def __init__(self) -> None:
        super().__init__(*mlp())
        self.register_buffer("expanded", torch.zeros(1).expand(4))
        with torch.inference_mode():
            self.register_buffer("inferred", torch.ones(2))


@pytest.mark.parametrize("method", [RSST, Refill])
def test_rewinding_replaces_buffers_that_cannot_be_written_to(method):
    model = WithOddBuffers()
    average, before = torch_average(model), model[2].bias.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rounds = method(
        model, find_groups(model), optimizer=optimizer, steps_per_round=1, rounds=1, rewind="init",
        follow=[average],
    )  # fmt: skip
    gradient_step(model, optimizer, 0)
    model.expanded, model.inferred = torch.ones(1).expand(4), torch.zeros(2)
    rnd = next(rounds)
    assert torch.equal(model[2].bias, before)
    assert model.expanded.tolist() == [0.0] * 4
    assert model.inferred.tolist() == [1.0] * 2
    rnd.pruner.detach()


@pytest.mark.parametrize("method", [RSST, Refill])
def test_a_rewind_that_fails_leaves_model_averages_and_optimizer_as_they_were(
    method, fingerprint, monkeypatch
):
    model = mlp()
    average = torch_average(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rounds = method(
        model, find_groups(model), optimizer=optimizer, steps_per_round=1, rounds=1, rewind="init",
        follow=[average],
    )  # fmt: skip
    gradient_step(model, optimizer, 0)
    before = fingerprint(model), fingerprint(average), dict(optimizer.state)

    def fails(self, model, optimizers):
        original(self, model, optimizers)
        raise MemoryError("no more")

    original = OptimizerRewind.apply
    monkeypatch.setattr(OptimizerRewind, "apply", fails)
    with pytest.raises(MemoryError):
        next(rounds)
    assert (fingerprint(model), fingerprint(average), dict(optimizer.state)) == before
    assert rounds.round is None
    monkeypatch.undo()
    next(rounds).pruner.detach()


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("index", None, "index of type int, got None"),
        ("open", 1, "open of type bool, got 1"),
        ("next_index", "x", "next_index of type int, got 'x'"),
        ("finalized", torch.ones(2), "finalized of type bool, got tensor"),
        ("settings", {"rounds": torch.ones(2)}, "got .*rounds=tensor"),
    ],
)
def test_a_state_with_a_value_of_another_kind_leaves_the_open_round(key, value, text, fingerprint):
    model = mlp()
    rounds, _ = rounds_following(model, [])
    rnd = next(rounds)
    state = rounds.state_dict()
    bad = {**state, "round": {**state["round"], key: value}} if key in state["round"] else {**state, key: value}  # fmt: skip
    before = fingerprint(model)
    with pytest.raises(ValueError, match=text):
        rounds.load_state_dict(bad)
    assert fingerprint(model) == before
    assert rounds.round is rnd
    assert RegularizedPruner.attached_to(model) is rnd.pruner
    rnd.pruner.detach()


def test_an_average_that_cannot_be_masked_leaves_the_open_round_with_its_penalty(monkeypatch):
    model = mlp()
    average = torch_average(model)
    rounds, optimizer = rounds_following(model, [average])
    rnd = next(rounds)
    state, norm = rounds.state_dict(), rnd.pruner.penalized_norm()

    def fails(module, masks):
        raise MemoryError("no more")

    monkeypatch.setattr("torch_rsst.rounds.engine.apply_mask", fails)
    with pytest.raises(MemoryError):
        rounds.load_state_dict(state)
    monkeypatch.undo()
    assert rounds.round is rnd
    gradient_step(model, optimizer, 0)
    assert rnd.pruner.steps == 1
    assert rnd.pruner.penalized_norm() < norm
    rounds.load_state_dict(state)  # and the same state can be loaded afterwards
    rounds.round.pruner.detach()


def test_a_cut_that_fails_on_its_data_leaves_the_round_open():
    model = mlp()
    rounds, optimizer = rounds_following(model, [])
    rnd = next(rounds)
    with pytest.raises(ValueError, match="no more"):
        rounds.finalize(reconstruct="mean", batches=broken)
    assert rounds.round is rnd
    assert rnd.pruner.attached
    gradient_step(model, optimizer, 0)
    assert rnd.pruner.steps == 1
    rnd.pruner.detach()


def broken():
    yield tokens(0, 2, 4)
    raise ValueError("no more")


@pytest.mark.parametrize(
    "damage", [{"start_norm": "x"}, {"steps": "a"}, {"fell_below": "x"}, {"pending": {"a": None}}]
)
def test_a_damaged_state_leaves_the_open_round_and_the_averages(damage, fingerprint):
    model = mlp()
    average = torch_average(model)
    rounds, optimizer = rounds_following(model, [average])
    rnd = next(rounds)
    gradient_step(model, optimizer, 0)
    state = copy.deepcopy(rounds.state_dict())
    state["round"]["pruner"].update(damage)
    before = fingerprint(model), fingerprint(average)
    with pytest.raises(ValueError, match="The file is damaged"):
        rounds.load_state_dict(state)
    assert (fingerprint(model), fingerprint(average)) == before
    assert rounds.round is rnd
    assert rnd.pruner.attached
    rnd.pruner.detach()


def test_masks_that_the_model_has_no_more_are_made_permanent_in_its_averages():
    model = nn.Linear(3, 2)
    average = AveragedModel(model)
    torch_rsst.l1_unstructured(model, "weight", amount=0.5)
    torch_rsst.follow(model, [average])
    dead = model.weight_mask == 0
    torch_rsst.remove_all(model, freeze_zeros=True)
    torch_rsst.follow(model, [average])
    assert not torch_rsst.extract_mask(average)
    assert not average.module.weight[dead].any()
    average.update_parameters(model)
    assert torch.equal(average.module.weight, model.weight)


def normed():
    return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))


def bias_before_weight(model):
    torch_rsst.apply_mask(model, {"0.bias": torch.tensor([1, 0, 0, 0])})
    torch_rsst.apply_mask(model, {"0.weight": torch.tensor([0, 1, 1, 1])})


def by_stock_calls(model):
    torch_rsst.l1_unstructured(model[0], "bias", amount=3)
    torch_rsst.l1_unstructured(model[0], "weight", amount=1)


def by_pytorch_itself(model):
    prune.l1_unstructured(model[0], "bias", amount=3)
    prune.l1_unstructured(model[0], "weight", amount=1)


def twice(model):
    bias_before_weight(model)
    torch_rsst.remove(model[0], "weight", freeze_zeros=False)
    torch_rsst.l1_unstructured(model[0], "weight", amount=1)


@pytest.mark.parametrize("masked", [bias_before_weight, by_stock_calls, by_pytorch_itself, twice])
@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_an_average_has_the_model_s_masks_in_whatever_order_they_were_made(masked, kind):
    model = normed()
    ema = pytest.importorskip("timm.utils").ModelEmaV3 if kind == "timm" else torch_average
    average = ema(model) if kind == "timm" else ema(model, use_buffers=True)
    masked(model)
    torch_rsst.follow(model, [average])
    for _ in range(2):
        update = average.update if kind == "timm" else average.update_parameters
        update(model)
    assert list(model[0]._buffers) == list(average.module[0]._buffers)
    masks, followed = extract_mask(model), extract_mask(average.module)
    assert masks.keys() == followed.keys()
    assert all(same(masks[name], followed[name]) for name in masks)
