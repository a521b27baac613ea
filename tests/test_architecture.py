"""The table of rooms in docs/architecture.md against the imports of the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import asd_megatron

PACKAGE = Path(asd_megatron.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
EVERYTHING = "everything"


def names(cell: str) -> list[str]:
    return re.findall(r"`([a-z_]+)`", cell)


def table() -> tuple[set[str], dict[str, set[str]]]:
    """(ground floor, allowed imports by room) as the page says."""
    rows = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if re.match(r"\| `", line)]
    ground = set(names(rows[0][0]))
    allowed: dict[str, set[str]] = {name: ground for name in ground}
    for room, _, may in rows[1:]:
        for name in names(room):
            allowed[name] = {EVERYTHING} if may.strip() == EVERYTHING else set(names(may)) | ground
    return ground, allowed


def rooms() -> dict[str, list[Path]]:
    """The package's files by room: a folder, or a file at the top."""
    found: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        room = relative.parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, []).append(path)
    return found


def imported_rooms(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "asd_megatron":
            modules |= {f"asd_megatron.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    parts = [m.split(".") for m in modules if m.startswith("asd_megatron.")]
    return {p[1] for p in parts} - {"__version__"}


def test_every_room_is_on_the_page() -> None:
    _, allowed = table()
    assert sorted(set(rooms()) - set(allowed)) == []


@pytest.mark.parametrize("room", sorted(rooms()))
def test_arrows_point_up(room: str) -> None:
    _, allowed = table()
    if EVERYTHING in allowed[room]:
        return
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {target}"
        for path in rooms()[room]
        for target in imported_rooms(path) - allowed[room] - {room}
    }
    assert sorted(wrong) == []
