"""Interrupt a run anywhere, rebuild everything, continue: it must end bit for bit as if nothing was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import gradient_step, mlp, same, tokens, weights_of
from torch import nn

import torch_rsst
from torch_rsst import (
    RSST,
    Refill,
    RegularizedPruner,
    apply_mask,
    extract_mask,
    find_groups,
    schedules,
)

ROUNDS, STEPS = 3, 3

CONFIGS = {
    "rsst": (RSST, {}),
    "rsst-sparse": (RSST, {"kept_units": "sparse"}),
    "rsst-strength": (RSST, {"strength": 0.9}),
    "rsst-rewind": (RSST, {"rewind": "init"}),
    "rsst-rewind-keep": (RSST, {"rewind": "init", "rewind_optimizer": "keep"}),
    "rsst-sparse-rewind": (RSST, {"kept_units": "sparse", "rewind": "init"}),
    "rsst-first": (RSST, {"train_first": True, "mode": "decoupled", "block_loss_grad": True}),
    "refill": (Refill, {}),
    "refill-rewind": (Refill, {"rewind": "init"}),
}
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
}


class Model(nn.Module):
    """Heads and neurons, buffers of a norm, and dropout that makes the RNG count."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.norm, self.transformer, self.dropout = nn.BatchNorm1d(8), transformer, nn.Dropout(0.2)

    def forward(self, x: Any) -> Any:
        return self.dropout(self.transformer(self.norm(x.transpose(1, 2)).transpose(1, 2)))


