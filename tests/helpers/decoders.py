"""Tiny decoders of transformers with random weights: cut, run, generated with, saved and loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import difference, randomize
from torch import nn

import torch_rsst

TOKENS = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES = {**TOKENS, "hidden_size": 16, "num_hidden_layers": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MIXTURE = {**SIZES, **ATTENTION, "intermediate_size": 48, "num_experts_per_tok": 2}
ROUTED = {**MIXTURE, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 4}
MIXTRAL = {**MIXTURE, "num_local_experts": 4}
LATENT = {
    **MIXTURE,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MAMBA = {**SIZES, "state_size": 4}
MAMBA2 = {**MAMBA, "expand": 2, "num_heads": 8, "head_dim": 4, "chunk_size": 4, "n_groups": 4}
IDS = torch.arange(12).view(2, 6) % 13 + 2


def decoder(name: str, options: dict[str, Any], *, single: bool = False) -> nn.Module:
    """A model with a head for tokens, in float64 unless ``single``; its experts run one by one then."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**copy.deepcopy(options))
    if not single:
        config._experts_implementation = "eager"  # grouped products know no float64
    config.use_cache = False
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return randomize(model.to(torch.float32 if single else torch.float64).eval())


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def halved(model: nn.Module, groups: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The masked and the compacted model without half of the units."""
    masked = copy.deepcopy(model)
    torch_rsst.apply_mask(masked, torch_rsst.regroup(masked, groups, amount=0.5, **options))
    return masked, torch_rsst.compact(masked, groups)


def assert_serves(masked: nn.Module, small: nn.Module, folder: Path) -> None:
    """Outputs, generated tokens and a round trip through a folder are those of the masked model."""
    for train in (True, False):
        ids = {"input_ids": IDS}
        assert difference(masked.train(train), small.train(train), ids) <= 1e-12
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    said = [m.generate(IDS, **options) for m in (masked, small)]
    assert said[0].shape == (2, 12)
    assert torch.equal(*said)
    torch_rsst.save_compact(small, folder / "small")
    fresh = type(masked)(masked.config).to(next(masked.parameters()).dtype)
    loaded = torch_rsst.load_compact(folder / "small", fresh)
    assert difference(small, loaded.eval(), {"input_ids": IDS}) == 0.0
