"""Runs on images in folders, CIFAR's files and web shards: the shipped recipes, and what is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from image_files import cifar, image_folder, picture, web_shards
from runs import QUICK, TINY, exit_code, settings_restored

pytestmark = pytest.mark.needs_timm


@pytest.fixture(autouse=True)
def restored():
    with settings_restored():
        yield


def config(**options):
    from torch_rsst.recipes.config import RunConfig

    return RunConfig(**{"device": "cpu", "workers": 0, **options})


def report_of(folder: Path):
    return json.loads((folder / "report.json").read_text())


# How each recipe is made small: the data that it names is made here.
SMALL = {
    "digits": ["--batch-size", "512"],
    "vit-cifar10": [*TINY, "--no-pretrained", "--batch-size", "20", "--precision", "fp32"],
    "vit-cifar100": [*TINY, "--no-pretrained", "--batch-size", "10"],
    "resnet18-channels": ["--model", "test_resnet", "--image-size", "32", "--batch-size", "20"],
    "deit-imagenet": [*TINY, "--no-pretrained", "--batch-size", "8", "--importance-batches", "1"],
}
LEFT = {
    "digits": {"head_sparsity": 0.5, "neuron_sparsity": 0.5},
    "vit-cifar10": {"head_sparsity": 0.5, "neuron_sparsity": 0.5},
    "vit-cifar100": {"head_sparsity": 0.5, "neuron_sparsity": 0.5},
    "resnet18-channels": {},  # round_to 8 keeps layers of 8 channels whole
    "deit-imagenet": {"head_sparsity": 0.5, "neuron_sparsity": 0.5},
}


def test_every_recipe_is_tried():
    from torch_rsst.recipes.config import _configs

    assert {path.name.removesuffix(".yaml") for path in _configs()} == SMALL.keys() == LEFT.keys()


@pytest.mark.parametrize("recipe", list(SMALL))
@pytest.mark.filterwarnings(
    "ignore::torch_rsst.utils.errors.RSSTWarning"
)  # a few steps penalize little
def test_a_recipe_runs_to_its_end_on_the_data_that_it_names(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if recipe == "deit-imagenet":
        image_folder(tmp_path / "data/imagenet")
    elif recipe == "vit-cifar100":
        cifar(tmp_path / "data", monkeypatch, classes=100)
    else:
        cifar(tmp_path / "data", monkeypatch)
    quick = ["--dense-epochs", 1, "--epochs", 1, "--rounds", 1, "--finetune-epochs", 0]
    args = [*SMALL[recipe], *quick, "--workers", 0, "--device", "cpu"]
    assert exit_code("run", "--config", recipe, *args) == 0, capsys.readouterr().err
    from torch_rsst.recipes.config import RunConfig

    folder = RunConfig.named(recipe).output
    report = report_of(folder)
    assert LEFT[recipe].items() <= report.items()
    assert report["model"] == ("vit_digits" if recipe == "digits" else SMALL[recipe][1])
    assert (folder / "report.html").is_file()
    assert (folder / "log").is_dir() == (recipe in ("vit-cifar10", "vit-cifar100", "deit-imagenet"))
    if recipe == "resnet18-channels":
        assert 0.2 < report["channel_sparsity"] <= 0.5


def test_a_convolutional_model_takes_the_digits(tmp_path, capsys):
    run = ["--output", tmp_path / "run", "--model", "test_resnet", "--image-size", 16]
    args = [*run, "--method", "refill", "--kinds", "channels", "--device", "cpu"]
    quick = [*QUICK, "--batch-size", 512]
    assert exit_code("run", *args, *quick) == 0, capsys.readouterr().err
    assert report_of(tmp_path / "run")["build"]["kwargs"] == {"num_classes": 10, "in_chans": 1}
    assert exit_code("compact", tmp_path / "run") == 0
    out = " ".join(capsys.readouterr().out.split())
    channels = report_of(tmp_path / "run")["sparsity"]["kinds"]["channels"]
    assert f"│ channels │ {channels['units']} │" in out


def test_a_folder_is_run_compacted_and_found_again_where_it_was_moved(tmp_path, capsys):
    data = image_folder(tmp_path / "data", parts=("train", "val"))
    run = ["--output", tmp_path / "run", "--data-dir", data, *TINY, *QUICK, "--method", "refill"]
    assert exit_code("run", *run) == 0, capsys.readouterr().err
    data.rename(tmp_path / "moved")
    assert exit_code("compact", tmp_path / "run") == 2
    assert "Check --data-dir." in capsys.readouterr().err
    assert exit_code("compact", tmp_path / "run", "--data-dir", tmp_path / "moved") == 0
    receipt = json.loads((tmp_path / "run/compact/compact.json").read_text())["receipt"]
    assert receipt["images"] == 12
    assert receipt["units"]["heads"] == {"before": 12, "after": 6}
    assert receipt["accuracy"]["before"] == pytest.approx(report_of(tmp_path / "run")["accuracy"])


def test_digits_are_not_moved(tmp_path, capsys):
    args = ["--output", tmp_path / "run", "--device", "cpu", *QUICK, "--batch-size", 512]
    assert exit_code("run", *args, "--method", "refill") == 0
    capsys.readouterr()
    assert exit_code("compact", tmp_path / "run", "--data-dir", tmp_path) == 2
    assert "data_dir: expected none for digits" in capsys.readouterr().err


@pytest.mark.parametrize("info", [True, False])
def test_web_shards_are_run_and_compacted(tmp_path, capsys, info):
    data = web_shards(tmp_path / "data", info=info)
    run = ["--output", tmp_path / "run", "--dataset", "wds/pets", "--data-dir", data]
    args = [*run, "--num-classes", 2, *TINY, *QUICK, "--method", "refill", "--rounds", 1]
    if not info:
        args += ["--train-split", "pets-train-{0..1}.tar|24"]
        args += ["--val-split", "pets-validation-{0..1}.tar|12"]
    assert exit_code("run", *args) == 0, capsys.readouterr().err
    assert report_of(tmp_path / "run")["head_sparsity"] == 0.5
    assert exit_code("compact", tmp_path / "run") == 0, capsys.readouterr().err
    receipt = json.loads((tmp_path / "run/compact/compact.json").read_text())["receipt"]
    assert receipt["images"] == 12


def test_more_workers_than_shards_read_every_image_of_an_epoch(tmp_path):
    """Workers without a shard would leave the epoch short."""
    from accelerate import Accelerator

    from torch_rsst.recipes.images import open_images
    from torch_rsst.recipes.loading import Loaders

    data = web_shards(tmp_path / "data", shards=1)
    own = config(dataset="wds/pets", data_dir=data, num_classes=2, workers=3, batch_size=8)
    images = open_images(own, processes=1)
    form = {"input_size": (3, 32, 32), "interpolation": "bilinear", "crop_pct": 1.0}
    form |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_mode": "center"}
    loaders = Loaders(own, images.prepared(own, form), Accelerator(cpu=True))
    assert len(loaders) == 3
    assert [len(labels) for _, labels in loaders.epoch(0)] == [8, 8, 8]
    assert sum(len(labels) for _, labels in loaders.held_out()) == 12


def test_gray_images_of_torchvision_are_colored(tmp_path, monkeypatch, capsys):
    """MNIST gives images of one channel; models take three."""
    import torchvision

    class Gray(torchvision.datasets.VisionDataset):
        classes = ("zero", "one")

        def __init__(self, root, train=True, transform=None):
            super().__init__(root, transform=transform)
            self._count = 16 if train else 8

        def __len__(self):
            return self._count

        def __getitem__(self, index):
            image = picture(index % 2, index).convert("L")
            return self.transform(image), index % 2

    monkeypatch.setattr(torchvision.datasets, "Gray", Gray, raising=False)
    run = ["--output", tmp_path / "run", "--dataset", "torchvision/Gray", "--data-dir", tmp_path]
    assert exit_code("run", *run, *TINY, *QUICK, "--method", "refill") == 0, capsys.readouterr().err


def test_download_is_asked_for_and_only_then(tmp_path, monkeypatch, capsys):
    import torchvision

    from torch_rsst.recipes.images import open_images

    asked = []
    known = torchvision.datasets.CIFAR10

    def download(self):
        asked.append(self.root)
        cifar(tmp_path, monkeypatch)

    monkeypatch.setattr(known, "download", download)
    options = {"dataset": "torchvision/CIFAR10", "data_dir": tmp_path}
    with pytest.raises(
        ValueError, match=r"Dataset not found.*Check --data-dir, or pass --download"
    ):
        open_images(config(**options), processes=1)
    assert not asked
    images = open_images(config(download=True, **options), processes=1)
    assert asked == [str(tmp_path)] * 2
    assert (len(images.train), len(images.held_out), images.classes) == (100, 20, 10)
    run = ["--dataset", "torchvision/CIFAR10", "--data-dir", tmp_path, *TINY, "--device", "cpu"]
    for more, written in {
        "": "written.",
        "--download": "written, but for downloaded images.",
    }.items():
        args = [
            *run,
            "--output",
            tmp_path / "run",
            "--dry-run",
            "--batch-size",
            20,
            *filter(None, [more]),
        ]
        assert exit_code("run", *args) == 0, capsys.readouterr().err
        assert f"Nothing has been trained or {written}" in " ".join(capsys.readouterr().out.split())


# Augmentation


@pytest.fixture
def augmented(tmp_path):
    """The first training image under some options, always with the same random numbers."""
    from torch_rsst.recipes.images import open_images
    from torch_rsst.recipes.loading import Seeded

    data = image_folder(tmp_path / "data", train=2, held_out=2)
    form = {"input_size": (3, 16, 16), "interpolation": "bilinear", "crop_pct": 1.0}
    form |= {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_mode": "center"}
    plain = {"crop_scale": 0.5, "flip": 0.0, "color_jitter": 0.0, "data_dir": data}

    def of(**options):
        own = config(**{**plain, **options})
        images = open_images(own, processes=1).prepared(own, form)
        return Seeded(images.train, images.classes, own.seed)[0][0]

    return of


def test_each_option_of_augmentation_changes_images(augmented):
    plain = augmented()
    assert torch.equal(plain, augmented())
    assert torch.equal(augmented(flip=1.0), plain.flip(-1))
    assert not torch.equal(augmented(seed=1), plain)
    assert not torch.equal(augmented(crop_scale=0.1), plain)
    jittered = augmented(color_jitter=0.9)
    assert not torch.equal(jittered, plain)
    erased = augmented(random_erasing=1.0)
    changed = (erased != plain).any(0)
    assert 0 < int(changed.sum()) < changed.numel()
    assert not torch.equal(augmented(auto_augment="rand-m9-n3-mstd0.5"), plain)


def test_epochs_of_a_run_are_augmented_differently():
    from torch_rsst.recipes.training import Trainer

    loaders = Trainer(config(batch_size=512)).loaders

    def images(epoch, first=0):
        return torch.cat([batch.flatten(1) for batch, _ in loaders.epoch(epoch, first)])

    def contents(batch):  # in any order
        return sorted(map(tuple, batch.mul(10).round().int().tolist()))

    def plain(epoch):
        loaders._augmented.set_epoch(0)
        with_order = loaders._train.batch_sampler
        loaders._train.set_epoch(epoch)
        return [index for batch in with_order for index in batch]

    first, second = images(0), images(1)
    assert len(first) == len(second) == 1024
    assert torch.equal(images(1), second)
    assert torch.equal(images(1, first=1), second[512:])
    both = set(plain(0)) & set(plain(1))
    assert len(both) > 600
    same = set(contents(first)) & set(contents(second))
    assert len(same) < len(both) / 2  # one shift of nine is the same


def test_augmentation_depends_on_the_epoch_and_the_image_alone(tmp_path):
    from torch_rsst.recipes import digits
    from torch_rsst.recipes.loading import Seeded

    train, _ = digits.datasets()
    seeded = Seeded(digits.Shifted(train), 10, seed=0)
    first = [seeded[index][0] for index in range(8)]
    torch.rand(5)
    again = [seeded[index][0] for index in reversed(range(8))][::-1]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    seeded.set_epoch(1)
    later = [seeded[index][0] for index in range(8)]
    assert not all(torch.equal(one, two) for one, two in zip(first, later, strict=True))
