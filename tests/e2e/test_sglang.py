"""Training with real SGLang servers: the rollouts are the trainer's own policy's, and servers may die."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from asd_megatron import train as program
from asd_megatron.observe.writer import read_metrics
from asd_megatron.rollout.sglang.engine import SGLangEngine
from asd_megatron.run.history import read_history
from asd_megatron.run.mismatch import LARGE_KL
from asd_megatron.run.rl import TrainingRun
from tests.e2e.world import World, dump, make_fp8_world, make_world, refusal, start, steps, without_torchrun
from tests.models.tiny import tiny_llama, tiny_qwen3
from tests.rollout.sglang.sglang_world import SGLangWorld, sglang_python

pytestmark = pytest.mark.sglang

MISMATCH = 1e-4  # float32, on both sides
ROLLOUTS = 12  # a step: 3 problems, 4 each


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A model of the servers' shape, with other weights."""
    return make_world(tmp_path_factory.mktemp("sglang_run"), layers=4)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, sglang_pair: SGLangWorld) -> SGLangWorld:
    """The pair, with its keys in the environment."""
    monkeypatch.setenv("ASD_MEGATRON_API_KEY", sglang_pair.api_key)
    monkeypatch.setenv("ASD_MEGATRON_ADMIN_KEY", sglang_pair.admin_key)
    return sglang_pair


def rollout(pair: SGLangWorld, **keys: Any) -> dict[str, Any]:
    return {"engine": "sglang", "server_urls": pair.urls, "server_wait_timeout": 120.0, **keys}


def check_steps(folder: Path, number: int) -> list[dict[str, Any]]:
    """Every step is there, has every sample once, from verified weights."""
    rows = [row for row in read_metrics(folder) if row["step"] > 0]
    assert [row["step"] for row in rows] == list(range(1, number + 1))
    for row in rows:
        assert row["weight_sync/verified"] == 1 and row["mismatch/max_abs"] < MISMATCH
        assert row["rollouts/total"] == ROLLOUTS and row["rollouts/aborted"] == row["rollouts/dropped_groups"] == 0
        rollouts = [example.rollout for example in dump(folder, row["step"]).examples]
        assert set(Counter((r.prompt_id, r.sample) for r in rollouts).values()) == {1}
        assert {r.weight_version for r in rollouts} == {row["step"] - 1}
    return rows


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}], ids=["tp2", "pp2_vpp2"])
def test_ranks_train_with_two_servers(keys: SGLangWorld, world: World, layout: dict[str, int]) -> None:
    name = f"servers_{next(iter(layout))}"
    recipe = world.recipe(
        file=f"{name}.yaml",
        run={"folder": str(world.folder / "runs" / "{name}"), "name": name, "steps": 3, "dump_rollouts": True},
        parallelism=layout,
        rollout=rollout(keys, weight_sync_bucket_mib=1),
        data={"train": str(world.problems), "test": str(world.problems)},
        evaluation={"every": 2, "problems": 4, "at_start": False},
    )
    done = start("asd_megatron.cli.main", "train", str(recipe), cwd=world.folder, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = check_steps(world.run_folder(name), 3)
    assert all(row["servers/serving"] == 2 and row["weight_sync/probe_max_abs"] < 1e-3 for row in rows)
    assert rows[1]["evaluation/length_mean"] > 0 and "evaluation/accuracy" in rows[2]


def test_a_run_starts_its_servers_and_a_router_and_shares_its_device_with_them(world: World) -> None:
    """On the CPU the servers' memory stays where it is, and weights are handed over by shared memory."""
    rollout = {
        "engine": "sglang",
        "servers": 1,
        "server_python": str(sglang_python()),
        "server_args": {"max-running-requests": 8},
        "router": "start",
        "placement": "colocated",
        "offload_optimizer": True,
        "weight_sync": "cuda_ipc",
    }
    folder = world.train(
        "own",
        run={"folder": str(world.folder / "runs" / "{name}"), "steps": 2, "dump_rollouts": True},
        rollout=rollout,
        data={"train": str(world.problems), "test": str(world.problems)},
        evaluation={"every": 1, "problems": 2, "at_start": True},
    )
    rows = check_steps(folder, 2)
    assert all("evaluation/accuracy" in row and row["servers/serving"] == 1 for row in rows)
    logs = folder / "servers"
    assert sorted(path.name for path in logs.iterdir()) == ["router.log", "server_0.log"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in logs.iterdir()), "they are nobody else's to read"
    assert "/release_memory_occupation" in (logs / "server_0.log").read_text()


def test_a_quantised_server_is_sent_fp8_in_deltas_and_its_rollouts_are_corrected(tmp_path: Path) -> None:
    fp8 = make_fp8_world(tmp_path)
    folder = fp8.train(
        "fp8",
        run={"folder": str(tmp_path / "runs" / "{name}"), "steps": 3, "dump_rollouts": True},
        model={"path": str(fp8.model), "dtype": "bfloat16"},
        rollout={
            "engine": "sglang",
            "quantization": "fp8",
            "weight_sync_full_every": 9,
            "server_python": str(sglang_python()),
        },
    )
    assert "importance_correction: truncated" in (folder / "recipe.yaml").read_text()
    rows = [row for row in read_metrics(folder) if row["step"] > 0]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["weight_sync/changed"] < 1 for row in rows] == [False, True, True]
    assert all(row["weight_sync/megabytes"] < rows[0]["weight_sync/megabytes"] for row in rows[1:])
    for row in rows:
        assert row["weight_sync/verified"] == 1 and row["weight_sync/probe_exceeded"] == 0
        assert 0.001 < row["mismatch/mean_abs"] < 0.2 and row["mismatch/k3"] < LARGE_KL
        assert 0.9 < row["importance/mean"] < 1.1
        assert {e.rollout.weight_version for e in dump(folder, row["step"]).examples} == {row["step"] - 1}
    served = folder / "servers" / "model"
    assert not list(served.glob("*.safetensors")), "weights come through the update alone"


