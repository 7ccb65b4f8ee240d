"""Images by name: digits, a folder, a data set of torchvision, or one of timm's readers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torchvision
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset, create_transform
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import Compose

from torch_rsst.recipes import digits
from torch_rsst.recipes.config import RunConfig
from torch_rsst.saving.info import CompactInfo
from torch_rsst.utils.errors import closest, listing, message, refuse, unknown_choice

_HELD_OUT = ("validation", "val", "valid", "test")
_TORCHVISION = "torchvision/"
_READERS = ("wds/", "hfds/", "hfids/", "tfds/", "torch/")  # of timm


class BadImages(ValueError):  # noqa: N818 - wrong data, not a bug
    """Images that cannot be read, or are labeled as none of the classes."""

    def __init__(self, text: str) -> None:
        # An error of a loading process arrives with its traceback as text.
        super().__init__(text.strip().rpartition(f"{type(self).__name__}: ")[2])


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a run; they are not transformed before :meth:`prepared`.

    Attributes:
        train: the images to train on.
        held_out: the images to evaluate on.
        classes: the number of classes.
        names: the names of the classes, in order, where the data has them.
        channels: the channels of an image.
    """

    train: Dataset[Any]
    held_out: Dataset[Any]
    classes: int
    names: tuple[str, ...] = ()
    channels: int = 3

    @property
    def labels(self) -> list[str] | int:
        """The names of the classes, or their number."""
        return list(self.names) or self.classes

    @property
    def contents(self) -> dict[str, Any]:
        """What must be equal in a resumed run: classes and numbers of images."""
        if self.streams:  # each process counts its share
            return {"classes": self.labels}
        counts = (len(part) for part in (self.train, self.held_out))  # type: ignore[arg-type]
        return {"classes": self.labels, **dict(zip(("train", "held_out"), counts, strict=True))}

    @property
    def streams(self) -> bool:
        """Whether images come in an order of their own, and cannot be read by index."""
        return isinstance(self.train, IterableDataset)

    def prepared(self, config: RunConfig, form: Mapping[str, Any]) -> Images:
        """The images with transforms.

        Args:
            config: the options for augmentation.
            form: size, normalization and crop, as a data configuration of timm.
        """
        if config.source == "digits":
            train, held_out = digits.datasets(form["input_size"][-1])
            return replace(self, train=digits.Shifted(train), held_out=held_out)
        shape = {key: form[key] for key in ("input_size", "interpolation", "mean", "std")}
        # Some data sets of torchvision have gray images; models take three channels.
        self.train.transform = Compose([_in_color, _augmenting(config, shape)])  # type: ignore[attr-defined]
        self.held_out.transform = CompactInfo.of(form).transform()  # type: ignore[attr-defined]
        return self


class Files(Dataset[Any]):
    """Images of one of timm's readers; a file that cannot be read is an error that names it.

    timm's own data set reads the next image instead, which changes what an accuracy is measured on.
    """

    def __init__(self, reader: Any) -> None:
        self.reader, self.transform = reader, _in_color

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            file, label = self.reader[index][:2]
            image = _in_color(Image.open(file))
        except (OSError, SyntaxError, ValueError) as error:  # PIL: SyntaxError for a broken PNG
            known = not isinstance(error, UnidentifiedImageError)
            got = " ".join(str(error).split()) if known else "what is none, or broken"
            remedy = "Restore or remove the file."
            name = str(self.reader.filename(index, absolute=True) or f"image {index}")
            raise BadImages(message(name, expected="an image", got=got, remedy=remedy)) from error
        return self.transform(image), label


def _in_color(image: Any) -> Any:
    return image.convert("RGB") if isinstance(image, Image.Image) else image


def _augmenting(config: RunConfig, shape: Mapping[str, Any]) -> Any:
    try:
        return create_transform(
            **shape,
            is_training=True,
            scale=(config.crop_scale, 1.0),
            hflip=config.flip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.random_erasing,
        )
    except Exception as error:  # timm asserts, or fails at whatever it reads
        expected, remedy = "a policy of timm", "Try rand-m9-mstd0.5-inc1."
        got = repr(config.auto_augment)
        raise ValueError(
            message("auto_augment", expected=expected, got=got, remedy=remedy)
        ) from error


