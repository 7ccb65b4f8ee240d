"""Run a function on several processes that form a gloo process group, and collect what they return."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forked from one that has imported these: to import them in each takes longer than most tests.
multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "torch_rsst"])


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, *args)`` of each rank, in order; it must be importable and return picklables."""
    with tempfile.TemporaryDirectory() as folder:
        own = (world_size, folder, function, args)
        mp.start_processes(_run, own, nprocs=world_size, start_method="forkserver")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _run(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    result = function(rank, *args)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
    dist.barrier()
    # Gloo aborts now and then where one rank takes its connection away while another still uses it:
    # so all wait for all, by files, and leave without tearing anything down.
    (Path(folder) / f"{rank}.done").touch()
    while len(list(Path(folder).glob("*.done"))) < world_size:
        time.sleep(0.01)
    os._exit(0)
