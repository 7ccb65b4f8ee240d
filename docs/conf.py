"""Sphinx configuration. Builds without network access; warnings are errors in CI."""

from __future__ import annotations

import re
from typing import Any

from torch_rsst import __version__

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
]
exclude_patterns = ["_build"]

# Pages

myst_enable_extensions = ["colon_fence", "deflist"]
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
    (r"py:class", r"Tensor|Masks|torch_rsst\.[\w.]+\.(T|_\w+)"),
    (r"py:class", r"torch_rsst\.masked_parameter\._Masked"),
    # Rooms that have no page: what they give is in the docstrings.
    (r"py:class", r"torch_rsst\.(candidates|digit_search|order_keys|shards|workers)\..*|Fused"),
    (
        r"py:class",
        r"torch_rsst\.discovery\.(channels|probe|adapter|head_parts)\..*|dict\[~typing.*",
    ),
    (r"py:mod", r"torch_rsst"),
]

# Doctests: pages and docstrings

doctest_global_setup = """
import os, tempfile
import torch, torch_rsst
os.chdir(tempfile.mkdtemp())  # examples write files
torch.manual_seed(0)
"""

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
