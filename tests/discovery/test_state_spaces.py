"""Channels of Mamba, groups of Mamba-2."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import assert_partition
from decoders import IDS, MAMBA, MAMBA2, assert_serves, decoder, halved, size

import torch_rsst


@pytest.mark.parametrize(
    ("name", "options"), [("Mamba", MAMBA), ("FalconMamba", MAMBA), ("Mamba2", MAMBA2)]
)
def test_half_of_the_channels_take_two_fifths_of_a_state_space(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = decoder(name, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch_rsst.UnsupportedModuleWarning)
        groups = torch_rsst.find_groups(model)
    assert_partition(model, groups)
    assert {layer.kind for layer in groups.layers} == {"channels"}
    masked, small = halved(model, groups)
    assert size(small) <= 0.6 * size(model)
    with warnings.catch_warnings():
        if name == "Mamba2":  # transformers cannot read a limit of infinity that it wrote itself
            warnings.filterwarnings("ignore", "The folder does not say how to build")
        assert_serves(masked, small, tmp_path)
    batches = [{"input_ids": IDS}]
    data: dict[str, Any] = {"batches": batches, "forward": lambda m, b: m(**b).logits}
    refill = torch_rsst.regroup(model, groups, importance="variance", **data)
    torch_rsst.reconstruct(model, groups, refill, **data)
    assert torch_rsst.sparsity_report(model, groups).unit_sparsity("channels") == 0.5


def test_a_channel_of_mamba_literally() -> None:
    model = decoder("Mamba", MAMBA)
    groups = torch_rsst.find_groups(model)
    found = {m.parameter.removeprefix("backbone.layers.0.mixer."): m for m in groups[3].members}
    assert {name: (m.dim, m.index, m.ranked) for name, m in found.items()} == {
        "in_proj.weight": (0, (3, 35), True),
        "conv1d.weight": (0, (3,), True),
        "conv1d.bias": (0, (3,), False),
        "dt_proj.weight": (0, (3,), True),
        "dt_proj.bias": (0, (3,), False),
        "A_log": (0, (3,), False),
        "D": (0, (3,), False),
        "x_proj.weight": (1, (3,), True),
        "out_proj.weight": (1, (3,), True),
    }
    assert [name for name, m in found.items() if m.consumes] == [
        "x_proj.weight",
        "out_proj.weight",
    ]


def test_a_group_of_mamba_2_has_its_heads_and_states() -> None:
    model = decoder("Mamba2", MAMBA2)
    groups = torch_rsst.find_groups(model)
    found = {m.parameter.removeprefix("backbone.layers.0.mixer."): m for m in groups[1].members}
    gate, values = tuple(range(8, 16)), tuple(range(40, 48))
    states, heads = (*range(68, 72), *range(84, 88)), (98, 99)
    assert found["in_proj.weight"].index == (*gate, *values, *states, *heads)
    assert found["A_log"].index == (2, 3)
    assert found["norm.weight"].index == found["out_proj.weight"].index == gate
    mixer = halved(model, groups)[1].backbone.layers[0].mixer
    assert (mixer.n_groups, mixer.num_heads, mixer.intermediate_size, mixer.conv_dim) == (2, 4, 16, 32)  # fmt: skip


def test_one_norm_over_all_channels_refuses_mamba_2() -> None:
    model = decoder("Mamba2", {**MAMBA2, "n_groups": 1})
    with pytest.raises(ValueError, match="one norm over all its channels joins them"):
        torch_rsst.find_groups(model, kinds="channels")
    assert torch.equal(model(IDS).logits, model(IDS).logits)
