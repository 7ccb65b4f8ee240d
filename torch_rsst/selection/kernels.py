"""What the passes of :mod:`torch_rsst.selection.fused` do on the device, in Triton: a launch each.

A table tells where the tensors lie. Programs are numbered by tensor and tile; where a tensor has more
tiles than there are programs for it, each takes every stride-th. Keys are made as
:class:`torch_rsst.selection.keys.Scratch` makes them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The rows of a table, which has a column for each tensor.
SCORES, AMONG, OUT = 0, 1, 2  # addresses
ENTRIES = 3  # how many
POSITION = 4  # among all that are ranked
PHASE, SLOT = 5, 6  # the first entry that is sampled, and where it goes
OFFSET = 7  # what an index is counted from when it is collected
LAST = 8  # of the entries with the key of the cut, the last index that goes
ROWS = 9

_SCORES, _AMONG, _OUT = tl.constexpr(SCORES), tl.constexpr(AMONG), tl.constexpr(OUT)
_ENTRIES, _POSITION = tl.constexpr(ENTRIES), tl.constexpr(POSITION)
_PHASE, _SLOT = tl.constexpr(PHASE), tl.constexpr(SLOT)
_OFFSET, _LAST = tl.constexpr(OFFSET), tl.constexpr(LAST)

_LOWEST = tl.constexpr(-(2**31))
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _number(table, row: tl.constexpr):
    return tl.load(table + row * tl.num_programs(0) + tl.program_id(0))


@triton.jit
def _up_to(number, block: tl.constexpr):
    """A number of entries in 32 bits; of those beyond the block nobody asks."""
    return tl.maximum(tl.minimum(number, block), -1).to(tl.int32)


@triton.jit
def _competing(table, start, lane, exists, among: tl.constexpr):
    """Which entries compete: all, or those that another tensor marks."""
    if among is not None:
        marks = _number(table, _AMONG).to(tl.pointer_type(among)) + start
        exists = exists & (tl.load(marks + lane, mask=exists, other=0) != 0)
    return exists


@triton.jit
def _keys(table, start, lane, competes, score: tl.constexpr, absolute: tl.constexpr):
    """The keys of what competes, and one below all for the rest."""
    address = _number(table, _SCORES)
    if score == tl.bfloat16:  # the upper half of a float32, denormal ones included
        halves = address.to(tl.pointer_type(tl.int16)) + start
        bits = tl.load(halves + lane, mask=competes, other=0).to(tl.int32) << 16
    else:
        scores = address.to(tl.pointer_type(score)) + start
        real = tl.load(scores + lane, mask=competes, other=0).to(tl.float32)
        bits = real.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if absolute:
        keys = magnitude
    else:  # −0 is 0, and NaN has no sign
        negative = (bits < 0) & (magnitude > 0) & (magnitude <= _INFINITY)
        keys = tl.where(negative, -1 - magnitude, magnitude)
    return tl.where(competes, keys, _LOWEST)


@triton.jit(do_not_specialize=["stride"])
def count_and_sample(
    table,
    count,
    sample,
    stride,
    score: tl.constexpr,
    among: tl.constexpr,
    absolute: tl.constexpr,
    block: tl.constexpr,
):
    """Add up how many entries compete; write the key of every ``stride``-th entry to its slot."""
    entries, phase, slot = _number(table, _ENTRIES), _number(table, _PHASE), _number(table, _SLOT)
    lane = tl.arange(0, block)
    competing = tl.zeros([block], tl.int32)
    for tile in range(tl.program_id(1), tl.cdiv(entries, block), tl.num_programs(1)):
        start = tile * block
        exists = lane < _up_to(entries - start, block)
        competes = _competing(table, start, lane, exists, among)
        competing += competes.to(tl.int32)
        # As one sampled entry before the first there would be: so that nothing here is negative.
        beyond = start + stride - phase
        steps = lane + (beyond % stride).to(tl.int32)
        chosen = exists & (steps % stride == 0)
        keys = _keys(table, start, lane, competes & chosen, score, absolute)
        slots = slot + (beyond // stride - 1) + steps // stride
        tl.store(sample + slots, keys, mask=chosen)
    tl.atomic_add(count, tl.sum(competing, 0).to(tl.int64))


@triton.jit(do_not_specialize=["low", "high", "workspace"])
def survey(
    table,
    counts,
    found,
    tensor_of,
    index_of,
    low,
    high,
    workspace,
    score: tl.constexpr,
    among: tl.constexpr,
    absolute: tl.constexpr,
    block: tl.constexpr,
):
    """Count keys below ``low`` and up to ``high``, and collect these; say which tensors have NaN."""
    entries, offset = _number(table, _ENTRIES), _number(table, _OFFSET)
    position = _number(table, _POSITION).to(tl.int32)
    lane = tl.arange(0, block)
    below, top = tl.zeros([block], tl.int32), tl.full([block], _LOWEST, tl.int32)
    for tile in range(tl.program_id(1), tl.cdiv(entries, block), tl.num_programs(1)):
        start = tile * block
        exists = lane < _up_to(entries - start, block)
        competes = _competing(table, start, lane, exists, among)
        keys = _keys(table, start, lane, competes, score, absolute)
        below += (exists & (keys < low)).to(tl.int32)
        top = tl.maximum(top, keys)
        near = (keys >= low) & (keys <= high)  # what does not exist, or compete, lies lower
        order = tl.cumsum(near.to(tl.int32), 0)
        number = tl.max(order, 0)
        if number > 0:
            slot = tl.atomic_add(counts + 1, number.to(tl.int64)) + order - 1
            near = near & (slot < workspace)
            tl.store(found + slot, keys, mask=near)
            tl.store(tensor_of + slot, tl.zeros_like(keys) + position, mask=near)
            tl.store(index_of + slot, offset + start + lane, mask=near)
    tl.atomic_add(counts, tl.sum(below, 0).to(tl.int64))
    if tl.max(top, 0) > _INFINITY:
        tl.atomic_add(counts + 2 + position, tl.full([], 1, tl.int64))


@triton.jit(do_not_specialize=["key"])
def mark(
    table,
    key,
    out: tl.constexpr,
    goes: tl.constexpr,
    score: tl.constexpr,
    among: tl.constexpr,
    absolute: tl.constexpr,
    block: tl.constexpr,
):
    """Write 1 where an entry competes and goes, or stays, and 0 elsewhere."""
    entries, last = _number(table, _ENTRIES), _number(table, _LAST)
    target = _number(table, _OUT).to(tl.pointer_type(out))
    lane = tl.arange(0, block)
    for tile in range(tl.program_id(1), tl.cdiv(entries, block), tl.num_programs(1)):
        start = tile * block
        exists = lane < _up_to(entries - start, block)
        competes = _competing(table, start, lane, exists, among)
        keys = _keys(table, start, lane, competes, score, absolute)
        lower = (keys < key) | ((keys == key) & (lane <= _up_to(last - start, block)))
        marks = competes & (lower if goes else lower == 0)
        tl.store(target + start + lane, marks.to(tl.float32).to(out), mask=exists)