class Run:
    """Everything that a training script holds, made from nothing but its settings."""

    def __init__(self, transformer: Any, config: str, optimizer: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Model(transformer(depth=1, dim=8, num_heads=2, hidden=6, seed=seed))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        method, kwargs = CONFIGS[config]
        self.rounds = method(
            self.model,
            find_groups(self.model),
            optimizer=self.optimizer,
            steps_per_round=STEPS,
            rounds=ROUNDS,
            amount=0.2,
            regroup_amount=0.5,
            **kwargs,
        )
        torch.manual_seed(1)
        self.seen: list[tuple[int, int]] = []  # (round, start_step) of what the rounds yielded

    def play(self) -> Iterator[tuple[Any, ...]]:
        """Train to the end, with a stop at every point where a script could save."""
        yield ("before",)
        for rnd in self.rounds:
            self.seen.append((rnd.index, rnd.start_step))
            yield "opened", rnd.index
            for step in range(rnd.start_step, STEPS):
                self.optimizer.zero_grad()
                self.model(tokens(10 * rnd.index + step, 4, 3, 8)).square().mean().backward()
                self.optimizer.step()
                yield "stepped", rnd.index, step
        yield ("exhausted",)
        self.rounds.finalize(force=True)
        yield ("finalized",)

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = {
            "rounds": self.rounds.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(parts, file)
        return file

    def load(self, file: io.BytesIO) -> None:
        file.seek(0)
        parts = torch.load(file, weights_only=True)
        self.rounds.load_state_dict(parts["rounds"])
        self.model.load_state_dict(parts["model"], strict=True)
        self.optimizer.load_state_dict(parts["optimizer"])
        torch.set_rng_state(parts["rng"])

    def outcome(self) -> dict[str, Any]:
        traces = {
            f"{number}.{key}": value
            for number, state in self.optimizer.state_dict()["state"].items()
            for key, value in state.items()
            if value is not None
        }
        return {**self.model.state_dict(), **traces}


@cache
def uninterrupted(
    transformer: Any, config: str, optimizer: str
) -> tuple[dict[str, Any], list[Any]]:
    run = Run(transformer, config, optimizer)
    points = list(run.play())
    return run.outcome(), points


def points_of(config: str) -> list[tuple[Any, ...]]:
    first = -1 if "first" in config else 0
    trained = [
        point
        for index in range(first, ROUNDS)
        for point in [("opened", index), *(("stepped", index, step) for step in range(STEPS))]
    ]
    return [("before",), *trained, ("exhausted",), ("finalized",)]


def expected_seen(config: str, point: tuple[Any, ...]) -> list[tuple[int, int]]:
    """The rounds that a resumed run yields: the same one first, at the step where it stood."""
    indices = range(-1 if "first" in config else 0, ROUNDS)
    kind, *where = point
    if kind == "before":
        return [(index, 0) for index in indices]
    if kind in ("exhausted", "finalized"):
        return []
    index = where[0]
    start = 0 if kind == "opened" else where[1] + 1
    return [(index, start), *((later, 0) for later in indices if later > index)]


def check(transformer: Any, config: str, optimizer: str, point: tuple[Any, ...]) -> None:
    expected, points = uninterrupted(transformer, config, optimizer)
    assert points == points_of(config)
    run = Run(transformer, config, optimizer)
    next(stop for stop in run.play() if stop == point)
    saved = run.save()
    again = Run(transformer, config, optimizer, seed=5)  # other weights, other RNG
    again.load(saved)
    list(again.play())
    assert again.seen == expected_seen(config, point)
    outcome = again.outcome()
    assert outcome.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(outcome[name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("point", points_of("rsst-rewind"), ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_interrupted_anywhere_ends_the_same(tiny_transformer, optimizer, point):
    check(tiny_transformer, "rsst-rewind", optimizer, point)


@settings(max_examples=6)
@given(data=st.data())
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_runs_of_every_kind_end_the_same(tiny_transformer, config, optimizer, data):
    check(tiny_transformer, config, optimizer, data.draw(st.sampled_from(points_of(config))))


def test_the_outcomes_compared_are_not_all_alike(tiny_transformer):
    """A comparison that any two runs pass would prove nothing."""
    outcomes = [uninterrupted(tiny_transformer, config, "adamw")[0] for config in CONFIGS]
    weights = [outcome["transformer.blocks.0.mlp.fc1.weight_orig"] for outcome in outcomes]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_a_run_without_the_saved_rng_ends_differently(tiny_transformer):
    expected, _ = uninterrupted(tiny_transformer, "rsst", "sgd")
    run = Run(tiny_transformer, "rsst", "sgd")
    next(stop for stop in run.play() if stop == ("stepped", 0, 1))
    saved = run.save()
    again = Run(tiny_transformer, "rsst", "sgd")
    again.load(saved)
    torch.manual_seed(99)
    list(again.play())
    name = "transformer.blocks.0.mlp.fc1.weight_orig"
    assert not torch.equal(again.outcome()[name], expected[name])


# The state itself


def rounds_of(method: Any = RSST, model: nn.Module | None = None, **kwargs: Any) -> Any:
    model = mlp() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    settings = {"steps_per_round": STEPS, "rounds": ROUNDS, "regroup_amount": 0.5, **kwargs}
    return method(model, find_groups(model), optimizer=optimizer, **settings), model, optimizer


def opened(**kwargs: Any) -> Any:
    rounds, model, optimizer = rounds_of(**kwargs)
    next(rounds)
    gradient_step(model, optimizer, 0)
    return rounds


def test_a_resumed_round_is_the_same_round():
    rounds = opened()
    again, model, _ = rounds_of()
    again.load_state_dict(rounds.state_dict())
    rnd, found = rounds.round, next(again)
    assert (found.index, found.start_step, found.budgets) == (0, 1, rnd.budgets)
    for name, mask in rnd.current_mask.items():
        assert same(found.current_mask[name], mask)
        assert same(found.refill_mask[name], rnd.refill_mask[name])
    assert found.pruner.start_norm == rnd.pruner.start_norm
    assert found is again.round
    assert extract_mask(model).keys() == rnd.current_mask.keys()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("method", [RSST, Refill])
def test_an_open_round_is_saved_by_its_state_and_not_copied(method, copied):
    rounds, model, optimizer = rounds_of(method, rounds=1)
    copied(rounds)
    for rnd in rounds:
        with pytest.raises(
            TypeError, match=f"^{method.__name__}: .* a pickle of an open round. Save"
        ):
            copied(rounds)
        for step in range(STEPS):
            gradient_step(model, optimizer, STEPS * rnd.index + step)
    rounds.finalize()
    copied(rounds)


def test_a_state_is_a_copy():
    rounds = opened(rewind="init")
    state = rounds.state_dict()
    mask = rounds.round.current_mask["0.weight"].clone()
    for part in ("current_mask", "refill_mask"):
        state["round"][part]["0.weight"].zero_()
    state["snapshot"]["weights"]["0.weight"].zero_()
    assert same(rounds.round.current_mask["0.weight"], mask)
    assert same(rounds._snapshot.weights["0.weight"], mlp()[0].weight)


def test_loading_twice_leaves_one_regularizer_and_yields_the_round_once():
    state = opened().state_dict()
    again, model, optimizer = rounds_of()
    again.load_state_dict(state)
    again.load_state_dict(state)
    for step in range(next(again).start_step, STEPS):
        gradient_step(model, optimizer, step)
    assert again.round.pruner.steps == STEPS
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert next(again).index == 1


def test_loading_a_closed_state_over_a_resumed_one_forgets_that_it_was_resumed():
    rounds, model, optimizer = rounds_of(rounds=2)
    states = {}
    for _ in rounds:
        states["open"] = rounds.state_dict()
        for step in range(STEPS):
            gradient_step(model, optimizer, step)
    states["closed"] = rounds.state_dict()
    again, _, _ = rounds_of(rounds=2)
    again.load_state_dict(states["open"])
    again.load_state_dict(states["closed"])
    assert list(again) == []
    assert again.round.index == 1


def test_loading_a_finalized_state_applies_the_final_mask():
    rounds, model, optimizer = rounds_of(rounds=1)
    for _ in rounds:
        for step in range(STEPS):
            gradient_step(model, optimizer, step)
    rounds.finalize()
    again, fresh, _ = rounds_of(rounds=1)
    again.load_state_dict(rounds.state_dict())
    expected, found = extract_mask(model), extract_mask(fresh)
    assert all(same(found[name], mask) for name, mask in expected.items())
    assert again.report().gone("neurons") == 4


def test_loading_the_state_of_a_run_not_begun_forgets_the_present_round():
    state = rounds_of()[0].state_dict()
    rounds = opened()
    pruner = rounds.round.pruner
    rounds.load_state_dict(state)
    assert rounds.round is None
    assert not pruner.attached
    with pytest.raises(RuntimeError, match="finalize: expected a round"):
        rounds.finalize()


def test_an_optimizer_made_inside_the_loop_resumes_too():
    def run(state: Any = None, weights: Any = None, until: int = 99) -> tuple[Any, nn.Module]:
        model = mlp()
        rsst = RSST(model, find_groups(model), steps_per_round=STEPS, rounds=2)
        if state is not None:
            rsst.load_state_dict(state)
            model.load_state_dict(weights)
        for rnd in rsst:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            rnd.attach(optimizer)
            for step in range(rnd.start_step, STEPS):
                if 10 * rnd.index + step == until:
                    return rsst, model
                gradient_step(model, optimizer, step)
        rsst.finalize()
        return rsst, model

    _, expected = run()
    rsst, model = run(until=11)
    _, found = run(rsst.state_dict(), model.state_dict())
    assert all(same(w, weights_of(expected)[n]) for n, w in weights_of(found).items())


def test_the_rewind_snapshot_travels_with_the_state():
    rounds = opened(rewind="init")
    again, model, optimizer = rounds_of(model=mlp(seed=8), rewind="init")
    again.load_state_dict(rounds.state_dict())
    for step in range(next(again).start_step, STEPS):
        gradient_step(model, optimizer, step)
    next(again)
    alive = extract_mask(model)["0.weight"]
    assert same(model[0].weight_orig[alive], mlp()[0].weight[alive])


# Settings that differ


class Ramp:
    """A callable whose repr holds an address."""

    def __call__(self, index: int) -> float:
        return 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"regroup_amount": Ramp()},
        lambda: {"regroup_amount": partial(max, 0.5)},
        lambda: {"importance": lambda layer, weights, masks: torch.arange(layer.units)},
        lambda: {"schedule": schedules.Polynomial(power=1.5)},
        lambda: {"grad_scale": torch.amp.GradScaler("cpu").get_scale},
    ],
    ids=["instance", "partial", "lambda", "dataclass", "method"],
)
def test_callables_made_anew_are_the_same_setting(make):
    rounds, _, _ = rounds_of(**make())
    file = io.BytesIO()
    torch.save(rounds.state_dict(), file)
    file.seek(0)
    again, _, _ = rounds_of(**make())
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.round is None


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("steps_per_round", np.int64(2), np.int64(3)),
        ("rounds", np.int64(2), np.int64(3)),
        ("min_keep", np.int64(3), np.int64(5)),
        ("round_to", np.int64(2), np.int64(4)),
        ("accumulation_steps", np.int64(2), np.int64(3)),
        ("amount", np.float32(0.3), np.float32(0.4)),
        ("regroup_amount", np.float32(0.3), np.float64(0.4)),
        ("strength", np.float32(0.3), np.float64(0.7)),
        ("shrink_to", np.float32(0.3), np.float64(0.7)),
        ("shrink_by", np.float32(0.5), np.float32(0.75)),
        ("shrink_by", np.float64(0.5), np.float64(0.75)),
        ("grad_scale", np.float64(2.0), np.float64(4.0)),
        ("fillback_rate", np.float32(0.1), np.float32(0.2)),
    ],
)
def test_numbers_of_numpy_are_settings_by_their_values(name, value, other):
    method = Refill if name == "fillback_rate" else RSST
    file = io.BytesIO()
    torch.save(rounds_of(method, **{name: value})[0].state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    rounds_of(method, **{name: value.item()})[0].load_state_dict(state)
    with pytest.raises(ValueError, match=f"state of rounds: expected .*{name}|schedule"):
        rounds_of(method, **{name: other})[0].load_state_dict(state)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"rounds": 4}, "expected rounds=4, got rounds=3"),
        ({"steps_per_round": 9}, "expected steps_per_round=9, got steps_per_round=3"),
        (
            {"amount": 0.1, "scope": "type"},
            "amount=0.1, scope='type', got amount=0.2, scope='layer'",
        ),
        ({"regroup_amount": Ramp()}, "expected regroup_amount='Ramp', got regroup_amount=0.5"),
        ({"kept_units": "sparse"}, "expected kept_units='sparse', got kept_units='dense'"),
        ({"mode": "decoupled"}, "expected mode='decoupled', got mode='auto'"),
        ({"shrink_to": 0.1}, r"expected shrink_to=0\.1, got shrink_to=0\.01"),
        (
            {"strength": 0.4},
            r"strength=0\.4\)', shrink_to=None, got schedule='Norm.*strength=1\.0\)'",
        ),
        (
            {"parameters": ["0.weight"]},
            r"parameters=\['0\.weight'\], got parameters=\['0\.weight', '2",
        ),
        ({"model": mlp(hidden=6)}, r"groups=\['the model \(6 neurons\)'\], got groups"),
        ({"method": Refill}, "expected method='Refill'"),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else "",
)
def test_differing_settings_are_named_and_nothing_is_changed(kwargs, text, fingerprint):
    state = opened().state_dict()
    again, model, _ = rounds_of(**kwargs)
    before = fingerprint(model)
    with pytest.raises(
        ValueError, match=f"state of rounds: .*{text}.*Build the rounds with the arguments"
    ):
        again.load_state_dict(state)
    assert fingerprint(model) == before
    assert again.round is None


