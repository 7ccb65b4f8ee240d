"""Plans: what they foretell is what compaction gives, and nothing is changed before."""

from __future__ import annotations

import copy
import json
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tiny_models import mlp, same
from torch import Tensor, nn

import torch_rsst
from torch_rsst.compaction.budgets import Plan, PlannedLayer
from torch_rsst.compaction.cost import measure_cost, time_in_turns
from torch_rsst.groups.groups import GroupLayer, Groups


def perceptrons() -> nn.Sequential:
    """Three MLPs of different widths: 12, 20 and 7 neurons."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Sequential(nn.Linear(6, hidden), nn.GELU(), nn.Linear(hidden, 6))
            for hidden in (12, 20, 7)
        )
    )


INPUTS = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
MODEL = perceptrons()
# Without the features between the MLPs, which fall silent where a whole MLP goes.
GROUPS = Groups(torch_rsst.find_groups(MODEL).layers[:3])


def carried_out(model: nn.Module, groups: Groups, plan: Plan) -> nn.Module:
    """A copy of the model after all that a plan leads to."""
    masked = copy.deepcopy(model)
    torch_rsst.apply_mask(masked, torch_rsst.regroup(masked, groups, **plan.arguments))
    return torch_rsst.compact(masked, groups, keep_masks=False)


def assert_foretold(model: nn.Module, groups: Groups, inputs: Any, plan: Plan) -> None:
    dense, cost = (
        measure_cost(model, inputs),
        measure_cost(carried_out(model, groups, plan), inputs),
    )
    assert plan.parameters == (dense.parameters, cost.parameters)
    assert plan.multiply_adds == (dense.multiply_adds, cost.multiply_adds)


def share_at(amount: float, what: str, **options: Any) -> float:
    """The slow way: carry an amount out and count."""
    masked = copy.deepcopy(MODEL)
    torch_rsst.apply_mask(masked, torch_rsst.regroup(masked, GROUPS, amount=amount, **options))
    small, dense = (measure_cost(m, INPUTS) for m in (torch_rsst.compact(masked, GROUPS), MODEL))
    if what == "params":
        return small.parameters / dense.parameters
    return small.multiply_adds / dense.multiply_adds


@settings(max_examples=20)
@given(
    what=st.sampled_from(["macs", "params"]),
    limit=st.floats(0.15, 1.0),
    scope=st.sampled_from(["auto", "layer", "size", "type", "global"]),
    importance=st.sampled_from(["magnitude", "remain"]),
    min_keep=st.integers(0, 2),
    round_to=st.sampled_from([None, 4]),
)
def test_what_is_planned_is_what_comes_and_no_smaller_amount_would_do(
    what: str, limit: float, scope: Any, importance: str, min_keep: int, round_to: int | None
) -> None:
    options = {"scope": scope, "importance": importance, "min_keep": min_keep, "round_to": round_to}
    asked: dict[str, Any] = {"budget": {what: limit}, "example_inputs": INPUTS, **options}
    if share_at(1.0, what, **options) > limit:
        with pytest.raises(ValueError, match="Raise it"):
            torch_rsst.plan(MODEL, GROUPS, **asked)
        return
    plan = torch_rsst.plan(MODEL, GROUPS, **asked)
    assert plan.arguments == {"amount": plan.amount, **options}
    assert_foretold(MODEL, GROUPS, INPUTS, plan)
    assert share_at(plan.amount, what, **options) <= limit
    if plan.amount:
        assert share_at(round(plan.amount * 10_000 - 1) / 10_000, what, **options) > limit


def test_a_plan_written_down() -> None:
    model = mlp(width=4, hidden=8)  # 4·h + h + 2·h + 2 parameters, 6·h multiply-adds
    groups = torch_rsst.find_groups(model)
    plan = torch_rsst.plan(model, groups, budget={"macs": 0.5}, example_inputs=torch.randn(1, 4))
    # The smallest a with 8 − round(8 · a) ≤ 4: Python rounds 3.5 to the even 4.
    assert plan == Plan(
        budget=("macs", 0.5),
        amount=0.4375,
        importance="magnitude",
        scope="layer",
        min_keep=1,
        round_to=None,
        layers=(PlannedLayer("", "neurons", before=8, after=4),),
        parameters=(58, 30),
        multiply_adds=(48, 24),
    )
    assert plan.amounts == {"neurons": 0.4375}
    assert str(plan) == (
        "multiply-adds ≤ 50.0% of the dense model: amount=0.4375\n"
        "the model  neurons        8 →      4\n"
        "parameters: 58 → 30 (51.7%)\n"
        "multiply-adds: 48 → 24 (50.0%)"
    )
    assert str(plan.layers[0]) == "the model: 8 neurons, 4 stay"
    assert json.loads(json.dumps(plan.to_dict())) == {
        "budget": {"macs": 0.5},
        "amount": 0.4375,
        "importance": "magnitude",
        "scope": "layer",
        "min_keep": 1,
        "round_to": None,
        "layers": [{"name": "", "kind": "neurons", "before": 8, "after": 4, "fixed": ""}],
        "parameters": {"before": 58, "after": 30},
        "multiply_adds": {"before": 48, "after": 24},
        "latency": None,
    }


def test_the_whole_budget_needs_no_cut() -> None:
    plan = torch_rsst.plan(MODEL, GROUPS, budget={"params": 1})
    assert plan.amount == 0.0
    assert plan.parameters[0] == plan.parameters[1]


def steady(models: list[nn.Module], inputs: Tensor, *, repeats: int) -> list[list[float]]:
    time_in_turns(models, inputs, repeats=repeats)
    return [[1.0], [0.5]]  # what so small a model takes is chance


@pytest.mark.parametrize("what", ["macs", "params", "latency"])
def test_nothing_is_changed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_rsst.compaction.budgets.time_in_turns", steady)
    model = perceptrons().train()
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, GROUPS, amount=0.25))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    parameters = list(model.parameters())
    torch_rsst.plan(model, GROUPS, budget={what: 1.0}, example_inputs=INPUTS, repeats=3)
    assert list(model.state_dict()) == list(before)
    assert all(same(value, before[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(module.training for module in model.modules())
    assert same(torch.get_rng_state(), state)


@pytest.mark.parametrize("what", ["macs", "params", "latency"])
def test_models_that_hold_tensors_of_a_graph(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_rsst.compaction.budgets.time_in_turns", steady)
    model = mlp()
    model.seen = [model[0](torch.randn(2, 4))]
    plan = torch_rsst.plan(
        model,
        torch_rsst.find_groups(model),
        budget={what: 1.0},
        example_inputs=torch.randn(2, 4),
        repeats=3,
    )
    assert plan.parameters[0] == sum(p.numel() for p in model.parameters())


def test_units_that_are_masked_go_first() -> None:
    model, groups = mlp(), torch_rsst.find_groups(mlp())
    kept = torch.tensor([False, True] * 4)
    masks = {"0.weight": kept[:, None].expand(8, 4), "0.bias": kept, "2.weight": kept.expand(2, 8)}
    torch_rsst.apply_mask(model, masks)
    plan = torch_rsst.plan(model, groups, budget={"macs": 0.5}, example_inputs=torch.randn(1, 4))
    assert plan.layers[0].after == 4
    refill = torch_rsst.regroup(model, groups, **plan.arguments)
    assert same(refill["0.bias"], kept)
    assert_foretold(model, groups, torch.randn(1, 4), plan)


def test_units_whose_weights_are_zero_are_cut_too() -> None:
    model, groups = mlp(), torch_rsst.find_groups(mlp())
    with torch.no_grad():
        model[2].weight[:, :3] = 0.0
        model[0].weight[:3] = 0.0
        model[0].bias[:3] = 0.0
    plan = torch_rsst.plan(model, groups, budget={"params": 1.0}, example_inputs=torch.randn(1, 4))
    assert plan.amount == 0.0
    assert plan.layers[0].after == 5
    assert_foretold(model, groups, torch.randn(1, 4), plan)


def test_layers_that_cannot_be_cut_are_listed_and_counted_whole() -> None:
    first, second, third = GROUPS.layers
    stiff = GroupLayer(**{**vars(first), "fixed": "its forward fixes how many it has"})
    groups = Groups((stiff, second, third))
    plan = torch_rsst.plan(MODEL, groups, budget={"params": 0.6}, example_inputs=INPUTS)
    assert plan.layers[0] == PlannedLayer(
        "0", "neurons", 12, 12, "its forward fixes how many it has"
    )
    assert "0  neurons       12 →     12  stays whole: its forward fixes" in str(plan)
    assert str(plan.layers[0]) == ("0: 12 neurons, all stay: its forward fixes how many it has")
    with pytest.warns(torch_rsst.CompactionWarning):
        assert_foretold(MODEL, groups, INPUTS, plan)


def test_time_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4096), nn.GELU(), nn.Linear(4096, 64))
    groups, inputs = torch_rsst.find_groups(model), torch.randn(64, 64)
    plan = torch_rsst.plan(model, groups, budget={"latency": 0.6}, example_inputs=inputs, repeats=3)
    assert plan.latency is not None
    before, after = plan.latency
    assert after <= 0.6 * before
    assert 0.0 < plan.amount <= 1.0
    assert plan.amount == round(plan.amount, 2)
    assert "latency: " in str(plan)
    assert_foretold(model, groups, inputs, plan)


class Picky(nn.Module):
    """Its shapes depend on values, so that it has to be run."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x[x[:, 0] > 0])
        return out


