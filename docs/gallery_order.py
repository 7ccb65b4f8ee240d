"""Which order the gallery's pages have, and pictures that pyplot knows nothing of."""

from __future__ import annotations

import weakref
from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

ORDER = (
    "rounds",
    "regrouping",
    "penalty",
    "scores",
    "compact_latency",
    "language_model",
    "lightning",
    "trainer",
    "stock_script",
)
_seen: weakref.WeakSet[Figure] = weakref.WeakSet()


def key(filename: str) -> int:
    """The place of ``plot_NAME.py`` in the gallery."""
    return ORDER.index(filename.removeprefix("plot_").removesuffix(".py"))


def unmanaged_figures(block: Any, variables: dict[str, Any], conf: dict[str, Any]) -> str:
    """Save the figures that a block has bound to names: those of :mod:`torch_rsst.plot` belong to no window."""
    paths = []
    for value in list(variables["example_globals"].values()):
        if not isinstance(value, Figure) or value in _seen:
            continue
        _seen.add(value)
        if value.canvas.manager is None:
            paths.append(next(variables["image_path_iterator"]))
            value.savefig(paths[-1], dpi=110)
    return str(figure_rst(paths, conf["src_dir"]))
