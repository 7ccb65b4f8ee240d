"""Heads and neurons of Hugging Face transformers, built from tiny configurations; nothing is downloaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contract import assert_contract, difference, randomize
from torch import Tensor, nn

import torch_rsst

SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "intermediate_size": 10}
VISION = {**SIZES, "num_attention_heads": 3, "image_size": 8, "patch_size": 4}
BERT = {**SIZES, "num_attention_heads": 3, "vocab_size": 11, "max_position_embeddings": 16}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {
    **{**BERT, **SPECIAL, "hidden_size": 16},
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SWIN = {
    "image_size": 32,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 2,
}
SEQUENCES = {
    "vocab_size": 11,
    "d_model": 12,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 10,
    "decoder_ffn_dim": 10,
}
T5 = {"vocab_size": 11, "d_model": 12, "d_kv": 4, "num_heads": 3, "d_ff": 10, "num_layers": 2}
SHARED = {**VISION, "use_shared_relative_position_bias": True}
IDS = torch.arange(8).view(2, 4)


def pixels(side: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, side, side)
    return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64)}


TEXT: dict[str, Any] = {"input_ids": IDS}
DECODED: dict[str, Any] = {"input_ids": IDS, "use_cache": False}
TRANSLATED: dict[str, Any] = {**DECODED, "decoder_input_ids": IDS[:, :3]}


def build(name: str, **options: Any) -> nn.Module:
    """A model with random weights of class ``{name}Model``."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**options)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{name}Model")(config)
    return model


ALL_GO = [
    ("ViT", VISION, pixels(8)),
    ("DeiT", VISION, pixels(8)),
    ("Dinov2", {**VISION, "mlp_ratio": 2, "use_swiglu_ffn": True}, pixels(8)),
    ("Beit", VISION, pixels(8)),
    ("Beit", {**VISION, "use_relative_position_bias": True}, pixels(8)),
    ("Beit", SHARED, pixels(8)),
    ("Swin", SWIN, pixels(32)),
    ("CLIPVision", VISION, pixels(8)),
    ("Bert", BERT, TEXT),
    ("Roberta", BERT, TEXT),
    (
        "DistilBert",
        {"vocab_size": 11, "dim": 12, "n_layers": 1, "n_heads": 3, "hidden_dim": 10},
        TEXT,
    ),
]
ONE_STAYS = [
    ("Swinv2", SWIN, pixels(32)),
    ("Albert", {**BERT, "embedding_size": 6}, TEXT),
    ("GPT2", {**SPECIAL, "vocab_size": 11, "n_embd": 12, "n_layer": 2, "n_head": 3}, DECODED),
    ("Llama", GROUPED, DECODED),
    ("Mistral", GROUPED, DECODED),
    ("Qwen2", GROUPED, DECODED),
    ("Qwen3", {**GROUPED, "head_dim": 4}, DECODED),
    ("Phi3", GROUPED, DECODED),
    ("ModernBert", {**BERT, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2}, TEXT),
    ("GPTNeoX", BERT, DECODED),
    ("Bart", SEQUENCES, DECODED),
    ("T5", T5, TRANSLATED),
    ("MT5", T5, TRANSLATED),
    ("UMT5", T5, TRANSLATED),
    ("Data2VecVision", SHARED, pixels(8)),
    ("Data2VecVision", {**SHARED, "use_relative_position_bias": True}, pixels(8)),
]


@pytest.mark.parametrize("amount", [0.5, 1.0])
@pytest.mark.parametrize(("name", "options", "inputs"), ALL_GO)
def test_attention_that_may_go_altogether(
    name: str, options: dict[str, Any], inputs: dict[str, Any], amount: float
) -> None:
    assert_contract(
        build(name, **options),
        inputs,
        kinds=["heads", "neurons"],
        amounts=[amount],
        example_inputs=True,
        train=False,
    )


@pytest.mark.parametrize(("name", "options", "inputs"), ONE_STAYS)
def test_attention_of_which_one_head_stays(
    name: str, options: dict[str, Any], inputs: dict[str, Any]
) -> None:
    model = build(name, **options)
    for kinds, amount in ((["heads", "neurons"], 0.5), (["heads"], 1.0), (["neurons"], 1.0)):
        assert_contract(
            copy.deepcopy(model),
            inputs,
            kinds=kinds,
            amounts=[amount],
            example_inputs=True,
            train=False,
        )


