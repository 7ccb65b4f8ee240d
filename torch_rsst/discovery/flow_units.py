"""Units of an attention from what flows in it: parts of a layer's input that nothing mixes."""

# mypy: allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_rsst.discovery.data_flow import Flow, Reached, any_but, noise
from torch_rsst.groups.groups import NO_UNIT, GroupLayer, Member

_SAME = 1e-5
"""Relative to the largest: below, values differ by how sums are rounded."""
_MOST_HEADS = 256


@dataclass(frozen=True, eq=False)
class Division:
    """What a product takes in, divided along one dimension into parts that depend on different features.

    Attributes:
        flow: of the module.
        place: of the product.
        dim: of its activations.
        part_of: of each index along the dimension.
    """

    flow: Flow
    place: int
    dim: int
    part_of: Tensor

    def mask(self, part: int) -> Tensor:
        """Of the activations, broadcastable to them."""
        return _along(self.flow.products[self.place].given, self.dim, self.part_of == part)

    def layer(self) -> tuple[GroupLayer, str] | None:
        """The parts as units, with the entries of parameters and buffers that are of one part alone.

        With them the name of what all of them share, if that is as large as what they own: ``""`` otherwise.
        """
        makes, between, takes = [], [], []
        features: dict[str, set[int]] = {}
        parts = range(int(self.part_of.max()) + 1)
        for part in parts:
            outs, own = self.flow.reach(self.place, self.mask(part))
            made: list[Reached] = []
            for place, mask in outs.items():
                made.append(self.flow.gives(place, mask))
                if made[-1].keys() <= features.keys():
                    continue  # of all parts, they lie along the same dimension
                for name, dims in self.flow.gives(place, _first_of(mask)).items():
                    some = {d for d, hit in enumerate(dims) if not bool(hit.all())}
                    features.setdefault(name, set()).update(some)
            makes.append(_joined(made))
            between.append(own)
            takes.append(self.flow.takes(self.place, self.mask(part)))
        buffers = {name for name, _ in self.flow.module.named_buffers()}
        giving = [
            Member(name, dim, unit_of, ranked=self.flow.tensors[name].ndim > 1)
            for name, dim, unit_of in _owned(makes, features)
        ]
        held = [Member(*each, ranked=False) for each in _owned(between, {})]
        taking = [Member(*each, ranked=True, consumes=True) for each in _owned(takes, {})]
        sizes = {name: self.flow.tensors[name].numel() for made in makes for name in made}
        owned = {member.parameter: sizes.pop(member.parameter) for member in giving}
        least = min((owned[member.parameter] for member in giving if member.ranked), default=0)
        shared = next((name for name, size in sizes.items() if least and size >= least), "")
        if not all(map(self._is_shared_evenly, (giving, (*giving, *held), taking))):
            return None
        followers = (m for m in held if m.parameter not in buffers)
        members = (*giving, *followers, *taking)
        along = tuple(m for m in held if m.parameter in buffers)
        return GroupLayer("", "heads", len(parts), members, along), shared

    def _is_shared_evenly(self, members: Sequence[Member]) -> bool:
        """Whether all parts have as many entries of some tensors, as heads do, and any."""
        total = torch.zeros(int(self.part_of.max()) + 1)
        for member in members:
            own = member.unit_of[member.unit_of != NO_UNIT]
            each = self.flow.tensors[member.parameter].numel() // member.unit_of.numel()
            total += each * torch.bincount(own, minlength=total.numel())
        return bool((total == total[0]).all()) and bool(members)

    def attends(self) -> bool:
        """Whether the features of a part make the scores by which it is attended.

        Where no function is known to have taken scores: whether the part does not grow in proportion to
        its features, as values alone would make it.
        """
        own, _ = self.flow.reach(self.place, self.mask(0))
        others, _ = self.flow.reach(self.place, ~self.mask(0))
        own = {place: mask & ~others.get(place, ~mask) for place, mask in own.items()}
        if (scored := self.flow.scored(self.place, self.mask(0), own)) is not None:
            return scored
        doubled = {
            place: self.flow.products[place].noise.detach() * mask for place, mask in own.items()
        }
        before = self.flow.products[self.place].given.detach()
        after = self.flow.moved(self.place, doubled)
        return bool(_differ(2 * before, after)[self.mask(0).expand(before.shape)].any())


def divisions(flow: Flow, place: int) -> Iterator[Division]:
    """All ways in which the features of products that are attended divide what another product takes in."""
    given = flow.products[place].given
    others = _differ(given.detach(), flow.moved(place, {}, seed=-4))
    for dim in _of_features(flow, place):
        # Hidden neurons beside an attention, say, meet no scores.
        attended = any_but(others, dim).nonzero().flatten().cpu()
        where = attended if len(attended) else torch.arange(given.shape[dim])
        first = _along(given, dim, torch.arange(given.shape[dim]) == where[0])
        seen: set[tuple[int, ...]] = set()
        for nth in range(len(flow.reach(place, first)[0])):
            for whole in (True, False):
                part_of = _divided(flow, place, dim, where, nth, whole)
                if part_of is not None and (key := tuple(part_of.tolist())) not in seen:
                    seen.add(key)
                    yield Division(flow, place, dim, part_of)


