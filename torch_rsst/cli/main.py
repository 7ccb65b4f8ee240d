"""``torch-rsst``: arguments in, exit codes out."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

from torch_rsst._version import __version__
from torch_rsst.cli.terminal import (
    Terminal,
    flag,
    is_main_process,
    notes,
    print_comparison,
    print_forecast,
    print_savings,
    print_summary,
    print_warning,
)
from torch_rsst.utils.errors import message, refuse

if TYPE_CHECKING:
    from torch_rsst.recipes.config import CompactConfig, PredictConfig, ReportConfig, RunConfig

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
        try:
            return _parse(args)()
        finally:
            sys.stdout.flush()  # not at exit, where a closed pipe is an error that nobody catches
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("torch_rsst"):
            raise
        print(_EXTRA.format(missing=error.name), file=sys.stderr)
    except _WrongInput as error:
        print(f"torch-rsst: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # before a run handles it, or the second one
        print("torch-rsst: stopped at once", file=sys.stderr)
        return _INTERRUPTED
    return _WRONG


# What the library raises for wrong input.
_MISTAKES = (TypeError, ValueError, KeyError, OSError)


class _WrongInput(Exception):  # noqa: N818 - a message for the user, not a bug
    """Wrong options, files or data; the text is printed."""


@contextmanager
def _reported(*errors: type[Exception]) -> Iterator[None]:
    """Turn these errors into one line for the user."""
    try:
        yield
    except BrokenPipeError:  # of an output that is closed, not of a file
        raise
    except errors as error:
        raise _WrongInput(_one_line(error)) from error


@contextmanager
def _warnings_to(show: Callable[..., None]) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _parse(args: Sequence[str]) -> Callable[[], int]:
    """The command that the arguments name, ready to be called."""
    from torch_rsst.recipes.config import CompactConfig, PredictConfig, ReportConfig, RunConfig

    with _reported(TypeError, ValueError, OSError):
        config = _read(args, RunConfig())
        if isinstance(config, ReportConfig):
            several = len(config.folders) > 1
            return partial(_compare, config) if several else partial(_report, config.folders[0])
        if isinstance(config, CompactConfig):
            return partial(_compact, config)
        if isinstance(config, PredictConfig):
            return partial(_predict, config)
        if config.resume:
            _check_only_resumes(config)
            from torch_rsst.recipes.run_folder import RunFolder

            # A resumed run keeps its own options; naming another value is an error, found later.
            own = RunFolder(config.output).read_config()
            return partial(_run, _read(args, replace(own, output=config.output, resume=True)))
        if config.config is not None:
            config = _read(args, replace(RunConfig.named(config.config), config=config.config))
        if config.write_config is not None:
            return partial(_write_config, config)
        return partial(_dry_run if config.dry_run else _run, config)


def _read(args: Sequence[str], default: RunConfig) -> Any:
    """The options of the command in the arguments; those of ``run`` start from a default."""
    import tyro

    from torch_rsst.recipes.config import CompactConfig, PredictConfig, ReportConfig, RunConfig

    run = Annotated[RunConfig, tyro.conf.subcommand("run", default=default)]
    report = Annotated[ReportConfig, tyro.conf.subcommand("report")]
    compact = Annotated[CompactConfig, tyro.conf.subcommand("compact")]
    description = "Structured sparsity for vision transformers and CNNs: RSST and Refill."
    predict = Annotated[PredictConfig, tyro.conf.subcommand("predict")]
    commands: Any = run | report | compact | predict
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(commands, prog="torch-rsst", description=description, args=list(args))
    except SystemExit as stop:
        if stop.code:
            raise _WrongInput(_without_frame(printed.getvalue())) from None
        raise


def _without_frame(text: str) -> str:
    """The parser's message in one line, without the box that it draws and with its title once."""
    line = " ".join(re.sub(r"[─-╿]+", " ", text).split())
    line = line.replace("Invalid choice invalid choice", "Invalid choice")
    return line.removeprefix("Parsing error ").removeprefix("Unrecognized options ")