def compacted(model: nn.Module, inputs: Any, amount: Any = 0.5) -> tuple[nn.Module, nn.Module]:
    model = randomize(model.double().eval())
    groups = torch_rsst.find_groups(model, ("heads", "neurons"), example_inputs=inputs)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=amount, min_keep=0))
    return model, torch_rsst.compact(model, groups, keep_masks=True)


def test_what_modules_note_follows() -> None:
    _, small = compacted(build("Bert", **BERT), TEXT, amount=1)
    attention = small.encoder.layer[0].attention.self
    noted = (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size)
    assert noted == (2, 8, 4)
    assert attention.query.out_features == 8
    _, small = compacted(build("GPT2", **ONE_STAYS[2][1], n_inner=10), DECODED, amount=1)
    block = small.h[0]
    assert (block.attn.num_heads, block.attn.split_size, block.attn.c_attn.nf) == (2, 8, 24)
    assert (block.attn.c_proj.nx, block.mlp.c_fc.nf, block.mlp.c_proj.nx) == (8, 9, 9)


def test_a_key_head_goes_with_all_its_query_heads() -> None:
    model, small = compacted(build("Llama", **GROUPED), DECODED)
    groups = torch_rsst.find_groups(model, "heads", example_inputs=DECODED)
    layer = groups.layers[0]
    assert (layer.name, layer.units) == ("layers.0.self_attn", 2)
    rows = {slab.parameter: slab.index for slab in layer.group(1).members}
    assert rows == {
        "layers.0.self_attn.q_proj.weight": (8, 9, 10, 11, 12, 13, 14, 15),
        "layers.0.self_attn.k_proj.weight": (4, 5, 6, 7),
        "layers.0.self_attn.v_proj.weight": (4, 5, 6, 7),
        "layers.0.self_attn.o_proj.weight": (8, 9, 10, 11, 12, 13, 14, 15),
    }
    attention = small.layers[0].self_attn
    assert attention.q_proj.out_features == 2 * attention.k_proj.out_features == 8


@pytest.mark.parametrize("name", ["Llama", "Phi3", "GPT2"])
def test_a_compacted_decoder_generates_with_its_cache(name: str) -> None:
    options = ONE_STAYS[2][1] if name == "GPT2" else GROUPED
    transformers = pytest.importorskip("transformers")
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    masked, small = compacted(getattr(transformers, head)(config), DECODED)
    with torch.no_grad():
        one, other = (m(input_ids=IDS, use_cache=True).logits for m in (masked, small))
        said = [
            m.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
            for m in (masked, small)
        ]
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert said[0].shape == (2, 8)
    assert torch.equal(*said)


def test_a_compacted_t5_generates_with_its_cache() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(**T5, decoder_start_token_id=0, eos_token_id=None)
    masked, small = compacted(transformers.T5ForConditionalGeneration(config), TRANSLATED)
    steps = [
        m.generate(IDS, max_new_tokens=5, do_sample=False, output_logits=True,
                   return_dict_in_generate=True)
        for m in (masked, small)
    ]  # fmt: skip
    assert torch.equal(steps[0].sequences, steps[1].sequences)
    assert steps[0].sequences.shape == (2, 6)
    for one, other in zip(steps[0].logits, steps[1].logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_images_are_guessed() -> None:
    model = build("ViT", **VISION).double()
    assert str(torch_rsst.find_groups(model, ("heads", "neurons"))) == (
        "6 heads, 20 neurons in 4 layers"
    )


def test_eager_attention_is_refused_with_the_way_out() -> None:
    model = build("ViT", **VISION, attn_implementation="eager").double()
    with pytest.raises(
        ValueError, match=r"every head; where the model has another, call model\.set_attn"
    ):
        torch_rsst.find_groups(model, "heads", example_inputs=pixels(8), on_unsupported="ignore")
    model.set_attn_implementation("sdpa")
    masked, small = compacted(model, pixels(8))
    for either in (masked, small):
        either.set_attn_implementation("eager")
    assert difference(masked, small, pixels(8)) <= 1e-10


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        (
            "GPT2",
            {**SPECIAL, "vocab_size": 11, "n_embd": 12, "n_layer": 1, "n_head": 1},
            "it has no more heads than it needs to run (1)",
        ),
        (
            "Mpt",
            {"vocab_size": 11, "d_model": 12, "n_heads": 2, "n_layers": 1},
            "Can be masked but not cut: blocks.0.attn (2 heads)",
        ),
    ],
)
def test_heads_that_stay_whole_say_why(name: str, options: dict[str, Any], reason: str) -> None:
    model = build(name, **options).double()
    with pytest.warns(torch_rsst.UnsupportedModuleWarning) as caught:
        found = torch_rsst.find_groups(model, example_inputs=DECODED)
    assert reason in str(caught[0].message)
    assert {layer.kind for layer in found.layers if not layer.fixed} == {"neurons"}


