"""Without a run: the dry run, and a command line that starts before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from image_files import image_folder
from runs import TINY, exit_code, settings_restored

pytestmark = pytest.mark.needs_timm


@pytest.fixture(autouse=True)
def restored():
    with settings_restored():
        yield


STAGES = ["--dense-epochs", 2, "--epochs", 1, "--rounds", 2, "--finetune-epochs", 1]


@pytest.mark.parametrize("where", ["digits", "folder"])
def test_a_dry_run_tells_what_the_run_comes_to(where, tmp_path, monkeypatch, capsys):
    """Half of the units goes, whichever: sizes and steps are known before."""
    from torch_rsst.cli import terminal
    from torch_rsst.recipes.config import RunConfig
    from torch_rsst.recipes.dry_run import forecast

    output = tmp_path / "run"
    args = ["--output", output, *STAGES, "--method", "refill", "--device", "cpu"]
    sizes = {"batch_size": 256}
    if where == "folder":
        sizes = {"batch_size": 4, "accumulation": 2}  # 25 images: 6 batches, 3 steps
        args += ["--data-dir", image_folder(tmp_path / "data", train=25), *TINY]
    for name, value in sizes.items():
        args += [f"--{name.replace('_', '-')}", value]
    before = sorted(tmp_path.rglob("*"))
    assert exit_code("run", *args, "--dry-run") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert sorted(tmp_path.rglob("*")) == before
    assert "Nothing has been trained or written." in out
    normalized = "normalized by mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5), as timm"
    assert (normalized in out) == (where == "folder")

    steps = []
    step = terminal.Terminal.step
    monkeypatch.setattr(terminal.Terminal, "step", lambda self: (steps.append(1), step(self)))
    with settings_restored():
        assert exit_code("run", *args) == 0, capsys.readouterr().err
    found = forecast(RunConfig.from_yaml((output / "config.yaml").read_text(), output))
    assert sum(found.steps) == len(steps)
    assert found.steps == ((10, 10, 5) if where == "digits" else (6, 6, 3))
    assert exit_code("compact", output) == 0
    receipt = json.loads((output / "compact" / "compact.json").read_text())["receipt"]
    images = receipt["images"]
    for cost, side in ((found.before, "before"), (found.after, "after")):
        assert cost.parameters == receipt["parameters"][side]
        assert cost.multiply_adds == receipt["multiply_adds"][side] // images
        assert f"{cost.parameters:,}" in out
        assert f"{cost.multiply_adds:,}" in out
    for kind, counts in receipt["units"].items():
        layers = [layer for layer in found.layers if layer.kind == kind]
        assert sum(layer.before for layer in layers) == counts["before"]
        assert sum(layer.after for layer in layers) == counts["after"]


def test_a_dry_run_refuses_what_the_run_would(tmp_path, capsys):
    args = ["--output", tmp_path / "run", "--dry-run", "--device", "cpu"]
    assert exit_code("run", *args, "--batch-size", 5000) == 2
    assert "batch_size: expected at most 1347 images" in capsys.readouterr().err
    assert exit_code("run", *args, "--model", "resnet81") == 2
    assert "Did you mean" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_memory_grows_with_the_batch_the_optimizer_and_the_average():
    from torch_rsst.recipes.config import RunConfig
    from torch_rsst.recipes.dry_run import forecast

    def memory(**options):
        return forecast(RunConfig(device="cpu", **options)).memory

    plain = memory(batch_size=8)
    weights = 4 * 114_778
    assert plain.gradients == weights
    assert weights < plain.model < 3 * weights
    assert 2 * weights <= plain.optimizer < 2.01 * weights  # two moments and step counts
    assert memory(batch_size=16).activations == 2 * plain.activations > 0
    assert memory(batch_size=8, ema=0.9).optimizer == plain.optimizer + plain.model
    sgd = memory(batch_size=8, optimizer="sgd").optimizer
    assert sgd == weights  # one momentum
    assert plain.teacher == weights
    assert memory(batch_size=8, distill=0.0).teacher == 0
    parts = (plain.model, plain.gradients, plain.optimizer, plain.activations, plain.teacher)
    assert plain.total == sum(parts)


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["report", "-h"], ["compact", "-h"]])
def test_help_and_version_import_no_torch(args):
    code = (
        "import sys\n"
        "from torch_rsst.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'timm', 'numpy', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch-rsst" in done.stdout


def test_the_module_is_the_command(capsys):
    """``python -m torch_rsst`` runs the same code, and no torch either: ``-X importtime`` names all imports."""
    import torch_rsst

    command = [sys.executable, "-X", "importtime", "-m", "torch_rsst", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.split() == ["torch-rsst", torch_rsst.__version__]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "torch_rsst.cli.main" in imported
    assert "torch" not in imported
