"""The sparsity report: every number recounted by walking units and entries one by one."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import mlp, wholly_alive
from torch import Tensor, nn

from torch_rsst import (
    RSST,
    Groups,
    Member,
    apply_mask,
    find_groups,
    regroup,
    remove_all,
    sparsity_report,
)
from torch_rsst.groups.groups import GroupLayer
from torch_rsst.masking.mask_sets import extract_mask
from torch_rsst.masking.names import named_weights


class Recount:
    """The facts about a model and its masks, from single Python numbers."""

    def __init__(self, model: nn.Module, refill: dict[str, Tensor] | None) -> None:
        masks = extract_mask(model)
        self.entries: dict[str, dict[tuple[int, ...], tuple[float, bool, bool]]] = {}
        for name, weight in named_weights(model).items():
            self.entries[name] = {}
            for index in torch.ones_like(weight).nonzero().tolist():
                place = tuple(index)
                alive = bool(masks[name][place]) if name in masks else True
                stays = bool(refill[name][place]) if refill and name in refill else True
                self.entries[name][place] = (float(weight[place]), alive, stays)

    def of_unit(self, group: Any, *, ranked_only: bool) -> list[tuple[float, bool, bool]]:
        return [
            entry
            for slab in group.members
            if slab.ranked or not ranked_only
            for place, entry in self.entries[slab.parameter].items()
            if place[slab.dim] in slab.index
        ]

    def of(self, names: Any) -> list[tuple[float, bool, bool]]:
        return [entry for name in names for entry in self.entries[name].values()]


def zero(entry: tuple[float, bool, bool]) -> bool:
    return not entry[1] or entry[0] == 0.0


def norm(entries: Any) -> float:
    return math.sqrt(sum(value**2 for value, _, _ in entries))


def assert_recounted(model: nn.Module, groups: Groups, refill: dict[str, Tensor] | None) -> None:
    report, facts = sparsity_report(model, groups, refill_mask=refill), Recount(model, refill)
    for layer, found in zip(groups.layers, report.layers, strict=True):
        units = [layer.group(unit) for unit in range(layer.units)]
        ranked = [facts.of_unit(unit, ranked_only=True) for unit in units]
        every = [facts.of_unit(unit, ranked_only=False) for unit in units]
        assert (found.name, found.kind, found.units) == (layer.name, layer.kind, layer.units)
        assert found.gone == sum(all(map(zero, entries)) for entries in every)
        assert found.elements == sum(map(len, ranked))
        assert found.zeros == sum(zero(e) for entries in ranked for e in entries)
        shares = [sum(not zero(e) for e in entries) / len(entries) for entries in ranked]
        assert found.alive_share == pytest.approx(shares)
        everything = facts.of(m.parameter for m in layer.members)
        _assert_penalty(found, everything)
        dropped = sum(not any(stays for _, _, stays in entries) for entries in every)
        assert found.dropped == (None if refill is None else dropped)
    masks = extract_mask(model)
    members = {m.parameter for layer in groups.layers for m in layer.members}
    counted = {m.parameter for layer in groups.layers for m in layer.ranked} | (
        masks.keys() - members
    )
    assert report.elements == len(facts.of(counted))
    assert report.zeros == sum(map(zero, facts.of(counted)))
    assert report.element_sparsity == pytest.approx(report.zeros / max(report.elements, 1))
    _assert_penalty(report, facts.of(members | masks.keys() | set(refill or ())))
    for found, name in zip(report.parameters, masks, strict=True):
        entries = facts.of([name])
        assert (found.name, found.in_units) == (name, name in members)
        assert (found.elements, found.zeros) == (len(entries), sum(map(zero, entries)))
        assert found.masked == sum(not alive for _, alive, _ in entries)
        _assert_penalty(found, entries)
    for kind in report.kinds:
        layers = [layer for layer in report.layers if layer.kind == kind]
        assert report.units(kind) == sum(layer.units for layer in layers)
        assert report.gone(kind) == sum(layer.gone for layer in layers)
        assert report.unit_sparsity(kind) == report.gone(kind) / report.units(kind)


def _assert_penalty(found: Any, entries: list[tuple[float, bool, bool]]) -> None:
    p = [e for e in entries if e[1] and not e[2]]
    kept = [e for e in entries if e[1] and e[2]]
    assert found.penalized == len(p)
    assert found.penalized_norm == pytest.approx(norm(p), rel=1e-9)
    assert found.kept_norm == pytest.approx(norm(kept), rel=1e-9)


def random_masks(model: nn.Module, seed: int, share: float) -> dict[str, Tensor]:
    """Masks in which whole units are dead, some entries, and some parameters have none."""
    generator = torch.Generator().manual_seed(seed)
    masks = {
        name: torch.rand(weight.shape, generator=generator) > share
        for name, weight in named_weights(model).items()
        if torch.rand((), generator=generator) > 0.2
    }
    if "0.weight" in masks:
        masks["0.weight"][2] = False
    return masks


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), refilled=st.booleans())
def test_every_number_is_recounted_on_masked_and_on_plain_zeros(seed, share, refilled):
    model = mlp(width=2, hidden=4)
    groups = find_groups(model)
    apply_mask(model, random_masks(model, seed, share))
    refill = regroup(model, groups, amount=0.5) if refilled else None
    assert_recounted(model, groups, refill)
    assert_recounted(model, Groups(()), refill)
    remove_all(model, freeze_zeros=False)
    assert extract_mask(model) == {}
    assert_recounted(model, groups, refill)


def test_every_number_is_recounted_on_a_transformer(tiny_transformer):
    model = tiny_transformer(depth=1, dim=8, num_heads=2, hidden=3)
    groups = find_groups(model)
    apply_mask(model, regroup(model, groups, amount=0.4))
    apply_mask(model, {"head.weight": torch.eye(3, 8)})
    assert_recounted(model, groups, regroup(model, groups, amount=0.7))


def test_a_bias_keeps_a_unit_from_being_gone():
    model = mlp()
    groups = find_groups(model)
    masks = wholly_alive(model)
    masks["0.weight"][3] = False
    masks["2.weight"][:, 3] = False
    apply_mask(model, masks)
    report = sparsity_report(model, groups)
    assert (report.gone("neurons"), report.layers[0].alive_share[3]) == (0, 0.0)
    with torch.no_grad():
        model[0].bias_orig[3] = 0.0
    assert sparsity_report(model, groups).gone("neurons") == 1
    masks["0.bias"][3] = False
    with torch.no_grad():
        model[0].bias_orig[3] = 7.0
    apply_mask(model, masks)
    assert sparsity_report(model, groups).gone("neurons") == 1


def test_a_partially_dead_unit_is_not_gone():
    model = mlp()
    masks = {"0.weight": torch.arange(8)[:, None].expand(8, 4) != 3}
    apply_mask(model, masks)
    report = sparsity_report(model, find_groups(model))
    assert report.gone("neurons") == 0
    assert report.layers[0].alive_share[3] == pytest.approx(2 / 6)
    assert report.zeros == 4


def test_the_report_changes_nothing(fingerprint):
    model = mlp()
    groups = find_groups(model)
    apply_mask(model, regroup(model, groups))
    before = fingerprint(model)
    str(sparsity_report(model, groups, refill_mask=wholly_alive(model)))
    assert fingerprint(model) == before


def test_a_shared_parameter_counts_once_in_the_total():
    member = Member("0.weight", 0, torch.arange(8), ranked=True)
    columns = Member("0.weight", 1, torch.arange(4), ranked=True)
    groups = Groups(
        (
            GroupLayer("rows", "channels", 8, (member,)),
            GroupLayer("cols", "channels", 4, (columns,)),
        )
    )
    report = sparsity_report(mlp(), groups)
    assert [layer.elements for layer in report.layers] == [32, 32]
    assert report.elements == 32
    assert_recounted(mlp(), groups, None)


def test_a_unit_without_ranked_entries_has_share_zero():
    member = Member("0.weight", 0, torch.zeros(8, dtype=torch.int64), ranked=True)
    bias = Member("0.bias", 0, torch.arange(8) // 4, ranked=False)
    groups = Groups((GroupLayer("half", "neurons", 2, (member, bias)),))
    assert sparsity_report(mlp(), groups).layers[0].alive_share == (1.0, 0.0)


# Penalty and budgets


def test_the_norm_ratio_is_penalized_over_kept():
    model = mlp()
    groups = find_groups(model)
    report = sparsity_report(model, groups, refill_mask=regroup(model, groups))
    assert report.penalized_norm_ratio == report.penalized_norm / report.kept_norm
    assert 0 < report.penalized_norm_ratio < 1
    assert report.layers[0].dropped == 4


def test_the_norm_ratio_is_no_number_where_nothing_is_kept():
    model = mlp()
    refill = {name: ~mask for name, mask in wholly_alive(model).items()}
    report = sparsity_report(model, find_groups(model), refill_mask=refill)
    assert math.isnan(report.penalized_norm_ratio)
    assert report.to_dict()["penalized_norm_ratio"] is None


@pytest.mark.parametrize(
    ("kwargs", "requested", "realized"),
    [
        ({"regroup_amount": 0.5}, 4, 4),
        ({"regroup_amount": 1.0, "min_keep": 3}, 0, 3),
        ({"regroup_amount": 0.5, "round_to": 3}, 4, 6),
    ],
)
def test_budgets_say_what_was_requested_and_what_was_realized(kwargs, requested, realized):
    model = mlp()
    groups = find_groups(model)
    report = next(RSST(model, groups, steps_per_round=1, **kwargs)).report()
    (budget,) = report.budgets
    assert (budget.units, budget.requested, budget.realized) == (8, requested, realized)
    assert report.layers[0].dropped == 8 - realized
    line = f"the model: {requested} of 8 neurons were to stay, {realized} do"
    assert (line in str(report)) == (requested != realized)


# As data and as text


def test_to_dict_is_json(tiny_transformer):
    model = tiny_transformer(depth=1)
    rnd = next(RSST(model, find_groups(model), steps_per_round=1))
    report = rnd.report()
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["kinds"]["heads"] == {"units": 4, "gone": 0, "sparsity": 0.0}
    assert [layer["kind"] for layer in data["layers"]] == ["heads", "neurons"]
    assert data["layers"][0]["alive_share"] == list(report.layers[0].alive_share)
    assert data["budgets"][0] == {
        "scope": "blocks.0.attn",
        "kind": "heads",
        "units": 4,
        "requested": 2,
        "realized": 2,
    }


def test_the_text_is_a_table_with_a_row_per_layer_and_totals(tiny_transformer):
    model = tiny_transformer()
    groups = find_groups(model)
    refill = regroup(model, groups, amount=0.5)
    apply_mask(model, {n: m for n, m in refill.items() if "blocks.0" in n})
    report = sparsity_report(model, groups, refill_mask=refill)
    header, rule, *rows, second_rule, total, heads, neurons = str(report).splitlines()
    assert header.split() == [
        *("layer", "kind", "units", "gone", "elements", "sparsity", "penalized", "|P|/|kept|"),
        *("to", "go"),
    ]
    assert rule == second_rule == "─" * len(header)
    assert {len(line) for line in (header, *rows, total)} == {len(header)}
    for row, layer in zip(rows, report.layers, strict=True):
        cells = row.split()
        assert cells[:5] == [
            layer.name, layer.kind, str(layer.units), str(layer.gone), str(layer.elements)
        ]  # fmt: skip
        assert cells[5:7] == [f"{layer.element_sparsity:.1%}", str(layer.penalized)]
        assert float(cells[7]) == pytest.approx(layer.penalized_norm / layer.kept_norm, rel=1e-2)
        assert cells[8] == str(layer.dropped)
    units = sum(layer.units for layer in report.layers)
    gone = report.gone("heads") + report.gone("neurons")
    assert total.split()[:4] == ["total", str(units), str(gone), str(report.elements)]
    assert total.split()[4:6] == [f"{report.element_sparsity:.1%}", str(report.penalized)]
    assert (heads, neurons) == ("heads: 2 of 8 gone (25.0%)", "neurons: 12 of 48 gone (25.0%)")


def test_a_model_that_is_one_layer_has_a_row_with_a_name():
    model = mlp()
    text = str(sparsity_report(model, find_groups(model)))
    assert text.splitlines()[2].startswith("(model)")


# Parameters that no unit has a part in


def test_a_model_without_units_has_a_report_of_its_masked_parameters():
    model = nn.LSTM(2, 3)
    masks = {"weight_ih_l0": torch.arange(24).view(12, 2) < 6}
    apply_mask(model, masks)
    report = sparsity_report(model)
    (found,) = report.parameters
    assert (found.name, found.in_units) == ("weight_ih_l0", False)
    assert (found.elements, found.masked, found.zeros) == (24, 18, 18)
    assert (report.layers, report.elements, report.element_sparsity) == ((), 24, 0.75)
    _, _, row, _, total = str(report).splitlines()
    assert row.split() == ["weight_ih_l0", "weights", "24", "75.0%", "0", "0.00e+00"]
    assert total.split()[:1] + total.split()[3:5] == ["total", "24", "75.0%"]
    assert report.to_dict()["parameters"][0]["masked"] == 18
    assert sparsity_report(nn.Linear(2, 2)).parameters == ()


def test_the_text_lists_masked_parameters_that_no_layer_counts():
    model = mlp()
    apply_mask(model, {name: mask.clone() for name, mask in wholly_alive(model).items()})
    report = sparsity_report(model, find_groups(model))
    assert [p.name for p in report.parameters] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    rows = [line.split()[0] for line in str(report).splitlines()[2:-3]]
    assert rows == ["(model)", "2.bias"]


def test_masks_of_other_values_are_named():
    model = mlp()
    apply_mask(model, wholly_alive(model))
    model[0].weight_mask[0, 0] = 0.5
    with pytest.raises(ValueError, match=r"mask of '0.weight': expected zeros and ones"):
        sparsity_report(model, find_groups(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_number_is_recounted_in_other_dtypes(dtype):
    model = mlp().to(dtype)
    groups = find_groups(mlp())
    apply_mask(model, random_masks(model, 0, 0.3))
    assert_recounted(model, groups, regroup(model, groups))


def test_what_is_masked_may_be_inf_and_what_is_in_several_blocks_is_counted_once(monkeypatch):
    monkeypatch.setattr("torch_rsst.masking.entry_blocks._BLOCK", 6)
    model = mlp()
    groups = find_groups(model)
    masks = random_masks(model, 1, 0.4) | {"0.weight": torch.arange(32).view(8, 4) % 3 != 0}
    apply_mask(model, masks)
    with torch.no_grad():
        model[0].weight_orig[0, 0] = torch.inf
    refill = regroup(model, groups)
    assert_recounted(model, groups, refill)
    assert_recounted(model, groups, None)


def test_groups_and_masks_of_another_model_are_errors():
    model = mlp()
    groups = find_groups(model)
    with pytest.raises(ValueError, match="expected size 8 along dim 0"):
        sparsity_report(mlp(hidden=6), groups)
    with pytest.raises(KeyError, match="mask 'nowhere': expected a parameter of the model"):
        sparsity_report(model, groups, refill_mask={"nowhere": torch.ones(1)})
    with pytest.raises(ValueError, match=r"parameter's shape \(8, 4\), got shape \(1,\)"):
        sparsity_report(model, groups, refill_mask={"0.weight": torch.ones(1)})


@pytest.mark.parametrize("ask", ["units", "gone", "unit_sparsity"])
def test_a_kind_that_nobody_knows_is_an_error(ask):
    report = sparsity_report(mlp(), find_groups(mlp()))
    assert getattr(report, ask)("heads") == 0
    with pytest.raises(ValueError, match="Did you mean 'neurons'"):
        getattr(report, ask)("neuron")
