"""The terminal output of a run: progress bars, lines and tables."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_rsst.recipes.comparison import Result

from torch_rsst.recipes.training_text import extras_text, images_text


def is_main_process() -> bool:
    """Whether this process prints: under torchrun, the first one."""
    return os.environ.get("RANK", "0") == "0"


class Terminal:
    """Shows progress: a bar per epoch, a line per stage and per round."""

    def __init__(self, config: Any) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
        )

        self._config = config
        self._console = Console(highlight=False, quiet=not is_main_process())
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        left = TextColumn("{task.fields[left]}")
        self._progress = Progress(*columns, left, console=self._console, transient=True)
        self._whole = self._progress.add_task("whole run", total=None, left="")
        self._bar = self._progress.add_task("", total=None, left="")
        self._started, self._made, self._to_make = time.monotonic(), 0, 0
        self._epochs = self._epoch = 0
        self._last: dict[str, Any] = {}
        self._chance = 0.0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress.live.is_started:  # else it would print an empty line
            self._progress.stop()

    def plan(self, experiment: Any) -> None:
        """Print what the run will do, and start the bars."""
        config = self._config
        parameters = sum(p.numel() for p in experiment.model.parameters())
        self._console.print(
            f"{experiment.trainer.name} of {parameters:,} parameters: {experiment.groups}. "
            f"{config.method} over "
            f"{config.rounds} rounds on {experiment.trainer.accelerator.device}; "
            f"all files are written to {config.output}/"
        )
        images = images_text(config, experiment.trainer.form)
        for line in [*images, *extras_text(config, experiment.progress.plan), *notes(config)]:
            self._console.print(line)
        self._chance = 100.0 / experiment.trainer.images.classes
        epochs = config.dense_epochs + config.rounds * config.epochs + config.finetune_epochs
        total = epochs * experiment.trainer.steps_per_epoch
        self._progress.reset(self._whole, total=total, completed=experiment.steps_done)
        self._started, self._to_make = time.monotonic(), total - experiment.steps_done
        self._progress.start()

    def warn(self, text: Warning | str, *where: object) -> None:
        """A warning, without the lines of code that raised it."""
        print_warning(text, console=self._console)

    def stage(self, stage: Any, steps: int, done: int) -> None:
        """A stage begins."""
        self._end_of_stage()
        per_epoch = max(1, steps // max(1, stage.epochs))
        number = stage.name.removeprefix("round ")
        self._name = (
            stage.name
            if number == stage.name
            else f"round {int(number) + 1} of {self._config.rounds}"
        )
        self._epochs, self._epoch = stage.epochs, done // per_epoch
        self._progress.reset(
            self._bar, total=per_epoch, completed=done % per_epoch, description=self._description()
        )

    def step(self) -> None:
        """One step was made."""
        self._progress.advance(self._bar)
        self._made += 1
        # The time since the start includes evaluation and loading.
        seconds = (time.monotonic() - self._started) / self._made * (self._to_make - self._made)
        left = f"about {timedelta(seconds=round(seconds))} left"
        self._progress.update(self._whole, advance=1, left=left)

    def record(self, record: dict[str, Any]) -> None:
        """An epoch or a round ended."""
        if record["event"] == "round":
            self._last = {}
            self._console.print(_round_line(record, self._config))
            return
        self._last = record
        self._epoch += 1
        self._progress.reset(self._bar, description=self._description())
        if not self._console.is_terminal:  # where no bar moves
            done = f"epoch {self._epoch} of {self._epochs}, loss {record['loss']:.3f}"
            self._console.print(f"{self._name}: {done}, accuracy {record['accuracy']:.2f} %")

    def _description(self) -> str:
        accuracy = f", accuracy {self._last['accuracy']:.1f} %" if self._last else ""
        return (
            f"{self._name}: epoch {min(self._epoch + 1, self._epochs)} of {self._epochs}{accuracy}"
        )

    def _end_of_stage(self) -> None:
        if self._last.get("stage") == "dense":
            accuracy = f"{self._last['accuracy']:.2f} %"
            self._console.print(f"dense: accuracy {accuracy} (chance: {self._chance:.2f} %)")
        self._last = {}


def print_warning(text: Warning | str, *where: object, console: Any = None) -> None:
    from rich.console import Console

    console = Console(highlight=False) if console is None else console
    console.print(f"Warning: {text}", style="yellow")


def _round_line(record: dict[str, Any], config: Any) -> str:
    units = ", ".join(
        f"{kind}: {share:.0%} gone, of {record['share_to_go'][kind]:.0%} that are meant to go"
        for kind, share in record["share_gone"].items()
    )
    line = (
        f"round {record['round'] + 1} of {config.rounds}: accuracy {record['accuracy']:.2f} %, "
        f"weights {record['element_sparsity']:.1%} masked, {units}"
    )
    start, end = record["penalized_norm_start"], record["penalized_norm"]
    if start:
        line += f", λ {record['strength']:.2g}, penalized norm {start:.3g} → {end:.2g}"
    return line


def print_forecast(found: Any, config: Any) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    console = Console(highlight=False)
    images, held_out = found.images
    but = ", but for downloaded images" if config.download else ""
    console.print(
        f"{found.name} on {found.device}: {images:,} images to train on, {held_out:,} held out, "
        f"{found.classes} classes. Nothing has been trained or written{but}."
    )
    table = Table("layer", "kind", "units", "stay", title="units, by the weights as they are now")
    for layer in found.layers:
        table.add_row(layer.name or "(model)", layer.kind, f"{layer.before}", f"{layer.after}")
    console.print(table)
    table = Table("", "dense", "compacted", title="of the model")
    table.add_row("parameters", f"{found.before.parameters:,}", f"{found.after.parameters:,}")
    adds = (f"{cost.multiply_adds:,}" for cost in (found.before, found.after))
    table.add_row("multiply-adds per image", *adds)
    console.print(table)
    dense, rounds, finetune = found.steps
    console.print(
        f"Steps: {dense:,} dense, {rounds:,} in {config.rounds} rounds, {finetune:,} of fine-tuning; "
        f"{config.batch_size * config.accumulation} images each."
    )
    for sentence in [*images_text(config, found.form), *extras_text(config, found.plan)]:
        console.print(sentence)
    memory = found.memory
    console.print(
        f"Memory of a process: about {decimal(memory.total)} beside PyTorch and the images: weights and masks {decimal(memory.model)}, "
        f"gradients {decimal(memory.gradients)}, optimizer {decimal(memory.optimizer)}, "
        f"activations of a batch {decimal(memory.activations)}, teacher {decimal(memory.teacher)}."
    )


def notes(config: Any) -> list[str]:
    idle = config.without_effect().items()
    return [f"Note: {flag(name)} has no effect with {why}." for name, why in idle]


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def print_summary(path: Path, results: dict[str, Any], config: Any, *, offer: bool = True) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results['method']}: {results['seconds']:.0f} s", show_header=False)
    rows = {
        "chance": results.get("chance"),  # reports of earlier versions have none
        "accuracy, dense": results["dense_accuracy"],
        "accuracy when penalized weights first fell below 1 %": results["accuracy_first_zero"],
        "accuracy before the cut": results["accuracy_before_cut"],
        "accuracy after the cut": results["accuracy_after_cut"],
        "accuracy, final": results["accuracy"],
    }
    for name, percent in rows.items():
        if percent is not None:
            table.add_row(name, f"{percent:.2f} %")
    table.add_row("element sparsity", f"{results['element_sparsity']:.1%}")
    for kind, counts in results["sparsity"]["kinds"].items():
        table.add_row(f"{kind.removesuffix('s')} sparsity", f"{counts['sparsity']:.1%}")
    table.add_row("parameters, masked", f"{results['parameters']:,}")
    table.add_row("multiply-adds per image, masked", f"{results['multiply_adds']:,}")
    console = Console(highlight=False)
    console.print(table)
    for sentence in extras_text(config, results.get("plan")):
        console.print(sentence)
    console.print(f"Open {path}/report.html; weights, numbers and pictures are beside it.")
    if offer:
        console.print(f"Cut out what is gone: torch-rsst compact {path}", soft_wrap=True)


def print_comparison(results: Sequence[Result], page: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "dense", "final", "parameters", "time", title=f"{len(results)} runs")
    for each in results:
        size, time = (
            "not compacted" if share is None else f"{share:.1%}" for share in (each.size, each.time)
        )
        accuracies = (f"{each.dense_accuracy:.2f} %", f"{each.accuracy:.2f} %")
        table.add_row(each.name, *accuracies, size, time)
    console = Console(highlight=False)
    console.print(table)
    console.print("Parameters and time are shares of the dense model's.")
    console.print(f"Open {page}.", soft_wrap=True)


def print_savings(receipt: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    images, timed = receipt["images"], receipt["timed"]
    states = f"before: {timed['before']}; after: {timed['after']}"
    if timed["before"] == timed["after"]:
        states = timed["before"]
    one = "image" if images == 1 else "images"
    rows: dict[str, tuple[Any, Callable[[Any], str]]] = {
        "accuracy": (receipt["accuracy"], "{:.2f} %".format),
        **{kind: (counts, "{:,}".format) for kind, counts in receipt["units"].items()},
        "parameters": (receipt["parameters"], "{:,}".format),
        "multiply-adds per image": (
            receipt["multiply_adds"],
            lambda count: f"{count // images:,}",
        ),
        f"time for {images} {one}": (receipt["latency_ms"], "{:.2f} ms".format),
    }
    table = Table("", "before", "after", title="compacted")
    for name, (values, text) in rows.items():
        table.add_row(name, text(values["before"]), text(values["after"]))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"Outputs for {images} held-out {one} differ by at most {receipt['max_error']:.1e}. "
        f"Times are medians of runs in turns ({states})."
    )
    for name, error in receipt.get("exported", {}).items():
        console.print(f"{name}: without masks, outputs differ by at most {error:.1e}.")
    console.print(f'Load it: torch_rsst.load_compact("{folder}")', soft_wrap=True)
    console.print(
        f"Use it: torch-rsst predict {folder} IMAGE; about it: {folder}/README.md", soft_wrap=True
    )
