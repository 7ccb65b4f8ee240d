"""
A small language model
======================

A transformer that reads the source code of Python's standard library character by character loses half of its heads and neurons, by
RSST and at once. It is the same kind of model as a GPT, 60,000 parameters large, so that it trains within this page.
"""

import copy
import pathlib

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import torch_rsst

# %%
# Data and model
# --------------
#
# Other modules are kept to measure on than those to train on.

TOKENS, WIDTH, HEADS = 64, 48, 6
library = pathlib.Path(pathlib.__file__).parent
library = library.parent if library.name == "pathlib" else library
NAMES = "argparse ast calendar configparser csv dataclasses datetime decimal difflib enum"


def ids_of(names):
    """Characters of modules as ASCII codes."""
    text = "".join((library / f"{name}.py").read_text("utf-8") for name in names.split())
    return torch.tensor(list(text.encode("ascii", "replace")))


train, held_out = ids_of(NAMES), ids_of("textwrap shutil tarfile")


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        """``(batch, tokens, width)`` → the same shape."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        heads = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(heads.transpose(1, 2).reshape(b, n, -1))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        """``(batch, tokens, width)`` → the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """Character codes ``(batch, tokens)`` → logits of the next one ``(batch, tokens, 128)``."""

    def __init__(self):
        super().__init__()
        self.embedding, self.position = nn.Embedding(128, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128)

    def forward(self, ids):
        """Logits."""
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def batch_of(ids, generator, size=16):
    """Sequences from random places, one character longer than the model reads."""
    start = torch.randint(len(ids) - TOKENS - 1, (size,), generator=generator)
    return ids[start[:, None] + torch.arange(TOKENS + 1)]


def loss_of(model, ids):
    """The mean cross entropy of the next character."""
    return cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def bits(model):
    """Bits per character of the held-out modules; the same sequences at each call."""
    generator = torch.Generator().manual_seed(1)
    loss = torch.stack([loss_of(model, batch_of(held_out, generator)) for _ in range(16)]).mean()
    return loss.item() / torch.log(torch.tensor(2.0)).item()


generator = torch.Generator().manual_seed(0)


def train_for(model, optimizer, steps):
    """Train on random sequences; bits per character after every 20 steps."""
    course = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch_of(train, generator)).backward()
        optimizer.step()
        if step % 20 == 19:
            course.append(bits(model))
    return course


torch.manual_seed(0)
dense = LanguageModel()
train_for(dense, torch.optim.AdamW(dense.parameters(), lr=4e-3), 600)
start = bits(dense)
print(
    f"dense: {start:.3f} bits per character, {sum(p.numel() for p in dense.parameters()):,} parameters"
)

# %%
# Half of the units go
# --------------------
#
# Each gets 240 steps. RSST shrinks units in the first half of them; the others cut at once. Scores and
# reconstruction look at 8 batches.

batches = [batch_of(train, generator)[:, :-1] for _ in range(8)]
STEPS = 240


def at_once(reconstruct, **scored):
    """Cut, reconstruct if asked, train."""
    model = copy.deepcopy(dense)
    groups = torch_rsst.find_groups(model)
    refill = torch_rsst.regroup(model, groups, amount=0.5, **scored)
    if reconstruct:
        torch_rsst.reconstruct(model, groups, refill, batches=batches, method="least_squares")
    else:
        torch_rsst.apply_mask(model, refill)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    return [start, bits(model), *train_for(model, optimizer, STEPS)]


def rsst():
    """Two rounds, then training without the units."""
    model = copy.deepcopy(dense)
    groups = torch_rsst.find_groups(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rounds = torch_rsst.RSST(
        model, groups, optimizer=optimizer, rounds=2, steps_per_round=STEPS // 4,
        regroup_amount=0.5, scope="type", batches=batches,
    )  # fmt: skip
    course = [start, start]
    for _ in rounds:
        course += train_for(model, optimizer, STEPS // 4)
    rounds.finalize()
    course += train_for(model, optimizer, STEPS // 2)
    small = torch_rsst.compact(model, groups, keep_masks=False)
    print(f"RSST: {sum(p.numel() for p in small.parameters()):,} parameters")
    return course


courses = {
    "at once, by magnitude": at_once(reconstruct=False),
    "at once, by OBS scores, reconstructed": at_once(
        reconstruct=True, importance="obs", scope="type", batches=batches
    ),
    "RSST": rsst(),
}
figure, axes = plt.subplots(layout="constrained", figsize=(7, 4))
steps = [-20, 0, *range(20, STEPS + 1, 20)]
for name, course in courses.items():
    axes.plot(steps, course, marker=".", label=f"{name}: {course[-1]:.3f}")
axes.axhline(start, color="0.8", zorder=0)
axes.set(xlabel="training steps after the dense model", ylabel="bits per character")
axes.legend()
