"""Masks that averaging has turned into fractions are found and named, at no cost to a step."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import gradient_step, mlp, tokens
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torch_rsst
from torch_rsst.masking import mask_values

REMEDY = (
    r"expected zeros and ones, got other values\. Averaging buffers .*use_buffers=False.*apply_"
)


def prune(model: nn.Module, amount: float = 0.3) -> None:
    pairs = [(model[0], "weight"), (model[2], "weight")]
    torch_rsst.global_unstructured(pairs, torch_rsst.GlobalL1, amount=amount)


def averaged() -> tuple[nn.Module, nn.Module]:
    """A model, and the average of it and of what it was before more was pruned."""
    model = mlp()
    prune(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(model)
    prune(model)
    average.update_parameters(model)
    return model, average.module


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_next_forward_pass_of_an_average_warns_once_and_names_the_remedy() -> None:
    model, average = averaged()
    x = tokens(0, 2, 4)
    with pytest.warns(torch_rsst.FractionalMaskWarning, match=f"'weight' of Linear: {REMEDY}"):
        average(x)
    with no_warnings():
        average(x)
        model(x)


def test_reading_the_weight_of_an_average_warns() -> None:
    _, average = averaged()
    with pytest.warns(torch_rsst.FractionalMaskWarning):
        _ = average[0].weight


CALLS: dict[str, Callable[[nn.Module], object]] = {
    "extract_mask": torch_rsst.extract_mask,
    "extract_mask of a state dict": lambda m: torch_rsst.extract_mask(m.state_dict()),
    "global_unstructured": prune,
    "remove_all": lambda m: torch_rsst.remove_all(m, freeze_zeros=False),
    "fillback": lambda m: torch_rsst.fillback(m[0], "weight", 0.5),
    "l1_unstructured": lambda m: torch_rsst.l1_unstructured(m[0], "weight", 1),
    "remove": lambda m: torch_rsst.remove(m[0], "weight"),
    "freeze_masked": torch_rsst.freeze_masked,
    "find_groups and regroup": lambda m: torch_rsst.regroup(m, torch_rsst.find_groups(m)),
    "compact": lambda m: torch_rsst.compact(m, torch_rsst.find_groups(m)),
}


@pytest.mark.filterwarnings("ignore::torch_rsst.FractionalMaskWarning")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_our_calls_refuse_an_averaged_mask_and_change_nothing(
    call: Callable[[nn.Module], object],
) -> None:
    _, average = averaged()
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(ValueError, match=REMEDY):
        call(average)
    assert all(torch.equal(value, before[key]) for key, value in average.state_dict().items())


def test_writes_through_data_are_found_by_our_calls() -> None:
    model = mlp()
    prune(model)
    model[0].weight_mask.data.mul_(0.5)
    with pytest.raises(ValueError, match=REMEDY):
        torch_rsst.extract_mask(model)


def test_setting_the_masks_again_mends_an_average() -> None:
    model, average = averaged()
    torch_rsst.apply_mask(average, torch_rsst.extract_mask(model))
    with no_warnings():
        average(tokens(0, 2, 4))
    for name, mask in torch_rsst.extract_mask(model).items():
        assert torch.equal(torch_rsst.extract_mask(average)[name], mask)


def test_values_are_looked_at_once_for_each_version_of_a_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[int] = []
    is_binary = mask_values.is_binary
    monkeypatch.setattr(mask_values, "is_binary", lambda m: looks.append(1) or is_binary(m))
    model = mlp()
    prune(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    looks.clear()
    for number in range(3):
        gradient_step(model, optimizer, number)
    assert len(looks) == 2  # one for each mask
    torch_rsst.apply_mask(model, {"0.weight": torch.ones(8, 4)})
    gradient_step(model, optimizer, 3)
    assert len(looks) == 3


def test_nothing_is_kept_of_masks_that_are_gone() -> None:
    gc.collect()
    before = len(mask_values._seen)
    model = mlp()
    prune(model)
    model(tokens(0, 2, 4))
    assert len(mask_values._seen) == before + 2
    del model
    gc.collect()
    assert len(mask_values._seen) == before


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_the_smallest_integer_is_no_mask(dtype):
    """Its square is 0 or itself, as integers wrap around."""
    layer = torch.nn.Linear(2, 2)
    mask = torch.full((2, 2), torch.iinfo(dtype).min, dtype=dtype)
    with pytest.raises(ValueError, match="expected zeros and ones"):
        torch_rsst.apply_mask(layer, {"weight": mask})
    assert not hasattr(layer, "weight_mask")
