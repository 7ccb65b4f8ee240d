"""Tables of the documentation that are made when it is built, from what is registered in the package."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from torch_rsst.discovery import head_attributes as head_names
from torch_rsst.importance import ALIASES as OTHER_IMPORTANCES
from torch_rsst.importance import IMPORTANCES, data_parts
from torch_rsst.schedules import ALIASES as OTHER_SCHEDULES
from torch_rsst.schedules import SCHEDULES, Schedule


def schedules() -> str:
    """Every schedule: its names, its formula and some of its values."""
    times = (0.25, 0.5, 0.75, 1.0)
    head = ["name", "also called", "λ(t)", *(f"s = 1, t = {t:g}" for t in times)]
    rows = []
    for name, constructor in SCHEDULES.items():
        schedule = constructor(1.0)
        values = [f"{schedule(t):.3f}" for t in times]
        short = formula(schedule).replace("strength", "s")
        rows.append([f"`{name}`", _also(name, OTHER_SCHEDULES), short, *values])
    return _table(head, rows)


def formula(schedule: Schedule) -> str:
    """What the docstring of a schedule's class says after ``λ(t) =``, with the numbers of its fields.

    >>> formula(Polynomial(2, 0.5))
    'strength · t^2'
    """
    text = _first_sentence(schedule).removeprefix("λ(t) = ").partition(":")[0].removesuffix(".")
    for field in fields(schedule) if hasattr(schedule, "__dataclass_fields__") else ():
        if field.name != "strength":
            text = re.sub(rf"\b{field.name}\b", f"{getattr(schedule, field.name):g}", text)
    return re.sub(r"\^1\b", "", text)


def importances() -> str:
    """Every importance: its names, its score and the arguments that it needs."""
    rows = []
    for name, importance in IMPORTANCES.items():
        parts = list(data_parts(importance))
        needs = ["`batches`"] * bool(parts) + ["`loss_fn`"] * any(p.needs_gradient for p in parts)
        also = _also(name, OTHER_IMPORTANCES)
        rows.append([f"`{name}`", also, _first_sentence(importance), ", ".join(needs)])
    return _table(["importance", "also called", "score of a unit", "needs"], rows)


def head_attributes() -> str:
    """The attributes by which an attention's heads are counted, and what becomes of them."""
    rows = [
        ("the number of heads, or of query heads", head_names.HEADS, "set to what is left"),
        ("the number of key/value heads", head_names.KEY_VALUE_HEADS, "set to what is left"),
        ("the width of all heads together", head_names.TOTAL_WIDTHS, "set to what is left"),
        ("the width of one head", head_names.HEAD_WIDTHS, "stays"),
    ]
    cells = [(what, ", ".join(f"`{n}`" for n in names), then) for what, names, then in rows]
    return _table(["what it holds", "attributes", "when heads are cut"], cells)


def options(*configs: type) -> str:
    """Every option of the command line that the classes hold themselves."""
    from sphinx.pycode import ModuleAnalyzer

    rows = []
    for config in configs:
        help_of = ModuleAnalyzer.for_module(config.__module__).find_attr_docs()
        for field in fields(config):
            if (config.__name__, field.name) in help_of and field.name != "folder":
                text = " ".join(help_of[config.__name__, field.name]).strip().removesuffix(".")
                rows.append([f"`--{field.name.replace('_', '-')}`", _shown(field.default), text])
    return _table(["option", "default", "meaning"], rows)


def _shown(default: Any) -> str:
    if default is None or default is False:
        return ""
    return f"`{' '.join(default) if isinstance(default, tuple) else default}`"


def _also(name: str, aliases: dict[str, str]) -> str:
    return ", ".join(f"`{alias}`" for alias, meant in aliases.items() if meant == name)


def _first_sentence(thing: object) -> str:
    """Of the docstring of a function, or of the class of an object."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
