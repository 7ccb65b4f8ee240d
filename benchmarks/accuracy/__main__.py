"""``python -m benchmarks.accuracy``: run the study, or what is left of it; then write its tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.accuracy.study import Run, grid, quick, run_all

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """The study of accuracy: resumes where it stopped.

    Attributes:
        part: all of it, its main cells, its ablations, three cells with other seeds, or one cell in a few minutes.
        task: only this task.
        arm: only this arm.
        amount: only this share of units.
        budget: only this share of the dense training's steps.
        seed: only this seed; one that is not in the study makes a fresh run of the cells that are named.
        results: the CSV file.
        work: where dense models are kept.
        workers: processes, of one thread each.
        minutes: no run is begun later than that.
        tables: run nothing; write tables and pictures.
    """

    part: Literal["all", "main", "ablation", "repetition", "quick"] = "all"
    task: str | None = None
    arm: str | None = None
    amount: float | None = None
    budget: float | None = None
    seed: int | None = None
    results: Path = HERE / "results.csv"
    work: Path = Path("runs/accuracy")
    workers: int = 2
    minutes: float = 600
    tables: bool = False


def chosen(options: Options) -> list[Run]:
    """The runs that the options name."""
    runs = quick() if options.part == "quick" else list(grid())
    if options.seed is not None:
        runs = list(
            {
                again.key: again for each in runs for again in [replace(each, seed=options.seed)]
            }.values()
        )
    wanted = {name: getattr(options, name) for name in ("task", "arm", "amount", "budget")}
    if options.part not in ("all", "quick"):
        wanted["part"] = options.part
    return [
        each
        for each in runs
        if all(value is None or getattr(each, name) == value for name, value in wanted.items())
    ]


def main(options: Options) -> None:
    """Run, print a line for each run, and write the tables."""
    if not options.tables:
        for line in run_all(
            chosen(options), options.results, options.work, options.workers, options.minutes
        ):
            print(line, flush=True)
    from benchmarks.accuracy.tables import write

    print(write(options.results))


if __name__ == "__main__":
    main(tyro.cli(Options))
