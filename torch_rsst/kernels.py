"""What the passes of :mod:`torch_rsst.fused` do on the device, in Triton: a launch each.

A table tells where the tensors lie. Each program looks at one tile of one tensor. Keys are made as
:class:`torch_rsst.order_keys.Scratch` makes them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The rows of a table, which has a column for each tensor.
SCORES, AMONG, OUT = 0, 1, 2  # addresses
ENTRIES, TILES = 3, 4  # how many entries; which tile is the first
PHASE, SLOT = 5, 6  # the first entry that is sampled, and where it goes
LAST = 7  # of the entries with the key of the cut, the last index that goes
ROWS = 8

_SCORES, _AMONG, _OUT = tl.constexpr(SCORES), tl.constexpr(AMONG), tl.constexpr(OUT)
_ENTRIES, _TILES = tl.constexpr(ENTRIES), tl.constexpr(TILES)
_PHASE, _SLOT, _LAST = tl.constexpr(PHASE), tl.constexpr(SLOT), tl.constexpr(LAST)

_LOWEST = tl.constexpr(-(2**31))
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _tile(table, owners, tensors, block: tl.constexpr):
    """The tensor that this program looks at, flat indices, and which of them exist."""
    program = tl.program_id(0)
    tensor = tl.load(owners + program)
    first = program - tl.load(table + _TILES * tensors + tensor)
    index = first * block + tl.arange(0, block)
    return tensor, index, index < tl.load(table + _ENTRIES * tensors + tensor)


@triton.jit
def _competing(table, tensors, tensor, index, exists, among: tl.constexpr):
    """Which entries compete: all, or those that another tensor marks."""
    if among is not None:
        marks = tl.load(table + _AMONG * tensors + tensor).to(tl.pointer_type(among))
        exists = exists & (tl.load(marks + index, mask=exists, other=0) != 0)
    return exists


@triton.jit
def _keys(table, tensors, tensor, index, competes, score: tl.constexpr, absolute: tl.constexpr):
    """The keys of what competes, and one below all for the rest."""
    address = tl.load(table + _SCORES * tensors + tensor)
    if score == tl.bfloat16:  # the upper half of a float32, denormal ones included
        halves = tl.load(address.to(tl.pointer_type(tl.int16)) + index, mask=competes, other=0)
        bits = halves.to(tl.int32) << 16
    else:
        scores = tl.load(address.to(tl.pointer_type(score)) + index, mask=competes, other=0)
        bits = scores.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if absolute:
        keys = magnitude
    else:  # −0 is 0, and NaN has no sign
        negative = (bits < 0) & (magnitude > 0) & (magnitude <= _INFINITY)
        keys = tl.where(negative, -1 - magnitude, magnitude)
    return tl.where(competes, keys, _LOWEST)


@triton.jit(do_not_specialize=["tensors", "stride"])
def count_and_sample(
    table,
    owners,
    tensors,
    count,
    sample,
    stride,
    score: tl.constexpr,
    among: tl.constexpr,
    absolute: tl.constexpr,
    block: tl.constexpr,
):
    """Add up how many entries compete; write the key of every ``stride``-th entry to its slot."""
    tensor, index, exists = _tile(table, owners, tensors, block)
    competes = _competing(table, tensors, tensor, index, exists, among)
    tl.atomic_add(count, tl.sum(competes.to(tl.int64), 0))
    beyond = index - tl.load(table + _PHASE * tensors + tensor)
    chosen = exists & (beyond >= 0) & (beyond % stride == 0)
    keys = _keys(table, tensors, tensor, index, competes & chosen, score, absolute)
    slot = tl.load(table + _SLOT * tensors + tensor) + beyond // stride
    tl.store(sample + slot, keys, mask=chosen)


@triton.jit(do_not_specialize=["tensors", "low", "high", "room"])
def survey(
    table,
    owners,
    tensors,
    positions,
    counts,
    found,
    tensor_of,
    index_of,
    low,
    high,
    room,
    score: tl.constexpr,
    among: tl.constexpr,
    absolute: tl.constexpr,
    block: tl.constexpr,
):
    """Count keys below ``low``, those up to ``high`` and NaN by tensor; collect the second kind."""
    tensor, index, exists = _tile(table, owners, tensors, block)
    competes = _competing(table, tensors, tensor, index, exists, among)
    keys = _keys(table, tensors, tensor, index, competes, score, absolute)
    position = tl.load(positions + tensor)
    tl.atomic_add(counts, tl.sum((exists & (keys < low)).to(tl.int64), 0))
    nan = tl.sum((keys > _INFINITY).to(tl.int64), 0)
    if nan > 0:
        tl.atomic_add(counts + 2 + position, nan)
    near = exists & (keys >= low) & (keys <= high)
    number = tl.sum(near.to(tl.int64), 0)
    if number > 0:
        slot = tl.atomic_add(counts + 1, number) + tl.cumsum(near.to(tl.int32), 0) - 1
        near = near & (slot < room)
        tl.store(found + slot, keys, mask=near)
        tl.store(tensor_of + slot, tl.zeros_like(keys) + position, mask=near)
        tl.store(index_of + slot, index, mask=near)


@triton.jit(do_not_specialize=["tensors", "key"])
def mark(
    table,
    owners,
    tensors,
    key,
    out: tl.constexpr,
    goes: tl.constexpr,
    score: tl.constexpr,
    among: tl.constexpr,
    absolute: tl.constexpr,
    block: tl.constexpr,
):
    """Write 1 where an entry competes and goes, or stays, and 0 elsewhere."""
    tensor, index, exists = _tile(table, owners, tensors, block)
    competes = _competing(table, tensors, tensor, index, exists, among)
    keys = _keys(table, tensors, tensor, index, competes, score, absolute)
    last = tl.load(table + _LAST * tensors + tensor)
    lower = (keys < key) | ((keys == key) & (index <= last))
    marks = competes & (lower if goes else lower == 0)
    target = tl.load(table + _OUT * tensors + tensor).to(tl.pointer_type(out))
    tl.store(target + index, marks.to(tl.float32).to(out), mask=exists)
