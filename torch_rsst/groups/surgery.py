"""Cut units out of a model in place: parameters, masks, buffers, and the sizes that layers note.

Knows tensors and PyTorch's own layers. What the owner of several layers notes, its number of heads
say, is for its adapter to set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from torch_rsst.groups.groups import NO_UNIT, GroupLayer, Member
from torch_rsst.masking.live_weight import MASK, ORIG, product
from torch_rsst.masking.names import named_buffers, named_refs, without_wrappers
from torch_rsst.masking.parameter_ref import ParameterRef
from torch_rsst.utils.errors import refuse
from torch_rsst.utils.large_pages import with_large_pages
from torch_rsst.utils.module_state import drop_caches

Kept = dict[int, Tensor]
"""Dimension → the indices along it that stay; of stacked weights, as many in a row for each."""


@dataclass(frozen=True, eq=False)
class Removal:
    """Units to be cut: ``gone`` is a bool tensor, True for these units of ``layer``."""

    layer: GroupLayer
    gone: Tensor

    @property
    def count(self) -> int:
        """How many units go."""
        return int(self.gone.sum())


@dataclass(frozen=True, eq=False)
class Shortened:
    """A parameter that was replaced by a smaller one."""

    parameter: nn.Parameter
    kept: Kept


def cut(model: nn.Module, removals: Sequence[Removal]) -> dict[nn.Parameter, Shortened]:
    """Cut units out of every parameter, mask and buffer that they take part in; in place.

    Layers of PyTorch note their new sizes (``out_features``, ``num_features`` …), other modules those
    that the removals list among their buffers. Gradients are cut along.

    Returns:
        what replaced each parameter that is smaller now.
    """
    shortened: dict[nn.Parameter, Shortened] = {}
    touched: dict[nn.Module, None] = {}
    refs = named_refs(model)
    for name, kept in kept_indices((m for r in removals for m in r.layer.members), removals):
        for ref in refs[name]:
            _shorten(ref, kept, shortened)
            touched[ref.module] = None
    homes = named_buffers(model)
    for name, kept in kept_indices((m for r in removals for m in r.layer.buffers), removals):
        if name not in homes:
            number = noted_size(model, name)
            assert number is not None, "groups are those of this model"
            number.set(kept[0].numel())
            continue
        module, key, buffer = homes[name]
        module._buffers[key] = select(buffer, kept)
        touched[module] = None
    for module in touched:
        update_size_attributes(module)
    if touched and OWNERS:
        for module in model.modules():
            update_size_attributes(module, OWNERS)
    drop_caches(model)
    return shortened


def kept_indices(
    members: Iterable[Member], removals: Sequence[Removal]
) -> Iterable[tuple[str, Kept]]:
    """Each tensor's name and what stays of it along each dimension that loses something."""
    gone_of = {id(m): r.gone for r in removals for m in (*r.layer.members, *r.layer.buffers)}
    stays: dict[str, dict[int, Tensor]] = {}
    for member in members:
        owned = member.unit_of != NO_UNIT
        here = torch.ones_like(owned)
        here[owned] = ~gone_of[id(member)][member.unit_of[owned]]
        dims = stays.setdefault(member.parameter, {})
        dims[member.dim] = dims[member.dim] & here if member.dim in dims else here
    for name, dims in stays.items():
        if kept := {d: _places(name, s) for d, s in dims.items() if not bool(s.all())}:
            yield name, kept


def _places(name: str, stays: Tensor) -> Tensor:
    """The indices that stay; of stacked weights, a row for each."""
    index, left = stays.nonzero()[:, -1], stays.sum(-1).view(-1)
    if len(set(left.tolist())) > 1:
        expected, got = "as many units left of each of its stacked weights", f"{left.tolist()[:5]}"
        refuse(ValueError, repr(name), expected, got, "Let as many go of each, as regroup does.")
    return index if stays.ndim == 1 else index.view(len(stays), -1)


def select(tensor: Tensor, kept: Kept) -> Tensor:
    """A copy of what stays of a tensor, in its memory format."""
    part = tensor.detach()
    for dim, index in kept.items():
        if index.ndim > 1:
            pairs = zip(part, index, strict=True)
            part = torch.stack([select(each, {dim - 1: stays}) for each, stays in pairs])
            continue
        shape = [index.numel() if d == dim else size for d, size in enumerate(part.shape)]
        stays = with_large_pages(part.new_empty(shape))
        part = torch.index_select(part, dim, index.to(part.device), out=stays)
    if part.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return part.contiguous(memory_format=torch.channels_last)
    return part.contiguous()


