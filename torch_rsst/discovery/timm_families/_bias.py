"""A fused projection whose bias is kept apart, with a constant part for the keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torch_rsst.discovery.head_parts import Part, produces

BIASES = (Part("q_bias"), Part("k_bias"), Part("v_bias"))
BIASED_QKV = (*produces("qkv", 3), *BIASES)


def biased_qkv(module: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of BEiT, EVA and Swin V2."""
    qkv: Tensor
    if module.q_bias is None:
        qkv = module.qkv(x)
        return qkv
    bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    if module.qkv_bias_separate:
        qkv = module.qkv(x) + bias
        return qkv
    return functional.linear(x, module.qkv.weight, bias)
