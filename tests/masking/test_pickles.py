"""Pickles of masked models name public paths only, so that they survive a move of modules."""

from __future__ import annotations

import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import linear, same
from torch import nn
from torch.nn.utils import prune as stock

import torch_rsst
from torch_rsst.testing import assert_mask_invariants

# Written by `python tests/masking/test_pickles.py`, once for each format; never overwritten.
FIXTURES = Path(__file__).parent / "fixtures"
FIRST_MASK = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 1]]) != 0


def masked_model() -> nn.Module:
    """Masked by us, by a stock function, and by both; a recurrent layer."""
    model = nn.Sequential(linear(4, 3), nn.Tanh(), linear(2, 4, seed=1), linear(2, 2, seed=2))
    torch_rsst.apply_mask(model, {"0.weight": FIRST_MASK, "0.bias": torch.tensor([1, 1, 0, 1])})
    stock.l1_unstructured(model[2], "weight", amount=2)
    torch_rsst.global_unstructured([(model[2], "weight")], torch_rsst.GlobalL1, amount=2)
    torch_rsst.l1_unstructured(model[3], "weight", amount=1)
    return model


def masked_lstm() -> nn.Module:
    model = nn.LSTM(3, 2)
    torch_rsst.apply_mask(model, {"weight_hh_l0": torch.arange(16).reshape(8, 2) % 2})
    return model


def names_in(pickled: bytes) -> Iterator[str]:
    """The modules of all that a pickle refers to."""
    strings: list[str] = []
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL":
            yield str(argument).split(" ")[0]
        elif operation.name == "STACK_GLOBAL":
            yield strings[-2]
        elif isinstance(argument, str):
            strings.append(argument)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("make", [masked_model, masked_lstm])
def test_a_pickle_of_a_masked_model_names_public_paths_only(
    make: Callable[[], nn.Module], protocol: int
) -> None:
    named = set(names_in(pickle.dumps(make(), protocol=protocol)))
    own = {name for name in named if name.startswith("torch_rsst")}
    assert own == {"torch_rsst"}
    assert not any(name.startswith(("tests", "test_")) for name in named)


def test_every_name_in_a_pickle_is_found_in_the_package() -> None:
    for function in torch_rsst.api._FROM_PICKLES:
        assert function.__module__ == "torch_rsst"
        assert getattr(torch_rsst, function.__name__) is function


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.pt")), ids=lambda path: path.name)
def test_models_that_were_saved_in_the_past_load_and_go_on(path: Path) -> None:
    model = torch.load(path, weights_only=False)
    stored = model.stored_output
    with torch.no_grad():
        assert same(model(torch.ones(1, 3)), stored)
    masks = torch_rsst.extract_mask(model)
    assert torch.equal(masks["0.weight"], FIRST_MASK)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == {
        "0.weight": 5,
        "0.bias": 1,
        "2.weight": 4,
        "3.weight": 1,
    }
    assert_mask_invariants(model, masks)
    assert [type(module).__name__ for module in model] == ["Linear", "Tanh", "Linear", "Linear"]
    model(torch.ones(1, 3)).sum().backward()
    assert bool((model[0].weight_orig.grad[~FIRST_MASK] == 0).all())
    torch_rsst.global_unstructured([(model[2], "weight")], torch_rsst.GlobalL1, amount=2)
    assert int((model[2].weight_mask == 0).sum()) == 6
    torch_rsst.remove_all(model, freeze_zeros=False)
    assert type(model[0]) is nn.Linear


def test_there_is_a_saved_model_of_each_format() -> None:
    from torch_rsst.masking.live_weight import PICKLE_FORMAT

    assert [path.name for path in sorted(FIXTURES.glob("*.pt"))] == [
        f"masked_model_{version}.pt" for version in range(1, PICKLE_FORMAT + 1)
    ]


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.pt")), ids=lambda path: path.name)
def test_saved_models_need_nothing_of_the_tests(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        (inner,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        named = set(names_in(archive.read(inner)))
    assert all(
        name.split(".")[0] in ("torch", "torch_rsst", "collections", "__builtin__")
        for name in named
    )
    assert "torch_rsst" in named


@pytest.mark.parametrize("name", ["_rebuild_masked_module", "_rebuild_mask_hook"])
def test_a_pickle_of_a_later_version_says_so(name: str) -> None:
    arguments: dict[str, Any] = {
        "_rebuild_masked_module": (99, nn.Linear, ["weight"]),
        "_rebuild_mask_hook": (99, "mask", {}),
    }
    text = "pickle of a masked model: expected format 1 or earlier, got format 99. Load it with"
    with pytest.raises(ValueError, match=text):
        getattr(torch_rsst, name)(*arguments[name])


def test_pruning_methods_themselves_pickle_as_what_they_are() -> None:
    method = pickle.loads(pickle.dumps(torch_rsst.GlobalL1(amount=3)))
    assert type(method) is torch_rsst.GlobalL1
    assert method.amount == 3


def write_fixture(path: Path) -> None:
    model = masked_model()
    with torch.no_grad():
        model.stored_output = model(torch.ones(1, 3))
    torch.save(model, path)


if __name__ == "__main__":
    from torch_rsst.masking.live_weight import PICKLE_FORMAT

    FIXTURES.mkdir(exist_ok=True)
    target = FIXTURES / f"masked_model_{PICKLE_FORMAT}.pt"
    if not target.exists():
        write_fixture(target)
