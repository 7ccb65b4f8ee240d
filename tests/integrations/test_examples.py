"""The scripts in ``examples/`` run as they are, and their models are worth something."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

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


@pytest.mark.needs_timm
def test_the_timm_script_goes_on_where_it_was_stopped_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's own optimizer, scheduler, scaler, average and checkpoints; stopped between two rounds."""
    pytest.importorskip("sklearn")
    from safetensors.torch import load_file
    from timm.utils import CheckpointSaver

    whole = run("timm_script.py", tmp_path / "whole", 4)
    save = CheckpointSaver.save_checkpoint

    def stopped(self: Any, epoch: int) -> None:
        save(self, epoch)
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointSaver, "save_checkpoint", stopped)
        with pytest.raises(KeyboardInterrupt):
            run("timm_script.py", tmp_path / "run", 4)
    assert run("timm_script.py", tmp_path / "run", 4) == whole > 0.2  # of ten classes
    one, two = (load_file(tmp_path / name / "small/model.safetensors") for name in ("whole", "run"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["blocks.0.mlp.fc1.weight"].shape == (128, 64)
