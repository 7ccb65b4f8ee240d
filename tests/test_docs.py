"""The documentation names tests that exist."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = sorted(
    set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/trust.md").read_text()))
)


def test_the_page_names_tests() -> None:
    assert len(NAMED) > 30


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_a_named_test_exists(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


TABLES = set(re.findall(r"\{\{ (\w+) \}\}", "".join(p.read_text() for p in ROOT.glob("docs/*.md"))))


@pytest.mark.needs_timm
def test_every_table_is_made_and_stands_on_a_page() -> None:
    """``docs/conf.py`` makes tables of what is registered; a page that names none of them is not built."""
    pytest.importorskip("sphinx")
    made = runpy.run_path(str(ROOT / "docs/conf.py"))["myst_substitutions"]
    assert made.keys() == TABLES
    assert all(table.count("\n") > 2 for table in made.values())


@pytest.mark.needs_timm
def test_every_option_is_documented() -> None:
    pytest.importorskip("sphinx")
    from dataclasses import fields

    from torch_rsst.recipes.config import CompactConfig, RunConfig

    made = runpy.run_path(str(ROOT / "docs/conf.py"))["myst_substitutions"]
    tables = "\n".join(table for name, table in made.items() if name.endswith("_options"))
    named = re.findall(r"^\| `--([\w-]+)` \| .* \| \S.* \|$", tables, re.MULTILINE)
    options = [f.name for config in (RunConfig, CompactConfig) for f in fields(config)]
    options.remove("folder")
    assert sorted(named) == sorted(name.replace("_", "-") for name in options)
