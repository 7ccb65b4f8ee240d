"""Groups: what stands or falls together. Frozen data; no model is looked at here.

A :class:`GroupLayer` holds the units of one kind in one layer, as index tables; that is what all
computations use. A :class:`Group` is one of its units, made on demand when you iterate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from torch_rsst.distributed.dtensor import Layout, Ranks, local, sharded_like
from torch_rsst.masking.entry_blocks import acting, add_along, block_indices
from torch_rsst.utils.amounts import check_count
from torch_rsst.utils.errors import MissingNameError, check_choice, refuse, shown
from torch_rsst.utils.iterables import items

NO_UNIT = -1
KINDS = ("heads", "neurons", "channels")
BLOCKS = "blocks"
"""The kind of whole residual blocks, which stands alone: other units lie within them."""


@dataclass(frozen=True)
class Slab:
    """One parameter's share in one unit: the slices ``index`` along ``dim``, which has ``size``.

    Of stacked weights, those of one: ``stack`` is its index along dimension 0, and how many there are.
    """

    parameter: str
    dim: int
    size: int
    index: tuple[int, ...]
    ranked: bool
    consumes: bool = False
    stack: tuple[int, int] | None = None


@dataclass(frozen=True)
class Group:
    """A unit with all coupled slices of all parameters: one head, one neuron, one channel."""

    layer: str
    kind: str
    unit: int
    members: tuple[Slab, ...]
    buffers: tuple[Slab, ...] = ()
    family: str = ""
    fixed: str = ""
    least: int = 0
    multiple: int = 1

    def __str__(self) -> str:
        return f"{self.layer or 'the model'} {self.kind}[{self.unit}]"


@dataclass(frozen=True, eq=False)
class Member:
    """One parameter's part in a layer of units.

    Attributes:
        parameter: the dense name.
        dim: the dimension that is dealt out to units.
        unit_of: int64 tensor, the unit of each index along ``dim``; −1 for none. Where weights are stacked
            along dimension 0, as those of experts are, a row for each: shape (stacked, size).
        ranked: whether its entries are ranked and count in densities; biases and norm affines
            are followers instead.
        consumes: whether its entries take in what the unit puts out: the columns of a following
            layer. The unit cannot be heard once these are 0.
    """

    parameter: str
    dim: int
    unit_of: Tensor
    ranked: bool
    consumes: bool = False

    def __post_init__(self) -> None:
        """Refuse what fits no parameter of any model."""
        subject, table = f"member {self.parameter!r}", self.unit_of
        remedy = "Give the unit of each index along dim: torch.arange(4) where each is a unit."
        if not isinstance(table, Tensor) or table.dtype not in (torch.int64, torch.int32):
            got = str(table.dtype) if isinstance(table, Tensor) else type(table).__name__
            refuse(TypeError, f"{subject}: unit_of", "an int64 tensor", got, remedy)
        if table.ndim not in (1, 2):
            expected, got = "one dimension, or two where weights are stacked", f"{table.ndim}"
            refuse(ValueError, f"{subject}: unit_of", expected, got, remedy)
        if table.numel() and (least := int(table.min())) < NO_UNIT:
            expected, remedy = "units from 0 on, or -1 for none", "Count them from 0."
            refuse(ValueError, f"{subject}: unit_of", expected, least, remedy)
        if type(self.dim) is not int or self.dim < table.ndim - 1:
            expected = f"an int from {table.ndim - 1} on for unit_of of {table.ndim} dimension(s)"
            remedy = "Count dimensions from 0: 0 for the rows of a weight, 1 for its columns."
            refuse(ValueError, f"{subject}: dim", expected, repr(self.dim), remedy)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions of the parameter that ``unit_of`` has."""
        return (self.dim,) if self.unit_of.ndim == 1 else (0, self.dim)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape can be dealt out so."""
        sizes = zip(self.dims, self.unit_of.shape, strict=True)
        return all(d < len(shape) and shape[d] == size for d, size in sizes)

    def laid(self, along: Tensor, ndim: int) -> Tensor:
        """Values of the shape of ``unit_of``, laid along :attr:`dims` of ``ndim`` dimensions."""
        sizes = dict(zip(self.dims, along.shape, strict=True))
        return along.reshape([sizes.get(d, 1) for d in range(ndim)])

    def spread(self, values: Tensor, over: Tensor, fill: bool = True) -> Tensor:
        """Per-unit values laid along ``dim``, of the shape and on the device of the parameter ``over``."""
        layout = Layout.of(over)
        unit_of = self._here(layout)
        owned = unit_of != NO_UNIT
        along = torch.full(unit_of.shape, fill, dtype=values.dtype)
        along[owned] = values.cpu()[unit_of[owned]]
        part = local(over)
        along = self.laid(along.to(part.device), part.ndim)
        return sharded_like(along.expand(part.shape), over)

    def owned(self, over: Tensor) -> Tensor:
        """Where some unit owns an entry, of the shape and on the device of the parameter ``over``."""
        units = int(self.unit_of.max()) + 1
        return self.spread(torch.ones(units, dtype=torch.bool), over, fill=False)

    @property
    def leaves_some(self) -> bool:
        """Whether some index along ``dim`` belongs to no unit."""
        return bool((self.unit_of == NO_UNIT).any())

    def sum_per_unit(
        self,
        entries: Tensor,
        units: int,
        *,
        mask: Tensor | None = None,
        of: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Sum entries of the parameter's shape over each unit, in float64, on the CPU.

        Of a sharded parameter, over the parts of all ranks. It goes from block to block: nothing as
        large as the parameter is made.

        Args:
            entries: bool, which are counted, or floats.
            units: how many there are.
            mask: nonzero where an entry of floats is summed; None: everywhere.
            of: changes float64 entries in place before they are summed, such as ``Tensor.abs_``.
        """
        if entries.dtype == torch.bool:
            return self.count_per_unit(entries, units)
        alive = None if mask is None else local(mask)
        totals = self.zeros_along(local(entries))
        for index, block in acting(local(entries), alive, double=True):
            if of is not None:
                of(block)
            add_along(block, self.dims, index, totals)
        return self.per_unit(totals, units, entries)

    def count_per_unit(self, mask: Tensor, units: int) -> Tensor:
        """How many entries of a mask, of zeros and ones in any dtype, are alive in each unit."""
        part = local(mask)
        totals = self.zeros_along(part)
        for index in block_indices(part):
            add_along(part[index], self.dims, index, totals)
        return self.per_unit(totals, units, mask)

    def per_unit(self, along: Tensor, units: int, over: Tensor) -> Tensor:
        """Sum values along :attr:`dims` over each unit, in float64, on the CPU.

        Args:
            along: one for each index of the part that this rank holds.
            units: how many there are.
            over: the parameter; if it is sharded, values are those of the parts of all ranks.
        """
        ranks, unit_of = Ranks.of([over]), self._here(Layout.of(over))
        owned = unit_of != NO_UNIT
        totals = torch.zeros(units, dtype=torch.float64)
        if ranks.counts(over):
            totals.index_add_(0, unit_of[owned], along.cpu()[owned].double())
        return ranks.add_up(totals)

    def zeros_along(self, part: Tensor) -> Tensor:
        """A float64 zero for each index along :attr:`dims` of the part that this rank holds."""
        shape = [part.shape[dim] for dim in self.dims]
        return torch.zeros(shape, dtype=torch.float64, device=part.device)

    def size_per_unit(self, over: Tensor, units: int) -> Tensor:
        """How many entries of the parameter ``over`` each unit has; float64, on the CPU."""
        owned = self.unit_of[self.unit_of != NO_UNIT]
        along = over.numel() // max(1, self.unit_of.numel())
        return torch.bincount(owned, minlength=units).double() * along

    def _here(self, layout: Layout | None) -> Tensor:
        """The unit of each index of the part that this rank holds."""
        if layout is None:
            return self.unit_of
        here = [slice(layout.start[d], layout.start[d] + layout.size[d]) for d in self.dims]
        return self.unit_of[tuple(here)]


