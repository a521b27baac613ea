"""The engine over servers that fail on demand: what every rank sees, what is sent again, when it gives up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.records import Group, SamplingParams
from asd_megatron.rollout.engine import RolloutError
from asd_megatron.rollout.sglang.client.fleet import Fleet
from asd_megatron.rollout.sglang.controller import Backend, ServedModel
from asd_megatron.rollout.sglang.engine import SGLangEngine
from asd_megatron.rollout.sglang.grouping import Assembler, Labels
from asd_megatron.rollout.sglang.weight_sync.protocol import Receiver
from tests.distributed.harness import run_ranks
from tests.rollout.sglang.fake_sglang import ADMIN_KEY, API_KEY, FakeSGLang
from tests.rollout.toy import ToyTokenizer, one_process_groups, prompt

PARAMS = SamplingParams(n=2, max_new_tokens=6)
TENSORS = 3


class Source:
    """Weights whose reader says how often they were read, as a rank of the trainer yields them."""

    def __init__(self, version: int = 0, root: bool = True) -> None:
        self.version = version
        self.root = root
        self.readings = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for i in range(TENSORS):
            if self.root:
                yield f"t{i}", torch.full((2,), float(self.version))
        self.readings += 1


class Transport:
    """Delivers at once. `failing`: URLs that do not get the next transmissions, one list each."""

    needs_session = True

    def __init__(self) -> None:
        self.failing: list[list[str]] = []
        self.sent: list[tuple[int, str, int]] = []

    def send(self, receivers: Sequence[Receiver], tensors: Any, label: str) -> dict[str, str]:
        count = len(list(tensors))
        self.sent.append((len(receivers), label.rpartition("-")[2], count))
        bad = self.failing.pop(0) if self.failing else []
        return {r.url: "broken on purpose" for r in receivers if r.url in bad}

    def close(self) -> None: ...


class World:
    """An engine of one rank, or rank 0's, over fake servers."""

    def __init__(self, process_groups: Any, servers: Sequence[FakeSGLang], closing: ExitStack, **over: Any) -> None:
        self.servers, self.transport, self.labels = list(servers), Transport(), Labels("cafe")
        self.fleet = Fleet(
            [s.url for s in servers],
            api_key=API_KEY,
            admin_key=ADMIN_KEY,
            probe_every=0.1,
            probe_timeout=0.5,
            request_timeout=over.pop("request_timeout", 20.0),
            retries=over.pop("retries", 3),
        )
        closing.callback(self.fleet.close)
        settings: dict[str, Any] = {
            "model": ServedModel(("Fake",), 1000),
            "pool": None,
            "verifier": None,
            "tolerance": 0.1,
            "probe_ids": (1, 2),
            "start_timeout": 10.0,
            "wait_timeout": 1.0,
            "colocated": False,
        }
        assembler = Assembler(ToyTokenizer(), 5, self.labels)
        self.backend = Backend(
            self.fleet, self.transport, assembler, self.labels, closing=ExitStack(), **{**settings, **over}
        )
        self.engine = engine_of(process_groups, self.backend)
        self.fleet.connect(10.0)


def engine_of(process_groups: Any, backend: Backend | None) -> SGLangEngine:
    return SGLangEngine(process_groups, backend, probe=None, max_positions=64, end_ids=(0,))


@contextmanager
def servers(number: int, **settings: Any) -> Iterator[list[FakeSGLang]]:
    with ExitStack() as closing:
        made = [FakeSGLang(**settings) for _ in range(number)]
        for server in made:
            closing.callback(server.close)
        yield made


def finish(engine: SGLangEngine, timeout: float = 20.0) -> list[Group]:
    found: list[Group] = []
    while engine.pending:
        found += engine.collect(timeout)
    return found


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def pair(closing: ExitStack) -> list[FakeSGLang]:
    return closing.enter_context(servers(2))


def test_groups_come_whole_with_the_version_that_made_them(process_groups: Any, pair: Any, closing: ExitStack) -> None:
    world = World(process_groups, pair, closing)
    engine, source = world.engine, Source(3)
    engine.load_weights(source)
    assert (engine.weight_version, source.readings, world.transport.sent) == (3, 1, [(2, "3", TENSORS)])
    engine.submit([prompt("a", (1, 2)), prompt("b", (3,))], PARAMS, step=4)
    engine.submit([prompt("c", (4,))], PARAMS, step=4)
    assert engine.pending == 3
    found = {g.problem.prompt_id: g for g in finish(engine)}
    assert set(found) == {"a", "b", "c"} and all(len(g.rollouts) == 2 for g in found.values())
    rollouts = [r for g in found.values() for r in g.rollouts]
    assert all(r.weight_version == 3 and not r.across_versions for r in rollouts)
    assert all(len(r.logprobs) == len(r.response_ids) > 0 and r.text for r in rollouts)
    assert engine.collect(1.0) == []


def test_weights_are_sent_once_and_never_go_back(process_groups: Any, pair: Any, closing: ExitStack) -> None:
    world = World(process_groups, pair, closing)
    engine = world.engine
    engine.load_weights(Source(1))
    engine.load_weights(Source(1))  # every server has them
    assert len(world.transport.sent) == 1
    engine.load_weights(Source(2))
    assert world.transport.sent[-1] == (2, "2", TENSORS)
    with pytest.raises(ValueError, match="never decrease"):
        engine.load_weights(Source(1))