def open_images(config: RunConfig, *, processes: int) -> Images:
    """Open the images of a run.

    Raises:
        FileNotFoundError, NotADirectoryError: where they do not exist.
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
        refuse(ValueError, str(root), expected, f"{listing(odd)} in one alone", remedy)
    classes = _check_classes(config, len(names[0]) or None)
    return Images(parts[0], parts[1], classes, names=tuple(names[0]))


def _root(config: RunConfig) -> Path:
    root = Path(config.data_dir or ".").expanduser()
    if config.source.startswith(_TORCHVISION):
        _torchvision_class(config)
    if not root.exists() and not config.download and not config.source.startswith("hf"):
        remedy = "Check --data-dir."
        if config.source.startswith(("torchvision/", "torch/", "tfds/")):
            remedy = "Check --data-dir, or pass --download."
        refuse(FileNotFoundError, str(root), "the images", "no such folder or file", remedy)
    return root


def _open(config: RunConfig, root: Path, *, training: bool, processes: int) -> Dataset[Any]:
    split = config.train_split if training else config.val_split
    if config.source.startswith(_TORCHVISION):
        return _of_torchvision(config, root, training=training)
    if config.source == "folder":
        root = _part(root, split, training=training)
    elif not config.source.startswith(_READERS):  # timm would look for a folder
        choices = ["digits", "folder", *(f"{name}…" for name in (_TORCHVISION, *_READERS))]
        raise ValueError(unknown_choice("dataset", config.source, choices))
    try:
        with _without_logs():
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
    reader: Any = getattr(dataset, "reader", None)
    if isinstance(dataset, ImageDataset):
        return Files(reader)
    if not training and hasattr(reader, "dist_num_replicas"):
        # Shards hold unequal numbers of images, and some would be left out or counted twice: every
        # process reads all, and evaluates its share of the batches.
        reader.dist_rank, reader.dist_num_replicas = 0, 1
    return dataset


@contextmanager
def _without_logs() -> Iterator[None]:
    """Silence the log of timm's readers: the errors that they raise are shown."""
    logger = logging.getLogger("timm.data")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _part(root: Path, split: str, *, training: bool) -> Path:
    """The folder of a part, by its name or by another name of the held-out part."""
    names = [split] if training or split != _HELD_OUT[0] else _HELD_OUT
    for name in names:
        for found in (root / name, root / f"{name}.tar"):
            if found.exists():
                return found
    inside = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    option = "--train-split" if training else "--val-split"
    refuse(
        FileNotFoundError,
        str(root),
        f"a folder {' or '.join(names)} with a folder for each class",
        listing(inside) if inside else "nothing",
        f"Make it, or name another one: {option} NAME.",
    )


def _torchvision_class(config: RunConfig) -> Any:
    name = config.source.removeprefix(_TORCHVISION)
    sets = {
        key: value
        for key, value in vars(torchvision.datasets).items()
        if inspect.isclass(value) and issubclass(value, torchvision.datasets.VisionDataset)
    }
    if name not in sets:
        near = closest(name, sets)
        remedy = f"Did you mean {near!r}?" if near else "torchvision.datasets lists them."
        expected = "a data set of torchvision"
        refuse(ValueError, "dataset", expected, repr(name), remedy)
    return sets[name]


def _of_torchvision(config: RunConfig, root: Path, *, training: bool) -> Dataset[Any]:
    """A data set of torchvision by the name of its class."""
    of = _torchvision_class(config)
    name, takes = of.__name__, inspect.signature(of.__init__).parameters
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
        refuse(ValueError, "dataset", expected, got, remedy)
    if "download" in takes:
        options["download"] = config.download
    try:
        dataset: Dataset[Any] = of(**options)
    except (OSError, RuntimeError, ValueError) as error:
        got = " ".join(str(error).split())
        expected, remedy = f"torchvision's {name}", "Check --data-dir, or pass --download."
        raise ValueError(message(str(root), expected=expected, got=got, remedy=remedy)) from error
    return dataset


def _classes(dataset: Any) -> list[str]:
    """The names of the classes of a data set; empty where it has none."""
    reader = getattr(dataset, "reader", None)
    known = getattr(reader, "class_to_idx", None) or getattr(dataset, "classes", None) or []
    return sorted(map(str, known))


def _check_classes(config: RunConfig, found: int | None) -> int:
    given = config.num_classes
    if found is None and given is None:
        expected, remedy = "a number, which this data set does not hold", "Pass --num-classes."
        refuse(ValueError, "num_classes", expected, "none", remedy)
    if found is not None and given is not None and found != given:
        expected, remedy = f"{found}, as the data has", "Leave --num-classes away."
        refuse(ValueError, "num_classes", expected, given, remedy)
    classes = found if given is None else given
    assert classes is not None
    return classes
