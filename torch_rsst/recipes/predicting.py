"""``torch-rsst predict``: classify images with a compacted model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from torch_rsst.recipes.config import PredictConfig
from torch_rsst.saving.compact_folder import load_compact
from torch_rsst.saving.info import compact_info
from torch_rsst.utils.amounts import check_count
from torch_rsst.utils.errors import message, one_line, refuse

Prediction = tuple[Path, list[tuple[str, float]]]
"""A file, and classes with their probabilities, the likeliest first."""


def predict(config: PredictConfig) -> Iterator[Prediction]:
    """Classify images one by one, in their order.

    Raises:
        OSError, ValueError: for a folder without a model or its data configuration, an option out of its range, or
            a file that is no image.
    """
    check_count(config.top, "top", at_least=1)
    if not config.images:
        refuse(ValueError, "images", "at least one file", "none", "Pass image files.")
    info = compact_info(config.folder)
    transform = info.transform()
    model = load_compact(config.folder, keep_masks=False).eval()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for path in config.images:
        image = transform(_open(path)).to(dtype)
        with torch.inference_mode():
            outputs = model(image[None])
        scores: Tensor = getattr(outputs, "logits", outputs)
        names = info.classes or tuple(map(str, range(scores.shape[-1])))
        if scores.shape != (1, len(names)):
            expected = f"a score for each of {len(names)} classes"
            got, remedy = (
                f"outputs of shape {tuple(scores.shape)}",
                "Use the model in your own code.",
            )
            refuse(ValueError, str(config.folder), expected, got, remedy)
        if config.top > len(names):
            expected, remedy = f"at most {len(names)}, the number of classes", "Pass fewer."
            refuse(ValueError, "top", expected, config.top, remedy)
        best = scores[0].float().softmax(0).topk(config.top)
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        yield path, [(names[index], share) for index, share in found]


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError) as error:  # PIL: SyntaxError for a broken PNG
        got = "no such file" if isinstance(error, FileNotFoundError) else f"({one_line(error)})"
        text = message(str(path), expected="an image", got=got, remedy="Pass image files.")
        raise ValueError(text) from error
