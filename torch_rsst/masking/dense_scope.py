"""Modules that are plain within a block of ``dense_weights``, which puts their masks back: no call may count on others."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from torch_rsst.utils.errors import refuse

_plain_now: list[set[nn.Module]] = []  # of each open block


def plain_from_now(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Note modules whose masks a block has taken off; pass what it returns to ``masked_again``."""
    noted = set(modules)
    _plain_now.append(noted)
    return noted


def masked_again(noted: set[nn.Module]) -> None:
    """Forget the modules of a block that has ended."""
    _plain_now[:] = [each for each in _plain_now if each is not noted]


def is_plain_now(modules: Iterable[nn.Module]) -> bool:
    """Whether a block has taken the masks of one of these modules off."""
    return bool(_plain_now) and any(m in noted for m in modules for noted in _plain_now)


def check_masks_in_place(subject: str, modules: Iterable[nn.Module]) -> None:
    """Raise a RuntimeError within ``dense_weights``: what a call would do to masks is undone on leaving."""
    if is_plain_now(modules):
        remedy = "Leave the `with` block first, or work on a copy (copy.deepcopy inside the block)."
        got = "one within dense_weights(), which puts the masks back on leaving"
        refuse(RuntimeError, subject, "a model whose masks are in place", got, remedy)