class Disturbed(TrainingRun):
    """A run to whose servers something happens in some steps, while they generate. Both are up before."""

    events: dict[int, Callable[[], None]] = {}
    pair: SGLangWorld

    def collect(self, step: int) -> Any:
        event = self.events.get(step)
        if event is None:
            return super().collect(step)
        self.pair.wait_healthy()
        self.pair.slow(0.01)
        thread = threading.Thread(target=self.disturb, args=(event,))
        thread.start()
        try:
            return super().collect(step)
        finally:
            thread.join()

    def disturb(self, event: Callable[[], None]) -> None:
        assert isinstance(self.engine, SGLangEngine) and self.engine._controller is not None
        fleet, deadline = self.engine._controller._fleet, time.monotonic() + 60
        while fleet.pending < ROLLOUTS and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.3)  # of more than a second that the responses take
        event()
        self.pair.slow(None)


@pytest.fixture
def disturbed(monkeypatch: pytest.MonkeyPatch, sglang_pair: SGLangWorld) -> Iterator[dict[int, Callable[[], None]]]:
    monkeypatch.setattr(Disturbed, "events", {})
    monkeypatch.setattr(Disturbed, "pair", sglang_pair, raising=False)
    monkeypatch.setattr(program, "TrainingRun", Disturbed)
    yield Disturbed.events


LONG = {"max_prompt_tokens": 20, "max_response_tokens": 100, "stop_token_ids": []}  # seconds a response


def kill(pair: SGLangWorld, index: int) -> None:
    os.kill(pair.pids[index], signal.SIGKILL)


def disturbing_run(world: World, pair: SGLangWorld, name: str, number: int, **keys: Any) -> Path:
    """A run with long responses, all of them with both servers at once."""
    return world.train(
        name,
        run={"folder": str(world.folder / "runs" / "{name}"), "steps": number, "dump_rollouts": True},
        sampling={**LONG, "problems_per_step": 3, "rollouts_per_problem": 4},
        rollout=rollout(pair, **keys),
    )


