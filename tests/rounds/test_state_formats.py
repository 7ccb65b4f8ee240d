"""States that were saved once are loaded for good: what a setting meant when they were written, it means still.

The files in ``data/`` were written in the second step of round 1 of 3, by::

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rsst = RSST(model, find_groups(model), optimizer=optimizer, steps_per_round=3, rounds=3,
                rewind="init", **arguments)
    # gradient_step(model, optimizer, 10 * rnd.index + step), then
    torch.save({"rounds": rsst.state_dict(), "model": …, "optimizer": …}, path)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import gradient_step, mlp, same
from torch import Tensor

from torch_rsst import RSST, extract_mask, find_groups
from torch_rsst.rounds.state import FORMAT

DATA = Path(__file__).parent / "data"
# Each file → the arguments that mean now what those of its run meant.
FIRST: dict[str, Any] = {"strength": 0.5, "rewind_optimizer": "keep"}
FILES: dict[str, dict[str, Any]] = {
    "sparse_format_1": {**FIRST, "kept_units": "sparse"},
    "dense_format_1": {**FIRST, "dense_training": True},
    "dense_format_2": {},
}


def load(name: str) -> dict[str, Any]:
    """With ``weights_only``: a state consists of plain data and tensors, and names no class."""
    found: dict[str, Any] = torch.load(DATA / f"{name}.pt", weights_only=True)
    return found


def rounds_of(**kwargs: Any) -> tuple[Any, Any, Any]:
    model = mlp(seed=9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    settings = {"steps_per_round": 3, "rounds": 3, "rewind": "init", **kwargs}
    return RSST(model, find_groups(model), optimizer=optimizer, **settings), model, optimizer


@pytest.mark.parametrize("name", FILES)
def test_a_state_of_every_format_continues_its_round(name):
    saved = load(name)
    rsst, model, optimizer = rounds_of(**FILES[name])
    rsst.load_state_dict(saved["rounds"])
    model.load_state_dict(saved["model"], strict=True)
    optimizer.load_state_dict(saved["optimizer"])
    masks = extract_mask(model)
    rnd = next(rsst)
    assert (rnd.index, rnd.start_step) == (1, 2)
    assert rnd.pruner.start_norm == saved["rounds"]["round"]["pruner"]["start_norm"]
    for key, mask in saved["rounds"]["round"]["refill_mask"].items():
        assert same(rnd.refill_mask[key], mask)
        assert same(rnd.current_mask[key], masks[key])
    gradient_step(model, optimizer, 12)
    for rnd in rsst:
        for step in range(3):
            gradient_step(model, optimizer, 10 * rnd.index + step)
    rsst.finalize(force=True)
    assert rnd.index == 2
    assert rsst.report().gone("neurons") == 4
    assert rsst.report().explain("", 0).history[0].round == 0


def test_the_literal_reading_of_older_dense_training_keeps_its_ranking():
    rsst, _, _ = rounds_of(**FILES["dense_format_1"])
    saved = load("dense_format_1")["rounds"]
    rsst.load_state_dict(saved)
    rnd = next(rsst)
    ranked = saved["round"]["current_mask"]
    for name, mask in rnd.current_mask.items():
        assert same(rnd.ranked_mask[name], ranked[name])
        assert same(mask, ranked[name] | rnd.refill_mask[name])
    rnd.pruner.detach()


@pytest.mark.parametrize("name", FILES)
def test_settings_that_a_state_lacks_are_compared_as_what_they_meant(name):
    rsst, _, _ = rounds_of(
        **{**FILES[name], "kept_units": None, "dense_training": None, "rounds": 4}
    )
    text = "expected rounds=4.*" if "dense" in name else "kept_units='dense'.*kept_units='sparse'"
    with pytest.raises(ValueError, match=text):
        rsst.load_state_dict(load(name)["rounds"])


def test_a_state_says_its_format():
    rsst, _, _ = rounds_of()
    assert rsst.state_dict()["format"] == FORMAT == 2
    assert "format" not in load("sparse_format_1")["rounds"]
    assert load("dense_format_2")["rounds"]["format"] == 2


@pytest.mark.parametrize("version", [FORMAT + 1, 0, "2"])
def test_a_format_of_the_future_is_refused(version):
    rsst, model, _ = rounds_of()
    state = {**load("dense_format_2")["rounds"], "format": version}
    with pytest.raises(ValueError, match=r"state of rounds: expected format 2 or older, got"):
        rsst.load_state_dict(state)
    assert extract_mask(model) == {}


@pytest.mark.parametrize("name", FILES)
def test_a_state_holds_plain_data(name):
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, (str, int)) and plain(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str, Tensor)

    assert plain(load(name)["rounds"])
