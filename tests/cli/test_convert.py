"""`asd-megatron convert` and the two scripts under tools/: from a folder to a checkpoint, back, and compared."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from asd_megatron.cli.main import main
from tests.models.tiny import tiny_olmo3, tiny_qwen3, tiny_qwen3_moe

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def _convert(*arguments: str | Path) -> int:
    return main(["convert", *map(str, arguments)])


def test_the_scripts_convert_there_and_back(tmp_path: Path) -> None:
    folder = tiny_qwen3(tmp_path / "hf")
    for tool, *arguments in (
        ("convert_hf_to_megatron.py", folder, tmp_path / "out"),
        ("convert_megatron_to_hf.py", tmp_path / "out", tmp_path / "back", "--model", folder, "--shard-gb", "1e-5"),
    ):
        command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "GB in" in done.stdout and not done.stderr, done.stderr
    parts = [load_file(path) for path in (tmp_path / "back").glob("*.safetensors")]
    found, want = {k: v for part in parts for k, v in part.items()}, load_file(folder / "model.safetensors")
    assert len(parts) > 1 and found.keys() == want.keys() and all(torch.equal(found[k], want[k]) for k in want)


@pytest.mark.parametrize("make", [tiny_qwen3_moe, tiny_olmo3])
def test_verify_compares_tensors_and_logits(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "hf")
    assert _convert("hf-to-megatron", folder, tmp_path / "out") == 0
    capsys.readouterr()
    assert _convert("verify", tmp_path / "out", folder) == 0
    text = capsys.readouterr().out
    count = len(load_file(folder / "model.safetensors"))
    assert f"tensors: {count} of {count} equal" in text and text.count("largest difference of a logit") == 4
    assert "passed: " in text

    changed = tmp_path / "changed"
    changed.mkdir()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 5] += 0.5
    tensors["lm_head.weight"][7] += 0.25
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    (changed / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert _convert("verify", tmp_path / "out", changed, "--prompts", "2") == 1
    text = capsys.readouterr().out
    assert f"tensors: {count - 2} of {count} equal" in text and "FAILED" in text
    assert "  model.layers.2.self_attn.o_proj.weight differs by up to 0.5\n  lm_head.weight differs by up to" in text
    assert _convert("verify", folder, changed, "--prompts", "0") == 1
    assert _convert("verify", folder, changed, "--prompts", "1", "--tolerance", "100") == 0


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_qwen3(tmp_path / "hf")
    _convert("hf-to-megatron", folder, tmp_path / "out", "--dtype", "bfloat16")
    capsys.readouterr()
    assert _convert("inspect", tmp_path / "out", "--json", tmp_path / "found.json") == 0
    found, text = json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out
    numbers = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert found["parameters"] == numbers and found["precision of the weights"] == "bfloat16"
    assert found["layers"] == "4, stacked" and found["tensor parallelism of the writer"] == 1
    line = next(t for t in found["tensors"] if t["name"] == "decoder.layers.mlp.linear_fc1.weight")
    assert line["shape"] == [4, 96, 32] and line["cuts"] == [4, 1, 1] and line["bytes"] == 2 * 4 * 96 * 32
    assert "decoder.layers.mlp.linear_fc1.weight" in text and "[4, 96, 32]  cut 4 x 1 x 1" in text
    assert _convert("inspect", folder) == 0
    text = capsys.readouterr().out
    assert re.search(r"\nfamily +qwen3\n", text) and f"{numbers:,}" in text and "float32 (47)" in text


def test_the_model_is_that_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_qwen3(tmp_path / "hf")
    _convert("hf-to-megatron", folder, tmp_path / "out")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = (tmp_path / "out" / "release").rename(run / "checkpoints" / "step_000002")
    capsys.readouterr()
    for recipe, message in (
        (None, "does not say which model it is of: give the Hugging Face folder with --model"),
        ("model: {}", "does not say which model"),
        (f"model: {{path: {tmp_path / 'absent'}}}", "which is no folder"),
    ):
        if recipe is not None:
            (run / "recipe.yaml").write_text(recipe)
        assert _convert("megatron-to-hf", checkpoint, tmp_path / "back") == 2
        assert message in capsys.readouterr().err
    (run / "recipe.yaml").write_text(f"model: {{path: {folder}}}")
    assert _convert("megatron-to-hf", checkpoint, tmp_path / "back") == 0
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    capsys.readouterr()
    assert _convert("megatron-to-hf", checkpoint, tmp_path / "back") == 2
    assert "exists already" in capsys.readouterr().err


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_qwen3(tmp_path / "hf")
    for arguments, message in (
        (("megatron-to-hf", folder, tmp_path / "out"), "is a Hugging Face model folder, not a checkpoint"),
        (("megatron-to-hf", folder, tmp_path / "out", "--shard-gb", "nan"), "--shard-gb is nan"),
        (("inspect", tmp_path / "absent"), "is no folder"),
        (("inspect", folder, "--json", folder), "cannot be written"),
        (("verify", folder, folder, "--tolerance", "nan"), "must not be negative"),
    ):
        assert _convert(*arguments) == 2
        assert message in capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(b"12345678")
    assert _convert("hf-to-megatron", folder, tmp_path / "out") == 2
    assert "not a readable safetensors file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
