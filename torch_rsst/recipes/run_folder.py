"""The output folder of a run: what it holds, and writes that a crash cannot tear."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from torch_rsst.errors import listing, message
from torch_rsst.recipes.config import RunConfig


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The options."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """A JSON line per epoch and per round."""
        return self.path / "metrics.jsonl"

    @property
    def weights(self) -> Path:
        """Final weights and masks."""
        return self.path / "model.safetensors"

    @property
    def report(self) -> Path:
        """The results."""
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        """The results for people."""
        return self.path / "report.html"

    @property
    def pictures(self) -> Path:
        """The folder of pictures."""
        return self.path / "pictures"

    @property
    def checkpoint(self) -> Path:
        """Where an unfinished run continues."""
        return self.path / "checkpoint.pt"

    def open(self, config: RunConfig) -> None:
        """Claim the folder for a run, new or resumed.

        Raises:
            FileExistsError: for a folder that holds something, without ``resume``.
            FileNotFoundError: for ``resume`` where there is no run.
            NotADirectoryError: where the path is a file.
            ValueError: for ``resume`` with other options.
        """
        if config.resume:
            self._check_same(config)
            return
        if self.path.exists() and not self.path.is_dir():
            remedy = "Pass --output with a new folder."
            raise NotADirectoryError(
                message(str(self.path), expected="a folder", got="a file", remedy=remedy)
            )
        if self.path.exists() and any(self.path.iterdir()):
            raise FileExistsError(self._occupied())
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, config.to_yaml())

    def read_config(self) -> RunConfig:
        """The options of the run that the folder holds.

        Raises:
            FileNotFoundError: where it holds none.
            ValueError: where they cannot be read.
        """
        if not self.config.is_file():
            remedy = "Check the folder's name."
            raise FileNotFoundError(
                message(
                    str(self.path),
                    expected="the folder of a run",
                    got="no config.yaml",
                    remedy=remedy,
                )
            )
        return RunConfig.from_yaml(self.config.read_text(), self.config)

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

    def _check_same(self, config: RunConfig) -> None:
        if differing := self.read_config().differences(config):
            raise ValueError(
                message(
                    f"--resume of {self.path}",
                    expected=", ".join(f"{key}={mine!r}" for key, (mine, _) in differing.items()),
                    got=", ".join(f"{key}={theirs!r}" for key, (_, theirs) in differing.items()),
                    remedy="Leave these options away: a resumed run keeps its own.",
                )
            )

    def write_metrics(self, records: Iterable[dict[str, Any]]) -> None:
        """Replace the metrics by these records."""
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
        if not self.report.is_file():
            remedy = f"Finish it: torch-rsst run --resume --output {self.path}"
            raise FileNotFoundError(
                message(
                    str(self.path), expected="a finished run", got="no report.json", remedy=remedy
                )
            )
        try:
            results: dict[str, Any] = json.loads(self.report.read_text())
        except ValueError as error:
            remedy = "Restore the file or run again."
            raise ValueError(
                message(str(self.report), expected="JSON", got=str(error), remedy=remedy)
            ) from error
        return results

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Save where to continue."""
        write_atomically(self.checkpoint, lambda file: torch.save(state, file))

    def read_checkpoint(self) -> dict[str, Any] | None:
        """Where to continue; None if the run stopped before its first checkpoint.

        Raises:
            ValueError: for a file that is no checkpoint. Nothing in it is executed.
        """
        if not self.checkpoint.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(
                self.checkpoint, map_location="cpu", weights_only=True
            )
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            reason = str(error).partition("\n")[0]
            got = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
            remedy = "Delete it to start this run from its beginning."
            raise ValueError(
                message(str(self.checkpoint), expected="a checkpoint", got=got, remedy=remedy)
            ) from error
        wanted = {"stage", "step", "model", "optimizer"}
        if not isinstance(state, dict) or (missing := wanted - state.keys()):
            got = (
                f"no {listing(sorted(missing))}"
                if isinstance(state, dict)
                else type(state).__name__
            )
            remedy = "Delete it to start this run from its beginning."
            raise ValueError(
                message(str(self.checkpoint), expected="a checkpoint", got=got, remedy=remedy)
            )
        return state


def write_text(path: Path, text: str) -> None:
    """Replace a file's text, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside the file, then move: a reader or a crash sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
