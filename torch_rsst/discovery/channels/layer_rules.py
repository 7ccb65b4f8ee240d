"""Rules of operators that hold parameters: convolutions, products with weights, norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torch_rsst.discovery.channels.labels import varying, vector
from torch_rsst.discovery.channels.walk import INPUT, KERNEL, STEM, UNNAMED, Arguments, Walk, rule
from torch_rsst.discovery.trial import tensors_in

POSITIONS = "they are normalized as positions"
WHOLE = "whole groups of a grouped convolution go"
AT_ONCE = "they are normalized in groups"
MIXED = "they meet in a product of activations, as those of an attention do"


def _takes(walk: Walk, fed: Tensor | None, columns: Tensor | None, wild: bool = False) -> None:
    if not wild:  # as wide as is asked for, as the first hidden state of a recurrent layer
        walk.meet(fed, columns, INPUT if fed is None else UNNAMED)
    if columns is not None:
        walk.ledger.takes.add(int(columns[0]))


def _gives(walk: Walk, rows: Tensor | None, convolves: bool) -> None:
    if rows is not None:
        walk.ledger.gives.add(int(rows[0]))
        if convolves:
            walk.ledger.convolves.add(int(rows[0]))


def _scales(walk: Walk, fed: Tensor | None, arguments: Arguments, *keys: str) -> None:
    """Of each channel its own: weight, bias and statistics of a norm."""
    for key in keys:
        if (own := arguments.get(key)) is not None:
            walk.meet(fed, walk.along(own, 0, UNNAMED), INPUT if fed is None else UNNAMED)


@rule("convolution")
def convolution(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """Columns take in the channels of the input, rows put out those of the output.

    A stem, which reads the model's input, is left alone with all that hangs together with its rows.
    """
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    groups, transposed = arguments["groups"], arguments["transposed"]
    fed = walk.along(x, 1, "a convolution mixes them as positions")
    by_dim: dict[tuple[int, ...], Tensor] = {}
    for field in walk.labels(weight).fields:
        if varying(field) in ((0,), (1,)):
            by_dim[varying(field)] = field.flatten()
        else:
            walk.freeze([field], KERNEL)
    first, second = by_dim.get((0,)), by_dim.get((1,))
    if walk.is_input(x):
        walk.freeze(by_dim.values(), STEM)
    if groups == 1:
        columns, rows = (first, second) if transposed else (second, first)
        _takes(walk, fed, columns)
        put_out = rows
    else:
        if second is not None:
            walk.freeze([second], WHOLE)
        rows, put_out = first, _in_groups(walk, fed, first, groups, out.shape[1])
    _gives(walk, rows, convolves=True)
    if bias is not None:
        walk.meet(put_out, walk.along(bias, 0, UNNAMED), UNNAMED)
    walk.emit(out, put_out, 1)


@rule("torchvision::deform_conv2d")
def deformable_convolution(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """A convolution whose positions are made of other activations."""
    x, parts = arguments["input"], arguments["offset_groups"]
    for key in ("offset", "mask"):
        walk.freeze(walk.labels(arguments[key]).fields, "they say where a convolution looks")
    fed = walk.along(x, 1, "a convolution mixes them as positions")
    if fed is not None and parts > 1:
        together = fed.reshape(parts, -1)
        walk.ledger.tie(together[:1], together, "they are moved in groups")
    convolution(walk, name, {**arguments, "transposed": False}, out)


@rule("torchvision::roi_align", "torchvision::roi_pool")
def regions(walk: Walk, name: str, arguments: Arguments, out: Any) -> None:
    """Regions of a feature map, in all channels."""
    walk.freeze(walk.labels(arguments["rois"]).fields, "they say where regions lie")
    fed = walk.along(arguments["input"], 1, f"{name.rpartition('::')[2]} mixes them as positions")
    for tensor in tensors_in(out):
        walk.emit(tensor, fed, 1)


def _in_groups(
    walk: Walk, fed: Tensor | None, first: Tensor | None, groups: int, width: int
) -> Tensor | None:
    """Tie what lies in one group of a convolution; returns the labels of its outputs."""
    if first is None:
        # A filter that is made on the spot: what it is made of follows the input, or cannot run.
        if fed is None or fed.numel() == groups == width:
            return fed
        walk.freeze([fed], WHOLE)
        return None
    if fed is None:
        walk.freeze([first], INPUT)
        return None
    blocks = first.reshape(groups, -1)
    walk.ledger.tie(blocks[:, 1:], blocks[:, :1], WHOLE)
    walk.ledger.tie(fed.reshape(groups, -1), blocks[:, :1], WHOLE)
    return first if first.numel() == width else blocks[:, 0].repeat_interleave(width // groups)


@rule("mm", "bmm")
def product(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """A product of matrices, one of which is made of parameters."""
    two = arguments["mat2"]
    contract(walk, arguments["self"], two, two.ndim - 2, two.ndim - 1, None, out)


@rule("addmm")
def linear_layer(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """A linear layer with a bias: the weight comes transposed."""
    contract(walk, arguments["mat1"], arguments["mat2"], 0, 1, arguments["self"], out)


@rule("linear")
def linear(walk: Walk, name: str, arguments: Arguments, out: Tensor) -> None:
    """A linear layer that was not taken apart."""
    contract(walk, arguments["input"], arguments["weight"], 1, 0, arguments["bias"], out)


def contract(
    walk: Walk, x: Tensor, y: Tensor, inner: int, outer: int, bias: Tensor | None, out: Tensor
) -> None:
    """The last dimension of ``x`` and ``inner`` of ``y`` are summed over; ``outer`` becomes the last."""
    known = walk.labels(x), walk.labels(y)
    if known[0].weight and known[1].weight:
        walk.freeze([*known[0].fields, *known[1].fields], MIXED)
        walk.put(out, [])
        return
    at = {(0, x.ndim - 1): "inner", (1, inner): "inner", (1, outer): "outer"}
    inners: list[Tensor | None] = [None, None]
    kept: list[Tensor] = []
    for which, labels in enumerate(known):
        for field in labels.fields:
            dims = varying(field)
            role = at.get((which, dims[0])) if len(dims) == 1 else None
            if role == "inner":
                inners[which] = field.flatten()
            elif role == "outer":
                kept.append(vector(field.flatten(), out.ndim, out.ndim - 1))
            elif which == 0 and x.ndim - 1 not in dims and x.ndim == out.ndim:
                kept.append(field)
            else:
                walk.freeze([field], "a product of matrices joins them")
    if not any(k.weight for k in known):
        walk.freeze([i for i in inners if i is not None], MIXED)
        walk.put(out, kept)
        return
    weight = 0 if known[0].weight else 1
    _takes(walk, inners[1 - weight], inners[weight], known[1 - weight].wild)
    of_weight = walk.labels((x, y)[weight]).fields
    rows = [f for f in kept if any(int(f.flatten()[0]) == int(g.flatten()[0]) for g in of_weight)]
    _gives(walk, rows[0].flatten() if rows else None, convolves=False)
    if bias is not None:
        laid = walk.along(bias, bias.ndim - 1, UNNAMED)
        last = [f for f in kept if varying(f) == (out.ndim - 1,)]
        walk.meet(last[0].flatten() if last else None, laid, UNNAMED)
    walk.put(out, kept)


@rule(
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
)
def batch_norm(walk: Walk, name: str, arguments: Arguments, out: Any) -> None:
    """Each channel has its own scale, shift and statistics."""
    x = arguments["input"]
    known = walk.labels(x)
    joined = "the weights that take them in are normalized" if known.weight else POSITIONS
    fed = walk.along(x, 1, joined)
    _scales(walk, fed, arguments, "weight", "bias", "running_mean", "running_var")
    walk.put(out[0], known.fields, weight=known.weight)


@rule("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm")
def layer_norm(walk: Walk, name: str, arguments: Arguments, out: Any) -> None:
    """What is normalized together cannot be told apart."""
    joined = "they are joined by RMSNorm" if "rms" in name else "they are joined by LayerNorm"
    x = arguments["input"]
    normalized = set(range(x.ndim - len(arguments["normalized_shape"]), x.ndim))
    fields = walk.labels(x).fields
    walk.freeze([f for f in fields if normalized & set(varying(f))], joined)
    for key in ("weight", "bias"):
        if (own := arguments.get(key)) is not None:
            walk.freeze(walk.labels(own).fields, joined)
    walk.put(out if isinstance(out, Tensor) else out[0], fields)


@rule("native_group_norm", "group_norm")
def group_norm(walk: Walk, name: str, arguments: Arguments, out: Any) -> None:
    """Channels of one group are normalized together, and go together."""
    x, groups = arguments["input"], arguments.get("group", arguments.get("num_groups"))
    fed = walk.along(x, 1, POSITIONS)
    _scales(walk, fed, arguments, "weight", "bias")
    walk.put(out if isinstance(out, Tensor) else out[0], walk.labels(x).fields)
    if fed is None:
        return
    together = fed.reshape(groups, -1)
    if groups == 1:
        walk.freeze([fed], "they are joined by GroupNorm")
        return
    walk.ledger.tie(together[:, :1], together, AT_ONCE)
    layer = walk.running[-1] if walk.running else None
    if isinstance(layer, nn.GroupNorm):
        walk.note("num_channels", fed)
        walk.note("num_groups", together[:, 0])
        return
    for key, value in walk.numbers():
        if value == groups:
            walk.ledger.note(key, together[:, 0], sure=False)
