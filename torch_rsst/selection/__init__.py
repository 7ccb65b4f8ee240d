"""The exact k lowest scores across many, possibly sharded, tensors."""

from torch_rsst.selection.topk import lowest as lowest
