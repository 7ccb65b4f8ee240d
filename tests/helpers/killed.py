"""Run code in a process that kills itself, as ``kill -9`` and the kernel do: nothing is cleaned up."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "integrations")]


def run_until_killed(code: str, *arguments: object) -> None:
    """Run code that may import the tests of trainers; it must end by SIGKILL."""
    script = f"import sys; sys.path[:0] = {PATHS}\n{code}"
    if not hasattr(signal, "SIGKILL"):
        pytest.skip("this system cannot kill a process so")
    command = [sys.executable, "-c", script, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == -signal.SIGKILL, ran.stderr[-3000:]
