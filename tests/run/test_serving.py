"""The recipe's servers: the probe that verifies them, what the start-up report says of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asd_megatron.data.prompts import PromptRenderer
from asd_megatron.errors import UserError
from asd_megatron.puzzle.task import PuzzleStream
from asd_megatron.puzzle.tokenizer import UNKNOWN_TOKEN, build_tokenizer
from asd_megatron.rollout.sglang.client.routing import Routing
from asd_megatron.run import report, serving
from asd_megatron.run.serving import probe_ids
from tests.config.test_checks import make
from tests.models.tiny import tiny_qwen3


def session_of(dtype: torch.dtype, **fields: Any) -> Any:
    """What starting servers asks of a session."""
    return SimpleNamespace(port=SimpleNamespace(dtype=dtype), recipe=make(""), **fields)


def test_the_probe_is_a_real_prompt_and_its_continuation() -> None:
    tokenizer, problems = build_tokenizer(), PuzzleStream.of("train")
    renderer = PromptRenderer(tokenizer)
    prompt = renderer.student(problems.take(1)[0]).ids
    ids = probe_ids(renderer, problems, 512)
    assert ids[: len(prompt)] == prompt and len(ids) >= len(prompt) + 8
    assert tokenizer.convert_tokens_to_ids(UNKNOWN_TOKEN) not in ids  # words that this small vocabulary has
    assert probe_ids(renderer, problems, len(prompt) - 1) == prompt[:-1]  # no longer than the model takes


def test_a_long_prompt_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "PROBE_TOKENS", 4)
    assert len(probe_ids(PromptRenderer(build_tokenizer()), PuzzleStream.of("train"), 512)) == 4


def test_servers_return_routed_experts_when_they_are_replayed() -> None:
    rollout = make("rollout.engine=sglang rollout.routing_replay=engine").rollout
    config = {"num_hidden_layers": 4, "num_experts": 6, "num_experts_per_tok": 2}
    session: Any = SimpleNamespace(
        hf_config=config, source=Path("m"), port=SimpleNamespace(dtype=torch.float32), recipe=make("")
    )
    assert serving._routing(session, rollout) == Routing(layers=4, experts=6, per_token=2)
    (options,) = serving.server_options(session, rollout, serving.Keys.new())
    assert options.arguments == {"enable-return-routed-experts": True}
    with pytest.raises(UserError, match="routing_replay engine: the model has no experts"):
        serving._routing(SimpleNamespace(hf_config={"num_hidden_layers": 4}), rollout)  # type: ignore[arg-type]
    assert serving._routing(session, make("rollout.engine=sglang").rollout) is None


def test_quantised_servers_start_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_qwen3(tmp_path / "model")
    session: Any = SimpleNamespace(
        source=source, folder=tmp_path / "run", port=SimpleNamespace(dtype=torch.bfloat16), recipe=make("")
    )
    rollout = make("rollout.engine=sglang rollout.quantization=fp8 rollout.servers=2").rollout
    for _ in range(2):  # a resumed run finds the folder of the first
        options = serving.server_options(session, rollout, serving.Keys.new())
    assert [o.model for o in options] == [tmp_path / "run" / "servers" / "model"] * 2
    assert all(o.arguments == {"load-format": "dummy"} for o in options)
    assert "quantization_config" in json.loads((options[0].model / "config.json").read_text())
    assert serving.default_tolerance(rollout, torch.bfloat16) > serving.TOLERANCE[torch.bfloat16]
    serving._check_quantization(session, rollout)
    session.port.dtype = torch.float32
    with pytest.raises(UserError, match="set model.dtype bfloat16"):
        serving._check_quantization(session, rollout)


@pytest.mark.parametrize(
    ("capability", "backend"), [((9, 0), None), ((10, 0), "flashinfer_trtllm"), ((12, 0), None), ((8, 0), "refused")]
)
def test_the_servers_matrix_products_by_gpu(
    capability: tuple[int, int], backend: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only kernels that leave the weights as they were loaded: SGLang's choice, but for one generation."""
    for name, value in {"is_available": True, "get_device_capability": capability, "get_device_name": "a GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    source = tiny_qwen3(tmp_path / "model")
    session: Any = SimpleNamespace(
        source=source, folder=tmp_path / "run", port=SimpleNamespace(dtype=torch.bfloat16), recipe=make("")
    )
    rollout = make("rollout.engine=sglang rollout.quantization=fp8").rollout
    if backend == "refused":
        with pytest.raises(UserError, match="a GPU has no FP8 arithmetic"):
            serving._check_quantization(session, rollout)
        return
    serving._check_quantization(session, rollout)
    (options,) = serving.server_options(session, rollout, serving.Keys.new())
    assert options.arguments.get("fp8-gemm-backend") == backend


def test_the_report_names_the_settings_of_nccl_and_the_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "0")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    started = report._servers(make("rollout.engine=sglang").rollout)
    assert started["NCCL"] == "NCCL_CUMEM_ENABLE=0 NCCL_NVLS_ENABLE=2, trainer and servers alike"
    assert "verified" in started["weight updates"]
    attached = report._servers(make('rollout.engine=sglang rollout.server_urls=["http://10.0.0.1:3"]').rollout)
    assert "servers that `asd-megatron serve` did not start" in attached["NCCL"]
    unverified = report._servers(make("rollout.engine=sglang rollout.verify_weights=false").rollout)
    assert "NOT VERIFIED" in unverified["weight updates"]
    assert "NCCL" not in report._servers(make("rollout.engine=sglang rollout.weight_sync=disk").rollout)
