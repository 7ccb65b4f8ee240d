"""The README promises what the package holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import torch_rsst

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_named_functions_exist():
    names = set(re.findall(r"torch_rsst\.(\w+)\(", README)) | set(
        re.findall(r"prune\.(\w+)", README)
    )
    names.discard("nn")
    assert names
    assert [name for name in names if not hasattr(torch_rsst, name)] == []


def test_documented_units_are_what_is_found():
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    model = timm.create_model("vit_small_patch16_224")
    assert str(torch_rsst.find_groups(model)) in README


def test_ci_runs_the_test_line():
    assert README.count("<!-- test line -->") == 1
    assert "<!-- test line -->" in (ROOT / ".ci" / "run").read_text()


def test_every_public_name_is_on_an_api_page():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    names = [name for name in torch_rsst.__all__ if not name.startswith("__")]
    assert [name for name in names if not re.search(rf"torch_rsst\.{name}\b", pages)] == []
