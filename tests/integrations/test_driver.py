"""What the callbacks share, without a trainer: rounds in steps, masks before weights, batches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import gradient_step, mlp, tokens
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import torch_rsst
from torch_rsst.integrations.batch import example_batch, inputs_of, run
from torch_rsst.integrations.driver import Outcome, RoundsDriver, Units
from torch_rsst.integrations.masks_first import masks_first
from torch_rsst.integrations.timetable import Asked, Timetable, Training


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"steps_per_round": 7}, (0, 7, 14)),
        ({"epochs_per_round": 1}, (0, 10, 10)),
        ({"epochs_per_round": 0.25, "start_epoch": 2}, (20, 2, 40)),
        ({"epochs_per_round": 0.01, "rounds": 3}, (0, 1, 3)),
        ({"steps_per_round": 30, "start_step": 10}, (10, 30, 3)),
    ],
)
def test_epochs_and_steps_become_optimizer_steps(
    asked: dict[str, Any], expected: tuple[int, int, int]
) -> None:
    table = Asked(**asked).timetable(Training(steps_per_epoch=10, total_steps=100))
    start, length, rounds = expected
    assert table == Timetable(start_step=start, steps_per_round=length, rounds=rounds)


def test_what_a_training_does_not_know_must_be_said() -> None:
    endless = Training(steps_per_epoch=None, total_steps=None)
    with pytest.raises(ValueError, match="epochs have a known number of optimizer steps"):
        Asked(epochs_per_round=1, rounds=2).timetable(endless)
    with pytest.raises(ValueError, match="rounds: expected a number: the training has no end"):
        Asked(steps_per_round=5).timetable(endless)
    assert Asked(steps_per_round=5, rounds=2).timetable(endless).rounds == 2
    assert Asked(steps_per_round=5).timetable(endless, rounds=4).rounds == 4


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({}, "in epochs or in steps, got neither"),
        ({"steps_per_round": 1, "epochs_per_round": 1}, "in epochs or in steps, got both"),
        (
            {"steps_per_round": 1, "start_step": 1, "start_epoch": 1},
            "start_step: expected the start",
        ),
        ({"steps_per_round": 0}, "steps_per_round"),
        ({"epochs_per_round": -1}, "epochs_per_round"),
    ],
)
def test_lengths_out_of_range_are_refused(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Asked(**asked)


def test_the_driver_opens_closes_and_finalizes_by_steps() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    other = torch.optim.AdamW(mlp().parameters())  # of another model: left out
    driver = RoundsDriver(
        torch_rsst.RSST,
        asked=Asked(steps_per_round=3, rounds=2, start_step=2),
        units=Units(),
        outcome=Outcome(),
        arguments={"amount": 0.1},
    )
    assert driver.metrics() == driver.state_dict() == {}
    training = Training(steps_per_epoch=None, total_steps=10)
    driver.begin(model, [other, optimizer], training, lambda: tokens(0, 5, 4), steps=0)
    seen = []
    for step in range(1, 11):
        gradient_step(model, optimizer, step)
        driver.advance(step)
        now = driver.rounds.round
        seen.append(None if now is None else (now.index, now.pruner.steps))
    first, second = [(0, 0), (0, 1), (0, 2)], [(1, 0), (1, 1), (1, 2), (1, 3), (1, 3), (1, 3)]
    assert seen == [None, *first, *second]
    assert driver.finalized
    assert driver.metrics()["rsst/neurons_gone"] == 0.5


def test_an_outcome_that_cannot_be_had_is_refused_before_training(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="expected a folder that can be written to, got"):
        Outcome(compact_to=tmp_path / "file" / "small")
    with pytest.raises(TypeError, match="folder: expected the path of a folder, got True"):
        Outcome(compact_to=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"info: expected a CompactInfo, got \['cat'\]"):
        Outcome(info=["cat"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="build: expected one of timm"):
        Outcome(build={"name": "os.system"})
    assert Outcome(compact_to=tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_masks_are_made_before_weights_are_loaded() -> None:
    pruned, fresh = mlp(), mlp(seed=5)
    groups = torch_rsst.find_groups(pruned)
    torch_rsst.apply_mask(pruned, torch_rsst.regroup(pruned, groups, amount=0.5))
    handle = masks_first(fresh)
    fresh.load_state_dict(pruned.state_dict())
    assert torch.equal(fresh(tokens(0, 5, 4)), pruned(tokens(0, 5, 4)))
    with pytest.raises(ValueError, match="expected every masked weight together with its mask"):
        fresh.load_state_dict(mlp().state_dict(), strict=False)
    handle.remove()
    half = {k: v for k, v in pruned.state_dict().items() if k != "0.weight_mask"}
    other = mlp(seed=6)
    masks_first(other)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"got '0\.weight_orig' without one"):
        other.load_state_dict(half, strict=False)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_a_batch_is_drawn_without_moving_the_dice() -> None:
    loader = DataLoader(TensorDataset(torch.arange(6.0)[:, None]), batch_size=4, shuffle=True)
    model, dice = mlp(), torch.get_rng_state()
    (drawn,) = example_batch(loader, model)
    assert drawn.tolist() == [[0.0], [1.0]]
    assert torch.equal(torch.get_rng_state(), dice)

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([])

    assert example_batch(DataLoader(Stream()), mlp()) is None


def test_inputs_are_keywords_of_a_mapping_or_the_first_of_a_sequence() -> None:
    x = tokens(0, 5, 4)
    assert inputs_of(x) is x
    assert inputs_of([x, 1]) is x
    assert torch.equal(run(mlp(), {"input": x}), run(mlp(), (x, None)))


@pytest.mark.parametrize(
    ("scope", "words"),
    [
        (
            "layer",
            r'4 of 6 heads will go \(67%\), where 50% .* scope="type" counts over all layers: 3 ',
        ),
        ("type", None),
    ],
)
def test_a_share_that_whole_units_miss_is_told_before_the_training(
    scope: str, words: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    model = torch.nn.ModuleList(torch.nn.MultiheadAttention(12, 3) for _ in range(2))
    driver = RoundsDriver(
        torch_rsst.RSST,
        asked=Asked(steps_per_round=3, rounds=1),
        units=Units(groups=torch_rsst.find_groups(model)),
        outcome=Outcome(),
        arguments={"scope": scope},
    )
    training = Training(steps_per_epoch=None, total_steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    driver.begin(model, [optimizer], training, lambda: None, steps=0)
    told = [str(each.message) for each in recwarn if "will go" in str(each.message)]
    assert len(told) == (words is not None)
    if words is not None:
        assert re.search(words, told[0])
