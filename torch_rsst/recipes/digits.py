"""The default data and model: scikit-learn's 1,797 handwritten digits and a small timm ViT."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

CLASSES = 10
NAMES = tuple(map(str, range(CLASSES)))
SIZE = 8
_DARKEST = 16.0  # pixels are numbers from 0 to 16
BUILD: dict[str, Any] = {
    "name": "timm.models.VisionTransformer",
    "kwargs": {
        "img_size": SIZE,
        "patch_size": SIZE // 2,
        "in_chans": 1,
        "num_classes": CLASSES,
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 4,
        "weight_init": "jax",  # the default is tuned for widths of hundreds and learns slowly here
    },
}
"""How the model is built; saved with it."""


def model() -> nn.Module:
    """A ViT of 115,000 parameters: 4 blocks of 4 heads and 192 hidden neurons."""
    from timm.models import VisionTransformer

    vit: nn.Module = VisionTransformer(**BUILD["kwargs"])
    return vit


def form(size: int = SIZE) -> dict[str, Any]:
    """What :func:`datasets` makes of images, as a data configuration of timm; 1.0 is the darkest pixel."""
    mean, std = _statistics(_split()[0])
    return {
        "input_size": (1, size, size),
        "interpolation": "bilinear",
        "mean": (mean / _DARKEST,),
        "std": (std / _DARKEST,),
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def datasets(size: int = SIZE) -> tuple[TensorDataset, TensorDataset]:
    """Training and held-out data: images (1, size, size) float32, normalized, and labels int64.

    The held-out quarter does not depend on the seed of a run.
    """
    train_x, test_x, train_y, test_y = _split()
    mean, std = _statistics(train_x)

    def dataset(x: Tensor, y: Tensor) -> TensorDataset:
        scaled = ((x - mean) / std).float().reshape(-1, 1, SIZE, SIZE)
        if size != SIZE:
            scaled = v2.functional.resize(scaled, [size, size], antialias=True)
        return TensorDataset(scaled, y.long())

    return dataset(train_x, train_y), dataset(test_x, test_y)


def _split() -> list[Tensor]:
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    return [torch.from_numpy(part) for part in parts]


def _statistics(images: Tensor) -> tuple[float, float]:
    return float(images.mean()), float(images.std())


class Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Digits shifted by up to an eighth of their size, and filled with background."""

    def __init__(self, digits: TensorDataset) -> None:
        images = digits.tensors[0]
        size = images.shape[-1]
        self._digits = digits
        self._crop = v2.RandomCrop(size, padding=max(1, size // SIZE), fill=float(images.min()))

    def __len__(self) -> int:
        return len(self._digits)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self._digits[index]
        return self._crop(image), label
