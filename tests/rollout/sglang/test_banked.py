"""What the engine gives to its rollout bank, and when."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.records import SamplingParams
from asd_megatron.rollout import journal
from asd_megatron.rollout.bank import RolloutBank
from asd_megatron.rollout.sglang import engine as engines
from tests.rollout.sglang.engine_world import PARAMS, Source, World, finish, servers
from tests.rollout.sglang.fleets import until
from tests.rollout.toy import prompt


def opened(folder: Path) -> RolloutBank:
    bank = RolloutBank(folder, resumed=1, saved_step=lambda: 1, identity="", say=print)
    bank.begin_step(set(), None)
    return bank


def stored(folder: Path) -> list[tuple[str, int]]:
    """(how it ended, tokens) of the responses in a bank; none for the draws."""
    files = sorted(folder.glob("*.jsonl"))
    return [(r["finish_reason"], len(r["ids"])) for file in files for r in journal.read(file)[0] if "ids" in r]


def test_responses_are_stored_while_nobody_collects_and_not_requested_after_an_abort(
    process_groups: Any, closing: ExitStack, tmp_path: Path
) -> None:
    """As when an evaluation comes between two parts of a carried group."""
    (server,) = closing.enter_context(servers(1))
    world = World(process_groups, [server], closing, bank=opened(tmp_path))
    engine = world.engine
    engine.load_weights(Source(1))
    engine.submit([prompt("a", (1, 2))], PARAMS, step=2)
    until(lambda: stored(tmp_path) == [("length", 6)] * 2)
    engine.suspend()
    engine.abort()
    engine.submit([prompt("x", (9,))], SamplingParams(n=1, max_new_tokens=3), step=-2)
    finish(engine)
    asked = len(server.prompts)
    engine.submit([prompt("a", (1, 2))], PARAMS, step=2)
    (group,) = finish(engine)
    assert len(server.prompts) == asked == 3 and [len(r.response_ids) for r in group.rollouts] == [6, 6]
    assert stored(tmp_path)[:2] == [("length", 6)] * 2, "an evaluation's are not stored"


def test_a_run_that_stops_while_it_waits_keeps_the_tokens_so_far(
    process_groups: Any, closing: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException): ...

    def stop() -> None:
        raise Stop

    monkeypatch.setattr(engines, "TICK_SECONDS", 0.2)
    (server,) = closing.enter_context(servers(1, delay=60.0))
    bank, params = opened(tmp_path), SamplingParams(n=2, max_new_tokens=6000)
    world = World(process_groups, [server], closing, bank=bank, request_timeout=60.0)
    engine = world.engine
    engine._max_positions = 8000
    engine._meeting = stop
    engine.load_weights(Source(1))
    engine.submit([prompt("a", (1, 2))], params, step=2)
    with pytest.raises(Stop):
        engine.collect(30.0)
    assert engine.pending == 0
    bank.close()
    (one, first), (other, second) = stored(tmp_path)
    assert one is None and other is None and 0 < min(first, second) < 6000

    bank = opened(tmp_path)
    server.delay = 0.0
    world = World(process_groups, [server], closing, bank=bank)
    world.engine._max_positions = 8000
    world.engine.load_weights(Source(1))
    world.engine.submit([prompt("a", (1, 2))], params, step=2)
    (group,) = finish(world.engine)
    assert [len(r.response_ids) for r in group.rollouts] == [6000, 6000] and bank.restored_tokens == first + second
    assert sorted(len(ids) for ids in server.prompts[2:]) == sorted((2 + first, 2 + second))
    assert all(r.weight_version == 1 and not r.across_versions for r in group.rollouts)
