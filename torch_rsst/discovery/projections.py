"""Layers that map the features of each position alone, and what stands between two of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn

from torch_rsst.discovery.adapter import Adapter, Unsupported, columns, own_parameters, rows
from torch_rsst.discovery.emptied import BiasOnly, NoFeatures
from torch_rsst.discovery.head_attributes import is_attention
from torch_rsst.groups.groups import GroupLayer, Member
from torch_rsst.groups.surgery import Removal, replace_module
from torch_rsst.masking.live_weight import ORIG

_Shared = (nn.modules.batchnorm._BatchNorm, nn.PReLU)


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear layer or a 1×1 convolution within a module.

    Attributes:
        path: its name within the module.
        layer: itself.
    """

    path: str
    layer: nn.Linear | nn.Conv2d

    @property
    def taken(self) -> int:
        """How many features it takes in."""
        return int(_shape(self.layer)[1])

    @property
    def given(self) -> int:
        """How many features it puts out."""
        return int(_shape(self.layer)[0])

    @property
    def is_linear(self) -> bool:
        """Whether features are the last dimension; otherwise they are dimension 1."""
        return isinstance(self.layer, nn.Linear)


class HiddenNeurons(Adapter):
    """Features between projections that a subclass names, each of them a unit."""

    kind = "neurons"

    def layers_of(self, module: nn.Module) -> list[Projection]:
        """What puts the hidden features out, and last the one that takes them in; none of another family."""
        raise NotImplementedError

    def find(self, module: nn.Module) -> GroupLayer | Unsupported | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        layers = self.layers_of(module)
        return hidden_units(module, layers) if layers and layers[-1].taken else None

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`; where all go, what the last projection still computes.

        The bias takes its place, or that of the module where it is the last thing that is run in a row.
        """
        layers, units = self.layers_of(module), removal.layer.units
        last = layers[-1]
        if last.taken or isinstance(module, nn.TransformerEncoderLayer):
            return module  # the fused path of the latter reads weights, and runs on empty ones
        if type(module) is nn.Sequential and list(module.children())[-1:] == [last.layer]:
            return BiasOnly(last.layer)
        splits = any(member.unit_of.numel() > units for member in removal.layer.members)
        known = {p.layer for p in layers}
        along = (*_Shared, nn.Conv1d, nn.Conv2d)
        for path, part in list(module.named_modules()):
            if not (part in known or isinstance(part, along)):
                continue  # an attention beside, which may have lost its heads
            if any(0 in _shape(part, name) for name in own_parameters(part)):
                gone = NoFeatures(-1 if last.is_linear else -3) if splits else nn.Identity()
                replace_module(module, path, gone)
        return replace_module(module, last.path, BiasOnly(last.layer))


def projections(module: nn.Module) -> list[Projection]:
    """The projections of a module in the order in which it holds them, or none.

    Those among its children, if there are two or three; or those of its children that hold just one
    each, where nothing else in the module maps features.
    """
    containers = (nn.ModuleList, nn.ModuleDict)  # compute nothing themselves
    if not module._modules or isinstance(module, containers) or is_attention(module):
        return []
    children = list(module.named_children())
    direct = _among(children)
    for linear in (True, False):
        alike = [p for p in direct if p.is_linear is linear]
        if len(alike) in (2, 3):
            return alike
    inside: list[Projection] = []
    for name, child in children:
        within = [(name, child), *((f"{name}.{k}", m) for k, m in child.named_children())]
        held = _among(within)
        mixing = [m for m in child.modules() if _maps(m)]
        if len(held) > 1 or len(mixing) != len(held):
            return []
        inside += held
    return inside if len(inside) in (2, 3) else []


def maps_between(module: nn.Module, pair: Sequence[Projection]) -> bool:
    """Whether a module holds other layers that map features between some of its projections."""
    ordered = _in_order(module, pair[0].path, pair[-1].path)
    return any(inside and path != pair[0].path and _maps(part) for path, part, inside in ordered)


def projection_at(module: nn.Module, path: str) -> Projection | None:
    """The projection that a module holds at a path; None where another layer, or none, is there."""
    with suppress(AttributeError):
        return next(iter(_among([(path, attrgetter(path)(module))])), None)
    return None


def _among(named: Sequence[tuple[str, nn.Module]]) -> list[Projection]:
    return [
        Projection(path, layer)
        for path, layer in named
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and _is_pointwise(layer))
    ]


def hidden_units(module: nn.Module, pair: Sequence[Projection]) -> GroupLayer | Unsupported | None:
    """The features that the last of some projections takes in, each of them a unit.

    Batch norms, PReLU and, between linear layers, depthwise convolutions treat every feature by itself.

    Args:
        module: that holds the projections.
        pair: the projections; those before the last put out each feature once, or one of them twice.

    Returns:
        the units, with what acts on them between; or what joins them; or None where another
        convolution has to do with the features of 1×1 convolutions: these are channels.
    """
    hidden = pair[-1].taken
    unit = torch.arange(hidden)
    known = {p.path for p in pair}
    outside = {pair[0].taken, pair[-1].given}
    members: list[Member] = []
    buffers: list[Member] = []
    for path, part, inside in _in_order(module, pair[0].path, pair[-1].path):
        wide = [n for n in own_parameters(part) if hidden in _shape(part, n)]
        if path in known or not wide:
            continue
        if isinstance(part, nn.modules.conv._ConvNd) and not pair[0].is_linear:
            return None
        joins = any(len(_shape(part, n)) > 1 for n in wide) and not _is_depthwise(part, hidden)
        if not inside and (hidden in outside or joins):
            continue  # before or behind, and only by chance as wide; running tells
        if not (isinstance(part, _Shared) or _is_depthwise(part, hidden)):
            if hidden in outside and not path:
                continue  # of which width it is, running tells
            joint = f"{path} ({type(part).__name__})" if path else f"own parameter {wide[0]}"
            return Unsupported(f"its {joint} may join its hidden neurons", open=True)
        for name in wide:
            ranked = len(_shape(part, name)) > 1
            members.append(Member(f"{path}.{name}", 0, unit, ranked=ranked))
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.shape == (hidden,):
                buffers.append(Member(f"{path}.{name}", 0, unit, ranked=False))
    giving = [m for p in pair[:-1] for m in rows(p.path, p.layer, unit.repeat(p.given // hidden))]
    members = [*giving, *members, columns(pair[-1].path, unit)]
    return GroupLayer("", "neurons", hidden, tuple(members), tuple(buffers))


def _in_order(module: nn.Module, first: str, last: str) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every module with parameters of its own, and whether it is held between two others."""
    inside = False
    for path, part in module.named_modules():
        inside = (inside or path == first) and path != last
        if own_parameters(part):
            yield path, part, inside


def _shape(module: nn.Module, name: str = "weight") -> torch.Size:
    """The shape of a parameter, masked or not."""
    stored = module._parameters.get(name + ORIG, module._parameters.get(name))
    # Not stored where it is computed, as by a parametrization.
    found: torch.Size = getattr(module, name).shape if stored is None else stored.shape
    return found


def _maps(module: nn.Module) -> bool:
    """Whether a module holds a matrix, but for convolutions of each channel alone."""
    names = [n for n in own_parameters(module) if _is_matrix(_shape(module, n))]
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1:
        return False
    return bool(names)


def _is_matrix(shape: torch.Size) -> bool:
    # Scales of channels that come last are stored as (1, 1, 1, channels), too.
    return len(shape) > 1 and not (len(shape) > 2 and set(shape[:-1]) == {1})


def _is_pointwise(layer: nn.Conv2d) -> bool:
    plain = set(layer.kernel_size) == {1} and set(layer.stride) == {1} and layer.groups == 1
    return plain and (layer.padding == "valid" or set(layer.padding) == {0})


def _is_depthwise(module: nn.Module, features: int) -> bool:
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return False
    return module.groups == module.in_channels == module.out_channels == features
