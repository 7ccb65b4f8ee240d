"""RSST in Hugging Face's Trainer on scikit-learn's digits: a small ViT, trained, pruned, compacted, loaded again.

Run it: ``python examples/trainer_rsst.py [folder] [epochs per round]``. Interrupted, it goes on where its last
checkpoint was written.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.trainer_utils import get_last_checkpoint

import torch_rsst
from torch_rsst.integrations.transformers import RSSTCallback


def main(folder: Path, epochs: int = 4) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    data = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
    )
    prune = RSSTCallback(  # some epochs without a penalty, two rounds, the same again to settle
        start_epoch=epochs, epochs_per_round=epochs, rounds=2, compact_to=folder / "small"
    )
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=4 * epochs,
        per_device_train_batch_size=100,
        learning_rate=2e-3,
        save_strategy="epoch",
        save_total_limit=2,
        logging_strategy="epoch",
        use_cpu=True,
        report_to="none",
    )
    trainer = Trainer(
        ViTForImageClassification(config), args, train_dataset=data[:1400], callbacks=[prune]
    )
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)

    print(prune.rounds.report())
    small = torch_rsst.load_compact(folder / "small").eval()
    with torch.no_grad():
        accuracy = (small(images[1400:]).logits.argmax(1) == labels[1400:]).float().mean().item()
    print(f"{accuracy:.1%} of 397 images")
    return accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trainer"), *map(int, sys.argv[2:]))
