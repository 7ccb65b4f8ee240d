"""Passes over large tensors on the CPU, shared out between threads by the block.

PyTorch shares out single operations and waits for all threads after each. A pass of many short ones
then waits most of the time, and where other processes want the processor, nearly all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_MOST = 8  # more threads would wait for the interpreter


_lock = threading.Lock()
_inside: list[int] = []  # what to go back to, once for each block that is open


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch from sharing operations out, for a while; in several threads at once, if need be."""
    with _lock:
        _inside.append(_inside[0] if _inside else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            count = _inside.pop()
            if not _inside:
                torch.set_num_threads(count)


class Workers:
    """As many threads as PyTorch may use, ``most`` at most, this one included."""

    def __init__(self, most: int) -> None:
        self.count = max(1, min(most, torch.get_num_threads(), _MOST))
        self._others = ThreadPoolExecutor(self.count - 1) if self.count > 1 else None

    def run(self, work: Callable[[int, int], T]) -> list[T]:
        """What ``work(turn, turns)`` returns for every turn, all at the same time."""
        if self._others is None:
            return [work(0, 1)]
        turns, stopped = self.count, threading.Event()

        def unless_stopped(turn: int) -> T | None:
            return None if stopped.is_set() else work(turn, turns)

        with one_thread():
            others: list[Future[Any]] = []
            try:
                for turn in range(1, turns):
                    others.append(self._others.submit(unless_stopped, turn))
                first = work(0, turns)
            except BaseException:
                stopped.set()
                raise
            finally:
                _wait_until_done(others)
            return [first, *(other.result() for other in others)]


def _wait_until_done(others: Sequence[Future[Any]]) -> None:
    """Wait however often that is interrupted: afterwards nothing is written any more."""
    interrupt: BaseException | None = None
    while any(not other.done() for other in others):
        try:
            wait(others)
        except BaseException as raised:
            interrupt = raised
    if interrupt is not None:
        raise interrupt
