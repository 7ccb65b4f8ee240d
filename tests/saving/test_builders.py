"""Descriptions from strangers: what may be called, with what, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from torch_rsst.saving.builders import as_build, build_model
from torch_rsst.saving.likeness import compare


@pytest.mark.parametrize(
    "name",
    ["os.system", "timm.create_model.__globals__", "timm", "torch.hub.load", "timm_create_model",
     "builtins.eval", "transformers.utils.import_utils", "xtimm.create_model", None, 3, ""],
)  # fmt: skip
def test_no_other_function_is_called(name: Any) -> None:
    with pytest.raises(
        ValueError, match=r"build: expected one of timm\.create_model, .*, got "
    ) as e:
        build_model({"name": name, "args": ["echo"], "kwargs": {}})
    assert "A file may name nothing else: build the model yourself" in str(e.value)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (3, "expected a dict of 'name', 'args' and 'kwargs', got 3"),
        ({"name": "timm.create_model", "call": 1}, "expected a dict of 'name'"),
        ({"name": "timm.create_model", "args": "vit"}, "expected a list of 'args'"),
        ({"name": "timm.create_model", "kwargs": []}, "a dict of 'kwargs'"),
    ],
)
def test_a_build_has_three_parts(build: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words follow
        as_build(build)
    assert words in str(caught.value)


def test_a_build_holds_plain_values() -> None:
    build = {"name": "timm.create_model", "args": ("vit",), "kwargs": {"img_size": (8, 8)}}
    assert as_build(build) == {
        "name": "timm.create_model", "args": ["vit"], "kwargs": {"img_size": [8, 8]}
    }  # fmt: skip
    for value in (nn.GELU, float("nan")):
        with pytest.raises(TypeError, match="build: expected numbers, text, lists and dicts, got"):
            as_build({"name": "timm.create_model", "kwargs": {"act_layer": value}})


@pytest.mark.needs_timm
@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        (["hf-hub:someone/model"], {}, "got 'hf-hub:someone/model'"),
        (["local-dir:/tmp/model"], {}, "got 'local-dir:/tmp/model'"),
        (["a/b"], {}, "expected the name of an architecture and keywords"),
        (["resnet18", True], {}, "expected the name of an architecture and keywords"),
        (["resnet18"], {"pretrained": True}, "'pretrained': expected it left out, got True"),
        (["resnet18"], {"checkpoint_path": "/tmp/x"}, "'checkpoint_path': expected it left out"),
        (["resnet18"], {"pretrained_cfg": {"file": "x"}}, "'pretrained_cfg': expected it left out"),
        (["resnet18"], {"cache_dir": "/tmp"}, "'cache_dir': expected it left out"),
        ([], {"model_name": "resnet18"}, "expected the name of an architecture and keywords"),
    ],
)
def test_timm_is_not_told_to_load_anything(args: Any, kwargs: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words follow
        build_model({"name": "timm.create_model", "args": args, "kwargs": kwargs})
    assert words in str(caught.value)


@pytest.mark.needs_timm
def test_torchvision_builds_without_weights_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    build = {
        "name": "torchvision.models.get_model",
        "args": ["resnet18"],
        "kwargs": {"num_classes": 3},
    }
    assert build_model(build).fc.out_features == 3
    assert torch.equal(torch.get_rng_state(), state)
    for kwargs in ({"weights": "DEFAULT"}, {"weights_backbone": "DEFAULT"}):
        with pytest.raises(ValueError, match="expected it left out, got DEFAULT"):
            build_model({**build, "kwargs": kwargs})
    with pytest.raises(ValueError, match="expected the name of a model and keywords"):
        build_model({**build, "args": ["resnet19"]})


TINY = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 8, "image_size": 8, "patch_size": 4}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["transformers.ViTForImageClassification", "transformers.AutoModel.from_config"]
)
def test_transformers_builds_from_a_configuration(name: str) -> None:
    pytest.importorskip("transformers")
    build = {"name": name, "args": [TINY], "kwargs": {"attn_implementation": "eager"}}
    model = build_model(build)
    assert model.config.hidden_size == 8
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("name", "config", "kwargs", "words"),
    [
        ("transformers.pipeline", TINY, {}, "expected a model class of transformers"),
        ("transformers.ViTConfig", TINY, {}, "expected a model class of transformers"),
        ("transformers.AutoModel", TINY, {}, "expected a model class of transformers"),
        ("transformers.ViTModel.from_config", TINY, {}, "expected a model class of transformers"),
        ("transformers.ViTModel", "vit", {}, "expected one configuration, as a dict"),
        ("transformers.ViTModel", TINY, {"attn_implementation": "someone/kernel"}, "a built-in one"),
        ("transformers.ViTModel", TINY, {"state_dict": {}}, "expected attn_implementation alone"),
        ("transformers.ViTModel", {**TINY, "auto_map": {"AutoModel": "a--b.C"}}, {}, "'auto_map': exp"),
        ("transformers.ViTModel", {**TINY, "backbone": "resnet18"}, {}, "'backbone': expected it"),
        ("transformers.ViTModel", {**TINY, "model_type": "timm_backbone", "backbone": "a/b"}, {},
         "'backbone': expected it left out, or the name of an architecture of timm"),
        ("transformers.ViTModel", {**TINY, "x": {"checkpoint_path": "/tmp/x"}}, {}, "it left out"),
        ("transformers.ViTModel", {**TINY, "x": [{"quantization_config": {"a": 1}}]}, {}, "it left out"),
        ("transformers.ViTModel", {**TINY, "architecture": "hf_hub:a/b"}, {}, "nothing from elsewhere"),
    ],
)  # fmt: skip
def test_transformers_is_not_told_to_load_anything(
    name: str, config: Any, kwargs: Any, words: str
) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words follow
        build_model({"name": name, "args": [config], "kwargs": kwargs})
    assert words in str(caught.value)


# Alike or not


def _pair() -> tuple[nn.Module, nn.Module]:
    one = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)))
    return one, copy.deepcopy(one)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.eval(), ""),
        (lambda m: m[0].weight.data.zero_(), ""),
        (lambda m: m.append(nn.Identity()), "modules '2'"),
        (lambda m: m.__setitem__(0, nn.Identity()), "the class (Identity, not Linear) of 0"),
        (lambda m: setattr(m[1][1], "inplace", True), "'inplace' (True, not False) of 1.1"),
        (lambda m: setattr(m, "act", torch.nn.functional.gelu), "'act' ("),
        (lambda m: setattr(m[1][0], "bias", None), "'bias' ("),
        (
            lambda m: m.double(),
            "'bias' (shape (4,), torch.float64, not shape (4,), torch.float32) of 0",
        ),
        (lambda m: setattr(m[1][0], "weight", m[0].weight), "which parameters are tied"),
    ],
)
def test_models_are_alike_but_for_values_and_modes(change: Any, expected: str) -> None:
    one, other = _pair()
    change(other)
    _, found = compare(one, other)
    assert found.startswith(expected)
    assert bool(found) == bool(expected)


@pytest.mark.parametrize("nested", [False, True])
def test_a_configuration_names_no_code(nested: bool) -> None:
    pytest.importorskip("transformers")
    named = {"attn_implementation": "someone/kernel"}
    config = {"model_type": "vit", **({"text_config": named} if nested else named)}
    with pytest.raises(ValueError, match="a configuration without attn_implementation"):
        build_model({"name": "transformers.ViTModel", "args": [config], "kwargs": {}})


def test_floats_that_were_set_later_are_settings() -> None:
    one, other = _pair()
    one[1][1].p = 0.2
    assert compare(one, other) == ({"1.1": {"p": 0.2}}, "")
    other[1][1].p = 1  # an int, which may decide about shapes
    assert compare(one, other) == ({}, "'p' (1, not 0.2) of 1.1")