def has_one_head(flow: Flow, place: int) -> bool:
    """Whether what a product takes in is attended by one row of scores for each position."""
    given = flow.products[place].given
    features = math.prod(given.shape[dim] for dim in _of_features(flow, place))
    scores = next((scores for scores, _ in flow.used(place, torch.tensor(True))), None)
    rows = 0 if scores is None else scores.numel() // scores.shape[-1]
    return 0 < rows <= given.numel() // features


def _of_features(flow: Flow, place: int) -> Iterator[int]:
    """The dimensions of what a product takes in that are no positions, all of which meet the same entries."""
    given = flow.products[place].given
    for dim, size in enumerate(given.shape):
        if size > 1:
            first, last = (_along(given, dim, torch.arange(size) == i) for i in (0, size - 1))
            if _owned([flow.takes(place, first), flow.takes(place, last)], {}):
                yield dim


def _divided(
    flow: Flow, place: int, dim: int, where: Tensor, nth: int, whole: bool
) -> Tensor | None:
    """What depends on the same features goes into one part; None where such parts overlap.

    Parts are laid out alike, so that a few tell of all.

    Args:
        flow: of a module.
        place: of a product.
        dim: of its activations.
        where: indices along it that are dealt out; others are of no part.
        nth: which of the products that reach an index is asked for its features.
        whole: all its features that reach the index, or the first alone.
    """
    before = flow.products[place].given.detach()
    size = before.shape[dim]
    part_of: Tensor | None = None
    for index in (int(where[i]) for i in (0, -1, len(where) // 2)):
        here = _along(before, dim, torch.arange(size) == index)
        outs, _ = flow.reach(place, here)
        if nth >= len(outs):
            return None
        source, mask = list(outs.items())[nth]
        # Random, as a softmax does not see what is added to all keys.
        added = noise(mask.shape, seed=-1).to(before) * (mask if whole else _first_of(mask))
        moved = _differ(before, flow.moved(place, {source: added}))
        found = any_but(moved, dim).cpu()
        if bool(found[where].all()) or not bool(found[index]):
            return None
        if part_of is None:
            part_of = _laid_out_like(found, where)
            if part_of is None or not Division(flow, place, dim, part_of).attends():
                return None
        elif not torch.equal(part_of == part_of[index], found):
            return None
    return part_of


def _laid_out_like(part: Tensor, where: Tensor) -> Tensor | None:
    """The part of each index, by the indices of the first part, the first among them: as long runs of each in turn."""
    first = part[where]
    size, each = first.numel(), int(first.sum())
    run = int((~first).nonzero()[0])
    part_of = torch.full(part.shape, NO_UNIT)
    part_of[where] = torch.arange(size) // run % (size // each)
    regular = size % each == 0 and size // each <= _MOST_HEADS
    return part_of if regular and torch.equal(part_of == 0, part) else None


def _along(given: Tensor, dim: int, which: Tensor) -> Tensor:
    shape = [-1 if d == dim else 1 for d in range(given.ndim)]
    return which.reshape(shape).to(given.device)


def _first_of(mask: Tensor) -> Tensor:
    flat = mask.flatten()
    return (torch.arange(flat.numel(), device=mask.device) == flat.nonzero()[0]).view(mask.shape)


def _differ(one: Tensor, other: Tensor) -> Tensor:
    largest = one.abs().amax() if one.numel() else 0.0
    return (one - other).abs() > _SAME * largest


def _joined(parts: Sequence[Reached]) -> Reached:
    found: Reached = {}
    for part in parts:
        for name, hits in part.items():
            old = found.get(name, hits)
            found[name] = tuple(a | b for a, b in zip(old, hits, strict=True))
    return found


def _owned(
    of_parts: Sequence[Reached], features: dict[str, set[int]]
) -> list[tuple[str, int, Tensor]]:
    """The name of each tensor that has entries of one part alone, their dimension, and whose each index is."""
    found = []
    for name in dict.fromkeys(name for reached in of_parts for name in reached):
        best: tuple[int, int, Tensor] | None = None
        some = next(reached[name] for reached in of_parts if name in reached)
        none = tuple(map(torch.zeros_like, some))
        hits = [reached.get(name, none) for reached in of_parts]
        for dim in features.get(name) or range(len(some)):
            of_dim = torch.stack([hit[dim] for hit in hits])
            alone = of_dim.sum(0) == 1
            unit_of = torch.where(alone, of_dim.int().argmax(0), NO_UNIT)
            if (count := int(alone.sum())) > (best[0] if best else 0):
                best = (count, dim, unit_of)
        if best is not None:
            found.append((name, best[1], best[2]))
    return found