def test_models_that_read_values() -> None:
    model, inputs = Picky(), torch.eye(4)
    groups = torch_rsst.find_groups(model)
    plan = torch_rsst.plan(model, groups, budget={"macs": 0.5}, example_inputs=inputs)
    assert plan.multiply_adds == (48, 24)
    assert_foretold(model, groups, inputs, plan)


def test_images_are_guessed_one_at_a_time() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 32)
            self.mlp = mlp()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.mlp(self.stem(x).flatten(2).mT)
            return out

    model = Net()
    plan = torch_rsst.plan(model, torch_rsst.find_groups(model), budget={"macs": 1.0})
    one = torch.randn(1, 3, 224, 224)
    assert plan.multiply_adds is not None
    assert plan.multiply_adds[0] == measure_cost(model, one).multiply_adds


def first_go(layer: GroupLayer, weights: object, masks: object) -> Tensor:
    return torch.arange(layer.units)


def test_callables_score_and_are_named() -> None:
    plan = torch_rsst.plan(MODEL, GROUPS, budget={"params": 0.5}, importance=first_go)
    assert plan.arguments["importance"] is first_go
    assert plan.to_dict()["importance"] == "first_go"
    assert plan.multiply_adds is None
    assert "multiply-adds" not in str(plan)


def test_importances_that_need_data_are_measured_before() -> None:
    measured = torch_rsst.measure_importance(MODEL, GROUPS, "activation_l1", batches=[INPUTS])
    plan = torch_rsst.plan(
        MODEL, GROUPS, budget={"macs": 0.5}, example_inputs=INPUTS, importance=measured
    )
    assert_foretold(MODEL, GROUPS, INPUTS, plan)
    with pytest.raises(ValueError, match="expected batches to run on, got none"):
        torch_rsst.plan(MODEL, GROUPS, budget={"params": 0.5}, importance="activation_l1")