@dataclass(frozen=True, eq=False)
class GroupLayer:
    """All units of one kind in one layer: the heads of an attention, the neurons of an MLP.

    Attributes:
        name: the dotted name of the module that owns the units, "" for the model itself.
        kind: ``"heads"``, ``"neurons"``, ``"channels"`` or ``"blocks"``.
        units: how many there are.
        members: the parameters that take part.
        buffers: buffers that are cut along with the units, and have no say in anything else: the
            running statistics of a batch norm.
        family: the adapter that found it and knows how to shrink its module; "" where the layer
            was made by hand.
        fixed: why its units can be masked but not cut out of the module; "" where they can.
        least: how many units the module needs to run.
        multiple: what the number of units that stay is raised to a multiple of, of each of stacked weights.
    """

    name: str
    kind: str
    units: int
    members: tuple[Member, ...]
    buffers: tuple[Member, ...] = ()
    family: str = ""
    fixed: str = ""
    least: int = 0
    multiple: int = 1

    def __post_init__(self) -> None:
        """Refuse tables of other units than there are."""
        check_count(self.units, f"units of {self.name or 'the model'}", at_least=0)
        for member in (*self.members, *self.buffers):
            subject = f"groups of {self}"
            if not isinstance(member, Member):
                remedy = "Make one of each: Member('0.weight', 0, torch.arange(4), ranked=True)."
                refuse(TypeError, subject, "members", shown(member), remedy)
            last = int(member.unit_of.max()) if member.unit_of.numel() else NO_UNIT
            if last >= self.units:
                expected = f"units below {self.units} in its unit_of"
                remedy = "Count units from 0, and pass as units how many there are."
                refuse(ValueError, f"{subject}: {member.parameter!r}", expected, last, remedy)

    @property
    def ranked(self) -> tuple[Member, ...]:
        """Members whose entries are ranked."""
        return tuple(member for member in self.members if member.ranked)

    @property
    def parts(self) -> Tensor:
        """The units of each of the weights that are stacked in one tensor, such as those of experts.

        Each of them keeps as many units as the others. int64 of shape (parts, units of each); one row
        where nothing is stacked.
        """
        stacked = (member.unit_of for member in self.members if member.unit_of.ndim > 1)
        table = next(stacked, torch.arange(self.units)[None])
        return torch.stack([row[row != NO_UNIT].unique() for row in table])

    def group(self, unit: int) -> Group:
        """One unit."""
        members, buffers = (tuple(_slabs(m, unit)) for m in (self.members, self.buffers))
        rest = (self.family, self.fixed, self.least, self.multiple)
        return Group(self.name, self.kind, unit, members, buffers, *rest)

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({self.units} {self.kind})"

    def __repr__(self) -> str:
        return f"<GroupLayer: {self}>"


