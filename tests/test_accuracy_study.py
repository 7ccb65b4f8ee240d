"""The study compares methods at equal size and equal work, and loses and repeats no run."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("filelock")
pytest.importorskip("torch_pruning")

from benchmarks.accuracy import study, tasks
from benchmarks.accuracy.study import Run

CENTRES = torch.eye(4)


def sample(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return CENTRES[labels] + 0.3 * torch.randn(count, 4, generator=generator), labels


def draw(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield sample(16, int(torch.randint(10_000, (), generator=generator)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


TOY = tasks.Task(
    name="toy",
    metric="accuracy",
    lower_is_better=False,
    kinds=("neurons",),
    model=Network,
    draw=draw,
    split=lambda split: sample(64, {"train": 1, "validation": 2, "test": 3}[split]),
    dense_steps=40,
    learning_rate=0.01,
)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.TASKS, "toy", TOY)
    monkeypatch.setitem(study.PEAKS, "toy", 0.01)


OWN = [arm for arm in study.ARMS if not arm[0].startswith("torch-pruning")]


@pytest.mark.filterwarnings("ignore::torch_rsst.RSSTWarning")
@pytest.mark.parametrize(("arm", "options"), OWN, ids=[f"{a} {json.dumps(o)}" for a, o in OWN])
def test_every_arm_takes_the_same_steps_and_has_the_same_size_in_the_end(
    arm: str, options: dict[str, Any], tmp_path: Path
) -> None:
    row = study.run(Run("main", "toy", arm, options, budget=0.4), tmp_path)
    dense = sum(parameter.numel() for parameter in Network().parameters())
    assert row["steps"] == 16
    assert row["parameters"] == (dense if arm == "dense" else 4 * 8 + 8 + 8 * 4 + 4)
    assert float(row["test"]) > 50


@pytest.mark.filterwarnings("ignore::torch_rsst.RSSTWarning")
def test_a_run_that_is_in_the_file_is_not_run_again(tmp_path: Path) -> None:
    """Runs with the tuning seeds never read the test split."""
    path, tuning = tmp_path / "results.csv", Run("tuning", "toy", "random", seed=100)
    row = study.run(tuning, tmp_path)
    assert (row["test"], row["dense_test"]) == ("", "")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, study.FIELDS)
        writer.writeheader()
        writer.writerow(row)
    assert study.done(path) == {tuning.key}
    lines = list(study.run_all([tuning], path, tmp_path, workers=1, minutes=1))
    assert lines == [f"1 runs are in {path}, 0 are to do"]


def test_no_two_runs_of_the_study_are_the_same() -> None:
    keys = [run.key for run in study.grid() if run.part != "ablation"]
    assert len(keys) == len(set(keys))


def test_gains_are_differences_on_the_same_seeds() -> None:
    tables = pytest.importorskip("benchmarks.accuracy.tables", exc_type=ImportError)
    pandas = pytest.importorskip("pandas")
    tests = {"one-shot magnitude": (3.0, 2.0), "RSST": (2.5, 1.8)}
    rows = [
        {"task": "language", "amount": 0.5, "budget": 0.06, "seed": seed, "label": label}
        | {"parameters": 10, "test": test, "lost": test - 1.0}
        for label, values in tests.items()
        for seed, test in enumerate(values)
    ]
    table = tables.compared(pandas.DataFrame(rows)).set_index("label")
    assert table.loc["RSST", "gain"] == pytest.approx(0.35)
    assert table.loc["RSST", "error"] == pytest.approx(0.15)
    assert list(itertools.chain(table["seeds"])) == [2, 2]


def test_short_tables_show_gains_in_bold_where_they_exceed_twice_their_error() -> None:
    tables = pytest.importorskip("benchmarks.accuracy.tables", exc_type=ImportError)
    pandas = pytest.importorskip("pandas")
    cell = {"amount": 0.875, "budget": 0.06, "seeds": 3}
    rows = [
        {**cell, "task": "language", "label": "RSST", "gain": 0.0201, "error": 0.01},
        {**cell, "task": "signal-resnet", "label": "RSST", "gain": -0.5, "error": 0.01},
        {**cell, "task": "language", "label": "of no interest", "gain": 9.0, "error": 0.01},
    ]
    lines = tables.summary(pandas.DataFrame(rows)).splitlines()
    assert lines[0] == "### 87.5% of the units gone, 6% of the steps"
    assert lines[4:] == [
        "| RSST without: `RSST(batches=…)` | **0.020 ± 0.010** |  | \u22120.50 ± 0.01 | 3 |"
    ]
