"""Rules of operators that work on entries, windows or whole dimensions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch_rsst.discovery.channels.labels import Labels, varying
from torch_rsst.discovery.channels.walk import NORMS, UNNAMED, Arguments, Walk, pass_on, rule
from torch_rsst.discovery.trial import tensors_in

# fmt: off
UNARY = [
    "abs", "acos", "alias", "asin", "atan", "bernoulli", "celu", "ceil", "clamp", "clamp_max",
    "clamp_min", "clone", "contiguous", "cos", "detach", "elu", "erf", "exp", "exp2", "expm1",
    "exponential", "fill", "floor", "frac", "gelu", "hardshrink", "hardsigmoid", "hardswish",
    "hardtanh", "leaky_relu", "lift_fresh", "log", "log10", "log1p", "log2", "log_sigmoid_forward",
    "logical_not", "logit", "mish", "native_dropout", "neg", "normal", "nan_to_num", "ones_like",
    "positive", "rand_like", "randn_like", "reciprocal", "relu", "relu6", "round",
    "rrelu_with_noise", "rsqrt", "selu", "sigmoid", "sign", "silu", "sin", "softplus", "softshrink",
    "sqrt", "square", "tan", "tanh", "threshold", "trunc", "uniform", "zero", "zeros_like",
    "empty_like", "full_like", "_to_copy", "to", "log_normal", "bitwise_not", "erfinv", "sinh",
    "cosh", "isnan", "isfinite", "alias_copy",
]
BINARY = [
    "_prelu_kernel", "add", "addcdiv", "addcmul", "atan2", "bitwise_and", "bitwise_or", "copy",
    "copysign", "div", "eq", "floor_divide", "fmax", "fmin", "fmod", "ge", "gt", "hypot", "le",
    "lerp", "logical_and", "logical_or", "logical_xor", "lt", "masked_fill", "maximum", "minimum",
    "mul", "ne", "pow", "prelu", "remainder", "rsub", "sub", "true_divide", "where", "xlogy",
]
REDUCING = [
    "all", "amax", "amin", "any", "argmax", "argmin", "count_nonzero", "cumprod", "cumsum",
    "linalg_vector_norm", "log_softmax", "logcumsumexp", "logsumexp", "max", "mean", "median",
    "min", "norm", "prod", "softmax", "sort", "std", "std_mean", "sum", "topk", "var", "var_mean",
    "_log_softmax", "_softmax", "_weight_norm_interface",
]
WINDOWED = [
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "fractional_max_pool2d", "max_pool1d", "max_pool2d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "upsample_bicubic2d",
    "upsample_bilinear2d", "upsample_linear1d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_trilinear3d",
]
MADE = [
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "new_empty", "new_full",
    "new_ones", "new_zeros", "new_empty_strided", "ones", "rand", "randint", "randn", "randperm",
    "scalar_tensor", "zeros",
]
# fmt: on


@rule(*UNARY)
def entry_by_entry(walk: Walk, name: str, arguments: Arguments, out: Any) -> None:
    """Every entry by itself: channels stay where they are."""
    x = tensors_in(arguments)[0]
    pass_on(walk, x, out, walk.labels(x).fields)


@rule(*BINARY)
def entries_that_meet(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """Channels that meet entry by entry stand or fall together; those broadcast to join the others."""
    given = [t for t in tensors_in(arguments) if t.ndim]
    fields = meet(walk, [(walk.labels(t), tuple(t.shape)) for t in given], out.ndim)
    if any(out is t for t in given):  # in place: what was written to has other views
        own = {d for f in walk.labels(out).fields for d in varying(f)}
        walk.freeze(
            [f for f in fields if not set(varying(f)) <= own],
            "they are written into another tensor",
        )
    known = [walk.labels(t) for t in given]
    weight = bool(known) and all(k.weight for k in known)
    walk.put(out, fields, weight=weight, wild=all(k.wild for k in known))


Operand = tuple[Labels, tuple[int, ...]]
"""A tensor that meets others: its labels and its shape, after which it is broadcast."""


def meet(walk: Walk, operands: Sequence[Operand], ndim: int) -> list[Tensor]:
    """Tie the labels of tensors that are broadcast to each other; returns those of the result."""
    laid = [
        [f.reshape((1,) * (ndim - f.ndim) + f.shape) for f in labels.fields]
        for labels, _ in operands
    ]
    sizes = [(1,) * (ndim - len(shape)) + shape for _, shape in operands]
    for one, other in itertools.permutations(range(len(operands)), 2):
        met, _ = operands[other]
        if met.wild:
            continue
        labeled = {d for f in laid[other] for d in varying(f)}
        bare = {d for d, size in enumerate(sizes[other]) if size > 1 and d not in labeled}
        plain = f"they meet {met.attribute}, a plain tensor: let register_buffer hold it"
        reason = plain if met.attribute else UNNAMED
        walk.freeze([f for f in laid[one] if bare & set(varying(f))], reason)
    result: list[Tensor] = []
    for field in itertools.chain.from_iterable(laid):
        dims = set(varying(field))
        partner = next((i for i, f in enumerate(result) if dims & set(varying(f))), None)
        if partner is None:
            result.append(field)
            continue
        walk.ledger.tie(result[partner], field, UNNAMED)
        if len(varying(result[partner])) < len(dims):
            result[partner] = field
    return result


@rule(*REDUCING)
def reduce(walk: Walk, name: str, arguments: Arguments, out: Any) -> None:
    """Channels along a dimension that is reduced, or normalized over, are joined."""
    x = tensors_in(arguments)[0]
    dims = arguments.get("dim", arguments.get("dims"))
    if isinstance(dims, int):
        dims = [dims]
    over = {d % max(1, x.ndim) for d in dims} if dims else set(range(x.ndim))
    if "other" in arguments:  # max and min of two tensors
        entries_that_meet(walk, name, arguments, out)
        return
    given, kept = walk.labels(x).fields, []
    for field in given:
        if over & set(varying(field)):
            walk.freeze([field], NORMS.get(name, f"they are joined by {name.removeprefix('_')}"))
        else:
            kept.append(field)
    for tensor in tensors_in(out):
        fields = kept
        if tensor.shape == x.shape:
            fields = list(given)
        elif tensor.ndim != x.ndim:
            left = [d for d in range(x.ndim) if d not in over]
            fields = [f.reshape([f.shape[d] for d in left]) for f in kept]
        walk.put(tensor, fields, weight=walk.labels(x).weight)


@rule(*WINDOWED)
def windows(walk: Walk, name: str, arguments: Arguments, out: Any) -> None:
    """Pooling, resizing and padding of positions: channels stay where they are."""
    x = tensors_in(arguments)[0]
    digits = re.search(r"([123])d", name)
    spatial = range(x.ndim - int(digits[1] if digits else 2), x.ndim)
    kept = []
    for field in walk.labels(x).fields:
        if set(spatial) & set(varying(field)):
            walk.freeze([field], f"{name.removeprefix('_')} mixes them as positions")
        else:
            kept.append(field)
    pass_on(walk, x, out, kept)


@rule(*MADE)
def made_of_sizes(walk: Walk, name: str, arguments: Arguments, out: Any) -> None:
    """Filled or random: it has the size that the model asks for when it runs."""
    for tensor in tensors_in(out):
        walk.put(tensor, [], wild=True)
