"""The command line under torchrun: data-parallel, one writer, resumable, on digits, folders and web shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from image_files import image_folder, web_shards
from runs import QUICK as FEW
from runs import TINY, exit_code, same, settings_restored, tensors

pytestmark = pytest.mark.needs_timm

QUICK = [
    "--dense-epochs", "1", "--epochs", "2", "--rounds", "2", "--finetune-epochs", "1",
    "--batch-size", "256", "--device", "cpu",
]  # fmt: skip
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# The command line, which tells of each rank what it ended with and which files it wrote in the run's folder.
WATCHED = """
import os, sys, torch
from torch_rsst.cli.main import main
from torch_rsst.recipes.experiment import Experiment

seen, written = sys.argv.pop(1), set()

def opened(event, details):
    if event == "open" and isinstance(details[1], str) and set("wax+") & set(details[1]):
        if str(details[0]).startswith(seen + "/run"):
            written.add(str(details[0]))

def finish(self):
    results = genuine(self)
    results.pop("seconds")
    state = (self.model.state_dict(), self.trainer.outcome.state_dict(), results, written)
    torch.save(state, f"{seen}/{os.environ['RANK']}.pt")
    return results | {"seconds": 0.0}

genuine, Experiment._finish = Experiment._finish, finish
sys.addaudithook(opened)
sys.exit(main())
"""


def start(*args, script=("-m", "torch_rsst")):
    command = [sys.executable, *LAUNCH, *map(str, script), *map(str, args)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def kill(process):
    """End a launcher and what it started, as the system does when it runs out of memory."""
    import psutil

    everyone = [*psutil.Process(process.pid).children(recursive=True), process]
    for one in everyone:
        one.kill()


def watched(folder, *args):
    """What each rank of a run ended with."""
    import torch

    (folder / "watched.py").write_text(WATCHED)
    process = start(
        "run", "--output", folder / "run", *args, script=[folder / "watched.py", folder]
    )
    finish(process)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def check_agreement(first, second):
    """Same weights, masks, average and results; only the first rank wrote."""
    for ours, theirs in zip(first[:2], second[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
    assert first[2] == second[2]
    assert second[3] == set()


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_run_on_two_processes_resumes_to_the_same_weights(tmp_path):
    killed = start("run", "--output", tmp_path / "parts", *QUICK)
    metrics = tmp_path / "parts" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and killed.poll() is None:
        if metrics.exists() and '"round 0"' in metrics.read_text():
            break
        time.sleep(0.02)
    kill(killed)
    killed.communicate()
    assert not (tmp_path / "parts" / "report.json").exists()
    finish(start("run", "--output", tmp_path / "parts", "--resume"))
    out = finish(start("run", "--output", tmp_path / "whole", *QUICK))

    # One process talks, and writes each record once.
    assert out.count("accuracy, final") == 1
    events = [record["event"] for record in records_of(tmp_path / "whole")]
    assert events == ["epoch", *["epoch", "epoch", "round"] * 2, "epoch"]
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["head_sparsity"] == report["neuron_sparsity"] == 0.5
    assert same(tmp_path / "parts", tmp_path / "whole")


def test_two_processes_train_on_a_folder_as_one_does(tmp_path):
    """Augmentation is seeded by image: batches are the same, shared out, and only sums differ in rounding."""
    import torch

    data = image_folder(tmp_path / "data", held_out=11)  # an odd number: the shares differ
    args = ["--data-dir", data, *TINY, *FEW, "--optimizer", "sgd", "--learning-rate", 0.01]
    args += ["--color-jitter", 0.8, "--method", "refill", "--ema", 0.5, "--workers", 1]
    first, second = watched(tmp_path, *args)
    check_agreement(first, second)
    assert any("safetensors" in path for path in first[3])
    with settings_restored():
        assert exit_code("run", "--output", tmp_path / "one", *args) == 0
    ours, theirs = records_of(tmp_path / "run"), records_of(tmp_path / "one")
    assert len(ours) == len(theirs) == 4
    for one, two in zip(ours, theirs, strict=True):
        if one["event"] == "epoch":
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["accuracy"] == pytest.approx(two["accuracy"], abs=1e-3)
    alone, shared = tensors(tmp_path / "one"), tensors(tmp_path / "run")
    assert alone.keys() == shared.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-3, atol=1e-5)


def test_two_processes_share_web_shards(tmp_path):
    data = web_shards(tmp_path / "data", train=32, held_out=11)
    args = ["--dataset", "wds/pets", "--data-dir", data, "--num-classes", 2, *TINY, *FEW]
    first, second = watched(tmp_path, *args, "--method", "refill", "--mixup", 0.2)
    check_agreement(first, second)
    assert first[2]["head_sparsity"] == 0.5
    # Every held-out image is judged once, though the two shards hold 6 and 5.
    for record in records_of(tmp_path / "run"):
        right = record["accuracy"] * 11 / 100
        assert right == pytest.approx(round(right), abs=1e-4)


def test_an_epoch_of_shards_is_as_long_on_two_processes(tmp_path):
    from ranks import on_ranks

    data = web_shards(tmp_path / "data", train=32)
    assert on_ranks(2, _lengths, str(data)) == [(4, 16, 12)] * 2


def _lengths(rank, data):
    """Batches of an epoch, images that this rank trains on, images that both judge."""
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator

    from torch_rsst.recipes.config import RunConfig
    from torch_rsst.recipes.images import open_images
    from torch_rsst.recipes.loading import Loaders, check_batch_size

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    from pathlib import Path

    own = RunConfig(dataset="wds/pets", data_dir=Path(data), num_classes=2, workers=0, batch_size=8)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    images = open_images(own, processes=2)
    check_batch_size(own, images, 2)
    form = {"input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0}
    form |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_mode": "center"}
    loaders = Loaders(own, images.prepared(own, form), accelerator)
    trained = sum(len(labels) for _, labels in loaders.epoch(0))
    judged = torch.tensor(sum(len(labels) for _, labels in loaders.held_out()))
    dist.all_reduce(judged)
    return len(loaders), trained, int(judged)


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path):
    process = start("run", "--output", tmp_path / "run", *QUICK, "--batch-size", 255)
    out, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "batch_size: expected a multiple of the 2 processes, got 255. Pass another" in out
    assert not (tmp_path / "run").exists()
