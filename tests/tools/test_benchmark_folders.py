"""tools/benchmark_folders.py on a tiny folder: its figures have their names, and what it exports equals the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.models.tiny import tiny_qwen3

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_folders.py"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, env={**os.environ}, capture_output=True, text=True, timeout=240)


def test_rows(tmp_path: Path) -> None:
    folder, report = tiny_qwen3(tmp_path / "model"), tmp_path / "report.json"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    options = ("--layouts", "pp2", "--repeats", "1", "--json", str(report), "--scratch", str(scratch))
    done = _run("--folder", str(folder), *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert [(row["action"], row["layout"]) for row in found["rows"]] == [
        ("plain read", ""),
        ("plain copy", ""),
        ("load", "pp2"),
        ("export", "pp2"),
    ]
    for row in found["rows"]:
        assert row["seconds"] >= 0 and row["gb_per_second"] >= 0
        assert len(row["ranks"]) == (2 if row["layout"] else 0)
    assert found["bytes"] == (folder / "model.safetensors").stat().st_size and found["files"] == 1
    assert list(scratch.iterdir()) == []


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    done = _run("--folder", str(tmp_path))
    assert done.returncode == 2 and "error: " in done.stderr and "convert the model to safetensors" in done.stderr
