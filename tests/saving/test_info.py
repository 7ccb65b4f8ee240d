"""What belongs to a saved model: classes, images, metrics, and the transform that is made of them."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_rsst
from torch_rsst.saving.info import INTERPOLATIONS, CompactInfo

pytest.importorskip("safetensors")

KNOWN: dict[str, Any] = {
    "classes": ("cat", "dog"),
    "input_size": (3, 8, 8),
    "mean": (0.5, 0.25, 0.125),
    "std": (0.5, 0.25, 0.5),
    "interpolation": "bilinear",
    "crop_pct": 0.875,
    "crop_mode": "squash",
    "metrics": {"accuracy": {"dense": 97.5, "compacted": 97.0}},
    "training": "On pets.",
}


def dense() -> nn.Module:
    """A classifier of images of 3 x 8 x 8."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )


def small() -> nn.Module:
    """The same, compacted."""
    torch.manual_seed(0)
    model = dense()
    groups = torch_rsst.find_groups(model)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    return torch_rsst.compact(model.eval(), groups)


def test_what_is_saved_is_read_again_without_the_model(tmp_path: Path) -> None:
    torch_rsst.save_compact(small(), tmp_path, info=CompactInfo(**KNOWN))
    (tmp_path / "model.safetensors").unlink()
    info = torch_rsst.compact_info(tmp_path)
    assert info == CompactInfo(**KNOWN)
    assert {name: getattr(info, name) for name in KNOWN} == KNOWN


def test_nothing_is_made_up_for_a_model_that_says_nothing(tmp_path: Path) -> None:
    torch_rsst.save_compact(small(), tmp_path)
    assert torch_rsst.compact_info(tmp_path) == CompactInfo()
    torch_rsst.save_compact(small(), tmp_path, example_inputs=torch.randn(2, 3, 8, 8))
    assert torch_rsst.compact_info(tmp_path) == CompactInfo(input_size=(3, 8, 8))


def test_folders_of_earlier_versions_know_nothing_of_their_images() -> None:
    info = torch_rsst.compact_info(Path(__file__).parent / "folders" / "vit")
    assert info == CompactInfo()
    words = r"transform: expected what .*, got no input_size and no mean and no std\. Pass info="
    with pytest.raises(ValueError, match=words):
        info.transform()