def _slabs(members: Iterable[Member], unit: int) -> Iterator[Slab]:
    for m in members:
        size, places = m.unit_of.shape[-1], (m.unit_of == unit).nonzero()
        if index := tuple(places[:, -1].tolist()):
            stack = None if m.unit_of.ndim == 1 else (int(places[0, 0]), len(m.unit_of))
            yield Slab(m.parameter, m.dim, size, index, m.ranked, m.consumes, stack)


@dataclass(frozen=True)
class Whole:
    """Parameters of one module that no unit owns.

    Attributes:
        name: the dotted name of the module, "" for the model itself.
        role: ``"input"`` where it reads the model's input, ``"output"`` where it makes its output,
            ``"trunk"`` where all layers share its features, else ``"left"``.
        share: of all entries of the model's parameters, between 0 and 1.
        reason: why no unit owns them.
    """

    name: str
    role: str
    share: float
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({self.share:.1%} of the parameters): {self.reason}"


@dataclass(frozen=True, eq=False)
class Groups(Sequence[Group]):
    """The groups of a model: a sequence of units, kept layer by layer.

    Example:
        >>> layer = head_layer("attn.qkv.weight", rows=12, num_heads=2)
        >>> groups = Groups((layer,))
        >>> len(groups), groups[1].members[0].index
        (2, (2, 3, 6, 7, 10, 11))
    """

    layers: tuple[GroupLayer, ...] = ()
    whole: tuple[Whole, ...] = ()
    """What stays whole, the largest first, where :func:`torch_rsst.find_groups` made them."""

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for layer in self.layers:
            starts.append(starts[-1] + layer.units)
        return starts

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[Group]:
        for layer in self.layers:
            for unit in range(layer.units):
                yield layer.group(unit)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} groups")
        which = next(i for i, start in enumerate(self._starts[1:]) if position < start)
        return self.layers[which].group(position - self._starts[which])

    def of_kind(self, *kinds: str) -> Groups:
        """The layers of these kinds.

        Raises:
            ValueError: for a name that is no kind.
        """
        known = dict.fromkeys((*KINDS, BLOCKS, *(layer.kind for layer in self.layers)))
        for kind in kinds:
            check_choice("of_kind", kind, known)
        return Groups(tuple(layer for layer in self.layers if layer.kind in kinds))

    def __str__(self) -> str:
        kinds = {layer.kind: 0 for layer in self.layers}
        fixed = dict(kinds)
        for layer in self.layers:
            kinds[layer.kind] += layer.units
            fixed[layer.kind] += layer.units if layer.fixed else 0
        listed = ", ".join(
            f"{count} {kind}" + (f" ({fixed[kind]} to mask only)" if fixed[kind] else "")
            for kind, count in kinds.items()
        )
        layers = len(self.layers)
        return f"{listed or 'no groups'} in {layers} layer{'' if layers == 1 else 's'}"

    def __repr__(self) -> str:
        return f"<Groups: {self}>"


