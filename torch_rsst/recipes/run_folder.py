"""The output folder of a run: its files, each of which is written whole or not at all."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save
from torch import nn

from torch_rsst.masking.checkpoints import prepare_from_state_dict
from torch_rsst.recipes.config import RunConfig
from torch_rsst.saving.builders import build_model
from torch_rsst.saving.description import read_description
from torch_rsst.utils.errors import listing, message, refuse
from torch_rsst.utils.files import check_links, write_atomically, write_text

_NUMBERS = (
    "dense_accuracy",
    "accuracy_before_cut",
    "accuracy_after_cut",
    "accuracy",
    "element_sparsity",
    "parameters",
    "multiply_adds",
    "seconds",
)
RESULTS = (
    "method", "model", "build", "input_size", "classes", "accuracy_first_zero", "sparsity", *_NUMBERS,
)  # fmt: skip
"""What ``report.json`` holds at least."""

RECEIPT = ("accuracy", "images", "latency_ms", "max_error", "multiply_adds", "parameters", "units")
"""What the receipt of a run's smaller model holds at least."""


@dataclass(frozen=True)
class _Inside:
    """A path in the folder of a run."""

    name: str

    def __get__(self, folder: RunFolder, owner: type[RunFolder]) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run."""

    path: Path

    config = _Inside("config.yaml")
    """The options."""
    metrics = _Inside("metrics.jsonl")
    """A JSON line per epoch and per round."""
    weights = _Inside("model.safetensors")
    """Final weights and masks."""
    report = _Inside("report.json")
    """The results."""
    page = _Inside("report.html")
    """The results as a page to read."""
    pictures = _Inside("pictures")
    """The folder of pictures."""
    compact = _Inside("compact")
    """The folder of the smaller model."""
    log = _Inside("log")
    """The folder of TensorBoard's files."""
    checkpoint = _Inside("checkpoint.pt")
    """Where an unfinished run continues."""
    teacher = _Inside("teacher.safetensors")
    """The dense model of an unfinished run that distils from it."""
    _lock_file = _Inside(".lock")

    def open(self, config: RunConfig) -> None:
        """Claim the folder for a run, new or resumed.

        Raises:
            FileExistsError: for a folder that holds something, without ``resume``.
            FileNotFoundError: for ``resume`` where there is no run.
            NotADirectoryError: where the path is a file.
            ValueError: for ``resume`` with other options.
        """
        if config.resume:
            self.check_same(config)
        elif self.path.is_symlink() or self.path.exists():
            self._check_empty()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            remedy = "Wait for it to end, or pass --output with a new folder."
            got = "one that another process is writing to"
            raise FileExistsError(
                message(str(self.path), expected="a free folder", got=got, remedy=remedy)
            ) from None
        try:
            for torn in self.path.glob(".*.tmp"):
                torn.unlink()
            if not config.resume:
                self._check_empty()  # again: another process may have been faster
                write_text(self.config, config.to_yaml())
        except BaseException:
            self.close()
            raise

    def withdraw(self) -> None:
        """Delete what a run has written that failed before its first record."""
        self.config.unlink(missing_ok=True)
        shutil.rmtree(self.log, ignore_errors=True)

    def close(self) -> None:
        """Unlock the folder for other processes."""
        # The file is deleted while it is still locked: later, another process may have locked it.
        # (Windows does not delete locked files; there it stays.)
        with suppress(OSError):
            self._lock_file.unlink()
        self._lock.release()

    @cached_property
    def _lock(self) -> FileLock:
        return FileLock(self._lock_file)

    def _check_empty(self) -> None:
        if not self.path.is_dir():
            got = "a file or a broken link"
            remedy = "Pass --output with a new folder."
            refuse(NotADirectoryError, str(self.path), "a folder", got, remedy)
        if any(not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise FileExistsError(self._occupied())

    def read_config(self) -> RunConfig:
        """The options of the run that the folder holds.

        Raises:
            FileNotFoundError: where it holds none.
            ValueError: where they cannot be read, or where the folder links to another place.
        """
        if not self.config.is_file():
            remedy = "Check the folder's name."
            refuse(
                FileNotFoundError, str(self.path), "the folder of a run", "no config.yaml", remedy
            )
        check_links(self.path)
        return RunConfig.from_yaml(self.config.read_text(errors="replace"), self.config)

    def _occupied(self) -> str:
        if not self.config.is_file():
            held, remedy = "other files", "Pass --output with a new folder."
        elif self.report.is_file():
            held = "a finished run"
            remedy = (
                f"Pass --output with a new folder, or look at it: torch-rsst report {self.path}"
            )
        else:
            held = "an unfinished run"
            remedy = "Pass --resume to continue it, or --output with a new folder."
        return message(str(self.path), expected="a new or empty folder", got=held, remedy=remedy)

    def check_same(self, config: RunConfig) -> None:
        """Raise unless a resumed run has the options of the one that the folder holds.

        Raises:
            FileNotFoundError, ValueError: where it has not, or there is none.
        """
        if differing := self.read_config().differences(config):
            refuse(
                ValueError,
                f"--resume of {self.path}",
                ", ".join(f"{key}={mine!r}" for key, (mine, _) in differing.items()),
                ", ".join(f"{key}={theirs!r}" for key, (_, theirs) in differing.items()),
                "Leave these options away: a resumed run keeps its own.",
            )

    def write_metrics(self, records: Iterable[dict[str, Any]]) -> None:
        """Write the metrics anew, with all records."""
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in records))

    def write_report(self, report: dict[str, Any]) -> None:
        """Write the results."""
        write_text(self.report, json.dumps(report, indent=2) + "\n")

    def read_report(self) -> dict[str, Any]:
        """The results.

        Raises:
            FileNotFoundError: where the run has not finished.
            ValueError: where they cannot be read.
        """
        self.read_config()
        if not self.report.is_file():
            remedy = f"Finish it: torch-rsst run --resume --output {self.path}"
            refuse(FileNotFoundError, str(self.path), "a finished run", "no report.json", remedy)
        try:
            results: Any = json.loads(self.report.read_text())
        except ValueError as error:
            raise _damaged(self.report, "JSON", str(error)) from error
        _check_held(results, RESULTS, self.report)
        wrong = [key for key in _NUMBERS if not isinstance(results[key], (int, float))]
        if wrong or not isinstance(results["sparsity"], dict) or "kinds" not in results["sparsity"]:
            raise _damaged(
                self.report, "the results of a run", f"none in {listing(wrong or ['sparsity'])}"
            )
        return dict(results)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of all epochs and rounds.

        Raises:
            OSError, ValueError: where they cannot be read.
        """
        try:
            lines = self.metrics.read_text().splitlines()
            records = [dict(json.loads(line)) for line in lines]
        except (TypeError, ValueError) as error:
            raise _damaged(self.metrics, "JSON lines", str(error)) from error
        for record in records:
            _check_held(record, ("event", "accuracy"), self.metrics)
        return records

    def read_model(self, build: object) -> nn.Module:
        """The model of the run with its masks, in eval mode.

        Args:
            build: how it is built, from the results.

        Raises:
            FileNotFoundError, ValueError: where it cannot be read.
        """
        try:
            model = build_model(build)
        except Exception as error:  # what builders raise
            got = " ".join(str(error).split()).removesuffix(".")
            raise _damaged(self.report, "how to build the model", got) from error
        try:
            tensors = load_file(self.weights)
            prepare_from_state_dict(model, tensors)
            model.load_state_dict(tensors)
        except OSError:
            raise
        except Exception as error:  # of safetensors' own kind, or of many kinds for other tensors
            got = " ".join(str(error).split()).removesuffix(".")
            raise _damaged(self.weights, "the model of this run", got) from error
        return model.eval()

    def read_receipt(self) -> dict[str, Any] | None:
        """What compacting the run has saved; None where it has not been compacted.

        Raises:
            ValueError: where the folder ``compact`` cannot be read.
        """
        if not self.compact.is_dir():
            return None
        receipt = read_description(self.compact).receipt
        _check_held(receipt, RECEIPT, self.compact)
        return receipt

    def write_tensors(self, path: Path, model: nn.Module) -> None:
        """Write parameters and buffers of a model to one of the files."""
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        content = save(tensors, {"format": "pt"})
        write_atomically(path, lambda file: file.write(content))

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Save where to continue."""
        # Through memory: torch.save reports a full disk as some RuntimeError of its own.
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(self.checkpoint, lambda file: file.write(content.getbuffer()))

    def read_checkpoint(self) -> dict[str, Any] | None:
        """Where to continue; None if the run stopped before its first checkpoint.

        Raises whatever a damaged file makes the reader raise; nothing in it is executed.
        """
        if not self.checkpoint.is_file():
            return None
        state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        return state

    def bad_checkpoint(self, error: Exception) -> ValueError:
        """The error for a checkpoint that cannot be read or does not fit."""
        # The first sentence only: PyTorch goes on to recommend weights_only=False, which executes code.
        reason = str(error).partition("\n")[0].partition(". ")[0].removesuffix(".")
        return ValueError(
            message(
                str(self.checkpoint),
                expected="the checkpoint of this run",
                got=f"{type(error).__name__}: {reason}" if reason else type(error).__name__,
                remedy=f"Delete {self.checkpoint.name} to start this run from its beginning.",
            )
        )


def _damaged(path: Path, expected: str, got: str) -> ValueError:
    remedy = "Restore the file or run again."
    return ValueError(message(str(path), expected=expected, got=got, remedy=remedy))


def _check_held(held: Any, keys: Iterable[str], path: Path) -> None:
    if not isinstance(held, dict):
        raise _damaged(path, "a JSON object", type(held).__name__)
    if missing := [key for key in keys if key not in held]:
        raise _damaged(path, f"values for {listing(missing)}", "none")
