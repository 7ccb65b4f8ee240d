"""Compact models of many families of libraries, and modules written by hand; write the page of supported models.

    python docs/sweep.py                         # everything, into docs/supported_models.md
    python docs/sweep.py --section transformers  # one section of the page; the others stay as they are
    python docs/sweep.py beit swin               # some families, to the terminal

Every model is built with random weights. Half of the units that discovery offers are masked, on weights
and norms moved away from where they begin, and the outputs of the masked model are compared with those
of the compacted one, in float64. Masking makes detectors choose other boxes, so that its effect is measured
on what their backbone and heads put out.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import json
import subprocess
import sys
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests" / part) for part in ("helpers", "discovery")]
LIBRARIES = ("timm", "torchvision", "transformers", "hand-written")
TASKS = ("", ".detection", ".segmentation")  # of torchvision, beside classification
PAGE = HERE / "supported_models.md"
SMALL = (
    "atto",
    "femto",
    "pico",
    "nano",
    "xxs",
    "micro",
    "tiny",
    "xs",
    "mini",
    "small",
    "_s_",
    "18",
)
TOLERANCE = 1e-10
LARGE = 60_000_000  # parameters; such models are built with two blocks if they take a depth
LONGEST = 400  # seconds


@dataclass(frozen=True)
class Row:
    """What became of one model.

    Attributes:
        family: the module file of timm, or the family of torchvision.
        model: the name of the model that was tried.
        units: kind → units found that can be cut.
        effect: the largest difference that masking makes to the outputs, relative to outputs above 1.
        error: the same between the masked and the compacted model; None where nothing was cut.
        parameters: of the dense and of the compacted model.
        reasons: kind → why modules of that kind stay whole.
        failure: what went wrong, "" where nothing did.
    """

    family: str
    model: str
    units: dict[str, int] = field(default_factory=dict)
    effect: float = 0.0
    error: float | None = None
    parameters: tuple[int, int] = (0, 0)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Whether at least one kind was compacted and verified."""
        return self.error is not None and self.error <= TOLERANCE < self.effect / 1000


def families() -> dict[str, str]:
    """Family → the name of a small model of it."""
    return {family: name for library in LIBRARIES for family, name in families_of(library).items()}


def families_of(library: str) -> dict[str, str]:
    """The same for one library; a family is named with its library before it."""
    by_family: dict[str, list[str]] = defaultdict(list)
    if library == "timm":
        import timm
        from timm.models import _registry

        for name in timm.list_models():
            by_family[_registry._model_to_module[name]].append(name)
    elif library == "torchvision":
        from torchvision.models import get_model_builder, list_models

        for task in TASKS:
            for name in list_models(module=importlib.import_module(f"torchvision.models{task}")):
                by_family[get_model_builder(name).__module__.rpartition(".")[2]].append(name)
    elif library == "hand-written":
        return {f"{library}/{_first_word(cls)}": cls.__name__ for cls in _attention_styles()}
    else:
        return {f"{library}/{family}": name for family, (name, *_) in _transformers().items()}
    return {f"{library}/{file}": min(names, key=_size) for file, names in sorted(by_family.items())}


def _transformers() -> dict[str, tuple[str, dict[str, Any], str]]:
    from sweep_transformers import MODELS

    return MODELS


def _attention_styles() -> list[type[nn.Module]]:
    from test_attention_styles import CUT, MASKED

    return [*CUT, *MASKED]


def _first_word(cls: type[nn.Module]) -> str:
    """Whose way of writing attention a module follows."""
    return (cls.__doc__ or "").partition(":")[0]


def _size(name: str) -> tuple[int, int, str]:
    rank = next((i for i, word in enumerate(SMALL) if word in name), len(SMALL))
    return (rank, len(name), name)


