"""The start-up report: what runs, on which devices, which package supplies each part, and the passes of a step."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import asd_megatron
from asd_megatron.antisd.divergence import Condition
from asd_megatron.antisd.perplexity import RATIO_LIMITS, PerplexityRule
from asd_megatron.errors import plural
from asd_megatron.files import write_json

# import name -> (name shown, distributions that may carry the version)
_PACKAGES = {
    "megatron.core": ("megatron-core", ("megatron-core",)),
    "transformer_engine": ("transformer-engine", ("transformer-engine", "transformer-engine-torch")),
    "apex": ("apex", ("apex",)),
    "transformers": ("transformers", ("transformers",)),
    "triton": ("triton", ("triton",)),
}
HEAD = "asd_megatron (vocabulary-parallel log-prob and entropy, chunked over tokens, PyTorch)"


def _version(module: str, distributions: Sequence[str]) -> str | None:
    """The version of an importable package without importing it; None if it is absent."""
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except ModuleNotFoundError:
        return None
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "present"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Versions and devices of this process's machine, JSON-ready. `transformer-engine` and `apex` are null when absent.

    Keys: `versions` {name: version or None}, `devices` [names with memory], `platform`, `cores`, `threads`.
    """
    versions: dict[str, str | None] = {
        "asd_megatron": asd_megatron.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    versions |= {shown: _version(module, names) for module, (shown, names) in _PACKAGES.items()}
    if torch.cuda.is_available():
        versions["cuda"] = torch.version.cuda
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        devices = [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus]
    else:
        devices = [f"CPU, {_processor()}"]
    return {
        "versions": versions,
        "devices": devices,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


# ---------------------------------------------------------------- who supplies what


def _supplier(kind: type) -> str:
    """What the class itself states as its `supplier`; else the package that implements it: its own, or that of a base
    class which it wraps (Megatron wraps Transformer Engine's classes)."""
    stated = vars(kind).get("supplier")
    if stated is not None:
        return str(stated)
    roots = [base.__module__.split(".")[0] for base in kind.__mro__]
    for package in ("transformer_engine", "apex"):
        if package in roots:
            shown, names = _PACKAGES[package]
            return f"{shown} {_version(package, names) or ''}".strip()
    if roots[0] == "megatron":
        return f"megatron-core {_version('megatron.core', ('megatron-core',)) or ''}".strip()
    return f"torch {torch.__version__}" if roots[0] == "torch" else roots[0]


def _named(kinds: Iterable[type]) -> str:
    """`supplier (Class, Class)`, one part a supplier."""
    by_supplier: dict[str, list[str]] = {}
    for kind in sorted(set(kinds), key=lambda k: k.__name__):
        by_supplier.setdefault(_supplier(kind), []).append(kind.__name__)
    return "; ".join(f"{supplier} ({', '.join(names)})" for supplier, names in by_supplier.items()) or "none"


def _inner_optimizers(optimizer: Any) -> list[type]:
    """Classes of the optimizers that do the arithmetic, below Megatron's chain, mixed precision and sharding."""
    chain = getattr(optimizer, "chained_optimizers", None)
    if chain is None:  # a chain of several refuses to name one as its optimizer
        inner = getattr(optimizer, "megatron", None) or getattr(optimizer, "optimizer", None)
        chain = [] if inner is None else [inner]
    return [kind for part in chain for kind in _inner_optimizers(part)] or [type(optimizer)]


def suppliers(chunks: Iterable[torch.nn.Module], optimizer: Any = None) -> dict[str, str]:
    """The packages that supply attention, norm, linear, head and (if given) the optimizer of a built model, from their
    classes."""
    kinds: dict[type, bool] = {}
    for chunk in chunks:
        for module in chunk.modules():
            kinds[type(module)] = any(True for _ in module.parameters())
    found = {
        # the core attention is the attention without parameters; the blocks around it have some
        "attention": _named(k for k, weights in kinds.items() if "Attention" in k.__name__ and not weights),
        "norm": _named(k for k in kinds if "Norm" in k.__name__),
        "linear": _named(k for k in kinds if k.__name__.endswith("Linear")),
        "head": HEAD,
    }
    if optimizer is not None:
        found["optimizer"] = _named(_inner_optimizers(optimizer))
    return found


# ---------------------------------------------------------------- the report


def formula(condition: Condition, weight: float = 1.0) -> str:
    """The per-token advantage of a condition in one line (Eq. 2, 3, 6; the multiplicative forms are not the paper's).
    `weight`: of A_seq where a term is added to it."""
    a_seq = "A_seq" if weight == 1 else f"{weight:g} * A_seq"
    q = "phi(u)" if condition.shape == "phi" else "u"
    sign = "+" if condition.sign > 0 else "-"
    if condition.sign == 0:
        return "A = A_seq"
    if condition.composition == "multiplicative":
        text = f"A = A_seq * max(0, 1 {sign} lambda * {q} * sign(A_seq))"
    elif condition.composition == "multiplicative_plain":
        text = f"A = A_seq * (1 {sign} lambda * {q})"
    elif condition.composition == "rlsd":
        minus = "" if condition.sign > 0 else "-"
        text = f"A = A_seq * ((1 - lambda) + lambda * clip(exp({minus}{q} * sign(A_seq)), 0.8, 1.2))"
    else:
        text = f"A = {a_seq} {sign} lambda * {q}"
    u = "log p_teacher - log p_student" if condition.u_source == "teacher" else "-log p_student"
    shape = ", phi(u) = (softplus(u) - log 2) / 2" if condition.shape == "phi" else ""
    return f"{text}, u = {u}{shape}"


def gate_text(
    condition: Condition,
    *,
    lambda_max: float,
    warmup_steps: int,
    tau_down: float,
    tau_up: float,
    h_warm: float | None = None,
) -> str:
    """How lambda is set, in one line."""
    if condition.sign == 0:
        return "no per-token term"
    warmup = f"0 for {plural(warmup_steps, 'step')}, then " if warmup_steps else ""
    if not condition.gated:
        return f"lambda {warmup}{lambda_max:g}, without a gate"
    level = "H_warm" if h_warm is None else f"H_warm = {h_warm:g}"
    return (
        f"lambda {warmup}{lambda_max:g} or 0 by the {condition.gate_entropy}'s median entropy H: "
        f"off below {tau_down:g} x H_warm, on again from {tau_up:g} x {level}"
    )


def perplexity_text(rule: PerplexityRule, *, warmup_steps: int, target: float | None) -> str:
    """How lambda follows the teacher's perplexity, in one line."""
    warmup = f"0 for {plural(warmup_steps, 'step')}, then " if warmup_steps else ""
    if target is not None:
        level = f"{target:g}"
    elif rule.target_ratio is not None:
        level = f"{rule.target_ratio:g} x the warm-up's median"
    else:
        level = f"the warm-up's median - {rule.target_offset:g}"
    shift = {"none": "", "negative": ", shifted to mean 0 where that is negative", "always": ", shifted to mean 0"}
    low, high = RATIO_LIMITS
    whose = "of each response" if rule.scope == "response" else "of the batch, from the mean of the logarithms"
    return (
        f"{whose}: {warmup}clip({rule.lambda_0:g} x {rule.alpha:g} x log(clip(P / P*, {low:g}, {high:g})),"
        f" {rule.lambda_min:g}, {rule.lambda_max:g}) of the teacher's perplexity P, P* = {level}; 0 where P >"
        f" {rule.cutoff:g}{shift[rule.shift]}; no entropy gate"
    )


def term_text(
    *,
    outlier_deviations: float | None,
    pmi_clip: float | None,
    normalization: str,
    term_clip: float | None,
    max_position: int | None,
    max_length: int | None,
) -> str:
    """What happens to the term beside its formula, in order; empty where nothing does."""
    scaled = {
        "none": None,
        "sequence": "standardised over each response",
        "demean": "minus its mean over each response",
        "batch": "standardised over the batch",
    }
    parts = [
        outlier_deviations and f"u beyond {outlier_deviations:g} standard deviations counts as 0",
        pmi_clip and f"u clamped to +-{pmi_clip:g}",
        scaled[normalization],
        term_clip and f"clamped to +-{term_clip:g}",
        max_position and f"none from position {max_position:,} on",
        max_length and f"none on responses of {max_length:,} tokens and more",
    ]
    return "; ".join(part for part in parts if part)


def layout_text(layout: Any) -> str:
    """`tp 2, pp 1, vpp none, cp 1, dp 1, sequence parallel off (2 ranks)` of a layout (dataclass or mapping)."""
    values = dict(layout) if isinstance(layout, Mapping) else asdict(layout)
    virtual = values.get("virtual_pipeline")
    ranks = values["tensor"] * values["pipeline"] * values["context"] * values["data"]
    return (
        f"tp {values['tensor']}, pp {values['pipeline']}, vpp {virtual or 'none'}, cp {values['context']}, "
        f"dp {values['data']}, sequence parallel {'on' if values.get('sequence_parallel') else 'off'} "
        f"({plural(ranks, 'rank')})"
    )


def _table(sections: Mapping[str, Sequence[tuple[str, str]]]) -> list[str]:
    width = max((len(key) for rows in sections.values() for key, _ in rows), default=0)
    lines = []
    for title, rows in sections.items():
        if rows:
            lines += ["", title]
            below = "\n" + " " * (width + 4)
            lines += [f"  {key.ljust(width)}  {text}".rstrip().replace("\n", below) for key, text in rows]
    return lines


def startup_report(
    *,
    name: str,
    run_folder: str | os.PathLike[str],
    environment: Mapping[str, Any],
    layout: Any,
    suppliers: Mapping[str, str],
    model: Mapping[str, Any],
    batch: Mapping[str, Any],
    passes: Sequence[str] = (),
    method: Mapping[str, str] | None = None,
) -> str:
    """The report as text: one table, printed by rank 0 before the first step.

    `environment` and `suppliers` are what the functions of that name return, `layout` a Layout, `model`, `batch` and
    `method` rows to show (family, parameters, dtype; problems, rollouts, token budget; condition, advantage, lambda),
    `method` None in the supervised stage, `passes` the pass plan's reasons.
    """
    versions = environment["versions"]
    present = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    absent = ", ".join(package for package, version in versions.items() if not version)
    devices: list[str] = list(environment["devices"])
    machine = [("versions", present)]
    if absent:
        machine.append(("not installed", absent))
    counted = [f"{devices.count(d)} x {d}" if devices.count(d) > 1 else d for d in dict.fromkeys(devices)]
    machine.append(("devices", "; ".join(counted) + f"; {environment['cores']} cores"))
    machine.append(("layout", layout_text(layout)))
    rows = {
        "Machine": machine,
        "Model": [(key, _shown(value)) for key, value in model.items()],
        "Supplied by": list(suppliers.items()),
        "Method": list((method or {}).items()),
        "A step": [(key, _shown(value)) for key, value in batch.items()]
        + [("passes" if i == 0 else "", reason) for i, reason in enumerate(passes)],
    }
    title = f"asd_megatron: {name} -> {os.fspath(run_folder)}"
    return "\n".join([title, "=" * len(title), *_table(rows)[1:], ""])


def _shown(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def write_environment(
    run_folder: str | os.PathLike[str],
    environment: Mapping[str, Any],
    *,
    layout: Any,
    suppliers: Mapping[str, str],
) -> Path:
    """Write RUN/environment.json: versions, devices, layout, the supplier of each part. Returns its path."""
    values = asdict(layout) if is_dataclass(layout) and not isinstance(layout, type) else dict(layout)
    content = {**environment, "layout": values, "suppliers": dict(suppliers)}
    return write_json(Path(run_folder) / "environment.json", content)
