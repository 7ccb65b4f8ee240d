"""Why a unit stayed or went: every number recomputed from single weights, unit by unit."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from tiny_models import gradient_step, mlp, same, tokens, zero_gradient_step
from torch import Tensor, nn

import torch_rsst
from torch_rsst import RSST, Explanation, Refill, extract_mask, find_groups, sparsity_report
from torch_rsst.groups.groups import GroupLayer, Groups, Member
from torch_rsst.masking.names import named_weights
from torch_rsst.utils.amounts import units_to_keep

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(optimizer steps|penalty did not act|fewer living units|the units settle)"
    ":torch_rsst.utils.errors.RSSTWarning"
)
STEPS = 3


class Summed(nn.Sequential):
    """MLPs whose outputs are added up: no units but those within them."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(child(x) for child in self)


def two_mlps() -> nn.Sequential:
    return Summed(mlp(width=2, hidden=3), mlp(width=2, hidden=4, seed=5))


def round_numbers(model: nn.Module, seed: int) -> None:
    """Weights whose sums are exact in any order, many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randint(1, 9, parameter.shape, generator=generator) / 4
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(values * signs)


def all_units(groups: Groups) -> Iterator[tuple[str, str, int]]:
    for layer in groups.layers:
        for unit in range(layer.units):
            yield layer.name, layer.kind, unit


def entries_of(group: Any, *, ranked_only: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameter and place of every entry of a unit."""
    for slab in group.members:
        if slab.ranked or not ranked_only:
            sizes = SHAPES[slab.parameter]
            for place in torch.ones(sizes).nonzero().tolist():
                if place[slab.dim] in slab.index:
                    yield slab.parameter, tuple(place)


SHAPES = {name: tuple(w.shape) for name, w in named_weights(two_mlps()).items()}


# The slow oracle: the definitions, unit by unit


class ByHand:
    """One round's decision in plain Python."""

    def __init__(
        self,
        groups: Groups,
        weights: dict[str, Tensor],
        ranked: dict[str, Tensor],
        current: dict[str, Tensor],
        **rules: Any,
    ) -> None:
        self.groups, self.rules = groups, rules
        self.weights, self.ranked, self.current = weights, ranked, current
        self.units = [(i, u) for i, layer in enumerate(groups.layers) for u in range(layer.units)]
        self.key: dict[Any, float] = {}
        self.size: dict[Any, int] = {}
        self.alive: dict[Any, int] = {}
        self.lives: dict[Any, bool] = {}
        for i, u in self.units:
            self._score(i, u)
        self.stays: dict[Any, bool] = {}
        self.budgeted: dict[Any, bool] = {}
        self.rank: dict[Any, int] = {}
        self.decided_by: dict[Any, str] = {}
        for scope in self.scopes():
            self._choose(scope)

    def _score(self, i: int, u: int) -> None:
        places = list(entries_of(self.groups.layers[i].group(u), ranked_only=True))
        living = [(n, p) for n, p in places if n not in self.ranked or self.ranked[n][p]]
        values = [abs(float(self.weights[n][p])) for n, p in living]
        score = sum(values) if self.rules["importance"] == "magnitude" else float(len(values))
        if self.rules["scope"] == "global":
            score /= len(places)
        self.size[i, u], self.alive[i, u] = len(places), len(living)
        self.lives[i, u] = any(n not in self.current or self.current[n][p] for n, p in places)
        self.key[i, u] = score if self.lives[i, u] else -math.inf

    def scopes(self) -> list[list[Any]]:
        if self.rules["scope"] == "layer":
            return [[k for k in self.units if k[0] == i] for i in range(len(self.groups.layers))]
        return [self.units]  # there is one kind, of one size

    def _choose(self, scope: list[Any]) -> None:
        amount, fillback = self.rules["regroup_amount"], self.rules["fillback_rate"]
        min_keep, round_to = self.rules["min_keep"], self.rules["round_to"]
        alive_of_size: dict[int, int] = {}
        for k in scope:
            alive_of_size[self.size[k]] = alive_of_size.get(self.size[k], 0) + self.alive[k]
        budget = units_to_keep(amount, len(scope), alive_of_size, fillback)
        unaided = units_to_keep(amount, len(scope), alive_of_size, 0.0)
        worst_first = sorted(scope, key=lambda k: (self.key[k], k))
        left = {i: sum(k[0] == i for k in scope) for i, _ in scope}
        for place, k in enumerate(worst_first):
            self.rank[k] = len(scope) - place
            goes = sum(left.values()) > budget and left[k[0]] > min_keep
            left[k[0]] -= goes
            self.stays[k] = self.budgeted[k] = not goes
        for k in reversed(worst_first):
            i = k[0]
            if round_to and not self.stays[k] and left[i] % round_to:
                self.stays[k] = True
                left[i] += 1
        for k in scope:
            better_goes = any(not self.budgeted[o] and self.rank[o] < self.rank[k] for o in scope)
            self.decided_by[k] = self._reason(k, budget, unaided, better_goes)

    def _reason(self, k: Any, budget: int, unaided: int, better_goes: bool) -> str:
        if not self.stays[k]:
            if not self.lives[k]:
                return "dead"
            return "score" if self.rank[k] > budget else "min_keep"
        if not self.budgeted[k]:
            return "round_to"
        if self.rank[k] > budget or better_goes:
            return "min_keep"
        return "score" if self.rank[k] <= unaided else "fillback_rate"

    def cut(self, k: Any) -> float | None:
        if not self.lives[k]:
            return None
        (scope,) = (s for s in self.scopes() if k in s)
        living = [o for o in scope if self.lives[o]]
        by_score = ("score", "fillback_rate")
        if self.stays[k] and self.decided_by[k] in by_score:
            return max((self.key[o] for o in living if not self.stays[o]), default=None)
        if self.stays[k]:
            held = [self.key[o] for o in living if self.decided_by[o] in by_score and self.stays[o]]
            return min(held, default=None)
        stay = [o for o in living if self.stays[o]]
        passing = [o for o in stay if o[0] == k[0] or self.decided_by[o] in by_score]
        return min((self.key[o] for o in passing), default=None)


