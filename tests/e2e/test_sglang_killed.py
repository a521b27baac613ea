"""A run with real SGLang servers, killed with all its ranks while they generate, and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from asd_megatron.observe.writer import read_metrics
from asd_megatron.records import Rollout
from asd_megatron.rollout.bank import Response
from asd_megatron.rollout.journal import read
from tests.e2e.test_sglang import LONG, keys, rollout
from tests.e2e.world import ROOT, TORCHRUN, World, dump, make_world, start, write_lines
from tests.rollout.sglang.sglang_world import SGLangWorld

__all__ = ["keys"]

pytestmark = pytest.mark.sglang

STEPS, SAVED, KILLED = 5, 2, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A model of the servers' shape, and a problem for every draw."""
    made = make_world(tmp_path_factory.mktemp("sglang_killed"), layers=4)
    lines = [{"id": f"p{i}", "prompt": f"w{i} w{(7 * i) % 50}", "answer": f"w{i}"} for i in range(5 * STEPS)]
    write_lines(made.problems, lines)
    return made


def stored(bank: Path) -> dict[tuple[int, str, int], Response]:
    found = {}
    for path in sorted(bank.glob("step_*.jsonl")):
        for r in read(path)[0]:
            if "sample" in r:
                versions = tuple(map(tuple, r["versions"]))
                key = int(path.stem[5:]), r["id"], r["sample"]
                found[key] = Response(r["ids"], r["logprobs"], versions, r["finish_reason"])
    return found


def begins_with(rollout: Rollout | Response | None, response: Response) -> bool:
    """Token by token and log-prob by log-prob."""
    if rollout is None:
        return False
    ids = rollout.response_ids if isinstance(rollout, Rollout) else rollout.ids
    n = len(response.ids)
    return np.array_equal(ids[:n], response.ids) and np.array_equal(rollout.logprobs[:n], response.logprobs)


def family(process: int) -> list[int]:
    """A process and its descendants, ranks first: the launcher would end them in its own way."""
    children = [
        int(child) for file in Path(f"/proc/{process}/task").glob("*/children") for child in file.read_text().split()
    ]
    return [*(descendant for child in children for descendant in family(child)), process]


def kill_in_step(command: list[str], world: World, folder: Path) -> None:
    """Start the run; SIGKILL to all its processes once a response of step KILLED is finished and others are not."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command,
        cwd=world.folder,
        env={**environment, "PYTHONPATH": paths},
        stderr=(world.folder / "killed.log").open("wb"),
    )
    deadline = time.monotonic() + 240
    try:
        while True:
            assert run.poll() is None and time.monotonic() < deadline, (world.folder / "killed.log").read_text()[-3000:]
            made = stored(folder / "bank")
            if any(key[0] == KILLED and response.finish_reason for key, response in made.items()):
                return
            time.sleep(0.02)
    finally:
        for process in family(run.pid):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        run.wait()


def test_killed_with_carried_responses_and_groups_in_flight(keys: SGLangWorld, world: World) -> None:
    recipe = world.recipe(
        run={"folder": str(world.folder / "runs" / "{name}"), "name": "cut", "steps": STEPS, "dump_rollouts": True},
        sampling={**LONG, "problems_per_step": 3, "rollouts_per_problem": 4},
        algorithm={"name": "grpo", "importance_correction": "truncated"},
        parallelism={"data": 2},
        checkpoint={"every": SAVED},
        rollout=rollout(keys, oversampling=1.6, partial_rollouts=True, max_staleness=4, max_concurrent_requests=4),
    )
    folder, command = world.run_folder("cut"), ["-m", "asd_megatron.cli.main", "train", str(recipe)]
    keys.slow(0.01)
    kill_in_step([sys.executable, *command], world, folder)
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, KILLED))
    state = json.loads((folder / "checkpoints" / f"step_{SAVED:06d}" / "run_state.json").read_text())["run_state"]
    left = {(step, name) for step, name, _ in state["rollouts"]["left_over"]}
    before = {k: r for k, r in stored(folder / "bank").items() if k[0] > SAVED or k[:2] in left}
    valid = {key: made for key, response in before.items() if len((made := response.until(SAVED)).ids)}
    whole = [key for key, response in valid.items() if response.finish_reason]
    assert left and whole and len(whole) < len(valid), "finished and begun ones, of weights that the checkpoint has"
    assert any(len(r.versions) > 1 for r in before.values()), "carried over an update"

    done = start("asd_megatron.cli.main", "train", str(recipe), cwd=world.folder, timeout=240)
    keys.slow(None)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["rollouts/total"] == 12 and row["rollouts/dropped_groups"] == 0 for row in rows)
    rollouts = [example.rollout for step in range(1, STEPS + 1) for example in dump(folder, step).examples]
    assert set(Counter((r.prompt_id, r.sample) for r in rollouts).values()) == {1}, "no problem twice"
    trained = {(r.prompt_id, r.sample): r for r in rollouts}
    kept = {key[1:]: response for key, response in stored(folder / "bank").items()}
    for (_, name, sample), response in valid.items():
        found = [trained.get((name, sample)), kept.get((name, sample))]
        assert any(begins_with(one, response) for one in found), "its ids and log-probs, no other's"
        if response.finish_reason:
            assert any(one is not None and len(one.logprobs) == len(response.ids) for one in found)
    everything, usable = (sum(len(r.ids) for r in found.values()) for found in (before, valid))
    counted = {name: sum(row[f"rollouts/{name}_tokens"] for row in rows) for name in ("restored", "dropped")}
    assert counted == {"restored": usable, "dropped": everything - usable}
    assert rows[SAVED]["rollouts/restored_groups"] > 0 and everything > usable, "weights that are gone made the rest"
    print(
        f"stored {everything} tokens of {len(before)} responses, {len(whole)} finished; used again {usable};"
        f" {done.stderr[done.stderr.index('rollout bank') :].splitlines()[0]}"
    )
    assert {name for _, name in left} <= {name for name, _ in trained} | {name for name, _ in kept}
