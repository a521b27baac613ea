"""The module table of docs/architecture.md against the imports of the package."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import asd_megatron

PACKAGE = Path(asd_megatron.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
EVERYTHING = "everything"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The package's own modules that a file imports anywhere: in functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in inner}
    return found & set(FILES)


def top_level(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def names(cell: str) -> list[str]:
    return re.findall(r"`([a-z_]+)`", cell)


def table() -> tuple[set[str], dict[str, set[str]]]:
    """(core types, allowed imports by top-level module) as the page says."""
    rows = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if re.match(r"\| `", line)]
    core = set(names(rows[0][0]))
    allowed: dict[str, set[str]] = {name: core for name in core}
    for module, _, may in rows[1:]:
        for name in names(module):
            allowed[name] = {EVERYTHING} if may.strip() == EVERYTHING else set(names(may)) | core
    return core, allowed


TOP_LEVEL = sorted({top_level(module) for module in FILES} - {""})


def test_every_module_is_on_the_page() -> None:
    _, allowed = table()
    assert sorted(set(TOP_LEVEL) - set(allowed)) == []


@pytest.mark.parametrize("module", TOP_LEVEL)
def test_imports_point_down(module: str) -> None:
    _, allowed = table()
    if EVERYTHING in allowed[module]:
        return
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {target}"
        for name, path in FILES.items()
        if top_level(name) == module
        for target in {top_level(m) for m in imports(path)} - allowed[module] - {module, ""}
    }
    assert sorted(wrong) == []


def test_no_import_is_part_of_a_cycle() -> None:
    try:
        TopologicalSorter({name: imports(path) - {name} for name, path in FILES.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
