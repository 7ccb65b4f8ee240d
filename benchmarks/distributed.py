"""``python -m benchmarks.distributed``: the call on 1, 2 and 4 ranks, and what it communicates."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.contenders import layers_of, ours


@dataclass(frozen=True)
class Options:
    """Time and bytes of a global pruning call on a model that FSDP2 has sharded over gloo ranks.

    Attributes:
        sizes: how many weights.
        ranks: how many processes.
        calls: calls on one model, of which the median counts.
    """

    sizes: tuple[Literal["5.3M", "21M", "85M"], ...] = ("5.3M", "21M", "85M")
    ranks: tuple[int, ...] = (1, 2, 4)
    calls: int = 3


def main(options: Options) -> None:
    """Print a line per size and number of ranks."""
    table = Table(title=f"sharded, CPU, gloo, torch {torch.__version__}, one thread a rank")
    for heading in ("weights", "ranks", "ms a call", "bytes added up", "entries masked"):
        table.add_column(heading, justify="right")
    for size in options.sizes:
        for ranks in options.ranks:
            milliseconds, sent, masked = measure(size, ranks, options.calls)
            table.add_row(size, str(ranks), f"{milliseconds:.0f}", f"{sent:,}", f"{masked:,}")
    Console().print(table)


def measure(size: str, ranks: int, calls: int) -> tuple[float, int, int]:
    """Milliseconds, bytes and masked entries of one call, as the first rank sees them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (ranks, folder, size, calls), nprocs=ranks)
        milliseconds, sent, masked = (Path(folder) / "result").read_text().split()
    return float(milliseconds), int(sent), int(masked)


def _work(rank: int, ranks: int, folder: str, size: str, calls: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    torch.manual_seed(0)
    layers = layers_of(size, torch.device("cpu"))
    # A list has no forward pass, which fully_shard asks for; it is never called.
    model = fully_shard(nn.Sequential(*layers), mesh=init_device_mesh("cpu", (ranks,)))
    sent = [0]
    add_up = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[0] += tensor.numel() * tensor.element_size()
        return add_up(tensor, *args, **kwargs)

    dist.all_reduce = counting
    seconds = []
    for _ in range(calls):
        dist.barrier()
        start = time.perf_counter()
        ours(layers)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    dist.all_reduce = add_up
    masked = sum(int((b.full_tensor() == 0).sum()) for b in model.buffers())  # type: ignore[attr-defined]
    if rank == 0:
        middle = sorted(seconds)[calls // 2]
        (Path(folder) / "result").write_text(f"{1e3 * middle} {sent[0] // calls} {masked}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Options))
