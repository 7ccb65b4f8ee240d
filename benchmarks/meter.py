"""Seconds and bytes of a call, on the CPU or a CUDA device."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch


class Meter:
    """Measures calls on one device.

    Memory on the CPU is the process's resident set, sampled every millisecond by a thread; on CUDA
    it is what PyTorch's allocator counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_cuda = device.type == "cuda"
        self._process = psutil.Process()

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long ``work`` takes."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def held(self) -> int:
        """The memory in use now, in bytes."""
        gc.collect()
        if self._on_cuda:
            return torch.cuda.memory_allocated(self.device)
        for thread in threading.enumerate():
            if thread.name.startswith("ThreadPoolExecutor"):
                thread.join(timeout=1.0)  # of a call that has returned: about to end
        _give_back()
        return int(self._process.memory_info().rss)

    def peak(self, work: Callable[[], Any]) -> int:
        """The most memory that ``work`` takes beyond what is in use before it, in bytes."""
        before = self.held()
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            work()
            self._wait()
            return torch.cuda.max_memory_allocated(self.device) - before
        samples = [before]
        done = threading.Event()

        def sample() -> None:
            while not done.wait(0.001):
                samples.append(self._process.memory_info().rss)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            work()
            samples.append(self._process.memory_info().rss)
        finally:
            done.set()
            thread.join()
        return max(samples) - before

    def beyond(self, work: Callable[[], Any]) -> int:
        """The most memory that ``work`` takes beyond what it returns and leaves behind, in bytes."""
        returned: list[Any] = []
        before = self.held()
        peak = self.peak(lambda: returned.append(work()))
        return peak - max(0, self.held() - before)

    def _wait(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize(self.device)


def _give_back() -> None:
    """Return freed memory to the system, where the C library can: else it counts as in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
