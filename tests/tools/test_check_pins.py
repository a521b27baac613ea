"""`tools/check_pins.py`: the pins of this environment are complete, and what is wrong with others is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "check_pins.py"


@pytest.fixture
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("check_pins", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pins_are_complete(tool: Any) -> None:
    assert tool.main() == 0


def test_faults_are_named(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    pins = tmp_path / "constraints.txt"
    pins.write_text("numpy>=1\ntorch==2.*\nNumPy==2\nnumpy==2.0\nwhat is this\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["numpy>=1.26", "jinja2>=3.1"]\noptional-dependencies.x = []\n'
    )
    assert tool.main() == 1
    found = capsys.readouterr().err
    for line in (
        "1: 'numpy>=1' is no exact",
        "2: 'torch==2.*' is no exact",
        "4: numpy is pinned in line 3",
        "5: 'what",
    ):
        assert f"constraints.txt:{line}" in found
    pins.write_text("numpy==1.0\nmarkupsafe==99\n")
    assert tool.main() == 1
    found = capsys.readouterr().err
    for line in (
        "pyproject.toml asks for numpy>=1.26, and constraints.txt pins 1.0",
        "pyproject.toml: jinja2 has no pin",
        "jinja2 3",
        "markupsafe is installed as 3",
    ):
        assert line in found


def test_the_libraries_of_a_build_of_pytorch_need_no_pins(tool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's build for Linux brings CUDA's, in versions that it names itself."""
    known = {"torch": ["nvidia-nccl-cu13==2.29.7", "cuda-toolkit==13.0.3", "sympy>=1.13"], "sympy": []}

    class Found:
        version = "1.0"

        def __init__(self, name: str) -> None:
            self.requires = known.get(name, [])

    monkeypatch.setattr(tool.metadata, "distribution", Found)
    monkeypatch.setattr(tool, "declared", lambda: [tool.Requirement("torch>=2.7")])
    assert tool.installed() == {"torch": "1.0", "sympy": "1.0"}