def test_a_state_may_be_loaded_into_a_model_that_is_pruned_already():
    state = opened().state_dict()
    model = mlp()
    apply_mask(model, {"0.weight": torch.eye(8, 4) > 0})
    again, _, _ = rounds_of(model=model)
    again.load_state_dict(state)
    assert same(extract_mask(model)["0.weight"], state["round"]["current_mask"]["0.weight"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("settings",), None),
        (("snapshot", "weights"), None),
        (("snapshot", "buffers"), None),
        (("round", "budgets"), None),
        (("round", "pruner", "start_norm"), None),
        (("round", "current_mask"), None),
    ],
)
def test_a_damaged_state_is_a_clear_error_and_changes_nothing(
    path: tuple[str, ...], value: Any
) -> None:
    model, groups = mlp(), find_groups(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rsst = RSST(model, groups, optimizer=optimizer, steps_per_round=2, rounds=1, rewind="init")
    next(iter(rsst))
    state = copy.deepcopy(rsst.state_dict())
    rsst.round.pruner.detach()
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    fresh = mlp()
    again = RSST(
        fresh,
        groups,
        optimizer=torch.optim.SGD(fresh.parameters(), lr=0.1),
        steps_per_round=2,
        rounds=1,
        rewind="init",
    )
    with pytest.raises((ValueError, TypeError), match=r"state|masks|snapshot"):
        again.load_state_dict(state)
    assert not torch_rsst.is_pruned(fresh)
    assert RegularizedPruner.attached_to(fresh) is None
