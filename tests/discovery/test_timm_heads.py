"""Heads of timm's attention modules: the contract, on small models of every family."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import assert_contract, difference, randomize
from torch import nn

import torch_rsst
from torch_rsst.groups.surgery import Removal, module_at

pytestmark = pytest.mark.needs_timm

Build = Callable[[], nn.Module]
SIDE = {"img_size": 16, "patch_size": 8, "num_classes": 3}
TINY: dict[str, Any] = {**SIDE, "embed_dim": 24, "depth": 1, "num_heads": 3}
SWIN = {"img_size": 32, "num_classes": 3, "embed_dim": 12, "depths": (2,), "num_heads": (3,)}
ROPE = {"attn_type": "rope", "use_rot_pos_emb": True}


def of(family: str, cls: str, **options: Any) -> Build:
    """Makes a model of ``timm.models``."""

    def build() -> nn.Module:
        return getattr(importlib.import_module(f"timm.models.{family}"), cls)(**options)

    return build


def vit(**options: Any) -> Build:
    return of("vision_transformer", "VisionTransformer", **{**TINY, **options})


def eva(**options: Any) -> Build:
    return of("eva", "Eva", **{**TINY, **options})


def configured(family: str, model: str, cfg: str, **options: Any) -> Build:
    """Makes a model that takes a configuration object."""

    def build() -> nn.Module:
        module = importlib.import_module(f"timm.models.{family}")
        inner = dict(options)
        if "transformer_cfg" in inner:
            inner["transformer_cfg"] = module.MaxxVitTransformerCfg(**inner["transformer_cfg"])
        config = getattr(module, cfg)(**inner)
        return getattr(module, model)(config, img_size=32, num_classes=3)

    return build


def maxvit(block: str = "T", **options: Any) -> Build:
    """A stem and one block of MaxViT."""
    transformer = {"dim_head": 4, "window_size": 4, "grid_size": 4, **options}
    return configured(
        "maxxvit",
        "MaxxVit",
        "MaxxVitCfg",
        embed_dim=(12,),
        depths=(1,),
        block_type=(block,),
        stem_width=8,
        transformer_cfg=transformer,
    )


def mvit(**options: Any) -> Build:
    """Two stages of MViT V2."""
    strides = {"stride_q": ((1, 1), (2, 2)), "stride_kv_adaptive": (2, 2)}
    return configured(
        "mvitv2",
        "MultiScaleVit",
        "MultiScaleVitCfg",
        depths=(1, 1),
        embed_dim=(12, 24),
        num_heads=(3, 3),
        **strides,
        **options,
    )


class Around(nn.Module):
    """A layer on an image of 12 channels, as a map or as tokens; the image is added where it fits."""

    def __init__(self, layer: nn.Module, tokens: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, stride=4)
        self.layer = layer
        self.tokens = tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x.flatten(2).mT if self.tokens else x
        out = self.layer(x)
        return x + out if x.shape == out.shape else out


def alone(
    cls: str, *args: Any, module: str = "timm.layers", tokens: bool = False, **options: Any
) -> Build:
    """Makes a model around one layer."""

    def build() -> nn.Module:
        layer = getattr(importlib.import_module(module), cls)(*args, **options)
        return Around(layer, tokens)

    return build


def bottleneck(attention: str, feat_size: tuple[int, int] | None = None, **options: Any) -> Build:
    """Makes a model around a block of a ResNet with attention."""

    def build() -> nn.Module:
        from timm.layers.create_attn import get_attn
        from timm.models.byobnet import LayerFn, SelfAttnBlock

        layer = functools.partial(get_attn(attention), num_heads=4, **options)
        block = SelfAttnBlock(12, 12, feat_size=feat_size, layers=LayerFn(self_attn=layer))
        return Around(block, tokens=False)

    return build


def parallel(cls: str = "ParallelScalingBlock", **options: Any) -> Build:
    """Makes a model around a block with MLP and attention side by side."""
    module = "timm.models.vision_transformer"
    return alone(cls, 12, 3, module=module, tokens=True, **options)


DAVIT = {"depths": (1,), "embed_dims": (12,), "num_heads": (3,), "window_size": 4, "num_classes": 3}
TWINS = {
    "img_size": 32,
    "patch_size": 4,
    "num_classes": 3,
    "embed_dims": (12, 24),
    "num_heads": (3, 3),
    "mlp_ratios": (2, 2),
    "depths": (2, 1),
    "sr_ratios": (2, 1),
}
PVT = {
    "num_classes": 3,
    "depths": (1, 1, 1, 1),
    "embed_dims": (12, 12, 12, 12),
    "num_heads": (3, 3, 3, 3),
    "mlp_ratios": (2, 2, 2, 2),
}
EDGENEXT = {
    "num_classes": 3,
    "dims": (12, 12, 12, 12),
    "depths": (1, 1, 1, 1),
    "heads": (3, 3, 3, 3),
    "d2_scales": (2, 2, 2, 2),
    "ls_init_value": 0.1,
}
HIERA = {"img_size": (32, 32), "embed_dim": 12, "num_heads": 3, "num_classes": 3, "stages": (1, 1)}
HIERA = {**HIERA, "q_pool": 1, "mask_unit_size": (2, 2), "mask_unit_attn": (True, False)}
HIERADET = {
    "num_classes": 3,
    "embed_dim": 12,
    "num_heads": 3,
    "stages": (1, 1),
    "q_pool": 1,
    "window_spec": (4, 2),
    "global_att_blocks": (),
}
LEVIT = {"img_size": 64, "num_classes": 3, "embed_dim": (24, 24), "key_dim": 4, "depth": (1, 1)}
LEVIT = {**LEVIT, "num_heads": (3, 3)}
COAT = {"num_classes": 3, "embed_dims": (12, 12, 12, 12), "serial_depths": (2, 1, 1, 1)}
COAT = {**COAT, "img_size": 32, "patch_size": 4, "num_heads": 3, "mlp_ratios": (2, 2, 2, 2)}
CONVOLUTIONAL = {"width_list": [8, 8, 8, 60, 120], "depth_list": [0, 1, 1, 1, 1], "num_classes": 3}
CONVOLUTIONAL = {**CONVOLUTIONAL, "head_widths": (16, 16)}
GEMMA = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 6}
GEMMA = {**GEMMA, "num_kv_heads": 3, "head_dim": 8, "intermediate_size": 16, "num_classes": 3}

FAMILIES: dict[str, tuple[Build, int]] = {
    "vit": (vit(qk_norm=True), 16),
    "vit map pool": (vit(global_pool="map", class_token=False), 16),
    "vit differential": (vit(attn_layer="diff", qk_norm=True), 16),
    "vit parallel": (parallel(qkv_bias=True, qk_norm=True), 16),
    "vit parallel fused": (parallel(qkv_bias=False, fuse_out_proj=True), 16),
    "vit parallel differential": (parallel("DiffParallelScalingBlock", qk_norm=True), 16),
    "vit parallel differential, one lambda": (
        parallel("DiffParallelScalingBlock", qkv_bias=True, dual_lambda=True, depth=3),
        16,
    ),
    "rope": (eva(**ROPE), 16),
    "rope separate": (eva(**ROPE, qkv_fused=False), 16),
    "rope mixed": (eva(**ROPE, rope_type="mixed"), 16),
    "rope grouped queries": (
        eva(**ROPE, qkv_fused=False, embed_dim=48, num_heads=6, num_kv_heads=3),
        16,
    ),
    "eva": (eva(use_rot_pos_emb=True), 16),
    "eva separate": (eva(use_rot_pos_emb=True, qkv_fused=False, qk_norm=True), 16),
    "eva mixed": (eva(use_rot_pos_emb=True, rope_type="mixed"), 16),
    "beit": (of("beit", "Beit", **TINY, qkv_bias=True, use_rel_pos_bias=True), 16),
    "beit shared": (of("beit", "Beit", **TINY, use_shared_rel_pos_bias=True), 16),
    "swin": (of("swin_transformer", "SwinTransformer", **SWIN, window_size=4), 32),
    "swin v2": (of("swin_transformer_v2", "SwinTransformerV2", **SWIN, window_size=4), 32),
    "swin v2 cr": (of("swin_transformer_v2_cr", "SwinTransformerV2Cr", **SWIN, window_size=4), 32),
    "cait": (of("cait", "Cait", **TINY, depth_token_only=1), 16),
    "xcit": (of("xcit", "Xcit", **TINY, cls_attn_layers=1), 16),
    "edgenext": (of("edgenext", "EdgeNeXt", **EDGENEXT), 64),
    "davit": (of("davit", "DaVit", **DAVIT), 32),
    "davit v2": (of("davit", "DaVit", **DAVIT, channel_attn_v2=True), 32),
    "mvit": (mvit(), 32),
    "mvit class token": (mvit(use_cls_token=True), 32),
    "hiera": (of("hiera", "Hiera", **HIERA), 32),
    "hieradet": (of("hieradet_sam2", "HieraDet", **HIERADET), 32),
    "pvt": (of("pvt_v2", "PyramidVisionTransformerV2", **PVT, sr_ratios=(2, 2, 1, 1)), 32),
    "pvt linear": (of("pvt_v2", "PyramidVisionTransformerV2", **PVT, linear=True), 32),
    "twins": (of("twins", "Twins", **TWINS), 32),
    "twins local": (of("twins", "Twins", **TWINS, wss=(3, 3)), 32),
    "coatnet": (maxvit(rel_pos_type="mlp", head_first=True), 32),
    "coatnet bias": (maxvit(rel_pos_type="bias", head_first=False), 32),
    "maxvit": (maxvit("M", rel_pos_type="bias_tf"), 32),
    "maxvit maps": (maxvit("M", rel_pos_type="bias", use_nchw_attn=True), 32),
    "levit": (of("levit", "Levit", **LEVIT), 64),
    "levit conv": (of("levit", "Levit", **LEVIT, use_conv=True), 64),
    "tiny vit": (
        of(
            "tiny_vit",
            "TinyVit",
            num_classes=3,
            embed_dims=(8, 12),
            depths=(1, 1),
            num_heads=(2, 3),
            window_sizes=(4, 4),
        ),
        32,
    ),
    "efficientformer": (
        alone(
            "Attention",
            12,
            4,
            3,
            2.0,
            4,
            module="timm.models.efficientformer",
            tokens=True,
        ),
        16,
    ),
    "efficientformer v2": (
        alone("Attention2d", 12, 4, 3, 2, 4, module="timm.models.efficientformer_v2", stride=2),
        16,
    ),
    "efficientformer v2 down": (
        alone("Attention2dDownsample", 12, 4, 3, 2, 4, module="timm.models.efficientformer_v2"),
        16,
    ),
    "gcvit": (
        of(
            "gcvit",
            "GlobalContextVit",
            img_size=32,
            num_classes=3,
            window_ratio=(8, 8),
            embed_dim=12,
            depths=(2, 1),
            num_heads=(3, 3),
        ),
        32,
    ),
    "nest": (
        of(
            "nest",
            "Nest",
            img_size=32,
            num_classes=3,
            num_levels=2,
            embed_dims=(12, 12),
            num_heads=(3, 3),
            depths=(1, 1),
        ),
        32,
    ),
    "crossvit": (
        of(
            "crossvit",
            "CrossVit",
            img_size=32,
            num_classes=3,
            embed_dim=(12, 24),
            depth=((1, 1, 0),),
            num_heads=(3, 3),
        ),
        32,
    ),
    "metaformer": (alone("Attention", 12, 4, module="timm.models.metaformer", tokens=True), 16),
    "fastvit": (alone("Attention", 12, 4, module="timm.models.fastvit"), 16),
    "nextvit": (
        alone(
            "EfficientAttention",
            12,
            head_dim=4,
            sr_ratio=2,
            module="timm.models.nextvit",
            tokens=True,
        ),
        16,
    ),
    "visformer": (alone("Attention", 12, 3, module="timm.models.visformer"), 16),
    "tnt": (
        of(
            "tnt",
            "TNT",
            **SIDE,
            embed_dim=24,
            inner_dim=12,
            depth=1,
            num_heads_inner=3,
            num_heads_outer=3,
        ),
        16,
    ),
    "sam": (
        of(
            "vision_transformer_sam",
            "VisionTransformerSAM",
            **{**TINY, "img_size": 32},
            use_rel_pos=True,
            window_size=3,
            neck_chans=8,
        ),
        32,
    ),
    "volo": (
        of(
            "volo",
            "VOLO",
            layers=[1, 1],
            img_size=32,
            num_classes=3,
            patch_size=8,
            stem_hidden_dim=8,
            embed_dims=[12, 24],
            num_heads=[3, 3],
            downsamples=(True, False),
            outlook_attention=(True, False),
        ),
        32,
    ),
    "convit": (of("convit", "ConVit", **{**TINY, "depth": 2}, local_up_to_layer=1), 16),
    "coat": (of("coat", "CoaT", **COAT, crpe_window={3: 1, 5: 2}), 32),
    "coat parallel": (of("coat", "CoaT", **COAT, parallel_depth=1, crpe_window={3: 1, 5: 2}), 32),
    "relpos": (of("vision_transformer_relpos", "VisionTransformerRelPos", **TINY), 16),
    "relpos shared": (
        of(
            "vision_transformer_relpos",
            "VisionTransformerRelPos",
            **TINY,
            shared_rel_pos=True,
            rel_pos_type="bias",
            qk_norm=True,
        ),
        16,
    ),
    "lowformer": (of("lowformer", "LowFormer", **CONVOLUTIONAL), 64),
    "cpubone": (of("cpubone", "CPUBone", **CONVOLUTIONAL), 64),
    "cpubone nearest": (
        of("cpubone", "CPUBone", **CONVOLUTIONAL, small_kernels=True, attn_upsample="nearest"),
        64,
    ),
    "gemma": (of("gemma4_vit", "Gemma4VitClassifier", **GEMMA), 48),
    "cascade": (
        alone(
            "CascadedGroupAttention",
            12,
            4,
            3,
            1,
            4,
            (3, 3, 3),
            module="timm.models.efficientvit_msra",
        ),
        16,
    ),
    "botnet": (bottleneck("bottleneck", feat_size=(4, 4), qk_ratio=2.0), 16),
    "halonet": (bottleneck("halo", block_size=4, halo_size=1, qkv_bias=True), 16),
    "lambda": (bottleneck("lambda", feat_size=(4, 4), r=None), 16),
    "lambda near": (bottleneck("lambda", feat_size=(4, 4), r=3), 16),
    "linear": (
        alone("LiteMLA", 12, 12, heads=3, dim=4, module="timm.models.efficientvit_mit"),
        16,
    ),
    "linear, two scales": (
        alone(
            "LiteMLA",
            12,
            12,
            heads=3,
            dim=4,
            scales=(3, 5),
            use_bias=True,
            norm_layer=(torch.nn.BatchNorm2d, torch.nn.BatchNorm2d),
            module="timm.models.efficientvit_mit",
        ),
        16,
    ),
    "multi query": (
        alone("MultiQueryAttention2d", 12, num_heads=3, query_strides=2, kv_stride=2),
        16,
    ),
    "multi query v2": (alone("MultiQueryAttentionV2", 12, num_heads=3, key_dim=4, value_dim=4), 16),
    "attention on maps": (alone("Attention2d", 12, num_heads=3), 16),
    "attention on maps, heads first": (alone("Attention2d", 12, num_heads=3, head_first=True), 16),
    "attention pool": (alone("AttentionPool2d", 12, 4, head_dim=4), 16),
    "rotary attention pool": (alone("RotAttentionPool2d", 12, head_dim=4, qkv_separate=True), 16),
}


CACHED = {
    "levit": ("Attention", "AttentionDownsample"),
    "efficientformer": ("Attention",),
    "efficientformer_v2": ("Attention2d", "Attention2dDownsample"),
    "tiny_vit": ("Attention",),
    "efficientvit_msra": ("CascadedGroupAttention",),
}


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules do not keep position biases that gradients flow through: such a module cannot be copied."""
    for family, classes in CACHED.items():
        module = importlib.import_module(f"timm.models.{family}")
        for name in classes:
            monkeypatch.setattr(getattr(module, name), "get_attention_biases", _attention_biases)


