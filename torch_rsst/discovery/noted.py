"""Numbers that modules keep of their units: which of them follow when units are cut, told by trying."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from torch_rsst.discovery.adapter import Adapter, Call, Unsupported, is_of_torch
from torch_rsst.discovery.head_attributes import CUT, HEAD_WIDTHS, HEADS, KEY_VALUE_HEADS
from torch_rsst.discovery.probe import Verdict, check_on
from torch_rsst.groups.groups import NO_UNIT, GroupLayer, Member
from torch_rsst.groups.surgery import noted_numbers
from torch_rsst.masking.names import named_weights


def with_numbers(
    module: nn.Module,
    adapter: Adapter,
    found: GroupLayer,
    calls: Sequence[Call],
    most: int = 64,
) -> GroupLayer | Unsupported:
    """Units with the numbers that have to be changed with them; as these cannot be told, they are tried.

    Args:
        module: that holds the units.
        adapter: that found them.
        found: the units, by names within the module.
        calls: arguments of the module, all of which it has to run on.
        most: how many choices of numbers are tried: of all ways, whose number doubles with each number.

    Returns:
        the units; to mask only, where no choice of numbers lets them be cut; or why these are no units.
    """
    found = replace(found, family=type(adapter).__name__)

    def tried(numbers: Sequence[Member]) -> GroupLayer | Verdict:
        """The units with numbers, or why they cannot be cut on all calls then."""
        layer = replace(found, buffers=(*found.buffers, *numbers), fixed="")
        least = layer.least
        for call in calls:
            verdict = check_on(module, adapter, layer, call)
            if verdict.refused or verdict.fixed:
                return verdict
            least = max(least, verdict.least)
        return replace(layer, least=least)

    verdicts = []
    for numbers in itertools.islice(_choices(module, found), most):
        answer = tried(numbers)
        if isinstance(answer, Verdict):
            verdicts.append(answer)
            continue
        # Those alone that the module does not run rightly without: others that happen to be multiples, such as
        # the length of a window, show only in longer inputs.
        buffers, needed = {name for name, _ in module.named_buffers()}, numbers
        for number in numbers:
            last = number.parameter.rpartition(".")[2]
            alike = sum(number.parameter == other.parameter for other in needed)
            if last not in (*HEADS, *KEY_VALUE_HEADS) and (
                number.parameter not in buffers or alike > 1
            ):
                fewer = [other for other in needed if other is not number]
                if isinstance(without := tried(fewer), GroupLayer):
                    needed, answer = fewer, without
        return answer
    fixed = next((verdict.fixed for verdict in verdicts if verdict.fixed), "")
    return replace(found, fixed=fixed) if fixed else Unsupported(verdicts[0].refused)


def _choices(module: nn.Module, layer: GroupLayer) -> Iterator[list[Member]]:
    """Numbers that may count units, or features of theirs: the likeliest choice, then what differs least from it."""
    owned = [(m, m.unit_of != NO_UNIT) for m in layer.members]
    counts = {int(own.sum()) for _, own in owned}
    known = {(m.parameter, m.dim) for m in layer.members}
    noted = {(m.parameter, m.dim) for m in layer.buffers}
    shapes = ((name, w.shape) for name, w in named_weights(module).items())
    others = {size for name, s in shapes for d, size in enumerate(s) if (name, d) not in known}
    numbers: list[Member] = []
    surely, maybe = set(), set()
    for path, part in module.named_modules():
        if is_of_torch(part):
            continue  # knows of no units
        for name, value in noted_numbers(part, path, objects=True).items():
            if value <= 0 or value % layer.units or all(count % value for count in counts):
                continue
            last = name.rpartition(".")[2]
            if last in CUT:
                surely.add(len(numbers))
            elif last not in HEAD_WIDTHS and value not in others:
                maybe.add(len(numbers))
            each = torch.arange(layer.units).repeat_interleave(value // layer.units)
            numbers.append(Member(name, 0, each, ranked=False))
        for key, buffer in part._buffers.items():  # such as keys and values that are kept
            name = f"{path}.{key}" if path else key
            for dim, size in enumerate(() if buffer is None else buffer.shape):
                if size == layer.units and (name, dim) not in noted:
                    maybe.add(len(numbers))
                    numbers.append(Member(name, dim, torch.arange(size), ranked=False))
    tried: set[frozenset[int]] = set()
    for count in range(len(numbers) + 1):
        for other in itertools.combinations(range(len(numbers)), count):
            for base in (surely, surely | maybe):
                chosen = frozenset(base ^ set(other))
                if chosen not in tried:
                    tried.add(chosen)
                    yield [numbers[i] for i in sorted(chosen)]
