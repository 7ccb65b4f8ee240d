"""The report as a page to read: ``report.html`` in the run's folder."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from torch_rsst.penalty.penalty_arguments import Penalty
from torch_rsst.recipes.advice import lever_text
from torch_rsst.recipes.config import RunConfig
from torch_rsst.recipes.run_folder import RunFolder
from torch_rsst.recipes.training_text import extras_text
from torch_rsst.utils.files import write_text

_CAPTIONS = {
    "accuracy_and_sparsity": "Accuracy over epochs; shares that are masked and gone after each round.",
    "heads": "Each head's share of weights that are alive.",
    "neurons": "Each neuron's share of weights that are alive.",
    "channels": "Each channel's share of weights that are alive.",
    "mask": "The mask of one layer: alive weights are dark. Units are framed where they are few, red "
    "where they are gone.",
    "strength": "The strength of the penalty, which starts anew in every round. It acts on what is left to shrink.",
}


def write_page(
    folder: RunFolder,
    config: RunConfig,
    results: dict[str, Any],
    records: list[dict[str, Any]],
    receipt: dict[str, Any] | None = None,
) -> None:
    """Render the results with the pictures that the folder holds.

    Args:
        folder: the folder of the run.
        config: the options of the run.
        results: as in ``report.json``.
        records: as in ``metrics.jsonl``.
        receipt: the receipt of the compacted model, if there is one.
    """
    environment = Environment(
        loader=PackageLoader("torch_rsst.recipes", "."), autoescape=True, undefined=StrictUndefined
    )
    paths = [(folder.pictures / f"{name}.png", caption) for name, caption in _CAPTIONS.items()]
    page = environment.get_template("report.html.jinja").render(
        results=results,
        config=config,
        extras=extras_text(config, results.get("plan")),
        soft=config.method == "rsst",
        lever=lever_text(shrinks_to=Penalty(**config.penalty).shrink_to is not None),
        last_round=[record for record in records if record["event"] == "round"][-1],
        pictures=[(_data(path), caption) for path, caption in paths if path.is_file()],
        receipt=receipt,
        percent=lambda share: f"{share:.1%}",
    )
    write_text(folder.page, page)


def _data(picture: Path) -> str:
    """A picture as an address that holds it: the page needs no other file."""
    return f"data:image/png;base64,{b64encode(picture.read_bytes()).decode()}"
