"""Adapters written as a list: which tensors of an attention are dealt out to its heads, and how."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import torch
from torch import Tensor, nn

from torch_rsst.discovery.adapter import Adapter, Unsupported
from torch_rsst.discovery.emptied import BiasOnly
from torch_rsst.discovery.head_attributes import head_count, reduce_head_attributes
from torch_rsst.groups.groups import GroupLayer, Member, head_rows
from torch_rsst.groups.surgery import Removal, module_at
from torch_rsst.masking.live_weight import ORIG, make_live, make_plain
from torch_rsst.masking.names import named_buffers
from torch_rsst.masking.parameter_ref import ParameterRef


@dataclass(frozen=True)
class Part:
    """One tensor's part in the heads of an attention.

    Attributes:
        name: its dense name within the attention; a tensor that is not there takes no part.
        dim: the dimension that is dealt out to heads.
        stacked: how many projections, each split into heads, lie one after the other along ``dim``.
        ranked: see :class:`torch_rsst.groups.groups.Member`.
        consumes: see :class:`torch_rsst.groups.groups.Member`.
        interleaved: whether neighbors belong to different heads: the head counts fastest.
    """

    name: str
    dim: int = 0
    stacked: int = 1
    ranked: bool = False
    consumes: bool = False
    interleaved: bool = False

    def member(self, size: int, heads: int) -> Member:
        """The part as a member, for a tensor that has ``size`` entries along ``dim``.

        Raises:
            ValueError: where they cannot be dealt out evenly.
        """
        if size % (heads * self.stacked):
            raise ValueError(
                f"its {self.name} has {size} entries, which {heads} heads do not share evenly"
            )
        unit_of = (
            torch.arange(heads).repeat(size // heads)
            if self.interleaved
            else head_rows(size, heads, self.stacked)
        )
        return Member(self.name, self.dim, unit_of, self.ranked, self.consumes)


def produces(path: str, stacked: int = 1) -> tuple[Part, ...]:
    """A layer whose rows are heads: projections to queries, keys, values, or several of them stacked."""
    return (
        Part(f"{path}.weight", stacked=stacked, ranked=True),
        Part(f"{path}.bias", stacked=stacked),
    )


def consumes(
    path: str = "proj", *, stacked: int = 1, interleaved: bool = False
) -> tuple[Part, ...]:
    """The layer that takes the heads in, by its columns."""
    weight = f"{path}.weight"
    return (Part(weight, 1, stacked, ranked=True, consumes=True, interleaved=interleaved),)


def normed(path: str) -> tuple[Part, ...]:
    """A norm without statistics over heads: weight, bias and running statistics."""
    names = ("weight", "bias", "running_mean", "running_var")
    return tuple(Part(f"{path}.{name}") for name in names)


class HeadAdapter(Adapter):
    """An adapter of one family, from a list of parts.

    A subclass names the classes it knows and their parts; whether the list is right is checked by
    running, as for every adapter.
    """

    kind = "heads"
    classes: ClassVar[tuple[type[nn.Module], ...]] = ()
    """The modules that it knows."""
    parts: ClassVar[tuple[Part, ...]] = (
        *(*produces("qkv", 3), *produces("q"), *produces("kv", 2), *produces("k"), *produces("v")),
        *consumes(),
    )
    """What is dealt out to heads; the first one is the layer whose input is the module's, if any is."""
    scaled: ClassVar[tuple[str, ...]] = ()
    """Attributes that become smaller in proportion, beside those of :mod:`head_attributes`."""
    output: ClassVar[str] = "proj"
    """The layer whose bias is left once there are no heads."""
    left: ClassVar[type[BiasOnly]] = BiasOnly
    """What puts that bias out in place of the module."""
    slim: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Subclasses, whose last base is a class it knows, that run with any number of heads."""
    recalls: ClassVar[bool] = False
    """Whether a shrunk module must know which heads it has: others hand it something per head."""

    def parts_of(self, module: nn.Module) -> tuple[Part, ...]:
        """The parts of this very module."""
        return self.parts

    def units_of(self, module: nn.Module) -> int:
        """How many units a module has."""
        return head_count(module) or 0

    def why_not(self, module: nn.Module) -> str | None:
        """Why the units of a module of this family cannot be removed exactly, or None."""
        return None

    def find(self, module: nn.Module) -> GroupLayer | Unsupported | None:
        """See :class:`torch_rsst.discovery.Adapter`."""
        if not isinstance(module, self.classes) or not self.units_of(module):
            return None
        if reason := self.why_not(module):
            return Unsupported(reason)
        return self.found(module)

    def found(self, module: nn.Module) -> GroupLayer | Unsupported:
        """The units of a module, by its parts."""
        return dealt_out(module, self.parts_of(module), self.units_of(module))

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        if self.recalls:
            recall(module, removal.gone)
        left = reduce_head_attributes(module, removal, self.scaled)
        if left == 0 and self.least == 0:
            output = module_at(module, self.output)
            assert isinstance(output, (nn.Linear, nn.Conv2d))
            return self.left(output)
        return slimmed(module, self.slim)


def dealt_out(module: nn.Module, parts: Iterable[Part], heads: int) -> GroupLayer | Unsupported:
    """The heads of a module, by its parts; or why they are none."""
    members: list[Member] = []
    buffers: list[Member] = []
    held = named_buffers(module)
    try:
        for part in parts:
            if (tensor := _tensor(module, part.name)) is not None:
                kind = buffers if part.name in held else members
                kind.append(part.member(tensor.shape[part.dim], heads))
    except ValueError as error:
        return Unsupported(str(error))
    if not any(m.consumes for m in members):
        return Unsupported("it has no output projection: its heads are features of what follows")
    return GroupLayer("", "heads", heads, tuple(members), tuple(buffers))


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer, or what is made of others in its place, which is refused by its name once it is checked."""
    with suppress(AttributeError):
        found = attrgetter(name)(module)
        return found if isinstance(found, Tensor) else None
    return None


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make a module one of class ``cls``, in place; its masked parameters stay properties.

    Args:
        module: of a class that ``cls`` derives from, or of ``cls`` already.
        cls: a class with the same attributes, importable at module level, so that it pickles.
    """
    held = [name.removesuffix(ORIG) for name in module._parameters if name.endswith(ORIG)]
    masked = [name for name in held if ParameterRef(module, name).is_masked]
    for name in masked:
        make_plain(module, name)
    if not isinstance(module, cls):
        module.__class__ = cls
    for name in masked:
        make_live(module, name)


def slimmed(module: nn.Module, slims: Iterable[type[nn.Module]]) -> nn.Module:
    """The module as the subclass of its class that runs with any number of heads, in place."""
    for slim in slims:
        known = slim.__bases__[-1]
        if isinstance(module, known) and _forward(type(module)) in map(_forward, (known, slim)):
            become(module, slim)
            break
    return module


def _forward(cls: type[nn.Module]) -> object:
    return cls.forward


def recall(module: nn.Module, gone: Tensor) -> None:
    """Note which of the heads that a module once had are left."""
    old: tuple[int, ...] = module.__dict__.get("kept_heads", tuple(range(gone.numel())))
    if "all_heads" not in module.__dict__:
        module.all_heads = len(old)  # type: ignore[assignment]
    module.kept_heads = tuple(  # type: ignore[assignment]
        head for head, goes in zip(old, gone.tolist(), strict=True) if not goes
    )
