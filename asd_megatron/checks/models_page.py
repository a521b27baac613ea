"""The measured part of docs/models.md, and the same tables for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from asd_megatron.checks.model_cells import LAYOUTS
from asd_megatron.checks.models_table import most_memory
from asd_megatron.errors import UserError
from asd_megatron.files import atomic_write

BEGIN = "<!-- measured: begin (asd-megatron models-table --write) -->"
END = "<!-- measured: end -->"
NAMES = {
    "single": "1 rank",
    "tp2": "TP2",
    "tp2_sp": "TP2 SP",
    "pp2": "PP2",
    "pp2_vpp2": "PP2 VPP2",
    "tp2_pp2": "TP2 PP2",
    "cp2": "CP2",
    "dp2": "DP2",
    "ep2": "EP2",
    "tp2_ep2": "TP2 EP2",
    "ep2_pp2": "EP2 PP2",
}


def number(value: float | None, digits: str = ".0e") -> str:
    return "NaN" if value is None else format(value, digits).replace("e-0", "e-")


def lines(cells: Sequence[dict[str, Any]]) -> str:
    """Cells as text, one line each."""
    out = [f"{'family':10s} {'layout':9s} {'ranks':>5s} {'logits':>8s} {'gradients':>9s} {'MiB':>6s} {'s':>6s}"]
    for c in cells:
        errors = f"{number(c['max_logit_difference'], '.1e'):>8s} {number(c.get('max_gradient_error'), '.1e'):>9s}"
        verdict = "ok" if c["passed"] else "FAILED"
        verdict += "" if c["round_trip_bitwise"] else ": the round trip is not bitwise"
        used = f"{_memory(c):>6s} {c['seconds']:6.1f}"
        out.append(f"{c['family']:10s} {c['layout']:9s} {c['ranks']:5d} {errors} {used}  {verdict}")
    return "\n".join(out)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in body)


def _by_layout(cells: Sequence[dict[str, Any]], text: Any) -> str:
    """A row for each layout, a column for each family; `text(cell)`."""
    families = list(dict.fromkeys(c["family"] for c in cells))
    found = {(c["family"], c["layout"]): text(c) for c in cells}
    rows = [
        [NAMES[layout], *(found.get((family, layout), "") for family in families)]
        for layout in LAYOUTS
        if any((family, layout) in found for family in families)
    ]
    return _table(["layout", *families], rows)


def _errors(cell: dict[str, Any]) -> str:
    text = f"{number(cell['max_logit_difference'])} / {number(cell['max_gradient_error'])}"
    return text if cell["passed"] else f"**{text} FAILED**"


def _memory(cell: dict[str, Any]) -> str:
    most = most_memory(cell)
    return "?" if most is None else f"{most:,.0f}"


def _sections(report: dict[str, Any]) -> Iterator[str]:
    cells, machine = report["cells"], report["machine"]
    good = sum(c["round_trip_bitwise"] for c in cells)
    yield "## Measured: every family in every layout"
    yield (
        f"Measured on {machine['cores']} cores ({machine['cpu']}; device: {machine['device']}) with torch"
        f" {machine['torch']}, transformers {machine['transformers']}, megatron-core {machine['megatron_core']}."
    )
    yield (
        "Largest absolute difference of a logit / largest error of a gradient (of each tensor relative to its largest"
        f" value), against `transformers` in float32. {sum(c['passed'] for c in cells)} of {len(cells)} cells pass:"
        f" both at most {number(report['tolerance'])}. Folder to Megatron to folder is the same bits, in float32 and in"
        f" bfloat16, in {good} of {len(cells)}. With experts, tensor parallelism has sequence parallelism beside it."
    )
    yield _by_layout(cells, _errors)
    yield (
        "Peak memory of a cell, MiB of the rank with most beside what it had before (the weights of these models are"
        " 40 to 90 MiB; most is logits, gradients and the comparison):"
    )
    yield _by_layout(cells, _memory)
    if "pretrained" in report:
        yield "## Measured: pretrained weights"
        yield "Logits on real prompts with their responses, against `transformers` in float32."
        yield _table(
            ["model", "layout", "tokens", "logits", "round trips", "MiB a rank", "seconds"],
            [
                [
                    c["model"],
                    NAMES[c["layout"]],
                    f"{c['compared_tokens']:,}",
                    number(c["max_logit_difference"], ".1e"),
                    "bitwise" if c["round_trip_bitwise"] else "**differ**",
                    _memory(c),
                    f"{c['seconds']:.0f}",
                ]
                for c in report["pretrained"]
            ],
        )
    if "trained" in report:
        yield "## Measured: sizes of published models"
        yield (
            "Import, one step of the distributed optimizer, export, and the exported folder in `transformers`: the"
            " largest difference of a logit between the trained model and its export, and the largest change that the"
            " step made. Random float32 weights, all sizes but those named are the published ones."
        )
        yield _table(
            ["model", "layout", "logits", "changed by", "MiB a rank", "seconds"],
            [
                [
                    c["model"],
                    NAMES[c["layout"]],
                    number(c["max_logit_difference"], ".1e") + ("" if c["passed"] else " **FAILED**"),
                    number(c["max_logit_change"], ".2f"),
                    _memory(c),
                    f"{c['seconds']:.0f}",
                ]
                for c in report["trained"]
            ],
        )
    if "drift" in report:
        yield "## Measured: bfloat16"
        yield (
            "Weights and arithmetic in bfloat16 against float32, in the trainer's scoring pass: the student's log-prob"
            " s, the teacher's t, and u = t - s of each response token, in nats. Mean (99% quantile) of the absolute"
            " change, and the mean absolute value of u for scale."
        )
        drifts = [[_moved(row[name]) for name in "stu"] for row in report["drift"]]
        yield _table(
            ["model", "data", "tokens", "s", "t", "u", "mean of abs u"],
            [
                [row["model"], row["data"], str(row["tokens"]), *moved, number(row["u"]["mean_abs"], ".2f")]
                for row, moved in zip(report["drift"], drifts, strict=True)
            ],
        )
    if "folders" in report:
        yield from _folders(report["folders"])


def _moved(found: dict[str, float]) -> str:
    return f"{number(found['mean_abs_drift'], '.4f')} ({number(found['p99_abs_drift'], '.3f')})"


def _folders(folders: dict[str, Any]) -> Iterator[str]:
    machine = folders["machine"]
    yield "## Measured: import and export"
    state = "dropped from the page cache before each figure" if folders["cold"] else "in the page cache"
    yield (
        f"`tools/benchmark_folders.py` on {folders['bytes'] / 1e9:.2f} GB of random {folders['model']} weights in"
        f" bfloat16, {folders['files']} files, {state}, next to plain reads and copies of the same files; a copy and an"
        f" export end when their files are on the disk. {machine['cores']} cores ({machine['cpu']}), one thread a rank;"
        f" other processes used {100 * machine['others']:.0f}% of the cores. Memory: the most beside a rank's own"
        " weights."
    )
    rows = []
    for row in folders["rows"]:
        ranks = row["ranks"]
        shard = " + ".join(f"{r['shard_mib']:,.0f}" for r in ranks)
        beside = " + ".join(f"{r['anonymous_mib']:,.0f}" for r in ranks)
        layout = NAMES.get({"tp1": "single"}.get(row["layout"], row["layout"]), "")
        rows.append([row["action"], layout, f"{row['seconds']:.2f}", f"{row['gb_per_second']:.2f}", shard, beside])
    yield _table(["action", "layout", "seconds", "GB/s", "weights of the ranks, MiB", "memory beside them, MiB"], rows)


def measured(report: dict[str, Any]) -> str:
    """The measured part of the page."""
    return "\n\n".join(map(_wrapped, _sections(report)))


def _wrapped(section: str) -> str:
    return section if section.startswith(("|", "#")) else textwrap.fill(section, 120, break_on_hyphens=False)


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Replace the measured part of the page. Raises UserError when the file has no place for it."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path} has no lines `{BEGIN}` and `{END}`, between which the figures go: add them")
    atomic_write(path, f"{before}{BEGIN}\n\n{measured(report)}\n\n{END}{after}")
