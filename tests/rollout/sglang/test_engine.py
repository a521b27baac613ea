"""The engine over servers that fail on demand: what every rank sees, what is sent again, when it gives up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.records import SamplingParams
from asd_megatron.rollout.engine import RolloutError
from asd_megatron.rollout.sglang.client.routing import Routing
from asd_megatron.rollout.sglang.controller import ServedModel
from asd_megatron.rollout.sglang.weight_sync import synchronise
from asd_megatron.rollout.sglang.weight_sync.protocol import VerificationError
from tests.distributed.harness import run_ranks
from tests.rollout.sglang.engine_world import PARAMS, TENSORS, Source, World, engine_of, finish, servers
from tests.rollout.sglang.fleets import until
from tests.rollout.toy import one_process_groups, prompt


def test_groups_are_complete_and_of_the_version_that_generated_them(
    process_groups: Any, pair: Any, closing: ExitStack
) -> None:
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


def test_servers_that_return_no_routed_experts_are_refused(process_groups: Any, pair: Any, closing: ExitStack) -> None:
    routing = Routing(layers=2, experts=4, per_token=1)
    pair[0].routing = routing
    world = World(process_groups, pair, closing, model=ServedModel(("Fake",), 1000, routing))
    world.controller._takes = lambda url, token: token < 1000  # type: ignore[method-assign]
    with pytest.raises(UserError, match=f"{pair[1].url} does not return.* --enable-return-routed-experts"):
        world.controller.start()
    pair[1].routing = routing
    world.controller.start()


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
    engine.load_weights(source)
    source.version = 2
    world.transport.failing = [[pair[0].url, pair[1].url], [pair[0].url]]
    engine.load_weights(source)
    # both failed, then one has the weights, which is enough for an update that is not the first
    assert [n for n, _, _ in world.transport.sent] == [2, 2, 2] and source.readings == 3
    assert [v.label for v in world.fleet.servers()] == [None, "cafe-2"]
    engine.submit([prompt("a", (1,))], PARAMS, step=2)
    finish(engine)
    engine.load_weights(Source(3))
    assert world.transport.sent[-1] == (2, "3", TENSORS)
    assert [v.label for v in world.fleet.servers()] == ["cafe-3", "cafe-3"]


def test_the_first_update_must_reach_every_server(process_groups: Any, pair: Any, closing: ExitStack) -> None:
    world = World(process_groups, pair, closing)
    source = Source(4)
    world.transport.failing = [[pair[0].url]]
    world.engine.load_weights(source)
    assert [n for n, _, _ in world.transport.sent] == [2, 1], "the second attempt is for the one that failed"
    assert [v.label for v in world.fleet.servers()] == ["cafe-4", "cafe-4"]
    world = World(process_groups, pair, closing)
    world.transport.failing = [[pair[0].url]] * 9
    with pytest.raises(RolloutError, match=f"version 4.*every server.*3 attempts: {pair[0].url}: broken on pur") as e:
        world.engine.load_weights(source)
    assert pair[1].url not in str(e.value) and source.readings == 5
    world = World(process_groups, pair, closing)
    pair[1].die()
    until(lambda: not world.fleet.servers()[1].healthy)
    with pytest.raises(RolloutError, match=f"not every server.*server_wait_timeout.*{pair[1].url}: "):
        world.engine.load_weights(source)


def test_a_server_that_did_not_answer_once_is_sent_to_again(
    process_groups: Any, pair: Any, closing: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synchronise, "ALIVE_SECONDS", 0.2)
    world = World(process_groups, pair, closing)
    world.engine.load_weights(Source(1))
    world.transport.failing = [[pair[0].url]]
    pair[0].slow_posts = 0.5
    world.engine.load_weights(Source(2))
    pair[0].slow_posts = 0.0
    probed = time.monotonic()
    until(lambda: world.fleet.servers()[0].probed > probed)
    assert world.fleet.counters.ejected == 0
    world.engine.load_weights(Source(3))
    assert [v.label for v in world.fleet.servers()] == ["cafe-3", "cafe-3"]


def test_weights_that_reach_nobody_end_the_run(process_groups: Any, pair: Any, closing: ExitStack) -> None:
    world = World(process_groups, pair, closing)
    world.transport.failing = [[s.url for s in pair]] * 9
    source = Source(7)
    with pytest.raises(RolloutError, match="weights of version 7 did not reach .* in 3 attempts: .*broken on purpose"):
        world.engine.load_weights(source)
    assert source.readings == 3, "every attempt reads the source to its end"


class Matrices(Source):
    """A norm and a matrix of a decoder layer."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield "model.layers.0.input_layernorm.weight", torch.ones(128, dtype=torch.bfloat16)
        yield "model.layers.0.mlp.down_proj.weight", torch.ones(128, 256, dtype=torch.bfloat16)
        self.readings += 1