# MODEL has 13·39 + 18 parameters, of which 13 go with each neuron.
MANY = "{'macs': 0.5} or {'params': 0.5} or {'latency': 0.5}"
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": (
        {"budget": {"flops": 0.5}},
        ValueError,
        "budget: expected one of 'macs', 'params', 'latency', got 'flops'. Did you mean 'macs'?",
    ),
    "nonsense": (
        {"budget": {3: 0.5}},
        ValueError,
        "budget: expected one of 'macs', 'params', 'latency', got 3. Choose one of these.",
    ),
    "another library's word": (
        {"budget": {"gflops": 0.5}},
        ValueError,
        "budget: expected one of 'macs', 'params', 'latency', got 'gflops'. Did you mean 'macs'?",
    ),
    "mistyped": (
        {"budget": {"parameters": 0.5}},
        ValueError,
        "budget: expected one of 'macs', 'params', 'latency', got 'parameters'. Did you mean 'params'?",
    ),
    "no dict": (
        {"budget": 0.5},
        TypeError,
        f"budget: expected a dict, {MANY}, got 0.5. The number is a fraction of the dense model.",
    ),
    "none": (
        {"budget": {}},
        TypeError,
        f"budget: expected one limit, {MANY}, got {{}}. The number is a fraction of the dense model.",
    ),
    "two": (
        {"budget": {"macs": 0.5, "params": 0.5}},
        TypeError,
        f"budget: expected one limit, {MANY}, got {{'macs': 0.5, 'params': 0.5}}. "
        "Plan for each of them; the largest amount of the plans meets them all.",
    ),
    "text": (
        {"budget": {"macs": "half"}},
        TypeError,
        "budget['macs']: expected a number above 0, up to 1, got 'half'. "
        "The number is a fraction of the dense model.",
    ),
    "a bool": (
        {"budget": {"macs": True}},
        TypeError,
        "budget['macs']: expected a number above 0, up to 1, got True. "
        "The number is a fraction of the dense model.",
    ),
    "zero": (
        {"budget": {"params": 0.0}},
        ValueError,
        "budget['params']: expected a fraction above 0, up to 1, got 0.0. "
        "The number is a fraction of the dense model.",
    ),
    "above one": (
        {"budget": {"params": 1.5}},
        ValueError,
        "budget['params']: expected a fraction above 0, up to 1, got 1.5. "
        "The number is a fraction of the dense model.",
    ),
    "out of reach": (
        {"budget": {"params": 0.1}},
        ValueError,
        "budget['params']: expected at least 0.1086, the share of the parameters with 1 unit(s) left in "
        "each layer, got 0.1. Raise it, lower min_keep, or find more groups.",
    ),
    "nothing left": (
        {"budget": {"params": 0.01}, "min_keep": 0},
        ValueError,
        "budget['params']: expected at least 0.0343, the share of the parameters without any unit, "
        "got 0.01. Raise it, or find more groups.",
    ),
    "no example": (
        {"budget": {"macs": 0.5}},
        ValueError,
        "plan: expected an example to run on, got none, and no guess that the model runs on. "
        "Pass example_inputs: a tensor, a tuple or a dict of arguments for the model.",
    ),
    "few repeats": (
        {"budget": {"params": 0.5}, "repeats": 1},
        ValueError,
        "repeats: expected an int >= 3, got 1. Pass 3 or more.",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "text"), BAD.values(), ids=BAD)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        torch_rsst.plan(MODEL, GROUPS, **arguments)
    assert str(raised.value) == text


