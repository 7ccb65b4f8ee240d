"""The import rule, read from the source: a package imports only from the packages below it.

Data flows one way, model → groups → scores → masks → (penalize | refill) → compact → save and report,
and so do imports. ``torch_rsst`` itself, the public face, stands below recipes and command line, which
use the library as any user does. Modules of one package may import each other, as long as no circle
comes of it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torch_rsst

ROOT = Path(torch_rsst.__file__).parent
# From the top: each imports only from what stands below it.
PACKAGES = [
    "__main__",
    "cli",
    "recipes",
    "integrations",
    "torch_rsst",
    "api",
    "plot",
    "testing",
    "distillation",
    "saving",
    "compaction",
    "rounds",
    "report",
    "stock",
    "penalty",
    "schedules",
    "reconstruction",
    "regrouping",
    "importance",
    "discovery",
    "groups",
    "masking",
    "selection",
    "distributed",
    "utils",
    "_version",
]
HEIGHT = {package: len(PACKAGES) - place for place, package in enumerate(PACKAGES)}
OUTSIDERS = ("timm", "torchvision", "hypothesis", "matplotlib", "accelerate", "rich")
# What the library needs beyond torch, and the only modules that may.
SPECIALISTS = {
    "matplotlib": {"plot"},
    "numpy": {"utils.bool_ops", "plot"},
    "hypothesis": {"testing"},
    "safetensors": {"saving.compact_folder"},
    "timm": {"discovery.timm_families"},
    "transformers": {"discovery.transformers_families"},
    "torchvision": {"discovery.torchvision_families"},
}


def module_name(path: Path) -> str:
    parts = ("torch_rsst", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def package_of(module: str) -> str:
    """The name under which a module stands in the list: its first part below ``torch_rsst``."""
    return module.split(".")[1] if "." in module else module


def imports_of(module: str) -> Iterator[str]:
    """Every module that a module imports, wherever in it and under whatever condition."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def own_imports(module: str) -> set[str]:
    return {name for name in imports_of(module) if name.split(".")[0] == "torch_rsst"} - {module}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_place(module: str) -> None:
    assert package_of(module) in HEIGHT


def test_the_contributors_table_lists_the_packages_in_order() -> None:
    table = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)/` \|", table, re.M)
    assert listed == [package for package in PACKAGES if (ROOT / package).is_dir()]


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_from_lower_packages_only(module: str) -> None:
    package = package_of(module)
    for imported in own_imports(module):
        other = package_of(imported)
        if other != package:
            assert HEIGHT[other] < HEIGHT[package], f"{module} imports {imported}"


def test_no_module_imports_itself_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module not in done:
            for imported in sorted(own_imports(module) & MODULES.keys()):
                visit(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
    assert done == MODULES.keys()


@pytest.mark.parametrize(
    "module", [m for m in MODULES if HEIGHT.get(package_of(m), 99) <= HEIGHT["torch_rsst"]]
)
def test_the_library_needs_torch_alone(module: str) -> None:
    outside = {name.split(".")[0] for name in imports_of(module)} - {"torch", "torch_rsst"}
    foreign = {name for name in outside if name not in sys.stdlib_module_names}
    allowed = {
        name
        for name, places in SPECIALISTS.items()
        if any(f"{module}.".startswith(f"torch_rsst.{place}.") for place in places)
    }
    assert foreign <= allowed


def test_no_public_name_is_that_of_another_module() -> None:
    """Importing a submodule sets it on the package, where it would hide what is imported lazily."""
    for name in torch_rsst.__all__:
        if f"torch_rsst.{name}" in MODULES:
            assert getattr(torch_rsst, name) is sys.modules[f"torch_rsst.{name}"]


def test_the_package_is_imported_without_torch() -> None:
    code = (
        "import sys, torch_rsst; assert 'torch' not in sys.modules; "
        "torch_rsst.RSST; assert 'torch' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m) not in ("cli", "__main__")])
def test_only_the_command_line_prints(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [f for f in calls if isinstance(f, ast.Name) and f.id == "print"]


def test_importing_the_library_imports_torch_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import torch_rsst.api; "
        f"print(sorted({set(OUTSIDERS)} & (set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_testing_is_imported_on_demand() -> None:
    code = (
        "import sys, torch_rsst.api; assert 'hypothesis' not in sys.modules; "
        "torch_rsst.testing.assert_mask_invariants; assert 'hypothesis' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "module", [m for m in MODULES if HEIGHT.get(package_of(m), 99) <= HEIGHT["torch_rsst"]]
)
def test_all_names_exist(module: str) -> None:
    optional = package_of(module) == "plot" or "_families" in module
    imported = None if optional else __import__(module, fromlist=["__all__"])
    names = getattr(imported, "__all__", ())
    assert [name for name in names if not hasattr(imported, name)] == []
    assert len(set(names)) == len(names)
