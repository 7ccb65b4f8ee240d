"""
How the penalty acts: λ and shrink_to
=====================================

RSST shrinks weights with an L2 penalty whose strength λ grows over a round. You do not choose λ: ``shrink_to`` says what is left
of the weights at the end, 1 % by default, and λ follows from the number of steps.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import torch_rsst

# %%
# The shapes of the growth
# ------------------------
#
# A shape is a named schedule, or a function of the time in the round, from 0 to 1.

linear = torch_rsst.plot.schedule("linear", steps=100, rounds=2, shrink_to=0.01)
late = torch_rsst.plot.schedule("late_exponential", steps=100, rounds=2, shrink_to=0.01)

# %%
# What happens to the weights
# ---------------------------
#
# The norm of the penalized weights over one round, for several goals. The loss pulls weights back that it needs, so they end
# above the goal, the more so the less the model has been trained. With ``block_loss_grad=True`` the penalty alone moves them.


def shrink(shrink_to, optimizer_class, lr, block_loss_grad=False, **options):
    """The norm of the penalized weights after each step, as a share of their norm at the start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    x = torch.randn(512, 16)
    y = torch.tanh(x @ torch.randn(16, 16) / 4)
    groups = torch_rsst.find_groups(model)
    optimizer = optimizer_class(model.parameters(), lr=lr, **options)

    def step():
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()

    for _ in range(TRAINED):
        step()
    rounds = torch_rsst.RSST(
        model, groups, optimizer=optimizer, rounds=1, steps_per_round=STEPS,
        regroup_amount=0.5, shrink_to=shrink_to, block_loss_grad=block_loss_grad,
    )  # fmt: skip
    course = []
    for rnd in rounds:
        for _ in range(STEPS):
            step()
            course.append(rnd.pruner.penalized_norm() / rnd.pruner.start_norm)
    return course


TRAINED, STEPS = 600, 200
adamw = {"optimizer_class": torch.optim.AdamW, "lr": 3e-3}
sgd = {"optimizer_class": torch.optim.SGD, "lr": 0.1, "momentum": 0.9}
panels = {
    "AdamW": adamw,
    "SGD with momentum": sgd,
    "AdamW, loss blocked": adamw | {"block_loss_grad": True},
}
figure, row = plt.subplots(1, 3, layout="constrained", figsize=(11, 3.8), sharey=True)
for axes, (title, options) in zip(row, panels.items(), strict=True):
    for shrink_to in (0.1, 0.03, 0.01):
        course = shrink(shrink_to, **options)
        axes.plot(course, label=f"shrink_to={shrink_to}: {course[-1]:.3f}")
    axes.set(title=title, xlabel="optimizer step", yscale="log")
    axes.legend(fontsize=8, title="asked for: at the end")
row[0].set_ylabel("norm, as a share of the start")

# %%
# A goal that was missed is noticed: ``finalize()`` refuses to cut units that still act, unless told ``force=True``. The
# step at which the norm fell below 1 % is ``rnd.pruner.fell_below``; the report shows it, too.
