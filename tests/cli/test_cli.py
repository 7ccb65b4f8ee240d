"""The command line: every option, exit codes, one-line errors, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from torch_rsst.cli.main import main

pytestmark = pytest.mark.needs_timm

QUICK = [
    "--method", "rsst", "--dense-epochs", "1", "--epochs", "1", "--rounds", "2", "--finetune-epochs", "1",
    "--batch-size", "256", "--device", "cpu",
]  # fmt: skip


def exit_code(*args):
    try:
        return main(args)
    except SystemExit as error:  # how argument parsers leave
        return error.code


def test_run_prints_a_line_per_round_and_the_summary(tmp_path, capsys):
    assert exit_code("run", "--output", str(tmp_path / "run"), *QUICK) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "16 heads, 768 neurons in 8 layers" in out
    assert "round 1 of 2: accuracy" in out
    assert "round 2 of 2: accuracy" in out
    assert "accuracy after the cut" in out
    assert "head sparsity │ 50.0%" in out


def test_report_shows_the_results_of_a_run(tmp_path, capsys):
    folder = str(tmp_path / "run")
    exit_code("run", "--output", folder, *QUICK)
    capsys.readouterr()
    assert exit_code("report", folder) == 0
    assert "neuron sparsity" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["run"], ["report"], ["compact"]])
def test_help_explains_and_exits_with_0(command, capsys):
    assert exit_code(*command, "--help") == 0
    assert "torch-rsst" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rounds", "0"], "rounds: expected an int >= 1, got 0"),
        (["--amount", "2.0"], "amount: expected"),
        (["--schedule", "liner"], "Did you mean 'linear'?"),
        (["--batch-size", "5000"], "batch_size: expected at most 1347 images, got 5000"),
    ],
)
def test_wrong_values_are_one_line_and_exit_code_2(tmp_path, capsys, args, words):
    assert exit_code("run", "--output", str(tmp_path / "run"), *args) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("torch-rsst: ")
    assert words in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "args", [["--method", "magic"], ["--rounds", "many"], ["--colour", "red"], ["--device", "tpu"]]
)
def test_unparsable_options_exit_with_2(args):
    assert exit_code("run", *args) == 2


def test_missing_run_folder_is_named(tmp_path, capsys):
    missing = tmp_path / "missing"
    assert exit_code("report", str(missing)) == 2
    assert str(missing) in capsys.readouterr().err
    assert exit_code("run", "--resume", "--output", str(missing)) == 2
    assert "no config.yaml" in capsys.readouterr().err


def test_occupied_folder_is_refused_and_resume_of_a_finished_run_reports(tmp_path, capsys):
    folder = str(tmp_path / "run")
    exit_code("run", "--output", folder, *QUICK)
    capsys.readouterr()
    assert exit_code("run", "--output", folder, *QUICK) == 2
    assert "holds a finished run" in capsys.readouterr().err.replace("got a", "holds a")
    assert exit_code("run", "--output", folder, "--resume") == 0
    assert "accuracy, final" in capsys.readouterr().out


def start(folder, *args):
    command = [sys.executable, "-m", "torch_rsst", "run", "--output", str(folder), *args]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists(), process.stderr.read()


STOPPED = [
    "--dense-epochs", "1", "--epochs", "3", "--rounds", "2", "--finetune-epochs", "1",
    "--batch-size", "256", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = start(folder, *STOPPED)
    assert run.wait() == 0, run.stderr.read()
    return folder


@pytest.mark.parametrize(
    ("sign", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_stopped_run_resumes_to_the_same_weights(whole, tmp_path, sign, code):
    """Ctrl-C continues after the very step, kill -9 from the last epoch: the end is the same."""
    from safetensors.torch import load_file

    stopped = start(tmp_path / "parts", *STOPPED)
    metrics = tmp_path / "parts" / "metrics.jsonl"
    wait_for(metrics, stopped)
    while stopped.poll() is None and '"round 0"' not in metrics.read_text():
        time.sleep(0.01)
    stopped.send_signal(sign)
    _, err = stopped.communicate()
    assert stopped.returncode == code, err
    if sign == signal.SIGINT:
        assert "--resume" in err
    assert not (tmp_path / "parts" / "report.json").exists()
    resumed = start(tmp_path / "parts", "--resume")
    assert resumed.wait() == 0, resumed.stderr.read()
    first, second = (load_file(run / "model.safetensors") for run in (tmp_path / "parts", whole))
    assert first.keys() == second.keys()
    assert all(bool((first[name] == second[name]).all()) for name in first)
    assert json.loads((tmp_path / "parts" / "report.json").read_text())["head_sparsity"] == 0.5


def test_version(capsys):
    import torch_rsst

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.split() == ["torch-rsst", torch_rsst.__version__]


@pytest.mark.filterwarnings("always::torch_rsst.utils.errors.RSSTWarning")
def test_warnings_are_a_line_without_code_and_idle_options_are_named(tmp_path, capsys):
    args = ["--strength", "0", "--fillback-rate", "0.1", "--rounds", "1"]
    assert exit_code("run", "--output", str(tmp_path / "run"), *QUICK, *args) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Warning: The penalty did not act" in out
    assert ".py:" not in out
    assert "Note: --fillback-rate has no effect with --method rsst." in out


def test_missing_packages_are_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["run"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_without_a_terminal_there_is_a_line_per_epoch(tmp_path, capsys):
    args = ["--rounds", "1", "--finetune-epochs", "1"]
    assert exit_code("run", "--output", str(tmp_path / "run"), *QUICK, *args) == 0
    out = " ".join(capsys.readouterr().out.split())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    epochs = [r for r in map(json.loads, lines) if r["event"] == "epoch"]
    assert out.count(", loss ") == len(epochs)
    assert f"dense: epoch 1 of 1, loss {epochs[0]['loss']:.3f}" in out