def test_a_server_dies_in_mid_generation_and_another_later(
    keys: SGLangWorld, world: World, disturbed: dict[int, Callable[[], None]]
) -> None:
    disturbed |= {2: lambda: kill(keys, 0), 5: lambda: kill(keys, 1)}
    rows = check_steps(disturbing_run(world, keys, "killed", 8), 8)
    assert rows[1]["servers/retried"] > 0 and rows[4]["servers/retried"] > 0
    assert sum(row["servers/ejected"] for row in rows) >= 2 and sum(row["servers/returned"] for row in rows) >= 1
    assert all(row["servers/given_up"] == 0 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_steps_with_a_death_every_few(
    keys: SGLangWorld, world: World, disturbed: dict[int, Callable[[], None]]
) -> None:
    disturbed |= {step: partial(kill, keys, number % 2) for number, step in enumerate(range(3, 30, 4))}
    rows = check_steps(disturbing_run(world, keys, "thirty", 30), 30)
    trained = sum(row["rollouts/total"] for row in rows)
    print(
        f"deaths {len(disturbed)}, samples expected {30 * ROLLOUTS}, trained {trained:.0f}, "
        f"retried {sum(row['servers/retried'] for row in rows):.0f}"
    )
    assert trained == 30 * ROLLOUTS and sum(row["servers/retried"] for row in rows) >= len(disturbed)


def test_all_servers_gone_then_resumed(
    keys: SGLangWorld,
    world: World,
    disturbed: dict[int, Callable[[], None]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def both() -> None:
        for index in (0, 1):
            kill(keys, index)

    disturbed[3] = both
    settings: dict[str, Any] = {
        "run": {"folder": str(world.folder / "runs" / "{name}"), "name": "gone", "steps": 4, "dump_rollouts": True},
        "sampling": {**LONG, "problems_per_step": 3, "rollouts_per_problem": 4},
    }
    recipe = world.recipe(**settings, rollout=rollout(keys, server_wait_timeout=1.0))
    message = refusal(capsys, program.main, [str(recipe)])
    assert "no server has been usable for 1 s" in message and all(url in message for url in keys.urls)
    assert "The state after step 2 is saved: start the same command again" in message
    folder = world.run_folder("gone")
    assert steps(folder) == [1, 2] and (folder / "checkpoints" / "step_000002").is_dir()
    keys.wait_healthy()
    disturbed.clear()
    with without_torchrun():
        assert program.main([str(recipe), "--rollout.server_wait_timeout", "120"]) == 0
    check_steps(folder, 4)


def test_a_request_to_stop_while_servers_generate(
    keys: SGLangWorld, world: World, disturbed: dict[int, Callable[[], None]]
) -> None:
    """The step in flight is abandoned; the state is that of the step before, and nothing of it stays in the servers."""
    folder = world.run_folder("asked")
    disturbed[3] = (folder / "stop").touch
    disturbing_run(world, keys, "asked", 4)
    assert steps(folder) == [1, 2] and (folder / "checkpoints" / "step_000002").is_dir()
    assert read_history(folder)[-1]["event"] == "stop" and not (folder / "summary.json").exists()
    disturbed.clear()
    rows = check_steps(disturbing_run(world, keys, "asked", 4), 4)
    assert rows[2]["rollouts/restored_tokens"] > ROLLOUTS, "responses of the step in flight continue"
    assert rows[2]["rollouts/dropped_tokens"] == 0


def test_overlap_with_carried_groups_and_importance_correction(keys: SGLangWorld, world: World) -> None:
    folder = world.train(
        "ahead",
        run={"folder": str(world.folder / "runs" / "{name}"), "steps": 5, "dump_rollouts": True},
        sampling={**LONG, "problems_per_step": 3, "rollouts_per_problem": 4},
        algorithm={"name": "no_gate", "importance_correction": "truncated"},
        rollout=rollout(keys, overlap=True, oversampling=1.4, partial_rollouts=True, max_staleness=3),
    )
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["rollouts/total"] == ROLLOUTS and row["rollouts/stale_max"] <= 3 for row in rows)
    assert rows[0]["rollouts/stale"] == 0 and all(row["rollouts/stale"] > 0 for row in rows[1:])
    assert sum(row["rollouts/carried_groups"] for row in rows) > 0
    assert all(0.5 < row["importance/mean"] < 2 for row in rows)
    assert sum(row["mismatch/max_abs"] for row in rows[1:]) > MISMATCH, "older weights made them"


def test_what_is_wrong_with_a_server_is_said_at_the_start(
    keys: SGLangWorld,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(**sections: Any) -> str:
        recipe = world.recipe(file="wrong.yaml", rollout=rollout(keys), **sections)
        return refusal(capsys, program.main, [str(recipe), "--run.name", "wrong", "--run.overwrite", "true"])

    llama = tiny_llama(tmp_path / "llama")
    assert "serves a Qwen3ForCausalLM and the trainer trains a LlamaForCausalLM" in said(model={"path": str(llama)})
    smaller = tiny_qwen3(tmp_path / "smaller", vocab_size=60)
    assert "another vocabulary than the trainer's 60 tokens" in said(model={"path": str(smaller)})
    monkeypatch.setenv("ASD_MEGATRON_ADMIN_KEY", "wrong")
    assert "refused the administration key" in said()
    monkeypatch.setenv("ASD_MEGATRON_API_KEY", "wrong")
    assert "ASD_MEGATRON_API_KEY" in said() or "ASD_MEGATRON_ADMIN_KEY" in said()
