"""The models table: every family in every layout against `transformers`, round trips, bfloat16, and models of the sizes
of published ones. Everything is measured when it is called."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asd_megatron.checks import random_models
from asd_megatron.checks.bfloat16 import random_pairs
from asd_megatron.checks.model_cells import LAYOUTS, Task, layout_of, write_tasks
from asd_megatron.checks.parity import largest
from asd_megatron.checks.ranks import run_module
from asd_megatron.checks.reference import reference
from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError, did_you_mean
from asd_megatron.files import read_json_object

TOLERANCE = 1e-4
"""Of logits, absolute."""
GRADIENT_TOLERANCE = 1e-4
"""Of each gradient, relative to its largest value."""
TIMEOUT_SECONDS = 1800.0  # of all cells of one layout
TRAINED_LENGTHS = (9, 24, 5, 33)
PRETRAINED_LAYOUTS = ("pp2", "cp2", "dp2")
Say = Callable[[str], None]


def check_names(families: Sequence[str], layouts: Sequence[str]) -> None:
    """Raise UserError for names that do not exist."""
    known: tuple[tuple[str, Sequence[str], Sequence[str]], ...] = (
        ("family", families, list(random_models.FAMILIES)),
        ("layout", layouts, list(LAYOUTS)),
    )
    for what, given, names in known:
        for name in given:
            if name not in names:
                hint = did_you_mean(name, names) or f"choose among {', '.join(names)}"
                raise UserError(f"the models table has no {what} {name!r}: {hint}")


def family_cells(families: Sequence[str], layouts: Sequence[str], root: Path, say: Say) -> list[dict[str, Any]]:
    """One cell for each family and layout that it has, in this order."""
    wanted = {family: _layouts_of(family, layouts) for family in families}
    if not any(wanted.values()):
        raise UserError("no cell is left: expert parallelism (ep2, tp2_ep2, ep2_pp2) is of qwen3_moe alone")
    tasks: list[Task] = []
    for family, its_layouts in wanted.items():
        if not its_layouts:
            continue
        say(f"making the random {family} model and running it in transformers")
        folder, rounded = root / family, root / f"{family}.bfloat16"
        random_models.write_family(folder, family)
        random_models.write_bfloat16(rounded, folder)
        ids = random_models.random_sequences(random_models.SIZES["vocab_size"])
        truth = _save_reference(root / f"{family}.pt", folder, ids, gradients=True)
        for name, layout in its_layouts.items():
            tasks.append(Task("parity", f"{family}.{name}", layout, str(folder), str(truth), str(rounded)))
    found = _run(root, tasks, say)
    cells = []
    for task in tasks:
        family, layout_name = task.name.split(".")
        given = {"family": family, "layout": layout_name, "ranks": task.layout.world_size, **found[task.name]}
        cells.append({**given, "passed": _passed(given)})
    return cells


def _layouts_of(family: str, names: Sequence[str]) -> dict[str, Layout]:
    """Those of the named layouts that the family has."""
    experts = "num_experts" in random_models.FAMILIES[family]
    found = {name: layout_of(name, experts=experts) for name in names}
    return {name: layout for name, layout in found.items() if layout is not None}


def drift_rows(families: Sequence[str], root: Path, smollm2: Path | None, say: Say) -> list[dict[str, Any]]:
    """bfloat16 against float32 on the random models that `family_cells` wrote, and on SmolLM2."""
    tasks = []
    for family in families:
        pairs = random_pairs(random_models.SIZES["vocab_size"])
        tasks.append(_drift_task(root, family, "random ids", root / family, pairs))
    if smollm2 is not None:
        from asd_megatron.checks.texts import text_pairs

        vocabulary = read_json_object(smollm2 / "config.json", "name a model folder")["vocab_size"]
        tasks.append(_drift_task(root, "SmolLM2-135M-Instruct", "random ids", smollm2, random_pairs(vocabulary)))
        tasks.append(_drift_task(root, "SmolLM2-135M-Instruct", "text", smollm2, text_pairs(smollm2)))
    found = _run(root, [task for _, _, task in tasks], say)
    return [{"model": model, "data": data, **found[task.name]} for model, data, task in tasks]


def _drift_task(root: Path, model: str, data: str, folder: Path, pairs: Sequence[Any]) -> tuple[str, str, Task]:
    name = f"drift.{model}.{data.replace(' ', '_')}"
    path = root / f"{name}.pt"
    torch.save({"pairs": [tuple(pair) for pair in pairs]}, path)
    return model, data, Task("drift", name, Layout(), str(folder), str(path))


def pretrained_cells(folder: Path, root: Path, say: Say) -> list[dict[str, Any]]:
    """SmolLM2-135M-Instruct on real prompts."""
    from asd_megatron.checks.texts import text_sequences

    say("running SmolLM2-135M-Instruct in transformers")
    rounded = root / "smollm2.bfloat16"
    random_models.write_bfloat16(rounded, folder)
    truth = _save_reference(root / "smollm2.pt", folder, text_sequences(folder), gradients=False)
    tasks = [
        Task("logits", f"smollm2.{name}", LAYOUTS[name], str(folder), str(truth), str(rounded))
        for name in PRETRAINED_LAYOUTS
    ]
    found = _run(root, tasks, say)
    cells = []
    for name, task in zip(PRETRAINED_LAYOUTS, tasks, strict=True):
        given = {"model": "SmolLM2-135M-Instruct", "layout": name, "ranks": 2, **found[task.name]}
        cells.append({**given, "passed": _passed(given)})
    return cells


def trained_cells(root: Path, say: Say) -> list[dict[str, Any]]:
    """Models of the sizes of published ones: import, one optimizer step, export, the export in `transformers`."""
    cells = []
    for number, (model, (family, config)) in enumerate(random_models.SHAPED.items()):
        say(f"making {model} with random weights")
        folder = root / f"shaped{number}"
        random_models.write_shaped(folder, model)
        ids = random_models.random_sequences(config["vocab_size"], TRAINED_LENGTHS)
        before = reference(folder, ids, gradients=False).logits
        truth = root / f"shaped{number}.pt"
        torch.save({"ids": ids}, truth)
        experts = family == "qwen3_moe"
        for name in ("tp2_ep2", "ep2") if experts else ("tp2", "pp2"):
            layout = layout_of(name, experts=experts)
            assert layout is not None
            layout = replace(layout, sequence_parallel=layout.tensor > 1)
            task = Task("train", f"shaped{number}.{name}", layout, str(folder), str(truth))
            measured = _run(root, [task], say)[task.name]
            after = torch.cat([logits[:-1] for logits in reference(root / task.name, ids, gradients=False).logits])
            ours = _gathered(root, task, after)
            cells.append(
                {
                    "model": model,
                    "layout": name,
                    "ranks": layout.world_size,
                    "max_logit_difference": float((ours - after).abs().max()),
                    "max_logit_change": float((after - torch.cat([x[:-1] for x in before])).abs().max()),
                    **measured,
                }
            )
            cells[-1]["passed"] = (
                bool(cells[-1]["max_logit_difference"] <= TOLERANCE < cells[-1]["max_logit_change"])
                and measured["applied"]
            )
            shutil.rmtree(root / task.name)
        shutil.rmtree(folder)
    return cells


def _gathered(root: Path, task: Task, like: Tensor) -> Tensor:
    """The ranks' rows of logits after the step, NaN where no rank has one."""
    ours = torch.full_like(like, torch.nan)
    for rank in range(task.layout.world_size):
        for rows, logits in torch.load(root / f"{task.name}.{rank}.pt"):
            ours[rows] = logits
    return ours