RULES = st.fixed_dictionaries(
    {
        "regroup_amount": st.one_of(st.none(), st.floats(0, 1), st.integers(0, 3)),
        "importance": st.sampled_from(["magnitude", "remain"]),
        "scope": st.sampled_from(["layer", "size", "type", "global"]),
        "fillback_rate": st.sampled_from([0.0, 0.3, 0.6]),
        "min_keep": st.integers(0, 2),
        "round_to": st.sampled_from([None, 2, 3]),
    }
)


@pytest.mark.filterwarnings("ignore:regroup_amount=.* means all:torch_rsst.RoundWarning")
@given(
    rules=RULES,
    method=st.sampled_from(["dense", "sparse", "refill"]),
    amount=st.floats(0, 0.7),
    seed=st.integers(0, 10**6),
)
def test_scores_ranks_reasons_and_margins_are_those_of_the_definitions(rules, method, amount, seed):
    model = two_mlps()
    groups = find_groups(model)
    hard = method == "refill"
    given_ = dict(rules)
    if not hard:
        rules = {**rules, "fillback_rate": 0.0}
        given_["kept_units"] = method
        del given_["fillback_rate"]
    rounds = (Refill if hard else RSST)(
        model, groups, steps_per_round=1, rounds=2, amount=amount, **given_
    )
    expected = []
    for index in range(2):
        round_numbers(model, seed + index)
        weights = {name: w.clone() for name, w in named_weights(model).items()}
        before = extract_mask(model) if method == "dense" else None
        rnd = next(rounds)
        current = rnd.current_mask if before is None else before
        expected.append(ByHand(groups, weights, rnd.ranked_mask, current, **rules))
        report = rnd.report()
        for i, layer in enumerate(groups.layers):
            for u in range(layer.units):
                found = report.explain(layer.name, u)
                assert len(found.history) == index + 1
                for decision, hand in zip(found.history, expected, strict=True):
                    assert_same_decision(decision, hand, (i, u))
                assert found.competitors == len(next(s for s in hand.scopes() if (i, u) in s))
                assert str(found).startswith(f"neuron {u} of {layer.name} ")
    rounds.round.pruner.detach()


def assert_same_decision(found: Any, hand: ByHand, k: Any) -> None:
    assert found.stays == hand.stays[k]
    assert found.rank == hand.rank[k]
    assert found.score == (hand.key[k] if hand.lives[k] else 0.0)
    assert found.decided_by == hand.decided_by[k]
    cut = hand.cut(k)
    assert found.cut == cut
    assert found.margin == (None if cut is None else found.score - cut)
    if found.margin is not None and (not found.stays or found.decided_by == "score"):
        assert found.margin >= 0 if found.stays else found.margin <= 0


