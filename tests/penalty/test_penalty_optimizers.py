"""Several optimizers: each penalizes what it updates, in its own step, at its own count."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from multipliers import STRENGTH, attach, check_multiplier, loss_of, penalized
from tiny_models import mlp, same, weights_of
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from torch_rsst import RSST, InertPenaltyWarning, Refill, RoundWarning, find_groups
from torch_rsst.penalty.regularizer import RegularizedPruner

LAYERS = ("0.weight", "2.weight")


def two(model: nn.Module, *makes: Any, lr: float = 1.0) -> list[Optimizer]:
    """One optimizer a layer; SGD unless asked otherwise."""
    makes = makes or (SGD, SGD)
    return [make(model[i].parameters(), lr=lr) for i, make in zip((0, 2), makes, strict=True)]


def zero_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


# What each of them does


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("mode", ["coupled", "decoupled", "auto"])
@pytest.mark.parametrize("as_sequence", [list, tuple])
def test_each_penalizes_its_own_part_once(order, mode, as_sequence, record_property):
    runs = []
    for penalty in (True, False):
        model = mlp().double()
        before = weights_of(model)
        # Without a gradient both optimizers move a weight by nothing but the penalty.
        optimizers = two(model, SGD, lambda p, lr: AdamW(p, lr=lr, weight_decay=0.0))
        if mode == "coupled":
            optimizers = two(model)
        pruner = attach(model, optimizer=as_sequence(optimizers), mode=mode) if penalty else None
        zero_gradients(model)
        for index in order:
            optimizers[index].step()
        if pruner is not None:
            assert pruner.steps == 1
            assert pruner.mode == mode
            pruner.detach()
        runs.append(weights_of(model))
    after, plain = runs
    measured = {n: (plain[n] - after[n]) / (STRENGTH * before[n]) for n in LAYERS}
    decided = dict.fromkeys(LAYERS, mode)
    if mode == "auto":
        decided = dict(zip(LAYERS, ("coupled", "decoupled"), strict=True))
    for name in LAYERS:
        case = f"two optimizers, order {order}, {name}{', auto' * (mode == 'auto')}"
        check_multiplier(record_property, case, decided[name], {name: measured[name]})


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_one_scaler_serves_them_all(mode, fused, unscale, record_property):
    runs = []
    for penalty in (True, False):
        model = mlp().double()
        before = weights_of(model)
        optimizers = [SGD(model[i].parameters(), lr=1.0, fused=fused) for i in (0, 2)]
        pruner = attach(model, optimizer=optimizers, mode=mode) if penalty else None
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(loss_of(model, 0)).backward()
        for optimizer in optimizers:
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        if pruner is not None:
            assert pruner.steps == 1
            pruner.detach()
        runs.append(weights_of(model))
    after, plain = runs
    base = before if mode == "coupled" else plain
    measured = {n: (plain[n] - after[n]) / (STRENGTH * base[n]) for n in LAYERS}
    case = f"two optimizers, scaled{', unscaled' * unscale}{', fused' * fused}"
    check_multiplier(record_property, case, mode, measured)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_step_skipped_for_one_of_them_is_skipped_for_it_alone(mode):
    model = mlp().double()
    before, optimizers = weights_of(model), two(model)
    pruner = attach(model, optimizer=optimizers, mode=mode, total_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # a scaler is made when it is first used
    zero_gradients(model)
    model[0].weight.grad[0, 1] = torch.inf
    for optimizer in optimizers:
        scaler.step(optimizer)
    assert pruner.state_dict()["optimizer_steps"] == [0, 1]
    after = weights_of(model)
    assert same(after["0.weight"], before["0.weight"])
    assert not same(after["2.weight"], before["2.weight"])
    pruner.detach()


def test_auto_mode_is_decided_for_each():
    model = mlp().double()
    before, optimizers = weights_of(model), two(model, SGD, AdamW, lr=0.0)
    pruner = attach(model, optimizer=optimizers)
    assert pruner.mode == "auto"
    zero_gradients(model)
    for optimizer in optimizers:
        optimizer.step()
    after, goes = weights_of(model), penalized(model)
    # Coupled: in the gradient, of which a learning rate of 0 makes nothing.
    assert same(after["0.weight"], before["0.weight"])
    torch.testing.assert_close(
        model[0].weight.grad[goes["0.weight"]], STRENGTH * before["0.weight"][goes["0.weight"]]
    )
    # Decoupled: in the weight.
    assert same(model[2].weight.grad, torch.zeros_like(before["2.weight"]))
    torch.testing.assert_close(
        after["2.weight"], before["2.weight"] * (1 - STRENGTH * goes["2.weight"].double())
    )
    pruner.detach()


@pytest.mark.parametrize("makes", [(SGD, SGD), (AdamW, AdamW), (SGD, AdamW)])
def test_the_mode_is_theirs_where_they_agree(makes):
    model = mlp()
    pruner = attach(model, optimizer=two(model, *makes))
    expected = {(SGD, SGD): "coupled", (AdamW, AdamW): "decoupled", (SGD, AdamW): "auto"}[makes]
    assert pruner.mode == expected
    pruner.detach()


def shrunk_by(mode: str, steps: int) -> float:
    """What is left of a weight after so many steps of a linear schedule over 4, at strength 0.4."""
    return math.prod(1 - 0.4 * min(1.0, k / 4) for k in range(1, steps + 1))


@given(
    turns=st.lists(st.integers(0, 1), max_size=12), mode=st.sampled_from(["coupled", "decoupled"])
)
def test_the_strength_follows_the_steps_of_each_whatever_their_order(turns, mode):
    model = mlp().double()
    before, optimizers = weights_of(model), two(model)
    pruner = attach(model, optimizer=optimizers, mode=mode, total_steps=4, strength=0.4)
    for index in turns:
        zero_gradients(model)
        optimizers[index].step()
        done = min(1.0, (pruner.steps + 1) / 4)
        assert pruner.strength == pytest.approx(0.4 * done, rel=1e-12)
    counts = [turns.count(0), turns.count(1)]
    assert pruner.steps == min(counts)
    for name, count in zip(LAYERS, counts, strict=True):
        goes = penalized(model)[name]
        left = torch.where(goes, before[name] * shrunk_by(mode, count), before[name])
        torch.testing.assert_close(weights_of(model)[name], left, rtol=1e-12, atol=0)
    pruner.detach()


def test_an_optimizer_of_one_parameter_may_step_as_soon_as_its_gradient_is_there():
    model = mlp().double()
    before = weights_of(model)
    optimizers = {p: SGD([p], lr=1.0) for p in model.parameters()}
    pruner = attach(model, optimizer=list(optimizers.values()), block_loss_grad=True)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    loss_of(model, 0).backward()
    assert pruner.steps == 1
    for name, goes in penalized(model).items():
        left = weights_of(model)[name][goes]
        torch.testing.assert_close(left, (1 - STRENGTH) * before[name][goes])
    pruner.detach()


def test_an_optimizer_without_penalized_parameters_counts_too():
    model = mlp()
    optimizers = [SGD([model[0].weight, model[2].weight], lr=0.1), SGD([model[0].bias], lr=0.1)]
    pruner = attach(model, optimizer=optimizers)
    zero_gradients(model)
    optimizers[0].step()
    assert pruner.steps == 0
    optimizers[1].step()
    assert pruner.steps == 1
    pruner.detach()


def test_a_step_within_a_step_of_another_optimizer_is_a_step_of_its_own():
    model = mlp().double()
    before, (outer, inner) = weights_of(model), two(model)
    pruner = attach(model, optimizer=[outer, inner])

    def closure() -> Tensor:
        zero_gradients(model)
        inner.step()
        return torch.zeros(())

    outer.step(closure)
    assert pruner.state_dict()["optimizer_steps"] == [1, 1]
    for name, goes in penalized(model).items():
        left = before[name] * (1 - STRENGTH * goes.double())
        torch.testing.assert_close(weights_of(model)[name], left, rtol=1e-12, atol=0)
    pruner.detach()


def test_a_step_called_by_another_method_of_the_optimizer_is_a_step():
    class Advancing(SGD):
        def advance(self) -> None:
            self.zero_grad(set_to_none=False)
            self.step()

    model = mlp().double()
    before, optimizer = weights_of(model), Advancing(model.parameters(), lr=1.0)
    pruner = attach(model, optimizer=optimizer)
    zero_gradients(model)
    optimizer.advance()
    assert pruner.steps == 1
    for name, goes in penalized(model).items():
        left = before[name] * (1 - STRENGTH * goes.double())
        torch.testing.assert_close(weights_of(model)[name], left, rtol=1e-12, atol=0)
    pruner.detach()


def test_further_arguments_of_a_step_reach_it():
    class Curious(SGD):
        def step(self, closure: Any, *further: Any, **named: Any) -> Any:
            closure()
            return further, named

    model = mlp()
    optimizer = Curious(model.parameters(), lr=0.1)
    pruner = attach(model, optimizer=optimizer)
    zero_gradients(model)
    assert optimizer.step(lambda: None, 1, 2, three=3) == ((1, 2), {"three": 3})
    assert optimizer.step(closure=lambda: None, three=3) == ((), {"three": 3})
    assert model[0].weight.grad.any()
    assert pruner.steps == 2
    pruner.detach()


def test_removing_frees_all_of_them():
    model = mlp()
    optimizers = two(model)
    pruner = attach(model, optimizer=optimizers)
    pruner.remove()
    for optimizer in optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


def test_a_step_of_only_one_of_them_is_a_step_for_the_warning():
    model = mlp()
    optimizers = two(model, lr=0.0)
    pruner = attach(model, optimizer=optimizers, total_steps=4)
    zero_gradients(model)
    optimizers[1].step()
    with pytest.warns(InertPenaltyWarning, match=r"in 1 of 4 steps \(mode 'coupled', last stren"):
        pruner.remove()


# Which of them


def test_a_parameter_in_none_of_them_is_an_error():
    model = mlp()
    with pytest.raises(
        ValueError,
        match=r"^optimizer: expected every penalized parameter in its groups, got none of "
        r"'2\.weight'\. Make it from model\.parameters\(\), before or after pruning; pass several "
        r"optimizers as one list\.$",
    ):
        attach(model, optimizer=[two(model)[0]])
    assert RegularizedPruner.attached_to(model) is None


def test_a_parameter_in_two_of_them_is_an_error():
    model = mlp()
    optimizers = [*two(model), SGD([model[2].weight], lr=0.1)]
    with pytest.raises(
        ValueError,
        match=r"^optimizer: expected every penalized parameter in one optimizer, got several with "
        r"'2\.weight'\. Each of them would penalize it: pass only the one that should\.$",
    ):
        attach(model, optimizer=optimizers)
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in optimizers)
    attach(model, optimizer=optimizers[:2]).detach()


def test_the_same_optimizer_twice_is_an_error():
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"got several with '0\.weight', '2\.weight'"):
        attach(model, optimizer=[optimizer, optimizer])


def test_no_optimizer_in_a_list_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"^optimizer: expected at least one, got an empty sequence\. Pass None to call "
        r"pruner\.step\(\) yourself\.$",
    ):
        attach(mlp(), optimizer=[])


@pytest.mark.parametrize("wrong", ["sgd", [None], {}])
def test_what_is_no_optimizer_is_an_error(wrong):
    got = "NoneType" if wrong == [None] else type(wrong).__name__
    with pytest.raises(
        TypeError,
        match=rf"^optimizer: expected a torch optimizer, got {got}\. Pass for example "
        rf"torch\.optim\.AdamW\(model\.parameters\(\)\)\.$",
    ):
        attach(mlp(), optimizer=wrong)


def test_each_may_be_inside_a_wrapper():
    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    model = mlp()
    optimizers = two(model)
    pruner = attach(model, optimizer=[Wrapper(Wrapper(optimizers[0])), optimizers[1]])
    for optimizer in optimizers:
        optimizer.step()
    assert pruner.steps == 1
    pruner.detach()


def test_an_optimizer_that_holds_another_carries_the_penalty_itself():
    model = mlp()
    outer, inner = (SGD(model.parameters(), lr=0.1) for _ in range(2))
    outer.optimizer = inner
    pruner = attach(model, optimizer=outer)
    outer.step()
    assert (pruner.steps, len(inner._optimizer_step_pre_hooks)) == (1, 0)
    pruner.detach()


# State


def stepped(model: nn.Module, pruner: RegularizedPruner, optimizers: list[Optimizer]) -> None:
    """Three steps of the first, one of the second."""
    for index in (0, 1, 0, 0):
        optimizers[index].zero_grad()
        loss_of(model, index).backward()
        optimizers[index].step()


@pytest.mark.parametrize("attach_first", [True, False])
def test_a_state_of_several_continues_exactly(attach_first):
    model = mlp().double()
    optimizers = two(model, SGD, AdamW, lr=0.01)
    pruner = attach(model, optimizer=optimizers, total_steps=5)
    stepped(model, pruner, optimizers)
    state = copy.deepcopy(pruner.state_dict())
    assert (state["steps"], state["optimizer_steps"]) == (1, [3, 1])

    again = mlp().double()
    again.load_state_dict(model.state_dict())
    others = two(again, SGD, AdamW, lr=0.01)
    for optimizer, other in zip(optimizers, others, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = attach(again, optimizer=others if attach_first else None, total_steps=5)
    resumed.load_state_dict(state)
    if not attach_first:
        assert resumed.steps == 1
        resumed.attach(others)
    assert resumed.state_dict() == state
    stepped(model, pruner, optimizers)
    stepped(again, resumed, others)
    assert pruner.state_dict() == resumed.state_dict()
    assert pruner.state_dict()["optimizer_steps"] == [6, 2]
    assert all(same(w, weights_of(again)[n]) for n, w in weights_of(model).items())
    pruner.detach(), resumed.detach()


def test_a_state_is_a_copy():
    model = mlp()
    optimizers = two(model)
    pruner = attach(model, optimizer=optimizers)
    state = pruner.state_dict()
    optimizers[0].step()
    assert state["optimizer_steps"] == [0, 0]
    pruner.load_state_dict(state)
    optimizers[0].step()
    assert state["optimizer_steps"] == [0, 0]
    pruner.detach()


def test_the_state_of_one_count_holds_for_each():
    by_hand = attach(linear_pair := mlp(), total_steps=9)
    for _ in range(3):
        by_hand.step()
    by_hand.attach(two(linear_pair))
    assert by_hand.state_dict()["optimizer_steps"] == [3, 3]
    by_hand.detach()


def test_steps_by_hand_count_for_all_that_a_state_had():
    model = mlp()
    pruner = attach(model, optimizer=two(model), total_steps=9)
    state = {**pruner.state_dict(), "optimizer_steps": [3, 1]}
    pruner.detach()
    by_hand = attach(model, total_steps=9)
    by_hand.load_state_dict(state)
    by_hand.step()
    assert by_hand.state_dict()["optimizer_steps"] == [4, 2]
    by_hand.reset()
    assert by_hand.state_dict()["optimizer_steps"] == [0, 0]
    by_hand.detach()


@pytest.mark.parametrize("attach_first", [True, False])
def test_the_state_of_another_number_of_optimizers_is_refused(attach_first):
    model = mlp()
    state = {**attach(mlp()).state_dict(), "optimizer_steps": [3, 1]}
    optimizer = SGD(model.parameters(), lr=0.1)
    pruner = attach(model, optimizer=optimizer if attach_first else None)

    def load_and_attach() -> None:
        pruner.load_state_dict(state)
        pruner.attach(optimizer)

    with pytest.raises(
        ValueError,
        match=r"^state of RegularizedPruner: expected one with 1 optimizer\(s\), got one with 2\. "
        r"Attach as many as the saved one had, in the same order\.$",
    ):
        load_and_attach()
    assert bool(optimizer._optimizer_step_pre_hooks) == attach_first
    pruner.detach()


# Rounds


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("method", [RSST, Refill])
def test_rounds_of_several_optimizers_resume_exactly(method, inside):
    def build() -> tuple[nn.Module, list[Optimizer], Any]:
        model = mlp()
        optimizers = two(model, SGD, AdamW, lr=0.01)
        settings: dict[str, Any] = {"steps_per_round": 3, "rounds": 2, "regroup_amount": 0.5}
        given = None if inside else optimizers
        return model, optimizers, method(model, find_groups(model), optimizer=given, **settings)

    def step(model: nn.Module, optimizers: list[Optimizer], number: int, which: Any) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, number).backward()
        for index in which:
            optimizers[index].step()

    def finish(model: nn.Module, optimizers: list[Optimizer], rounds: Any) -> None:
        for rnd in rounds:
            if inside:
                rnd.attach(optimizers)
            if rnd.start_step:
                step(model, optimizers, 99, [1])
            for number in range(rnd.start_step + bool(rnd.start_step), 3):
                step(model, optimizers, 10 * rnd.index + number, [0, 1])
        rounds.finalize()

    model, optimizers, rounds = build()
    rnd = next(rounds)
    if inside:
        rnd.attach(optimizers)
    step(model, optimizers, 0, [0, 1])
    step(model, optimizers, 1, [0])
    assert rnd.pruner.steps == 1
    saved = copy.deepcopy(
        [rounds.state_dict(), model.state_dict(), *(o.state_dict() for o in optimizers)]
    )
    ends = []
    for _ in range(2):
        model, optimizers, rounds = build()
        for part, state in zip([rounds, model, *optimizers], copy.deepcopy(saved), strict=True):
            part.load_state_dict(state)
        finish(model, optimizers, rounds)
        ends.append(weights_of(model))
    assert all(same(w, ends[1][n]) for n, w in ends[0].items())
    assert rounds.round.pruner.state_dict()["optimizer_steps"] == [3, 3]


def test_a_round_closes_early_where_one_optimizer_is_behind():
    model = mlp()
    optimizers = two(model)
    rsst = RSST(
        model, find_groups(model), optimizer=optimizers, steps_per_round=2, rounds=1, strength=0.9
    )
    next(rsst)
    for index in (0, 0, 1):
        optimizers[index].step()
    with pytest.warns(RoundWarning, match="Round 0 closed after 1 of steps_per_round=2"):
        rsst.finalize(force=True)


def test_rounds_refuse_the_state_of_other_optimizers_and_stay_as_they_are(fingerprint):
    model = mlp()
    rsst = RSST(model, find_groups(model), optimizer=two(model), steps_per_round=2)
    next(rsst)
    state = rsst.state_dict()
    rsst.round.pruner.detach()
    other = mlp()
    one = RSST(other, find_groups(other), optimizer=SGD(other.parameters()), steps_per_round=2)
    before = fingerprint(other)
    with pytest.raises(ValueError, match=r"expected one with 1 optimizer\(s\), got one with 2"):
        one.load_state_dict(state)
    assert fingerprint(other) == before


def test_rounds_name_what_is_no_optimizer_at_once():
    model = mlp()
    with pytest.raises(TypeError, match="optimizer: expected a torch optimizer, got str"):
        RSST(model, find_groups(model), optimizer=[*two(model), "sgd"], steps_per_round=1)
