"""
RSST and Refill, round by round
===============================

Both remove half of the heads and neurons of a small vision transformer in four rounds. RSST lets a penalty shrink them first
and cuts at the end; Refill masks them at once. The pictures show what each round did.
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
#
# scikit-learn's handwritten digits, and a vision transformer with 4 blocks of 4 heads.

torch.manual_seed(0)
train, test = (data.tensors for data in digits.datasets())


def epoch(model, optimizer):
    """One pass over the training images; 21 steps."""
    model.train()
    for batch in torch.randperm(len(train[0])).split(64)[:21]:
        optimizer.zero_grad()
        cross_entropy(model(train[0][batch]), train[1][batch]).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model):
    """On the held-out images, in percent."""
    return 100 * (model.eval()(test[0]).argmax(1) == test[1]).float().mean().item()


dense = digits.model()
optimizer = torch.optim.AdamW(dense.parameters(), lr=2e-3)
for _ in range(30):
    epoch(dense, optimizer)
print(f"dense: {accuracy(dense):.1f} %")

# %%
# Two ways to lose the same number of units
# -----------------------------------------
#
# Two epochs a round. ``regroup_amount`` is the share of units that go: a number, or a function of the round.

ROUNDS, EPOCHS = 4, 2


def prune(method, **options):
    """Prune a copy of the dense model; the accuracy after each epoch, and a report of each round."""
    model = copy.deepcopy(dense)
    groups = torch_rsst.find_groups(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rounds = method(
        model, groups, optimizer=optimizer, rounds=ROUNDS, steps_per_round=21 * EPOCHS,
        regroup_amount=lambda index: 0.5 * (index + 1) / ROUNDS, **options,
    )  # fmt: skip
    course, reports = [accuracy(dense)], []
    for rnd in rounds:
        course.append(accuracy(model))
        for _ in range(EPOCHS):
            epoch(model, optimizer)
            course.append(accuracy(model))
        reports.append(rnd.report())
    rounds.finalize()
    reports.append(rounds.report())
    course.append(accuracy(model))
    return course, reports


soft, soft_reports = prune(torch_rsst.RSST)
hard, hard_reports = prune(torch_rsst.Refill, fillback_rate=0.0)

# %%
# Accuracy and units over the rounds
# ----------------------------------

figure, axes = plt.subplots(layout="constrained", figsize=(7, 3.5))
axes.plot(soft, marker="o", label="RSST")
axes.plot(hard, marker="o", label="Refill")
for place in range(1, ROUNDS + 1):
    axes.axvline(place * (EPOCHS + 1), color="0.85", zorder=0)
axes.set(xlabel="epoch, and the start of each round", ylabel="accuracy in percent")
axes.set_title("Half of the heads and neurons go within four rounds")
axes.legend()

# %%
# Which heads go
# --------------
#
# The share of each head's weights that is alive. Under Refill units are gone as soon as a round opens; under RSST they are
# shrunk for a round first, so they are gone one round later.

figure, grid = plt.subplots(2, ROUNDS + 1, layout="constrained", figsize=(9, 4), sharey=True)
for row, (name, reports) in enumerate((("RSST", soft_reports), ("Refill", hard_reports))):
    for column, (panel, report) in enumerate(zip(grid[row], reports, strict=True)):
        heads = [layer.alive_share for layer in report.layers if layer.kind == "heads"]
        panel.imshow(heads, vmin=0, vmax=1, cmap="viridis")
        title = f"round {column + 1}" if column < ROUNDS else "finalized"
        panel.set_title(f"{title}: {report.gone('heads')} gone", fontsize=9)
        panel.set_xlabel("head")
    grid[row, 0].set_ylabel(f"{name}\nblock")

# %%
# How to read a decision
# ----------------------
#
# The report says for each unit why it stayed or went.

print(soft_reports[-1].explain("blocks.0.attn", 0))
