"""The model card of a compacted model: ``README.md`` in its folder, for people and model hubs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch_rsst.compaction.cut_record import Stage
from torch_rsst.saving.description import Description
from torch_rsst.saving.info import WHEN, CompactInfo
from torch_rsst.saving.receipt import Receipt

_FRONT = """---
library_name: torch-rsst
{task}tags:
- pruning
- structured-sparsity
---
"""
_MANY = 20  # classes that are listed


def model_card(description: Description) -> str:
    """The text, in Markdown with the metadata that the Hugging Face Hub reads."""
    info = CompactInfo.of(description.info)
    task = "pipeline_tag: image-classification\n" if info.classes and info.mean else ""
    parts = [
        _FRONT.format(task=task) + "\n".join(_head(description)),
        "## Use",
        _use(description, info),
        "## What was removed",
        *_removed(description),
        "## How it was trained",
        info.training or "Not noted.",
        *_metrics(info),
        *_measured(description),
        "## Inputs and outputs",
        "\n".join(f"- {line}" for line in _inputs(info)),
    ]
    return "\n\n".join(parts) + "\n"


def _head(description: Description) -> Iterator[str]:
    build = description.build
    named = build["args"][0] if build and build["args"] else None
    name = named if isinstance(named, str) else description.model_class.rpartition(".")[2]
    yield f"# {_cell(name)}, compacted"
    yield ""
    yield f"A `{description.model_class}` without the units that were pruned: fewer heads, neurons or"
    yield "channels in ordinary layers. Cut and saved with torch_rsst."


def _use(description: Description, info: CompactInfo) -> str:
    dense = "" if description.build else ", model=…"  # the dense model, with any weights
    lines = [
        "import torch_rsst",
        "",
        'folder = "path/to/this/folder"',
        f"model = torch_rsst.load_compact(folder{dense}).eval()",
    ]
    served = ""
    if info.input_size and info.mean and info.std:
        lines[1:1] = ["from PIL import Image"]
        lines += [
            "info = torch_rsst.compact_info(folder)",
            'image = info.transform()(Image.open("image.png"))',
            "probabilities = model(image[None]).softmax(-1)",
        ]
        served = "" if dense else "\n\nOr in a shell: `torch-rsst predict FOLDER image.png`."
    code = "\n".join(lines)
    return f"```python\n{code}\n```{served}"


def _removed(description: Description) -> Iterator[str]:
    receipt = description.receipt
    rows = [
        (kind, *map(_count, counts.values())) for kind, counts in receipt.get("units", {}).items()
    ]
    for key in ("parameters", "multiply_adds"):
        counts = receipt.get(key, {})
        if counts.get("after") is not None:
            cells = [_count(counts[when]) for when in ("before", "after")]
            on = f" (input {_shapes(receipt)})" if key == "multiply_adds" else ""
            rows.append((key.replace("_", "-") + on, *cells))
    yield _table(("", "before", "after"), rows)
    if layers := _layers(description.stages):
        table = _table(("layer", "kind", "before", "after"), layers)
        yield f"<details><summary>Layer by layer</summary>\n\n{table}\n\n</details>"


def _layers(stages: Iterable[Stage]) -> list[tuple[str, ...]]:
    """Name, kind, units before the first and after the last compaction of the layers that were cut."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for layer in (layer for stage in stages for layer in stage["layers"]):
        key, units = (layer["name"] or "(model)", layer["kind"]), layer["units"]
        gone = sum(count * repeat for _, count, repeat in layer["gone"])
        counts[key] = counts.get(key, (units, 0))[0], units - gone
    return [(*key, *map(_count, pair)) for key, pair in counts.items()]


def _metrics(info: CompactInfo) -> Iterator[str]:
    if info.metrics:
        rows = [
            (name, *(f"{values[when]:.2f}" if when in values else "" for when in WHEN))
            for name, values in info.metrics.items()
        ]
        yield "## Metrics"
        yield _table(("", *WHEN), rows)


def _measured(description: Description) -> Iterator[str]:
    receipt, said = description.receipt, []
    times, where = receipt.get("latency_ms", {}), receipt.get("measured_on", {})
    if times.get("after") is not None:
        on = f"a CPU with {where['threads']} thread(s)" if where["device"] == "cpu" else "a GPU"
        before = "" if times["before"] is None else f"{times['before']:.2f} ms before, "
        said.append(
            f"A run on an input of {_shapes(receipt)} took {before}{times['after']:.2f} ms after: medians "
            f"of runs in turns on {on}, with torch {where['torch']}."
        )
    if isinstance(receipt.get("max_error"), float):
        error = receipt["max_error"]
        said.append(f"The outputs differ from those of the masked model by at most {error:.1e}.")
    for name, error in receipt.get("exported", {}).items():
        said.append(f"`{name}` is the same model; its outputs differ by at most {error:.1e}.")
    if said:
        yield "## Measured"
        yield "\n".join(f"- {sentence}" for sentence in said)


def _inputs(info: CompactInfo) -> Iterator[str]:
    if info.input_size:
        yield f"input: {' x '.join(map(str, info.input_size))} (channels, height, width)"
    if info.mean and info.std:
        yield f"normalized: images in [0, 1], mean {_numbers(info.mean)}, std {_numbers(info.std)}"
        crop = f"{info.crop_mode or 'center'} crop, {info.crop_pct or 1.0:.1%} of the resized image"
        yield f"resized: {info.interpolation or 'bicubic'}, {crop}"
    if info.classes:
        more = f" and {len(info.classes) - _MANY} more" if len(info.classes) > _MANY else ""
        named = ", ".join(map(_cell, info.classes[:_MANY]))
        yield f"{len(info.classes)} classes: {named}{more}"
    if not (info.input_size or info.classes):
        yield "Not noted."


def _shapes(receipt: Receipt) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in receipt["measured_on"]["inputs"])


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _cell(text: str) -> str:
    """Text on one line, which closes no cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = [[_cell(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])
