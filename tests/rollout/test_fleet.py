"""Rules of the fleet, on fake servers that fail on demand."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.rollout.fleet import Fleet
from asd_megatron.rollout.scheduling import SampleRequest, SampleResult
from asd_megatron.rollout.sglang_api import ServerError
from tests.rollout.fake_sglang import ADMIN_KEY, API_KEY, FakeSGLang, made_from

LABEL = "tag-1"
Make = Callable[..., Fleet]


@pytest.fixture
def pair() -> Iterator[tuple[FakeSGLang, FakeSGLang]]:
    servers = FakeSGLang(label=LABEL), FakeSGLang(label=LABEL)
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def make() -> Iterator[Make]:
    """Fleets that are closed afterwards; with admitted servers unless told otherwise."""
    fleets = []

    def build(*servers: FakeSGLang, admit: bool = True, **options: Any) -> Fleet:
        defaults: dict[str, Any] = {
            "max_concurrent": 4,
            "request_timeout": 5.0,
            "probe_every": 0.1,
            "probe_timeout": 5.0,
        }
        fleet = Fleet([s.url for s in servers], api_key=API_KEY, admin_key=ADMIN_KEY, **{**defaults, **options})
        fleets.append(fleet)
        if admit:
            fleet.connect(5.0)
            for server in servers:
                fleet.admit(server.url, server.label)
        return fleet

    yield build
    for fleet in fleets:
        fleet.close()


def requests(groups: int, samples: int, tokens: int = 4) -> list[SampleRequest]:
    return [
        SampleRequest((g, s), g, (g + 1, s + 1), {"max_new_tokens": tokens})
        for g in range(groups)
        for s in range(samples)
    ]


def gather(fleet: Fleet, seconds: float = 10.0) -> list[SampleResult]:
    """Everything pending, or a failure."""
    results, deadline = [], time.monotonic() + seconds
    while fleet.pending:
        assert time.monotonic() < deadline, f"{fleet.pending} samples missing, {fleet.servers()}"
        results += fleet.wait(0.5)
    assert fleet.wait(0.0) == []
    return results


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.01)


def check_whole(results: list[SampleResult], asked: list[SampleRequest]) -> None:
    """Each sample once, with its own answer."""
    assert Counter(r.key for r in results) == Counter(r.key for r in asked)
    inputs = {r.key: r for r in asked}
    for result in results:
        request = inputs[result.key]
        assert result.finish_reason == "length"
        assert result.output_ids == tuple(made_from(list(request.input_ids), request.sampling["max_new_tokens"]))
        assert len(result.logprobs) == len(result.output_ids)


# ---------------------------------------------------------------------- going straight


def test_every_sample_once_balanced_and_bounded(pair: Any, make: Make) -> None:
    for server in pair:
        server.delay = 0.02
    fleet = make(*pair)
    asked = requests(8, 4)
    fleet.submit(asked)
    assert fleet.pending == 32
    results = gather(fleet)
    check_whole(results, asked)
    assert {r.spans for r in results} == {((0, LABEL),)}
    assert min(Counter(r.url for r in results)[server.url] for server in pair) >= 8
    for group in range(8):
        assert len({r.url for r in results if r.key[0] == group}) == 1
    assert max(server.most_running for server in pair) <= 4
    assert fleet.counters.retried == 0


def test_finished_samples_come_while_others_run(pair: Any, make: Make) -> None:
    pair[0].faults.append("slow")
    fleet = make(pair[0])
    fleet.submit(requests(1, 3))
    assert len(fleet.wait(5.0)) < 3
    gather(fleet)


def test_keys_are_unique_among_pending(pair: Any, make: Make) -> None:
    fleet = make(pair[0])
    asked = requests(1, 2)
    with pytest.raises(ValueError, match="unique"):
        fleet.submit([asked[0], asked[0]])
    pair[0].delay = 0.1
    fleet.submit(asked)
    with pytest.raises(ValueError, match="unique"):
        fleet.submit(asked[:1])
    gather(fleet)
    fleet.submit(asked)
    check_whole(gather(fleet), asked)


def test_waiting_for_nothing_returns_at_once(pair: Any, make: Make) -> None:
    fleet = make(pair[0])
    began = time.monotonic()
    assert fleet.wait(10.0) == []
    assert time.monotonic() - began < 1.0


# ---------------------------------------------------------------------- attempts that fail


@pytest.mark.parametrize("fault", ["reset", "500", "abort", "malformed", "nan", "label", "mixed"])
def test_a_failed_attempt_is_made_again_elsewhere(pair: Any, make: Make, fault: str) -> None:
    pair[0].faults.append(fault)
    fleet = make(*pair)
    asked = requests(2, 2)
    fleet.submit(asked)
    results = gather(fleet)
    check_whole(results, asked)
    again = [r for r in results if r.attempts > 1]
    assert [r.url for r in again] == [pair[1].url]
    assert fleet.counters.retried == 1
    assert fleet.counters.stale_answers == (fault in ("label", "mixed"))


def test_a_label_that_is_admitted_but_incomplete_never_counts(pair: Any, make: Make) -> None:
    pair[0].label = "tag-2-incomplete"
    fleet = make(pair[0], probe_every=60.0, retries=0)
    fleet.submit(requests(1, 1))
    assert [r.finish_reason for r in gather(fleet)] == ["abort"]
    assert fleet.counters.stale_answers == 1


def test_deadline(pair: Any, make: Make) -> None:
    pair[0].faults.append("hang")
    fleet = make(*pair, request_timeout=0.3)
    asked = requests(2, 2)
    fleet.submit(asked)
    check_whole(gather(fleet), asked)
    assert fleet.counters.deadline == 1
    until(lambda: pair[0].cancelled == 1)  # the connection is closed, so the server stops


def test_busy_is_no_failure(pair: Any, make: Make) -> None:
    pair[0].faults.extend(["503"] * 6)
    fleet = make(pair[0], retries=0)
    asked = requests(1, 4)
    fleet.submit(asked)
    check_whole(gather(fleet), asked)
    assert fleet.counters.ejected == 0


def test_busy_for_longer_than_a_sample_may_take_is_one(pair: Any, make: Make) -> None:
    pair[0].always = "503"
    fleet = make(pair[0], retries=0, request_timeout=0.3)
    fleet.submit(requests(1, 1))
    assert [r.finish_reason for r in gather(fleet)] == ["abort"]


def test_given_up_after_the_retries(pair: Any, make: Make) -> None:
    fleet = make(pair[0], retries=2)
    pair[0].always = "abort"

    asked = requests(1, 1)
    fleet.submit(asked)
    results: list[SampleResult] = []
    while fleet.pending:
        results += fleet.wait(0.2)
        for view in fleet.servers():  # ejected after two failures: the caller admits it again
            if view.healthy and view.label is None:
                fleet.admit(view.url, LABEL)
    assert results == [SampleResult((0, 0), attempts=3)]
    assert len(pair[0].prompts) == 3
    assert fleet.counters.given_up == 1


def test_what_a_server_refuses_is_raised_and_not_tried_again(pair: Any, make: Make) -> None:
    fleet = make(pair[0])
    pair[0].always = "400"
    fleet.submit(requests(3, 4))
    for _ in range(2):
        with pytest.raises(UserError, match="status 400"):
            fleet.wait(5.0)
    time.sleep(0.3)
    assert len(pair[0].prompts) <= 4
    fleet.abort(keep_partial=False)
    pair[0].always = ""
    again = requests(1, 4)
    fleet.submit(again)
    check_whole(gather(fleet), again)


# ---------------------------------------------------------------------- servers come and go


def test_a_server_that_dies_loses_nothing(pair: Any, make: Make) -> None:
    for server in pair:
        server.delay = 0.05
    fleet = make(*pair)
    asked = requests(10, 4)
    fleet.submit(asked)
    results = fleet.wait(5.0)
    pair[0].die()
    results += gather(fleet)
    check_whole(results, asked)
    dead, alive = fleet.servers()
    assert (dead.healthy, dead.label, alive.label) == (False, None, LABEL)
    assert dead.reason
    assert fleet.counters.ejected == 1


def test_it_returns_without_weights_and_serves_when_admitted(pair: Any, make: Make) -> None:
    fleet = make(*pair)
    pair[0].die()
    until(lambda: not fleet.servers()[0].healthy)
    pair[0].restart()
    until(lambda: fleet.servers()[0].healthy)
    view = fleet.servers()[0]
    assert (view.label, view.reported, view.version, view.tensor_parallel) == (None, "default", "0.5.23", 2)
    fleet.submit(requests(4, 2))
    assert {r.url for r in gather(fleet)} == {pair[1].url}
    pair[0].label = LABEL
    fleet.admit(pair[0].url, LABEL)
    fleet.submit(requests(4, 2))
    assert {r.url for r in gather(fleet)} == {pair[0].url, pair[1].url}
    assert fleet.counters.returned == 1


def test_a_hung_server_is_found_out_by_a_probe(pair: Any, make: Make) -> None:
    fleet = make(*pair, probe_timeout=0.3)
    pair[0].hung = True
    asked = requests(4, 4)
    fleet.submit(asked)
    check_whole(gather(fleet), asked)  # long before the requests' own time limit
    assert not fleet.servers()[0].healthy
    pair[0].hung = False
    until(lambda: fleet.servers()[0].healthy)
    assert fleet.servers()[0].label is None


def test_a_server_with_other_weights_than_admitted_is_found_out_by_a_probe(pair: Any, make: Make) -> None:
    fleet = make(*pair)
    pair[0].label = "default"  # died and came back between two probes
    until(lambda: fleet.servers()[0].label is None)
    until(lambda: fleet.servers()[0].healthy)


def test_withdrawn_servers_serve_no_more(pair: Any, make: Make) -> None:
    pair[0].always = "hang"
    fleet = make(*pair, retries=0)
    asked = requests(4, 2)
    fleet.submit(asked)
    until(lambda: pair[0].running > 0)
    fleet.withdraw(pair[0].url, "its weights are in doubt")
    check_whole(gather(fleet), asked)  # at no cost: there are no retries to spend
    assert fleet.servers()[0].reason == "its weights are in doubt"
    until(lambda: pair[0].running == 0)


def test_a_withdrawn_server_may_be_paused_and_is_alive_all_the_same(pair: Any, make: Make) -> None:
    fleet = make(*pair, probe_timeout=0.5)
    fleet.withdraw(pair[0].url, "half of the weights arrived")
    pair[0].paused = True
    time.sleep(0.4)
    assert fleet.servers()[0].healthy
    pair[0].hung = True
    until(lambda: not fleet.servers()[0].healthy)
    pair[0].restart()
    until(lambda: fleet.servers()[0].healthy)
    pair[0].healthy = False  # it is a new process now, which has to generate
    until(lambda: not fleet.servers()[0].healthy)


def test_stranded(pair: Any, make: Make) -> None:
    fleet = make(pair[0])
    assert fleet.stranded_since is None
    pair[0].die()
    until(lambda: not fleet.servers()[0].healthy)
    assert fleet.stranded_since is None
    before = time.monotonic()
    fleet.submit(requests(1, 2))
    assert fleet.wait(0.1) == []
    assert fleet.stranded_since is not None
    assert before <= fleet.stranded_since <= time.monotonic()
    pair[0].restart()
    pair[0].label = LABEL
    until(lambda: fleet.servers()[0].healthy)
    fleet.admit(pair[0].url, LABEL)
    assert fleet.stranded_since is None
    gather(fleet)


# ---------------------------------------------------------------------- weight updates


def test_an_update_holds_what_waits_and_keeps_what_runs(pair: Any, make: Make) -> None:
    server = pair[0]
    server.delay = 0.2
    fleet = make(server, request_timeout=0.5, max_concurrent=2)
    asked = requests(1, 4)
    fleet.submit(asked)
    until(lambda: server.running == 2)
    with fleet.updating("tag-2"):
        server.paused = True
        time.sleep(0.8)  # longer than a request may take, and than several probes
        assert len(server.prompts) == 2
        assert fleet.servers()[0].healthy
        server.spans = lambda n: [
            {"version": LABEL, "start": 0, "end": 1},
            {"version": "tag-2", "start": 1, "end": n},
        ]
        server.label, server.paused = "tag-2", False
        until(lambda: server.running == 0)
        assert fleet.wait(0.1) == []  # made under weights that are not admitted yet
        fleet.admit(server.url, "tag-2")
        assert {r.spans for r in fleet.wait(1.0)} == {((0, LABEL), (1, "tag-2"))}
        server.spans = None
        assert len(server.prompts) == 2
    results = gather(fleet)
    assert {r.spans for r in results} == {((0, "tag-2"),)}
    assert fleet.counters.retried == fleet.counters.stale_answers == 0


def test_updates_within_updates(pair: Any, make: Make) -> None:
    fleet = make(pair[0])
    with fleet.updating("asleep"):
        with fleet.updating("tag-2"):
            pair[0].label = "tag-2"
            fleet.admit(pair[0].url, "tag-2")
        pair[0].paused = True
        fleet.submit(requests(1, 2))
        assert fleet.wait(0.5) == []
        assert fleet.servers()[0].healthy
        assert pair[0].prompts == []
        pair[0].paused = False
    assert {r.spans for r in gather(fleet)} == {((0, "tag-2"),)}


def test_answers_of_a_server_that_the_update_failed_are_thrown_away(pair: Any, make: Make) -> None:
    for server in pair:
        server.delay = 0.1
    fleet = make(*pair, retries=0)
    asked = requests(2, 1)
    fleet.submit(asked)
    until(lambda: pair[0].running == 1 and pair[1].running == 1)
    with fleet.updating("tag-2"):
        for server in pair:
            server.label = "tag-2"
        until(lambda: pair[0].running + pair[1].running == 0)
        fleet.admit(pair[1].url, "tag-2")
        fleet.withdraw(pair[0].url, "the receipt is wrong")
    results = gather(fleet)
    check_whole(results, asked)
    assert {r.url for r in results} == {pair[1].url}


def test_an_answer_of_the_version_before_is_good(pair: Any, make: Make) -> None:
    pair[0].faults.append("slow")
    fleet = make(pair[0], probe_every=60.0)
    fleet.submit(requests(1, 1))
    until(lambda: pair[0].running == 1)
    with fleet.updating("tag-2"):
        fleet.admit(pair[0].url, "tag-2")
    assert gather(fleet)[0].spans == ((0, LABEL),)


# ---------------------------------------------------------------------- calling off


def test_abort_drops_everything_in_the_servers_too(pair: Any, make: Make) -> None:
    for server in pair:
        server.always = "hang"
    fleet = make(*pair)
    fleet.submit(requests(6, 4))
    until(lambda: pair[0].running == 4)
    assert fleet.abort(keep_partial=False) == []
    assert fleet.pending == 0
    until(lambda: pair[0].running + pair[1].running == 0)
    assert "/abort_request" in pair[0].posts
    for server in pair:
        server.always = ""
    asked = requests(6, 4)
    fleet.submit(asked)
    check_whole(gather(fleet), asked)


def test_partial_results(pair: Any, make: Make) -> None:
    fleet = make(*pair)
    pair[0].delay, pair[1].delay = 0.0, 1.0
    asked = requests(2, 8, tokens=100)  # 8 are finished by the first, 4 of 8 begun by the second
    fleet.submit(asked)
    until(lambda: len(pair[0].prompts) == 8 and pair[1].running == 4)
    time.sleep(0.3)
    results = fleet.abort(keep_partial=True)
    assert fleet.pending == 0
    assert Counter(r.key for r in results) == Counter(r.key for r in asked)
    finished = [r for r in results if r.finish_reason == "length"]
    begun = [r for r in results if r.finish_reason == "abort" and r.output_ids]
    assert (len(finished), len(begun)) == (8, 4)
    prompts = {r.key: list(r.input_ids) for r in asked}
    for result in begun:
        assert 0 < len(result.output_ids) < 100
        assert list(result.output_ids) == made_from(prompts[result.key], len(result.output_ids))
        assert result.spans == ((0, LABEL),)
    assert all(r.output_ids == () for r in results if r not in finished and r not in begun)


def test_partial_results_under_wrong_weights_are_none(pair: Any, make: Make) -> None:
    pair[0].delay = 2.0
    fleet = make(pair[0], probe_every=60.0)
    fleet.submit(requests(1, 2, tokens=100))
    until(lambda: pair[0].running == 2)
    time.sleep(0.1)
    pair[0].label = "other"
    assert {r.output_ids for r in fleet.abort(keep_partial=True)} == {()}


# ---------------------------------------------------------------------- connecting and closing


def test_connecting_names_every_server_and_its_reason(pair: Any, make: Make) -> None:
    pair[0].healthy = False
    pair[1].die()
    fleet = make(*pair, admit=False)
    with pytest.raises(UserError) as caught:
        fleet.connect(0.3)
    for part in (pair[0].url, "503", pair[1].url, "cannot be reached"):
        assert part in str(caught.value)


def test_connecting_waits_for_the_first_server(pair: Any, make: Make) -> None:
    pair[0].healthy = False
    pair[1].die()
    fleet = make(*pair, admit=False)
    pair[1].restart()
    fleet.connect(5.0)
    assert [view.healthy for view in fleet.servers()] == [False, True]
    pair[0].healthy = True
    until(lambda: fleet.servers()[0].healthy)


def test_connecting_wakes_a_server_that_was_left_paused(pair: Any, make: Make) -> None:
    pair[0].paused = True
    make(pair[0], admit=False).connect(5.0)
    assert not pair[0].paused


@pytest.mark.parametrize(("key", "variable"), [("api_key", "_API_KEY"), ("admin_key", "_ADMIN_KEY")])
def test_connecting_with_a_wrong_key(pair: Any, key: str, variable: str) -> None:
    keys = {"api_key": API_KEY, "admin_key": ADMIN_KEY, key: "wrong"}
    with Fleet([pair[0].url], **keys) as fleet, pytest.raises(UserError, match=variable):  # type: ignore[arg-type]
        fleet.connect(5.0)


def test_connecting_to_an_old_server(make: Make) -> None:
    server = FakeSGLang(version="0.5.9.post1")
    with pytest.raises(UserError, match=r"SGLang 0.5.9.post1: 0.5.10 or newer"):
        make(server, admit=False).connect(5.0)
    server.close()


@pytest.mark.parametrize(
    ("urls", "message"), [([], "none"), (["127.0.0.1:1"], "http://"), (["http://a:1", "http://a:1/"], "once")]
)
def test_urls_that_cannot_be_used(urls: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Fleet(urls)


def test_administration(pair: Any, make: Make) -> None:
    fleet = make(*pair)
    assert fleet.call(pair[1].url, "/text", {}, 5.0) == {"text": "Cache flushed."}
    assert "/text" in pair[1].posts
    assert "/text" not in pair[0].posts
    with pytest.raises(ServerError, match="it failed"):
        fleet.call(pair[0].url, "/fails", timeout=5.0)
    assert fleet.model_info(pair[0].url)["weight_version"] == LABEL
    assert fleet.server_info(pair[0].url)["tp_size"] == 2
    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
    assert fleet.call(pair[0].url, "/generate", body)["output_ids"] == made_from([1], 1)  # with the other key


def test_closing_drops_what_is_pending(pair: Any, make: Make) -> None:
    pair[0].always = "hang"
    fleet = make(pair[0])
    fleet.submit(requests(1, 2))
    until(lambda: pair[0].running == 2)
    fleet.close()
    fleet.close()
    until(lambda: pair[0].running == 0)
    with pytest.raises(RuntimeError, match="closed"):
        fleet.submit(requests(1, 1))


# ---------------------------------------------------------------------- through a router


@pytest.fixture
def router() -> Iterator[FakeSGLang]:
    """To the client it is one more server."""
    server = FakeSGLang(label=LABEL)
    yield server
    server.close()


def test_first_tries_go_through_the_router_and_retries_do_not(pair: Any, router: FakeSGLang, make: Make) -> None:
    router.faults.extend(["502", "label", "abort"])
    fleet = make(*pair, router_url=router.url)
    asked = requests(4, 4)
    fleet.submit(asked)
    results = gather(fleet)
    check_whole(results, asked)
    assert len(router.prompts) == 16
    assert len(pair[0].prompts) + len(pair[1].prompts) == 3
    assert fleet.counters.retried == 3
    assert fleet.counters.ejected == 0


def test_the_router_gets_as_much_as_the_servers_behind_it_take(pair: Any, router: FakeSGLang, make: Make) -> None:
    router.delay = 0.05
    fleet = make(*pair, router_url=router.url)
    fleet.submit(requests(5, 4))
    gather(fleet)
    assert router.most_running == 8
    fleet.withdraw(pair[0].url, "for a while")
    router.most_running = 0
    fleet.submit(requests(5, 4))
    gather(fleet)
    assert router.most_running == 4


def test_without_the_router_samples_go_to_the_servers(pair: Any, router: FakeSGLang, make: Make) -> None:
    router.delay = 0.05
    fleet = make(*pair, router_url=router.url)
    asked = requests(5, 4)
    fleet.submit(asked)
    until(lambda: router.running == 8)
    router.die()
    check_whole(gather(fleet), asked)
    assert len(pair[0].prompts) + len(pair[1].prompts) == 20


def test_a_router_that_is_not_there(pair: Any, router: FakeSGLang, make: Make) -> None:
    router.die()
    with pytest.raises(UserError, match=router.url):
        make(*pair, router_url=router.url, admit=False).connect(0.3)
