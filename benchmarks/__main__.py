"""``python -m benchmarks``: global pruning, the same on several ranks, and the penalty. See README.md beside this file.

``python -m benchmarks NAME`` is ``python -m benchmarks.NAME``.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import distributed, global_pruning, penalty
from benchmarks.global_pruning import Size


@dataclass(frozen=True)
class Options:
    """All tables but those of compacted and of masked models.

    Attributes:
        sizes: how many weights are pruned.
        device: where to measure; several ranks are on the CPU in any case.
    """

    sizes: tuple[Size, ...] = ("5.3M", "21M", "85M")
    device: str = "cpu"


def main(options: Options) -> None:
    """Print them, one after the other."""
    global_pruning.main(global_pruning.Options(sizes=options.sizes, device=options.device))
    distributed.main(distributed.Options())
    penalty.main(penalty.Options(device=options.device))


if __name__ == "__main__":
    if len(sys.argv) > 1 and (Path(__file__).parent / f"{sys.argv[1]}.py").exists():
        runpy.run_module(f"benchmarks.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
    else:
        main(tyro.cli(Options))