def as_groups(groups: Groups | GroupLayer | Iterable[Group] | Iterable[GroupLayer]) -> Groups:
    """Whatever holds groups, as :class:`Groups`: also a list or generator of single units.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(groups, Groups):
        return groups
    remedy = "Pass what find_groups(model) returns, or a selection of its items."
    if isinstance(groups, (Group, GroupLayer)):
        groups = [groups]
    found = items(groups)
    if found is None:
        refuse(TypeError, "groups", "groups", type(groups).__name__, remedy)
    layers = [item for item in found if isinstance(item, GroupLayer)]
    units = [item for item in found if isinstance(item, Group)]
    if len(layers) + len(units) != len(found):
        wrong = next(i for i in found if not isinstance(i, (Group, GroupLayer)))
        refuse(TypeError, "groups", "groups", shown(wrong), remedy)
    gathered = (*layers, *_regather(units))
    names = [(layer.name, layer.kind) for layer in gathered]
    if twice := next((n for i, n in enumerate(names) if n in names[:i]), None):
        subject = f"groups: {twice[1]} of {twice[0] or 'the model'}"
        remedy = "List every layer once: twice, its units would compete with themselves."
        refuse(ValueError, subject, "them once", "them twice", remedy)
    return Groups(gathered)


def _regather(units: Sequence[Group]) -> Iterator[GroupLayer]:
    """Layers made of the given units only; their other units belong to no group."""
    by_layer: dict[tuple[str, str, str, str, int, int], list[Group]] = {}
    if len(set(units)) < len(units):
        twice = next(unit for i, unit in enumerate(units) if unit in units[:i])
        remedy = "List every unit once: twice, it would count twice in the budget."
        refuse(ValueError, f"groups: {twice}", "it once", "it twice", remedy)
    for unit in units:
        key = (unit.layer, unit.kind, unit.family, unit.fixed, unit.least, unit.multiple)
        by_layer.setdefault(key, []).append(unit)
    for (name, kind, *_), chosen in by_layer.items():
        members = _tables([unit.members for unit in chosen])
        buffers = _tables([unit.buffers for unit in chosen])
        one = chosen[0]
        rest = (one.family, one.fixed, one.least, one.multiple)
        yield GroupLayer(name, kind, len(chosen), members, buffers, *rest)


def _tables(slabs: Sequence[tuple[Slab, ...]]) -> tuple[Member, ...]:
    """Members made of the slabs of each unit."""
    tables: dict[tuple[str, int, bool, bool], Tensor] = {}
    for position, of_unit in enumerate(slabs):
        for slab in of_unit:
            key = (slab.parameter, slab.dim, slab.ranked, slab.consumes)
            row, *shape = (..., slab.size) if slab.stack is None else (*slab.stack, slab.size)
            table = tables.setdefault(key, torch.full(shape, NO_UNIT, dtype=torch.int64))
            table[row][list(slab.index)] = position
    return tuple(
        Member(parameter, dim, table, ranked, consumes)
        for (parameter, dim, ranked, consumes), table in tables.items()
    )


def check_groups(weights: Mapping[str, Tensor], groups: Groups) -> None:
    """Raise unless every member of the groups is a parameter of fitting size that has values."""
    for layer in groups.layers:
        if not layer.ranked:
            remedy = "Mark at least one member as ranked."
            refuse(ValueError, f"groups of {layer}", "a ranked member", "none", remedy)
        for member in layer.members:
            subject = f"groups of {layer}: {member.parameter!r}"
            weight = weights.get(member.parameter)
            remedy = "Find the groups of this very model: find_groups(model)."
            if weight is None:
                refuse(
                    MissingNameError, subject, "a parameter of the model", "no such name", remedy
                )
            if weight.is_meta:
                got, remedy = "a parameter on the meta device", "Materialize the model first."
                refuse(ValueError, subject, "values", got, remedy)
            if not member.fits(weight.shape):
                expected = " and ".join(
                    f"size {size} along dim {dim}"
                    for dim, size in zip(member.dims, member.unit_of.shape, strict=True)
                )
                refuse(ValueError, subject, expected, f"shape {tuple(weight.shape)}", remedy)
            owned = bool((member.unit_of != NO_UNIT).any()) or not member.unit_of.numel()
            if not owned and not layer.family:
                remedy = "Leave it out, or give the unit of each index that one owns."
                refuse(ValueError, subject, "units in its unit_of", "-1 everywhere", remedy)
            if len({int(row) for row in (member.unit_of != NO_UNIT).sum(-1).view(-1)}) > 1:
                remedy = "List as many units of each of the stacked weights, or all of them."
                refuse(ValueError, subject, "as many units of each", "different numbers", remedy)


def head_rows(rows: int, num_heads: int, projections: int = 1) -> Tensor:
    """The head of each row of ``projections`` stacked projections (q, k, v), each split into heads.

    >>> head_rows(8, num_heads=2, projections=2).tolist()
    [0, 0, 1, 1, 0, 0, 1, 1]

    Raises:
        ValueError: where heads and projections do not divide the rows.
    """
    check_count(num_heads, "num_heads", at_least=1)
    check_count(projections, "projections", at_least=1)
    if rows % (projections * num_heads):
        expected = f"a count that divides the {rows} rows of {projections} projection(s)"
        remedy = "Check num_heads and projections (3 for a fused qkv, 1 for a single one)."
        refuse(ValueError, "num_heads", expected, num_heads, remedy)
    head_dim = rows // (projections * num_heads)
    return torch.arange(num_heads).repeat_interleave(head_dim).repeat(projections)


def head_layer(
    parameter: str, *, rows: int, num_heads: int, projections: int = 3, dim: int = 0
) -> GroupLayer:
    """The heads of one parameter alone.

    >>> str(head_layer("qkv.weight", rows=576, num_heads=3))
    'qkv.weight (3 heads)'
    """
    member = Member(parameter, dim, head_rows(rows, num_heads, projections), ranked=True)
    return GroupLayer(parameter, "heads", num_heads, (member,))
