"""The section `reward`: what is refused when a recipe is read."""

from __future__ import annotations

from typing import Any

import pytest

from asd_megatron.config import make_recipe
from asd_megatron.errors import UserError

FAR = {"url": "http://judge.example:9000/score"}
NEAR = {"url": "http://127.0.0.1:9000/score"}


def make(kind: Any = "train", **reward: Any) -> Any:
    return make_recipe({"model": {"path": "m"}, "data": {"train": "t", "test": "t"}, "reward": reward}, kind=kind)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"name": "http"}, "reward.http.url is the server's address, which"),
        ({"name": "http", "http": {"url": "judge:9000"}}, "'judge:9000' is no URL"),
        ({"name": "http", "http": {"url": "http://me:key@h/"}}, "holds a user or password"),
        ({"name": "http", "http": {**FAR, "key_file": "k"}}, "sent over the network as plain text to judge.example"),
        ({"http": NEAR}, "reward.http is read only with reward.name http"),
        ({"code": {"processes": 4}}, "reward.code is read only with reward.name code"),
        ({"memory_gb": 2.0}, "reward.memory_gb is for a function of your own, and reward.name is math"),
        ({"parts": [{"name": "math"}], "name": "exact"}, "reward.name is that of one verifier, and reward.parts names"),
        ({"parts": [{"name": "math"}], "workers": 3}, "reward.workers is that of one verifier"),
        ({"parts": [{"name": "math"}, {"name": "math"}]}, "2 parts are called math in metrics"),
        ({"parts": [{"name": "a.py:f"}, {"name": "b.py:f"}]}, "2 parts are called f in metrics"),
        (
            {"parts": [{"name": "math", "weight": 0.5}, {"name": "exact", "weight": -1.0}]},
            "allow a reward of 0.5 at most",
        ),
        ({"parts": [{"name": "math"}, {"name": "http"}]}, "reward.parts[1].http.url is the server's address"),
        ({"parts": [{"weight": 1.0}]}, "name"),
        ({"parts": [{"name": "math", "wall_timeout_seconds": 1.0}]}, "reward.parts[0].wall_timeout_seconds 1 is below"),
    ],
)
def test_refused(reward: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(**reward)
    assert message in str(caught.value)


def test_accepted() -> None:
    parts = [
        {"name": "math", "weight": 0.9},
        {"name": "my.py:short", "weight": 0.1, "label": "brief", "memory_gb": 2.0},
    ]
    for kind in ("train", "sft"):
        reward = make(kind, parts=parts).reward
        assert reward.in_words == "0.9 math + 0.1 brief" and reward.name == "math"
        assert make(kind, **reward.model_dump()).reward == reward  # as the run folder keeps it
    assert make(name="http", http={**NEAR, "key_file": "k"}).reward.in_words == "http"
    assert make(name="http", http={"url": "https://judge.example/", "key_file": "k"}).reward.workers is None
