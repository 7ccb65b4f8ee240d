"""How a run trains, in sentences: for the dry run, the report and the model card."""

from __future__ import annotations

from torch_rsst.recipes.config import RunConfig

_METHODS = {"rsst": "RSST", "refill": "Refill"}


def training_text(config: RunConfig) -> list[str]:
    """What is done in a run, sentence by sentence."""
    images = {"digits": "scikit-learn's digits", "folder": f"images in {_folder(config)}"}
    start = "from pretrained weights" if config.pretrained else "from random weights"
    sentences = [
        f"Trained on {images.get(config.source, config.source)}: dense for "
        f"{_count(config.dense_epochs, 'epoch')} {start}, pruned by "
        f"{_METHODS[config.method]} over {_count(config.rounds, 'round')} of "
        f"{_count(config.epochs, 'epoch')}, cut, and fine-tuned for "
        f"{_count(config.finetune_epochs, 'epoch')}, with {config.optimizer} at a peak learning rate "
        f"of {config.learning_rate:g}.",
    ]
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
    return sentences


def _folder(config: RunConfig) -> str:
    return "a folder" if config.data_dir is None else config.data_dir.name


def _count(number: int, noun: str) -> str:
    plural = "batches" if noun == "batch" else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"
