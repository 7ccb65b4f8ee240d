"""The command line under torchrun: data-parallel, one writer, resumable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.needs_timm

QUICK = [
    "--dense-epochs", "1", "--epochs", "2", "--rounds", "2", "--finetune-epochs", "1",
    "--batch-size", "256", "--device", "cpu",
]  # fmt: skip
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(*args):
    command = [sys.executable, *LAUNCH, "-m", "torch_rsst", *map(str, args)]
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


def test_a_killed_run_on_two_processes_resumes_to_the_same_weights(tmp_path):
    from safetensors.torch import load_file

    killed = start("run", "--output", tmp_path / "parts", *QUICK)
    metrics = tmp_path / "parts" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and killed.poll() is None:
        if metrics.exists() and '"round 0"' in metrics.read_text():
            break
        time.sleep(0.02)
    # By the folder among their arguments: the workers are in sessions of their own.
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path / "parts")], check=True)
    killed.communicate()
    assert not (tmp_path / "parts" / "report.json").exists()
    finish(start("run", "--output", tmp_path / "parts", "--resume"))
    out = finish(start("run", "--output", tmp_path / "whole", *QUICK))

    # One process talks, and writes each record once.
    assert out.count("accuracy, final") == 1
    records = [
        json.loads(line)
        for line in (tmp_path / "whole/metrics.jsonl").read_text().split("\n")
        if line
    ]
    assert [r["event"] for r in records] == ["epoch", *["epoch", "epoch", "round"] * 2, "epoch"]
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["head_sparsity"] == report["neuron_sparsity"] == 0.5
    first, second = (load_file(tmp_path / run / "model.safetensors") for run in ("parts", "whole"))
    assert first.keys() == second.keys()
    assert all(bool((first[name] == second[name]).all()) for name in first)


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path):
    process = start("run", "--output", tmp_path / "run", *QUICK, "--batch-size", 255)
    out, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "batch_size: expected a multiple of the 2 processes, got 255. Pass another" in out
    assert not (tmp_path / "run").exists()
