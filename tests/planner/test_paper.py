"""The recipes of `examples/paper`: Table 5 exactly, every combination valid, and the plans that its README prints."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from asd_megatron.config import Recipe, load_recipe
from asd_megatron.planner.hardware import GIB, accelerator
from asd_megatron.planner.report import Plan, sizes
from asd_megatron.run.planning import Expected, plan_recipe

PAPER = Path(__file__).parents[2] / "examples" / "paper"
BASE = PAPER / "table5.yaml"
CONDITIONS = sorted((PAPER / "conditions").glob("*.yaml"))
ABLATIONS = sorted((PAPER / "ablations").glob("*.yaml"))
LAYOUTS = {  # model's file, further files of its layout -> GPUs
    ("qwen3_8b.yaml",): 8,
    ("qwen3_4b_instruct.yaml",): 8,
    ("olmo3_7b_instruct.yaml",): 8,
    ("olmo3_7b_think.yaml",): 8,
    ("qwen3_30b_a3b.yaml",): 8,
    ("qwen3_30b_a3b.yaml", "qwen3_30b_a3b_four_nodes.yaml"): 32,
}


def recipe(layout: tuple[str, ...], *others: Path) -> Recipe:
    return load_recipe(BASE, [*(str(PAPER / name) for name in layout), *map(str, others)])


def planned(layout: tuple[str, ...]) -> Plan:
    condition = PAPER / "conditions" / "antisd.yaml"
    return plan_recipe(recipe(layout, condition), accelerator("h100"), LAYOUTS[layout], Expected(), proposals=0)


def test_every_file_is_in_a_combination() -> None:
    named = {name for layout in LAYOUTS for name in layout}
    assert named == {path.name for path in PAPER.glob("*.yaml")} - {BASE.name}


@pytest.mark.parametrize(
    ("layout", "condition"), list(product(LAYOUTS, CONDITIONS)), ids=lambda v: getattr(v, "stem", "")
)
def test_table_5(layout: tuple[str, ...], condition: Path) -> None:
    found = recipe(layout, condition)
    assert found.algorithm.name == condition.stem
    assert (found.run.steps, found.optimizer.learning_rate) == (200, 1e-6)
    s, a = found.sampling, found.algorithm
    assert (s.problems_per_step, s.rollouts_per_problem, s.temperature, s.top_p) == (32, 8, 1.0, 1.0)
    assert s.max_prompt_tokens + s.max_response_tokens == 32768
    assert (a.clip_low, a.clip_high, a.kl_coefficient, a.updates_per_batch) == (0.2, 0.2, 0.0, 1)
    assert not found.rollout.overlap  # on-policy
    assert (found.evaluation.samples, found.evaluation.temperature, found.evaluation.top_p) == (32, 0.7, 0.95)
    if condition.stem == "antisd":
        assert (a.lambda_max, found.gate_warmup_steps, found.gate.tau_down, found.gate.tau_up) == (0.5, 5, 0.93, 1.0)


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_changes_antisd_in_one_place(ablation: Path) -> None:
    antisd = PAPER / "conditions" / "antisd.yaml"
    base = recipe(("qwen3_8b.yaml",), antisd).model_dump()
    changed = recipe(("qwen3_8b.yaml",), antisd, ablation).model_dump()
    differing = {(s, k) for s in base for k in base[s] or {} if base[s][k] != changed[s][k]} - {("run", "name")}
    assert len(differing) == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "+".join(layout))
def test_the_plan_of_the_readme(layout: tuple[str, ...]) -> None:
    """It fits, and the README's row is what the planner says now."""
    plan = planned(layout)
    assert plan.fits, plan.lacking
    assert row_of(layout, plan) in (PAPER / "README.md").read_text().splitlines()


def row_of(layout: tuple[str, ...], plan: Plan) -> str:
    peak, serving = plan.fullest.peak(), plan.setting.serving
    cells = (
        " ".join(f"`{name}`" for name in layout),
        f"{plan.setting.gpus}",
        sizes(plan.setting),
        f"{serving.servers} x tensor {serving.tensor_parallel}" + ", colocated" * serving.colocated,
        f"{peak.bytes() / GIB:.0f}, {peak.name}",
        f"{plan.time.total:.0f}",
        f"{plan.time.seconds('rollout') / plan.time.total:.0%}",
    )
    return f"| {' | '.join(cells)} |"
