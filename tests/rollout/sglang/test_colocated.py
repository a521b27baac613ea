"""Colocated servers whose memory behaves like SGLang's: collector, engine and controller together, with evaluations."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from asd_megatron.records import Group, Problem, SamplingParams
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.draw import Plan
from asd_megatron.rollout.sglang import memory
from tests.rollout.sglang.engine_world import PARAMS, Source, World, finish, servers
from tests.rollout.sglang.fake_sglang import GARBAGE, TAGS, FakeSGLang, made_from
from tests.rollout.sglang.fleets import until
from tests.rollout.test_collector import Problems, Renderer, Verifier
from tests.rollout.toy import prompt

EVALUATION = SamplingParams(n=1, max_new_tokens=4)


class Numbers(Problems):
    """As many problems as are asked for, each step others."""

    def __init__(self) -> None: ...

    def batch(self, step: int, n: int, seed: int) -> list[Problem]:
        return [Problem(prompt_id=chr(ord("A") + n * step + i), answer="", prompt="x") for i in range(n)]


class Loop:
    """A training run with colocated servers, as far as its rollouts go."""

    def __init__(self, process_groups: Any, pair: list[FakeSGLang], closing: ExitStack, **over: Any) -> None:
        plan = over.pop("plan", Plan())
        self.world = World(process_groups, pair, closing, colocated=True, **{"wait_timeout": 20.0, **over})
        self.servers, self.weights = pair, Source(0)
        self.collector = Collector(
            self.world.engine,
            self.weights,
            Verifier(),
            Numbers(),
            Renderer(),
            process_groups,
            params=PARAMS,
            problems_per_step=4,
            seed=0,
            plan=plan,
            timeout=20.0,
        )

    def evaluate(self, step: int) -> None:
        found = self.collector.evaluate(Problems("uvw"), EVALUATION, step=step)
        assert found is not None and len(found.groups) == 3
        self.check(found.groups)

    def step(self, step: int) -> list[Group]:
        groups = self.collector.next(step)
        assert len(groups) == 4
        self.check(groups)
        self.weights.version = step
        return groups

    def check(self, groups: Any) -> None:
        """The responses are the current weights', and the trainer has the memory of every server that lives."""
        for rollout in (rollout for group in groups for rollout in group.rollouts):
            assert rollout.weight_version == self.weights.version
            assert tuple(rollout.response_ids) == tuple(made_from(list(rollout.prompt_ids), len(rollout.response_ids)))
        assert all(server.dead or server.offloaded == TAGS for server in self.servers)
        assert self.world.pool.deferred
        assert [server.died_of for server in self.servers] == [[] for _ in self.servers]


@pytest.fixture
def loop(process_groups: Any, pair: list[FakeSGLang], closing: ExitStack) -> Loop:
    return Loop(process_groups, pair, closing)


def test_evaluations_before_the_first_step_and_after_every_step(loop: Loop) -> None:
    loop.evaluate(0)
    for step in (1, 2, 3):
        loop.step(step)  # step 1 has the version of the evaluation before it
        assert loop.collector.timings.rollout > 0
        assert loop.world.engine.metrics()["servers/serving"] == 2, "as while they generated"
        loop.evaluate(step)
    loop.evaluate(3)
    # every time that memory was released, all weights were sent again
    assert [(n, version) for n, version, _ in loop.world.transport.sent] == [
        (2, v) for v in ("0", "0", "1", "1", "2", "2", "3", "3")
    ]
    assert loop.world.fleet.counters.retried == loop.world.fleet.counters.stale_answers == 0
    assert loop.world.pool.killed == [] and loop.world.pool.counters["restarts"] == 0


def test_partial_rollouts_are_carried_over_released_memory(
    process_groups: Any, pair: list[FakeSGLang], closing: ExitStack
) -> None:
    for server in pair:
        server.delay = 0.3
    loop = Loop(process_groups, pair, closing, plan=Plan(oversampling=1.5, carry=True, max_staleness=4))
    loop.world.engine.load_weights(loop.weights)
    loop.world.engine.release()
    loop.collector._released = True
    groups = loop.collector.next(1)
    assert loop.collector.counts.carried_groups == 2
    loop.evaluate(0)
    loop.weights.version = 1
    groups += loop.collector.next(2)
    assert len(groups) == 8
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        assert GARBAGE not in rollout.response_ids and len(rollout.response_ids) == PARAMS.max_new_tokens
    assert all(server.offloaded == TAGS and not server.died_of for server in pair)


def test_a_failed_transfer_does_not_keep_memory_from_the_trainer(loop: Loop) -> None:
    bad, good = loop.servers
    loop.evaluate(0)
    loop.step(1)
    loop.world.transport.failing = [[bad.url]]
    loop.step(2)  # on the other server, or on both if the weights were sent again meanwhile
    assert loop.world.transport.failing == []
    loop.step(3)
    assert loop.world.engine.metrics()["servers/serving"] == 2
    loop.world.transport.failing = [[bad.url, good.url], [good.url]]
    loop.step(4)
    loop.evaluate(4)
    loop.step(5)
    assert loop.world.pool.killed == []


