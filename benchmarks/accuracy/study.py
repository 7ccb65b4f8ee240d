"""The grid of runs, and running it: two processes of one thread each, a line in a CSV file as each run ends."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

# The learning rates of the pruning budget, chosen on validation for one-shot magnitude with the tuning seeds.
PEAKS = {"language": 4e-3, "signal-transformer": 4e-3, "signal-resnet": 2e-3}
MAIN_SEEDS, OTHER_SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (0, 1, 2), (100, 101)
REPEATED_SEEDS = (5, 6, 7)
TASKS = ("language", "signal-transformer", "signal-resnet")
FIELDS = (
    "part", "task", "arm", "options", "amount", "budget", "peak", "seed",
    "parameters", "steps", "dense_test", "validation", "test", "chance", "seconds",
)  # fmt: skip
KEY = FIELDS[:8]


@dataclass(frozen=True)
class Run:
    """One configuration and seed.

    Attributes:
        part: "main", "ablation", "repetition" or "tuning".
        task: its name.
        arm: its name.
        options: of the arm.
        amount: the share of units that go.
        budget: steps, as a fraction of the dense training's.
        peak: the learning rate; that of the task in :data:`PEAKS` by default.
        seed: of everything.
    """

    part: str
    task: str
    arm: str
    options: Mapping[str, Any] = field(default_factory=dict)
    amount: float = 0.5
    budget: float = 0.06
    peak: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.peak is None:
            object.__setattr__(self, "peak", PEAKS[self.task])

    @property
    def key(self) -> tuple[str, ...]:
        """What tells runs apart in the file, as text."""
        options = json.dumps(dict(self.options), sort_keys=True)
        values = (
            self.part,
            self.task,
            self.arm,
            options,
            self.amount,
            self.budget,
            self.peak,
            self.seed,
        )
        return tuple(map(str, values))


LEAST_SQUARES = {"reconstruct": "least_squares"}
DISTILLED = {"distill": True}
BEST_SCORES = {"importance": "obs", "scope": "size", **LEAST_SQUARES}
DEFAULT: tuple[str, dict[str, Any]] = ("rsst", {})
"""``RSST(batches=…)`` with nothing else set."""
DISTILLED_DEFAULT: tuple[str, dict[str, Any]] = ("rsst", DISTILLED)
"""``torch-rsst run`` without options."""
HARD = ("refill", {"importance": "auto", **LEAST_SQUARES})
DISTILLED_HARD = ("refill", {**HARD[1], **DISTILLED})
"""``torch-rsst run --method refill``."""
# The arms that matter most: with more seeds, and where little is left.
KEY_ARMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("one-shot", {"importance": "magnitude"}),
    ("one-shot", {"importance": "variance", **LEAST_SQUARES}),
    ("one-shot", BEST_SCORES),
    DEFAULT,
    HARD,
    DISTILLED_DEFAULT,
    DISTILLED_HARD,
)
# What users would do otherwise, and with the aids one after the other.
MOST_ARMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dense", {}),
    ("random", {}),
    *KEY_ARMS,
    ("one-shot", {"importance": "taylor"}),
    ("one-shot", {"importance": "variance"}),
    ("one-shot", {**BEST_SCORES, **DISTILLED}),
    ("gradual", {}),
    ("refill", {"importance": "magnitude"}),
    ("torch-pruning-magnitude", {}),
    ("torch-pruning-growing", {}),
)
ARMS: tuple[tuple[str, dict[str, Any]], ...] = (
    *MOST_ARMS,
    *(
        ("one-shot", {"importance": importance, **aid, **distilled})
        for importance in ("magnitude", "taylor", "variance")
        for aid in ({}, LEAST_SQUARES)
        for distilled in ({}, DISTILLED)
        if distilled or (aid and importance != "variance")  # the others are among the above
    ),
    ("one-shot", {"importance": "obs", **LEAST_SQUARES}),
    ("one-shot", {"importance": "variance", "scope": "size", **LEAST_SQUARES}),
    ("rsst", {"importance": "magnitude"}),
    ("rsst", LEAST_SQUARES),
    ("rsst", {"importance": "variance"}),
)
OTHER_SCOPE = {"language": "layer", "signal-transformer": "layer", "signal-resnet": "size"}
"""What the default is not: heads and neurons compete over all layers, channels within their own."""
ABLATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"kept_units": "sparse"},
    *({"shrink_to": rho} for rho in (0.1, 0.03, 0.001)),
    *({"shrink_by": tau} for tau in (0.5, 0.75)),
    *({"rounds": rounds} for rounds in (1, 2, 4, 8)),
    *({"scope": scope} for scope in ("type", "global")),
    {"rewind": "init"},
    *({"cut_at": share} for share in (0.15, 0.3, 0.75)),
    {"block_loss_grad": True},
)


def grid() -> Iterator[Run]:
    """All runs of the study, each once; those that matter most first: the first seeds of every cell."""
    yield from {run.key: run for run in _cells()}.values()


def _cells() -> Iterator[Run]:
    for seed, task in product(OTHER_SEEDS, TASKS):
        for arm, options in (*ARMS, ("rsst", {"scope": OTHER_SCOPE[task]})):
            yield Run("main", task, arm, options, seed=seed)
    for seed, task in product(OTHER_SEEDS, TASKS):
        for arm, options in MOST_ARMS:
            yield Run("main", task, arm, options, 0.75, seed=seed)
    for seed, task in product(MAIN_SEEDS, TASKS):
        for arm, options in (("dense", {}), *KEY_ARMS):
            yield Run("main", task, arm, options, seed=seed)
    for seed, task in product(OTHER_SEEDS, TASKS):
        for arm, options in KEY_ARMS:
            yield Run("main", task, arm, options, 0.875, seed=seed)
    for seed, task in product(OTHER_SEEDS, TASKS):
        for options in ABLATIONS:
            yield Run("ablation", task, "rsst", options, seed=seed)
        for options in ({}, {"same_work": True}):
            yield Run("main", task, "scratch", options, seed=seed)
    for seed, task, amount in product(OTHER_SEEDS, TASKS, (0.5, 0.75)):
        for arm, options in (("dense", {}), *KEY_ARMS):
            yield Run("main", task, arm, options, amount, 0.25, seed=seed)
    for seed, task in product(REPEATED_SEEDS, TASKS):
        for arm, options in (("dense", {}), KEY_ARMS[0], DEFAULT, DISTILLED_DEFAULT):
            yield Run("repetition", task, arm, options, seed=seed)


def quick() -> list[Run]:
    """One cell with one seed: a first look in a few minutes."""
    arms = (*KEY_ARMS[:2], DEFAULT, HARD, DISTILLED_HARD)
    return [Run("quick", "signal-transformer", arm, options, seed=0) for arm, options in arms]


def run(of: Run, folder: Path) -> dict[str, Any]:
    """Do one run and return its line of the file."""
    import torch

    from benchmarks.accuracy import arms, tasks, training

    torch.set_num_threads(1)
    started = time.time()
    task = tasks.TASKS[of.task]
    dense = training.dense_model(task, of.seed, folder)
    torch.manual_seed(of.seed)
    criterion = arms.criterion_of(task, dense, of.options)
    steps = round(of.budget * task.dense_steps)
    assert of.peak is not None, "set at construction"
    budget = training.Budget(task, steps, of.peak, of.seed + 1000, criterion)
    options = {key: value for key, value in of.options.items() if key != "distill"}
    model = arms.ARMS[of.arm](arms.Case(task, dense, of.amount, budget, of.seed, options))
    assert budget.taken == budget.steps, f"{of}: {budget.taken} of {budget.steps} steps were taken"
    tuning = of.part == "tuning"  # which never reads the test split
    return dict(zip(KEY, of.key, strict=True)) | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "dense_test": "" if tuning else f"{task.evaluate(dense, 'test'):.4f}",
        "validation": f"{task.evaluate(model, 'validation'):.4f}",
        "test": "" if tuning else f"{task.evaluate(model, 'test'):.4f}",
        "chance": f"{task.chance:.4f}",
        "seconds": f"{time.time() - started:.0f}",
    }


def done(path: Path) -> set[tuple[str, ...]]:
    """The keys of the runs that a file holds."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[name] for name in KEY) for row in csv.DictReader(file)}


