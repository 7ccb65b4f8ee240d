"""Inner neurons of experts: found, the same number in each, exact, measured, accounted for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import assert_partition, difference
from decoders import IDS, LATENT, MIXTRAL, ROUTED, assert_serves, decoder, halved, size
from torch import Tensor, nn

import torch_rsst
from torch_rsst.groups.groups import GroupLayer, Groups, as_groups
from torch_rsst.importance.weights import magnitude
from torch_rsst.masking.names import named_weights

BATCHES = [{"input_ids": torch.randint(2, 15, (8, 8), generator=torch.Generator().manual_seed(i))} for i in range(2)]  # fmt: skip


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(**batch).logits


def experts_of(groups: Groups) -> list[GroupLayer]:
    return [layer for layer in groups.layers if layer.name.endswith("experts")]


@pytest.mark.parametrize(("name", "options"), [("Mixtral", MIXTRAL), ("Qwen3Moe", ROUTED)])
def test_half_of_the_neurons_of_experts_take_two_fifths_of_a_mixture(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = decoder(name, options)
    groups = torch_rsst.find_groups(model)
    assert_partition(model, groups)
    masked, small = halved(model, groups.of_kind("neurons"))
    assert size(small) <= 0.6 * size(model)
    assert_serves(masked, small, tmp_path)
    assert_serves(*halved(model, groups), tmp_path)
    again = torch_rsst.find_groups(small)
    assert [layer.units * 2 for layer in experts_of(again)] == [
        layer.units for layer in experts_of(groups)
    ]
    assert_serves(*halved(small, again), tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("Qwen2Moe", {**ROUTED, "shared_expert_intermediate_size": 20}, 4),
        ("DeepseekV3", LATENT, 3),
        ("GptOss", MIXTRAL, 2),
        ("Llama4", {**MIXTRAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 40, "head_dim": 4}, 4),
        ("GraniteMoe", MIXTRAL, 2),
    ],
)  # fmt: skip
def test_layouts_of_experts_and_shared_ones(
    name: str, options: dict[str, Any], layers: int
) -> None:
    if name == "Llama4":
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**options))
        model = model.double().eval()
    else:
        model = decoder(name, options)
    groups = torch_rsst.find_groups(model, on_unsupported="ignore").of_kind("neurons")
    assert len(groups.layers) == layers
    masked, small = halved(model, groups)
    inputs = {"input_ids": IDS, "use_cache": False}
    assert difference(model, masked, inputs) > 1e-3
    assert difference(masked, small, inputs) <= 1e-12


def test_grouped_products_run_on_what_is_left() -> None:
    model = decoder("Mixtral", MIXTRAL, single=True)
    assert model.config._experts_implementation == "grouped_mm"
    groups = torch_rsst.find_groups(model)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.3))
    small = torch_rsst.compact(model, groups)
    assert (
        small.model.layers[0].mlp.experts.down_proj.shape[2] == 36
    )  # 34 would make no rows of 16 bytes
    assert small.model.layers[0].mlp.experts.intermediate_dim == 36
    assert difference(model, small, {"input_ids": IDS}) <= 1e-5


@pytest.mark.parametrize("scope", ["layer", "type", "global"])
def test_as_many_neurons_stay_in_each_expert_and_the_best_of_it(scope: Any) -> None:
    model = decoder("Mixtral", MIXTRAL)
    groups = torch_rsst.find_groups(model).of_kind("neurons")
    refill = torch_rsst.regroup(model, groups, amount=0.5, scope=scope)
    left = []
    for layer in groups.layers:
        stays = refill[f"{layer.name}.down_proj"].any(1)
        assert len(set(stays.sum(1).tolist())) == 1
        left.append(int(stays[0].sum()))
        scores = magnitude(layer, named_weights(model), {}).view(4, 48)
        for own, kept in zip(scores, stays, strict=True):
            assert own[kept].min() > own[~kept].max()
    assert sum(left) == 48
    rounds = torch_rsst.Refill(model, groups, steps_per_round=1, rounds=1, amount=0.3, scope=scope)
    opened = next(iter(rounds))
    assert [budget.units for budget in opened.report().budgets] == {"layer": [48, 48]}.get(scope, [96])  # fmt: skip
    assert "score" in str(opened.report().explain(groups.layers[0].name, 3))


def test_a_choice_of_units_has_as_many_of_each_expert() -> None:
    model = decoder("Mixtral", MIXTRAL)
    (layer, _) = experts_of(torch_rsst.find_groups(model))
    unit = layer.group(50)
    assert [(s.parameter.rpartition(".")[2], s.stack, s.index) for s in unit.members] == [
        ("gate_up_proj", (1, 4), (2, 50)),
        ("down_proj", (1, 4), (2,)),
    ]
    some = as_groups([layer.group(48 * expert + 5) for expert in range(4)])
    refill = torch_rsst.regroup(model, some, amount=1.0, min_keep=0)
    assert (~refill[f"{layer.name}.down_proj"]).any(1).nonzero().tolist() == [[e, 5] for e in range(4)]  # fmt: skip
    with pytest.raises(ValueError, match="as many units of each, got different numbers"):
        torch_rsst.regroup(model, [layer.group(0)], amount=1)
    one = {f"{layer.name}.down_proj": torch.ones(4, 16, 48, dtype=torch.bool)}
    one[f"{layer.name}.down_proj"][0, :, :9] = False
    one[f"{layer.name}.gate_up_proj"] = torch.ones(4, 96, 16, dtype=torch.bool)
    one[f"{layer.name}.gate_up_proj"][0, :9] = False
    one[f"{layer.name}.gate_up_proj"][0, 48:57] = False
    torch_rsst.apply_mask(model, one)
    reason = "9 of model.layers.0.mlp.experts .192 neurons.: as many are left of each"
    with pytest.warns(torch_rsst.CompactionWarning, match=reason):
        small = torch_rsst.compact(model, as_groups([layer]), keep_masks=False)
    assert size(small) == size(model), "the other experts have no unit to go along"


def test_scores_on_data_are_those_of_each_experts_inputs() -> None:
    model = decoder("Mixtral", MIXTRAL)
    groups = torch_rsst.find_groups(model).of_kind("neurons")
    layer = groups.layers[0]
    experts, seen = model.get_submodule(layer.name), []
    handle = experts.register_forward_pre_hook(lambda _, given: seen.append(given))
    with torch.no_grad():
        for batch in BATCHES:
            forward(model, batch)
    handle.remove()
    wanted = torch.zeros(4, 48, dtype=torch.float64)
    for expert in range(4):
        tokens = torch.cat([x[(chosen == expert).any(1)] for x, chosen, _ in seen])
        gate, up = (tokens @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        wanted[expert] = (nn.functional.silu(gate) * up).abs().mean(0).detach()
    for single in (False, True):
        model.config._experts_implementation = "grouped_mm" if single else "eager"
        run = model.float() if single else model
        found = torch_rsst.measure_importance(
            run, groups, "activation_l1", batches=BATCHES, forward=forward
        )
        scores = found(layer, named_weights(run), {}).view(4, 48)
        torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5 if single else 1e-12)
        assert model.config._experts_implementation == ("grouped_mm" if single else "eager")


@pytest.mark.parametrize("name", ["GptOss", "Qwen2Moe"])
@pytest.mark.parametrize("importance", ["variance", "taylor"])
def test_other_statistics_and_layouts_are_measured_under_masks(name: str, importance: str) -> None:
    options = MIXTRAL if name == "GptOss" else {**ROUTED, "shared_expert_intermediate_size": 20}
    model = decoder(name, options)
    groups = torch_rsst.find_groups(model, on_unsupported="ignore").of_kind("neurons")
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.25))
    data: dict[str, Any] = {"batches": BATCHES, "forward": forward}
    if importance == "taylor":
        data["loss_fn"] = lambda output, _: output.square().mean()
    found = torch_rsst.measure_importance(model, groups, importance, **data)
    for layer in experts_of(groups):
        scores = found(layer, named_weights(model), {}).view(4, -1)
        assert (scores == 0).sum(1).tolist() == [scores.shape[1] // 4] * 4
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, importance=importance, **data))
    small = torch_rsst.compact(model, groups)
    assert difference(model, small, {"input_ids": IDS}) <= 1e-12


def test_what_cannot_be_measured_or_refitted_is_refused_by_name() -> None:
    model = decoder("Mixtral", MIXTRAL)
    groups = torch_rsst.find_groups(model).of_kind("neurons")
    few = [{"input_ids": IDS[:1, :1]}]
    with pytest.raises(ValueError, match=r"experts.*every expert needs tokens"):
        torch_rsst.measure_importance(model, groups, "variance", batches=few, forward=forward)
    refill = torch_rsst.regroup(model, groups, amount=0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"experts.down_proj.*got that of a MixtralExperts"):
        torch_rsst.reconstruct(model, groups, refill, batches=BATCHES, forward=forward)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_whole_experts_are_named_as_left_with_their_share() -> None:
    model = decoder("Qwen3Moe", ROUTED)
    groups = torch_rsst.find_groups(model)
    left = [whole for whole in groups.whole if whole.role == "left"]
    assert [whole.name for whole in left] == [f"model.layers.{i}.mlp.gate" for i in range(2)]
    share = sum(p.numel() for n, p in model.named_parameters() if "layers.0.mlp.experts" in n)
    assert left[0].reason == (
        f"it routes to 4 whole experts ({share / size(model):.1%} of the parameters), without one of which "
        "the routing would change; neurons within them can go"
    )
