"""Seconds of a training step over the number of GPUs, for the models of the AntiSD paper, by the planner.

    python tools/plot_plan.py [--gpu h100] [--gpus 8 16 ... 1024] [--overlap] [--png FILE] [--json FILE]

The workload is that of the paper's Table 5: 32 problems x 8 rollouts, at most 32K tokens, one update a step. Of
response lengths the paper says nothing: they are log-normal with median 6,000 and spread 1, as in docs/scaling.md. At
each size the best proposal counts, of any layout and split between trainer and servers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError
from asd_megatron.files import write_json
from asd_megatron.models import published
from asd_megatron.models.families import shape_of
from asd_megatron.observe.drawing import CLASSES, dress, new_figure, save_figure
from asd_megatron.planner.hardware import accelerator
from asd_megatron.planner.scale import ScalePoint, curve
from asd_megatron.planner.setting import Lengths, Serving, Setting, Training, Workload

MODELS = ("Qwen3-8B", "Qwen3-4B-Instruct-2507", "Olmo-3-7B-Instruct", "Olmo-3-7B-Think", "Qwen3-30B-A3B")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PROMPT, DEMONSTRATION = 300, 6000
TABLE_5 = Workload(
    problems=32,
    samples=8,
    prompt=PROMPT,
    responses=Lengths(median=6000, most=32768 - PROMPT, spread=1.0),
    privileged=DEMONSTRATION,
)


def setting(model: str, gpu: str, *, overlap: bool) -> Setting:
    """The paper's workload on a published model; the layout is what the search replaces."""
    config = published.config_of(model)
    if config is None:
        raise UserError(f"no model {model} is known: choose from {', '.join(published.names())}")
    training = Training(Layout(), async_save=True)
    return Setting(shape_of(config)[1], training, Serving(overlap=overlap), TABLE_5, accelerator(gpu))


def table(curves: dict[str, list[ScalePoint]]) -> str:
    """Markdown, a line for each size."""
    lines = [
        "| model | GPUs | step | efficiency | trainer | servers | rollout, its tail | teacher and update | dollars |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, points in curves.items():
        for point in points:
            time, chosen = point.proposal.time, point.proposal.setting
            trained = time.seconds("teacher", "student", "reference", "update", "optimizer")
            cells = (
                model,
                str(point.gpus),
                f"{point.seconds:.0f} s",
                f"{point.efficiency:.2f}",
                trainer(chosen),
                servers(chosen),
                f"{time.rollouts.seconds:.0f} s, {time.rollouts.tail:.0f} s",
                f"{trained:.1f} s",
                f"{time.dollars:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def trainer(chosen: Setting) -> str:
    """`TP 2, DP 16, 16K, mlp`."""
    training, layout = chosen.training, chosen.training.layout
    sizes = {"TP": layout.tensor, "PP": layout.pipeline, "CP": layout.context, "EP": layout.expert, "DP": layout.data}
    parts = [f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "DP"]
    parts.append(f"{training.pack >> 10}K")
    if training.recompute.kind != "none":
        parts.append(training.recompute.kind)
    if training.offload == "host":
        parts.append("optimizer on the host")
    elif training.moments == "bfloat16":
        parts.append("bfloat16 moments")
    return ", ".join(parts)


def servers(chosen: Setting) -> str:
    serving = chosen.serving
    return f"{serving.servers} x {serving.tensor_parallel}{', colocated' if serving.colocated else ''}"


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """`rows` as a figure: seconds a step beside those of linear scaling, and the efficiency."""
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    for color, model in zip(CLASSES, dict.fromkeys(row["model"] for row in found), strict=False):
        own = [row for row in found if row["model"] == model]
        sizes = [row["gpus"] for row in own]
        left.plot(sizes, [row["seconds"] for row in own], "o-", markersize=3, color=color, label=model)
        linear = [own[0]["seconds"] * sizes[0] / size for size in sizes]
        left.plot(sizes, linear, ":", linewidth=0.8, color=color)
        right.plot(sizes, [row["efficiency"] for row in own], "o-", markersize=3, color=color)
    for axis in (left, right):
        dress(axis)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("GPUs", fontsize=8)
        axis.set_xticks(GPUS, [str(size) for size in GPUS])
    left.set_yscale("log")
    left.set_ylabel("seconds a step (dotted: linear)", fontsize=8)
    left.legend(fontsize=7)
    right.set_ylabel("efficiency", fontsize=8)
    right.set_ylim(0)
    save_figure(figure, path)


def rows(curves: dict[str, list[ScalePoint]]) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "gpus": point.gpus,
            "seconds": point.seconds,
            "efficiency": point.efficiency,
            "trainer": trainer(point.proposal.setting),
            "servers": servers(point.proposal.setting),
            "phases": {phase.name: phase.seconds for phase in point.proposal.time.phases},
            "reasons": point.proposal.reasons,
        }
        for model, points in curves.items()
        for point in points
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--overlap", action="store_true", help="generate while the trainer works")
    parser.add_argument("--png", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    curves = {}
    try:
        for model in arguments.models:
            curves[model] = curve(setting(model, arguments.gpu, overlap=arguments.overlap), arguments.gpus)
            print(table({model: curves[model]}), flush=True)
            if curves[model]:
                print("\n".join(curves[model][-1].proposal.reasons), flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    if arguments.png:
        draw(rows(curves), arguments.png)
    if arguments.json:
        write_json(arguments.json, rows(curves))


if __name__ == "__main__":
    main()
