"""``torch-rsst``: arguments in, exit codes and terminal out. The only place that prints."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from torch_rsst._version import __version__
from torch_rsst.errors import message

_EXTRA = (
    "torch-rsst: the command line needs more packages ({missing}): pip install 'torch-rsst[cli]'"
)

# Exit codes: 2 as for wrong options, 130 as shells do for Ctrl-C.
_WRONG, _INTERRUPTED = 2, 130


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: without the program's name; those of the process by default.

    Returns:
        the exit code: 0, 2 for wrong options or files, 130 after Ctrl-C.
    """
    try:
        args = sys.argv[1:] if args is None else args
        if list(args) == ["--version"]:
            print(f"torch-rsst {__version__}")
            return 0
        return _parse(args)()
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("torch_rsst"):
            raise
        print(_EXTRA.format(missing=error.name), file=sys.stderr)
    except _WrongInput as error:
        print(f"torch-rsst: {error}", file=sys.stderr)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # before a run listens to it, or the second one
        print("torch-rsst: stopped at once", file=sys.stderr)
        return _INTERRUPTED
    return _WRONG


# What the library raises for input that the user can put right.
_MISTAKES = (TypeError, ValueError, KeyError, OSError)


class _WrongInput(Exception):  # noqa: N818 - carries a message for the user, not a fault of ours
    """Something that the user can put right."""


def _parse(args: Sequence[str]) -> Callable[[], int]:
    """The command that the arguments name, ready to be called."""
    import tyro

    from torch_rsst.recipes.config import CompactConfig, ReportConfig, RunConfig

    def parse(default: RunConfig) -> RunConfig | ReportConfig | CompactConfig:
        run = Annotated[RunConfig, tyro.conf.subcommand("run", default=default)]
        report = Annotated[ReportConfig, tyro.conf.subcommand("report")]
        compact = Annotated[CompactConfig, tyro.conf.subcommand("compact")]
        description = "Structured sparsity for vision transformers and CNNs: RSST and Refill."
        commands = run | report | compact
        told = io.StringIO()
        try:
            with redirect_stderr(told):
                return tyro.cli(
                    commands, prog="torch-rsst", description=description, args=list(args)
                )
        except SystemExit as stop:
            if stop.code:
                raise _WrongInput(_without_frame(told.getvalue())) from None
            raise

    try:
        config = parse(RunConfig())
        if isinstance(config, ReportConfig):
            return partial(_report, config.folder)
        if isinstance(config, CompactConfig):
            return partial(_compact, config)
        if config.resume:
            _check_only_resumes(config)
            from torch_rsst.recipes.run_folder import RunFolder

            # A resumed run keeps its own options; naming another value is an error, found later.
            own = RunFolder(config.output).read_config()
            return partial(_run, parse(replace(own, output=config.output, resume=True)))
        if config.config is not None:
            config = parse(replace(RunConfig.named(config.config), config=config.config))
        assert isinstance(config, RunConfig)
        if config.write_config is not None:
            return partial(_write_config, config)
        return partial(_dry_run if config.dry_run else _run, config)
    except BrokenPipeError:
        raise
    except (TypeError, ValueError, OSError) as error:
        raise _WrongInput(_one_line(error)) from error


def _without_frame(text: str) -> str:
    """What the parser says, in one line: it draws boxes."""
    words = re.sub(r"[─-╿]+", " ", text).split()
    return " ".join(words).removeprefix("Parsing error ").removeprefix("Unrecognized options ")


def _check_only_resumes(config: Any) -> None:
    beside = [name for name in ("config", "dry_run", "write_config") if getattr(config, name)]
    if beside:
        expected, remedy = (
            "nothing else to do",
            "A resumed run keeps its own options: leave it away.",
        )
        got = ", ".join(map(_flag, beside))
        raise ValueError(message("--resume", expected=expected, got=got, remedy=remedy))


def _write_config(config: Any) -> int:
    from torch_rsst.files import write_text

    try:
        config.check()
        if config.write_config.exists():
            remedy = "Pass another name."
            raise FileExistsError(
                message(
                    str(config.write_config), expected="a new file", got="an old one", remedy=remedy
                )
            )
        config.write_config.parent.mkdir(parents=True, exist_ok=True)
        write_text(config.write_config, config.to_yaml())
    except (TypeError, ValueError, OSError) as error:
        raise _WrongInput(_one_line(error)) from error
    print(f"Start it with: torch-rsst run --config {config.write_config}")
    return 0