def _save_reference(path: Path, folder: Path, ids: list[Tensor], *, gradients: bool) -> Path:
    found = reference(folder, ids, gradients=gradients)
    torch.save({"ids": ids, "logits": found.logits, "gradients": found.gradients}, path)
    return path


def _run(root: Path, tasks: Sequence[Task], say: Say) -> dict[str, dict[str, Any]]:
    """The results by task name: one torchrun for each layout."""
    for layout in dict.fromkeys(task.layout for task in tasks):
        mine, ranks = [task for task in tasks if task.layout == layout], layout.world_size
        say(f"{len(mine)} cell{'s' if len(mine) > 1 else ''} on {ranks} rank{'s' if ranks > 1 else ''}")
        write_tasks(root / "tasks.json", mine)
        run_module(
            ranks,
            "asd_megatron.checks.models_worker",
            [str(root), str(root / "tasks.json")],
            root / "ranks.log",
            timeout=TIMEOUT_SECONDS,
            what=f"the models table ({', '.join(task.name for task in mine)})",
            say=say,
        )
    return {task.name: read_json_object(root / f"{task.name}.json", "run the command again") for task in tasks}


def _passed(cell: dict[str, Any]) -> bool:
    """None, which was NaN, passes nothing."""
    errors = [(cell["max_logit_difference"], TOLERANCE), (cell.get("max_gradient_error", 0.0), GRADIENT_TOLERANCE)]
    return cell["round_trip_bitwise"] and all(e is not None and e <= limit for e, limit in errors)


def machine() -> dict[str, Any]:
    """What the figures come from."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": names[0] if names else platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "megatron_core": version("megatron-core"),
    }


def measure(
    families: Sequence[str], layouts: Sequence[str], root: Path, *, smollm2: Path | None, say: Say
) -> dict[str, Any]:
    """The report. Without families and layouts everything, else their cells alone."""
    from transformers.utils import logging

    check_names(families, layouts)
    logging.disable_progress_bar()
    everything = not families and not layouts
    families, layouts = families or list(random_models.FAMILIES), layouts or list(LAYOUTS)
    report: dict[str, Any] = {
        "tolerance": TOLERANCE,
        "gradient_tolerance": GRADIENT_TOLERANCE,
        "machine": machine(),
        "cells": family_cells(families, layouts, root, say),
    }
    if everything:
        report["drift"] = drift_rows(families, root, smollm2, say)
        if smollm2 is not None:
            report["pretrained"] = pretrained_cells(smollm2, root, say)
        report["trained"] = trained_cells(root, say)
    return report


def failed(report: dict[str, Any]) -> list[str]:
    """The cells of the report that did not pass."""
    cells = [cell for kind in ("cells", "pretrained", "trained") for cell in report.get(kind, [])]
    return [f"{c.get('family') or c['model']} {c['layout']}" for c in cells if not c["passed"]]


def most_memory(cell: dict[str, Any]) -> float | None:
    """MiB of the rank that used most."""
    known = [mib for mib in cell["peak_memory_mib"] if mib is not None]
    return largest(known) if known else None