def run_all(
    runs: Iterable[Run], path: Path, folder: Path, workers: int, minutes: float
) -> Iterator[str]:
    """Do the runs that the file lacks; yields a line of text for each.

    A run that fails is said and left out, and is tried again by the next call.

    Args:
        runs: in this order.
        path: the CSV file.
        folder: where dense models are kept.
        workers: processes, of one thread each.
        minutes: no run is begun later than that.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    folder.mkdir(parents=True, exist_ok=True)
    known = done(path)
    waiting = [each for each in runs if each.key not in known]
    until = time.time() + 60 * minutes
    yield f"{len(known)} runs are in {path}, {len(waiting)} are to do"
    with ProcessPoolExecutor(workers) as pool, path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if file.tell() == 0:
            writer.writeheader()
        queue, running = iter(waiting), {}
        for each in queue:
            running[pool.submit(run, each, folder)] = each
            if len(running) < workers:
                continue
            yield from _collect(running, writer, first=True)
            file.flush()
            if time.time() > until:
                break
        while running:
            yield from _collect(running, writer, first=True)
            file.flush()


def _collect(running: dict[Any, Run], writer: csv.DictWriter[str], first: bool) -> Iterator[str]:
    future = next(as_completed(running))
    of = running.pop(future)
    name = f"{of.part} {of.task} {of.arm} {dict(of.options)} {of.amount} {of.budget} seed {of.seed}"
    try:
        row = future.result()
    except Exception as error:
        yield f"failed: {name}: {type(error).__name__}: {error}"
        return
    writer.writerow(row)
    yield f"{name}: {row['test'] or row['validation']} ({row['seconds']} s)"
