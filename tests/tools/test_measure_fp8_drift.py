"""tools/measure_fp8_drift.py on the stand-in for Transformer Engine."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from asd_megatron.errors import UserError
from tests.examples.scripts import script
from tests.models.tiny import tiny_qwen3
from tests.te_double import stand_in

TOOL = Path(__file__).parents[2] / "tools" / "measure_fp8_drift.py"


def test_table(tmp_path: Path) -> None:
    folder = tiny_qwen3(tmp_path / "model", hidden_size=32, intermediate_size=64, head_dim=16)
    lines = [
        {"prompt": f"w{i} w3", "teacher_prompt": f"w{i + 2} w9 w{i} w3", "response": f"w{i + 5} w{i} w7 w{2 * i} w1"}
        for i in range(1, 9)
    ]
    texts, figures = tmp_path / "texts.jsonl", tmp_path / "drift.json"
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, str(TOOL), str(folder), str(texts), "--ends", "1", "2", "--json", str(figures)]
    with stand_in():
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["tokens"] == 40 and found["mean_abs_u"] > 0
    rows = found["rows"]
    assert list(rows) == ["bf16", "current", "blockwise", "blockwise, first and last 1 bf16"]
    drifts = [rows[name]["pmi"] for name in ("bf16", "blockwise, first and last 1 bf16", "blockwise")]
    assert 0 < drifts[0] < drifts[1] < drifts[2]
    assert all(f"| {name} | {row['student']:.3f} |" in done.stdout for name, row in rows.items())
    assert "precision.bf16_first_layers" in done.stderr  # two at either end leave none of four

    prose = list(script("smollm2/make_drift_texts.py").of_prose())
    assert len(prose) == 4 and all(text["teacher_prompt"].endswith(text["prompt"]) for text in prose)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "w1"}\n', "texts.jsonl:1: give the strings prompt, teacher_prompt"),
        ('{"prompt": "", "teacher_prompt": "w1", "response": "w2"}\n', "texts.jsonl:1: .*a token each"),
        ('\n{"prompt": "w1"\n', "texts.jsonl: not JSON"),
        ("[1]\n", "texts.jsonl"),
        ("\n", "has no texts"),
        (None, "cannot read .*texts.jsonl"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    folder, texts = tiny_qwen3(tmp_path / "model"), tmp_path / "texts.jsonl"
    if content is not None:
        texts.write_text(content)
    with pytest.raises(UserError, match=message):
        runpy.run_path(str(TOOL))["read_texts"](texts, folder)


def test_a_table_without_a_row_is_an_error(tmp_path: Path) -> None:
    folder, texts = tiny_qwen3(tmp_path / "model"), tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "w1", "teacher_prompt": "w2 w1", "response": "w3"}\n')
    for options, message in ((["--ends", "-1"], "--ends"), ([], "no format could be measured")):
        command = [sys.executable, str(TOOL), str(folder), str(texts), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
