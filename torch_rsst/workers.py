"""Passes over large tensors on the CPU, shared out between threads by the block.

PyTorch shares out single operations and waits for all threads after each. A pass of many short ones
then waits most of the time, and where other processes want the processor, nearly all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

_MOST = 8  # more threads would wait for the interpreter


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch from sharing operations of this thread out, for a while."""
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(count)


class Workers:
    """As many threads as PyTorch may use, ``most`` at most, this one included."""

    def __init__(self, most: int) -> None:
        self.count = max(1, min(most, torch.get_num_threads(), _MOST))
        self._others = ThreadPoolExecutor(self.count - 1) if self.count > 1 else None

    def run(self, work: Callable[[int, int], T]) -> list[T]:
        """What ``work(turn, turns)`` returns for every turn, all at the same time."""
        if self._others is None:
            with one_thread():
                return [work(0, 1)]
        turns, stopped = self.count, threading.Event()
        begun, ended = ([threading.Event() for _ in range(turns)] for _ in range(2))

        def unless_stopped(turn: int) -> T | None:
            begun[turn].set()
            try:
                return None if stopped.is_set() else work(turn, turns)
            finally:
                ended[turn].set()

        with one_thread():
            try:
                submit = self._others.submit
                others = [submit(unless_stopped, turn) for turn in range(1, turns)]
                return [work(0, turns), *(other.result() for other in others)]  # type: ignore[list-item]
            finally:
                stopped.set()
                # What has not begun does nothing any more. Of the rest, each future may have been lost.
                _wait_for_all([ended[turn] for turn in range(turns) if begun[turn].is_set()])


def _wait_for_all(events: Sequence[threading.Event]) -> None:
    """Wait however often that is interrupted: afterwards nothing is written any more."""
    interrupt: BaseException | None = None
    for event in events:
        while not event.is_set():
            try:
                event.wait()
            except BaseException as raised:
                interrupt = raised
    if interrupt is not None:
        raise interrupt