def test_quantised_servers_are_sent_values_and_scales(process_groups: Any, pair: Any, closing: ExitStack) -> None:
    world, source = World(process_groups, pair, closing, quantize=True), Matrices(1)
    world.engine.load_weights(source)
    assert world.transport.kinds == {
        "model.layers.0.input_layernorm.weight": torch.bfloat16,
        "model.layers.0.mlp.down_proj.weight": torch.float8_e4m3fn,
        "model.layers.0.mlp.down_proj.weight_scale_inv": torch.float32,
    }
    assert source.readings == 1 and [v.label for v in world.fleet.servers()] == ["cafe-1", "cafe-1"]
    world.transport.failing = [[s.url for s in pair]] * 9  # as a server that serves bfloat16 refuses the scales
    with pytest.raises(RolloutError, match="they have to serve a block-wise FP8 model"):
        world.engine.load_weights(Matrices(2))


def test_deltas_go_to_servers_with_their_base_and_a_wrong_one_is_followed_by_all_weights(
    process_groups: Any, pair: Any, closing: ExitStack
) -> None:
    class Verifier:
        probe, wrong = None, False

        def watch(self, tensors: Any, receivers: Any) -> Any:
            return tensors

        def check(self, receiver: Any, timeout: float) -> int:
            if self.wrong:
                self.wrong = False
                raise VerificationError(f"{receiver.url} has other weights than it was sent")
            return 1

    verifier: Any = Verifier()
    world = World(process_groups, pair, closing, full_every=9, verifier=verifier, wait_timeout=20.0)
    world.controller._takes = lambda url, token: token < 1000  # type: ignore[method-assign]
    pair[1].takes_deltas = False
    with pytest.raises(UserError, match=f"{pair[1].url} does not take deltas .* start it with `asd-megatron serve`"):
        world.controller.start()
    pair[1].takes_deltas = True
    world.controller.start()

    def update(source: Source) -> bool:
        world.engine.load_weights(source)
        assert [view.label for view in world.fleet.servers()] == [f"cafe-{source.version}"] * 2
        return world.deltas.full

    assert update(Source(1)) and not update(Source(2))
    assert world.engine.metrics()["weight_sync/changed"] == 1.0  # all elements of this delta
    pair[0].label = "default"  # it was restarted, and no probe has noticed
    assert update(Source(3)) and not update(Source(4))
    verifier.wrong, source = True, Source(5)
    assert update(source) and source.readings == 2 and not update(Source(6))
    pair[0].takes_deltas = False
    assert update(Source(7))
    verifier.wrong = True
    with pytest.raises(RolloutError, match="has other weights"):  # after all weights there is nothing left to try
        world.engine.load_weights(Source(8))


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
    source.version = 2  # an update while step 2 is in flight
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
    with pytest.raises(RolloutError, match=r"within 1 s \(rollout.collect_timeout\)"):
        world.engine.collect(1.0)
    assert world.engine.pending == 0


def test_suspended_responses_continue_under_new_weights(process_groups: Any, closing: ExitStack) -> None:
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


def _asked_to_stop(rank: int) -> list[Any]:
    groups, meetings = one_process_groups(), iter(range(9))

    def meeting() -> None:
        if next(meetings) == 1:
            raise KeyboardInterrupt

    with ExitStack() as closing:
        world = None
        if rank == 0:
            pair = closing.enter_context(servers(2))
            world = World(groups, pair, closing)
        engine = world.engine if world is not None else engine_of(groups, None)
        engine._meeting = meeting
        engine.load_weights(Source(1, root=rank == 0))
        for server in pair if rank == 0 else ():
            server.always = "hang"
        engine.submit([prompt("a", (1,))], PARAMS, step=1)
        with pytest.raises(KeyboardInterrupt):
            engine.collect(60.0)
        return [engine.pending, next(meetings)]


def test_what_a_meeting_raises_gives_up_the_generation() -> None:
    """On all ranks, while all servers hang."""
    assert run_ranks(_asked_to_stop, 2, timeout=60) == [[0, 2]] * 2


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
