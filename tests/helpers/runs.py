"""Runs of the command line inside the tests: their exit codes, weights and interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torch_rsst.cli.main import main

# A ViT of timm with 12 heads, for images of two patches by two.
TINY = ["--model", "test_vit", "--image-size", "32", "--device", "cpu", "--workers", "0"]
QUICK = [
    "--dense-epochs", "1", "--epochs", "1", "--rounds", "1", "--finetune-epochs", "1",
    "--batch-size", "8", "--warmup-epochs", "0", "--learning-rate", "0.001", "--strength", "1",
    "--method", "rsst", "--mode", "decoupled", "--schedule", "linear",
]  # fmt: skip


def exit_code(*args: object) -> Any:
    try:
        return main([str(arg) for arg in args])
    except SystemExit as error:  # how argument parsers leave
        return error.code


@contextmanager
def settings_restored() -> Iterator[None]:
    """Put back what a run sets for its whole process: Accelerate's state, deterministic operations."""
    from accelerate.state import AcceleratorState, GradientState

    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    """Whether two runs ended with the same bits."""
    one, two = tensors(first), tensors(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def interrupted(args: list[Any], after: int, monkeypatch: Any) -> int:
    """The exit code of a run that is asked to stop after some steps, as by Ctrl-C."""
    from torch_rsst.cli import main as cli
    from torch_rsst.cli import terminal

    made = 0
    step: Callable[..., None] = terminal.Terminal.step

    def count(self: Any) -> None:
        nonlocal made
        made += 1
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(terminal.Terminal, "step", count)
        patch.setattr(cli._StopOnCtrlC, "asked", lambda self: made >= after)
        return exit_code("run", *args)
