"""
In a Lightning trainer
======================

One callback opens the rounds, logs, saves and resumes with Lightning's checkpoints, and writes the smaller model.
It needs ``pip install 'torch-rsst[lightning]'``.
"""

import logging
import tempfile

import lightning
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_rsst
from torch_rsst.integrations.lightning import RSSTCallback

for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.ERROR)

# %%
# A module as you have it
# -----------------------


def network():
    """64 pixels → 10 classes."""
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))


class Digits(lightning.LightningModule):
    """Classifies digits; keeps the loss and the penalty's strength of each step for the picture below."""

    def __init__(self):
        super().__init__()
        self.net, self.losses = network(), []

    def training_step(self, batch, _):
        """The loss of a batch."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


# %%
# The callback
# ------------
#
# Four epochs of ordinary training, two rounds of four epochs, four epochs without the units.

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
train, test = torch.utils.data.random_split(data, [1400, 397])
folder = tempfile.mkdtemp()
prune = RSSTCallback(
    module="net", start_epoch=4, epochs_per_round=4, rounds=2, compact_to=f"{folder}/small"
)
trainer = lightning.Trainer(
    max_epochs=16, callbacks=[prune], accelerator="cpu", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
model = Digits()
trainer.fit(model, DataLoader(train, batch_size=100, shuffle=True))
print(prune.rounds.report())

# %%
# What it did
# -----------

figure, axes = plt.subplots(layout="constrained", figsize=(7, 3.5))
axes.plot(model.losses)
for epoch, text in ((4, "round 1"), (8, "round 2"), (12, "cut")):
    axes.axvline(14 * epoch, color="0.7", zorder=0)
    axes.text(14 * epoch + 2, 1.5, text)
axes.set(xlabel="optimizer step", ylabel="training loss", yscale="log")
axes.set_title("64 of 128 neurons go")

# %%
# The smaller model
# -----------------

small = torch_rsst.load_compact(f"{folder}/small", model=network()).eval()
x, y = (torch.stack(part) for part in zip(*test, strict=True))
print(small)
print(f"{(small(x).argmax(1) == y).float().mean():.1%} of the held-out digits")
