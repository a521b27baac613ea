"""The fleet on two real SGLang servers: what they answer, and what is left when one of them dies or hangs."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.client.fleet import Fleet
from asd_megatron.rollout.sglang.client.scheduling import SampleRequest, SampleResult
from asd_megatron.rollout.sglang.servers.options import free_port, router_command, secret_arguments, server_environment
from asd_megatron.rollout.sglang.servers.process import ServerProcess
from tests.rollout.sglang import fleets
from tests.rollout.sglang.fake_environment import group_members
from tests.rollout.sglang.fleets import once_each
from tests.rollout.sglang.sglang_world import SGLangWorld, server_options

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

END = 1  # the model's end token
TOLERANCE = 1e-4
LABEL = "0a1b2c3d-7"
Build = Callable[..., Fleet]


@pytest.fixture(scope="module")
def reference(sglang_world: SGLangWorld) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(sglang_world.folder, dtype=torch.float32)


@pytest.fixture
def build(sglang_pair: SGLangWorld) -> Iterator[Build]:
    """A connected fleet of the pair, both admitted under `LABEL`."""
    made = []

    def make(**options: Any) -> Fleet:
        defaults: dict[str, Any] = {"max_concurrent": 8, "request_timeout": 120.0, "probe_every": 1.0}
        keys = {"api_key": sglang_pair.api_key, "admin_key": sglang_pair.admin_key}
        fleet = Fleet(sglang_pair.urls, **{**defaults, **keys, **options})
        made.append(fleet)
        fleet.connect(60.0)
        for url in sglang_pair.urls:
            fleet.call(url, "/update_weight_version", {"new_version": LABEL}, 30.0)
            fleet.admit(url, LABEL)
        return fleet

    yield make
    for fleet in made:
        fleet.close()


def requests(groups: int, samples: int, **sampling: Any) -> list[SampleRequest]:
    params = {"max_new_tokens": 24, "temperature": 1.0, **sampling}
    return [
        SampleRequest((g, s), g, tuple(5 + (g * 7 + i) % 50 for i in range(6)), params)
        for g in range(groups)
        for s in range(samples)
    ]


def gather(fleet: Fleet) -> list[SampleResult]:
    return fleets.gather(fleet, 180.0)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    fleets.until(condition, seconds)


def off(reference: Any, results: list[SampleResult], asked: list[SampleRequest], temperature: float = 1.0) -> float:
    """Largest difference between the log-probs and those of Hugging Face at `temperature`, no filter applied."""
    prompts = {r.key: list(r.input_ids) for r in asked}
    worst = 0.0
    for result in results:
        ids = prompts[result.key] + list(result.output_ids)
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0, len(prompts[result.key]) - 1 : -1] / temperature
        expected = logits.log_softmax(-1).gather(1, torch.tensor(result.output_ids)[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(result.logprobs)).abs().max().item())
    return worst


# ---------------------------------------------------------------------- answers


def test_samples_agree_with_hugging_face_and_are_balanced(build: Build, reference: Any) -> None:
    fleet = build()
    asked = requests(6, 3)
    fleet.submit(asked)
    results = gather(fleet)
    once_each(results, asked)
    assert off(reference, results, asked) < TOLERANCE
    assert {r.spans for r in results} == {((0, LABEL),)}
    assert set(Counter(r.url for r in results).values()) == {9}
    assert {view.reported for view in fleet.servers()} <= {LABEL, "default"}
    assert [view.tensor_parallel for view in fleet.servers()] == [1, 1]
    for result in results:  # an end token is part of the response
        assert (END in result.output_ids) == (result.finish_reason == "stop")
        assert END not in result.output_ids[:-1]
        assert result.finish_reason == "stop" or len(result.output_ids) == 24
    assert {r.finish_reason for r in results} == {"stop", "length"}


@pytest.mark.parametrize(
    ("sampling", "temperature"),
    [
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 0.7, "top_p": 0.5}, 0.7),
        ({"temperature": 1.3, "top_k": 3}, 1.3),
        ({"temperature": 0.0}, 1.0),
    ],
    ids=["temperature", "top_p", "top_k", "greedy"],
)
def test_log_probs_are_those_after_temperature_and_before_filters(
    build: Build, reference: Any, sampling: dict[str, Any], temperature: float
) -> None:
    fleet = build()
    asked = requests(2, 2, **sampling)
    fleet.submit(asked)
    assert off(reference, gather(fleet), asked, temperature) < TOLERANCE


def test_stop_tokens_end_a_response_and_belong_to_it(build: Build) -> None:
    fleet = build()
    stops = list(range(5, 30))
    asked = requests(2, 4, stop_token_ids=stops)
    fleet.submit(asked)
    ended = [r for r in gather(fleet) if r.finish_reason == "stop"]
    assert ended
    assert all(r.output_ids[-1] in (*stops, END) for r in ended)
    assert all(not set(r.output_ids[:-1]) & {*stops, END} for r in ended)


def test_a_prompt_that_the_model_cannot_take_is_refused_once_and_for_all(build: Build) -> None:
    fleet = build()
    fleet.submit([SampleRequest("long", "long", tuple(range(5, 55)) * 4, {"max_new_tokens": 4})])
    with pytest.raises(UserError, match="400"):
        while True:
            fleet.wait(10.0)
    fleet.abort(keep_partial=False)
    asked = requests(1, 1)
    fleet.submit(asked)
    once_each(gather(fleet), asked)


def test_wrong_keys(sglang_pair: SGLangWorld) -> None:
    for wrong, variable in (("api_key", "ASD_MEGATRON_API_KEY"), ("admin_key", "ASD_MEGATRON_ADMIN_KEY")):
        keys = {"api_key": sglang_pair.api_key, "admin_key": sglang_pair.admin_key, wrong: "no"}
        with Fleet(sglang_pair.urls, **keys) as fleet, pytest.raises(UserError, match=variable):  # type: ignore[arg-type]
            fleet.connect(30.0)


# ---------------------------------------------------------------------- interruptions


def test_generation_goes_on_after_a_pause_with_other_weights(build: Build, sglang_pair: SGLangWorld) -> None:
    """The label alone changes: the spans tell where, and nothing is retried."""
    fleet = build()
    sglang_pair.slow(0.02)
    asked = requests(2, 4, max_new_tokens=100, ignore_eos=True)
    fleet.submit(asked)
    until(lambda: sum(view.in_flight for view in fleet.servers()) == 8)
    time.sleep(0.3)
    with fleet.updating("0a1b2c3d-8"):
        for url in sglang_pair.urls:
            fleet.call(url, "/pause_generation", {"mode": "retract"}, 30.0)
            fleet.call(url, "/flush_cache", {}, 30.0)
            fleet.call(url, "/update_weight_version", {"new_version": "0a1b2c3d-8", "abort_all_requests": False}, 30.0)
            fleet.call(url, "/continue_generation", {}, 30.0)
        for url in sglang_pair.urls:
            fleet.admit(url, "0a1b2c3d-8")
    results = gather(fleet)
    once_each(results, asked)
    assert fleet.counters.retried == fleet.counters.stale_answers == 0
    assert {r.finish_reason for r in results} == {"length"}
    across = [r for r in results if len(r.spans) > 1]
    assert across
    assert all([label for _, label in r.spans] == [LABEL, "0a1b2c3d-8"] for r in across)
    assert all(0 < r.spans[1][0] < 100 for r in across)


def test_partial_responses_of_an_abort(build: Build, reference: Any, sglang_pair: SGLangWorld) -> None:
    fleet = build(max_concurrent=4)
    sglang_pair.slow(0.02)
    asked = requests(2, 6, max_new_tokens=110, ignore_eos=True)
    fleet.submit(asked)
    until(lambda: sum(view.in_flight for view in fleet.servers()) == 8)
    time.sleep(0.3)
    began = time.monotonic()
    results = fleet.abort(keep_partial=True)
    assert time.monotonic() - began < 20.0
    once_each(results, asked)
    partial = [r for r in results if r.finish_reason == "abort" and len(r.output_ids)]
    assert partial
    assert all(len(r.output_ids) < 110 for r in partial)
    assert off(reference, partial, asked) < TOLERANCE
    fleet.submit(asked)  # nothing of the old ones is left
    once_each(gather(fleet), asked)


def test_a_hung_scheduler_is_found_out_and_comes_back(build: Build, sglang_pair: SGLangWorld) -> None:
    fleet = build(probe_timeout=4.0)
    sglang_pair.slow(0.02)
    asked = requests(4, 4, max_new_tokens=80, ignore_eos=True)
    fleet.submit(asked)
    until(lambda: fleet.servers()[0].in_flight > 0)
    scheduler = _scheduler(sglang_pair.pids[0])
    os.kill(scheduler, signal.SIGSTOP)
    try:
        results = gather(fleet)
        once_each(results, asked)
        assert {r.finish_reason for r in results} == {"length"}
        hung = fleet.servers()[0]
        assert not hung.healthy
        assert hung.reason
    finally:
        os.kill(scheduler, signal.SIGCONT)
    until(lambda: fleet.servers()[0].healthy)
    assert fleet.servers()[0].label is None
    assert fleet.counters.ejected == fleet.counters.returned == 1


def test_both_behind_a_router(build: Build, reference: Any, sglang_pair: SGLangWorld, tmp_path: Path) -> None:
    with running_router(sglang_pair, tmp_path / "router.log") as url:
        fleet = build(router_url=url)
        one, two = sglang_pair.urls
        for server, label in ((one, "one-1"), (two, "two-1")):  # to see who answered
            fleet.call(server, "/update_weight_version", {"new_version": label}, 30.0)
            fleet.admit(server, label)
        asked = requests(12, 2)
        fleet.submit(asked)
        results = gather(fleet)
        once_each(results, asked)
        assert off(reference, results, asked) < TOLERANCE
        assert {r.url for r in results} == {url}
        assert {label for r in results for _, label in r.spans} == {"one-1", "two-1"}
        fleet.withdraw(two, "other weights")
        fleet.call(two, "/update_weight_version", {"new_version": "two-2"}, 30.0)
        again = requests(12, 2)
        fleet.submit(again)
        results = gather(fleet)
        once_each(results, again)
        assert {label for r in results for _, label in r.spans} == {"one-1"}
        assert fleet.counters.stale_answers > 0


def test_killed_in_mid_generation(build: Build, reference: Any, sglang_pair: SGLangWorld) -> None:
    """The other server makes its samples again; nothing of it is left, and the pool starts it again at its address."""
    fleet = build()
    sglang_pair.slow(0.02)
    asked = requests(6, 4, max_new_tokens=80, ignore_eos=True)
    fleet.submit(asked)
    until(lambda: fleet.servers()[0].in_flight > 0)
    time.sleep(0.2)
    pool, urls, (pid, survivor) = sglang_pair.pool, sglang_pair.urls, sglang_pair.pids
    deaths, members = pool.counters["deaths"], group_members(pid)
    assert len(members) >= 4  # server, scheduler, detokenizer, watcher
    os.kill(pid, signal.SIGKILL)
    results = gather(fleet)
    until(lambda: pool.counters["deaths"] == deaths + 1)
    until(lambda: not set(members) & set(group_members(pid)), 20.0)
    once_each(results, asked)
    assert {r.finish_reason for r in results} == {"length"}
    assert off(reference, results, asked) < TOLERANCE
    assert any(r.attempts > 1 for r in results)
    assert fleet.servers()[0].label is None
    until(lambda: fleet.servers()[0].healthy, 240.0)  # the pool has started it again
    back = fleet.servers()[0]
    assert (back.label, back.reported) == (None, "default")
    assert sglang_pair.urls == urls and sglang_pair.pids[1] == survivor
    fleet.submit(asked[:4])
    assert {r.url for r in gather(fleet)} == {sglang_pair.urls[1]}


@contextmanager
def running_router(world: SGLangWorld, log: Path) -> Iterator[str]:
    """The URL of an sglang-router before the pair."""
    at = server_options(world.folder, port=free_port("127.0.0.1"), admin_key="")
    process = ServerProcess(
        "router",
        router_command(at, world.urls, free_port("127.0.0.1", {at.port}), 60.0),
        url=f"http://127.0.0.1:{at.port}",
        log=log,
        secret=secret_arguments(at),
        environment=server_environment(at, os.environ),
        health="/readiness",
    )
    process.start()
    try:
        until(process.healthy)
        yield process.url
    finally:
        process.stop(5.0)


def _scheduler(pid: int) -> int:
    """The process among the server's that runs the model."""
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        for candidate in child.read_text().split():
            if Path(f"/proc/{candidate}/cmdline").read_bytes().startswith(b"sglang::scheduler"):
                return int(candidate)
    raise AssertionError(f"{pid} has no scheduler")
