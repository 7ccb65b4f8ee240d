"""Modules that are plain within a block of ``dense_weights``, which puts their masks back: no call may count on others."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from torch_rsst.utils.errors import refuse
from torch_rsst.utils.optimizer_hooks import held_by

PLAIN_NOW: list[set[nn.Module]] = []
"""Of each open block the modules whose masks it has taken off; one may be in several."""


def is_plain_now(modules: Iterable[nn.Module]) -> bool:
    """Whether a block has taken the masks of one of these modules off."""
    return any(module in block for module in modules for block in PLAIN_NOW)


def check_masks_in_place(subject: str, modules: Iterable[nn.Module]) -> None:
    """Raise a RuntimeError within ``dense_weights``: what a call would do to masks is undone on leaving."""
    if is_plain_now(modules):
        remedy = "Leave the `with` block first, or work on a copy (copy.deepcopy inside the block)."
        got = "one within dense_weights(), which puts the masks back on leaving"
        refuse(RuntimeError, subject, "a model whose masks are in place", got, remedy)


# By their ids: plain parameters of blocks that have ended, while anything holds them.
_given_up: dict[int, weakref.ref[nn.Parameter]] = {}
_step_hooks: list[RemovableHandle] = []


def give_up(parameters: Iterable[nn.Parameter]) -> None:
    """Refuse steps of optimizers that hold one of these: no module does any more, so nothing would be trained."""
    for each in parameters:
        _given_up[id(each)] = weakref.ref(each, partial(_forget, id(each)))
    if _given_up and not _step_hooks:
        # It stays: a parameter may die while the hooks of a step are gone through.
        _step_hooks.append(register_optimizer_step_pre_hook(_refuse_given_up))


def _forget(key: int, dead: weakref.ref[nn.Parameter]) -> None:
    if _given_up.get(key) is dead:
        del _given_up[key]


def _refuse_given_up(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _given_up and any(id(p) in _given_up for p in held_by(optimizer)):
        got = "a plain one of a dense_weights() block that has ended, which would train nothing"
        remedy = "Make the optimizer before or after the `with` block, of model.parameters() as they are then."
        subject = f"step of {type(optimizer).__name__}"
        refuse(RuntimeError, subject, "parameters of a model", got, remedy)
