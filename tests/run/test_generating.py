"""When the trainer and colocated servers give up and take device memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from asd_megatron.config import make_recipe
from asd_megatron.run import model_session, session
from asd_megatron.run.rl import TrainingRun

COLOCATED = ["--rollout.engine=sglang", "--rollout.placement=colocated", "--rollout.weight_sync=disk"]
FREED = ["offload", "free", "meet"]


def events(monkeypatch: pytest.MonkeyPatch, overrides: list[str]) -> list[str]:
    """What happens on a rank while a run starts, and then around a generation."""
    found: list[str] = []

    def note(event: str) -> Any:
        return lambda *_, **__: found.append(event)

    monkeypatch.setattr(model_session.device, "free_cached_memory", note("free"))
    monkeypatch.setattr(model_session, "meet", note("meet"))
    recipe = make_recipe({"model": {"path": "m"}, "data": {"train": "t"}}, overrides)
    host: Any = session.Session.__new__(session.Session)  # no ranks, no model
    host.recipe = recipe
    host.optimizer = SimpleNamespace(offload=note("offload"), reload=note("reload"))
    host.process_groups = SimpleNamespace(host=None)
    run = SimpleNamespace(
        session=host,
        _start_engine=note("start"),
        collector=SimpleNamespace(release=note("release")),
    )
    TrainingRun.start_engine(cast(TrainingRun, run))
    with host.generating():
        note("generate")()
    return found


def test_servers_take_memory_after_every_rank_has_freed_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the trainer after servers that have started have released theirs."""
    both = [*COLOCATED, "--rollout.offload_optimizer=true"]
    expected = [*FREED, "start", "release", "reload", *FREED, "generate", "reload"]
    assert events(monkeypatch, both) == expected
    assert events(monkeypatch, COLOCATED) == [e for e in expected if e not in ("offload", "reload")]
    assert events(monkeypatch, []) == ["start", "release", "generate"]
