"""Rules of the fleet, on fake servers that fail on demand: samples that fail, servers that come and go."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.rollout.engine import RolloutError
from asd_megatron.rollout.sglang.client.api import ServerError
from asd_megatron.rollout.sglang.client.fleet import Fleet
from asd_megatron.rollout.sglang.client.scheduling import SampleResult
from tests.rollout.sglang.fake_sglang import ADMIN_KEY, API_KEY, FakeSGLang, made_from
from tests.rollout.sglang.fleets import LABEL, Make, check_complete, gather, requests, until

# ---------------------------------------------------------------------- no failures


def test_every_sample_once_balanced_and_bounded(fake_pair: Any, make_fleet: Make) -> None:
    for server in fake_pair:
        server.delay = 0.02
    fleet = make_fleet(*fake_pair)
    asked = requests(8, 4)
    fleet.submit(asked)
    assert fleet.pending == 32
    results = gather(fleet)
    check_complete(results, asked)
    assert {r.spans for r in results} == {((0, LABEL),)}
    assert min(Counter(r.url for r in results)[server.url] for server in fake_pair) >= 8
    for group in range(8):
        assert len({r.url for r in results if r.key[0] == group}) == 1
    assert max(server.most_running for server in fake_pair) <= 4
    assert fleet.counters.retried == 0


def test_finished_samples_come_while_others_run(fake_pair: Any, make_fleet: Make) -> None:
    fake_pair[0].faults.append("slow")
    fleet = make_fleet(fake_pair[0])
    fleet.submit(requests(1, 3))
    assert len(fleet.wait(5.0)) < 3
    gather(fleet)


def test_keys_are_unique_among_pending(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(fake_pair[0])
    asked = requests(1, 2)
    with pytest.raises(ValueError, match="unique"):
        fleet.submit([asked[0], asked[0]])
    fake_pair[0].delay = 0.1
    fleet.submit(asked)
    with pytest.raises(ValueError, match="unique"):
        fleet.submit(asked[:1])
    gather(fleet)
    fleet.submit(asked)
    check_complete(gather(fleet), asked)


def test_waiting_for_nothing_returns_at_once(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(fake_pair[0])
    began = time.monotonic()
    assert fleet.wait(10.0) == []
    assert time.monotonic() - began < 1.0


# ---------------------------------------------------------------------- attempts that fail


@pytest.mark.parametrize("fault", ["reset", "500", "abort", "malformed", "nan", "label", "mixed"])
def test_a_failed_attempt_is_retried_elsewhere(fake_pair: Any, make_fleet: Make, fault: str) -> None:
    fake_pair[0].faults.append(fault)
    fleet = make_fleet(*fake_pair)
    asked = requests(2, 2)
    fleet.submit(asked)
    results = gather(fleet)
    check_complete(results, asked)
    again = [r for r in results if r.attempts > 1]
    assert [r.url for r in again] == [fake_pair[1].url]
    assert fleet.counters.retried == 1
    assert fleet.counters.stale_answers == (fault in ("label", "mixed"))


def test_a_label_that_is_admitted_but_incomplete_never_counts(fake_pair: Any, make_fleet: Make) -> None:
    fake_pair[0].label = "tag-2-incomplete"
    fleet = make_fleet(fake_pair[0], probe_every=60.0, retries=0)
    fleet.submit(requests(1, 1))
    assert [r.finish_reason for r in gather(fleet)] == ["abort"]
    assert fleet.counters.stale_answers == 1


def test_deadline(fake_pair: Any, make_fleet: Make) -> None:
    fake_pair[0].faults.append("hang")
    fleet = make_fleet(*fake_pair, request_timeout=0.3)
    asked = requests(2, 2)
    fleet.submit(asked)
    check_complete(gather(fleet), asked)
    assert fleet.counters.deadline == 1
    until(lambda: fake_pair[0].cancelled == 1)  # the connection is closed, so the server stops


def test_busy_is_no_failure(fake_pair: Any, make_fleet: Make) -> None:
    fake_pair[0].faults.extend(["503"] * 6)
    fleet = make_fleet(fake_pair[0], retries=0)
    asked = requests(1, 4)
    fleet.submit(asked)
    check_complete(gather(fleet), asked)
    assert fleet.counters.ejected == 0


def test_busy_for_longer_than_a_sample_may_take_is_one(fake_pair: Any, make_fleet: Make) -> None:
    fake_pair[0].always = "503"
    fleet = make_fleet(fake_pair[0], retries=0, request_timeout=0.3)
    fleet.submit(requests(1, 1))
    assert [r.finish_reason for r in gather(fleet)] == ["abort"]


def test_given_up_after_the_retries(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(fake_pair[0], retries=2)
    fake_pair[0].always = "abort"

    asked = requests(1, 1)
    fleet.submit(asked)
    results: list[SampleResult] = []
    while fleet.pending:
        results += fleet.wait(0.2)
        for view in fleet.servers():  # ejected after two failures: the caller admits it again
            if view.healthy and view.label is None:
                fleet.admit(view.url, LABEL)
    assert results == [SampleResult((0, 0), attempts=3)]
    assert len(fake_pair[0].prompts) == 3
    assert fleet.counters.given_up == 1


def test_what_a_server_refuses_is_raised_and_not_tried_again(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(fake_pair[0])
    fake_pair[0].always = "400"
    fleet.submit(requests(3, 4))
    for _ in range(2):
        with pytest.raises(UserError, match="status 400"):
            fleet.wait(5.0)
    time.sleep(0.3)
    assert len(fake_pair[0].prompts) <= 4
    fleet.abort(keep_partial=False)
    fake_pair[0].always = ""
    again = requests(1, 4)
    fleet.submit(again)
    check_complete(gather(fleet), again)


# ---------------------------------------------------------------------- servers come and go


def test_a_server_that_dies_loses_no_sample(fake_pair: Any, make_fleet: Make) -> None:
    for server in fake_pair:
        server.delay = 0.05
    fleet = make_fleet(*fake_pair)
    asked = requests(10, 4)
    fleet.submit(asked)
    results = fleet.wait(5.0)
    fake_pair[0].die()
    results += gather(fleet)
    check_complete(results, asked)
    dead, alive = fleet.servers()
    assert (dead.healthy, dead.label, alive.label) == (False, None, LABEL)
    assert dead.reason
    assert fleet.counters.ejected == 1


def test_it_returns_without_weights_and_serves_when_admitted(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(*fake_pair)
    fake_pair[0].die()
    until(lambda: not fleet.servers()[0].healthy)
    fake_pair[0].restart()
    until(lambda: fleet.servers()[0].healthy)
    view = fleet.servers()[0]
    assert (view.label, view.reported, view.version, view.tensor_parallel) == (None, "default", "0.5.23", 2)
    fleet.submit(requests(4, 2))
    assert {r.url for r in gather(fleet)} == {fake_pair[1].url}
    fake_pair[0].label = LABEL
    fleet.admit(fake_pair[0].url, LABEL)
    fleet.submit(requests(4, 2))
    assert {r.url for r in gather(fleet)} == {fake_pair[0].url, fake_pair[1].url}
    assert fleet.counters.returned == 1


def test_a_hung_server_is_found_out_by_a_probe(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(*fake_pair, probe_timeout=0.3)
    fake_pair[0].hung = True
    asked = requests(4, 4)
    fleet.submit(asked)
    check_complete(gather(fleet), asked)  # long before the requests' own time limit
    assert not fleet.servers()[0].healthy
    fake_pair[0].hung = False
    until(lambda: fleet.servers()[0].healthy)
    assert fleet.servers()[0].label is None


def test_a_server_that_is_busy_for_a_probe_or_two_keeps_serving(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(*fake_pair, probe_every=0.2)
    member = fleet._members[fake_pair[0].url]
    fake_pair[0].healthy = False  # as SGLang answers after 20 seconds without a token
    until(lambda: member.missed > 0)
    fake_pair[0].healthy = True
    until(lambda: member.missed == 0)
    assert member.label == LABEL and fleet.counters.ejected == 0
    fake_pair[0].healthy = False
    until(lambda: not member.healthy)
    assert fleet.counters.ejected == 1


def test_a_server_with_other_weights_than_admitted_is_found_out_by_a_probe(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(*fake_pair)
    fake_pair[0].label = "default"  # died and came back between two probes
    until(lambda: fleet.servers()[0].label is None)
    until(lambda: fleet.servers()[0].healthy)


def test_withdrawn_servers_serve_no_more(fake_pair: Any, make_fleet: Make) -> None:
    fake_pair[0].always = "hang"
    fleet = make_fleet(*fake_pair, retries=0)
    asked = requests(4, 2)
    fleet.submit(asked)
    until(lambda: fake_pair[0].running > 0)
    fleet.withdraw(fake_pair[0].url, "its weights are in doubt")
    check_complete(gather(fleet), asked)  # at no cost: there are no retries to spend
    assert fleet.servers()[0].reason == "its weights are in doubt"
    until(lambda: fake_pair[0].running == 0)


def test_a_withdrawn_server_may_be_paused_and_is_alive_all_the_same(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(*fake_pair, probe_timeout=0.5)
    fleet.withdraw(fake_pair[0].url, "half of the weights arrived")
    fake_pair[0].paused = True
    time.sleep(0.4)
    assert fleet.servers()[0].healthy
    fake_pair[0].hung = True
    until(lambda: not fleet.servers()[0].healthy)
    fake_pair[0].restart()
    until(lambda: fleet.servers()[0].healthy)
    fake_pair[0].healthy = False  # it is a new process now, which has to generate
    until(lambda: not fleet.servers()[0].healthy)


def test_since_when_no_server_may_serve(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(fake_pair[0])
    assert fleet.no_healthy_server_since is None
    fake_pair[0].die()
    until(lambda: not fleet.servers()[0].healthy)
    assert fleet.no_healthy_server_since is None
    before = time.monotonic()
    fleet.submit(requests(1, 2))
    assert fleet.wait(0.1) == []
    assert fleet.no_healthy_server_since is not None
    assert before <= fleet.no_healthy_server_since <= time.monotonic()
    fake_pair[0].restart()
    fake_pair[0].label = LABEL
    until(lambda: fleet.servers()[0].healthy)
    fleet.admit(fake_pair[0].url, LABEL)
    assert fleet.no_healthy_server_since is None
    gather(fleet)


# ---------------------------------------------------------------------- connecting and closing


def test_connecting_names_every_server_and_its_reason(fake_pair: Any, make_fleet: Make) -> None:
    fake_pair[0].healthy = False
    fake_pair[1].die()
    fleet = make_fleet(*fake_pair, admit=False)
    with pytest.raises(UserError) as caught:
        fleet.connect(0.3)
    for part in (fake_pair[0].url, "503", fake_pair[1].url, "cannot be reached"):
        assert part in str(caught.value)


def test_connecting_waits_for_all_servers(fake_pair: Any, make_fleet: Make) -> None:
    fake_pair[1].die()
    fleet = make_fleet(*fake_pair, admit=False)
    with pytest.raises(UserError, match="server_start_timeout") as caught:
        fleet.connect(0.3)
    assert fake_pair[1].url in str(caught.value) and fake_pair[0].url not in str(caught.value)
    later = threading.Timer(0.3, fake_pair[1].restart)
    later.start()
    fleet.connect(10.0)
    assert [view.healthy for view in fleet.servers()] == [True, True]
    later.join()


def test_connecting_resumes_a_server_that_was_left_paused(fake_pair: Any, make_fleet: Make) -> None:
    fake_pair[0].paused = True
    make_fleet(fake_pair[0], admit=False).connect(5.0)
    assert not fake_pair[0].paused


@pytest.mark.parametrize(("key", "variable"), [("api_key", "_API_KEY"), ("admin_key", "_ADMIN_KEY")])
def test_connecting_with_a_wrong_key(fake_pair: Any, key: str, variable: str) -> None:
    keys = {"api_key": API_KEY, "admin_key": ADMIN_KEY, key: "wrong"}
    with Fleet([fake_pair[0].url], **keys) as fleet, pytest.raises(UserError, match=variable):  # type: ignore[arg-type]
        fleet.connect(5.0)


def test_connecting_to_an_old_server(make_fleet: Make) -> None:
    server = FakeSGLang(version="0.5.9.post1")
    with pytest.raises(UserError, match=r"SGLang 0.5.9.post1: 0.5.10 or newer"):
        make_fleet(server, admit=False).connect(5.0)
    server.close()


@pytest.mark.parametrize(
    ("urls", "message"), [([], "none"), (["127.0.0.1:1"], "http://"), (["http://a:1", "http://a:1/"], "once")]
)
def test_urls_that_cannot_be_used(urls: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Fleet(urls)


def test_administration(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(*fake_pair)
    assert fleet.call(fake_pair[1].url, "/text", {}, 5.0) == {"text": "Cache flushed."}
    assert "/text" in fake_pair[1].posts
    assert "/text" not in fake_pair[0].posts
    with pytest.raises(ServerError, match="it failed"):
        fleet.call(fake_pair[0].url, "/fails", timeout=5.0)
    assert fleet.model_info(fake_pair[0].url)["weight_version"] == LABEL
    assert fleet.server_info(fake_pair[0].url)["tp_size"] == 2
    body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
    assert fleet.call(fake_pair[0].url, "/generate", body)["output_ids"] == made_from([1], 1)  # with the other key


def test_a_client_that_hangs_is_named_within_a_bound(
    fake_pair: Any, make_fleet: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever blocks the event loop, no call waits for it for ever."""
    fleet = make_fleet(fake_pair[0], probe_every=60.0)
    monkeypatch.setattr("asd_megatron.rollout.sglang.client.loop.LOOP_SECONDS", 0.1)
    blocked = threading.Event()
    fleet._loop.loop.call_soon_threadsafe(blocked.wait)
    try:
        with pytest.raises(RolloutError, match=f"admitting {fake_pair[0].url}.*resume the run"):
            fleet.admit(fake_pair[0].url, LABEL)
        with pytest.raises(RolloutError, match="aborting samples"):
            fleet.abort(keep_partial=True, patience=0.1)
        with pytest.raises(ServerError, match="/server_info"):
            fleet.server_info(fake_pair[0].url, 0.1)
    finally:
        blocked.set()


def test_closing_drops_what_is_pending(fake_pair: Any, make_fleet: Make) -> None:
    fake_pair[0].always = "hang"
    fleet = make_fleet(fake_pair[0])
    fleet.submit(requests(1, 2))
    until(lambda: fake_pair[0].running == 2)
    fleet.close()
    fleet.close()
    until(lambda: fake_pair[0].running == 0)
    with pytest.raises(RuntimeError, match="closed"):
        fleet.submit(requests(1, 1))
