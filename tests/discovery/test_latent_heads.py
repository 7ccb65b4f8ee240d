"""Heads of latent attention, as DeepSeek's."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from contract import assert_partition
from decoders import IDS, LATENT, assert_serves, decoder, halved

import torch_rsst


@pytest.mark.parametrize("name", ["DeepseekV3", "DeepseekV2"])
@pytest.mark.parametrize("rank", [12, None])
def test_a_head_has_its_rows_of_queries_keys_and_values(
    name: str, rank: int | None, tmp_path: Path
) -> None:
    model = decoder(name, {**LATENT, "q_lora_rank": rank})
    groups = torch_rsst.find_groups(model, kinds="heads")
    assert_partition(model, groups)
    query = "q_proj" if rank is None else "q_b_proj"
    assert [(m.parameter, m.index[0], len(m.index)) for m in groups[1].members] == [
        (f"model.layers.0.self_attn.{query}.weight", 10, 10),
        ("model.layers.0.self_attn.kv_b_proj.weight", 14, 14),
        ("model.layers.0.self_attn.o_proj.weight", 8, 8),
    ]
    masked, small = halved(model, groups)
    assert small.model.layers[0].self_attn.num_heads == 2
    assert_serves(masked, small, tmp_path)
    batches = [{"input_ids": IDS}]
    refill = torch_rsst.regroup(
        model, groups, importance="variance", batches=batches, forward=lambda m, b: m(**b)
    )
    torch_rsst.reconstruct(
        model, groups, refill, batches=batches, forward=lambda m, b: m(**b).logits
    )
    assert torch_rsst.sparsity_report(model, groups).gone("heads") == 4


def test_the_weights_of_eager_attention_are_those_of_every_head() -> None:
    model = decoder("DeepseekV3", LATENT)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="its eager implementation returns the weights of every"):
        torch_rsst.find_groups(model, kinds="heads")


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_the_models_of_the_page_run_with_the_rotary_width_of_their_keys(name: str) -> None:
    pytest.importorskip("transformers")
    sweep = Path(__file__).parents[2] / "docs" / "sweep_transformers.py"
    model, inputs = runpy.run_path(str(sweep))["build"](name)
    with torch.no_grad():
        assert model.eval()(**inputs).last_hidden_state.isfinite().all()
