"""kept_units="dense": units go whole, and nothing is cut that was not shrunk first."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import gradient_step, linear, mlp, same, tokens, weights_of, zero_gradient_step
from torch import Tensor, nn

import torch_rsst
from torch_rsst import (
    RSST,
    RoundWarning,
    apply_mask,
    extract_mask,
    find_groups,
    penalty_mask,
    sparsity_report,
)

STEPS, HIDDEN, LR = 3, 8, 0.05
RANKED = ("0.weight", "2.weight")


def rounds_of(model: nn.Module | None = None, **kwargs: Any) -> tuple[Any, nn.Module, Any]:
    model = mlp() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    options = {"steps_per_round": STEPS, "rounds": 3, "amount": 0.3, **kwargs}
    return RSST(model, find_groups(model), optimizer=optimizer, **options), model, optimizer


def train(rnd: Any, model: nn.Module, optimizer: Any) -> None:
    for step in range(rnd.start_step, STEPS):
        gradient_step(model, optimizer, 100 * rnd.index + step)


# The oracle: a plain loop over the neurons of one MLP, without masks, hooks or classes


def late(t: float) -> float:
    return (math.exp(t**4) - 1) / (math.e - 1)


def scale_by_halving(steps: int, left: float) -> float:
    low, high = 0.0, 1.0 / late(1.0)
    for _ in range(100):
        middle = (low + high) / 2
        product = math.prod(1 - middle * late(k / steps) for k in range(1, steps + 1))
        low, high = (middle, high) if product > left else (low, middle)
    return high


def entries_of(unit: int) -> list[tuple[str, Any]]:
    return [("0.weight", (unit,)), ("0.bias", (unit,)), ("2.weight", (slice(None), unit))]


class PlainRounds:
    """The definitions, entry by entry."""

    def __init__(self, model: nn.Module, amount: float, shares: list[float]) -> None:
        self.model, self.amount, self.shares = model, amount, shares
        self.weights = weights_of(model)
        self.alive = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.weights.items()}
        self.ranked = {n: self.alive[n].clone() for n in RANKED}
        self.refill = self.alive
        self.went: set[int] = set()

    def rank(self) -> None:
        for name in RANKED:
            self.ranked[name] &= self.alive[name]
        left = [
            (float(self.weights[n].flatten()[i].abs()), RANKED.index(n), i)
            for n in RANKED
            for i in range(self.weights[n].numel())
            if self.ranked[n].flatten()[i]
        ]
        for _, name, i in sorted(left)[: round(self.amount * len(left))]:
            self.ranked[RANKED[name]].view(-1)[i] = False

    def score(self, unit: int) -> float:
        if not any(bool(self.alive[n][at].any()) for n, at in entries_of(unit) if n in RANKED):
            return -math.inf
        return sum(
            float((self.weights[n][at].double().abs() * self.ranked[n][at]).sum())
            for n, at in entries_of(unit)
            if n in RANKED
        )

    def open(self, index: int) -> None:
        self.rank()
        worst_first = sorted(range(HIDDEN), key=lambda unit: (self.score(unit), unit))
        go = set(worst_first[: round(self.shares[index] * HIDDEN)])
        self.refill = {n: torch.ones_like(mask) for n, mask in self.alive.items()}
        for unit in range(HIDDEN):
            for name, at in entries_of(unit):
                if unit in go:
                    self.refill[name][at] = False
                if unit in go & self.went:
                    self.alive[name][at] = False
        self.went = go

    def train(self, index: int) -> None:
        scale = scale_by_halving(STEPS, 0.01)
        for step in range(STEPS):
            leaves = {n: w.clone().requires_grad_() for n, w in self.weights.items()}
            acting = {n: w * self.alive[n] for n, w in leaves.items()}
            out = torch.func.functional_call(self.model, acting, tokens(100 * index + step, 5, 4))
            out.square().mean().backward()
            for name, leaf in leaves.items():
                weight = self.weights[name]
                weight -= LR * leaf.grad
                p = self.alive[name] & ~self.refill[name]
                weight[p] *= 1 - min(1.0, scale * late((step + 1) / STEPS))


SHARES = [[0.5, 0.5, 0.5], [0.25, 0.5, 0.75], [0.5, 0.25, 0.5]]


@settings(max_examples=15)
@given(seed=st.integers(0, 999), amount=st.floats(0, 0.6), shares=st.sampled_from(SHARES))
def test_dense_rounds_are_those_of_a_plain_loop(seed, amount, shares):
    rsst, model, optimizer = rounds_of(
        mlp(seed=seed), amount=amount, regroup_amount=shares.__getitem__
    )
    plain = PlainRounds(mlp(seed=seed), amount, shares)
    for rnd in rsst:
        plain.open(rnd.index)
        assert all(same(rnd.ranked_mask[n], plain.ranked[n]) for n in RANKED)
        for name, mask in rnd.current_mask.items():
            assert same(mask, plain.alive[name])
            assert same(extract_mask(model)[name], mask)
            assert same(rnd.refill_mask[name], plain.refill[name])
        train(rnd, model, optimizer)
        plain.train(rnd.index)
        for name, weight in weights_of(model).items():
            torch.testing.assert_close(weight, plain.weights[name], rtol=1e-4, atol=1e-6)
    rsst.finalize(force=True)
    for name, mask in extract_mask(model).items():
        assert same(mask, plain.alive[name] & plain.refill[name])


# What follows from it


def test_a_ranking_masks_nothing():
    rsst, model, _ = rounds_of(amount=0.9)
    rnd = next(rsst)
    assert sum(int(rnd.ranked_mask[n].sum()) for n in RANKED) == 5
    assert all(bool(mask.all()) for mask in extract_mask(model).values())
    report = rnd.report()
    assert (report.element_sparsity, report.gone("neurons"), report.layers[0].dropped) == (0, 0, 4)
    goes = penalty_mask(rnd.current_mask, rnd.refill_mask)
    assert same(goes["0.weight"], ~rnd.refill_mask["0.bias"][:, None].expand(HIDDEN, 4))
    rnd.pruner.detach()


@pytest.mark.parametrize("method", [RSST, torch_rsst.Refill])
def test_a_ranking_that_leaves_a_layer_nothing_to_choose_by_warns(method):
    model = nn.Sequential(mlp(), mlp(width=2))
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.mul_(1e-3)
    groups = find_groups(model)
    options = {"steps_per_round": 1, "rounds": 1, "amount": 0.5, "regroup_amount": 0.5}
    rounds = method(model, groups, **options)
    text = (
        r"^Round 0: the ranking leaves layers no weight, so that their units score alike and the first of them "
        r"go: 1 \(8 neurons\)\. Lower amount"
    )
    with pytest.warns(RoundWarning, match=text) as caught:
        rnd = next(rounds)
    assert caught[0].filename == __file__
    rnd.pruner.detach()
    for fine in ({"amount": 0.2}, {"regroup_amount": 0.0}, {"scope": "type", "min_keep": 0}):
        next(method(mlp(), find_groups(mlp()), **{**options, **fine})).pruner.detach()


def test_n_rankings_leave_the_nth_power_of_what_one_leaves():
    rsst, model, optimizer = rounds_of(mlp(hidden=100), amount=0.2, rounds=4, regroup_amount=0.0)
    for rnd in rsst:
        train(rnd, model, optimizer)
    left = sum(int(rnd.ranked_mask[n].sum()) for n in RANKED)
    assert left == pytest.approx(600 * 0.8**4, abs=2)


@pytest.mark.parametrize("steps", [STEPS, STEPS - 1])
def test_only_a_full_round_of_penalty_lets_units_go_when_the_next_opens(steps):
    rsst, model, optimizer = rounds_of()
    rnd = next(rsst)
    for step in range(steps):
        gradient_step(model, optimizer, step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RoundWarning)
        again = next(rsst)
    both = ~(rnd.refill_mask["0.bias"] | again.refill_mask["0.bias"])
    assert int(both.sum()) >= 2
    assert same(again.current_mask["0.bias"], ~both if steps == STEPS else torch.ones(HIDDEN) > 0)
    again.pruner.detach()


def test_a_unit_that_comes_back_is_whole_and_trains_on():
    shares = iter([[1.0, 2, 3, 4, 5, 6, 7, 8], [8.0, 7, 6, 5, 4, 3, 2, 1]])
    scores = {}

    def given_scores(layer: Any, weights: Any, masks: Any) -> Tensor:
        return torch.tensor(scores.setdefault("now", next(shares)))

    rsst, model, optimizer = rounds_of(importance=given_scores, rounds=2)
    train(next(rsst), model, optimizer)
    scores.clear()
    rnd = next(rsst)
    assert rnd.refill_mask["0.bias"].tolist() == [True] * 4 + [False] * 4
    assert all(bool(mask.all()) for mask in rnd.current_mask.values())
    before = weights_of(model)["0.weight"]
    gradient_step(model, optimizer, 0)
    assert bool((weights_of(model)["0.weight"][:4] != before[:4]).all())
    rnd.pruner.detach()


def test_masks_that_the_model_has_already_stay():
    model = mlp()
    holes = torch.arange(32).reshape(8, 4) % 5 > 0
    apply_mask(model, {"0.weight": holes})
    rsst, _, optimizer = rounds_of(model)
    for rnd in rsst:
        assert not bool(extract_mask(model)["0.weight"][~holes].any())
        train(rnd, model, optimizer)
    rsst.finalize()
    assert sparsity_report(model, find_groups(model)).gone("neurons") == 4


def test_single_weights_in_no_unit_go_as_units_do():
    model = nn.Sequential(mlp(), linear(6, 2))
    rsst, _, optimizer = rounds_of(
        model, parameters=["0.0.weight", "0.2.weight", "1.weight"], ungrouped="element", rounds=2
    )
    went = []
    for rnd in rsst:
        went.append(~rnd.refill_mask["1.weight"])
        assert int(went[-1].sum()) == 6
        again = went[0] & went[-1] if rnd.index else torch.zeros(6, 2) > 0
        assert same(rnd.current_mask["1.weight"], ~again)
        train(rnd, model, optimizer)
    rsst.finalize(force=True)
    assert same(extract_mask(model)["1.weight"], ~went[-1])


def test_the_last_cut_changes_next_to_nothing():
    model = mlp(hidden=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    rsst = RSST(model, find_groups(model), optimizer=optimizer, rounds=2, steps_per_round=30)
    for _ in rsst:
        for step in range(30):
            gradient_step(model, optimizer, step)
    before = model(tokens(0, 5, 4))
    rsst.finalize()
    torch.testing.assert_close(model(tokens(0, 5, 4)), before, rtol=0, atol=0.02)
    assert rsst.report().gone("neurons") == 8


def test_batches_are_run_on_the_model_as_it_trains():
    """Under the bare ranking, with a tenth of its weights, every score would be another."""
    seen = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(float((model[0].weight != 0).float().mean()))
        return model(batch)

    rsst, _, _ = rounds_of(
        amount=0.9, importance="activation_l2", batches=[tokens(0, 5, 4)], forward=forward
    )
    rnd = next(rsst)
    assert seen == [1.0]
    rnd.pruner.detach()


# Names


@pytest.mark.parametrize(("old", "new"), [(True, "dense"), (False, "sparse"), (None, "dense")])
def test_the_older_name_is_understood(old, new):
    assert rounds_of(dense_training=old)[0].kept_units == new


def test_both_names_at_once_are_an_error():
    text = "kept_units: expected kept_units alone, got dense_training=True as well"
    with pytest.raises(ValueError, match=text):
        rounds_of(kept_units="dense", dense_training=True)
    with pytest.raises(
        ValueError, match=r"kept_units: expected one of 'dense', 'sparse', got 'all'"
    ):
        rounds_of(kept_units="all")


# finalize


@pytest.mark.parametrize("kept_units", ["dense", "sparse"])
def test_a_cut_that_is_not_free_is_refused_before_anything_changes(kept_units, fingerprint):
    rsst, model, optimizer = rounds_of(
        rounds=1, strength=0.1, mode="decoupled", kept_units=kept_units
    )
    rnd = next(rsst)
    for _ in range(STEPS):
        zero_gradient_step(model, optimizer)
    before, state = fingerprint(model), rsst.state_dict()
    with pytest.raises(
        RuntimeError, match=r"finalize: .* to 5% of their norm or less, got 8\d\.\d%"
    ):
        rsst.finalize()
    assert fingerprint(model) == before
    assert rnd.pruner.attached
    assert rsst.state_dict()["round"]["open"] == state["round"]["open"] is True
    rsst.finalize(force=True)
    rsst.finalize()  # what was cut is cut
    assert rsst.report().gone("neurons") == 4


@pytest.mark.parametrize("shrink_to", [0.001, 0.04, 0.4])
def test_how_much_may_be_left_follows_shrink_to(shrink_to):
    rsst, model, optimizer = rounds_of(rounds=1, shrink_to=shrink_to)
    rnd = next(rsst)
    for _ in range(STEPS):
        zero_gradient_step(model, optimizer)
    assert rnd.pruner.penalized_norm() / rnd.pruner.start_norm == pytest.approx(shrink_to, rel=1e-4)
    rsst.finalize()
    assert rsst.report().gone("neurons") == 4


def test_weights_that_are_no_numbers_any_more_are_not_free_to_cut():
    rsst, model, _ = rounds_of(rounds=1)
    rnd = next(rsst)
    with torch.no_grad():
        model[0].weight_orig.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"got nan%"):
        rsst.finalize()
    rnd.pruner.detach()
