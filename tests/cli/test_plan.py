"""`asd-megatron plan`: the report of a recipe, its JSON, its exit status; what a start compares with the GPU."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.cli.main import main
from asd_megatron.config import Recipe, load_recipe
from asd_megatron.config.recipe import SCHEMAS
from asd_megatron.config.refusals import dotted_keys
from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError
from asd_megatron.planner import reasons, report, shortage
from asd_megatron.planner.hardware import GIB
from asd_megatron.run import planning
from asd_megatron.run.planning import memory_notes, model_config

PAPER = Path(__file__).parents[2] / "examples" / "paper"
KEY = re.compile(r"\b(?:batching|model|optimizer|parallelism|rollout|sampling)\.[a-z_]+")
FILES = [str(PAPER / "table5.yaml"), str(PAPER / "qwen3_8b.yaml"), str(PAPER / "conditions" / "antisd.yaml")]


def planned(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    path = folder / "plan.json"
    status = main(["plan", *FILES, "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


def test_a_recipe_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = planned(tmp_path, "--gpus", "8", "--proposals", "2")
    text = capsys.readouterr().out
    assert status == 0 and found["fits"] and text.splitlines()[-1].startswith("fits:")
    assert "tensor 4 x data 2" in text
    update = found["memory"][0]["phases"]["update"]
    on_device = sum(item["bytes"] for item in update["items"] if item["where"] == "device")
    assert update["device_bytes"] == pytest.approx(on_device)

    first = found["proposals"][0]
    assert first["time"]["seconds"] <= found["time"]["seconds"]
    keys = [word for key, value in first["layout"].items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    again = planned(tmp_path, "--gpus", "8", "--proposals", "0", "--rollout.server_devices", "[]", *keys)[1]
    assert again["fits"]
    assert again["layout"] == first["layout"]
    assert again["time"]["seconds"] == pytest.approx(first["time"]["seconds"])


def test_a_recipe_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = ("--parallelism.tensor", "1", "--parallelism.sequence_parallel", "false")
    status, found = planned(tmp_path, "--gpus", "8", "--proposals", "0", *flat)
    assert status == 1 and not found["fits"]
    assert "model.recompute full" in found["lacking"][0]
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "3"], "--gpus 8"),
        (["--gpu", "h10"], "h100"),
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "1000000000"], "--gpus 1000000000: expected a number above 0, at most 65,536"),
        (["--response-tokens", "nan"], "--response-tokens nan"),
        (["--response-tokens", "40000"], "sampling.max_response_tokens 30720"),
        (["--prompt-tokens", "inf"], "--prompt-tokens inf"),
        (["--price", "-1"], "--price -1"),
        (["--price", "nan"], "--price nan"),
        (["--proposals", "-1"], "--proposals -1"),
        (["--json", "."], "name a file, such as plan.json"),
        (["--model.path", "models/Qwen9"], "Qwen3-8B"),
        (["--parallelism.tensro", "2"], "parallelism.tensor"),
        (["--parallelism.tensor", "5", "--gpus", "40"], "5"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *FILES, "--proposals", "0", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_experts_and_running_servers(capsys: pytest.CaptureFixture[str]) -> None:
    """On 24 GPUs a running server has a node, and the trainer complete groups of its experts."""
    moe = str(PAPER.parent / "gpu" / "qwen3_moe_math.yaml")
    assert main(["plan", moe, "--nodes", "3", "--proposals", "0"]) == 0
    assert "16 GPUs: tensor 2 x data 8 x expert 8" in capsys.readouterr().out


def test_a_start_compares_with_the_gpu() -> None:
    """Qwen3-8B at tensor 4 x data 2: weights, gradients and optimizer take 22.9 GiB."""
    recipe = load_recipe(FILES[0], FILES[1:])
    config = model_config(recipe)
    layout = Layout(tensor=4, data=2, sequence_parallel=True)

    def notes(gib: float | None, of: Recipe = recipe) -> list[str]:
        return memory_notes(of, layout, config, None if gib is None else gib * GIB)

    assert notes(None) == []
    assert notes(79.6) == []
    (note,) = notes(24.0)
    assert "model.recompute" in note
    with pytest.raises(UserError, match=r"22\.9 GiB.*parallelism\.tensor"):
        notes(22.0)


def test_keys_that_a_plan_names_are_the_recipes() -> None:
    keys = dotted_keys(SCHEMAS["train"])
    named = set()
    for module in (planning, reasons, report, shortage):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named.update(KEY.findall(node.value))
    assert len(named) > 15
    assert {name for name in named if name not in keys} == set()
