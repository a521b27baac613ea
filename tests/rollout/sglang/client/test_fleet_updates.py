"""The fleet while weights change, when everything is aborted, and behind a router, on fake servers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from asd_megatron.errors import UserError
from tests.rollout.sglang.fake_sglang import FakeSGLang, made_from
from tests.rollout.sglang.fleets import LABEL, Make, check_complete, gather, requests, until

# ---------------------------------------------------------------------- weight updates


def test_an_update_holds_what_waits_and_keeps_what_runs(fake_pair: Any, make_fleet: Make) -> None:
    server = fake_pair[0]
    server.delay = 0.2
    fleet = make_fleet(server, request_timeout=0.5, max_concurrent=2)
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


def test_updates_within_updates(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(fake_pair[0])
    with fleet.quiesced():
        with fleet.updating("tag-2"):
            fake_pair[0].label = "tag-2"
            fleet.admit(fake_pair[0].url, "tag-2")
        fake_pair[0].paused = True
        fleet.submit(requests(1, 2))
        assert fleet.wait(0.5) == []
        assert fleet.servers()[0].healthy
        assert fake_pair[0].prompts == []
        fake_pair[0].paused = False
    assert {r.spans for r in gather(fleet)} == {((0, "tag-2"),)}


def test_answers_of_a_server_that_the_update_failed_are_discarded(fake_pair: Any, make_fleet: Make) -> None:
    for server in fake_pair:
        server.delay = 0.1
    fleet = make_fleet(*fake_pair, retries=0)
    asked = requests(2, 1)
    fleet.submit(asked)
    until(lambda: fake_pair[0].running == 1 and fake_pair[1].running == 1)
    with fleet.updating("tag-2"):
        for server in fake_pair:
            server.label = "tag-2"
        until(lambda: fake_pair[0].running + fake_pair[1].running == 0)
        fleet.admit(fake_pair[1].url, "tag-2")
        fleet.withdraw(fake_pair[0].url, "the verification failed")
    results = gather(fleet)
    check_complete(results, asked)
    assert {r.url for r in results} == {fake_pair[1].url}


def test_an_answer_of_the_version_before_is_good(fake_pair: Any, make_fleet: Make) -> None:
    fake_pair[0].faults.append("slow")
    fleet = make_fleet(fake_pair[0], probe_every=60.0)
    fleet.submit(requests(1, 1))
    until(lambda: fake_pair[0].running == 1)
    with fleet.updating("tag-2"):
        fleet.admit(fake_pair[0].url, "tag-2")
    assert gather(fleet)[0].spans == ((0, LABEL),)


# ---------------------------------------------------------------------- aborting


def test_abort_drops_everything_in_the_servers_too(fake_pair: Any, make_fleet: Make) -> None:
    for server in fake_pair:
        server.always = "hang"
    fleet = make_fleet(*fake_pair)
    fleet.submit(requests(6, 4))
    until(lambda: fake_pair[0].running == 4)
    assert fleet.abort(keep_partial=False) == []
    assert fleet.pending == 0
    until(lambda: fake_pair[0].running + fake_pair[1].running == 0)
    assert "/abort_request" in fake_pair[0].posts
    for server in fake_pair:
        server.always = ""
    asked = requests(6, 4)
    fleet.submit(asked)
    check_complete(gather(fleet), asked)


def test_partial_results(fake_pair: Any, make_fleet: Make) -> None:
    fleet = make_fleet(*fake_pair)
    fake_pair[0].delay, fake_pair[1].delay = 0.0, 1.0
    asked = requests(2, 8, tokens=100)  # 8 are finished by the first, 4 of 8 begun by the second
    fleet.submit(asked)
    until(lambda: len(fake_pair[0].prompts) == 8 and fake_pair[1].running == 4)
    time.sleep(0.3)
    results = fleet.abort(keep_partial=True)
    assert fleet.pending == 0
    assert Counter(r.key for r in results) == Counter(r.key for r in asked)
    finished = [r for r in results if r.finish_reason == "length"]
    begun = [r for r in results if r.finish_reason == "abort" and len(r.output_ids)]
    assert (len(finished), len(begun)) == (8, 4)
    prompts = {r.key: list(r.input_ids) for r in asked}
    for result in begun:
        assert 0 < len(result.output_ids) < 100
        assert list(result.output_ids) == made_from(prompts[result.key], len(result.output_ids))
        assert result.spans == ((0, LABEL),)
    assert all(not len(r.output_ids) for r in results if r not in finished and r not in begun)


def test_partial_results_under_wrong_weights_are_none(fake_pair: Any, make_fleet: Make) -> None:
    fake_pair[0].delay = 2.0
    fleet = make_fleet(fake_pair[0], probe_every=60.0)
    fleet.submit(requests(1, 2, tokens=100))
    until(lambda: fake_pair[0].running == 2)
    time.sleep(0.1)
    fake_pair[0].label = "other"
    assert {tuple(r.output_ids) for r in fleet.abort(keep_partial=True)} == {()}


# ---------------------------------------------------------------------- through a router


@pytest.fixture
def router() -> Iterator[FakeSGLang]:
    """To the client it is one more server."""
    server = FakeSGLang(label=LABEL)
    yield server
    server.close()


def test_first_tries_go_through_the_router_and_retries_do_not(
    fake_pair: Any, router: FakeSGLang, make_fleet: Make
) -> None:
    router.faults.extend(["502", "label", "abort"])
    fleet = make_fleet(*fake_pair, router_url=router.url)
    asked = requests(4, 4)
    fleet.submit(asked)
    results = gather(fleet)
    check_complete(results, asked)
    assert len(router.prompts) == 16
    assert len(fake_pair[0].prompts) + len(fake_pair[1].prompts) == 3
    assert fleet.counters.retried == 3
    assert fleet.counters.ejected == 0


def test_the_router_gets_as_much_as_the_servers_behind_it_take(
    fake_pair: Any, router: FakeSGLang, make_fleet: Make
) -> None:
    router.delay = 0.05
    fleet = make_fleet(*fake_pair, router_url=router.url)
    fleet.submit(requests(5, 4))
    gather(fleet)
    assert router.most_running == 8
    fleet.withdraw(fake_pair[0].url, "for a while")
    router.most_running = 0
    fleet.submit(requests(5, 4))
    gather(fleet)
    assert router.most_running == 4


def test_without_the_router_samples_go_to_the_servers(fake_pair: Any, router: FakeSGLang, make_fleet: Make) -> None:
    router.delay = 0.05
    fleet = make_fleet(*fake_pair, router_url=router.url)
    asked = requests(5, 4)
    fleet.submit(asked)
    until(lambda: router.running == 8)
    router.die()
    check_complete(gather(fleet), asked)
    assert len(fake_pair[0].prompts) + len(fake_pair[1].prompts) == 20


def test_a_router_that_is_not_there(fake_pair: Any, router: FakeSGLang, make_fleet: Make) -> None:
    router.die()
    with pytest.raises(UserError, match=router.url):
        make_fleet(*fake_pair, router_url=router.url, admit=False).connect(0.3)
