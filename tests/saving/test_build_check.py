"""Whether a folder will be able to build the dense model is found out before the training."""

from __future__ import annotations

import warnings

import pytest
from tiny_models import mlp
from torch import nn

from torch_rsst import CompactionWarning
from torch_rsst.saving.build_check import check_build

pytestmark = pytest.mark.needs_timm


def small_vit(**more) -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **more)


def build(**more) -> dict:
    kwargs = {"img_size": 32, "num_classes": 3, **more}
    return {"name": "timm.create_model", "args": ["vit_tiny_patch16_224"], "kwargs": kwargs}


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_what_can_be_built_passes_in_silence():
    check_build(small_vit(depth=2), None)
    check_build(small_vit(depth=2, patch_size=8), build(depth=2, patch_size=8))
    check_build(
        mlp(), None
    )  # of one's own: a model is passed to load_compact, and nobody expects else


def test_arguments_that_nobody_can_guess_are_told_with_what_differs():
    text = r"load_compact will need model= \(timm\.create_model\(.*\) makes .* Pass build="
    with pytest.warns(CompactionWarning, match=text):
        check_build(small_vit(depth=2, patch_size=8), None)


def test_a_build_of_another_model_is_an_error_that_names_what_differs():
    text = (
        r"build: expected one that makes this VisionTransformer, got .*blocks\.2\..*here it is none"
    )
    with pytest.raises(ValueError, match=text):
        check_build(small_vit(depth=2), build(depth=3))
    with pytest.raises(ValueError, match=r"got .*no_such"):
        check_build(small_vit(depth=2), build(no_such=3))


def test_a_part_that_could_be_built_alone_is_named():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.model = nn.Linear(1, 1), small_vit(depth=1)

    text = (
        r"need model= \(it could build 'model' alone, a part of Whole\)\. Pass that name as module="
    )
    with pytest.warns(CompactionWarning, match=text):
        check_build(Whole(), None)
