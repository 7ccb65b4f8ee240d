"""Sphinx configuration. Builds without network access; warnings are errors in CI."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from torch_rsst import __version__
from torch_rsst.recipes import config, data_options, pruning_options, training_options

sys.path.append(str(Path(__file__).parent))
import registry_tables

project = "torch-rsst"
copyright = "the torch-rsst authors"
author = "the torch-rsst authors"
release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery"]

# Pages

myst_enable_extensions = ["colon_fence", "deflist", "substitution"]
# What is registered in the package: {{ schedules }} on a line of its own becomes the table.
myst_substitutions = {
    "schedules": registry_tables.schedules(),
    "importances": registry_tables.importances(),
    "head_attributes": registry_tables.head_attributes(),
    "pruning_options": registry_tables.options(pruning_options.PruningOptions),
    "data_options": registry_tables.options(data_options.DataOptions),
    "training_options": registry_tables.options(training_options.TrainingOptions),
    "run_options": registry_tables.options(config.RunConfig),
    "compact_options": registry_tables.options(config.CompactConfig),
}
myst_heading_anchors = 3

# API pages

autoclass_content = "class"
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# Every cross-reference must resolve, except to what is documented elsewhere (no inventory is
# downloaded): PyTorch, the standard library, hypothesis, matplotlib; and to private names.
nitpicky = True
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|nn|dist|prune|collections|numbers|fractions|types|typing|pathlib|hypothesis|st"
        r"|contextlib|copy"
        r"|matplotlib)\..*",
    ),
    (r"py:class", r"Tensor|Masks|torch_rsst\.[\w.]+\.(T|Index|_\w+)"),
    # Packages that have no page.
    (r"py:class", r"torch_rsst\.(selection|distributed|utils)\..*"),
    (r"py:class", r"torch_rsst\.(rounds|penalty)\.(\w+_arguments|optimizer_rewind)\..*"),
    (r"py:class", r"torch_rsst\.groups\.groups\.Whole"),
    (
        r"py:class",
        r"torch_rsst\.discovery\.(channels|probe|adapter|head_parts)\..*|dict\[~typing.*",
    ),
    (r"py:mod", r"torch_rsst(\.importance\.registry)?"),
]

# Doctests: pages and docstrings

doctest_global_setup = """
import os, tempfile
import torch, torch_rsst
os.chdir(tempfile.mkdtemp())  # examples write files
torch.manual_seed(0)
"""

# Gallery: the scripts run when the pages are built (not with -D plot_gallery=0)

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "within_subsection_order": "gallery_order.key",
    "image_scrapers": ("gallery_order.unmanaged_figures", "matplotlib"),
    "capture_repr": ("_repr_html_",),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "remove_config_comments": True,
}

# HTML

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"torch-rsst {release}"
html_show_sphinx = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def escape_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let docstrings write |w| for an absolute value: reStructuredText would substitute it."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(``.*?``)", line)
            lines[i] = "".join(p if p.startswith("``") else p.replace("|", r"\|") for p in parts)


def setup(app: Any) -> None:
    """Connect what Sphinx has no setting for."""
    app.connect("autodoc-process-docstring", escape_bars)
