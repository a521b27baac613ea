"""Routed experts of an answer: what is asked for, what is accepted, and what happens to the rest."""

from __future__ import annotations

import base64
from collections import deque
from typing import Any

import numpy as np
import pytest

from asd_megatron.rollout.sglang.client.routing import Routing
from asd_megatron.rollout.sglang.client.scheduling import SampleRequest
from tests.rollout.sglang.fake_sglang import FakeSGLang, made_from, routes_of
from tests.rollout.sglang.fleets import Make, gather

ROUTING = Routing(layers=3, experts=6, per_token=2)
CONFIG: dict[str, Any] = {"num_hidden_layers": 3, "num_experts_per_tok": 2}


def encoded(ids: Any) -> str:
    return base64.b64encode(np.asarray(ids, dtype=np.int32).tobytes()).decode()


def test_both_names_of_the_number_of_experts() -> None:
    assert Routing.of({**CONFIG, "num_experts": 6}) == Routing.of({**CONFIG, "num_local_experts": 6}) == ROUTING
    assert Routing.of({"num_hidden_layers": 3}) is None


def test_every_token_but_the_last_has_the_experts_of_each_layer() -> None:
    ids = np.random.default_rng(0).random((4, 3, 6)).argsort(-1)[..., :2]
    found = ROUTING.read(encoded(ids), tokens=5)
    assert found.dtype == np.int16 and found.tolist() == ids.tolist()
    assert ROUTING.read("", tokens=1).shape == (0, 3, 2)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "started with --enable-return-routed-experts"),
        ([1, 2], "a list, not base64"),
        ("a?b=", "no base64"),
        (encoded(np.zeros((5, 3, 2))), r"120 bytes, not int32 \[4, 3, 2\]"),
        (encoded(np.zeros((4, 3, 2)))[:-4], "not int32"),
        (encoded(np.ones((4, 3, 2))), "an expert twice"),
        (encoded(np.full((4, 3, 2), 6)), "6 to 6, and a layer has 6 experts"),
        (encoded(np.full((4, 3, 2), -1)), "-1 to -1"),
    ],
)
def test_what_is_not_of_this_model_and_these_tokens(given: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ROUTING.read(given, tokens=5)


def test_unusable_routes_cost_no_sample(fake_pair: tuple[FakeSGLang, FakeSGLang], make_fleet: Make) -> None:
    """One answer with routes of other tokens, one from a server without the flag, one that was not asked for any."""
    first, second = fake_pair
    first.routing, first.faults = ROUTING, deque(["503", "routes"])
    fleet = make_fleet(first, retries=3)
    wanted = [SampleRequest((0, s), 0, (1, s), {"max_new_tokens": 4}, ROUTING) for s in range(3)]
    fleet.submit(wanted)
    results = {result.key: result for result in gather(fleet)}
    assert [list(results[r.key].output_ids) for r in wanted] == [made_from([1, s], 4) for s in range(3)]
    usable = [r for r in results.values() if r.routed_experts is not None]
    assert len(usable) == 2 and all(r.unrouted == "" for r in usable)
    assert all(np.array_equal(r.routed_experts, routes_of(6, ROUTING)) for r in usable)
    (other,) = [r for r in results.values() if r.routed_experts is None]
    assert "not int32 [5, 3, 2]" in other.unrouted
    fleet = make_fleet(second)
    fleet.submit([wanted[0], SampleRequest("unasked", 1, (1, 2), {"max_new_tokens": 2})])
    without = {result.key: result for result in gather(fleet)}
    assert "it has none" in without[(0, 0)].unrouted and without["unasked"].unrouted == ""