def test_a_server_that_missed_an_update_is_sent_everything_again(
    process_groups: Any, pair: Any, closing: ExitStack
) -> None:
    world = World(process_groups, pair, closing)
    engine, source = world.engine, Source(1)
    world.transport.failing = [[pair[0].url, pair[1].url], [pair[0].url]]
    engine.load_weights(source)
    # both failed, then one got them: that is enough to go on with
    assert [n for n, _, _ in world.transport.sent] == [2, 2] and source.readings == 2
    assert [v.label for v in world.fleet.servers()] == [None, "cafe-1"]
    engine.submit([prompt("a", (1,))], PARAMS, step=1)
    finish(engine)
    engine.load_weights(Source(2))
    assert world.transport.sent[-1] == (2, "2", TENSORS)
    assert [v.label for v in world.fleet.servers()] == ["cafe-2", "cafe-2"]


def test_weights_that_reach_nobody_end_the_run(process_groups: Any, pair: Any, closing: ExitStack) -> None:
    world = World(process_groups, pair, closing)
    world.transport.failing = [[s.url for s in pair]] * 9
    source = Source(7)
    with pytest.raises(RolloutError, match="weights of version 7 reached no server in 3 attempts: .*broken on purpose"):
        world.engine.load_weights(source)
    assert source.readings == 3, "every attempt reads the source to its end"


def test_a_server_that_comes_back_gets_the_weights_before_it_serves(process_groups: Any, closing: ExitStack) -> None:
    pair = closing.enter_context(servers(2, delay=0.3))
    world = World(process_groups, pair, closing, wait_timeout=20.0)
    engine, source = world.engine, Source(1)
    engine.load_weights(source)
    engine.submit([prompt(c, (i + 1,)) for i, c in enumerate("abcdef")], PARAMS, step=1)
    pair[0].die()
    assert len(engine.collect(20.0)) >= 1
    pair[0].restart()
    engine.submit([prompt("g", (9,))], SamplingParams(n=60, max_new_tokens=6), step=1)
    found = finish(engine)
    assert source.readings == 2 and world.transport.sent[1:] == [(1, "1", TENSORS)], "sent to it alone"
    assert all(r.weight_version == 1 for g in found for r in g.rollouts)
    assert world.engine.metrics()["servers/returned"] == 1


def test_when_training_has_moved_on_it_waits_for_the_next_update(process_groups: Any, closing: ExitStack) -> None:
    pair = closing.enter_context(servers(2, delay=0.3))
    world = World(process_groups, pair, closing, wait_timeout=20.0)
    engine, source = world.engine, Source(1)
    engine.load_weights(source)
    pair[0].die()
    engine.submit([prompt(c, (i + 1,)) for i, c in enumerate("abcdef")], PARAMS, step=2)
    source.version = 2  # an update while step 2 is in the making
    engine.collect(20.0)
    pair[0].restart()
    found = finish(engine)
    assert source.readings == 1 and all(r.weight_version == 1 for g in found for r in g.rollouts)
    engine.load_weights(source)
    assert world.transport.sent[-1] == (2, "2", TENSORS)


def test_nobody_left_but_the_newest_weights_for_who_comes_back(process_groups: Any, closing: ExitStack) -> None:
    pair = closing.enter_context(servers(1, delay=1.0))
    world = World(process_groups, pair, closing, wait_timeout=20.0)
    engine, source = world.engine, Source(1)
    engine.load_weights(source)
    engine.submit([prompt("a", (1,))], PARAMS, step=2)
    source.version = 2
    pair[0].die()
    pair[0].restart()
    (group,) = finish(engine)
    assert engine.weight_version == 2 and {r.weight_version for r in group.rollouts} == {2}


def test_all_servers_gone(process_groups: Any, closing: ExitStack) -> None:
    pair = closing.enter_context(servers(2, delay=2.0))
    world = World(process_groups, pair, closing)
    engine = world.engine
    engine.load_weights(Source(1))
    engine.submit([prompt("a", (1,))], PARAMS, step=1)
    for server in pair:
        server.die()
    with pytest.raises(RolloutError, match=f"no server has been usable for 1 s.*{pair[1].url}: .*resume the run"):
        finish(engine)
    assert engine.pending == 0
    with pytest.raises(RolloutError, match="no server could be reached for 1 s"):
        engine.load_weights(Source(2))


def test_nothing_finished_in_time(process_groups: Any, pair: Any, closing: ExitStack) -> None:
    for server in pair:
        server.always = "hang"
    world = World(process_groups, pair, closing)
    world.engine.load_weights(Source(1))
    world.engine.submit([prompt("a", (1,))], PARAMS, step=1)
    with pytest.raises(RolloutError, match="no group was finished within 1 s"):
        world.engine.collect(1.0)
    assert world.engine.pending == 0


