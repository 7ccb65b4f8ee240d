"""The models of Hugging Face transformers that docs/sweep.py tries: tiny, with random weights, no download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40}
VISION = {**SIZES, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 31}
TEXT = {**SIZES, **TOKENS, "num_attention_heads": 4, "max_position_embeddings": 64}
DECODER = {**TEXT, "num_key_value_heads": 2}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
WINDOWS = {"image_size": 32, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2}  # fmt: skip
GPT = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
TWO_PARTS = {
    **TOKENS,
    "decoder_start_token_id": 1,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
}
T5 = {**TOKENS, "decoder_start_token_id": 1, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 40, "num_layers": 2}  # fmt: skip
SOUND = {
    **SIZES,
    "num_attention_heads": 4,
    "vocab_size": 31,
    "conv_dim": [16, 16],
    "conv_stride": [4, 2],
    "conv_kernel": [8, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
EAGER = {"experts_implementation": "eager"}  # grouped products know no float64
MIXTURE = {**DECODER, **EAGER, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {**MIXTURE, "moe_intermediate_size": 24, "head_dim": 8}
GROUPED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    **{**ROUTED, **GROUPED, "num_key_value_heads": 4},
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
STATES = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
STATES_2 = {**STATES, "num_heads": 8, "head_dim": 8, "n_groups": 4, "chunk_size": 4}
BIASES = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
SHARED = "use_shared_relative_position_bias"

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit": ("ViTModel", VISION, "images"),
    "deit": ("DeiTModel", VISION, "images"),
    "beit": ("BeitModel", {**VISION, "use_relative_position_bias": True}, "images"),
    "beit, shared biases": ("BeitModel", {**VISION, SHARED: True}, "images"),
    "data2vec_vision": ("Data2VecVisionModel", {**VISION, SHARED: True}, "images"),
    "dinov2": ("Dinov2Model", {**VISION, "use_swiglu_ffn": True}, "images"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", VISION, "images"),
    "dinov3_vit": ("DINOv3ViTModel", VISION, "images"),
    "vit_mae": ("ViTMAEModel", {**VISION, "mask_ratio": 0.5}, "images and noise"),
    "vit_msn": ("ViTMSNModel", VISION, "images"),
    "ijepa": ("IJepaModel", VISION, "images"),
    "swin": ("SwinModel", WINDOWS, "images of 32"),
    "swinv2": ("Swinv2Model", WINDOWS, "images of 32"),
    "clip, vision": ("CLIPVisionModel", VISION, "images"),
    "clip, text": ("CLIPTextModel", TEXT, "tokens"),
    "siglip, vision": ("SiglipVisionModel", VISION, "images"),
    "siglip, text": ("SiglipTextModel", TEXT, "tokens"),
    "yolos": ("YolosModel", {**VISION, "image_size": [16, 16]}, "images"),
    "segformer": (
        "SegformerModel",
        {**STAGES, "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 8},
        "images of 64",
    ),
    "pvt": (
        "PvtModel",
        {**STAGES, "num_attention_heads": [1, 2, 2, 4], "image_size": 64},
        "images of 64",
    ),
    "convnext": ("ConvNextModel", STAGES, "images of 64"),
    "convnextv2": ("ConvNextV2Model", STAGES, "images of 64"),
    "resnet": ("ResNetModel", {**STAGES, "embedding_size": 8}, "images of 64"),
    "regnet": ("RegNetModel", {**STAGES, "embedding_size": 8, "groups_width": 8}, "images of 64"),
    "mobilevit": (
        "MobileViTModel",
        {
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            "num_attention_heads": 4,
            "image_size": 64,
        },
        "images of 64",
    ),
    "hiera": (
        "HieraModel",
        {
            "image_size": [32, 32],
            "embed_dim": 16,
            "patch_size": [3, 3],
            "patch_stride": [2, 2],
            "patch_padding": [1, 1],
            "depths": [1, 1],
            "num_heads": [2, 4],
            "query_stride": [2, 2],
            "masked_unit_size": [4, 4],
            "num_query_pool": 1,
        },
        "images of 32",
    ),
    "levit": (
        "LevitModel",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
        },
        "images of 64",
    ),
    "vivit": (
        "VivitModel",
        {
            **SIZES,
            "num_attention_heads": 4,
            "image_size": 16,
            "num_frames": 2,
            "tubelet_size": [2, 8, 8],
        },
        "films",
    ),
    "bert": ("BertModel", TEXT, "tokens"),
    "roberta": ("RobertaModel", TEXT, "tokens"),
    "xlm_roberta": ("XLMRobertaModel", TEXT, "tokens"),
    "distilbert": (
        "DistilBertModel",
        {"vocab_size": 31, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 40},
        "tokens",
    ),
    "electra": ("ElectraModel", {**TEXT, "embedding_size": 32}, "tokens"),
    "albert": ("AlbertModel", {**TEXT, "embedding_size": 12}, "tokens"),
    "mpnet": ("MPNetModel", TEXT, "tokens"),
    "deberta": ("DebertaModel", {**TEXT, **BIASES}, "tokens"),
    "deberta_v2": ("DebertaV2Model", {**TEXT, **BIASES}, "tokens"),
    "modernbert": ("ModernBertModel", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}, "tokens"),
    "gpt2": ("GPT2Model", GPT, "text so far"),
    "gpt_neo": (
        "GPTNeoModel",
        {
            **TOKENS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 40,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
        "text so far",
    ),
    "gptj": ("GPTJModel", {**GPT, "rotary_dim": 4}, "text so far"),
    "gpt_neox": ("GPTNeoXModel", TEXT, "text so far"),
    "opt": ("OPTModel", {**TEXT, "ffn_dim": 40, "word_embed_proj_dim": 32}, "text so far"),
    "bloom": (
        "BloomModel",
        {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "text so far",
    ),
    "falcon": ("FalconModel", TEXT, "text so far"),
    "mpt": (
        "MptModel",
        {"vocab_size": 31, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        "text so far",
    ),
    "llama": ("LlamaModel", DECODER, "text so far"),
    "mistral": ("MistralModel", DECODER, "text so far"),
    "mixtral": (
        "MixtralModel",
        {**DECODER, "num_local_experts": 2, "experts_implementation": "eager"},
        "text so far",
    ),
    "qwen2_moe": (
        "Qwen2MoeModel",
        {**ROUTED, "shared_expert_intermediate_size": 40},
        "text so far",
    ),
    "qwen3_moe": ("Qwen3MoeModel", ROUTED, "text so far"),
    "olmoe": ("OlmoeModel", ROUTED, "text so far"),
    "phimoe": ("PhimoeModel", MIXTURE, "text so far"),
    "granitemoe": ("GraniteMoeModel", MIXTURE, "text so far"),
    "glm4_moe": ("Glm4MoeModel", {**ROUTED, **GROUPED}, "text so far"),
    "gpt_oss": ("GptOssModel", {**MIXTURE, "head_dim": 8}, "text so far"),
    "deepseek_v2": ("DeepseekV2Model", LATENT, "text so far"),
    "deepseek_v3": ("DeepseekV3Model", LATENT, "text so far"),
    "mamba": ("MambaModel", STATES, "text so far"),
    "falcon_mamba": ("FalconMambaModel", STATES, "text so far"),
    "mamba2": ("Mamba2Model", STATES_2, "text so far"),
    "mamba2, one group": ("Mamba2Model", {**STATES_2, "n_groups": 1}, "text so far"),
    "jamba": ("JambaModel", {**MIXTURE, "mamba_d_state": 4, "num_hidden_layers": 8}, "text so far"),
    "qwen2": ("Qwen2Model", DECODER, "text so far"),
    "qwen3": ("Qwen3Model", {**DECODER, "head_dim": 8}, "text so far"),
    "gemma": ("GemmaModel", {**DECODER, "head_dim": 8}, "text so far"),
    "gemma2": ("Gemma2Model", {**DECODER, "head_dim": 8}, "text so far"),
    "gemma3, text": ("Gemma3TextModel", {**DECODER, "head_dim": 8}, "text so far"),
    "phi": ("PhiModel", DECODER, "text so far"),
    "phi3": ("Phi3Model", DECODER, "text so far"),
    "olmo": ("OlmoModel", DECODER, "text so far"),
    "olmo2": ("Olmo2Model", DECODER, "text so far"),
    "stablelm": ("StableLmModel", DECODER, "text so far"),
    "cohere": ("CohereModel", DECODER, "text so far"),
    "granite": ("GraniteModel", DECODER, "text so far"),
    "smollm3": ("SmolLM3Model", DECODER, "text so far"),
    "starcoder2": ("Starcoder2Model", DECODER, "text so far"),
    "t5": ("T5Model", T5, "two texts"),
    "t5, gated": ("T5Model", {**T5, "feed_forward_proj": "gated-gelu"}, "two texts"),
    "t5, encoder": ("T5EncoderModel", T5, "tokens"),
    "mt5": ("MT5Model", T5, "two texts"),
    "umt5": ("UMT5Model", T5, "two texts"),
    "bart": ("BartModel", TWO_PARTS, "two texts"),
    "mbart": ("MBartModel", TWO_PARTS, "two texts"),
    "pegasus": ("PegasusModel", TWO_PARTS, "two texts"),
    "marian": ("MarianModel", {**TWO_PARTS, "decoder_vocab_size": 31}, "two texts"),
    "m2m_100": ("M2M100Model", TWO_PARTS, "two texts"),
    "whisper": (
        "WhisperModel",
        {**TWO_PARTS, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
        "spectra and text",
    ),
    "wav2vec2": ("Wav2Vec2Model", SOUND, "sound"),
    "hubert": ("HubertModel", SOUND, "sound"),
    "wavlm": ("WavLMModel", {**SOUND, "num_buckets": 8, "max_bucket_distance": 16}, "sound"),
    "audio_spectrogram_transformer": (
        "ASTModel",
        {
            **SIZES,
            "num_attention_heads": 4,
            "patch_size": 4,
            "frequency_stride": 4,
            "time_stride": 4,
            "max_length": 16,
            "num_mel_bins": 8,
        },
        "spectra",
    ),
}
"""Family → class of the model, its configuration, what it is run on."""


def build(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model in float64, and keyword arguments that it runs on."""
    import transformers

    transformers.logging.set_verbosity_error()
    name, options, kind = MODELS[family]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**options)).double().eval(), inputs(kind)


def inputs(kind: str) -> dict[str, Any]:
    """Random arguments of one kind."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = torch.arange(3, 19).view(2, 8)
    made: dict[str, dict[str, Any]] = {
        "images": {"pixel_values": noise(2, 3, 16, 16)},
        "images and noise": {"pixel_values": noise(2, 3, 16, 16), "noise": noise(2, 16)},
        "images of 32": {"pixel_values": noise(2, 3, 32, 32)},
        "images of 64": {"pixel_values": noise(2, 3, 64, 64)},
        "films": {"pixel_values": noise(2, 2, 3, 16, 16)},
        "tokens": {"input_ids": tokens},
        "text so far": {"input_ids": tokens, "use_cache": False},
        "two texts": {"input_ids": tokens, "decoder_input_ids": tokens + 1, "use_cache": False},
        "sound": {"input_values": noise(2, 400)},
        "spectra": {"input_values": noise(2, 16, 8)},
        "spectra and text": {
            "input_features": noise(2, 8, 16),
            "decoder_input_ids": tokens,
            "use_cache": False,
        },
    }
    return made[kind]
