"""The scripts in ``examples/`` run as they are, and their models are worth something."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path, epochs: int) -> float:
    accuracy: float = runpy.run_path(str(EXAMPLES / name))["main"](folder, epochs)
    return accuracy


@pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning", "ignore::FutureWarning")
def test_the_lightning_example_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("sklearn")
    first = run("lightning_rsst.py", tmp_path, 2)
    assert first > 0.7  # of ten classes
    assert run("lightning_rsst.py", tmp_path, 2) == first  # nothing is left to train


@pytest.mark.needs_timm
def test_the_trainer_example_serves_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("sklearn")
    assert run("trainer_rsst.py", tmp_path, 1) > 0.1
    assert (tmp_path / "small" / "compact.json").is_file()