def _dry_run(config: Any) -> int:
    from torch_rsst.recipes.forecast import forecast

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment] # takes less apart
            found = forecast(config)
    except _MISTAKES as error:
        raise _WrongInput(_one_line(error)) from error
    if _speaks():
        _print_forecast(found, config)
        for note in _notes(config):
            print(note)
    return 0


def _run(config: Any) -> int:
    from torch_rsst.recipes.experiment import Experiment
    from torch_rsst.recipes.images import BadImages
    from torch_rsst.recipes.run_folder import RunFolder
    from torch_rsst.recipes.training import Diverged, Interrupted, StoppedElsewhere

    folder = RunFolder(config.output)
    if config.resume and folder.report.is_file():
        try:
            folder.check_same(config)
        except _MISTAKES as error:
            raise _WrongInput(_one_line(error)) from error
        return _report(config.output)
    stop = _StopOnCtrlC()
    try:
        with stop, warnings.catch_warnings(), _Terminal(config) as terminal:
            warnings.showwarning = terminal.warn  # type: ignore[assignment] # takes less apart
            try:
                experiment = Experiment(config, terminal, stop.asked)
            except _MISTAKES as error:
                raise _WrongInput(_one_line(error)) from error
            terminal.plan(experiment)
            results = experiment.run()
    except Interrupted:
        if _speaks():
            print(
                f"Stopped. Continue with: torch-rsst run --resume --output {config.output}",
                file=sys.stderr,
            )
        return _INTERRUPTED
    except StoppedElsewhere:
        return _WRONG
    except (Diverged, BadImages) as error:
        raise _WrongInput(_one_line(error)) from error
    except OSError as error:
        again = f"torch-rsst run --resume --output {config.output}"
        raise _WrongInput(
            message(
                str(config.output),
                expected="to write there",
                got=str(error),
                remedy=f"Check free space and permissions, then: {again}",
            )
        ) from error
    if _speaks():
        _summary(config.output, results)
    return 0


def _speaks() -> bool:
    """Whether this is the process that talks: under torchrun, the first one."""
    return os.environ.get("RANK", "0") == "0"


def _report(path: Path) -> int:
    from torch_rsst.recipes.run_folder import RunFolder

    folder = RunFolder(path)
    try:
        results, receipt = folder.read_report(), folder.read_receipt()
    except (ValueError, KeyError, OSError) as error:
        raise _WrongInput(_one_line(error)) from error
    _summary(path, results, offer=receipt is None)
    if receipt is not None:
        _savings(receipt, folder.compact)
    return 0


def _compact(config: Any) -> int:
    from torch_rsst.recipes.compacting import compact_run
    from torch_rsst.recipes.run_folder import RunFolder

    folder = RunFolder(config.folder)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment] # takes less apart
            receipt = compact_run(config)
    except (*_MISTAKES, RuntimeError) as error:
        raise _WrongInput(_one_line(error)) from error
    _savings(receipt, folder.compact if config.output is None else config.output)
    return 0


def _one_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.errno is not None:  # the system's words, not ours
        text += ". Pass another folder, or check its permissions."
    return " ".join(text.split())


class _StopOnCtrlC:
    """The first Ctrl-C asks the run to stop after its step, the second one stops at once."""

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = signal.SIG_DFL

    def asked(self) -> bool:
        return self._asked

    def __enter__(self) -> None:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


