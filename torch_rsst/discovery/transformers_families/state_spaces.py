"""Channels of state spaces: the mixers of Mamba and Mamba-2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_rsst.discovery.adapter import Adapter, Unsupported, columns, holds, rows
from torch_rsst.discovery.transformers_families.parts import Answer
from torch_rsst.groups.groups import GroupLayer, Member, head_rows
from torch_rsst.groups.surgery import Removal

_WIDTHS = ("intermediate_size", "conv_dim", "num_heads", "n_groups")


class StateSpace(Adapter):
    """``in_proj``, a depthwise ``conv1d``, a state for each channel (``A_log``, ``D``), and ``out_proj``.

    Of Mamba a unit is one channel. Of Mamba-2 it is a group: the heads that share B and C, and a norm. With
    one group there is none: its norm joins all channels.
    """

    kind = "channels"
    least = 1

    def find(self, module: nn.Module) -> Answer:
        """See :class:`torch_rsst.discovery.Adapter`."""
        names = ("in_proj", "conv1d", "out_proj")
        first, kernel, last = (getattr(module, name, None) for name in names)
        if not (isinstance(first, nn.Linear) and isinstance(last, nn.Linear)):
            return None
        if not (isinstance(kernel, nn.Conv1d) and holds(module, "A_log") and holds(module, "D")):
            return None
        wide = last.in_features
        scan, step = getattr(module, "x_proj", None), getattr(module, "dt_proj", None)
        if isinstance(scan, nn.Linear) and isinstance(step, nn.Linear):
            unit = torch.arange(wide)
            taken = [columns("x_proj", unit)]
            given = [*_giving(first, unit.repeat(2), kernel, unit), *rows("dt_proj", step, unit)]
            members = (*given, *_states(("A_log", "D"), unit), *taken, columns("out_proj", unit))
            return GroupLayer("", self.kind, wide, members)
        groups, heads, size = (
            getattr(module, n, 0) for n in ("n_groups", "num_heads", "ssm_state_size")
        )
        norm = getattr(module, "norm", None)
        if not (heads and size and holds(module, "dt_bias") and isinstance(norm, nn.Module)):
            return None
        if groups < 2 or getattr(norm, "group_size", wide) * groups != wide:
            return Unsupported("one norm over all its channels joins them")
        unit, head = (head_rows(n - n % groups, groups) for n in (wide, heads))
        mixed = torch.cat([unit, *[head_rows(groups * size, groups)] * 2])
        given = _giving(first, torch.cat([unit, mixed, head]), kernel, mixed)
        states = [*_states(("dt_bias", "A_log", "D"), head), *_states(("norm.weight",), unit)]
        return GroupLayer("", self.kind, groups, (*given, *states, columns("out_proj", unit)))

    def shrink(self, module: nn.Module, removal: Removal) -> nn.Module:
        """See :class:`torch_rsst.discovery.Adapter`."""
        units = removal.layer.units
        for name in _WIDTHS:
            if isinstance(value := vars(module).get(name), int):
                setattr(module, name, value // units * (units - removal.count))
        return module


def _giving(
    first: nn.Linear, of_rows: Tensor, kernel: nn.Conv1d, of_kernels: Tensor
) -> list[Member]:
    return [*rows("in_proj", first, of_rows), *rows("conv1d", kernel, of_kernels)]


def _states(names: tuple[str, ...], unit_of: Tensor) -> list[Member]:
    """Rates and norms, of which small ones matter as much as large ones: followers, whatever their shape."""
    return [Member(name, 0, unit_of, ranked=False) for name in names]
