"""
Smaller and faster: a ViT by heads, a ResNet by channels
========================================================

Masks make nothing faster. ``compact`` cuts what is masked out of a copy of the model. Here the time is measured, on the machine
that built this page; the weights are random, which makes no difference to the time.
"""

import time

import matplotlib.pyplot as plt
import timm
import torch

import torch_rsst

# %%
# Three sizes of each model
# -------------------------

torch.manual_seed(0)
MODELS = {
    "ViT-Ti, heads and neurons": (timm.create_model("vit_tiny_patch16_224", img_size=128), 128),
    "ResNet-18, channels": (timm.create_model("resnet18"), 128),
}
AMOUNTS = (0.25, 0.5, 0.75)


def smaller(model, amount, x):
    """Mask units, then cut them out of a copy; the outputs are compared on ``x``."""
    groups = torch_rsst.find_groups(model, example_inputs=x)
    torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=amount))
    small = torch_rsst.compact(model, groups, example_inputs=x)
    torch_rsst.remove_all(model, freeze_zeros=False)
    return small.eval()


def parameters(model):
    """In millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


# %%
# Measured side by side
# ---------------------
#
# All sizes of a model take turns, so that whatever else the machine does hits them alike; medians in milliseconds.


@torch.no_grad()
def milliseconds(models, x, turns=15):
    """The median time of a forward pass of each."""
    times = [[] for _ in models]
    for _ in range(turns):
        for taken, model in zip(times, models, strict=True):
            started = time.perf_counter()
            model(x)
            taken.append(1e3 * (time.perf_counter() - started))
    return [sorted(taken)[turns // 2] for taken in times]


figure, panels = plt.subplots(1, 2, layout="constrained", figsize=(9, 3.5))
for axes, (name, (model, size)) in zip(panels, MODELS.items(), strict=True):
    x = torch.randn(4, 3, size, size)
    sizes = [model.eval(), *(smaller(model, amount, x[:2]) for amount in AMOUNTS)]
    taken = milliseconds(sizes, x)
    bars = axes.bar(["dense", *(f"{amount:.0%} gone" for amount in AMOUNTS)], taken)
    axes.bar_label(bars, [f"{parameters(each):.1f} M" for each in sizes])
    axes.set(title=name, ylabel="ms for 4 images")
    axes.margins(y=0.15)