@dataclass(frozen=True, eq=False)
class NotedSize:
    """A number that a module keeps as an attribute, or in one: a list, a tuple, a dict, a configuration.

    Among the buffers of groups it stands for a tensor of that many entries.
    """

    module: nn.Module
    attribute: str
    item: str | None = None

    @property
    def value(self) -> int | None:
        """The number; None where there is none."""
        held = vars(self.module).get(self.attribute)
        if self.item is not None:
            held = _items(held).get(self.item)
        return held if type(held) is int else None

    def set(self, value: int) -> None:
        """Change the number. What holds it is replaced: other modules may hold it, too."""
        held: Any = value
        if self.item is not None:
            held = vars(self.module)[self.attribute]
            if isinstance(held, (list, tuple)):
                items = [value if k == self.item else v for k, v in _items(held).items()]
                held = type(held)(items)
            else:
                held = copy.copy(held)
                (held if isinstance(held, dict) else vars(held))[self.item] = value
        setattr(self.module, self.attribute, held)


def noted_numbers(module: nn.Module, path: str, *, objects: bool = False) -> dict[str, int]:
    """The numbers that a module at a path keeps, by their names within the model.

    Layers of PyTorch with parameters have none: their sizes are those of the parameters.

    Args:
        module: not changed.
        path: where it stands.
        objects: whether to look into dicts and configurations, too, not just into lists and tuples.
    """
    if isinstance(module, tuple(SIZES)) and any(p is not None for p in module._parameters.values()):
        return {}
    held = {key: value for key, value in vars(module).items() if key[:1] != "_"}
    inside = {
        f"{key}.{k}": v
        for key, value in held.items()
        if objects or isinstance(value, (list, tuple))
        for k, v in _items(value).items()
    }
    prefix = f"{path}." if path else ""
    return {prefix + key: v for key, v in (held | inside).items() if type(v) is int}


def _items(held: Any) -> dict[str, Any]:
    """What a list, a tuple, a dict or an object with attributes holds, by names."""
    if isinstance(held, (list, tuple)):
        return {str(i): value for i, value in enumerate(held)}
    if isinstance(held, (nn.Module, Tensor, type)) or callable(held):
        return {}
    found = held if isinstance(held, dict) else getattr(held, "__dict__", {})
    return {key: value for key, value in found.items() if isinstance(key, str) and "." not in key}


def noted_size(model: nn.Module, name: str) -> NotedSize | None:
    """The number noted under a name, ``norm.num_groups``, ``block.splits.1`` or ``attn.config.n_head``, if any."""
    modules = {without_wrappers(path): module for path, module in model.named_modules()}
    path, _, last = name.rpartition(".")
    if path in modules:
        found = NotedSize(modules[path], last)
    else:
        path, _, attribute = path.rpartition(".")
        if path not in modules:
            return None
        found = NotedSize(modules[path], attribute, last)
    return None if found.value is None else found


def buffer_shape(model: nn.Module, name: str) -> tuple[int, ...] | None:
    """The shape of a buffer, or what stands for one; None where there is neither."""
    if (found := named_buffers(model).get(name)) is not None:
        return tuple(found.buffer.shape)
    number = noted_size(model, name)
    return None if number is None or number.value is None else (number.value,)


def _shorten(ref: ParameterRef, kept: Kept, shortened: dict[nn.Parameter, Shortened]) -> None:
    old = ref.original
    if old not in shortened:  # a tied one is replaced by one, wherever it stands
        new = nn.Parameter(select(old, kept), requires_grad=old.requires_grad)
        if old.grad is not None:
            new.grad = select(old.grad, kept)
        shortened[old] = Shortened(new, kept)
    masked = ref.is_masked
    if masked:
        mask = ref.mask
        assert mask is not None
        ref.module._buffers[ref.name + MASK] = select(mask, kept)
    # At its key: the order of parameters stays.
    ref.module._parameters[ref.name + ORIG if masked else ref.name] = shortened[old].parameter


def _shape_of(layer: nn.Module) -> torch.Size:
    """Of its weight, whose masked product nobody needs for that."""
    if is_parametrized(layer, "weight"):
        made_by = module_at(layer, "parametrizations.weight")
        made_of = [p.shape for p in made_by.parameters(recurse=False)]
        if any(0 in shape for shape in made_of):  # weight_norm of nothing ends the process
            return max(made_of, key=len)
        assert isinstance(layer.weight, Tensor)
        return layer.weight.shape
    return ParameterRef(layer, "weight").original.shape


