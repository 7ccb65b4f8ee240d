"""A run that was interrupted, killed or out of disk space ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from image_files import image_folder, web_shards
from runs import QUICK, TINY, exit_code, interrupted, same, settings_restored

pytestmark = [
    pytest.mark.needs_timm,
    pytest.mark.filterwarnings(
        "ignore::torch_rsst.utils.errors.RSSTWarning"
    ),  # few steps penalize little
]


@pytest.fixture(autouse=True)
def restored():
    with settings_restored():
        yield


WORKERS = ["--workers", 2, "--auto-augment", "rand-m9-n2-mstd0.5", "--random-erasing", 0.5]
MIXED = ["--mixup", 0.5, "--cutmix", 0.5, "--ema", 0.6, "--accumulation", 2, "--batch-size", 4]
TAYLOR = ["--method", "refill", "--importance", "taylor", "--importance-batches", 2]


# Four stages; where a run has 3 steps an epoch, step 2 is in the middle of an epoch of the dense stage, 5 of
# the round, 8 of fine-tuning.
@pytest.mark.parametrize(
    ("form", "options", "steps"),
    [
        ("folder", WORKERS, (2, 5)),
        ("folder", [*MIXED, "--drop-path", 0.2], (2, 5, 8)),
        ("shards", [], (2, 5)),
        ("folder", TAYLOR, (5, 8)),
    ],
    ids=["workers", "mixed", "shards", "taylor"],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    form, options, steps, tmp_path, monkeypatch, capsys
):
    make = image_folder if form == "folder" else web_shards
    data = ["--data-dir", make(tmp_path / "data")]
    if form == "shards":
        data += ["--dataset", "wds/pets", "--num-classes", 2]
    args = [*data, *TINY, *QUICK, *options]
    whole = tmp_path / "whole"
    assert exit_code("run", "--output", whole, *args) == 0, capsys.readouterr().err
    for step in steps:
        parts = tmp_path / f"stopped after {step}"
        with settings_restored():
            assert interrupted(["--output", parts, *args], step, monkeypatch) == 130
        assert not (parts / "report.json").exists()
        with settings_restored():
            assert exit_code("run", "--output", parts, "--resume") == 0, capsys.readouterr().err
        assert same(whole, parts)
        lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, parts)]
        ours, theirs = ([json.loads(line) | {"seconds": 0} for line in of] for of in lines)
        assert ours == theirs


def test_a_full_disk_is_one_line_and_the_run_goes_on_from_the_last_checkpoint(
    tmp_path, monkeypatch, capsys
):
    from torch_rsst.recipes import run_folder

    args = ["--data-dir", image_folder(tmp_path / "data"), *TINY, *QUICK, "--epochs", 2]
    assert exit_code("run", "--output", tmp_path / "whole", *args) == 0
    write, written = run_folder.write_atomically, 0

    def full(path, content):
        nonlocal written
        written += path.name == "checkpoint.pt"
        if path.name == "checkpoint.pt" and written == 4:  # in the round
            raise OSError(28, "No space left on device")
        write(path, content)

    parts = tmp_path / "parts"
    with monkeypatch.context() as patch, settings_restored():
        patch.setattr(run_folder, "write_atomically", full)
        capsys.readouterr()
        assert exit_code("run", "--output", parts, *args) == 2
    error = capsys.readouterr().err.strip()
    assert error == (
        f"torch-rsst: {parts}: expected to write there, got [Errno 28] No space left on device. "
        f"Check free space and permissions, then: torch-rsst run --resume --output {parts}"
    )
    assert not [path for path in parts.iterdir() if path.name.endswith(".tmp")]
    with settings_restored():
        assert exit_code("run", "--output", parts, "--resume") == 0
    assert same(tmp_path / "whole", parts)


def test_a_killed_run_on_a_folder_ends_with_the_same_bits(tmp_path):
    data = image_folder(tmp_path / "data", train=48)
    args = ["--data-dir", data, *TINY, *QUICK, "--epochs", 4, "--workers", 1, "--ema", 0.5]
    command = [sys.executable, "-m", "torch_rsst", "run", "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A group of its own: its workers are to end with it.
    killed = subprocess.Popen(
        [*command, tmp_path / "parts", *map(str, args)], env=environment, start_new_session=True
    )
    metrics = tmp_path / "parts" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while killed.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and '"round 0"' in metrics.read_text():
            break
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "parts" / "report.json").exists()
    assert exit_code("run", "--output", tmp_path / "parts", "--resume") == 0
    with settings_restored():
        assert exit_code("run", "--output", tmp_path / "whole", *args) == 0
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_run_may_move_but_not_read_other_images(tmp_path, monkeypatch, capsys):
    data = image_folder(tmp_path / "data")
    run = ["--output", tmp_path / "run"]
    args = [*run, "--data-dir", data, *TINY, *QUICK]
    assert interrupted(args, 2, monkeypatch) == 130
    data.rename(tmp_path / "moved")
    capsys.readouterr()
    again = ["--resume", *run, "--data-dir", tmp_path / "moved", "--workers", 1]
    assert exit_code("run", *again, "--seed", 3) == 2
    assert "expected seed=0, got seed=3. Leave these" in capsys.readouterr().err
    with settings_restored():
        assert exit_code("run", *again) == 0


def test_what_a_resumed_run_may_change_depends_on_its_data(tmp_path):
    from dataclasses import replace

    from torch_rsst.recipes.config import RunConfig

    digits = RunConfig(workers=1)
    assert digits.differences(replace(digits, workers=2, device="cpu")) == {}
    assert digits.differences(replace(digits, data_dir=tmp_path)) == {"data_dir": (None, tmp_path)}
    shards = RunConfig(dataset="wds/pets", data_dir=tmp_path, workers=1)
    assert shards.differences(replace(shards, data_dir=tmp_path / "moved")) == {}
    assert shards.differences(replace(shards, workers=2)) == {"workers": (1, 2)}


@pytest.mark.parametrize("change", ["fewer", "renamed", "another class"])
def test_other_images_are_not_trained_on(change, tmp_path, monkeypatch, capsys):
    """Their number sets where an epoch goes on, their classes what labels mean."""
    data, output = image_folder(tmp_path / "data"), tmp_path / "run"
    args = ["--data-dir", data, *TINY, *QUICK]
    assert interrupted(["--output", output, *args], 2, monkeypatch) == 130
    checkpoint = (output / "checkpoint.pt").read_bytes()
    if change == "fewer":
        next((data / "train" / "cat").iterdir()).unlink()
    elif change == "renamed":
        for part in ("train", "validation"):
            (data / part / "cat").rename(data / part / "lynx")
    else:
        image_folder(data, classes=("cat", "dog", "fox"), train=27)
    capsys.readouterr()
    with settings_restored():
        assert exit_code("run", "--resume", "--output", output) == 2
    error = capsys.readouterr().err
    assert "images: expected the images that the run began with, 24 train, 12 held out" in error
    assert "Put the images back as they were, or start a new run." in error
    assert (output / "checkpoint.pt").read_bytes() == checkpoint
