"""Impossible settings of rollouts: each is refused, says what to change, and the change is accepted."""

from __future__ import annotations

import pytest

from asd_megatron.config import check_devices
from asd_megatron.errors import UserError
from tests.config.test_checks import make, refusal

S = "rollout.engine=sglang "
URLS = S + 'rollout.server_urls=["http://127.0.0.1:3","http://127.0.0.1:4"] '
FAR = S + 'rollout.server_urls=["http://10.1.2.3:30000"] '
IS = " algorithm.importance_correction=truncated"


@pytest.mark.parametrize(
    ("bad", "message", "good"),
    [
        ("rollout.servers=2", "rollout.servers is read only with rollout.engine sglang", S + "rollout.servers=2"),
        ("rollout.overlap=true", "rollout.overlap is read only with", S + "rollout.overlap=true" + IS),
        (URLS + "rollout.servers=2", "names running ones: leave one of the two out", S + "rollout.servers=2"),
        (URLS + "rollout.router=start", "give the URL of their router", URLS + "rollout.router=http://127.0.0.1:5"),
        (URLS + "rollout.placement=colocated", "needs servers that the run starts", S + "rollout.placement=colocated"),
        (S + 'rollout.server_urls=["10.0.0.1:3"]', "is no URL", URLS),
        (S + 'rollout.server_urls=["http://a:3","http://a:3"]', "a server twice",
         URLS),
        (S + 'rollout.server_devices=["0"] rollout.servers=2', "devices of 1 servers and rollout.servers is 2",
         S + 'rollout.server_devices=["0","1"] rollout.servers=2'),
        (S + "rollout.router=somewhere", "neither `start` nor a URL", S + "rollout.router=start"),
        (S + "rollout.router=http://127.0.0.1:5", "knows nothing of servers that the run starts",
         URLS + "rollout.router=http://127.0.0.1:5"),
        (S + "rollout.weight_sync_folder=w", "read only with rollout.weight_sync disk",
         S + "rollout.weight_sync_folder=w rollout.weight_sync=disk"),
        (S + "rollout.weight_sync=cuda_ipc", "set rollout.placement colocated",
         S + "rollout.weight_sync=cuda_ipc rollout.placement=colocated"),
        (URLS + "rollout.weight_sync_address=0.0.0.0", "let anybody join", URLS),
        (FAR + "rollout.weight_sync_address=127.0.0.1", "cannot be reached from http://10.1.2.3:30000", FAR),
        (S + "rollout.receipt=false rollout.receipt_tolerance=0.1", "read only with rollout.receipt true",
         S + "rollout.receipt_tolerance=0.1"),
        (S + "rollout.offload_optimizer=true", "makes room for servers on the trainer's devices",
         S + "rollout.offload_optimizer=true rollout.placement=colocated"),
        (S + "rollout.partial_rollouts=true" + IS, "rollout.oversampling is 1: raise it",
         S + "rollout.partial_rollouts=true rollout.oversampling=1.5" + IS),
        (S + "rollout.partial_rollouts=true rollout.oversampling=1.5 sampling.stop=[x]" + IS, "would be missed",
         S + "sampling.stop=[x]"),
        (S + "rollout.overlap=true", "set algorithm.importance_correction truncated or masked",
         S + "rollout.overlap=true" + IS),
        (S + "rollout.overlap=true rollout.max_staleness=0" + IS, "leaves nothing of what rollout.overlap makes",
         S + "rollout.max_staleness=0"),
        (S + "rollout.overlap=true rollout.placement=colocated" + IS, "set rollout.placement disaggregated",
         S + "rollout.overlap=true" + IS),
    ],
)  # fmt: skip
def test_refused_and_mended(bad: str, message: str, good: str) -> None:
    assert message in refusal(bad)
    make(good)


def test_virtual_stages_and_context_parallelism_are_fine_with_servers() -> None:
    make(S + "parallelism.virtual_pipeline=2 parallelism.pipeline=2 parallelism.context=2 data.test=t")
    assert "rollout.engine sglang" in refusal("parallelism.context=2")


def test_what_cannot_work_on_gpus() -> None:
    for bad, message, good in (
        ("rollout.placement=colocated", "NCCL does not connect two processes", "rollout.weight_sync=disk"),
        ("", "would take the trainer's devices", 'rollout.server_devices=["1"]'),
    ):
        with pytest.raises(UserError, match=message):
            check_devices(make(S + bad), cuda=True)
        check_devices(make(S + bad), cuda=False)
        check_devices(make(f"{S}{bad} {good}"), cuda=True)
