"""Passes over large tensors on the CPU, shared out between threads by the block.

PyTorch shares out single operations and waits for all threads after each. A pass of many short ones
then waits most of the time, and where other processes want the processor, nearly all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

# For fewer, a thread is not worth it: each waits for the interpreter at times.
_ENTRIES_EACH = 1 << 23
_MOST = 8  # more threads would wait for the interpreter

# Threads within one_thread(). A lock around it could be left closed by an interrupt.
_inside: set[int] = set()
_usual = 1  # what the latest of them had that may use more than one


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch from sharing operations of this thread out, for a while.

    PyTorch takes a thread's number of threads for that of all threads that begin later. So one that is
    found while others are in here may be theirs.
    """
    global _usual
    here = threading.get_ident()
    if here in _inside:
        yield
        return
    others = bool(_inside)
    own = torch.get_num_threads()
    if own > 1:
        _usual = own
    back = _usual if own == 1 and (others or _inside) else own
    try:
        _inside.add(here)
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(back)
        _inside.discard(here)


class Workers:
    """As many threads as a pass over some entries is worth, this one included; no more than PyTorch may use."""

    def __init__(self, entries: int) -> None:
        self.count = max(1, min(entries // _ENTRIES_EACH, torch.get_num_threads(), _MOST))
        self._others = ThreadPoolExecutor(self.count - 1) if self.count > 1 else None

    def run(self, work: Callable[[int, int], T]) -> list[T]:
        """What ``work(worker, workers)`` returns for each worker, from 0 to ``workers - 1``."""
        if self._others is None:
            with one_thread():
                return [work(0, 1)]
        workers, stopped = self.count, threading.Event()
        begun, ended = ([threading.Event() for _ in range(workers)] for _ in range(2))

        def unless_stopped(worker: int) -> T | None:
            begun[worker].set()
            try:
                with torch.no_grad():  # which a thread does not inherit
                    return None if stopped.is_set() else work(worker, workers)
            finally:
                ended[worker].set()

        with one_thread():
            try:
                submit = self._others.submit
                others = [submit(unless_stopped, worker) for worker in range(1, workers)]
                return [work(0, workers), *(other.result() for other in others)]  # type: ignore[list-item]
            finally:
                # Wait however often that is interrupted: afterwards nothing is written any more.
                interrupt: BaseException | None = None
                while True:
                    try:
                        stopped.set()
                        # What has not begun does nothing any more. Of the rest, each future may have
                        # been lost.
                        for worker in range(workers):
                            if begun[worker].is_set():
                                ended[worker].wait()
                        break
                    except BaseException as raised:
                        interrupt = raised
                if interrupt is not None:
                    raise interrupt