def build(family: str, name: str) -> tuple[nn.Module, Any]:
    """A model with random weights, and an input of the size that it is made for, or smaller."""
    library, _, rest = family.partition("/")
    if library == "transformers":
        from sweep_transformers import build as build_tiny

        return build_tiny(rest)
    if library == "hand-written":
        from test_attention_styles import inputs_of, model_of

        return model_of({cls.__name__: cls for cls in _attention_styles()}[name]), (inputs_of(5),)
    torch.manual_seed(0)
    if library == "timm":
        import timm

        model = timm.create_model(name, num_classes=10)
        if sum(p.numel() for p in model.parameters()) > LARGE:
            with contextlib.suppress(TypeError):
                model = timm.create_model(name, num_classes=10, depth=2)
        channels, height, width = model.pretrained_cfg["input_size"]
    else:
        model, is_detector = _torchvision_model(name)
        channels, height, width = 3, 224, 224
        if is_detector:
            return model.double().eval(), ([*torch.randn(2, 3, 96, 96).double()],)
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    smaller = (128, 128) if min(height, width) > 128 else (height, width)
    for sides in (smaller, (height, width)):
        images = torch.randn(2, channels, *sides, generator=generator, dtype=torch.float64)
        try:
            with torch.no_grad():
                model(images)
            return model, images
        except Exception:
            continue
    raise RuntimeError("the model does not run")


def _torchvision_model(name: str) -> tuple[nn.Module, bool]:
    """A model, and whether it finds boxes in lists of images."""
    from torchvision.models import get_model, get_model_builder

    builder = get_model_builder(name)
    options: dict[str, Any] = {"weights": None, "num_classes": 10}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    is_detector = ".detection." in builder.__module__
    if is_detector and not name.startswith("ssd"):  # whose size is fixed
        options |= {"min_size": 96, "max_size": 96}
    return get_model(name, **options), is_detector


def _outputs(model: nn.Module, *args: Any, boxes: bool, **kwargs: Any) -> list[Any]:
    """What a model puts out; of a detector also what its heads do, and that alone without ``boxes``."""
    seen: list[Any] = []
    is_detector = ".detection." in type(model).__module__
    named = dict(model.named_modules()) if is_detector else {}
    handles = [
        named[path].register_forward_hook(lambda _, __, output: seen.append(output))
        for path in ("rpn.head", "head")
        if path in named
    ]
    out = model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen if is_detector and not boxes else [*seen, out]


def try_model(family: str, name: str) -> Row:
    """Find, mask, compact and compare."""
    from contract import difference, randomize

    import torch_rsst
    from torch_rsst.discovery import survey

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    units: dict[str, int] = {}
    reasons: dict[str, list[str]] = {}
    try:
        model, inputs = build(family, name)
        randomize(model)
        model.train()  # clears what attention remembers of its biases
        model.eval()
        # Models of images say what they take; others are not asked to.
        example = None if isinstance(inputs, torch.Tensor) else inputs
        groups, refused = survey(model, example_inputs=example)
        for layer in groups.layers:
            if layer.fixed:
                reasons.setdefault(layer.kind, []).append(layer.fixed)
            else:
                units[layer.kind] = units.get(layer.kind, 0) + layer.units
        for item in refused:
            reasons.setdefault(item.kind, []).append(item.reason)
        reasons = {kind: list(dict.fromkeys(texts)) for kind, texts in reasons.items()}
        if not units:
            return Row(family, name, units, reasons=reasons)
        dense = copy.deepcopy(model)
        torch_rsst.apply_mask(model, torch_rsst.regroup(model, groups, amount=0.5))
        small = torch_rsst.compact(model, groups)
        runs = [partial(_outputs, m) for m in (dense, model, small)]
        effect = difference(*(partial(run, boxes=False) for run in runs[:2]), inputs)
        error = difference(*(partial(run, boxes=True) for run in runs[1:]), inputs)
        counts = tuple(sum(p.numel() for p in m.parameters()) for m in (model, small))
        return Row(family, name, units, effect, error, (counts[0], counts[1]), reasons)
    except Exception as problem:
        text = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
        return Row(family, name, units, reasons=reasons, failure=text)


