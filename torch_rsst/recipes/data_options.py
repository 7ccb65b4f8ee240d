"""The options for images and their augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch_rsst.utils.amounts import check_count, check_fraction, check_number
from torch_rsst.utils.errors import refuse


@dataclass(frozen=True)
class DataOptions:
    """Images and their augmentation."""

    dataset: str = "auto"
    """auto: digits, or folder with --data-dir. digits: those inside scikit-learn. folder: a folder of images
    for each class. torchvision/NAME: a data set of torchvision, such as torchvision/CIFAR10. Or a name for
    timm's readers: wds/…, hfds/…, hfids/…, tfds/…, torch/…"""
    data_dir: Path | None = None
    """Folder of the images, or where to download them."""
    train_split: str = "train"
    """Name of the training part; for web shards also a pattern such as 'train-{0000..0099}.tar|100000'."""
    val_split: str = "validation"
    """Name of the held-out part."""
    download: bool = False
    """Download the data set, where it supports that."""
    num_classes: int | None = None
    """Number of classes, for data that does not hold it (web shards)."""
    image_size: int | None = None
    """Height and width in pixels; by default those that the model was trained with."""
    workers: int | None = None
    """Processes that load images; by default 4, or the number of processors if that is less, and none for digits."""
    crop_scale: float = 0.08
    """Smallest share of an image's area in a random crop (not for digits)."""
    flip: float = 0.5
    """Probability of a horizontal flip (not for digits)."""
    color_jitter: float = 0.4
    """How much brightness, contrast and saturation change (not for digits)."""
    auto_augment: str | None = None
    """A policy of timm, such as rand-m9-mstd0.5-inc1 (not for digits)."""
    random_erasing: float = 0.0
    """Probability that a random patch is erased (not for digits)."""
    mixup: float = 0.0
    """Alpha of mixup; 0: off."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0: off."""
    label_smoothing: float = 0.0
    """Label smoothing, as in torch.nn.CrossEntropyLoss."""

    @property
    def source(self) -> str:
        """The data set, with auto resolved."""
        automatic = "digits" if self.data_dir is None else "folder"
        return automatic if self.dataset == "auto" else self.dataset

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mixup > 0.0 or self.cutmix > 0.0

    def check(self) -> None:
        """Raise unless every option is in its range; whether the data exists is checked later."""
        if self.source != "digits" and self.data_dir is None:
            expected = f"where the images of --dataset {self.dataset} are"
            remedy = "Pass --data-dir FOLDER."
            refuse(ValueError, "data_dir", expected, "none", remedy)
        if self.source == "digits" and self.data_dir is not None:
            remedy = "Leave --dataset away to train on the images in it."
            refuse(ValueError, "data_dir", "none for digits", str(self.data_dir), remedy)
        for name, least in (("num_classes", 2), ("image_size", 1), ("workers", 0)):
            if (value := getattr(self, name)) is not None:
                check_count(value, name, at_least=least)
        for name in ("crop_scale", "flip", "random_erasing", "label_smoothing"):
            check_fraction(getattr(self, name), name)
        for name in ("color_jitter", "mixup", "cutmix"):
            check_number(getattr(self, name), name, above=0.0, or_equal=True)
