"""What the end-to-end tests train: a tiny model, problems, a reward that random weights sometimes earn; and how they
start the program."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from asd_megatron import sft, train
from asd_megatron.observe.dumps import Dump, dump_path, read_dump
from asd_megatron.observe.writer import read_metrics
from tests.models.tiny import tiny_qwen3

ROOT = Path(__file__).parents[2]
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PACKING = {"tokens/computed", "tokens/padding_share", "tokens/shared_share"}
CLOCKED = ("time_utc", "time/", "perf/", "tokens/per_second")  # what differs between two equal runs
PROBLEMS = 12

# About half of a random model's responses earn it, unequally within a group.
REWARD = """
def reward(problem, response):
    return float(sum(map(ord, response)) % 2)
"""


@dataclass(frozen=True)
class World:
    """A folder with a model, problems and a reward, and the recipe sections that name them."""

    folder: Path
    model: Path
    layers: int = 2

    @property
    def problems(self) -> Path:
        return self.folder / "problems.jsonl"

    def sections(self) -> dict[str, dict[str, Any]]:
        return {
            "run": {"folder": str(self.folder / "runs" / "{name}"), "steps": 2},
            "model": {"path": str(self.model)},
            "algorithm": {"name": "no_gate"},
            "data": {"train": str(self.problems)},
            # random weights end few of their responses
            "reward": {"name": f"{self.folder / 'reward.py'}:reward", "truncated": "judge"},
            "sampling": {
                "problems_per_step": 3,
                "rollouts_per_problem": 4,
                "max_prompt_tokens": 32,
                "max_response_tokens": 12,
            },
            "privileged": {"min_solution_tokens": 1},
            "optimizer": {"learning_rate": 1e-3},
            "batching": {"tokens_per_microbatch": 256},
            "logging": {"progress": False, "tensorboard": False, "curves": False},
            "checkpoint": {"every": 0, "export_at_end": False},
        }

    def recipe(self, file: str = "recipe.yaml", **sections: dict[str, Any]) -> Path:
        """A recipe file: the world's sections, with those given put in key by key."""
        merged = self.sections()
        for name, keys in sections.items():
            merged[name] = {**merged.get(name, {}), **keys}
        path = self.folder / file
        path.write_text(yaml.safe_dump(merged))
        return path

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def train(self, name: str, *overrides: str, expect: int = 0, **sections: dict[str, Any]) -> Path:
        """Run `asd_megatron.train` in this process as the run `name`; returns its folder."""
        recipe = self.recipe(**sections)
        status = call(train.main, [str(recipe), "--run.name", name, *overrides])
        assert status == expect, f"exit status {status}"
        return self.run_folder(name)


def make_world(
    folder: Path, *, layers: int = 2, seed: int = 3, make: Callable[..., Path] = tiny_qwen3, **config: Any
) -> World:
    """A world with a new model of 61 words, by default a Qwen3; `config` replaces values of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make(folder / "model", seed=seed, num_hidden_layers=layers, **config)
    change_weights(model, _fill_padding_row)
    (folder / "reward.py").write_text(REWARD)
    lines = [
        {"id": f"p{i}", "prompt": f"w{i} w{i + 1} w{(7 * i) % 50}", "answer": f"w{i}", "solution": f"w{i + 2} w{i}"}
        for i in range(PROBLEMS)
    ]
    write_lines(folder / "problems.jsonl", lines)
    return World(folder, model, layers)


def make_gpu_world(folder: Path) -> World:
    """A world with a model of sizes that GPU kernels take."""
    return make_world(folder, hidden_size=256, head_dim=64, intermediate_size=512, max_position_embeddings=512)


def make_fp8_world(folder: Path) -> World:
    """A world with a model that is made of blocks of 128 x 128, whose log-probs FP8 changes little."""
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "max_position_embeddings": 512}
    return make_world(folder, initializer_range=0.05, **sizes)


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a model folder's safetensors file after `change` has worked on its tensors."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _fill_padding_row(tensors: dict[str, torch.Tensor]) -> None:
    """transformers makes it 0, where the gradient of a norm explodes: here the model samples that token."""
    row = tensors["model.embed_tokens.weight"]
    row[0] = row[1].flip(0)


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    """JSONL; a line that is text already is written as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def call(main: Any, argv: Sequence[str]) -> int:
    """A program's main in this process, as a lone rank without torchrun's variables."""
    with without_torchrun():
        return int(main(list(argv)))


@contextlib.contextmanager
def without_torchrun() -> Iterator[None]:
    saved = {name: os.environ.pop(name) for name in TORCHRUN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def supervised(world: World, name: str, recipe: Path, *overrides: str, expect: int = 0) -> Path:
    """Run `asd_megatron.sft` in this process."""
    status = call(sft.main, [str(recipe), "--run.name", name, *overrides])
    assert status == expect, f"exit status {status}"
    return world.run_folder(name)


def refusal(capsys: pytest.CaptureFixture[str], main: Any, argv: list[str]) -> str:
    """The message of a program that refuses."""
    capsys.readouterr()
    assert call(main, argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert len(lines) == 1, err
    return err[err.index("error: ") :]


def start(
    module: str, *arguments: str, cwd: Path, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS` as a user would start it, one thread a rank; `environment` adds variables."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    inherited = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what the clock decides."""
    rows = read_metrics(folder)
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in rows]


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder)]


def dump(folder: Path, step: int) -> Dump:
    return read_dump(dump_path(folder, step))


def responses(folder: Path, step: int) -> dict[tuple[str, int], tuple[int, ...]]:
    """Response ids of a step by (problem, sample)."""
    rollouts = [example.rollout for example in dump(folder, step).examples]
    return {(r.prompt_id, r.sample): tuple(r.response_ids) for r in rollouts}


def assert_close(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], tolerance: float) -> None:
    """Equal names, and numbers equal to `tolerance` (absolute and relative), but for what describes the packs."""
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for left, right in zip(a, b, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - PACKING:
            x, y = left[name], right[name]
            close = x == y if x is None or y is None else abs(x - y) <= tolerance * max(1.0, abs(x), abs(y))
            assert close, f"step {left['step']}: {name} {x} against {y}"
