"""Channels of whole models: stems stay; models of torchvision, blocks of timm that note their widths."""

from __future__ import annotations

import copy
import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from channel_nets import NETS, Both, Net, behind_stem, conv, images, layers_of, norm_conv, reasons
from contract import assert_contract, difference, randomize
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from torch_rsst import find_groups
from torch_rsst.discovery import survey
from torch_rsst.discovery.channels import convolutions
from torch_rsst.groups.groups import Groups


def places(groups: Groups) -> set[tuple[str, int]]:
    return {(m.parameter, m.dim) for la in groups.layers for m in (*la.members, *la.buffers)}


# Stems.

STEM = "they come out of a convolution that reads the model's input, which is left alone"


def touched(model: nn.Module) -> set[str]:
    groups = find_groups(model, ["channels"], example_inputs=images().float())
    return {parameter for parameter, _ in places(groups)}


@pytest.mark.parametrize(
    "stem",
    [
        norm_conv(3, 6),
        nn.Sequential(nn.BatchNorm2d(3), norm_conv(3, 6)),
        norm_conv(3, 6, groups=3),
        nn.Sequential(nn.ConvTranspose2d(3, 6, 2, stride=2), nn.BatchNorm2d(6)),
        nn.Sequential(nn.PixelUnshuffle(2), norm_conv(12, 6)),
    ],
    ids=["norm", "norm before", "grouped", "transposed", "space to depth"],
)
def test_a_stem_is_left_alone(stem: nn.Module) -> None:
    model = nn.Sequential(stem, norm_conv(6, 4), conv(4, 2))
    inner = {"1.0.weight", "2.weight"}
    norm = {f"1.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert touched(model) == inner | norm


def test_a_pointwise_convolution_after_a_depthwise_stem_goes() -> None:
    model = nn.Sequential(conv(3, 3, groups=3), nn.Conv2d(3, 6, 1), conv(6, 2))
    assert layers_of(model) == {"1": 6}


def test_a_convolution_after_one_of_a_single_channel_is_no_stem() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 1), conv(1, 6), conv(6, 2))
    assert layers_of(model) == {"1": 6}


def test_what_a_stem_is_added_to_stays_with_it() -> None:
    model = NETS["residual"]()
    model.last = nn.Sequential(conv(6, 4), conv(4, 2))
    assert layers_of(model) == {"last.0": 4}
    assert reasons(model) == {}


def test_every_branch_has_its_stem() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        small = net.second(F.avg_pool2d(x, 2))
        return net.last(
            net.inner(torch.cat([net.first(x), F.interpolate(small, scale_factor=2)], 1))
        )

    parts = {"inner": conv(9, 4), "last": conv(4, 2)}
    model = Net(run, first=norm_conv(3, 4), second=norm_conv(3, 5), **parts)
    assert layers_of(model) == {"inner": 4}
    assert touched(model) == {"inner.weight", "inner.bias", "last.weight"}


@pytest.mark.parametrize("mode", ["training", "eval"])
def test_a_stem_that_runs_in_one_mode_only_is_left_alone(mode: str) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        in_mode = net.training == (mode == "training")
        return net.last(net.inner(net.first(x)) + (net.second(x).mean() if in_mode else 0))

    parts = {"inner": conv(4, 5), "last": conv(5, 2)}
    second = nn.Sequential(conv(3, 6), conv(6, 4))
    model = Net(run, first=conv(3, 4), second=second, **parts)
    assert layers_of(model) == {"inner": 5}


def test_a_convolution_of_embedded_tokens_is_no_stem() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.last(net.first(net.embedding(x).transpose(1, 2)).mean(2))

    parts = {"embedding": nn.Embedding(9, 4), "first": nn.Conv1d(4, 6, 3), "last": nn.Linear(6, 2)}
    tokens = torch.arange(8).reshape(2, 4)
    found = find_groups(Net(run, **parts), ["channels"], example_inputs=tokens)
    assert [(layer.name, layer.units) for layer in found.layers] == [("first", 6)]


def test_a_model_that_is_all_stem_says_so() -> None:
    model = NETS["plain"]()
    assert reasons(model) == {"0": STEM}
    text = re.escape(f"Not understood: 0 (channels): {STEM}.")
    with pytest.raises(ValueError, match=text):
        find_groups(model)


def test_a_stem_goes_unmentioned_where_there_are_units_of_another_kind() -> None:
    groups, refused = survey(Both())
    assert [(layer.name, layer.kind) for layer in groups.layers] == [("mlp", "neurons")]
    assert refused == []


# Models of torchvision.