def test_heads_that_are_normalized_together_are_refused() -> None:
    model = build("Olmo2", **GROUPED).double()
    with pytest.raises(ValueError, match="its units mix before the output layer"):
        torch_rsst.find_groups(model, "heads", example_inputs=DECODED, on_unsupported="ignore")


def test_a_bias_that_layers_share_stays_whole_and_each_takes_its_heads_of_it() -> None:
    masked, small = compacted(build("T5", **T5), TRANSLATED, amount=1)
    first, second = (block.layer[0].SelfAttention for block in small.encoder.block)
    whole = masked.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert torch.equal(first.relative_attention_bias.weight, whole)
    assert (first.n_heads, first.inner_dim, first.all_heads) == (2, 8, 3)
    assert first.kept_heads != second.kept_heads  # else the test shows little
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        handed_on = first(x, mask)[1]
        expected = masked.encoder.block[0].layer[0].SelfAttention.compute_bias(4, 4)
    assert torch.equal(handed_on, expected)
    assert torch.equal(first.compute_bias(4, 4), expected[:, first.kept_heads])
    _, small = compacted(build("UMT5", **T5), TRANSLATED, amount=1)
    own = small.encoder.block[1].layer[0].SelfAttention.relative_attention_bias
    assert (own.embedding_dim, own.weight.shape[1]) == (2, 2)


def test_biases_of_a_layer_beside_shared_ones_keep_the_heads_of_beit_whole() -> None:
    model = build("Beit", **SHARED, use_relative_position_bias=True).double()
    found = torch_rsst.find_groups(model, example_inputs=pixels(8))
    for layer in found.of_kind("heads").layers:
        assert "its forward fixes how many it has" in layer.fixed
    assert all(not layer.fixed for layer in found.of_kind("neurons").layers)


@pytest.mark.parametrize("gated", [False, True])
def test_the_mlps_of_t5(gated: bool) -> None:
    options = {**T5, "feed_forward_proj": "gated-gelu" if gated else "relu"}
    assert_contract(
        build("T5", **options),
        TRANSLATED,
        kinds=["neurons"],
        amounts=[0.5, 1.0],
        example_inputs=True,
        train=False,
    )


def test_heads_whose_biases_are_made_elsewhere_stay_whole():
    """MPNet's encoder makes them, for as many heads as its configuration says."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MPNetConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=24,
        vocab_size=50,
    )
    with pytest.warns(
        torch_rsst.UnsupportedModuleWarning, match="one for each head, are made elsewhere"
    ):
        groups = torch_rsst.find_groups(transformers.MPNetModel(config))
    assert {layer.kind for layer in groups.layers} == {"neurons"}


@pytest.mark.parametrize(
    ("former", "present", "file"),
    [
        ("SomeHeads", "SeparateHeads", "t5.modeling_t5"),  # from whose adapter T5's derives
        ("Data2VecVisionHeads", "BeitHeads", "data2vec.modeling_data2vec_vision"),
    ],
)
def test_groups_that_name_a_former_adapter_find_its_successor(
    former: str, present: str, file: str
) -> None:
    pytest.importorskip(f"transformers.models.{file}")
    assert type(torch_rsst.discovery.family(former)).__name__ == present
