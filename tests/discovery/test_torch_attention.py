"""Heads of ``nn.MultiheadAttention`` and neurons of the layers that PyTorch builds around it."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from contract import assert_contract, difference, randomize
from torch import Tensor, nn

import torch_rsst
from torch_rsst.discovery import ReducedMultiheadAttention


def tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Attention(nn.Module):
    """One attention, called with everything it takes; returns all that it returns."""

    def __init__(self, *, weights: bool = True, average: bool = True, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 4, **options)
        self.weights, self.average = weights, average

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = self.attn(
            q,
            k,
            v,
            key_padding_mask=padding,
            attn_mask=mask,
            need_weights=self.weights,
            average_attn_weights=self.average,
        )
        return result


def call(*, batch_first: bool = True, kdim: int = 12, vdim: int = 12) -> tuple[Tensor, ...]:
    q, k, v = tokens(2, 3, 12), tokens(2, 5, kdim), tokens(2, 5, vdim)
    return (q, k, v) if batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))


PADDING = torch.tensor([[False, False, False, False, True], [False, True, False, True, True]])


@pytest.mark.parametrize("amount", [0.5, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"batch_first": False},
        {"kdim": 6, "vdim": 10},
        {"kdim": 6, "vdim": 10, "bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False},
    ],
)
def test_projections_of_every_form(options: dict[str, Any], amount: float) -> None:
    options = {"batch_first": True, **options}
    widths = {k: v for k, v in options.items() if k in ("batch_first", "kdim", "vdim")}
    inputs = (*call(**widths), None, None)
    assert_contract(
        Attention(**options), inputs, kinds=["heads"], amounts=[amount], example_inputs=True
    )


FAR = torch.arange(5) > 0  # the first key is left, so that no softmax is over nothing


@pytest.mark.parametrize("amount", [0.5, 1.0])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(3, 5).triu(2).bool(),
        tokens(3, 5),
        tokens(8, 3, 5),
        (tokens(8, 3, 5) > 1.0) & FAR,
    ],
    ids=["bool", "float", "float of every head", "bool of every head"],
)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_masks_and_weights(mask: Tensor, average: bool, weights: bool, amount: float) -> None:
    model = Attention(weights=weights, average=average, batch_first=True)
    inputs = (*call(), PADDING, mask)
    assert_contract(model, inputs, kinds=["heads"], amounts=[amount], example_inputs=True)


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_sequence_without_a_batch(batch_first: bool) -> None:
    model = Attention(batch_first=batch_first, add_bias_kv=True)
    inputs = (
        tokens(3, 12),
        tokens(5, 12),
        tokens(5, 12),
        PADDING[1],
        (tokens(4, 3, 5) > 1.0) & FAR,
    )
    assert_contract(model, inputs, kinds=["heads"], example_inputs=True)


def small_attention(model: nn.Module, inputs: Any, *, dead: int = 2) -> tuple[nn.Module, nn.Module]:
    """A masked model and what compacting makes of it."""
    groups = torch_rsst.find_groups(model, example_inputs=inputs)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=dead, min_keep=0))
    return model, torch_rsst.compact(model, groups)


def test_what_a_reduced_attention_is() -> None:
    inputs = (*call(), None, None)
    masked, small = small_attention(randomize(Attention(batch_first=True).double()), inputs, dead=3)
    attn = small.attn
    assert type(attn) is ReducedMultiheadAttention
    assert isinstance(attn, nn.MultiheadAttention)
    assert (attn.num_heads, attn.head_dim, attn.embed_dim, attn.whole_heads) == (1, 3, 12, 4)
    assert attn.in_proj_weight.shape == (9, 12)
    assert attn.in_proj_bias.shape == (9,)
    assert attn.out_proj.weight.shape == (12, 3)
    assert attn.out_proj.in_features == 3
    assert list(attn.state_dict()) == list(nn.MultiheadAttention(12, 4).state_dict())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    assert difference(masked.eval(), copied.eval(), inputs) <= 1e-12


def test_masks_that_stay_survive_the_change_of_class() -> None:
    model = randomize(Attention(batch_first=True).double()).eval()
    inputs = (*call(), None, None)
    groups = torch_rsst.find_groups(model, example_inputs=inputs)
    masks = torch_rsst.regroup(model, groups, amount=0.5)
    masks["attn.in_proj_weight"][:, 5] = False
    torch_rsst.apply_mask(model, masks)
    small = torch_rsst.compact(model, groups, keep_masks=True)
    assert isinstance(small.attn, ReducedMultiheadAttention)
    assert torch_rsst.extract_mask(small)["attn.in_proj_weight"].shape == (18, 12)
    assert not bool(small.attn.in_proj_weight[:, 5].any())
    assert difference(model, small, inputs) <= 1e-12
    again = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    assert isinstance(again.attn, ReducedMultiheadAttention)
    assert difference(small, again, inputs) == 0.0


def test_a_causal_hint_needs_its_mask() -> None:
    _, small = small_attention(Attention(batch_first=True).double(), (*call(), None, None))
    with pytest.raises(RuntimeError, match="is_causal says what attn_mask is; pass the mask as"):
        small.attn(*call(), is_causal=True)


def test_subclasses_that_compute_something_else_are_refused() -> None:
    class Scaled(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    with pytest.raises(ValueError, match=r"its class changes what nn\.Multi"):
        torch_rsst.find_groups(Scaled(12, 4), "heads", on_unsupported="raise")


LAYER = {"d_model": 12, "nhead": 4, "dim_feedforward": 10, "dropout": 0.0, "batch_first": True}


@pytest.mark.parametrize("amount", [0.5, 1.0, 1])
@pytest.mark.parametrize(
    "options",
    [{}, {"norm_first": True, "activation": "gelu"}, {"bias": False}, {"dim_feedforward": 36}],
)
def test_encoder_layers(options: dict[str, Any], amount: float) -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**{**LAYER, **options}), 2, enable_nested_tensor=False
    )
    assert_contract(
        model,
        tokens(2, 5, 12),
        kinds=["heads", "neurons"],
        amounts=[amount],
        example_inputs=True,
    )


@pytest.mark.parametrize("amount", [0.5, 1.0])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_and_decoder(batch_first: bool, amount: float) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")
        model = nn.Transformer(
            12, 4, 1, 1, dim_feedforward=10, batch_first=batch_first, dropout=0.0
        )
    model.encoder.enable_nested_tensor = False
    inputs = (tokens(2, 2, 12), tokens(2, 2, 12) + 1.0)
    found = assert_contract(
        model, inputs, kinds=["heads", "neurons"], amounts=[amount], example_inputs=True
    )
    assert [(layer.name, layer.units) for layer in found.layers] == [
        ("encoder.layers.0", 10),
        ("encoder.layers.0.self_attn", 4),
        ("decoder.layers.0", 10),
        ("decoder.layers.0.self_attn", 4),
        ("decoder.layers.0.multihead_attn", 4),
    ]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_fused_paths_see_what_is_left(which: tuple[int, ...]) -> None:
    # Without gradients and hooks, PyTorch skips padding and runs whole layers in one kernel.
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER), 3).double()
    inputs = tokens(2, 5, 12)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = randomize(model).eval()
    found = torch_rsst.find_groups(model, example_inputs=inputs)
    wanted = [f"layers.{i}" for i in which]
    groups = [layer for layer in found.layers if layer.name.startswith(tuple(wanted))]
    assert len(groups) == 2 * len(which)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = torch_rsst.compact(model, groups)
    with torch.no_grad():
        fused = small(inputs, src_key_padding_mask=padding)
        expected = model(inputs, src_key_padding_mask=padding)
    slow = small(inputs, src_key_padding_mask=padding)  # gradients are wanted
    real = ~padding
    torch.testing.assert_close(fused[real], expected[real], rtol=0, atol=1e-10)
    torch.testing.assert_close(slow[real], expected[real], rtol=0, atol=1e-10)


def test_an_encoder_layer_without_neurons_runs_fused() -> None:
    layer = randomize(nn.TransformerEncoderLayer(**LAYER).double()).eval()
    groups = torch_rsst.find_groups(layer, "neurons", on_unsupported="ignore")
    torch_rsst.apply_mask(layer, torch_rsst.regroup(layer, groups, amount=1.0, min_keep=0))
    small = torch_rsst.compact(layer, groups)
    assert (small.linear1.out_features, small.linear2.in_features) == (0, 0)
    assert difference(layer, small, tokens(2, 5, 12)) <= 1e-12


def torchvision_model(name: str) -> nn.Module:
    from torchvision.models import maxvit, swin_transformer, vision_transformer

    swin = {
        "patch_size": [2, 2],
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [4, 4],
        "window_size": [4, 3],
        "stochastic_depth_prob": 0.0,
        "num_classes": 3,
    }
    second = {
        "block": swin_transformer.SwinTransformerBlockV2,
        "downsample_layer": swin_transformer.PatchMergingV2,
    }
    if name == "swin":
        return swin_transformer.SwinTransformer(**swin)
    if name == "swin v2":
        return swin_transformer.SwinTransformer(**swin, **second)
    if name == "maxvit":
        return maxvit.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 4, stochastic_depth_prob=0.0)
    return vision_transformer.VisionTransformer(8, 4, 2, 4, 12, 10, num_classes=3)


# Maps that do not divide into windows, and are shifted.
VISION = {"vit": (8, 8), "swin": (18, 14), "swin v2": (18, 14), "maxvit": (32, 32)}


@pytest.mark.needs_timm  # as timm, torchvision needs operators of its own
@pytest.mark.parametrize("amount", [0.5, 1.0])
@pytest.mark.parametrize("name", VISION)
def test_heads_of_torchvision(name: str, amount: float) -> None:
    images = tokens(2, 3, *VISION[name])
    model = torchvision_model(name)
    for module in model.modules():
        for dropout in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, dropout, None), float):
                setattr(module, dropout, 0.0)
    assert_contract(model, images, kinds=["heads"], amounts=[amount], example_inputs=True)


@pytest.mark.needs_timm
def test_images_are_guessed_for_torchvision() -> None:
    found = torch_rsst.find_groups(torchvision_model("maxvit"), ("heads", "neurons"))
    assert str(found) == "12 heads, 208 neurons in 9 layers"
    assert all(not layer.fixed for layer in found.layers)


@pytest.mark.needs_timm
def test_what_a_reduced_window_attention_is() -> None:
    from torchvision.models.swin_transformer import ShiftedWindowAttentionV2

    model = randomize(torchvision_model("swin v2").double()).eval()
    images = tokens(2, 3, 18, 14)
    groups = torch_rsst.find_groups(model, "heads", example_inputs=images)
    assert [m.parameter.rpartition("attn.")[2] for m in groups.layers[0].members] == [
        "qkv.weight",
        "qkv.bias",
        "logit_scale",
        "cpb_mlp.2.weight",
        "proj.weight",
    ]
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    small = torch_rsst.compact(model, groups)
    attention = next(m for m in small.modules() if isinstance(m, ShiftedWindowAttentionV2))
    assert (attention.num_heads, attention.qkv.out_features) == (2, 24)
    assert attention.logit_scale.shape == (2, 1, 1)
    assert type(attention).__name__ == "ReducedShiftedWindowAttentionV2"
    assert difference(model, small, images) <= 1e-12


@pytest.mark.needs_timm
def test_subclasses_of_window_attention_that_compute_something_else_are_refused() -> None:
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    class Scaled(ShiftedWindowAttention):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="its class changes what torchvision's window attention"):
        torch_rsst.find_groups(Scaled(12, [4, 4], [0, 0], 3), "heads")