def _attention_biases(module: Any, device: torch.device) -> torch.Tensor:
    return module.attention_biases[:, module.attention_bias_idxs]


def model_of(family: str) -> tuple[nn.Module, torch.Tensor]:
    build, side = FAMILIES[family]
    torch.manual_seed(0)
    return build(), torch.randn(2, 3, side, side, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads(family: str) -> None:
    model, inputs = model_of(family)
    assert_contract(model, inputs, kinds=["heads"], amounts=[1, 1.0], example_inputs=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_that_lost_no_head_compute_what_they_did(family: str) -> None:
    model, inputs = model_of(family)
    model = randomize(model.double().eval())
    found = torch_rsst.find_groups(model, "heads", example_inputs=inputs, on_unsupported="ignore")
    same = copy.deepcopy(model)
    for layer in found.layers:
        none = Removal(layer, torch.zeros(layer.units, dtype=torch.bool))
        torch_rsst.discovery.family(layer.family).shrink(module_at(same, layer.name), none)
    for fused in (False, True):
        for module in (*model.modules(), *same.modules()):
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        assert difference(model, same, inputs) < 1e-12


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            vit(scale_attn_norm=True),
            "its units mix before the output layer, so that none can be removed exactly",
        ),
        (
            eva(scale_attn_inner=True),
            "its norm spans all heads, so that none can be removed exactly",
        ),
    ],
)
def test_heads_that_are_normalized_jointly_are_refused(build: Build, reason: str) -> None:
    model = build()
    with pytest.warns(torch_rsst.UnsupportedModuleWarning) as caught:
        torch_rsst.find_groups(model)
    assert reason in str(caught[0].message)


def test_heads_without_an_output_projection_are_refused() -> None:
    model = alone("AttentionPoolLatent", 12, 0, num_heads=3, tokens=True)()
    reason = "it has no output projection: its heads are features of what follows"
    with pytest.raises(ValueError, match=reason):
        torch_rsst.find_groups(model, "heads")


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit_relpos", "mobilevit_xxs", "edgenext_xx_small"]
)
def test_registered_models_need_no_example(name: str) -> None:
    import timm

    model = timm.create_model(name).eval()
    found = torch_rsst.find_groups(model, "heads")
    assert found.layers
    assert all(not layer.fixed for layer in found.layers)


@pytest.mark.parametrize(
    ("former", "present"),
    [
        ("MetaformerAttention", "PlainAttention"),
        ("FastVitAttention", "PlainAttention"),
        ("VisformerAttention", "PlainAttention"),
        ("SamAttention", "PlainAttention"),
        ("HieraDetAttention", "HieraAttention"),
        ("TwinsLocalAttention", "SubsampledAttention"),
    ],
)
def test_groups_that_name_a_former_adapter_find_its_successor(former: str, present: str) -> None:
    assert type(torch_rsst.discovery.family(former)).__name__ == present