def test_the_largest_amount_meets_several_budgets() -> None:
    limits = {"macs": 0.5, "params": 0.45}
    plans = [
        torch_rsst.plan(MODEL, GROUPS, budget={what: limit}, example_inputs=INPUTS)
        for what, limit in limits.items()
    ]
    amount = max(plan.amount for plan in plans)
    assert all(share_at(amount, what) <= limit for what, limit in limits.items())


def test_groups_of_another_model() -> None:
    with pytest.raises(KeyError) as raised:
        torch_rsst.plan(mlp(), GROUPS, budget={"params": 0.5})
    assert str(raised.value) == (
        "groups of 0 (12 neurons): '0.0.weight': expected a parameter of the model, got no such name. "
        "Find the groups of this very model: find_groups(model)."
    )


def test_an_example_that_does_not_fit_raises_what_the_model_raises() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        torch_rsst.plan(MODEL, GROUPS, budget={"macs": 0.5}, example_inputs=torch.randn(2, 5))


@pytest.mark.needs_timm
@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_vision_transformer(what: str, scope: Any) -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=6, num_classes=3
    )
    groups, inputs = torch_rsst.find_groups(model), torch.randn(2, 3, 16, 16)
    plan = torch_rsst.plan(model, groups, budget={what: 0.6}, scope=scope, example_inputs=inputs)
    assert [layer.kind for layer in plan.layers] == ["heads", "neurons"] * 3
    assert plan.amounts == {"heads": plan.amount, "neurons": plan.amount}
    assert_foretold(model, groups, inputs, plan)
