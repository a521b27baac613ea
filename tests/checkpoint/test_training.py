"""Training checkpoints: a run that was saved and loaded goes on bit for bit like the one that was not stopped."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.checkpoint import training
from asd_megatron.errors import UserError
from tests.distributed.harness import run_ranks
from tests.models import everywhere

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 62,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
}
RUN_STATE = {"step": 2, "gate": {"open": True, "h_warm": 0.1 + 0.2, "history": [math.inf, None]}, "text": "é"}


class _Weights:
    """Random full tensors for `ModelPort.load`."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.tensors = {name: 0.1 * torch.randn(shape, generator=g) for name, shape in shapes.items()}

    def keys(self) -> set[str]:
        return set(self.tensors)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.tensors[name]


class _Trainer:
    """A port, Megatron's optimizer and its schedule, without data: gradients are a function of the weights."""

    def __init__(
        self, layout: dict[str, Any], distributed: bool, seed: int, dtype: torch.dtype = torch.float32, **config: Any
    ) -> None:
        from asd_megatron.distributed.layout import Layout, init

        sizes = Layout(**layout)
        groups = init(sizes)
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from asd_megatron.models.port import ModelPort

        self.port = ModelPort.build({**CONFIG, **config}, groups, sizes, dtype=dtype, layers="local")
        self.port.load(_Weights(self.port.expected(), seed))
        self.port.wrap_ddp(distributed_optimizer=distributed, overlap_grad_reduce=False)
        settings = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            min_lr=0.0,
            weight_decay=0.01,
            clip_grad=1.0,
            use_distributed_optimizer=distributed,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
        )
        self.optimizer = get_megatron_optimizer(settings, self.port.chunks, use_gloo_process_groups=False)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=1e-2,
            min_lr=0.0,
            lr_warmup_steps=2,
            lr_decay_steps=10,
            lr_decay_style="linear",
            start_wd=0.01,
            end_wd=0.01,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )
        self.scheduler.step(1)

    def steps(self, numbers: range) -> None:
        for number in numbers:
            for chunk in self.port.chunks:
                chunk.zero_grad_buffer()
                parameter: Any
                for parameter in chunk.parameters():
                    parameter.main_grad.copy_(torch.sin(parameter.detach().float() * 37 * (number + 1)))
            self.optimizer.step()
            self.scheduler.step(1)

    def save(self, folder: Path, step: int, run_state: dict[str, Any] = RUN_STATE, keep: int = 2) -> Path:
        return training.save(folder, step, self.port, self.optimizer, self.scheduler, run_state, keep=keep)

    def load(self, path: Path | None) -> dict[str, Any]:
        assert path is not None
        return training.load(path, self.port, self.optimizer, self.scheduler)

    def weights(self) -> dict[str, Tensor]:
        return everywhere.weights(self.port)

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


# Everything below that names a `rank` runs on two ranks.

LAYOUTS: dict[str, tuple[dict[str, Any], bool, torch.dtype]] = {
    "dp2_distopt": ({"data": 2}, True, torch.float32),
    "dp2_distopt_bf16": ({"data": 2}, True, torch.bfloat16),
    "dp2": ({"data": 2}, False, torch.float32),
    "tp2": ({"tensor": 2}, False, torch.float32),
    "tp2_distopt": ({"tensor": 2}, True, torch.float32),
    # A tied embedding has a bucket of its own on the first and the last stage: padding between buckets.
    "pp2_vpp2_distopt": ({"pipeline": 2, "virtual_pipeline": 2}, True, torch.float32),
}
USED = ("dp2_distopt", "tp2")


def _continue(rank: int, folder: str) -> dict[str, Any]:
    report = {}
    for case, (layout, distributed, dtype) in LAYOUTS.items():
        path = Path(folder) / case
        whole = _Trainer(layout, distributed, seed=1, dtype=dtype)
        whole.steps(range(2))
        whole.save(path, 2)
        saved_rate = whole.learning_rate
        whole.steps(range(2, 5))
        for used in (False, True)[: 1 + (case in USED)]:  # into a fresh trainer, and into one that has made steps
            again = _Trainer(layout, distributed, seed=2, dtype=dtype)
            if used:
                again.steps(range(7, 9))
            before = again.weights()
            state = again.load(training.latest(path))
            same_rate = again.learning_rate == saved_rate
            again.steps(range(2, 5))
            got, want = again.weights(), whole.weights()
            report[f"{case} used={used}"] = {
                "state": state,
                "same_rate": same_rate,
                "equal": all(torch.equal(got[n], want[n]) for n in want),
                "differed": any(not torch.equal(before[n], want[n]) for n in want),
            }
    return report


def test_goes_on_bit_for_bit(tmp_path: Path) -> None:
    for report in run_ranks(_continue, 2, str(tmp_path)):
        assert len(report) == len(LAYOUTS) + len(USED)
        for case, found in report.items():
            assert found["equal"] and found["differed"] and found["same_rate"], case
            assert found["state"] == RUN_STATE, case


