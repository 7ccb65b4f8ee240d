"""``python -m benchmarks``: global pruning, the same on several ranks, and the penalty. See README.md beside this file.

``python -m benchmarks passes`` is ``python -m benchmarks.passes``, and so for every table.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass

import tyro

from benchmarks import distributed, global_pruning, penalty
from benchmarks.global_pruning import Size


@dataclass(frozen=True)
class Options:
    """All tables but those of compacted models.

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
    if sys.argv[1:] and sys.argv[1].isidentifier():
        runpy.run_module(f"benchmarks.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
    else:
        main(tyro.cli(Options))
