"""Which sample goes where: placement of groups, limits, retries, the router."""

from __future__ import annotations

from asd_megatron.rollout.sglang.client.scheduling import Endpoint, PendingSample, SampleRequest, Schedule


def samples(groups: int, n: int, first: int = 0) -> list[PendingSample]:
    return [PendingSample(SampleRequest((g, s), g, (1,), {})) for g in range(first, first + groups) for s in range(n)]


def endpoints(count: int, limit: int) -> list[Endpoint]:
    return [Endpoint(f"server{i}", limit, open=True) for i in range(count)]


def send_all(schedule: Schedule) -> list[tuple[tuple[int, int], str]]:
    """Everything that can go now."""
    sent = []
    while (move := schedule.next()) is not None:
        sample, endpoint = move
        endpoint.in_flight += 1
        sent.append((sample.request.key, endpoint.url))
    return sent


def test_a_group_stays_together_and_groups_spread() -> None:
    schedule = Schedule(endpoints(2, 8))
    schedule.add(samples(4, 4))
    sent = send_all(schedule)
    homes = {group: {url for (g, _), url in sent if g == group} for group in range(4)}
    assert all(len(urls) == 1 for urls in homes.values())
    assert [url for _, url in sent].count("server0") == 8 == [url for _, url in sent].count("server1")


def test_no_endpoint_gets_more_than_its_limit_and_the_rest_waits_in_order() -> None:
    pair = endpoints(2, 3)
    schedule = Schedule(pair)
    schedule.add(samples(3, 4))
    assert len(send_all(schedule)) == 6
    pair[1].in_flight = 0
    assert send_all(schedule) == [((1, 3), "server1"), ((2, 0), "server1"), ((2, 1), "server1")]


def test_an_endpoint_takes_no_group_before_its_last_one_is_begun() -> None:
    pair = endpoints(2, 2)
    schedule = Schedule(pair)
    schedule.add(samples(3, 4))
    send_all(schedule)
    pair[0].in_flight = 0
    assert [key for key, _ in send_all(schedule)] == [(0, 2), (0, 3)]
    pair[1].in_flight = 1
    assert [key for key, _ in send_all(schedule)] == [(1, 2)]


def test_what_waited_for_a_closed_lane_goes_elsewhere_first() -> None:
    pair = endpoints(2, 2)
    schedule = Schedule(pair)
    schedule.add(samples(3, 4))
    send_all(schedule)
    schedule.close(pair[0])
    pair[1].limit = 100
    assert [key for key, url in send_all(schedule)] == [(1, 2), (1, 3), (0, 2), (0, 3), (2, 0), (2, 1), (2, 2), (2, 3)]


def test_a_retry_goes_elsewhere_and_before_others() -> None:
    pair = endpoints(2, 1)
    schedule = Schedule(pair)
    failed = samples(1, 1)[0]
    failed.failed_at = pair[0]
    schedule.retry(failed)
    schedule.add(samples(2, 1, first=1))
    assert send_all(schedule) == [((0, 0), "server1"), ((1, 0), "server0")]


def test_a_retry_waits_for_another_lane_that_is_full_but_not_for_one_that_is_closed() -> None:
    pair = endpoints(2, 1)
    schedule = Schedule(pair)
    failed = samples(1, 1)[0]
    failed.failed_at = pair[0]
    pair[1].in_flight = 1
    schedule.retry(failed)
    assert send_all(schedule) == []
    schedule.close(pair[1])
    assert send_all(schedule) == [((0, 0), "server0")]


def test_nothing_goes_without_an_open_lane() -> None:
    pair = endpoints(2, 4)
    schedule = Schedule(pair)
    schedule.add(samples(1, 2))
    for endpoint in pair:
        schedule.close(endpoint)
    assert send_all(schedule) == []
    pair[0].open = True
    assert len(send_all(schedule)) == 2


def test_an_open_router_gets_first_tries_and_no_retries() -> None:
    pair, router = endpoints(2, 4), Endpoint("router", 3, open=True)
    schedule = Schedule(pair, router)
    failed = samples(1, 1, first=9)[0]
    failed.failed_at = router
    schedule.retry(failed)
    schedule.add(samples(1, 4))
    assert send_all(schedule) == [((9, 0), "server0"), *[((0, s), "router") for s in range(3)]]
    schedule.close(router)
    assert send_all(schedule) == [((0, 3), "server1")]


def test_dropped_samples_are_gone() -> None:
    pair = endpoints(1, 1)
    schedule = Schedule(pair)
    schedule.add(samples(2, 3))
    send_all(schedule)
    schedule.retry(samples(1, 1, first=5)[0])
    schedule.drop()
    pair[0].in_flight = 0
    assert send_all(schedule) == []
