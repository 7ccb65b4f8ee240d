"""
Which units go: scores, and reconstruction
==========================================

How much a trained model loses at the moment of the cut depends on which units go, and on whether the layers behind them are
refitted. Here nothing is trained after the cut.
"""

import copy

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

import torch_rsst
from torch_rsst.recipes import digits

# %%
# A trained model
# ---------------

torch.manual_seed(0)
(images, labels), (test_images, test_labels) = (data.tensors for data in digits.datasets())
dense = digits.model()
optimizer = torch.optim.AdamW(dense.parameters(), lr=2e-3)
for _ in range(20):
    for batch in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        cross_entropy(dense(images[batch]), labels[batch]).backward()
        optimizer.step()
dense.eval()


@torch.no_grad()
def accuracy(model):
    """On the held-out images, in percent."""
    return 100 * (model(test_images).argmax(1) == test_labels).float().mean().item()


# %%
# Scores
# ------
#
# ``"magnitude"`` looks at the weights alone. ``"variance"`` and ``"taylor"`` look at what units put out on some batches of the
# training data, and at the loss. ``"obs"`` also asks what the other units could stand in for once the next layer is refitted.

batches = [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 512, 64)]
scores = {
    "magnitude": {"importance": "magnitude"},
    "taylor": {
        "importance": "taylor",
        "batches": batches,
        "forward": lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        "loss_fn": lambda loss, batch: loss,
    },
    **{
        name: {
            "importance": name,
            "batches": batches,
            "forward": lambda model, batch: model(batch[0]),
        }
        for name in ("variance", "obs")
    },
}


def cut(amount, score, reconstruct=None):
    """The accuracy right after this share of all heads and neurons has gone."""
    model = copy.deepcopy(dense)
    groups = torch_rsst.find_groups(model)
    refill = torch_rsst.regroup(model, groups, amount=amount, **scores[score])
    if reconstruct:
        inputs = [x for x, _ in batches]
        torch_rsst.reconstruct(model, groups, refill, batches=inputs, method=reconstruct)
    else:
        torch_rsst.apply_mask(model, refill)
    return accuracy(model)


# %%
# Reconstruction
# --------------
#
# ``reconstruct`` refits the layers that took the units in, by least squares, so that they put out what they did. It needs some
# batches without labels, and no training.

amounts = [0.25, 0.5, 0.75]
figure, axes = plt.subplots(layout="constrained", figsize=(7, 4))
for color, score in enumerate(scores):
    plain = [cut(amount, score) for amount in amounts]
    refitted = [cut(amount, score, "least_squares") for amount in amounts]
    axes.plot(amounts, plain, f"C{color}--o", label=score)
    axes.plot(amounts, refitted, f"C{color}-o", label=f"{score}, reconstructed")
axes.set_xticks(amounts, [f"{amount:.0%}" for amount in amounts])
axes.axhline(10, color="0.7", linewidth=1)
axes.text(0.25, 12, "chance", color="0.5")
axes.set(xlabel="share of heads and neurons that are gone", ylabel="accuracy in percent")
axes.set_title("Right after the cut, before any training")
axes.legend(fontsize=8)

# %%
# One model and one seed: the order of the scores differs from model to model. Training after the cut makes the differences smaller.