def page(sections: dict[str, list[str]]) -> str:
    """The documentation page, of the lines of each section."""
    lines = [
        "# Supported models",
        "",
        "One small model of every module file of timm and of every family of torchvision (classification, detection",
        "and segmentation), tiny models of many families of transformers, and attention in eight styles in which",
        "people write it themselves, with random weights. Half of the units that",
        "{func}`torch_rsst.find_groups` offers were masked and cut by {func}`torch_rsst.compact`. *Error* is the largest",
        "difference between the outputs of the masked and the compacted model, in float64, relative to outputs above 1;",
        "*effect* what masking itself changes; of detectors, in what they calculate before they choose boxes. Written by",
        "`python docs/sweep.py`.",
        "",
    ]
    counts = [verified(line) for section in sections.values() for line in section]
    rows = [count for count in counts if count is not None]
    lines += [
        f"{rows.count('right')} of {len(rows)} families have at least one kind of unit compacted and verified; "
        f"{rows.count('wrong')} with a wrong result.",
        "",
    ]
    for library, section in sections.items():
        lines += [f"## {library}", "", *section, ""]
    return "\n".join(lines)


def read_page() -> dict[str, list[str]]:
    """The sections of the page as it is."""
    sections: dict[str, list[str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            sections[line.removeprefix("## ")] = []
        elif sections and line:
            list(sections.values())[-1].append(line)
    return sections


def verified(line: str) -> str | None:
    """What a line of a table says of a family: right, wrong, or nothing cut; None for other lines."""
    cells = [cell.strip() for cell in line.split("|")]
    if len(cells) < 11 or cells[1] in ("family", "---"):
        return None
    effect, error = cells[7], cells[8]
    if not error:
        return "nothing cut"
    return "right" if float(error) <= TOLERANCE < float(effect) / 1000 else "wrong"


def _table(rows: list[Row]) -> list[str]:
    lines = [
        "| family | model | heads | neurons | channels | parameters | effect | error | stays whole |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = [str(row.units.get(kind, "")) for kind in ("heads", "neurons", "channels")]
        before, after = row.parameters
        size, unit = (1e6, "M") if before > 3e5 else (1e3, "k")
        shrunk = f"{before / size:.1f} {unit} → {after / size:.1f} {unit}" if after else ""
        error = "" if row.error is None else f"{row.error:.0e}"
        effect = "" if row.error is None else f"{row.effect:.0e}"
        why = [f"{kind}: {'; '.join(texts[:2])}" for kind, texts in row.reasons.items()]
        why += [row.failure] if row.failure else []
        text = " · ".join(why).replace("|", "/").replace("\n", " ")
        cells = [
            row.family.partition("/")[2],
            f"`{row.model}`",
            *counts,
            shrunk,
            effect,
            error,
            text,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run_alone(family: str, name: str) -> Row:
    """Try a family in a process of its own, which takes its memory with it."""
    command = [sys.executable, __file__, "--one", family, name]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return Row(family, name, failure=f"it took more than {LONGEST} s")
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return Row(family, name, failure=f"the process ended with code {run.returncode}")
    return Row(**json.loads(lines[-1]))


def main(wanted: list[str]) -> None:
    """Sweep all families, those of one library, or those named."""
    if wanted[:1] == ["--one"]:
        print(json.dumps(asdict(try_model(*wanted[1:]))))
        return
    if wanted[:1] == ["--section"]:
        chosen, sections = families_of(wanted[1]), read_page()
    else:
        every, sections = families(), {}
        chosen = {f: n for f, n in every.items() if not wanted or any(word in f for word in wanted)}
    rows = []
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(run_alone, chosen, chosen.values()):
            rows.append(row)
            print(json.dumps(asdict(row)), flush=True)
    if not wanted or wanted[0] == "--section":
        for library in LIBRARIES:
            if own := [row for row in rows if row.family.startswith(f"{library}/")]:
                sections[library] = _table(own)
        PAGE.write_text(page(sections), encoding="utf-8")
    print(f"{sum(row.ok for row in rows)} of {len(rows)} families compacted and verified")


if __name__ == "__main__":
    main(sys.argv[1:])
