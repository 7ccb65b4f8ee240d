"""``torch-rsst compact`` and what ``report`` says afterwards."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import runs
import torch
from image_files import image_folder
from runs import TINY, exit_code

import torch_rsst

pytestmark = [
    pytest.mark.needs_timm,
    pytest.mark.filterwarnings("always::torch_rsst.UnfrozenZerosWarning"),
]

QUICK = [
    "--dense-epochs", "1", "--epochs", "1", "--rounds", "2", "--finetune-epochs", "1",
    "--batch-size", "256", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert exit_code("run", "--output", folder, *QUICK) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return folder


def saved(run):
    """The state dict in the folder of the smaller model."""
    from safetensors.torch import load_file

    return load_file(run / "compact" / "model.safetensors")


def said(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_run_names_the_next_step_and_report_counts_the_masked_model(tmp_path, run, capsys):
    capsys.readouterr()
    assert exit_code("report", run) == 0
    out = said(capsys)
    assert f"torch-rsst compact {run}" in out
    assert "parameters, masked │ 114,778" in out
    assert "multiply-adds per image, masked │ 566,112" in out
    assert "compacted" not in out


def test_compact_prints_before_and_after_and_report_repeats_it(run, capsys):
    assert exit_code("compact", run) == 0
    out = said(capsys)
    receipt = json.loads((run / "compact" / "compact.json").read_text())["receipt"]
    assert receipt["units"] == {
        "heads": {"before": 16, "after": 8},
        "neurons": {"before": 768, "after": 384},
    }
    assert receipt["parameters"] == {"before": 114_778, "after": 58_810}
    assert receipt["multiply_adds"] == {"before": 450 * 566_112, "after": 450 * 284_832}
    assert receipt["accuracy"]["before"] == receipt["accuracy"]["after"]
    assert receipt["max_error"] <= 1e-5
    assert "│ heads │ 16 │ 8 │ │ neurons │ 768 │ 384 │ │ parameters │ 114,778 │ 58,810 │" in out
    assert "│ multiply-adds per image │ 566,112 │ 284,832 │" in out
    time = receipt["latency_ms"]
    assert f"│ time for 450 images │ {time['before']:.2f} ms │ {time['after']:.2f} ms │" in out
    assert "medians of runs in turns (masks made permanent)." in out
    assert f'torch_rsst.load_compact("{run / "compact"}")' in out
    assert not any("mask" in name for name in saved(run))
    page = (run / "report.html").read_text()
    assert "<td>parameters</td><td>114,778</td><td>58,810</td>" in page
    assert exit_code("report", run) == 0
    again = said(capsys)
    assert again.endswith(out[out.index("│ heads │ 16 │ 8 │") :])
    assert "accuracy, final" in again
    assert "torch-rsst compact" not in again


def test_the_file_is_as_large_as_its_plain_parameters(run):
    from safetensors.torch import save

    assert exit_code("compact", run) == 0
    small = torch_rsst.load_compact(run / "compact")
    assert sum(p.numel() for p in small.parameters()) == 58_810
    needed = len(save(dict(small.named_parameters())))
    assert (run / "compact" / "model.safetensors").stat().st_size <= 1.02 * needed


def test_masks_of_single_weights_are_made_permanent_and_counted(run, capsys, monkeypatch):
    """Whatever a run leaves masked: what is timed, saved and served are plain parameters."""
    from torch_rsst.recipes.run_folder import RunFolder

    alive = torch.ones(10, 48, dtype=torch.bool)
    alive[0, :5] = False

    def read_model(folder, build):
        model = genuine(folder, build)
        torch_rsst.apply_mask(model, {"head.weight": alive})
        return model

    genuine = RunFolder.read_model
    monkeypatch.setattr(RunFolder, "read_model", read_model)
    assert exit_code("compact", run) == 0
    out = said(capsys)
    assert re.search(
        r"Warning: compact: \d[\d,]* masked weights that were not cut out are ordinary", out
    )
    assert "save_compact" not in out
    assert "(masks made permanent)." in out
    assert not any("mask" in name for name in saved(run))
    assert saved(run)["head.weight"][0, :5].tolist() == [0.0] * 5
    assert exit_code("compact", run, "--keep-masks") == 0
    out = said(capsys)
    assert "Warning" not in out
    assert "after: masks applied in each forward pass)." in out
    assert saved(run)["head.weight_mask"][0, :5].tolist() == [0.0] * 5


def test_the_smaller_model_loads_in_a_process_of_its_own(run, tmp_path, capsys):
    from torch_rsst.recipes.digits import BUILD
    from torch_rsst.recipes.run_folder import RunFolder

    output = tmp_path / "small"
    page = (run / "report.html").read_bytes()
    assert exit_code("compact", run, "--output", output, "--round-to", 16, "--export") == 0
    assert {path.name for path in output.iterdir()} == {
        "README.md", "compact.json", "model.safetensors", "model.pt2"
    }  # fmt: skip
    assert not (run / "compact").exists()
    assert (run / "report.html").read_bytes() == page
    images = torch.randn(3, 1, 8, 8)
    torch.save(
        {"x": images, "y": RunFolder(run).read_model(BUILD)(images).detach()}, tmp_path / "xy"
    )
    code = (
        "import sys, torch, torch_rsst; e = torch.load(sys.argv[2]); "
        "m = torch_rsst.load_compact(sys.argv[1]); "
        "torch.testing.assert_close(m(e['x']), e['y'], rtol=0, atol=1e-5); "
        "assert m.blocks[0].mlp.fc1.out_features % 16 == 0; "
        "assert m.blocks[0].attn.qkv.out_features % 48 == 0"
    )
    command = [sys.executable, "-c", code, str(output), str(tmp_path / "xy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compact_again_replaces_what_is_there(run, capsys):
    assert exit_code("compact", run, "--export") == 0
    assert exit_code("compact", run) == 0
    assert not (run / "compact" / "model.pt2").exists()


def _unfinished(run):
    (run / "report.json").unlink()


def _torn_weights(run):
    content = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(content[:-100])


def _occupied(run):
    (run / "compact").mkdir()
    (run / "compact" / "model.safetensors").write_text("mine")


def _link(run):
    (run / "compact").symlink_to(run.parent)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_unfinished, "expected a finished run, got no report.json"),
        (_torn_weights, "model.safetensors: expected the model of this run, got"),
        (lambda run: (run / "model.safetensors").unlink(), "model.safetensors"),
        (_occupied, "expected a new folder, or one of save_compact, got one with a model.safetens"),
        (_link, "expected files of its own, got a link to"),
        (lambda run: (run / "metrics.jsonl").write_text("["), "metrics.jsonl: expected JSON lines"),
        (shutil.rmtree, "expected the folder of a run, got no config.yaml"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line_and_exit_code_2(run, capsys, damage, words):
    damage(run)
    capsys.readouterr()
    assert exit_code("compact", run) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("torch-rsst: ")
    assert words in error
    assert "\n" not in error


def test_fewer_images_are_compared_and_counted(run, capsys):
    assert exit_code("compact", run, "--images", 7) == 0
    assert "Outputs for 7 held-out images differ by at most" in said(capsys)
    receipt = json.loads((run / "compact" / "compact.json").read_text())["receipt"]
    assert receipt["images"] == 7
    assert receipt["multiply_adds"]["before"] == 7 * 566_112
    assert exit_code("compact", run, "--images", 0) == 2
    assert "images: expected an int >= 1, got 0" in capsys.readouterr().err


def test_wrong_options_exit_with_2(run, capsys):
    assert exit_code("compact", run, "--round-to", "0") == 2
    assert "round_to: expected an int >= 1, got 0" in capsys.readouterr().err
    assert exit_code("compact", run, "--round-to", "many") == 2
    assert exit_code("compact") == 2
    assert not (run / "compact").exists()


def test_a_damaged_compact_folder_is_named_by_report(run, capsys):
    (run / "compact").mkdir()
    (run / "compact" / "compact.json").write_text("{}")
    assert exit_code("report", run) == 2
    assert "compact.json: expected the format" in capsys.readouterr().err
    masked = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    groups = torch_rsst.find_groups(masked)
    shutil.rmtree(run / "compact")
    torch_rsst.save_compact(torch_rsst.compact(masked, groups), run / "compact")
    assert exit_code("report", run) == 2
    expected = (
        "compact: expected values for 'accuracy', 'images', 'units', got none. Restore the file"
    )
    assert expected in capsys.readouterr().err


@pytest.mark.filterwarnings("always::torch_rsst.utils.errors.RSSTWarning")
def test_warnings_are_a_line(run, capsys, monkeypatch):
    import warnings

    from torch_rsst.recipes import compacting

    def warn(*args, **kwargs):
        warnings.warn("Dead units stay in the model", torch_rsst.CompactionWarning, stacklevel=2)
        return genuine(*args, **kwargs)

    genuine = compacting.torch_rsst.compact
    monkeypatch.setattr(compacting.torch_rsst, "compact", warn)
    assert exit_code("compact", run) == 0
    out = said(capsys)
    assert "Warning: Dead units stay in the model" in out
    assert ".py" not in out


def test_images_of_other_classes_are_refused(tmp_path, capsys):
    data, output = image_folder(tmp_path / "data"), tmp_path / "run"
    assert exit_code("run", "--data-dir", data, "--output", output, *TINY, *runs.QUICK) == 0
    for part in ("train", "validation"):
        (data / part / "cat").rename(data / part / "zebra")
    capsys.readouterr()
    assert exit_code("compact", output) == 2
    error = capsys.readouterr().err
    assert "expected the classes of the model: 'cat', 'dog', got 'dog', 'zebra'" in error
    assert not (output / "compact").exists()


def test_digits_are_as_large_as_the_model_has_seen_them(tmp_path, capsys):
    """Also where no option says how large: then it is what the model was made for."""
    output = tmp_path / "run"
    model = ["--model", "test_vit", "--device", "cpu", "--batch-size", 64]
    assert exit_code("run", "--output", output, *runs.QUICK, *model) == 0
    assert exit_code("compact", output, "--images", 4) == 0, capsys.readouterr().err
    before = json.loads((output / "report.json").read_text())
    receipt = json.loads((output / "compact" / "compact.json").read_text())["receipt"]
    assert before["input_size"] == [1, 160, 160]
    assert receipt["multiply_adds"]["before"] == 4 * before["multiply_adds"]
    assert receipt["accuracy"]["before"] == pytest.approx(before["accuracy"])


def test_several_runs_are_compared_on_one_page(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    assert exit_code("compact", run) == 0
    capsys.readouterr()
    assert exit_code("report", run, other, "--output", tmp_path / "side by side") == 0
    out = said(capsys)
    assert "not compacted" in out
    page = (tmp_path / "side by side" / "comparison.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert "<td>run</td>" in page
    assert "<td>other</td>" in page
    receipt = json.loads((run / "compact" / "compact.json").read_text())["receipt"]
    assert f"{receipt['parameters']['after']:,}" in page


@pytest.mark.parametrize(
    ("others", "words"),
    [
        (["run"], "report: expected each run once"),
        (["nowhere"], "expected the folder of a"),
    ],
)
def test_runs_that_cannot_be_compared_are_named_and_nothing_is_written(
    others, words, run, tmp_path, capsys
):
    folders = [run, *(tmp_path / name for name in others)]
    assert exit_code("report", *folders, "--output", tmp_path / "pages") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "pages").exists()


def test_an_output_folder_is_for_several_runs(run, tmp_path, capsys):
    assert exit_code("report", run, "--output", tmp_path / "pages") == 2
    assert "--output: expected several runs to compare, got one run" in capsys.readouterr().err
