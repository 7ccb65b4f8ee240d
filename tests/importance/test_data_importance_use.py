"""Importance from data: your own, combinations, what is refused, rounds."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from activation_oracle import literal, loss_fn, measured
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import mlp, tokens
from torch import Tensor, nn

import torch_rsst
from torch_rsst import RSST, Refill, find_groups, head_layer, measure_importance, regroup
from torch_rsst.importance import (
    DataImportance,
    magnitude,
    name_of,
    rank_average,
    remain,
    resolve_importance,
    weighted_sum,
)
from torch_rsst.masking.names import named_weights

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
        ("l1", {}, "batches: expected batches to run on, for importance 'activation_l1', got none. Pass a DataLoader, a list of batches, or a function that returns one; with forward= for batches of inputs and labels."),
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


def test_units_without_a_consumer():
    groups = [head_layer("0.weight", rows=8, num_heads=2, projections=1)]
    text = (
        "activations of 0.weight (2 heads): expected a member that consumes the units, got none. Mark "
        "the weight of the layer that consumes the units with consumes=True, as find_groups does"
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