def test_numbers_become_pythons_own() -> None:
    np = pytest.importorskip("numpy")
    info = CompactInfo(
        input_size=list(np.array([1, 8, 8])),  # type: ignore[arg-type]
        mean=[np.float32(0.5)],  # type: ignore[arg-type]
        std=(1,),
        metrics={"loss": np.float64(0.25)},
    )
    assert info.metrics == {"loss": {"compacted": 0.25}}
    values = [*(info.input_size or ()), *(info.mean or ()), *(info.std or ())]
    assert [type(v) for v in values] == [int, int, int, float, float]
    assert json.loads(json.dumps(info.to_dict()))["mean"] == [0.5]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"classes": "cat"}, "classes: expected a tuple of names, got 'cat'"),
        ({"classes": ("cat", 3)}, "classes: expected a tuple of names"),
        ({"input_size": 224}, "input_size: expected a tuple of sizes, got 224"),
        ({"input_size": (224, 224)}, "expected channels, height and width, got (224, 224). Try (3,"),
        ({"input_size": (3, 0, 8)}, "expected channels, height and width, got (3, 0, 8)"),
        ({"input_size": (3, 8.0, 8)}, "input_size: expected a tuple of sizes"),
        ({"mean": (0.5,)}, "mean: expected one number for each of 3 channels, got (0.5,)"),
        ({"mean": (True, 0.5, 0.5)}, "mean: expected a tuple of numbers"),
        ({"mean": (math.nan, 0.5, 0.5)}, "mean: expected a tuple of numbers"),
        ({"mean": (10**400, 0.5, 0.5)}, "mean: expected a tuple of numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std: expected numbers above 0, got (0.5, 0.0, 0.5)"),
        ({"interpolation": "bicubik"}, "got 'bicubik'. Did you mean 'bicubic'?"),
        ({"crop_pct": -1}, "crop_pct: expected a number > 0"),
        ({"crop_mode": "corner"}, "crop_mode: expected one of 'center', 'squash', 'border'"),
        ({"metrics": {"accuracy": "high"}}, "metrics: expected a name and"),
        ({"metrics": {"accuracy": {"before": 1.0}}}, "got 'accuracy': {'before': 1.0}. Try"),
        ({"metrics": 97.0}, "metrics: expected a name and"),
        ({"training": 3}, "training: expected text, got int"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(
    wrong: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        CompactInfo(**{**KNOWN, **wrong})
    assert words in str(caught.value)
    torch_rsst.save_compact(small(), tmp_path)
    data = json.loads((tmp_path / "compact.json").read_text())
    (tmp_path / "compact.json").write_text(json.dumps({**data, "info": {**KNOWN, **wrong}}))
    with pytest.raises(ValueError, match=r"compact\.json: expected 'info' in it, got \(\w+: exp"):
        torch_rsst.compact_info(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a saved model, got no compact\.json"):
        torch_rsst.compact_info(tmp_path)


def test_what_is_given_wins_over_what_is_found() -> None:
    model = nn.Linear(2, 2)
    model.config = type("Config", (), {"id2label": {1: "dog", 0: "cat"}})()  # type: ignore[assignment]
    assert CompactInfo.of(model).classes == ("cat", "dog")
    assert CompactInfo(classes=("a", "b")).completed(model).classes == ("a", "b")
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}  # no names
    assert CompactInfo.of(model).classes == ()


def test_anything_else_is_no_source() -> None:
    words = r"CompactInfo\.of: expected a model, weights of torchvision .*, got a int\. Call Comp"
    with pytest.raises(TypeError, match=words):
        CompactInfo.of(3)


@pytest.mark.needs_timm
@pytest.mark.parametrize(("size", "channels"), [(None, 3), (32, 3), (32, 1)])
def test_models_of_timm_say_what_timm_says_of_them(size: int | None, channels: int) -> None:
    import timm

    options = {} if size is None else {"img_size": size}
    model = timm.create_model("vit_tiny_patch16_224", in_chans=channels, **options)
    config = timm.data.resolve_model_data_config(model)
    info = CompactInfo.of(model)
    assert info.input_size == (channels, size or 224, size or 224)
    assert (info.interpolation, info.crop_pct) == (config["interpolation"], config["crop_pct"])
    assert info.crop_mode == config["crop_mode"]
    # Those of images in color say nothing of gray ones.
    assert info.mean == (config["mean"] if channels == 3 else None)
    assert info.std == (config["std"] if channels == 3 else None)


@pytest.mark.needs_timm
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_the_transform_is_timms(interpolation: str, crop_mode: str) -> None:
    import timm
    from image_files import picture

    info = CompactInfo(**{**KNOWN, "interpolation": interpolation, "crop_mode": crop_mode})
    shape = {name: KNOWN[name] for name in ("input_size", "mean", "std", "crop_pct")}
    transform = timm.data.create_transform(
        **shape, interpolation=interpolation, crop_mode=crop_mode
    )
    image = picture(1, 0, 20)
    assert torch.equal(info.transform()(image), transform(image))
    again = pickle.loads(pickle.dumps(info.transform()))  # for the processes of a loader
    assert torch.equal(again(image.convert("RGBA")), transform(image))


@pytest.mark.needs_timm
def test_gray_models_take_images_in_color_and_others_are_refused() -> None:
    from image_files import picture

    gray = CompactInfo(input_size=(1, 8, 8), mean=(0.0,), std=(1.0,))
    image = picture(1, 0, 8)
    assert gray.transform()(image).shape == (1, 8, 8)
    assert torch.equal(gray.transform()(image), gray.transform()(image.convert("L")))
    with pytest.raises(ValueError, match="expected images, gray or in color, got 4 channels"):
        CompactInfo(input_size=(4, 8, 8), mean=(0.0,) * 4, std=(1.0,) * 4).transform()


@pytest.mark.needs_timm
def test_weights_of_torchvision_give_the_inputs_of_their_own_transform() -> None:
    import torchvision
    from image_files import picture

    image = picture(1, 0, 300)
    for name in ("resnet50", "vit_b_16", "swin_t", "efficientnet_b1", "convnext_tiny"):
        for weights in torchvision.models.get_model_weights(name):
            info = CompactInfo.of(weights, metrics={"accuracy": 70.0})
            assert info.classes == tuple(weights.meta["categories"])
            expected = weights.transforms()(image)
            assert info.input_size == tuple(expected.shape)
            torch.testing.assert_close(info.transform()(image), expected, rtol=0, atol=1e-5)
            assert CompactInfo.of(weights.transforms()).mean == info.mean


@pytest.mark.needs_timm
def test_a_classifier_of_transformers_brings_its_labels(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, id2label={0: "cat", 1: "dog", 2: "cow"},
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    example = {"pixel_values": torch.randn(2, 3, 8, 8)}
    groups = torch_rsst.find_groups(model, example_inputs=example)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
    compacted = torch_rsst.compact(model, groups, example_inputs=example)
    torch_rsst.save_compact(compacted, tmp_path, example_inputs=example)
    info = torch_rsst.compact_info(tmp_path)
    assert info == CompactInfo(classes=("cat", "dog", "cow"), input_size=(3, 8, 8))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_loaded_model_carries_its_info_and_is_otherwise_the_same(
    tmp_path: Path, copied: Any
) -> None:
    saved = small()
    torch_rsst.save_compact(saved, tmp_path, info=CompactInfo(**KNOWN))
    loaded = torch_rsst.load_compact(tmp_path, model=dense())
    twin, x = copied(loaded), torch.randn(1, 3, 8, 8)
    assert loaded.compact_info == twin.compact_info == CompactInfo(**KNOWN)
    assert loaded.state_dict().keys() == twin.state_dict().keys() == saved.state_dict().keys()
    assert torch.equal(torch.export.export(loaded, (x,)).module()(x), saved(x))


def test_a_loaded_model_that_is_saved_again_keeps_all_but_what_was_measured(tmp_path: Path) -> None:
    torch_rsst.save_compact(small(), tmp_path, info=CompactInfo(**KNOWN))
    loaded = torch_rsst.load_compact(tmp_path, model=dense())
    groups = torch_rsst.find_groups(loaded)
    torch_rsst.apply_mask(loaded, torch_rsst.regroup(loaded, groups, amount=0.5))
    torch_rsst.save_compact(torch_rsst.compact(loaded, groups), tmp_path)
    assert torch_rsst.compact_info(tmp_path) == CompactInfo(
        **{**KNOWN, "metrics": {}, "training": ""}
    )


def test_anything_but_an_info_is_refused(tmp_path: Path) -> None:
    words = r"info: expected a CompactInfo, got \('cat', 'dog'\)\. Pass info=CompactInfo\(classes"
    with pytest.raises(TypeError, match=words):
        torch_rsst.save_compact(small(), tmp_path / "small", info=("cat", "dog"))
    assert not (tmp_path / "small").exists()