class _Terminal:
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
        self._console = Console(highlight=False, quiet=not _speaks())
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        left = TextColumn("{task.fields[left]}")
        self._progress = Progress(*columns, left, console=self._console, transient=True)
        self._whole = self._progress.add_task("whole run", total=None, left="")
        self._bar = self._progress.add_task("", total=None, left="")
        self._started, self._made, self._to_make = time.monotonic(), 0, 0
        self._epochs = self._epoch = 0
        self._last: dict[str, Any] = {}

    def __enter__(self) -> _Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress.live.is_started:  # else it would print an empty line
            self._progress.stop()

    def plan(self, experiment: Any) -> None:
        """Say what is about to happen."""
        config = self._config
        parameters = sum(p.numel() for p in experiment.model.parameters())
        self._console.print(
            f"{experiment.trainer.name} of {parameters:,} parameters: {experiment.groups}. "
            f"{config.method} over "
            f"{config.rounds} rounds on {experiment.trainer.accelerator.device}; "
            f"everything goes to {config.output}/"
        )
        for note in _notes(config):
            self._console.print(note)
        epochs = config.dense_epochs + config.rounds * config.epochs + config.finetune_epochs
        total = epochs * experiment.trainer.steps_per_epoch
        self._progress.reset(self._whole, total=total, completed=experiment.steps_done)
        self._started, self._to_make = time.monotonic(), total - experiment.steps_done
        self._progress.start()

    def warn(self, text: Warning | str, *where: object) -> None:
        """A warning, without the lines of code that raised it."""
        _warn(text, console=self._console)

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
        # By all the time since the start, so that evaluating and loading count.
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

    def _description(self) -> str:
        accuracy = f", accuracy {self._last['accuracy']:.1f} %" if self._last else ""
        return (
            f"{self._name}: epoch {min(self._epoch + 1, self._epochs)} of {self._epochs}{accuracy}"
        )

    def _end_of_stage(self) -> None:
        if self._last.get("stage") == "dense":
            self._console.print(f"dense: accuracy {self._last['accuracy']:.2f} %")
        self._last = {}


def _warn(text: Warning | str, *where: object, console: Any = None) -> None:
    from rich.console import Console

    console = Console(highlight=False) if console is None else console
    console.print(f"Warning: {text}", style="yellow")


def _round_line(record: dict[str, Any], config: Any) -> str:
    units = ", ".join(
        f"{kind}: {record['share_to_go'][kind]:.0%} to go, {share:.0%} gone so far"
        for kind, share in record["share_gone"].items()
    )
    line = (
        f"round {record['round'] + 1} of {config.rounds}: accuracy {record['accuracy']:.2f} %, "
        f"weights {record['element_sparsity']:.1%} masked, {units}"
    )
    if config.method == "rsst":
        start, end = record["penalized_norm_start"], record["penalized_norm"]
        line += f", λ {record['strength']:.2g}, penalized norm {start:.3g} → {end:.1e}"
    return line


def _print_forecast(found: Any, config: Any) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    console = Console(highlight=False)
    images, held_out = found.images
    console.print(
        f"{found.name} on {found.device}: {images:,} images to train on, {held_out:,} held out, "
        f"{found.classes} classes. Nothing has been trained or written."
    )
    table = Table("layer", "kind", "units", "stay", title="units, by the weights as they are now")
    for layer in found.layers:
        table.add_row(layer.layer or "(model)", layer.kind, f"{layer.units}", f"{layer.stay}")
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
    memory = found.memory
    console.print(
        f"Memory of a process: about {decimal(memory.total)} beside PyTorch and the images: weights and masks {decimal(memory.model)}, "
        f"gradients {decimal(memory.gradients)}, optimizer {decimal(memory.optimizer)}, "
        f"activations of a batch {decimal(memory.activations)}."
    )


def _notes(config: Any) -> list[str]:
    idle = config.without_effect().items()
    return [f"Note: {_flag(name)} has no effect with {why}." for name, why in idle]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _summary(path: Path, results: dict[str, Any], *, offer: bool = True) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results['method']}: {results['seconds']:.0f} s", show_header=False)
    rows = {
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
    console.print(f"Open {path}/report.html; weights, numbers and pictures are beside it.")
    if offer:
        console.print(f"Cut out what is gone: torch-rsst compact {path}", soft_wrap=True)


def _savings(receipt: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    images = receipt["images"]
    rows: dict[str, tuple[Any, Callable[[Any], str]]] = {
        "accuracy": (receipt["accuracy"], "{:.2f} %".format),
        **{kind: (counts, "{:,}".format) for kind, counts in receipt["units"].items()},
        "parameters": (receipt["parameters"], "{:,}".format),
        "multiply-adds per image": (
            receipt["multiply_adds"],
            lambda count: f"{count // images:,}",
        ),
        f"time for {images} images": (receipt["latency_ms"], "{:.2f} ms".format),
    }
    table = Table("", "before", "after", title="compacted")
    for name, (values, text) in rows.items():
        table.add_row(name, text(values["before"]), text(values["after"]))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"Outputs for {images} held-out images differ by at most {receipt['max_error']:.1e}. "
        f"Times are medians of runs in turns, without masks."
    )
    console.print(f'Load it: torch_rsst.load_compact("{folder}")', soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