def _check_only_resumes(config: RunConfig) -> None:
    if beside := [name for name in ("config", "dry_run", "write_config") if getattr(config, name)]:
        remedy = "A resumed run keeps its own options: leave it away."
        refuse(ValueError, "--resume", "nothing else to do", ", ".join(map(flag, beside)), remedy)


def _write_config(config: RunConfig) -> int:
    from torch_rsst.utils.files import write_text

    path = config.write_config
    assert path is not None
    with _reported(TypeError, ValueError, OSError):
        config.check()
        if path.exists():
            remedy = "Pass another name."
            refuse(FileExistsError, str(path), "a new file", "an old one", remedy)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, config.to_yaml())
    print(f"Start it with: torch-rsst run --config {path}")
    return 0


def _dry_run(config: RunConfig) -> int:
    from torch_rsst.recipes.dry_run import forecast

    with _reported(*_MISTAKES), _warnings_to(print_warning):
        found = forecast(config)
    if is_main_process():
        print_forecast(found, config)
        for note in notes(config):
            print(note)
    return 0


def _run(config: RunConfig) -> int:
    from torch_rsst.recipes.experiment import Experiment
    from torch_rsst.recipes.images import BadImages
    from torch_rsst.recipes.run_folder import RunFolder
    from torch_rsst.recipes.training import Diverged, Interrupted, StoppedElsewhere

    folder = RunFolder(config.output)
    again = f"torch-rsst run --resume --output {config.output}"
    if config.resume and folder.report.is_file():
        with _reported(*_MISTAKES):
            folder.check_same(config)
        return _report(config.output)
    stop = _StopOnCtrlC()
    try:
        with stop, Terminal(config) as terminal, _warnings_to(terminal.warn):
            with _reported(*_MISTAKES):
                experiment = Experiment(config, terminal, stop.asked)
            terminal.plan(experiment)
            with _reported(Diverged, BadImages):
                results = experiment.run()
    except Interrupted:
        if is_main_process():
            print(f"Stopped. Continue with: {again}", file=sys.stderr)
        return _INTERRUPTED
    except StoppedElsewhere:
        return _WRONG
    except OSError as error:
        remedy = f"Check free space and permissions, then: {again}"
        text = message(str(folder.path), expected="to write there", got=str(error), remedy=remedy)
        raise _WrongInput(text) from error
    if is_main_process():
        print_summary(config.output, results, config)
    return 0


def _report(path: Path) -> int:
    from torch_rsst.recipes.run_folder import RunFolder

    folder = RunFolder(path)
    with _reported(ValueError, KeyError, OSError):
        results, receipt, config = folder.read_report(), folder.read_receipt(), folder.read_config()
    print_summary(path, results, config, offer=receipt is None)
    if receipt is not None:
        print_savings(receipt, folder.compact)
    return 0


def _compare(config: ReportConfig) -> int:
    from torch_rsst.recipes.comparison import PAGE, compare

    output = config.output or config.folders[0].parent
    with _reported(ValueError, KeyError, OSError):
        results = compare(config.folders, output)
    print_comparison(results, output / PAGE)
    return 0


def _compact(config: CompactConfig) -> int:
    from torch_rsst.recipes.compacting import compact_run
    from torch_rsst.recipes.run_folder import RunFolder

    with _reported(*_MISTAKES, RuntimeError), _warnings_to(print_warning):
        receipt = compact_run(config)
    print_savings(receipt, config.output or RunFolder(config.folder).compact)
    return 0


def _predict(config: PredictConfig) -> int:
    from torch_rsst.recipes.predicting import predict

    with _reported(*_MISTAKES, RuntimeError), _warnings_to(print_warning):
        for path, found in predict(config):
            classes = ", ".join(f"{label} {share:.1%}" for label, share in found)
            print(f"{path}: {classes}")
    return 0


def _one_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.errno is not None:  # the message is the system's
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


if __name__ == "__main__":
    sys.exit(main())
