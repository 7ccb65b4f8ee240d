"""FSDP2 puts a module's parameters back by the name that they had when it sharded them.

So it must hear of a parameter's new name when it is masked or plain again. PyTorch has no public call
for that: all that is known of its inside stands here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def _managers() -> Iterator[tuple[nn.Module, Any]]:
    """Every module that FSDP2 has wrapped, and what it keeps for a parameter of it or below it."""
    composable = sys.modules.get("torch.distributed._composable_state")
    if composable is None or "torch.distributed.fsdp" not in sys.modules:
        return
    for module, reference in list(composable._module_state_mapping.items()):
        state = reference()
        one = getattr(state, "_fsdp_param_group", None) if state is not None else None
        for group in getattr(state, "_fsdp_param_groups", [one]):
            for kept in getattr(group, "fsdp_params", ()):
                yield module, kept


def rename_parameter(module: nn.Module, old: str, new: str) -> None:
    """Let FSDP2 put the parameter ``old`` of a module back as ``new``, where it shards it."""
    for _, kept in _managers():
        info = kept._module_info
        if info.module is module and info.param_name == old:
            info.param_name = new
        info.shared_param_names = [
            new if (owner is module and name == old) else name
            for owner, name in zip(info.shared_modules, info.shared_param_names, strict=True)
        ]


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free the whole parameters that a forward pass has left in place of this rank's parts."""
    wanted = set(modules) if "torch.distributed.fsdp" in sys.modules else set()
    managing = {
        wrapped: None
        for wrapped, kept in _managers()
        if not wanted.isdisjoint([kept._module_info.module, *kept._module_info.shared_modules])
    }
    for wrapped in managing:
        wrapped.reshard()  # type: ignore[operator] # FSDPModule has it