@pytest.mark.parametrize("path", ["/pause_generation", "/release_memory_occupation", "/resume_memory_occupation"])
def test_a_server_that_does_not_move_its_memory_is_killed_and_restarted(loop: Loop, path: str) -> None:
    bad, _ = loop.servers
    loop.step(1)
    bad.refuse = {path}
    loop.step(2)
    assert loop.world.pool.killed[0] == bad.url and bad.dead
    bad.refuse = set()
    loop.step(3)
    assert not bad.dead and loop.world.pool.counters["restarts"] >= 1
    loop.evaluate(3)
    assert loop.world.engine.metrics()["servers/serving"] == 2


def test_a_server_that_dies_is_restarted_only_while_generation_has_the_devices(loop: Loop) -> None:
    dead, _ = loop.servers
    pool = loop.world.pool
    loop.step(1)
    dead.die()
    assert pool.restarting == [dead.url] and dead.dead, "deferred"
    pool.log.clear()
    loop.step(2)
    assert pool.log == ["allow", "restart", "defer"], "and waited for before the weights are sent"
    assert [(n, version) for n, version, _ in loop.world.transport.sent][-1] == (2, "1")
    for server in loop.servers:
        server.die()
    loop.step(3)
    loop.evaluate(3)
    assert pool.counters["restarts"] == 3


def test_a_server_that_was_restarted_has_all_of_its_memory(loop: Loop) -> None:
    restarted, _ = loop.servers
    loop.step(1)
    restarted.die()
    restarted.restart()
    restarted.posts.clear()
    loop.step(2)
    assert "/resume_memory_occupation" not in restarted.posts and "/load_weights" in restarted.posts


def test_memory_is_released_paused_and_without_a_probe_in_flight(
    process_groups: Any, pair: list[FakeSGLang], closing: ExitStack
) -> None:
    for server in pair:
        server.health_delay = 0.3  # probes are in flight most of the time
    loop = Loop(process_groups, pair, closing)
    for step in (1, 2, 3):
        until(lambda: all(server.probing for server in pair) or loop.collector._released)
        loop.step(step)
    for server in pair:
        assert server.probing_at_release == [0, 0, 0]
        memory_posts = [p for p in server.posts if "memory" in p or "generation" in p or p == "/load_weights"]
        start = memory_posts.index("/release_memory_occupation") - 1
        assert memory_posts[start : start + 7] == [
            "/pause_generation",
            "/release_memory_occupation",
            "/resume_memory_occupation",  # the weights
            "/pause_generation",
            "/load_weights",
            "/resume_memory_occupation",  # the caches, before anything is generated
            "/continue_generation",
        ]


def test_release_and_resume_may_be_repeated(process_groups: Any, pair: list[FakeSGLang], closing: ExitStack) -> None:
    world = World(process_groups, pair, closing, colocated=True, wait_timeout=20.0)
    engine = world.engine
    engine.resume()
    engine.load_weights(Source(1))
    for _ in range(2):
        engine.release()
        engine.release()
        engine.resume()
        engine.resume()
        assert [server.offloaded for server in pair] == [memory.CACHES] * 2
    engine.load_weights(Source(1))
    engine.submit([prompt("a", (1,))], PARAMS, step=1)
    (group,) = finish(engine)
    assert tuple(group.rollouts[0].response_ids) == tuple(made_from([1], 6))
    assert [server.died_of for server in pair] == [[], []]


def test_the_fake_server_dies_of_what_kills_sglang(closing: ExitStack, make_fleet: Any) -> None:
    def died_of(*posts: tuple[str, Any]) -> str:
        (server,) = closing.enter_context(servers(1))
        fleet = make_fleet(server, probe_every=60.0)
        for path, body in posts:
            try:
                fleet.call(server.url, path, body, 5.0)
            except Exception:
                break
        return server.died_of[0] if server.dead else ""

    pause, release, resume = "/pause_generation", "/release_memory_occupation", "/resume_memory_occupation"
    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
    assert "without a pause" in died_of((release, {}))
    assert "twice" in died_of((pause, {}), (release, {}), (release, {"tags": ["weights"]}))
    assert "not released" in died_of((pause, {}), (release, {}), (resume, {}), (resume, {"tags": ["weights"]}))
    assert "without memory" in died_of((pause, {}), (release, {}), ("/continue_generation", {}), ("/generate", body))
    assert "loaded into released" in died_of((pause, {}), (release, {}), ("/load_weights", {}))
    assert died_of((pause, {}), (release, {}), (resume, {})) == ""
