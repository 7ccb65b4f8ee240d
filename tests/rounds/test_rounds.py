"""RSST and Refill: what each round ranks, trains under, and leaves behind."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import gradient_step, linear, mlp, same, tokens, weights_of, zero_gradient_step
from torch import nn

from torch_rsst import (
    RSST,
    InertPenaltyWarning,
    Refill,
    RegularizedPruner,
    RoundWarning,
    apply_mask,
    extract_mask,
    find_groups,
    penalty_mask,
    remove_all,
    sparsity_report,
)
from torch_rsst.masking.names import named_weights
from torch_rsst.regrouping.ranking import rank, ranked_names
from torch_rsst.rounds import engine as round_engine

STEPS = 3
METHODS = [RSST, Refill]
SPARSE: dict[str, Any] = {"kept_units": "sparse"}


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr)


def rounds_of(method: Any = RSST, model: nn.Module | None = None, **kwargs: Any) -> Any:
    """Rounds over a small MLP, and its optimizer; few and short unless asked otherwise."""
    model = mlp() if model is None else model
    optimizer = kwargs.pop("optimizer", sgd(model))
    settings = {"steps_per_round": STEPS, "rounds": 3, "regroup_amount": 0.5, **kwargs}
    return method(model, find_groups(model), optimizer=optimizer, **settings), model, optimizer


def train(rnd: Any, model: nn.Module, optimizer: Any, steps: int = STEPS) -> None:
    for step in range(rnd.start_step, steps):
        gradient_step(model, optimizer, 100 * rnd.index + step)


def run(rounds: Any, model: nn.Module, optimizer: Any) -> None:
    for rnd in rounds:
        train(rnd, model, optimizer)
    rounds.finalize()


def literal(method: Any) -> dict[str, Any]:
    """The arguments for rounds that mask what their ranking prunes, as Refill always ranks what it masks."""
    return SPARSE if method is RSST else {}


def alive_share(model: nn.Module, groups: Any) -> float:
    masks, names = extract_mask(model), ranked_names(model, groups, None)
    return sum(int(masks[n].sum()) for n in names) / sum(masks[n].numel() for n in names)


# Rankings and trainings


def test_what_is_printed_in_a_session_is_short() -> None:
    rsst, model, _ = rounds_of()
    groups = find_groups(model)
    rnd = next(rsst)
    assert repr(groups) == f"<Groups: {groups}>"
    assert repr(groups.layers[0]) == f"<GroupLayer: {groups.layers[0]}>"
    assert repr(rnd) == "<Round 0: 0 of 3 steps>"
    assert repr(rsst.report()) == str(rsst.report())
    rnd.pruner.detach()


@pytest.mark.parametrize("method", METHODS)
def test_there_are_as_many_rankings_as_trainings(method, monkeypatch):
    happened = []
    monkeypatch.setattr(round_engine, "rank", lambda *args: happened.append("rank") or rank(*args))
    rounds, model, optimizer = rounds_of(method, rounds=4)
    for rnd in rounds:
        happened.append("train")
        train(rnd, model, optimizer)
    rounds.finalize()
    assert happened == ["rank", "train"] * 4


@pytest.mark.parametrize("method", METHODS)
def test_every_round_ranks_the_weights_as_they_are_now(method):
    rounds, model, optimizer = rounds_of(method, amount=0.3, **literal(method))
    groups = find_groups(model)
    for _ in range(3):
        now, alive = named_weights(model), extract_mask(model)
        expected = rank(now, alive, groups, ["0.weight", "2.weight"], 0.3)
        rnd = next(rounds)
        assert rnd.current_mask.keys() == expected.keys()
        assert all(same(rnd.current_mask[n], m) for n, m in expected.items())
        train(rnd, model, optimizer)


@given(rate=st.floats(0.0, 0.6), rounds=st.integers(1, 5))
@pytest.mark.filterwarnings("ignore:.*fewer living units:torch_rsst.utils.errors.RoundWarning")
def test_n_rounds_leave_the_nth_power_of_what_one_leaves(rate, rounds):
    rsst, model, optimizer = rounds_of(rounds=rounds, amount=rate, optimizer=None, **SPARSE)
    remaining = 8 * 4 + 2 * 8
    for rnd in rsst:
        rnd.attach(optimizer := sgd(model))
        remaining -= round(rate * remaining)
        alive = sum(int(rnd.current_mask[n].sum()) for n in ("0.weight", "2.weight"))
        assert alive == remaining
        for _ in range(STEPS):
            zero_gradient_step(model, optimizer)
    assert abs(remaining - 48 * (1 - rate) ** rounds) <= rounds


def test_twenty_rounds_at_the_defaults_leave_the_published_share(tiny_transformer):
    model = tiny_transformer()
    groups = find_groups(model)
    rsst = RSST(model, groups, optimizer=sgd(model), steps_per_round=1, **SPARSE)
    for _ in rsst:
        zero_gradient_step(model, rsst._optimizer)
    assert rsst.round.index == 19
    assert alive_share(model, groups) == pytest.approx(0.8**20, rel=0.02)


def test_transformers_prune_heads_and_neurons_together(tiny_transformer):
    model = tiny_transformer()
    groups, optimizer = find_groups(model), sgd(model)
    rsst = RSST(model, groups, optimizer=optimizer, steps_per_round=2, rounds=2)
    for rnd in rsst:
        for step in range(2):
            gradient_step(model, optimizer, step, (2, 3, 16))
        assert {budget.kind for budget in rnd.budgets} == {"heads", "neurons"}
    rsst.finalize()
    report = sparsity_report(model, groups)
    assert (report.gone("heads"), report.gone("neurons")) == (4, 24)


@pytest.mark.needs_timm
def test_a_timm_vision_transformer_goes_through_rounds_and_a_free_cut():
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    groups, optimizer = find_groups(model), torch.optim.AdamW(model.parameters(), lr=1e-3)
    rsst = RSST(
        model, groups, optimizer=optimizer, steps_per_round=5, rounds=2, scope="type", strength=1.0
    )
    for rnd in rsst:
        for step in range(5):
            gradient_step(model, optimizer, step, (2, 3, 16, 16))
        assert rnd.pruner.penalized_norm() == 0
    images = tokens(9, 2, 3, 16, 16)
    before = model.eval()(images)
    rsst.finalize()
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-6)
    report = rsst.report()
    assert (report.gone("heads"), report.gone("neurons")) == (3, 96)


# RSST: the mask that is, and the one that is wanted


def test_rsst_trains_with_the_current_mask_live():
    rsst, model, optimizer = rounds_of(amount=0.4, **SPARSE)
    for rnd in rsst:
        masks = extract_mask(model)
        assert all(same(masks[n], m) for n, m in rnd.current_mask.items())
        for step in range(STEPS):
            gradient_step(model, optimizer, step)
            model(tokens(0, 5, 4))
            assert bool((model[0].weight[~rnd.current_mask["0.weight"]] == 0).all())
            assert bool((model[2].weight[~rnd.current_mask["2.weight"]] == 0).all())


def test_rsst_shrinks_what_is_penalized_and_no_masked_latent():
    rsst, model, optimizer = rounds_of(amount=0.3, mode="decoupled", **SPARSE)
    rnd = next(rsst)
    before, goes = weights_of(model), penalty_mask(rnd.current_mask, rnd.refill_mask)
    for _ in range(STEPS):
        zero_gradient_step(model, optimizer)
    after = weights_of(model)
    for name, p in goes.items():
        assert p.any()
        assert bool((after[name].abs() < before[name].abs())[p].all())
        assert same(after[name][~p], before[name][~p])


@pytest.mark.parametrize("kept_units", ["dense", "sparse"])
def test_p_of_a_round_is_what_is_alive_and_meant_to_go(kept_units):
    rsst, model, _ = rounds_of(amount=0.3, kept_units=kept_units)
    rnd = next(rsst)
    goes = penalty_mask(rnd.current_mask, rnd.refill_mask)
    assert rnd.report().penalized == sum(int(p.sum()) for p in goes.values())
    norm = math.sqrt(sum(float(weights_of(model)[n][p].square().sum()) for n, p in goes.items()))
    assert rnd.pruner.start_norm == pytest.approx(norm, rel=1e-6)


def test_a_follower_is_masked_with_its_unit_s_last_ranked_entry():
    model = mlp()
    with torch.no_grad():
        model[0].weight[5], model[2].weight[:, 5] = 1e-3, 1e-3
    rsst, _, _ = rounds_of(model=model, amount=6, **SPARSE)
    rnd = next(rsst)
    assert rnd.current_mask["0.bias"].tolist() == [i != 5 for i in range(8)]
    assert model[0].bias[5] == 0


@pytest.mark.parametrize("kept_units", ["dense", "sparse"])
def test_finalize_applies_current_and_refill_and_ranks_nothing(kept_units):
    rsst, model, optimizer = rounds_of(amount=0.3, kept_units=kept_units)
    for rnd in rsst:
        train(rnd, model, optimizer)
    before = weights_of(model)
    for _ in range(2):  # idempotent
        rsst.finalize()
        for name, mask in extract_mask(model).items():
            assert same(mask, rnd.current_mask[name] & rnd.refill_mask[name])
        assert all(same(w, before[n]) for n, w in weights_of(model).items())
    assert list(rsst) == []
    assert rsst.report().gone("neurons") == 4


def test_the_cut_is_free_after_a_decoupled_penalty_of_full_strength():
    model = mlp(hidden=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rsst, _, _ = rounds_of(
        model=model, optimizer=optimizer, steps_per_round=30, strength=1.0, **SPARSE
    )
    for rnd in rsst:
        train(rnd, model, optimizer, 30)
    before = model(tokens(0, 5, 4))
    alive = extract_mask(model)
    rsst.finalize()
    torch.testing.assert_close(model(tokens(0, 5, 4)), before, rtol=0, atol=1e-6)
    assert any(bool((mask < alive[n]).any()) for n, mask in extract_mask(model).items())
    remove_all(model, freeze_zeros=False)
    torch.testing.assert_close(model(tokens(0, 5, 4)), before, rtol=0, atol=1e-6)


def test_finalize_also_cuts_ranked_members_that_parameters_left_out():
    rsst, model, optimizer = rounds_of(parameters=["0.weight"], amount=0.2, **SPARSE)
    run(rsst, model, optimizer)
    dropped = ~rsst.round.refill_mask["2.weight"].any(0)
    assert int(dropped.sum()) == 4
    assert bool((model[2].weight_mask[:, dropped] == 0).all())
    assert rsst.report().gone("neurons") == 4


# Refill


@pytest.mark.parametrize("amount", [0.25, 0.5, None])
def test_refill_is_dense_in_kept_units_and_empty_in_others_from_the_start(amount):
    rounds, model, optimizer = rounds_of(
        Refill, regroup_amount=amount, fillback_rate=0.0, amount=0.3
    )
    groups = find_groups(model)
    for rnd in rounds:
        for _ in range(2):
            masks = extract_mask(model)
            assert all(same(masks[n], m) for n, m in rnd.refill_mask.items())
            kept = masks["0.bias"]
            assert same(masks["0.weight"], kept[:, None].expand(8, 4))
            assert same(masks["2.weight"], kept[None].expand(2, 8))
            report = sparsity_report(model, groups)
            assert report.gone("neurons") == 8 - rnd.budgets[0].realized
            assert report.element_sparsity == pytest.approx(1 - rnd.budgets[0].realized / 8)
            train(rnd, model, optimizer)
    assert rounds.round.budgets[0].realized < 8


def test_refill_gives_back_what_weight_orig_holds():
    rounds, model, _ = rounds_of(Refill, amount=0.5, regroup_amount=0.25)
    before = weights_of(model)
    rnd = next(rounds)
    returned = ~rnd.current_mask["0.weight"] & rnd.refill_mask["0.weight"]
    assert returned.any()
    assert same(model[0].weight[returned], before["0.weight"][returned])


def test_refill_penalizes_nothing():
    rounds, model, optimizer = rounds_of(Refill, regroup_amount=0.5)
    plain = mlp()
    rnd = next(rounds)
    apply_mask(plain, rnd.refill_mask)
    plain_optimizer = sgd(plain)
    for step in range(STEPS):
        gradient_step(model, optimizer, step)
        gradient_step(plain, plain_optimizer, step)
    assert all(same(w, weights_of(plain)[n]) for n, w in weights_of(model).items())
    assert rnd.pruner.steps == STEPS


def test_refill_fillback_gives_units_back():
    rounds, _, _ = rounds_of(Refill, regroup_amount=0.5, fillback_rate=0.5)
    assert next(rounds).budgets[0].requested == 8 - 4 + 2


def test_refill_finalize_leaves_the_refill_mask():
    rounds, model, optimizer = rounds_of(Refill)
    run(rounds, model, optimizer)
    masks = extract_mask(model)
    assert all(same(masks[n], m) for n, m in rounds.round.refill_mask.items())


@pytest.mark.filterwarnings("default::torch_rsst.utils.errors.RoundWarning")
def test_refill_warns_of_a_target_below_its_limit_with_the_numbers():
    text = r"20 rounds at amount=0\.2 ask for 1\.2% .* fillback_rate=0\.1 the units settle at 36%"
    with pytest.warns(RoundWarning, match=text):
        rounds_of(Refill, rounds=20, regroup_amount=None)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"rounds": 4, "regroup_amount": None},
        {"rounds": 20, "regroup_amount": 0.9},
        {"rounds": 20, "regroup_amount": None, "fillback_rate": 0.0},
    ],
)
def test_refill_does_not_warn_of_a_target_it_can_reach(kwargs):
    rounds, _, _ = rounds_of(Refill, **kwargs)
    assert rounds.rounds == kwargs["rounds"]


def test_refill_settles_where_the_warning_says():
    model = mlp(hidden=100)
    with pytest.warns(RoundWarning, match="settle at 36%"):
        rounds, _, optimizer = rounds_of(
            Refill, model, rounds=25, regroup_amount=None, optimizer=sgd(model)
        )
    for _ in rounds:
        for _ in range(STEPS):
            zero_gradient_step(model, optimizer)
    assert rounds.round.budgets[0].realized == pytest.approx(36, abs=2)


# Arguments of both


@pytest.mark.parametrize("method", METHODS)
def test_a_ramp_of_regroup_amounts_is_asked_once_a_round(method):
    asked: list[int] = []

    def ramp(index: int) -> float:
        asked.append(index)
        return (index + 1) / 4

    rounds, model, optimizer = rounds_of(method, regroup_amount=ramp, **_no_fillback(method))
    kept = []
    for rnd in rounds:
        kept.append(rnd.budgets[0].realized)
        train(rnd, model, optimizer)
    assert (asked, kept) == ([0, 1, 2], [6, 4, 2])


def _no_fillback(method: Any) -> dict[str, float]:
    return {"fillback_rate": 0.0} if method is Refill else {}


@pytest.mark.parametrize("method", METHODS)
def test_train_first_yields_one_round_without_mask_or_penalty(method):
    rounds, model, optimizer = rounds_of(method, train_first=True, rounds=2, rewind="init")
    plain = mlp()
    plain_optimizer = sgd(plain)
    first = next(rounds)
    assert (first.index, first.budgets, extract_mask(model)) == (-1, (), {})
    train(first, model, optimizer)
    for step in range(STEPS):
        gradient_step(plain, plain_optimizer, -100 + step)
    assert all(same(w, weights_of(plain)[n]) for n, w in weights_of(model).items())
    assert first.pruner.steps == STEPS
    assert [rnd.index for rnd in _trained(rounds, model, optimizer)] == [0, 1]


def test_train_first_trains_the_weights_that_it_was_given():
    rounds, model, _ = rounds_of(train_first=True, rewind=mlp(seed=7).state_dict())
    next(rounds)
    assert same(model[0].weight, mlp()[0].weight)


def _trained(rounds: Any, model: nn.Module, optimizer: Any) -> Any:
    for rnd in rounds:
        yield rnd
        train(rnd, model, optimizer)


@pytest.mark.parametrize("as_pairs", [True, False])
def test_parameters_choose_what_is_ranked(as_pairs):
    model = mlp()
    chosen = [(model[0], "weight")] if as_pairs else ["0.weight"]
    rsst, _, _ = rounds_of(model=model, parameters=chosen, amount=0.5, **SPARSE)
    rnd = next(rsst)
    assert int(rnd.current_mask["0.weight"].sum()) == 16
    assert "2.weight" not in rnd.current_mask


def test_parameters_outside_the_groups_lose_single_entries():
    model = nn.Sequential(nn.Sequential(*mlp(), nn.Softmax(dim=-1)), linear(6, 2))
    names = ["0.0.weight", "0.2.weight", "1.weight"]
    rsst, _, optimizer = rounds_of(model=model, parameters=names, amount=0.2, **SPARSE)
    for rnd in rsst:
        train(rnd, model, optimizer)
    rsst.finalize()
    assert same(extract_mask(model)["1.weight"], rnd.current_mask["1.weight"])
    assert 0 < int(rnd.current_mask["1.weight"].sum()) < 12


def test_ungrouped_elements_go_too_when_asked():
    model = nn.Sequential(nn.Sequential(*mlp(), nn.Softmax(dim=-1)), linear(6, 2))
    names = ["0.0.weight", "0.2.weight", "1.weight"]
    rsst, _, _ = rounds_of(model=model, parameters=names, amount=0.1, ungrouped="element")
    rnd = next(rsst)
    alive = int(rnd.current_mask["1.weight"].sum())
    assert int(rnd.refill_mask["1.weight"].sum()) == alive - round(0.5 * alive)


# Rewinding


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings(
    "ignore::torch_rsst.InertPenaltyWarning"
)  # weights are made larger here
def test_rewinding_comes_after_ranking(method):
    """Ranking rewound weights would give every round the same order: training has no say."""
    rounds, model, optimizer = rounds_of(method, rewind="init", amount=0.3, **literal(method))
    groups, initial = find_groups(model), weights_of(model)
    train(next(rounds), model, optimizer)
    with torch.no_grad():  # turn the order around
        for parameter in model.parameters():
            parameter.copy_(0.01 / parameter)
    trained, alive = named_weights(model), extract_mask(model)
    expected = rank(trained, alive, groups, ["0.weight", "2.weight"], 0.3)
    latents = weights_of(model)
    rnd = next(rounds)
    assert all(same(rnd.current_mask[n], m) for n, m in expected.items())
    masks = extract_mask(model)
    for name, weight in weights_of(model).items():
        alive_now = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert same(weight, torch.where(alive_now, initial[name], latents[name]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rewind", ["init", "state_dict"])
def test_the_rewound_weights_are_those_of_the_start_in_every_round(method, rewind):
    model = nn.Sequential(nn.BatchNorm1d(4), mlp())
    early = {**mlp(seed=7).state_dict(prefix="1."), **model[0].state_dict(prefix="0.")}
    source = early if rewind == "state_dict" else model.state_dict()
    expected = {name: value.clone() for name, value in source.items()}
    chosen = rewind if rewind == "init" else early
    rounds, _, optimizer = rounds_of(method, model, rewind=chosen, amount=0.3)
    for rnd in rounds:
        masks = extract_mask(model)
        for name, weight in weights_of(model).items():
            alive = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
            assert same(weight[alive], expected[name][alive])
        assert same(model[0].running_mean, torch.zeros(4))
        assert int(model[0].num_batches_tracked) == 0
        train(rnd, model, optimizer)
        assert int(model[0].num_batches_tracked) == STEPS


def test_the_penalty_is_measured_from_the_rewound_weights():
    rsst, model, optimizer = rounds_of(rewind="init", strength=0.01)
    for rnd in rsst:
        assert rnd.pruner.start_norm == rnd.pruner.penalized_norm()
        with torch.no_grad():
            model[0].weight_orig.mul_(0.1)
        train(rnd, model, optimizer)


# The iterator is the state


@pytest.mark.parametrize("method", METHODS)
def test_iter_continues_and_never_restarts(method):
    rounds, model, optimizer = rounds_of(method)
    for rnd in rounds:
        train(rnd, model, optimizer)
        break
    assert iter(rounds) is rounds
    assert [rnd.index for rnd in _trained(rounds, model, optimizer)] == [1, 2]
    assert list(rounds) == []


def test_break_leaves_the_round_open():
    rsst, model, optimizer = rounds_of()
    for _ in rsst:
        gradient_step(model, optimizer, 0)
        break
    rnd = rsst.round
    assert rnd.pruner.attached
    for step in range(1, STEPS):
        gradient_step(model, optimizer, step)
    assert rnd.pruner.steps == STEPS
    assert next(rsst).index == 1
    assert not rnd.pruner.attached


@pytest.mark.parametrize(
    "close", [next, lambda rsst: rsst.finalize(force=True)], ids=["next", "finalize"]
)
def test_closing_a_round_early_warns_with_the_numbers(close):
    rsst, model, optimizer = rounds_of()
    rnd = next(rsst)
    gradient_step(model, optimizer, 0)
    with pytest.warns(RoundWarning, match="Round 0 closed after 1 of steps_per_round=3 optimizer"):
        close(rsst)
    assert not rnd.pruner.attached


def test_the_warning_points_at_the_caller():
    rsst, _, _ = rounds_of()
    next(rsst)
    with pytest.warns(RoundWarning) as caught:
        next(rsst)
    assert caught[0].filename == __file__


def test_a_warning_turned_into_an_error_blocks_no_later_round():
    rsst, model, optimizer = rounds_of()
    next(rsst)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RoundWarning):
            next(rsst)
    rnd = next(rsst)
    assert rnd.index == 1
    train(rnd, model, optimizer)
    assert rnd.pruner.steps == STEPS


def test_an_inert_round_warns_when_it_closes():
    model = mlp()
    rsst, _, optimizer = rounds_of(model=model, optimizer=sgd(model, lr=0.0), mode="coupled")
    train(next(rsst), model, optimizer)
    with pytest.warns(InertPenaltyWarning, match="The penalty did not act"):
        next(rsst)


def test_an_optimizer_may_be_made_inside_the_loop():
    inside, outside = mlp(), mlp()
    rsst, _, _ = rounds_of(model=inside, optimizer=None)
    for rnd in rsst:
        rnd.attach(optimizer := sgd(inside))
        train(rnd, inside, optimizer)
        assert rnd.pruner.steps == STEPS
    rsst, _, optimizer = rounds_of(model=outside)
    for rnd in rsst:
        train(rnd, outside, optimizer)
    assert all(same(w, weights_of(outside)[n]) for n, w in weights_of(inside).items())


def test_an_optimizer_made_for_a_round_takes_the_place_of_that_of_the_rounds():
    rsst, model, first = rounds_of()
    twin, twin_model, _ = rounds_of(optimizer=None)
    for rnd, expected in zip(rsst, twin, strict=True):
        rnd.attach(second := sgd(model))
        expected.attach(twin_optimizer := sgd(twin_model))
        train(rnd, model, second)
        train(expected, twin_model, twin_optimizer)
        assert not first._optimizer_step_pre_hooks
        assert rnd.pruner.steps == STEPS
    assert all(same(w, weights_of(twin_model)[n]) for n, w in weights_of(model).items())


def test_another_optimizer_after_a_step_is_refused_with_what_to_do():
    rsst, model, optimizer = rounds_of()
    rnd = next(rsst)
    gradient_step(model, optimizer, 0)
    with pytest.raises(RuntimeError) as caught:
        rnd.attach(sgd(model))
    assert str(caught.value) == (
        "attach: expected the optimizer before the first step, got another one after 1 steps with the "
        "first. Attach it when the round opens; several go into one list."
    )
    gradient_step(model, optimizer, 1)
    assert rnd.pruner.steps == 2
    rnd.pruner.detach()


def test_steps_can_be_counted_by_hand():
    rsst, model, _ = rounds_of(optimizer=None)
    optimizer = sgd(model)
    for rnd in rsst:
        for step in range(STEPS):
            gradient_step(model, optimizer, step)
            rnd.pruner.step()
        assert rnd.pruner.steps == STEPS
    assert rsst.round.index == 2


def test_finalize_before_the_first_round_is_an_error():
    rsst, model, _ = rounds_of()
    with pytest.raises(RuntimeError, match=r"finalize: expected a round, got none yet\. Train at"):
        rsst.finalize()
    assert extract_mask(model) == {}


def test_no_round_follows_finalize():
    rsst, model, optimizer = rounds_of()
    train(next(rsst), model, optimizer)
    rsst.finalize()
    assert list(rsst) == []
    assert rsst.round.index == 0


# Errors, before anything is changed


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"steps_per_round": 0}, ValueError, "steps_per_round: expected an int >= 1, got 0"),
        ({"rounds": 0}, ValueError, "rounds: expected an int >= 1, got 0"),
        ({"rounds": 2.0}, TypeError, "rounds: expected an int >= 1, got float"),
        ({"amount": 1.2}, ValueError, "amount: expected an int >= 0"),
        ({"regroup_amount": -0.1}, ValueError, "regroup_amount: expected an int >= 0"),
        ({"importance": "size"}, ValueError, "importance: expected one of"),
        ({"scope": "layr"}, ValueError, "Did you mean 'layer'"),
        ({"min_keep": -1}, ValueError, "min_keep"),
        ({"round_to": 0}, ValueError, "round_to"),
        ({"rewind": "begin"}, ValueError, "rewind: expected one of 'init'"),
        ({"parameters": ["0.weigth"]}, KeyError, "parameters: '0.weigth'"),
        (
            {"regroup_amount": None, "ungrouped": "element"},
            ValueError,
            "ungrouped='element': expected an amount",
        ),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_wrong_arguments_are_named_at_construction(method, kwargs, error, text, fingerprint):
    model = mlp()
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        rounds_of(method, model, **kwargs)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"schedule": "x^4"}, ValueError, "schedule: expected one of"),
        ({"strength": -1.0}, ValueError, "strength"),
    ],
)
def test_wrong_arguments_of_the_penalty_are_named_at_construction(kwargs, error, text):
    with pytest.raises(error, match=text):
        rounds_of(**kwargs)


def test_groups_of_another_model_are_an_error():
    with pytest.raises(ValueError, match=r"expected size 8 along dim 0, got shape \(6, 4\)"):
        RSST(mlp(hidden=6), find_groups(mlp()), steps_per_round=1)


def spoil_weights(rounds: Any, model: nn.Module) -> Any:
    with torch.no_grad():
        value = model[0].weight_orig[0].clone()
        model[0].weight_orig[0] = torch.nan

    def mend() -> None:
        with torch.no_grad():
            model[0].weight_orig[0] = value

    return ValueError, "expected numbers, got 4 NaN", mend


def spoil_optimizer(rounds: Any, model: nn.Module) -> Any:
    good, rounds._optimizer = rounds._optimizer, torch.optim.SGD([model[2].bias], lr=0.1)

    def mend() -> None:
        rounds._optimizer = good

    return ValueError, "every penalized parameter in its groups", mend


def attach_another(rounds: Any, model: nn.Module) -> Any:
    rounds.round.pruner.detach()
    other = RegularizedPruner(model, {}, total_steps=1)
    return RuntimeError, "expected one RegularizedPruner, got a second one", other.remove


def spoil_amount(rounds: Any, model: nn.Module) -> Any:
    good = rounds.regrouping
    rounds.regrouping = dataclasses.replace(good, regroup_amount=lambda index: 9)

    def mend() -> None:
        rounds.regrouping = good

    return ValueError, "at most 8, as many neurons", mend


@pytest.mark.parametrize("spoil", [spoil_weights, spoil_optimizer, attach_another, spoil_amount])
@pytest.mark.parametrize("kwargs", [{}, {"rewind": "init"}, SPARSE], ids=str)
def test_a_round_that_cannot_open_changes_nothing_and_can_be_retried(spoil, kwargs, fingerprint):
    kwargs = {"amount": 0.1, "regroup_amount": lambda index: (index + 1) / 4, **kwargs}
    rounds, model, optimizer = rounds_of(**kwargs)
    twin, twin_model, twin_optimizer = rounds_of(**kwargs)
    train(next(rounds), model, optimizer)
    train(next(twin), twin_model, twin_optimizer)
    error, text, mend = spoil(rounds, model)
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        next(rounds)
    assert fingerprint(model) == before
    mend()
    rnd, expected = next(rounds), next(twin)
    assert rnd.index == 1
    assert all(same(rnd.current_mask[n], m) for n, m in expected.current_mask.items())
    train(rnd, model, optimizer)
    train(expected, twin_model, twin_optimizer)
    assert all(same(w, weights_of(twin_model)[n]) for n, w in weights_of(model).items())


def test_an_interrupted_mask_leaves_no_regularizer(monkeypatch):
    rounds, _, _ = rounds_of()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(round_engine, "apply_mask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(rounds)
    monkeypatch.undo()
    assert next(rounds).index == 0
    assert rounds.round.pruner.attached


def test_a_layer_that_the_ranking_empties_is_reported():
    """Under global ranking a layer of small weights can die whole, whatever min_keep says."""
    model = torch.nn.Sequential(mlp(), mlp())
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(1e-3)
    rsst = RSST(model, find_groups(model), steps_per_round=1, rounds=1, amount=0.5, **SPARSE)
    with pytest.warns(RoundWarning, match=r"Round 0: .*min_keep=1: 0 \(8 neurons\) keeps 0"):
        next(rsst)
    rsst.round.pruner.detach()


def test_a_damaged_state_changes_nothing_not_even_the_open_round(fingerprint):
    rsst, model, _ = rounds_of()
    rnd = next(rsst)
    before = fingerprint(model)
    for damage in (
        lambda s: s["round"]["refill_mask"].update({"0.weight": torch.zeros(3, 3)}),
        lambda s: s["round"]["pruner"].update({"total_steps": 99}),
        lambda s: s["round"].pop("pruner"),
        lambda s: s.pop("snapshot"),
        lambda s: s["decisions"][0].update(index=torch.ones(2)),
        lambda s: s["decisions"][0].update(strength=torch.ones(2)),
        lambda s: s.clear(),
    ):
        state = rsst.state_dict()
        damage(state)
        with pytest.raises(ValueError, match="expected"):
            rsst.load_state_dict(state)
        assert rnd.pruner.attached
        assert rsst.round is rnd
        assert fingerprint(model) == before
    rnd.pruner.detach()


def test_a_state_from_before_the_first_round_brings_the_masks_of_its_model():
    pruned, fresh = mlp(), mlp()
    apply_mask(pruned, {"0.weight": torch.eye(8, 4) > 0})
    saved, _, _ = rounds_of(model=pruned)
    loaded, _, _ = rounds_of(model=fresh)
    loaded.load_state_dict(saved.state_dict())
    fresh.load_state_dict(pruned.state_dict(), strict=True)
    assert same(extract_mask(fresh)["0.weight"], torch.eye(8, 4) > 0)


def test_the_optimizer_inside_a_wrapper_carries_the_penalty():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    rsst, model, _ = rounds_of(optimizer=None)
    rnd = next(rsst)
    rnd.attach(Wrapper(inner := sgd(model)))
    assert rnd.pruner.mode == "decoupled"
    for _ in range(STEPS):
        zero_gradient_step(model, inner)
    assert rnd.pruner.steps == STEPS
    with pytest.raises(TypeError, match="optimizer: expected a torch optimizer, got str"):
        rounds_of(optimizer="sgd")
    rnd.pruner.detach()


@pytest.mark.parametrize("wrong", [{"mode": "couple"}, {"accumulation_steps": 0}])
def test_what_a_penalty_would_refuse_is_refused_before_the_first_round(wrong):
    model = mlp()
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        RSST(model, find_groups(model), steps_per_round=1, rounds=1, **wrong)
