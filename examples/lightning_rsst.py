"""RSST in a Lightning trainer on scikit-learn's digits: trained, pruned, compacted, loaded again.

Run it: ``python examples/lightning_rsst.py [folder] [epochs per round]``. Interrupted, it goes on where its last
checkpoint was written.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_rsst
from torch_rsst.integrations.lightning import RSSTCallback


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch, _):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(folder: Path, epochs: int = 2) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=100, shuffle=True)

    prune = (
        RSSTCallback(  # an epoch or more without a penalty, two rounds, the same again to settle
            module="net",
            start_epoch=epochs,
            epochs_per_round=epochs,
            rounds=2,
            compact_to=folder / "small",
        )
    )
    saver = ModelCheckpoint(folder, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=4 * epochs,
        callbacks=[prune, saver],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(Digits(), loader, ckpt_path=last if last.exists() else None)

    print(prune.rounds.report())
    small = torch_rsst.load_compact(folder / "small", model=network()).eval()
    with torch.no_grad():
        accuracy = (small(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    print(f"{accuracy:.1%} of 397 images; {small}")
    return accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lightning"), *map(int, sys.argv[2:]))
