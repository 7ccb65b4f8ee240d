"""
A stock script, line by line
============================

A script that prunes with ``torch.nn.utils.prune``, the same script with this library, and the four lines that take it from
single weights to a smaller model.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.utils import prune as stock

import torch_rsst as prune

# %%
# Before
# ------


def network():
    """A multilayer perceptron."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)
    )


model = network()
parameters = [(module, "weight") for module in model if isinstance(module, nn.Linear)]
stock.global_unstructured(parameters, pruning_method=stock.L1Unstructured, amount=0.5)
for module, name in parameters:
    stock.remove(module, name)

# %%
# After: the import changes, and nothing else has to
# --------------------------------------------------

same = network()
parameters = [(module, "weight") for module in same if isinstance(module, nn.Linear)]
prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=0.5)
for module, name in parameters:
    prune.remove(module, name, freeze_zeros=False)
print(all(torch.equal(model[i].weight, same[i].weight) for i in (0, 2, 4)))

# %%
# The same weights. Half of them are zero, and the model is as large and as slow as before.
#
# Whole neurons, and a smaller model
# ----------------------------------

structured = network()
groups = prune.find_groups(structured)
prune.apply_mask(structured, prune.regroup(structured, groups, amount=0.5))
small = prune.compact(structured, groups)
print(small)


# %%
# The difference in one picture: the second layer's weights, zeros in white.

figure, panels = plt.subplots(1, 3, layout="constrained", figsize=(9, 3.4))
shown = (
    ("single weights", same[2].weight),
    ("whole neurons, masked", structured[2].weight),
    ("whole neurons, compacted", small[2].weight),
)
for axes, (title, weight) in zip(panels, shown, strict=True):
    axes.imshow(weight.detach() != 0, cmap="Greys", vmin=0, vmax=1.6)
    axes.set_title(f"{title}\n{' by '.join(map(str, weight.shape))}", fontsize=10)
