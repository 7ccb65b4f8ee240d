"""``torch-rsst``: arguments in, exit codes out."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

from torch_rsst._version import __version__
from torch_rsst.cli.terminal import (
    Terminal,
    flag,
    notes,
    print_forecast,
    print_savings,
    print_summary,
    print_warning,
    speaks,
)
from torch_rsst.utils.errors import message, refuse

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
    words = " ".join(re.sub(r"[─-╿]+", " ", text).split())
    words = words.replace("Invalid choice invalid choice", "Invalid choice")  # said twice
    return words.removeprefix("Parsing error ").removeprefix("Unrecognized options ")


def _check_only_resumes(config: Any) -> None:
    beside = [name for name in ("config", "dry_run", "write_config") if getattr(config, name)]
    if beside:
        expected, remedy = (
            "nothing else to do",
            "A resumed run keeps its own options: leave it away.",
        )
        got = ", ".join(map(flag, beside))
        refuse(ValueError, "--resume", expected, got, remedy)


def _write_config(config: Any) -> int:
    from torch_rsst.utils.files import write_text

    try:
        config.check()
        if config.write_config.exists():
            remedy = "Pass another name."
            refuse(FileExistsError, str(config.write_config), "a new file", "an old one", remedy)
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
            warnings.showwarning = print_warning  # type: ignore[assignment] # takes less apart
            found = forecast(config)
    except _MISTAKES as error:
        raise _WrongInput(_one_line(error)) from error
    if speaks():
        print_forecast(found, config)
        for note in notes(config):
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
        with stop, warnings.catch_warnings(), Terminal(config) as terminal:
            warnings.showwarning = terminal.warn  # type: ignore[assignment] # takes less apart
            try:
                experiment = Experiment(config, terminal, stop.asked)
            except _MISTAKES as error:
                raise _WrongInput(_one_line(error)) from error
            terminal.plan(experiment)
            results = experiment.run()
    except Interrupted:
        if speaks():
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
    if speaks():
        print_summary(config.output, results)
    return 0


def _report(path: Path) -> int:
    from torch_rsst.recipes.run_folder import RunFolder

    folder = RunFolder(path)
    try:
        results, receipt = folder.read_report(), folder.read_receipt()
    except (ValueError, KeyError, OSError) as error:
        raise _WrongInput(_one_line(error)) from error
    print_summary(path, results, offer=receipt is None)
    if receipt is not None:
        print_savings(receipt, folder.compact)
    return 0


def _compact(config: Any) -> int:
    from torch_rsst.recipes.compacting import compact_run
    from torch_rsst.recipes.run_folder import RunFolder

    folder = RunFolder(config.folder)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning  # type: ignore[assignment] # takes less apart
            receipt = compact_run(config)
    except (*_MISTAKES, RuntimeError) as error:
        raise _WrongInput(_one_line(error)) from error
    print_savings(receipt, folder.compact if config.output is None else config.output)
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


if __name__ == "__main__":
    sys.exit(main())
