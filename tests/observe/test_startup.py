"""The start-up report and environment.json."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from asd_megatron.antisd.divergence import condition
from asd_megatron.antisd.perplexity import PerplexityRule
from asd_megatron.observe.startup import (
    environment,
    formula,
    gate_text,
    layout_text,
    perplexity_text,
    startup_report,
    suppliers,
    term_text,
    write_environment,
)


@dataclass(frozen=True)
class Layout:
    tensor: int = 2
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    data: int = 1
    sequence_parallel: bool = True


class PackedAttention(torch.nn.Module):
    pass


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = PackedAttention()
        self.norm = torch.nn.RMSNorm(4)
        self.linear = torch.nn.Linear(4, 4)


class Wrapped:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


class Chained:
    def __init__(self, *parts: Wrapped) -> None:
        self.chained_optimizers = list(parts)


def test_environment_names_what_is_there_and_what_is_not() -> None:
    found = environment()
    versions = found["versions"]
    assert versions["python"] == platform.python_version() and versions["torch"] == torch.__version__
    assert versions["megatron-core"] and versions["transformers"]
    assert {"transformer-engine", "apex"} <= set(versions)
    assert found["devices"] and found["cores"] >= 1
    json.dumps(found)


def test_formulas_are_the_papers() -> None:
    phi = ", phi(u) = (softplus(u) - log 2) / 2"
    u = ", u = log p_teacher - log p_student"
    expected = {
        "grpo": "A = A_seq",
        "sd": f"A = A_seq + lambda * u{u}",
        "antisd": f"A = A_seq - lambda * phi(u){u}{phi}",
        "reverse_kl_ascent": f"A = A_seq - lambda * u{u}",
        "no_gate": f"A = A_seq - lambda * phi(u){u}{phi}",
        "multiplicative": f"A = A_seq * max(0, 1 - lambda * phi(u) * sign(A_seq)){u}{phi}",
        "student_entropy_gate": f"A = A_seq - lambda * phi(u){u}{phi}",
        "no_teacher": f"A = A_seq - lambda * phi(u), u = -log p_student{phi}",
    }
    assert {name: formula(condition(name)) for name in expected} == expected


def test_formulas_of_the_released_compositions() -> None:
    u = ", u = log p_teacher - log p_student"
    phi = ", phi(u) = (softplus(u) - log 2) / 2"
    plain = replace(condition("antisd"), composition="multiplicative_plain")
    assert formula(plain) == f"A = A_seq * (1 - lambda * phi(u)){u}{phi}"
    rlsd = replace(condition("sd"), composition="rlsd")
    assert formula(rlsd) == f"A = A_seq * ((1 - lambda) + lambda * clip(exp(u * sign(A_seq)), 0.8, 1.2)){u}"
    assert "exp(-u * sign(A_seq))" in formula(replace(condition("reverse_kl_ascent"), composition="rlsd"))
    assert formula(condition("antisd"), 0.5).startswith("A = 0.5 * A_seq - lambda * phi(u)")
    assert formula(condition("grpo"), 0.5) == "A = A_seq"


def test_lambda_from_the_perplexity_in_words() -> None:
    text = perplexity_text(PerplexityRule(), warmup_steps=5, target=None)
    assert text == (
        "of each response: 0 for 5 steps, then clip(0.1 x 2 x log(clip(P / P*, 0.5, 3)), -0.02, 0.5) of the"
        " teacher's perplexity P, P* = the warm-up's median - 0.1; 0 where P > 3; no entropy gate"
    )
    assert "P* = 1.3;" in perplexity_text(PerplexityRule(target_ratio=0.9), warmup_steps=0, target=1.3)
    assert "P* = 0.9 x" in perplexity_text(PerplexityRule(target_ratio=0.9), warmup_steps=5, target=None)
    batch = perplexity_text(PerplexityRule(scope="batch", shift="negative"), warmup_steps=5, target=None)
    assert "of the batch" in batch and "shifted to mean 0 where that is negative" in batch


OFF: dict[str, Any] = {
    "outlier_deviations": None,
    "pmi_clip": None,
    "normalization": "none",
    "term_clip": None,
    "max_position": None,
    "max_length": None,
}


def test_the_term_in_words() -> None:
    assert term_text(**OFF) == ""
    on = {"outlier_deviations": 2.0, "pmi_clip": 5.0, "normalization": "sequence", "term_clip": 3.0}
    assert term_text(**OFF | on | {"max_length": 12_000}) == (
        "u beyond 2 standard deviations counts as 0; u clamped to +-5; standardised over each response; clamped to +-3;"
        " none on responses of 12,000 tokens and more"
    )
    assert term_text(**OFF | {"normalization": "demean", "max_position": 9}) == (
        "minus its mean over each response; none from position 9 on"
    )


def test_gate_in_words() -> None:
    paper = {"lambda_max": 0.5, "tau_down": 0.93, "tau_up": 1.0}
    assert gate_text(condition("antisd"), warmup_steps=5, **paper) == (
        "lambda 0 for 5 steps, then 0.5 or 0 by the teacher's median entropy H: "
        "off below 0.93 x H_warm, on again from 1 x H_warm"
    )
    assert gate_text(condition("no_teacher"), warmup_steps=0, h_warm=0.71, **paper) == (
        "lambda 0.5 or 0 by the student's median entropy H: off below 0.93 x H_warm, on again from 1 x H_warm = 0.71"
    )
    assert gate_text(condition("sd"), warmup_steps=0, **paper) == "lambda 0.5, without a gate"
    assert gate_text(condition("grpo"), warmup_steps=0, **paper) == "no per-token term"


def test_layout() -> None:
    assert layout_text(Layout()) == "tp 2, pp 1, vpp none, cp 1, dp 1, sequence parallel on (2 ranks)"
    one = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 2, "context": 1, "data": 1}
    assert layout_text(one) == "tp 1, pp 1, vpp 2, cp 1, dp 1, sequence parallel off (1 rank)"


def test_suppliers_by_the_classes_found() -> None:
    model = Model()
    found = suppliers([model], Chained(Wrapped(torch.optim.AdamW(model.parameters()))))
    assert found["attention"] == "tests (PackedAttention)"
    assert found["norm"] == f"torch {torch.__version__} (RMSNorm)"
    assert found["linear"] == f"torch {torch.__version__} (Linear)"
    assert found["optimizer"] == f"torch {torch.__version__} (AdamW)"
    assert found["head"].startswith("asd_megatron")
    assert suppliers([torch.nn.Identity()])["norm"] == "none"


def test_a_class_that_wraps_transformer_engine_is_its_work() -> None:
    base = type("RMSNorm", (torch.nn.Module,), {"__module__": "transformer_engine.pytorch.module.rmsnorm"})
    wrapper = type("TENorm", (base,), {"__module__": "megatron.core.extensions.transformer_engine"})
    assert suppliers([wrapper()])["norm"] == "transformer-engine (TENorm)"


def test_report_and_file(tmp_path: Path) -> None:
    env = environment() | {
        "versions": {"python": "3.11.9", "torch": "2.13.0", "apex": None},
        "devices": ["GPU A, 78 GiB", "GPU A, 78 GiB"],
    }
    supplied = {"attention": "torch", "norm": "megatron-core 0.16.1"}
    text = startup_report(
        name="quickstart",
        run_folder=tmp_path,
        environment=env,
        layout=Layout(),
        suppliers=supplied,
        model={"family": "qwen3", "parameters": 123456, "dtype": torch.float32},
        batch={"problems": 32, "token budget": "16,384 a micro-batch"},
        method={"condition": "antisd", "advantage": formula(condition("antisd"))},
        passes=("teacher scoring pass: u needs it", "1 update"),
    )
    lines = text.splitlines()
    assert lines[0] == f"asd_megatron: quickstart -> {tmp_path}"
    for words in (
        "python 3.11.9, torch 2.13.0",
        "not installed  apex",
        "2 x GPU A, 78 GiB",
        "parameters     123,456",
        "dtype          float32",
        "attention      torch",
        "condition      antisd",
        "advantage      A = A_seq - lambda * phi(u)",
        "passes         teacher scoring pass: u needs it",
        "               1 update",
        "problems       32",
    ):
        assert any(words in line for line in lines), words
    path = write_environment(tmp_path, env, layout=Layout(), suppliers=supplied)
    content = json.loads(path.read_text())
    assert path.name == "environment.json"
    assert content["layout"]["tensor"] == 2 and content["suppliers"] == supplied
    assert content["versions"]["apex"] is None


def test_report_of_the_supervised_stage_has_no_method(tmp_path: Path) -> None:
    text = startup_report(
        name="warm start",
        run_folder=tmp_path,
        environment=environment(),
        layout=Layout(),
        suppliers={},
        model={"family": "qwen3"},
        batch={"sequences": 128},
    )
    assert "Method" not in text and "sequences" in text
