"""Images by name: digits, a folder, a data set of torchvision, or whatever timm's readers read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
from timm.data import create_dataset, create_transform
from torch.utils.data import Dataset, IterableDataset

from torch_rsst.errors import listing, message, unknown_choice
from torch_rsst.recipes import digits
from torch_rsst.recipes.config import RunConfig

_TRAIN, _HELD_OUT = "train", ("validation", "val", "valid", "test")


@dataclass(frozen=True, eq=False)
class Images:
    """What a run trains on and is judged by; images are not transformed before :meth:`prepared`.

    Attributes:
        train: to train on.
        held_out: to evaluate on.
        classes: how many there are.
        channels: of an image.
    """

    train: Dataset[Any]
    held_out: Dataset[Any]
    classes: int
    channels: int = 3

    @property
    def streams(self) -> bool:
        """Whether images come in an order of their own, and cannot be asked for by number."""
        return isinstance(self.train, IterableDataset)

    def prepared(self, config: RunConfig, form: Mapping[str, Any]) -> Images:
        """The same with transforms.

        Args:
            config: says how to augment.
            form: what the model takes, as :func:`timm.data.resolve_data_config` tells.
        """
        if config.source == "digits":
            train, held_out = digits.datasets(form["input_size"][-1])
            return Images(digits.Shifted(train), held_out, self.classes, self.channels)
        shape = {key: form[key] for key in ("input_size", "interpolation", "mean", "std")}
        self.train.transform = create_transform(  # type: ignore[attr-defined]
            **shape,
            is_training=True,
            scale=(config.crop_scale, 1.0),
            hflip=config.flip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
        )
        self.held_out.transform = create_transform(  # type: ignore[attr-defined]
            **shape, crop_pct=form["crop_pct"], crop_mode=form["crop_mode"]
        )
        return self


def open_images(config: RunConfig, *, processes: int) -> Images:
    """Find the images that a run is about.

    Raises:
        FileNotFoundError, NotADirectoryError: where they are not there.
        ValueError: for an unknown data set, or classes that do not match.
        ModuleNotFoundError: where a reader needs a package that is missing.
    """
    if config.source == "digits":
        train, held_out = digits.datasets()
        _check_classes(config, digits.CLASSES)
        return Images(train, held_out, digits.CLASSES, channels=1)
    root = _root(config)
    parts = [
        _open(config, root, training=training, processes=processes) for training in (True, False)
    ]
    names = [_classes(part) for part in parts]
    if names[0] and names[1] and names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))
        expected = f"the same classes in {config.train_split} and {config.val_split}"
        remedy = "Give both parts a folder for each class, with the same names."
        raise ValueError(
            message(str(root), expected=expected, got=f"{listing(odd)} in one alone", remedy=remedy)
        )
    return Images(parts[0], parts[1], _check_classes(config, len(names[0]) or None))


def _root(config: RunConfig) -> Path:
    root = Path(config.data_dir or ".").expanduser()
    if not root.exists() and not config.download and not config.source.startswith("hf"):
        remedy = "Check --data-dir."
        if config.source.startswith(("torchvision/", "torch/", "tfds/")):
            remedy = "Check --data-dir, or pass --download."
        raise FileNotFoundError(
            message(str(root), expected="the images", got="nothing", remedy=remedy)
        )
    return root


def _open(config: RunConfig, root: Path, *, training: bool, processes: int) -> Dataset[Any]:
    split = config.train_split if training else config.val_split
    if config.source.startswith("torchvision/"):
        return _of_torchvision(config, root, training=training)
    if config.source == "folder":
        root = _part(root, split, training=training)
    elif "/" not in config.source:
        choices = [
            "digits",
            "folder",
            "torchvision/…",
            "wds/…",
            "hfds/…",
            "hfids/…",
            "tfds/…",
            "torch/…",
        ]
        raise ValueError(unknown_choice("dataset", config.source, choices))
    try:
        dataset: Dataset[Any] = create_dataset(
            "" if config.source == "folder" else config.source,
            root=str(root),
            split=split,
            search_split=config.source != "folder",
            is_training=training,
            batch_size=max(1, config.batch_size // processes),
            seed=config.seed,
            download=config.download,
        )
    except (
        AssertionError,
        AttributeError,
        KeyError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "install" in reason.lower() and "webdataset" in reason.lower():
            raise ModuleNotFoundError(reason, name="webdataset") from error
        expected = f"{split!r} of --dataset {config.source}"
        remedy = "Check --data-dir, --train-split and --val-split."
        raise ValueError(
            message(str(root), expected=expected, got=reason, remedy=remedy)
        ) from error
    return dataset


def _part(root: Path, split: str, *, training: bool) -> Path:
    """The folder of a part: by its name, or by another name of the held-out part."""
    names = [split] if training or split != _HELD_OUT[0] else _HELD_OUT
    for name in names:
        for found in (root / name, root / f"{name}.tar"):
            if found.exists():
                return found
    inside = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    option = "--train-split" if training else "--val-split"
    raise FileNotFoundError(
        message(
            str(root),
            expected=f"a folder {' or '.join(names)} with a folder for each class",
            got=listing(inside) if inside else "nothing",
            remedy=f"Make it, or name another one: {option} NAME.",
        )
    )


def _of_torchvision(config: RunConfig, root: Path, *, training: bool) -> Dataset[Any]:
    """A data set of torchvision by the name of its class."""
    name = config.source.removeprefix("torchvision/")
    sets: dict[str, Any] = {
        key: value
        for key, value in vars(torchvision.datasets).items()
        if inspect.isclass(value) and issubclass(value, torchvision.datasets.VisionDataset)
    }
    if name not in sets:
        raise ValueError(unknown_choice("dataset", name, sorted(sets)))
    takes = inspect.signature(sets[name].__init__).parameters
    split = config.train_split if training else config.val_split
    options: dict[str, Any] = {"root": str(root)}
    if "train" in takes:
        options["train"] = training
    elif "split" in takes:
        options["split"] = split
    else:
        expected = "a data set of two parts"
        remedy = "Arrange it as folders train and validation, and pass --dataset folder."
        got = f"torchvision/{name}, which has one"
        raise ValueError(message("dataset", expected=expected, got=got, remedy=remedy))
    if "download" in takes:
        options["download"] = config.download
    try:
        dataset: Dataset[Any] = sets[name](**options)
    except (OSError, RuntimeError, ValueError) as error:
        got = " ".join(str(error).split())
        expected, remedy = f"torchvision's {name}", "Check --data-dir, or pass --download."
        raise ValueError(message(str(root), expected=expected, got=got, remedy=remedy)) from error
    return dataset


def _classes(dataset: Any) -> list[str]:
    """The names of the classes, as far as a data set tells; else none."""
    reader = getattr(dataset, "reader", None)
    known = getattr(reader, "class_to_idx", None) or getattr(dataset, "classes", None) or []
    return sorted(map(str, known))


def _check_classes(config: RunConfig, found: int | None) -> int:
    given = config.num_classes
    if found is None and given is None:
        expected, remedy = "a number: this data set does not tell", "Pass --num-classes."
        raise ValueError(message("num_classes", expected=expected, got="none", remedy=remedy))
    if found is not None and given is not None and found != given:
        expected, remedy = f"{found}, as the data has", "Leave --num-classes away."
        raise ValueError(message("num_classes", expected=expected, got=given, remedy=remedy))
    classes = found if given is None else given
    assert classes is not None
    return classes
