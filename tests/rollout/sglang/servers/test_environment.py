"""The script that makes SGLang's environment, and its pins."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from asd_megatron.rollout.sglang.servers.versions import OLDEST

FOLDER = Path(__file__).parents[4] / "tools" / "sglang_env"


def pins(variant: str) -> dict[str, str]:
    lines = (FOLDER / f"requirements-{variant}.txt").read_text().splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^=\s]+", line) for line in wanted)
    return dict(line.lower().split("==") for line in wanted)


@pytest.mark.parametrize("arguments", [[], ["tpu"]])
def test_it_says_how_it_is_called(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run([FOLDER / "create.sh", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and "create.sh gpu [FOLDER]" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_both_variants_hold_the_same_server() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    for name in ("sglang", "sglang-router", "transformers", "xgrammar"):
        assert cpu[name] == gpu[name]
    assert tuple(map(int, cpu["sglang"].split("."))) >= OLDEST


def test_the_stand_in_has_the_version_that_the_server_pins() -> None:
    assert f'__version__ = "{pins("gpu")["sglang-kernel"]}"' in (FOLDER / "sgl_kernel.py").read_text()