def _linear(layer: nn.Module) -> dict[str, object]:
    rows, columns = _shape_of(layer)
    return {"out_features": rows, "in_features": columns}


def _convolution(layer: nn.Module) -> dict[str, object]:
    assert isinstance(layer, _ConvNd)
    first, second = _shape_of(layer)[:2]
    if layer.transposed:
        groups = layer.groups * first // layer.in_channels if layer.groups > 1 else 1
        return {"in_channels": first, "out_channels": second * groups, "groups": groups}
    # Of a grouped convolution whole groups go, so that those that stay are as wide as before.
    groups = layer.groups * first // layer.out_channels if layer.groups > 1 else 1
    return {"in_channels": second * groups, "out_channels": first, "groups": groups}


def _batch_norm(layer: nn.Module) -> dict[str, object]:
    known = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return {"num_features": next(t.numel() for t in known if t.ndim)}


def _group_norm(layer: nn.Module) -> dict[str, object]:
    assert isinstance(layer, nn.GroupNorm)
    channels = _shape_of(layer).numel()
    groups, rest = divmod(layer.num_groups * channels, layer.num_channels)
    if rest:
        expected = f"channels that go by whole groups of {layer.num_channels // layer.num_groups}"
        remedy = (
            "Channels of one group are normalized together: find_groups makes one unit of them."
        )
        refuse(ValueError, "GroupNorm", expected, f"{channels} channels left", remedy)
    return {"num_groups": groups, "num_channels": channels}


def _recurrent(layer: nn.Module) -> dict[str, object]:
    assert isinstance(layer, (nn.RNNBase, nn.RNNCellBase))
    is_cell = isinstance(layer, nn.RNNCellBase)
    suffix = "" if is_cell else "_l0"
    rows, columns = product(layer, f"weight_ih{suffix}").shape
    gates = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}
    name = next(c.__name__ for c in type(layer).__mro__ if c.__module__ == "torch.nn.modules.rnn")
    sizes: dict[str, object] = {"input_size": columns, "hidden_size": rows // gates.get(name, 1)}
    if not is_cell:
        assert isinstance(layer, nn.RNNBase)
        if layer.proj_size:
            sizes["proj_size"] = product(layer, "weight_hr_l0").shape[0]
        sizes["_flat_weights"] = [product(layer, name) for name in layer._flat_weights_names]
    return sizes


Sizes = Callable[[nn.Module], Mapping[str, object]]
SIZES: dict[type[nn.Module], Sizes] = {
    nn.Linear: _linear,
    _ConvNd: _convolution,
    _NormBase: _batch_norm,
    nn.LayerNorm: lambda layer: {"normalized_shape": tuple(_shape_of(layer))},
    nn.GroupNorm: _group_norm,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _recurrent,
    nn.PReLU: lambda layer: {"num_parameters": _shape_of(layer).numel()},
    nn.Embedding: lambda layer: {"embedding_dim": _shape_of(layer)[1]},
}
"""Type of layer → what it notes about the shapes of its parameters. Add one with one line."""

OWNERS: dict[type[nn.Module], Sizes] = {}
"""Type of module → what it notes of the sizes of its layers (where it splits its channels, say).

One that notes nothing says so with an empty mapping.
"""


def update_size_attributes(
    layer: nn.Module, table: Mapping[type[nn.Module], Sizes] = SIZES
) -> None:
    """Set what a layer notes about the shapes of its parameters to what they are."""
    for name, size in sizes_of(layer, table).items():
        setattr(layer, name, size)


def sizes_of(layer: nn.Module, table: Mapping[type[nn.Module], Sizes]) -> Mapping[str, object]:
    """What a layer should note, by a table; nothing where it is not listed."""
    return next((sizes(layer) for kind, sizes in table.items() if isinstance(layer, kind)), {})


def replace_module(model: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Put ``new`` at every place where the module at ``path`` stands; returns the model.

    The path may leave wrappers out. The model itself is replaced where ``path`` is "".
    """
    old = module_at(model, path)
    if old is model or new is old:
        return new if old is model else model
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new
    return model


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path that may leave wrappers out.

    Raises:
        KeyError: where there is none.
    """
    module = model
    for key in path.split(".") if path else ():
        module = _inside_wrappers(module._modules[key])
    return module


def _inside_wrappers(module: nn.Module | None) -> nn.Module:
    assert module is not None, "the path of a module"
    inner = next((m for key, m in module._modules.items() if not without_wrappers(f".{key}")), None)
    return module if inner is None else _inside_wrappers(inner)
