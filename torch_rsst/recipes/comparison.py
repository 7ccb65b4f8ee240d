"""Several finished runs side by side: accuracy against size and against measured time."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from torch_rsst import plot
from torch_rsst.recipes.run_folder import RunFolder
from torch_rsst.utils.errors import refuse
from torch_rsst.utils.files import write_text

PAGE = "comparison.html"


@dataclass(frozen=True)
class Result:
    """What one run came to.

    Attributes:
        name: of its folder.
        method: rsst or refill.
        model: what was trained.
        dense_accuracy: in percent, before pruning.
        accuracy: of the final model, in percent.
        parameters: of the dense and of the smaller model; None where ``torch-rsst compact`` was not run.
        latency_ms: of the same two, measured in turns.
    """

    name: str
    method: str
    model: str
    dense_accuracy: float
    accuracy: float
    parameters: tuple[int, int] | None = None
    latency_ms: tuple[float, float] | None = None

    @property
    def size(self) -> float | None:
        """Parameters, as a share of the dense model's."""
        return None if self.parameters is None else self.parameters[1] / self.parameters[0]

    @property
    def time(self) -> float | None:
        """Time for a pass, as a share of the dense model's."""
        return None if self.latency_ms is None else self.latency_ms[1] / self.latency_ms[0]


def read(folder: Path, name: str) -> Result:
    """The result of a finished run.

    Raises:
        FileNotFoundError, ValueError: where the folder holds none.
    """
    run = RunFolder(folder)
    results, receipt = run.read_report(), run.read_receipt()
    pairs = {}
    if receipt is not None:
        for key in ("parameters", "latency_ms"):
            pairs[key] = (receipt[key]["before"], receipt[key]["after"])
    return Result(
        name,
        results["method"],
        results["model"],
        results["dense_accuracy"],
        results["accuracy"],
        **pairs,
    )


def compare(folders: Sequence[Path], output: Path) -> list[Result]:
    """Write ``comparison.html`` into a folder: a table and a picture, in one file.

    Args:
        folders: of finished runs.
        output: made where it is not there; an older page in it is replaced.

    Returns:
        the results, those with the highest accuracy first.

    Raises:
        FileNotFoundError, ValueError: where one is no finished run, or stands there twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        got = " ".join(map(str, folders))
        refuse(ValueError, "report", "each run once", got, "Name each folder once.")
    unique = len({folder.name for folder in folders}) == len(folders)
    found = [read(folder, folder.name if unique else str(folder)) for folder in folders]
    found.sort(key=lambda result: -result.accuracy)
    environment = Environment(
        loader=PackageLoader("torch_rsst.recipes", "."), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("comparison.html.jinja").render(
        results=found, picture=_picture(found), percent=lambda share: f"{share:.1%}"
    )
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / PAGE, page)
    return found


def _picture(results: Sequence[Result]) -> str | None:
    """As an address that holds it; None where no run has a smaller model."""
    points = {
        each.name: (each.accuracy, each.size, each.time)
        for each in results
        if each.size is not None and each.time is not None
    }
    if not points:
        return None
    dense = max(result.dense_accuracy for result in results)
    written = io.BytesIO()
    plot.comparison(points, dense=dense).savefig(written, format="png", dpi=150)
    return f"data:image/png;base64,{b64encode(written.getvalue()).decode()}"