def test_the_fractions_of_the_oracle_are_exact():
    """What makes equality of floats a fair demand above."""
    model = two_mlps()
    round_numbers(model, 3)
    for weight in named_weights(model).values():
        assert all(Fraction(v).denominator <= 4 for v in weight.flatten().tolist())


# The penalty


def rsst_of(model: nn.Module, method: Any = RSST, **kwargs: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    settings = {"steps_per_round": STEPS, "rounds": 3, "regroup_amount": 0.5, **kwargs}
    return method(model, find_groups(model), optimizer=optimizer, **settings), optimizer


def penalized_by_hand(model: nn.Module, groups: Groups, rnd: Any, i: int, u: int) -> Any:
    weights, squares, count = named_weights(model), 0.0, 0
    for name, place in set(entries_of(groups.layers[i].group(u), ranked_only=False)):
        alive = name not in rnd.current_mask or bool(rnd.current_mask[name][place])
        if alive and not rnd.refill_mask[name][place]:
            count, squares = count + 1, squares + float(weights[name][place]) ** 2
    return count, math.sqrt(squares)


@pytest.mark.parametrize("rewind", [None, "init"])
def test_penalized_entries_and_their_norms_are_those_of_the_unit(rewind):
    model = two_mlps()
    rsst, optimizer = rsst_of(model, rewind=rewind, amount=0.1, kept_units="sparse", strength=0.5)
    groups = find_groups(model)
    units = [(i, u) for i, layer in enumerate(groups.layers) for u in range(layer.units)]
    ends: list[dict[Any, Any]] = []
    for rnd in rsst:
        before = {k: penalized_by_hand(model, groups, rnd, *k) for k in units}
        for step in range(STEPS):
            gradient_step(model, optimizer, 10 * rnd.index + step, (5, 2))
        after = {k: penalized_by_hand(model, groups, rnd, *k) for k in units}
        ends.append({k: (*before[k], after[k][1]) for k in units})
        report = rnd.report()
        for i, u in units:
            found = report.explain(groups.layers[i].name, u)
            for decision, end in zip(found.history, ends, strict=True):
                entries, start, now = end[i, u]
                assert decision.penalized == entries
                assert (entries > 0) == (not decision.stays and decision.decided_by != "dead")
                assert decision.norm_before == pytest.approx(start, rel=1e-6)
                expected = ("decoupled", 0.5) if entries else ("none", 0.0)
                assert (decision.mode, decision.strength) == expected
                if entries:
                    assert decision.norm_after == pytest.approx(now, rel=1e-6)
                    assert now < start
    assert sum(entries for entries, *_ in ends[0].values()) > 0


def test_after_the_end_the_numbers_are_those_of_the_end():
    """Latents may drift on, and masks may go: what the penalty did stays what it did."""
    model = two_mlps()
    rsst, optimizer = rsst_of(model, rounds=1)
    for _ in rsst:
        for step in range(STEPS):
            gradient_step(model, optimizer, step, (5, 2))
        expected = explanations(rsst)
    rsst.finalize()
    gone = [each for each in explanations(rsst) if each["gone"]]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    torch_rsst.remove_all(model, freeze_zeros=False)
    after = explanations(rsst)
    assert [each["history"] for each in after] == [each["history"] for each in expected]
    assert [each["gone"] for each in after] == [not e["decision"]["stays"] for e in after]
    assert len(gone) == 4


def test_the_mode_is_that_of_an_optimizer_attached_inside_the_loop():
    model = two_mlps()
    rsst = RSST(model, find_groups(model), steps_per_round=1, rounds=1, amount=0.1, strength=0.5)
    rnd = next(rsst)
    (unit,) = [u for u in range(3) if not rnd.report().explain("0", u).stays][:1]
    assert rnd.report().explain("0", unit).decision.mode == "coupled"
    rnd.attach(optimizer := torch.optim.AdamW(model.parameters()))
    zero_gradient_step(model, optimizer)
    assert rnd.report().explain("0", unit).decision.mode == "decoupled"


def test_a_unit_that_stays_has_penalized_entries_where_another_layer_s_unit_takes_them_along():
    """An entry lies in a row unit and in a column unit: the column goes."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 0.5], [8.0, 0.5]]))
    rows, columns = (
        GroupLayer(name, "channels", 2, (Member("0.weight", dim, torch.arange(2), ranked=True),))
        for dim, name in enumerate(("rows", "columns"))
    )
    rsst = RSST(
        model, [rows, columns], steps_per_round=1, amount=0.0, scope="type", regroup_amount=1
    )
    report = next(rsst).report()
    row = report.explain("rows", 0)
    assert (row.stays, row.decision.penalized, row.decision.norm_before) == (True, 1, 0.5)
    assert (report.explain("columns", 1).decided_by, row.decided_by) == ("score", "score")
    rsst.round.pruner.detach()


# The story over the rounds


def scored_by(scores: list[list[float]]) -> Any:
    """An importance that gives one list of scores per round, whatever the weights."""
    calls = iter(scores)
    return lambda layer, weights, masks: torch.tensor(next(calls), dtype=torch.float64)


def four_neurons(scores: list[list[float]], method: Any = RSST, **kwargs: Any) -> Any:
    model = mlp(hidden=4)
    importance = scored_by(scores)
    importance.__qualname__ = "given"
    settings = {"rounds": len(scores), "steps_per_round": 1, "amount": 0.0, **kwargs}
    return method(model, find_groups(model), importance=importance, **settings)


def test_a_unit_may_go_in_one_round_and_come_back_in_the_next():
    rsst = four_neurons([[1, 2, 3, 4], [9, 1, 3, 2], [9, 1, 3, 4]])
    for _ in rsst:
        pass
    found = rsst.report().explain("", 0)
    assert [each.stays for each in found.history] == [False, True, True]
    assert [each.rank for each in found.history] == [4, 1, 1]
    assert [each.margin for each in found.history] == [-2.0, 7.0, 6.0]
    assert (found.round, found.since, found.gone) == (2, 1, False)
    other = rsst.report().explain("", 3)
    assert [each.stays for each in other.history] == [True, False, True]
    assert (other.since, other.round) == (2, 2)


def test_the_text_of_a_unit_that_is_gone():
    model = mlp(width=1, hidden=2)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0], [1.0]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 0.25], [1.0, 0.25]]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    rsst = RSST(
        model, find_groups(model), optimizer=optimizer, rounds=2, steps_per_round=1, amount=0.0,
        schedule="linear", strength=0.75, kept_units="sparse",
    )  # fmt: skip
    for _ in rsst:
        zero_gradient_step(model, optimizer)
    assert str(rsst.report().explain("", 1)).splitlines()[0] == (
        "neuron 1 of the model is to go: round 1 chose so, by its score, like every round since 0"
    )
    rsst.finalize(force=True)
    assert str(rsst.report().explain("", 1)).splitlines() == [
        "neuron 1 of the model is gone: round 1 chose so, by its score, like every round since 0",
        "score: 0.375 (magnitude), rank 2 of 2 in its layer, 4.625 below the lowest that stays (5)",
        "penalty: decoupled, strength 0.75; 4 penalized entries went from norm 0.265 to 0.0663 in round 1",
        "",
        "round  decision  score  rank  margin  decided by  penalized  norm",
        "    0  goes        1.5     2    -3.5  score               4  1.1 → 0.27",
        "    1  goes      0.375     2   -4.62  score               4  0.27 → 0.066",
    ]  # fmt: skip
    assert str(rsst.report().explain("", 0)).splitlines() == [
        "neuron 0 of the model stays: round 1 kept it, by its score, like every round since 0",
        "score: 5 (magnitude), rank 1 of 2 in its layer, 4.625 above the best that goes (0.375)",
        "penalty: none on it",
        "",
        "round  decision  score  rank  margin  decided by",
        "    0  stays         5     1    +3.5  score",
        "    1  stays         5     1   +4.62  score",
    ]


def test_the_text_of_a_unit_that_was_masked_when_a_round_opened():
    rsst = four_neurons([[1, 2, 3, 4]] * 2, RSST, regroup_amount=1)
    for rnd in rsst:
        rnd.pruner.step()
    text = str(rsst.report().explain("", 0)).splitlines()
    assert text[0].startswith("neuron 0 of the model is gone: round 1 chose so, by its score, like")
    assert text[2].startswith(
        "penalty: decoupled, strength 0.99; 7 penalized entries went from norm"
    )
    assert text[2].endswith(" in round 0; masked when round 1 opened")


def test_refill_tells_of_the_round_that_chose_not_of_those_that_found_it_dead():
    refill = four_neurons([[1, 2, 3, 4]] * 3, Refill, regroup_amount=0.5, fillback_rate=0.0)
    for _ in refill:
        pass
    refill.finalize()
    found = refill.report().explain("", 1)
    assert [each.decided_by for each in found.history] == ["score", "dead", "dead"]
    assert (found.round, found.score, found.rank, found.margin, found.gone) == (0, 2, 3, -1, True)
    assert str(found).splitlines() == [
        "neuron 1 of the model is gone: round 0 chose so, by its score; it was dead from then on, "
        "to round 2",
        f"score: 2 ({found.importance}), rank 3 of 4 in its layer, 1 below the lowest that stays (3)",
        "penalty: none, it was masked at once",
        "",
        "round  decision  score  rank  margin  decided by",
        "    0  goes          2     3      -1  score",
        "    1  goes          0     3          dead",
        "    2  goes          0     3          dead",
    ]
    best = str(refill.report().explain("", 3)).splitlines()[1]
    assert best.endswith("rank 1 of 4 in its layer; no living unit goes")


def test_a_unit_that_was_dead_before_anything_was_decided_says_so():
    model = mlp(hidden=4)
    torch_rsst.apply_mask(
        model,
        {
            "0.weight": torch.arange(4)[:, None].expand(4, 4) != 2,
            "2.weight": torch.arange(4).expand(2, 4) != 2,
        },
    )
    rsst = RSST(model, find_groups(model), steps_per_round=1, amount=0.0, regroup_amount=1)
    found = next(rsst).report().explain("", 2)
    assert (found.decided_by, found.score, found.rank, found.margin) == ("dead", 0.0, 4, None)
    assert str(found).splitlines() == [
        "neuron 2 of the model is gone: round 0 chose so, as it was dead already, without an alive "
        "entry to score",
        "score: 0 (magnitude), rank 4 of 4 in its layer",
        "penalty: none on it",
    ]


@pytest.mark.filterwarnings("ignore:regroup_amount=4 means all:torch_rsst.RoundWarning")
@pytest.mark.parametrize(
    ("kwargs", "unit", "reason", "text"),
    [
        ({"regroup_amount": 4, "min_keep": 1}, 3, "min_keep", "kept it, held by min_keep: by its"),
        ({"regroup_amount": 3, "round_to": 2}, 2, "round_to", "kept it, held by round_to: by its"),
        ({"regroup_amount": 3, "round_to": 2}, 3, "score", "kept it, by its score"),
        ({"regroup_amount": 0}, 0, "score", "kept it, by its score"),
    ],
)
def test_what_held_a_unit_is_named(kwargs, unit, reason, text):
    rsst = four_neurons([[1, 2, 3, 4]], **kwargs)
    found = next(rsst).report().explain("", unit)
    assert (found.decided_by, found.stays) == (reason, True)
    assert f"neuron {unit} of the model stays: round 0 {text}" in str(found)
    rsst.round.pruner.detach()


def test_fillback_is_named():
    refill = four_neurons([[1, 2, 3, 4]], Refill, regroup_amount=2, fillback_rate=0.5)
    report = next(refill).report()
    assert [report.explain("", u).decided_by for u in range(4)] == [
        *("score", "fillback_rate", "score", "score")
    ]
    assert "in the share that fillback_rate gives back" in str(report.explain("", 1))


def test_a_unit_that_goes_in_place_of_another_says_so():
    """min_keep holds the only unit of one layer, so that a better one of the other goes."""
    model = Summed(mlp(width=2, hidden=1), mlp(width=2, hidden=3))
    rsst = RSST(
        model, find_groups(model), steps_per_round=1, amount=0.0, scope="type", regroup_amount=1,
        importance=lambda layer, weights, masks: torch.arange(layer.units) + 10.0 * (layer.units > 1),
    )  # fmt: skip
    report = next(rsst).report()
    held, out = report.explain("0", 0), report.explain("1", 0)
    assert (held.stays, held.decided_by, held.margin) == (True, "min_keep", -11.0)
    assert (out.stays, out.decided_by, out.rank, out.margin) == (False, "min_keep", 3, -1.0)
    assert "11 below the lowest that stays by its score (11)" in str(held)
    assert "in place of units that min_keep holds in other layers; its score would do" in str(out)
    assert "rank 3 of 4 among all neurons" in str(out)
    rsst.round.pruner.detach()


def test_a_unit_that_was_kept_and_is_gone_all_the_same():
    rsst = four_neurons([[1, 2, 3, 4]])
    next(rsst)
    with torch.no_grad():
        for entries in (rsst._model[0].weight_orig[3], rsst._model[0].bias_orig[3:]):
            entries.zero_()
        rsst._model[2].weight_orig[:, 3] = 0
    text = str(rsst.report().explain("", 3))
    assert text.startswith(
        "neuron 3 of the model is gone, as nothing of it is left; yet round 0 kept"
    )
    rsst.round.pruner.detach()


def test_heads_and_neurons_of_a_transformer(tiny_transformer):
    model = tiny_transformer()
    rsst = RSST(
        model, find_groups(model), steps_per_round=1, amount=0.1, scope="global", regroup_amount=0.5
    )
    report = next(rsst).report()
    text = str(report.explain("blocks.0.attn", 2))
    assert text.startswith("head 2 of blocks.0.attn ")
    assert "(magnitude per entry), rank " in text
    assert " of 56 among all units" in text
    rsst.round.pruner.detach()


# As data


def explanations(rounds: Any) -> list[dict[str, Any]]:
    report = rounds.report()
    return [
        report.explain(layer.name, unit, kind=layer.kind).to_dict()
        for layer in report.layers
        for unit in range(layer.units)
    ]


def test_an_explanation_is_frozen_and_strict_json():
    rsst = four_neurons([[-math.inf, 2, 3, math.inf], [1, 2, 3, math.inf]])
    next(rsst)
    next(rsst)
    report = rsst.report()
    found = report.explain("", 3)
    data = found.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert (found.score, data["decision"]["score"]) == (math.inf, None)
    assert data["history"][1] == data["decision"]
    assert list(data)[:4] == ["layer", "kind", "unit", "gone"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.unit = 3
    assert isinstance(found, Explanation)
    everything = report.to_dict(decisions=True)
    assert json.loads(json.dumps(everything, allow_nan=False)) == everything
    assert everything["decisions"] == [
        {
            "layer": "",
            "kind": "neurons",
            "round": 1,
            "score": [1.0, 2.0, 3.0, None],
            "rank": [4, 3, 2, 1],
            "stays": [False, False, True, True],
            "decided_by": ["score"] * 4,
        }
    ]
    del everything["decisions"]
    assert everything == report.to_dict()
    rsst.round.pruner.detach()


def test_a_report_is_a_moment(tiny_transformer):
    """Training and further rounds do not change a report that was made before."""
    model = two_mlps()
    rsst, optimizer = rsst_of(model)
    report = next(rsst).report()
    before = [report.explain(*u[::2], kind=u[1]) for u in all_units(find_groups(model))]
    for step in range(STEPS):
        gradient_step(model, optimizer, step, (5, 2))
    next(rsst)
    assert [report.explain(*u[::2], kind=u[1]) for u in all_units(find_groups(model))] == before
    assert len(rsst.report().explain("0", 0).history) == 2


def test_a_round_tells_of_rounds_up_to_itself():
    rsst, _ = rsst_of(two_mlps())
    first = next(rsst)
    next(rsst)
    assert [each.round for each in first.report().explain("0", 0).history] == [0]
    assert [each.round for each in rsst.report().explain("0", 0).history] == [0, 1]


def test_explaining_changes_nothing(fingerprint):
    model = two_mlps()
    rsst, _ = rsst_of(model)
    next(rsst)
    before = fingerprint(model)
    explanations(rsst)
    assert fingerprint(model) == before


# Errors


def test_a_report_without_decisions_says_whom_to_ask():
    model = two_mlps()
    groups = find_groups(model)
    text = (
        r"explain: expected a report of rounds that have chosen units, got one without decisions\. "
        r"Ask rsst\.report\(\) or rnd\.report\(\)"
    )
    with pytest.raises(RuntimeError, match=text):
        sparsity_report(model, groups).explain("0", 0)
    rsst = RSST(model, groups, steps_per_round=1, train_first=True)
    for rounds in (rsst, next(rsst)):
        with pytest.raises(RuntimeError, match=text):
            rounds.report().explain("0", 0)
    assert sparsity_report(model, groups).to_dict(decisions=True)["decisions"] is None
    assert next(rsst).report().explain("0", 0).round == 0
    rsst.round.pruner.detach()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("blocks.0.atn", 0), ValueError, r"layer: expected one of 'blocks\.0\.attn'.*got "
         r"'blocks\.0\.atn'\. Did you mean 'blocks\.0\.attn'\?"),
        (("blocks.0.attn", 4), IndexError, r"unit: expected 0 to 3, for the 4 heads of "
         r"'blocks\.0\.attn', got 4\. Units are numbered within their layer"),
        (("blocks.0.attn", -1), IndexError, "got -1"),
        (("blocks.0.attn", True), TypeError, "got bool True"),
        (("blocks.0.attn", "2"), TypeError, "unit: expected 0 to 3.*got str '2'"),
        (("blocks.0.attn", 0, "neurons"), ValueError, r"kind of units in 'blocks\.0\.attn': "
         "expected one of 'heads', got 'neurons'"),
    ],
)  # fmt: skip
def test_unknown_layers_and_units_are_named(tiny_transformer, arguments, error, text):
    model = tiny_transformer()
    rsst = RSST(model, find_groups(model), steps_per_round=1)
    report = next(rsst).report()
    layer, unit, *kind = arguments
    with pytest.raises(error, match=text):
        report.explain(layer, unit, **({"kind": kind[0]} if kind else {}))
    rsst.round.pruner.detach()


def test_a_layer_of_two_kinds_asks_for_the_kind():
    model = mlp(hidden=4)
    neurons = find_groups(model).layers[0]
    heads = dataclasses.replace(
        neurons, kind="heads", units=2,
        members=tuple(dataclasses.replace(m, unit_of=m.unit_of // 2) for m in neurons.members),
    )  # fmt: skip
    rsst = RSST(model, [heads, neurons], steps_per_round=1, amount=0.0)
    report = next(rsst).report()
    text = "explain: expected kind='heads' or 'neurons', got '', which has both. Pass kind='heads'"
    with pytest.raises(ValueError, match=text):
        report.explain("", 0)
    assert report.explain("", 1, kind="heads").competitors == 2
    assert report.explain("", 3, kind="neurons").competitors == 4
    rsst.round.pruner.detach()


# Resume


def saved(rounds: Any) -> Any:
    file = io.BytesIO()
    torch.save(rounds.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("method", [RSST, Refill])
@pytest.mark.parametrize("stop", [(0, 0), (1, 2), (2, 3), "exhausted", "finalized"], ids=str)
def test_a_resumed_run_explains_the_same(method, stop):
    model = two_mlps()
    rounds, optimizer = rsst_of(model, method, amount=0.3)
    for rnd in rounds:
        for step in range(STEPS):
            if (rnd.index, step) == stop:
                break
            gradient_step(model, optimizer, 10 * rnd.index + step, (5, 2))
        if isinstance(stop, tuple) and rnd.index == stop[0]:
            break
    if stop == "finalized":
        rounds.finalize()
    again_model = two_mlps()
    again, _ = rsst_of(again_model, method, amount=0.3)
    again.load_state_dict(saved(rounds))
    again_model.load_state_dict(model.state_dict())
    assert explanations(again) == explanations(rounds)
    if rounds.round.index < 2:
        for each in (again, again, rounds):  # the resumed round comes once more
            next(each)
        assert again.round.index == rounds.round.index
    assert explanations(again) == explanations(rounds)


def test_a_state_of_before_is_loaded_and_explains_what_follows():
    rounds, _ = rsst_of(two_mlps())
    next(rounds)
    state = saved(rounds)
    del state["decisions"]
    again, _ = rsst_of(two_mlps())
    again.load_state_dict(state)
    with pytest.raises(RuntimeError, match="without decisions"):
        next(again).report().explain("0", 0)
    next(again)
    assert [each.round for each in again.report().explain("0", 0).history] == [1]


def test_a_state_is_a_copy_of_the_decisions():
    rounds, _ = rsst_of(two_mlps())
    next(rounds)
    before = explanations(rounds)
    for layer in rounds.state_dict()["decisions"][0]["verdicts"]:
        layer["keys"].zero_()
        layer["kept"].zero_()
    assert explanations(rounds) == before
    state = rounds.state_dict()
    again, _ = rsst_of(two_mlps())
    again.load_state_dict(state)
    state["decisions"][0]["verdicts"][0]["keys"].zero_()
    assert [e["history"][0]["score"] for e in explanations(again)] == [
        e["history"][0]["score"] for e in before
    ]


def test_a_round_that_could_not_open_leaves_no_record():
    model = two_mlps()
    rsst, _ = rsst_of(model)
    next(rsst)
    good, rsst._optimizer = rsst._optimizer, torch.optim.SGD([model[0][2].bias], lr=0.1)
    with pytest.raises(ValueError, match="every penalized parameter"):
        next(rsst)
    assert [each.round for each in rsst.report().explain("0", 0).history] == [0]
    rsst._optimizer = good
    next(rsst)
    assert [each.round for each in rsst.report().explain("0", 0).history] == [0, 1]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda d: d.pop("verdicts"), "decisions of a round: expected a complete state"),
        (lambda d: d["verdicts"].pop(), "expected one value for each of [3, 4], got values for [3"),
        (lambda d: d["norms"].pop(0), "one value for each of [3, 4], got values for [4]"),
        (lambda d: d["verdicts"][0].pop("kept"), "none for 'kept'"),
        (lambda d: d["verdicts"][0].update(kept=torch.ones(2)), "for each of [3, 4]"),
        (lambda d: d["verdicts"][0].update(keys=None), "The file is damaged"),
        (
            lambda d: d["verdicts"][0].update(reasons=torch.full((3,), 9)),
            "expected reasons from 0 to 4, got [9, 9, 9]",
        ),
        (lambda d: d["verdicts"][0].update(keys="abc"), "The file is damaged"),
        (lambda d: d.update(index=None), "The file is damaged"),
    ],
)
def test_damaged_decisions_are_an_error_that_changes_nothing(damage, text, fingerprint):
    rounds, _ = rsst_of(two_mlps())
    next(rounds)
    state = saved(rounds)
    damage(state["decisions"][0])
    fresh = two_mlps()
    again, _ = rsst_of(fresh)
    before = fingerprint(fresh)
    with pytest.raises(ValueError, match=r"decisions of a round|state of rounds") as caught:
        again.load_state_dict(state)
    assert text in str(caught.value)
    assert fingerprint(fresh) == before
    assert again.round is None


def test_the_record_is_small():
    """A few bytes per unit and round: 11 for the decision, 12 for the penalty."""
    rounds, _ = rsst_of(mlp(hidden=1000), rounds=2)
    next(rounds)
    next(rounds)
    tensors = [
        t
        for decided in rounds.state_dict()["decisions"]
        for layer in (*decided["verdicts"], *decided["norms"])
        for t in layer.values()
        if t is not None
    ]
    assert sum(t.numel() * t.element_size() for t in tensors) <= 2 * 1000 * (11 + 12)


# Several ranks


def _on_a_rank(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, wrap in [
        ("plain", lambda m: m),
        ("replicas", nn.parallel.DistributedDataParallel),
        ("sharded", _tensor_parallel),
    ]:
        model = mlp(width=4, hidden=8)
        groups = find_groups(model)
        wrapped = wrap(model)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01, foreach=False)
        rsst = RSST(
            wrapped, groups, optimizer=optimizer, rounds=2, steps_per_round=2, amount=0.2,
            kept_units="sparse",
        )  # fmt: skip
        for rnd in rsst:
            for step in range(2):
                optimizer.zero_grad()
                wrapped(tokens(10 * rnd.index + step, 5, 4)).square().mean().backward()
                optimizer.step()
        rsst.finalize()
        results[name] = explanations(rsst)
    return results


def _tensor_parallel(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _rounded(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_rounded(value) for value in data]
    return float(f"{data:.4g}") if isinstance(data, float) else data


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_all_ranks_explain_the_same():
    first, second = on_ranks(2, _on_a_rank)
    assert first == second
    assert first["replicas"] == first["plain"]
    assert _rounded(first["sharded"]) == _rounded(first["plain"])
    assert any(each["decision"]["penalized"] for each in first["plain"])


def test_equal_reports_are_equal_with_or_without_decisions():
    model = two_mlps()
    rsst, _ = rsst_of(model)
    rnd = next(rsst)
    bare = sparsity_report(
        model, find_groups(model), refill_mask=rnd.refill_mask, budgets=rnd.budgets
    )
    assert rnd.report() == bare
    assert "decisions" not in repr(rnd.report())
    assert same(model[0][0].weight_orig, two_mlps()[0][0].weight)
