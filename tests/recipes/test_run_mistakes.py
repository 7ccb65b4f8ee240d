"""Wrong options and wrong data: one line with the remedy, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from image_files import image_folder, picture, web_shards
from runs import QUICK, TINY, exit_code, settings_restored

pytestmark = pytest.mark.needs_timm


@pytest.fixture(autouse=True)
def restored():
    with settings_restored():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data"), train=40)


def refused(capsys, output, *args):
    """The one line that a refused command says."""
    capsys.readouterr()
    assert exit_code("run", "--output", output, *args) == 2
    said = capsys.readouterr()
    error = said.err.strip()
    assert error.startswith("torch-rsst: ")
    assert "\n" not in error
    assert "Traceback" not in said.out + error
    assert not output.exists() or not any(output.iterdir())
    return error


FOLDER = ["--data-dir", "DATA"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            [*FOLDER, "--model", "vit_smal_patch16_224"],
            "model: expected a model of timm, got 'vit_smal_patch16_224'. Did you mean 'vit_small_patch16_224'?",
        ),
        ([*FOLDER, "--model", "vit_digits"], "Pass --model, for example vit_small_patch16_224."),
        (FOLDER, "expected a model for these images: vit_digits takes the digits, 8 pixels wide"),
        (
            ["--data-dir", "DATA/missing"],
            "missing: expected the images, got no such folder or file. Check --data-dir.",
        ),
        (
            ["--data-dir", "DATA/train"],
            "expected a folder train with a folder for each class, got 'cat', 'dog'. Make it, or name another one: --train-split NAME.",
        ),
        (
            [*FOLDER, "--val-split", "held"],
            "expected a folder held with a folder for each class, got 'train', 'validation'. Make it, or name another one: --val-split NAME.",
        ),
        (
            [*FOLDER, *TINY, "--num-classes", "3"],
            "num_classes: expected 2, as the data has, got 3. Leave --num-classes away.",
        ),
        (
            ["--num-classes", "3"],
            "num_classes: expected 10, as the data has, got 3. Leave --num-classes away.",
        ),
        (
            [*FOLDER, *TINY, "--batch-size", "41"],
            "batch_size: expected at most 40 images, got 41. Pass a smaller --batch-size.",
        ),
        (
            [*FOLDER, *TINY, "--batch-size", "8", "--accumulation", "6"],
            "batch_size: expected at most 6 images by 6 (--accumulation), got 8.",
        ),
        (
            [*FOLDER, *TINY, "--batch-size", "3", "--mixup", "0.2"],
            "batch_size: expected an even number on each process, to mix images, got 3. Pass another --batch-size.",
        ),
        (
            ["--precision", "fp16", "--device", "cpu"],
            "precision: expected a GPU for fp16, got the CPU. Pass --precision bf16 or fp32.",
        ),
        (["--optimizer", "adamv"], "Did you mean 'adam'?"),
        (["--dataset", "torchvision/CIFAR", *FOLDER], "Did you mean 'CIFAR10'?"),
        (["--dataset", "foldr", *FOLDER], "Did you mean 'folder'?"),
        (["--dataset", "folder"], "data_dir: expected where the images of --dataset folder are"),
        (["--dataset", "digits", *FOLDER], "data_dir: expected none for digits, got "),
        (["--dataset", "torchvision/SBU", *FOLDER], "got torchvision/SBU, which has one. Arrange"),
        (
            ["--dataset", "wds/pets", *FOLDER],
            "expected 'train' of --dataset wds/pets, got split train not found in info",
        ),
        (["--dataset", "wsd/pets", *FOLDER], "expected one of 'digits', 'folder', 'torchvision/…'"),
        (
            ["--model", "test_resnet", "--image-size", "16", "--kinds", "heads"],
            "expected units of kind heads, got none in this model. It has units of kind channels.",
        ),
        (
            [*FOLDER, *TINY, "--auto-augment", "nonsense"],
            "auto_augment: expected a policy of timm, got 'nonsense'. Try rand-m9-mstd0.5-inc1.",
        ),
        (["--schedule", "linaer"], "Did you mean 'linear'?"),
        (
            [*FOLDER, *TINY, "--image-size", "30"],
            "image_size: expected a size that test_vit takes, not 30x30 pixels, got AssertionError",
        ),
        (
            ["--model", "test_vit2", "--pretrained", "--image-size", "32", *FOLDER],
            "model: expected the pretrained weights of test_vit2, got OSError: no network. Check the network, or leave --pretrained away.",
        ),
        (
            ["--model", "vit_base_patch16_gap_224", "--pretrained", *FOLDER],
            "model: expected a model with pretrained weights, got vit_base_patch16_gap_224. Leave --pretrained away.",
        ),
        (["--config", "resnet"], "Pass a YAML file, or one of deit-imagenet, digits, resnet18-"),
        (["--ema", "1.0"], "1 would keep the first weights: try 0.999."),
        (["--seed", str(2**31)], "seed: expected at most 2147483647"),
        (["--kinds", "heads", "heads"], "kinds: expected each kind once, got heads heads."),
    ],
)
def test_a_mistake_is_one_line(args, words, tmp_path, data, monkeypatch, capsys):
    import timm

    build = timm.create_model

    def without_network(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network")
        return build(name, **options)

    monkeypatch.setattr(timm, "create_model", without_network)
    args = [arg.replace("DATA", str(data)) for arg in args]
    assert words in refused(capsys, tmp_path / "run", *args)


def test_cuda_without_cuda(tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    error = refused(capsys, tmp_path / "run", "--device", "cuda")
    assert "device: expected a CUDA device, got none. Pass --device cpu." in error


def test_classes_that_differ_between_parts_are_named(tmp_path, capsys):
    root = image_folder(tmp_path / "data")
    (root / "validation" / "dog").rename(root / "validation" / "god")
    error = refused(capsys, tmp_path / "run", "--data-dir", root, *TINY)
    assert "the same classes in train and validation, got 'dog', 'god' in one alone" in error
    assert "Give both parts a folder for each class" in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour: red", "unknown 'colour'. Correct or restore the file."),
        ("rounds: many", "rounds: Input should be a valid integer"),
        ("kinds: [wings]", "kinds.0: Input should be 'heads', 'neurons' or 'channels'"),
        ("rounds: [", "expected the options of a run"),
        ("- 1", "got a list"),
        ("resume: true", "unknown 'resume'"),
        ("mixup: -1", "mixup: expected a number >= 0"),
    ],
)
def test_a_file_of_options_is_checked(text, words, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(text)
    error = refused(capsys, tmp_path / "run", "--config", tmp_path / "own.yaml")
    assert f"{tmp_path / 'own.yaml'}: " in error
    assert words in error


@pytest.mark.parametrize("beside", [["--dry-run"], ["--config", "digits"]])
def test_a_resumed_run_does_nothing_else(beside, tmp_path, capsys):
    error = refused(capsys, tmp_path / "run", "--resume", *beside)
    assert f"--resume: expected nothing else to do, got {beside[0]}." in error


def test_labels_that_no_class_has_leave_nothing_behind(tmp_path, capsys):
    """Seen only when they are read: what the run has written by then is taken back."""
    shards = web_shards(tmp_path / "data", labels=3)
    args = ["--dataset", "wds/pets", "--data-dir", shards, *TINY, *QUICK, "--log"]
    error = refused(capsys, tmp_path / "run", *args, "--num-classes", 2)
    assert "num_classes: expected more than 2, which is a label in the data, got 2" in error
    assert "Pass --num-classes 3 or more." in error
    error = refused(capsys, tmp_path / "run", *args)
    assert "num_classes: expected a number, which this data set does not hold, got none" in error


def test_shards_that_hold_less_than_they_say_are_an_error(tmp_path, capsys):
    shards = web_shards(tmp_path / "data", shards=1)
    (shards / "pets-train-0.tar").write_bytes(b"\0" * 10240)
    args = ["--dataset", "wds/pets", "--data-dir", shards, *TINY, *QUICK, "--num-classes", 2]
    error = refused(capsys, tmp_path / "run", *args)
    assert "wds/pets: expected 3 batches an epoch, by the number of images of" in error
    assert "got 0 that can be read" in error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("torn", [True, False])
def test_an_image_that_cannot_be_read_is_named(part, torn, workers, tmp_path, capsys):
    root = image_folder(tmp_path / "data", train=8, held_out=8)
    broken = root / part / "cat" / "000.png"
    picture(0, 0, 64).save(broken)
    broken.write_bytes(broken.read_bytes()[:600] if torn else b"no image")
    args = ["--data-dir", root, *TINY, *QUICK, "--workers", workers]
    error = refused(capsys, tmp_path / "run", *args)
    assert f"{broken}: expected an image, got " in error
    assert error.endswith("Restore or remove the file.")


def test_a_broken_image_found_later_keeps_the_run(tmp_path, capsys, monkeypatch):
    from torch_rsst.recipes import experiment

    root = image_folder(tmp_path / "data", train=8, held_out=8)
    record = experiment.Experiment._record

    def breaking(self, entry):
        (root / "train/cat/000.png").write_bytes(b"no image")
        record(self, entry)

    monkeypatch.setattr(experiment.Experiment, "_record", breaking)
    args = ["--output", tmp_path / "run", "--data-dir", root, *TINY, *QUICK]
    assert exit_code("run", *args) == 2
    assert "000.png: expected an image" in capsys.readouterr().err
    monkeypatch.undo()
    picture(0, 0).save(root / "train/cat/000.png")
    assert exit_code("run", "--output", tmp_path / "run", "--resume") == 0


def test_log_without_its_package_is_named(tmp_path, monkeypatch, capsys):
    from torch_rsst.recipes import training

    monkeypatch.setattr(training, "is_tensorboard_available", lambda: False)
    error = refused(capsys, tmp_path / "run", "--log")
    assert "needs more packages (tensorboard)" in error


def test_a_process_says_one_line_too(tmp_path, data):
    """With the real standard error: libraries log to it what a test does not see."""
    command = [sys.executable, "-m", "torch_rsst", "run", "--output", str(tmp_path / "run")]
    args = ["--dataset", "wds/pets", "--data-dir", str(data)]
    done = subprocess.run([*command, *args], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("torch-rsst: ")
    assert done.stdout.strip() == ""


def test_unread_options_of_the_embedded_model_are_named(tmp_path):
    from torch_rsst.recipes.config import RunConfig

    own = RunConfig(
        pretrained=True,
        drop_path=0.1,
        crop_scale=0.5,
        importance="magnitude",
        importance_batches=3,
        reconstruct="none",
    )
    assert own.without_effect() == {
        "crop_scale": "the digits",
        "pretrained": "--model vit_digits",
        "drop_path": "--model vit_digits",
        "importance_batches": "--importance magnitude",
    }


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "--methd", "rsst"], "Unrecognized options: --methd"),
        (["run", "--regroup-amount", "50%"], "could not convert string to float: '50%'"),
        (["compact"], "Missing from torch-rsst compact: PATH"),
        (["frob"], "Available subcommands: run, report, compact"),
        ([], "Expected one of {run, report, compact, predict}"),
    ],
)
def test_what_the_parser_refuses_is_one_line(args, words, capsys):
    assert exit_code(*args) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("torch-rsst: ")
    assert words in error
    assert "\n" not in error
    assert not any(0x2500 <= ord(character) < 0x2580 for character in error)


def test_a_reader_that_has_seen_enough_is_no_mistake():
    command = f"{sys.executable} -m torch_rsst run --help | head -c 1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("u", "")


def test_a_finished_run_is_resumed_with_its_own_options_alone(tmp_path, capsys):
    output = tmp_path / "run"
    assert exit_code("run", "--output", output, "--device", "cpu", *QUICK, "--batch-size", 256) == 0
    assert exit_code("run", "--resume", "--output", output) == 0
    capsys.readouterr()
    assert exit_code("run", "--resume", "--output", output, "--rounds", 99) == 2
    assert "expected rounds=1, got rounds=99" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"accuracy": "x"}, "report.json: expected the results of a run, got none in 'accuracy'"),
        ({"sparsity": []}, "report.json: expected the results of a run, got none in 'sparsity'"),
        (
            {"build": {"name": "os.system"}},
            "report.json: expected how to build the model, got build: ",
        ),
        (
            None,
            "report.json: expected values for 'method', 'model', 'build', 'input_size', 'classes'",
        ),
    ],
)
def test_a_damaged_report_is_named(damage, words, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    results = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({} if damage is None else results | damage))
    assert exit_code("compact", run) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert ".. " not in error
    assert "\n" not in error


def test_a_record_without_its_event_is_named(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "metrics.jsonl").write_text("{}\n")
    assert exit_code("compact", run) == 2
    assert (
        "metrics.jsonl: expected values for 'event', 'accuracy', got none"
        in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    with settings_restored():
        assert (
            exit_code("run", "--output", output, "--device", "cpu", *QUICK, "--batch-size", 256)
            == 0
        )
    return output
