"""Which sample goes where: placement of groups, limits, retries, the router."""

from __future__ import annotations

from asd_megatron.rollout.sglang.client.scheduling import Lane, SampleRequest, Schedule, Ticket


def tickets(groups: int, samples: int, first: int = 0) -> list[Ticket]:
    return [Ticket(SampleRequest((g, s), g, (1,), {})) for g in range(first, first + groups) for s in range(samples)]


def lanes(count: int, limit: int) -> list[Lane]:
    return [Lane(f"lane{i}", limit, open=True) for i in range(count)]


def send_all(schedule: Schedule) -> list[tuple[tuple[int, int], str]]:
    """Everything that can go now."""
    sent = []
    while (move := schedule.next()) is not None:
        ticket, lane = move
        lane.in_flight += 1
        sent.append((ticket.request.key, lane.url))
    return sent


def test_a_group_stays_together_and_groups_spread() -> None:
    schedule = Schedule(lanes(2, 8))
    schedule.add(tickets(4, 4))
    sent = send_all(schedule)
    homes = {group: {url for (g, _), url in sent if g == group} for group in range(4)}
    assert all(len(urls) == 1 for urls in homes.values())
    assert [url for _, url in sent].count("lane0") == 8 == [url for _, url in sent].count("lane1")


def test_no_lane_gets_more_than_its_limit_and_the_rest_waits_in_order() -> None:
    pair = lanes(2, 3)
    schedule = Schedule(pair)
    schedule.add(tickets(3, 4))
    assert len(send_all(schedule)) == 6
    pair[1].in_flight = 0
    assert send_all(schedule) == [((1, 3), "lane1"), ((2, 0), "lane1"), ((2, 1), "lane1")]


def test_a_lane_takes_no_group_before_its_last_one_is_begun() -> None:
    pair = lanes(2, 2)
    schedule = Schedule(pair)
    schedule.add(tickets(3, 4))
    send_all(schedule)
    pair[0].in_flight = 0
    assert [key for key, _ in send_all(schedule)] == [(0, 2), (0, 3)]
    pair[1].in_flight = 1
    assert [key for key, _ in send_all(schedule)] == [(1, 2)]


def test_what_waited_for_a_closed_lane_goes_elsewhere_first() -> None:
    pair = lanes(2, 2)
    schedule = Schedule(pair)
    schedule.add(tickets(3, 4))
    send_all(schedule)
    schedule.close(pair[0])
    pair[1].limit = 100
    assert [key for key, url in send_all(schedule)] == [(1, 2), (1, 3), (0, 2), (0, 3), (2, 0), (2, 1), (2, 2), (2, 3)]


def test_a_retry_goes_elsewhere_and_before_others() -> None:
    pair = lanes(2, 1)
    schedule = Schedule(pair)
    failed = tickets(1, 1)[0]
    failed.failed_at = pair[0]
    schedule.retry(failed)
    schedule.add(tickets(2, 1, first=1))
    assert send_all(schedule) == [((0, 0), "lane1"), ((1, 0), "lane0")]


def test_a_retry_waits_for_another_lane_that_is_full_but_not_for_one_that_is_closed() -> None:
    pair = lanes(2, 1)
    schedule = Schedule(pair)
    failed = tickets(1, 1)[0]
    failed.failed_at = pair[0]
    pair[1].in_flight = 1
    schedule.retry(failed)
    assert send_all(schedule) == []
    schedule.close(pair[1])
    assert send_all(schedule) == [((0, 0), "lane0")]


def test_nothing_goes_without_an_open_lane() -> None:
    pair = lanes(2, 4)
    schedule = Schedule(pair)
    schedule.add(tickets(1, 2))
    for lane in pair:
        schedule.close(lane)
    assert send_all(schedule) == []
    pair[0].open = True
    assert len(send_all(schedule)) == 2


def test_an_open_router_gets_first_tries_and_no_retries() -> None:
    pair, router = lanes(2, 4), Lane("router", 3, open=True)
    schedule = Schedule(pair, router)
    failed = tickets(1, 1, first=9)[0]
    failed.failed_at = router
    schedule.retry(failed)
    schedule.add(tickets(1, 4))
    assert send_all(schedule) == [((9, 0), "lane0"), *[((0, s), "router") for s in range(3)]]
    schedule.close(router)
    assert send_all(schedule) == [((0, 3), "lane1")]


def test_dropped_samples_are_gone() -> None:
    pair = lanes(1, 1)
    schedule = Schedule(pair)
    schedule.add(tickets(2, 3))
    send_all(schedule)
    schedule.retry(tickets(1, 1, first=5)[0])
    schedule.drop()
    pair[0].in_flight = 0
    assert send_all(schedule) == []
