"""
In Hugging Face's Trainer
=========================

The same for ``transformers.Trainer``: a small ViT loses half of its heads and neurons.
It needs ``pip install 'torch-rsst[transformers]'``.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import torch_rsst
from torch_rsst.integrations.transformers import RSSTCallback

# %%
# Model and data as you have them
# -------------------------------

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
data = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
config = ViTConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    image_size=8, patch_size=2, num_channels=1, num_labels=10,
)  # fmt: skip

# %%
# One callback
# ------------
#
# Three epochs of ordinary training, two rounds of three, three without the units.

folder = tempfile.mkdtemp()
prune = RSSTCallback(start_epoch=3, epochs_per_round=3, rounds=2, compact_to=f"{folder}/small")
args = TrainingArguments(
    output_dir=folder, num_train_epochs=12, per_device_train_batch_size=100, learning_rate=2e-3,
    save_strategy="no", logging_strategy="epoch", use_cpu=True, report_to="none", disable_tqdm=True,
)  # fmt: skip
model = ViTForImageClassification(config)
trainer = Trainer(model, args, train_dataset=data[:1400], callbacks=[prune])
trainer.train()

# %%
# What it did
# -----------

report = prune.rounds.report()
figure = torch_rsst.plot.head_map(report)

# %%
# The folder loads like any other model of transformers, only smaller.

small = torch_rsst.load_compact(f"{folder}/small").eval()
with torch.no_grad():
    accuracy = (small(images[1400:]).logits.argmax(1) == labels[1400:]).float().mean()
dense, left = (
    sum(p.numel() for p in m.parameters()) for m in (ViTForImageClassification(config), small)
)
print(f"{accuracy:.1%} of 397 held-out digits; {left:,} of {dense:,} parameters")
