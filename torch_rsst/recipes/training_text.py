"""How a run trains, in sentences: for the terminal, the report and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line reads this before it knows whether all packages are there
    from torch_rsst.recipes.config import RunConfig

_METHODS = {"rsst": "RSST", "refill": "Refill"}
_COSTS = {
    "params": "parameters",
    "macs": "multiply_adds",
    "latency": "latency",
}
"""The budget of a plan → what it limits."""


def stages_text(config: RunConfig) -> str:
    """What a run trains on, and its stages."""
    folder = "a folder" if config.data_dir is None else config.data_dir.name
    images = {"digits": "scikit-learn's digits", "folder": f"images in {folder}"}
    start = "from pretrained weights" if config.pretrained else "from random weights"
    return (
        f"Trained on {images.get(config.source, config.source)}: dense for "
        f"{_count(config.dense_epochs, 'epoch')} {start}, pruned by {_METHODS[config.method]} over "
        f"{_count(config.rounds, 'round')} of {_count(config.epochs, 'epoch')}, cut, and fine-tuned for "
        f"{_count(config.finetune_epochs, 'epoch')}, with {config.optimizer} at a peak learning rate "
        f"of {config.learning_rate:g}."
    )


def images_text(config: RunConfig, form: Mapping[str, Any]) -> list[str]:
    """How the images of a run become tensors, where that is taken from the model.

    Args:
        config: of the run.
        form: size, normalization and crop, as a data configuration of timm.
    """
    if config.source == "digits":
        return []
    mean, std = (", ".join(f"{x:.4g}" for x in form[name]) for name in ("mean", "std"))
    size = " x ".join(map(str, form["input_size"]))
    return [
        f"Images: {size}, {form['interpolation']}, normalized by mean ({mean}) and std ({std}), as timm "
        "configures this model."
    ]


def extras_text(config: RunConfig, plan: Mapping[str, Any] | None = None) -> list[str]:
    """What a run does beyond that, a sentence each.

    Args:
        config: of the run.
        plan: how much is pruned for its target, from :meth:`torch_rsst.Plan.to_dict`.
    """
    sentences = []
    if config.distill:
        sentences.append(
            f"Distilled: in rounds and fine-tuning, what the dense model predicts has the weight "
            f"{config.distill:g} in the loss, at temperature {config.distill_temperature:g}."
        )
    if config.reconstruction is not None:
        sentences.append(
            f"Reconstructed: when units are masked, the layers that consume them are refitted on "
            f"{_count(config.importance_batches, 'batch')} of training images ({config.reconstruction})."
        )
    if plan:
        ((budget, limit),) = plan["budget"].items()
        cost = plan[_COSTS[budget]]
        sentences.append(
            f"Target: {limit:.1%} of the {_COSTS[budget].replace('_', '-')} of the dense model; planned: "
            f"{cost['after'] / cost['before']:.1%}, with --regroup-amount {plan['amount']:g}."
        )
    return sentences


def _count(number: int, noun: str) -> str:
    plural = "batches" if noun == "batch" else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