def torchvision_model(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    if name == "densenet":
        return models.DenseNet(8, (2, 2, 2, 2), num_init_features=8, num_classes=4)
    options = {"init_weights": False} if name == "googlenet" else {}
    return getattr(models, name)(weights=None, num_classes=4, **options)


STEMS = {
    "resnet18": ("conv1.", "bn1."),
    "densenet": ("features.conv0.", "features.norm0."),
    "mobilenet_v3_small": ("features.0.0.", "features.0.1."),
    "shufflenet_v2_x0_5": ("conv1.0.", "conv1.1."),
    "squeezenet1_1": ("features.0.",),
    "regnet_y_400mf": ("stem.0.", "stem.1."),
    "googlenet": ("conv1.conv.", "conv1.bn."),
}
CLASSIFIERS = {
    "resnet18": ("fc",),
    "densenet": ("classifier",),
    "mobilenet_v3_small": ("classifier.3",),
    "shufflenet_v2_x0_5": ("fc",),
    "squeezenet1_1": ("classifier.1",),
    "regnet_y_400mf": ("fc",),
    "googlenet": ("fc", "aux1.fc2", "aux2.fc2"),
}


@pytest.mark.parametrize("name", STEMS)
def test_torchvision(name: str) -> None:
    model = torchvision_model(name)
    train = name != "googlenet"  # dropout of its auxiliary heads
    found = assert_contract(model, images(2, 3, 48, 48), kinds=["channels"], train=train)
    assert not any(parameter.startswith(STEMS[name]) for parameter, _ in places(found))
    for classifier in CLASSIFIERS[name]:
        outputs = {(f"{classifier}.weight", 0), (f"{classifier}.bias", 0)}
        assert not outputs & places(found)
        assert all(hasattr(model.get_submodule(classifier), name) for name in ("weight", "bias"))


def test_vision_transformers_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("torchvision.models")

    def fail(*_: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(convolutions, "_traced", fail)
    with torch.device("meta"):
        model = models.vit_b_16(weights=None, num_classes=4)
    groups, refused = survey(model.to_empty(device="cpu"), ["channels"])
    assert (groups.layers, refused) == ((), [])


@pytest.mark.needs_timm
@pytest.mark.parametrize("family", ["blur", "res2net", "dla"])
def test_widths_that_timms_blocks_note_follow(family: str) -> None:
    from timm.layers import BlurPool2d
    from timm.models.dla import DLA, DlaBottle2neck
    from timm.models.res2net import Bottle2neck
    from timm.models.resnet import Bottleneck, ResNet

    sizes = {"num_classes": 3, "channels": (16, 16, 16, 16), "layers": (1, 2, 1, 1)}
    model: nn.Module
    if family == "blur":
        model = ResNet(Bottleneck, aa_layer=BlurPool2d, **sizes)
    elif family == "res2net":
        model = ResNet(Bottle2neck, base_width=32, block_args={"scale": 4}, **sizes)
    else:
        model = DLA(
            levels=[1, 1, 1, 2, 1, 1],
            channels=[8, 8, 32, 32, 32, 32],
            block=DlaBottle2neck,
            base_width=28,
            cardinality=1,
            num_classes=3,
        )
    assert reasons(model) == {}
    assert_contract(model, images(2, 3, 64, 64), kinds=["channels"])


@pytest.mark.needs_timm
@pytest.mark.parametrize("family", ["mixed", "selective", "shortcut", "dual paths", "stages"])
def test_places_where_timms_blocks_split_follow(family: str) -> None:
    from timm.layers import MixedConv2d, SelectiveKernel
    from timm.models.cspnet import BottleneckBlock, CrossStage, CrossStage3
    from timm.models.dpn import DualPathBlock
    from timm.models.rexnet import LinearBottleneck

    options: dict[str, Any] = {
        "stride": 2,
        "dilation": 1,
        "depth": 2,
        "block_ratio": 0.5,
        "block_fn": BottleneckBlock,
        "act_layer": nn.ReLU,
        "norm_layer": nn.BatchNorm2d,
    }
    blocks = {
        "mixed": [MixedConv2d(10, 10, [3, 5, 7], depthwise=True), MixedConv2d(10, 8, [3, 5, 7])],
        "selective": [nn.Conv2d(10, 8, 1), SelectiveKernel(8, 8, rd_divisor=2)],
        "shortcut": [LinearBottleneck(10, 14, stride=1), LinearBottleneck(14, 8, stride=1)],
        "dual paths": [
            DualPathBlock(10, 4, 4, 6, 3, 2, "proj", True),
            DualPathBlock(15, 4, 4, 6, 2, 2, "normal", True),
            nn.Conv2d(17, 8, 1),
        ],
        "stages": [CrossStage(10, 8, **options), CrossStage3(8, 8, **options)],
    }[family]
    model = behind_stem(nn.Sequential(norm_conv(3, 10), *blocks, nn.Conv2d(8, 2, 1)))
    assert reasons(model) == {}
    assert_contract(model, images(2, 3, 16, 16), kinds=["channels"])


@pytest.mark.needs_timm
def test_inputs_of_normalized_weights_stay() -> None:
    from timm.layers import ScaledStdConv2d

    net = nn.Sequential(conv(3, 6), ScaledStdConv2d(6, 4, 3), nn.ReLU(), conv(4, 2))
    model = behind_stem(net)
    assert reasons(model) == {"1.0": "the weights that take them in are normalized"}
    assert layers_of(model) == {"1.1": 4}
    assert_contract(model, images(), kinds=["channels"])


def test_a_detector_that_finds_nothing_is_compared_by_what_its_heads_put_out() -> None:
    """Its boxes are empty then, of which no difference could be told."""
    outputs = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "sweep.py"))["_outputs"]
    detection = pytest.importorskip("torchvision.models.detection")
    model = detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=2, score_thresh=2.0
    ).eval()
    other = randomize(copy.deepcopy(model))
    images = ([torch.randn(3, 64, 64)],)
    runs = [partial(outputs, m, boxes=True) for m in (model, other)]
    assert difference(runs[0], runs[0], images) == 0
    assert difference(runs[0], runs[1], images) > 0
