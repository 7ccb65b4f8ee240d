"""The documentation names tests that exist."""

from __future__ import annotations

import ast
import re
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


@pytest.mark.needs_timm
def test_every_option_is_documented() -> None:
    from dataclasses import fields

    from torch_rsst.recipes.config import CompactConfig, RunConfig

    page = (ROOT / "docs/command_line.md").read_text()
    named = set(re.findall(r"^\| `--([\w-]+)` \|", page, re.MULTILINE))
    options = {f.name for config in (RunConfig, CompactConfig) for f in fields(config)} - {"folder"}
    assert named == {name.replace("_", "-") for name in options}