def _other_layout(rank: int, folder: str) -> dict[str, float]:
    report = {}
    for distributed in (False, True):
        path = Path(folder) / f"distributed_{distributed}"
        first = _Trainer({"tensor": 2}, distributed, seed=1)
        first.steps(range(2))
        first.save(path, 2)
        first.steps(range(2, 4))
        want = first.weights()
        for layout in ({"data": 2}, {"pipeline": 2, "virtual_pipeline": 2}):
            again = _Trainer(layout, distributed, seed=2)
            again.load(training.latest(path))
            again.steps(range(2, 4))
            got = again.weights()
            report[f"{distributed} {layout}"] = max((got[n] - want[n]).abs().max().item() for n in want)
    return report


def test_another_layout_can_go_on(tmp_path: Path) -> None:
    for case, error in run_ranks(_other_layout, 2, str(tmp_path))[0].items():
        assert error < 1e-6, case


def _refusals(rank: int, folder: str) -> dict[str, str]:
    def refusal(action: Any, kind: type[Exception] = UserError) -> str:
        with pytest.raises(kind) as caught:
            action()
        return str(caught.value)

    found: dict[str, str] = {}
    trainer = _Trainer({}, False, seed=1)
    trainer.steps(range(1))
    root = Path(folder)
    path = trainer.save(root, 1)
    found["distributed"] = refusal(lambda: _Trainer({}, True, seed=1).load(path))
    found["layers"] = refusal(lambda: _Trainer({}, False, seed=1, num_hidden_layers=2).load(path))
    found["width"] = refusal(lambda: _Trainer({}, False, seed=1, intermediate_size=48).load(path))
    found["not a checkpoint"] = refusal(lambda: trainer.load(root))
    found["tuple"] = refusal(lambda: trainer.save(root, 2, {"a": {1: 2}}), ValueError)
    found["tensor"] = refusal(lambda: trainer.save(root, 2, {"a": [torch.ones(1)]}), ValueError)

    # A save that fails half way leaves what was there.
    original = training._save_shards

    def broken(folder: str, state: Any) -> None:
        original(folder, state)
        raise OSError("disk full")

    training._save_shards = broken
    try:
        found["half"] = refusal(lambda: trainer.save(root, 2), OSError)
    finally:
        training._save_shards = original
    found["files after half"] = " ".join(sorted(os.listdir(root)))
    found["latest after half"] = str(training.latest(root))

    mark = root / "executed"
    metadata = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(pickle.dumps(_Touch(str(mark))))
    found["malicious"] = refusal(lambda: trainer.load(path))
    found["executed"] = str(mark.exists())
    (path / ".metadata").write_bytes(metadata)
    shard = next(path.glob("*.distcp"))
    shard.unlink()
    found["missing shard"] = refusal(lambda: trainer.load(path))
    (path / training.RUN_STATE).write_text("{")
    found["damaged"] = refusal(lambda: trainer.load(path))
    return found


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_what_is_refused(tmp_path: Path) -> None:
    found = run_ranks(_refusals, 1, str(tmp_path))[0]
    assert "set parallelism.distributed_optimizer" in found["distributed"]
    assert "does not fit this model" in found["layers"]
    assert "does not fit this model" in found["width"]
    assert "is no training checkpoint" in found["not a checkpoint"]
    assert "run_state.a has the key 1" in found["tuple"]
    assert "run_state.a[0] is a Tensor" in found["tensor"]
    assert found["half"] == "disk full"
    assert found["files after half"] == "latest step_000001"
    assert found["latest after half"].endswith("step_000001")
    assert "not safe to read" in found["malicious"]
    assert found["executed"] == "False"
    assert "damaged" in found["missing shard"]
    assert "damaged" in found["damaged"]


def _keep(rank: int, folder: str) -> list[list[str]]:
    trainer = _Trainer({}, False, seed=1)
    seen = []
    for step in (5, 10, 15, 15, 7):
        trainer.steps(range(step, step + 1))
        trainer.save(Path(folder), step, {"step": step}, keep=2)
        seen.append(sorted(os.listdir(folder)))
    stored = json.loads((Path(folder) / "step_000007" / "run_state.json").read_text())
    assert stored["run_state"] == {"step": 7}
    newest = training.latest(folder)
    assert newest is not None and newest.name == "step_000007"
    return seen


def test_the_newest_are_kept(tmp_path: Path) -> None:
    seen = run_ranks(_keep, 1, str(tmp_path))[0]
    assert seen[0] == ["latest", "step_000005"]
    assert seen[1] == ["latest", "step_000005", "step_000010"]
    assert seen[2] == seen[3] == ["latest", "step_000010", "step_000015"]
    assert seen[4] == ["latest", "step_000007", "step_000015"]  # the one just written is never removed


def test_latest(tmp_path: Path) -> None:
    assert training.latest(tmp_path) is None
    assert training.latest(tmp_path / "absent") is None
    for named in ("step_000003", "../elsewhere", ""):
        (tmp_path / "latest").write_text(named + "\n")
        with pytest.raises(UserError, match="no checkpoint in"):
            training.latest(tmp_path)
    (tmp_path / "step_000003").mkdir()
    (tmp_path / "step_000003" / "run_state.json").write_text("{}")
    (tmp_path / "latest").write_text("step_000003\n")
    assert training.latest(tmp_path) == tmp_path / "step_000003"
