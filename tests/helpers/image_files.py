"""Small images in every form that runs read: folders, CIFAR's files, web shards. Made here, never downloaded."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


def picture(label: int, number: int, size: int = 20) -> Image:
    """Noise, brighter for each class."""
    import numpy as np  # neither is there where torch is alone
    from PIL import Image

    noise = np.random.default_rng([label, number]).integers(0, 128, (size, size, 3))
    return Image.fromarray((noise + 60 * label).clip(0, 255).astype(np.uint8))


def image_folder(
    root: Path,
    *,
    train: int = 24,
    held_out: int = 12,
    parts: Sequence[str] = ("train", "validation"),
    classes: Sequence[str] = ("cat", "dog"),
    size: int = 20,
) -> Path:
    """A folder of PNG images for each class, in a folder for each part; numbers are of all classes."""
    for part, count in zip(parts, (train, held_out), strict=True):
        for number in range(count):
            label = number % len(classes)
            folder = root / part / classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            picture(label, number, size).save(folder / f"{number:03}.png")
    return root


def web_shards(
    root: Path,
    *,
    train: int = 24,
    held_out: int = 12,
    shards: int = 2,
    labels: int = 2,
    info: bool = True,
    size: int = 20,
) -> Path:
    """Tar files of images with their classes, and what ``_info.json`` says of them."""
    root.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, count in (("train", train), ("validation", held_out)):
        names, lengths = [], []
        for shard in range(shards):
            names.append(f"pets-{split}-{shard}.tar")
            numbers = range(shard, count, shards)
            lengths.append(len(numbers))
            with tarfile.open(root / names[-1], "w") as tar:
                for number in numbers:
                    png = io.BytesIO()
                    picture(number // 2 % labels, number, size).save(png, "PNG")
                    _add(tar, f"{number:04}.png", png.getvalue())
                    _add(tar, f"{number:04}.cls", str(number // 2 % labels).encode())
        splits[split] = {
            "name": split, "num_samples": count, "filenames": names, "shard_lengths": lengths,
        }  # fmt: skip
    if info:
        (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def cifar(
    root: Path, monkeypatch: Any, *, classes: int = 10, train: int = 20, test: int = 20
) -> Path:
    """The files of CIFAR-10 or CIFAR-100 with a few images; torchvision is told of their digests."""
    import numpy as np
    import torchvision

    known: Any = getattr(torchvision.datasets, f"CIFAR{classes}")
    folder = root / known.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    key = "labels" if classes == 10 else "fine_labels"
    for listed, count in (("train_list", train), ("test_list", test)):
        digests = []
        for name, _ in getattr(known, listed):
            labels = [number % classes for number in range(count)]
            images = [
                np.asarray(picture(x, i, 32)).transpose(2, 0, 1) for i, x in enumerate(labels)
            ]
            content = pickle.dumps({"data": np.stack(images).reshape(count, -1), key: labels})
            digests.append((name, _write(folder / name, content)))
        monkeypatch.setattr(known, listed, digests)
    meta = known.meta
    names = pickle.dumps({meta["key"]: [f"class {number}" for number in range(classes)]})
    digest = _write(folder / meta["filename"], names)
    monkeypatch.setattr(known, "meta", {**meta, "md5": digest})
    return root


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()
