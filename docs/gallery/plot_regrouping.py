"""
What regrouping does to a mask
==============================

Global magnitude pruning removes single weights. Regrouping turns its mask into one of whole units, by how much each unit lost.
"""

import torch
from torch import nn

import torch_rsst

# %%
# Heads of one attention layer
# ----------------------------
#
# Queries, keys and values of four heads are rows of one matrix: head 0 is the first quarter of each third.


class Attention(nn.Module):
    """Self-attention as timm writes it."""

    def __init__(self, width=16, num_heads=4):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        """``(batch, tokens, width)`` → the same shape."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(heads.transpose(1, 2).reshape(b, n, -1))


torch.manual_seed(0)
model = Attention()
with torch.no_grad():  # make two heads weaker than the others
    model.qkv.weight.view(3, 4, 4, 16)[:, [1, 2]] *= 0.5
groups = torch_rsst.find_groups(model)
layer = groups.layers[0]
print(groups)

# %%
# The mask of global magnitude pruning: the smallest 60 % of all weights, wherever they are.

torch_rsst.global_unstructured(
    [(model.qkv, "weight"), (model.proj, "weight")], torch_rsst.GlobalL1, amount=0.6
)
current = torch_rsst.extract_mask(model)
figure = torch_rsst.plot.mask(current["qkv.weight"], layer, "qkv.weight")

# %%
# The **refill mask** for half of the heads. Heads that lost most go whole; those that stay get all their weights back.
# Nothing has been changed in the model yet.

refill = torch_rsst.regroup(model, groups, amount=0.5)
figure = torch_rsst.plot.mask(refill["qkv.weight"], layer, "qkv.weight")

# %%
# The output projection takes a head in by its columns, so there the same heads are columns.

figure = torch_rsst.plot.mask(refill["proj.weight"], layer, "proj.weight")

# %%
# Three things can be done with it
# --------------------------------
#
# ========================  ====================================================================
# Refill                    masks the units at once: ``apply_mask(model, refill)``
# RSST                      lets a penalty shrink what is alive in them, then masks
# RSST, sparse kept units   the same, and the current mask stays on the units that stay
# ========================  ====================================================================
#
# The penalized set P of the last one is what is alive in the current mask and dead in the refill mask:

penalized = current["qkv.weight"] & ~refill["qkv.weight"]
print(f"{int(penalized.sum())} of {penalized.numel()} weights are alive and in heads that go")

# %%
# The smaller layer
# -----------------

torch_rsst.apply_mask(model, refill)
small = torch_rsst.compact(model, groups)
print(small)