def test_what_was_suspended_goes_on_under_new_weights(process_groups: Any, closing: ExitStack) -> None:
    pair = closing.enter_context(servers(2, delay=1.0))
    world = World(process_groups, pair, closing)
    engine = world.engine
    engine.load_weights(Source(1))
    engine.submit([prompt("a", (1,)), prompt("b", (2,))], PARAMS, step=1)
    engine.suspend()
    assert engine.pending == 2
    engine.load_weights(Source(2))
    engine.submit([], PARAMS, step=2)
    found = finish(engine)
    assert {g.problem.prompt_id for g in found} == {"a", "b"} and engine.pending == 0
    assert all(r.weight_version in (1, 2) and len(r.response_ids) == 6 for g in found for r in g.rollouts)


def test_abort_forgets(process_groups: Any, pair: Any, closing: ExitStack) -> None:
    world = World(process_groups, pair, closing)
    world.engine.load_weights(Source(1))
    world.engine.submit([prompt("a", (1,))], PARAMS, step=1)
    world.engine.abort()
    world.engine.submit([prompt("b", (2,))], PARAMS, step=1)
    assert [g.problem.prompt_id for g in finish(world.engine)] == ["b"]


def test_memory_goes_away_and_comes_back_around_the_weights(process_groups: Any, pair: Any, closing: ExitStack) -> None:
    world = World(process_groups, pair, closing, colocated=True)
    engine = world.engine
    engine.load_weights(Source(1))
    for server in pair:
        server.posts.clear()
    engine.release()
    engine.release()
    engine.resume()
    engine.load_weights(Source(2))
    for server in pair:
        memory = [p for p in server.posts if "memory" in p or p in ("/end_weight_update", "/continue_generation")]
        assert memory == [
            "/release_memory_occupation",
            "/resume_memory_occupation",  # the weights
            "/end_weight_update",
            "/resume_memory_occupation",  # the cache, before anything is generated
            "/continue_generation",
        ]
    engine.submit([prompt("a", (1,))], PARAMS, step=1)
    finish(engine)


def test_a_colocated_server_that_died_meanwhile_keeps_nobody_waiting(
    process_groups: Any, pair: Any, closing: ExitStack
) -> None:
    world = World(process_groups, pair, closing, colocated=True, wait_timeout=20.0)
    engine = world.engine
    engine.load_weights(Source(1))
    engine.release()
    pair[0].die()
    pair[0].restart()  # with all of its memory
    pair[1].die()
    pair[0].posts.clear()
    engine.resume()
    engine.load_weights(Source(2))
    assert "/resume_memory_occupation" not in pair[0].posts
    engine.submit([prompt("a", (1,))], PARAMS, step=1)
    (group,) = finish(engine)
    assert {r.weight_version for r in group.rollouts} == {2}


def test_prompts_and_end_tokens_that_cannot_be_served(process_groups: Any, pair: Any, closing: ExitStack) -> None:
    engine = World(process_groups, pair, closing).engine
    engine.load_weights(Source(1))
    with pytest.raises(UserError, match=r"problem a: its prompt has 60 tokens.*takes 1 to 58.*max_response_tokens"):
        engine.submit([prompt("a", (1,) * 60)], PARAMS, step=1)
    stops = SamplingParams(n=1, max_new_tokens=4, stop_token_ids=(5,))
    with pytest.raises(UserError, match=r"leaves out the model's end tokens \[0\]"):
        engine.submit([prompt("a", (1,))], stops, step=1)


def test_another_model_is_refused(process_groups: Any, pair: Any, closing: ExitStack) -> None:
    world = World(process_groups, pair, closing, model=ServedModel(("Qwen3ForCausalLM",), 1000))
    with pytest.raises(RolloutError, match="serves a Fake and the trainer trains a Qwen3ForCausalLM"):
        world.engine.start()


def _two_ranks(rank: int) -> list[Any]:
    groups = one_process_groups()
    with ExitStack() as closing:
        made = closing.enter_context(servers(2, delay=0.5)) if rank == 0 else []
        world = World(groups, made, closing) if rank == 0 else None
        engine = world.engine if world is not None else engine_of(groups, None)
        source = Source(1, root=rank == 0)
        engine.load_weights(source)
        engine.submit([prompt("a", (1,)), prompt("b", (2,))], PARAMS, step=1)
        said: list[Any] = [len(finish(engine)), engine.pending, source.readings]
        if world is not None:
            world.transport.failing = [[s.url for s in made]]
        source.version = 2
        engine.load_weights(source)
        said += [source.readings, engine.weight_version, len(engine.metrics()) > 0]
        engine.submit([prompt("c", (1,))], PARAMS, step=2)
        for server in made:
            server.die()
        for action in (lambda: finish(engine), lambda: engine.load_weights(Source(3, root=rank == 0))):
            try:
                action()
            except RolloutError as error:
                said.append(str(error)[:25])
        return said


def test_every_rank_sees_the_same() -> None:
    first, second = run_ranks(_two_ranks, 2, timeout=100)
    assert first == [2, 0, 1, 3, 2, True, "no server has been usable", "no server could be reache"]
    assert second == [0, 0, 1, 3, 2, False, "no server has been usable", "no server could be reache"]
