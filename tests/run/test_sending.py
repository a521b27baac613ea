"""Which ranks send the weights, whose memory each server maps, and NCCL of both sides."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.servers.versions import Versions
from asd_megatron.rollout.sglang.weight_sync.delta import DeltaTransport
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.run import report
from asd_megatron.run.sending import (
    Place,
    address_elsewhere,
    check_nccl,
    hosts_of_servers,
    loaded_nccl,
    root_transport,
    sending,
    server_names,
)
from tests.config.test_checks import make

URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]


def test_a_servers_rank_is_hosted_by_the_trainers_rank_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Place("a", "4"), Place("a", "5"), Place("a", "6"), Place("a", "7"), Place("b", "4"), Place("b", "5")]
    assert hosts_of_servers(URLS, ["7,4", "6,5"], 2, ranks) == {URLS[0]: (3, 0), URLS[1]: (2, 1)}
    assert hosts_of_servers(URLS, ["7", "0"], 1, ranks) == {URLS[0]: (3,)}, "device 0 is no rank's"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,4")  # one server on the trainer's devices
    assert hosts_of_servers(URLS[:1], [None], 2, ranks[:2]) == {URLS[0]: (1, 0)}


def test_servers_on_the_trainers_nodes_are_hosted_by_the_ranks_there() -> None:
    """The recipe may name a node by another name than its own, or by its address."""
    ranks = [Place("a", "0"), Place("a", "1")]
    ranks += [Place("b.cluster", device, frozenset({"b", "10.0.0.2"})) for device in ("0", "1")]
    for second in ("b.cluster", "b", "10.0.0.2"):
        assert hosts_of_servers(URLS, ["0,1", "1,0"], 2, ranks, ["a", second]) == {URLS[0]: (0, 1), URLS[1]: (3, 2)}
    assert hosts_of_servers(URLS, ["0", "0"], 1, ranks, ["a", "c"]) == {URLS[0]: (0,)}, "no rank runs on c"
    assert hosts_of_servers(URLS[:1], [None], 2, ranks, ["b"]) == {URLS[0]: (2, 3)}


def test_without_devices_the_ranks_take_turns() -> None:
    assert hosts_of_servers(URLS, [None, None], 2, [Place("a", "")] * 3) == {URLS[0]: (0, 1), URLS[1]: (2, 0)}


def test_senders_on_other_machines_listen_where_the_servers_reach_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for servers in ('rollout.server_urls=["http://10.0.0.7:3"]', "rollout.server_hosts=[node7]"):
        rollout = make(f"rollout.engine=sglang {servers}").rollout
        assert address_elsewhere(server_names(rollout)) is None, "found from the URLs"
    local = make(f'rollout.engine=sglang rollout.server_urls=["{URLS[0]}"]').rollout
    assert address_elsewhere([]) == address_elsewhere(server_names(local)) == "127.0.0.1"


def test_deltas_need_bfloat16() -> None:
    port, host = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cpu")), SimpleNamespace(size=lambda: 1)
    session: Any = SimpleNamespace(port=port, process_groups=SimpleNamespace(host=host), layout=Layout())
    rollout = make("rollout.engine=sglang rollout.weight_sync_full_every=10").rollout
    assert isinstance(transport := root_transport(session, rollout, {}, None), DeltaTransport)
    sent = sending(session, rollout, None, transport)
    assert sent is not None and sent.transport is transport.transport and sent.deltas is transport.deltas
    assert "deltas, all weights every 10 updates, verified" in report._servers(rollout)["weight updates"]
    assert isinstance(root_transport(session, make("rollout.engine=sglang").rollout, {}, None), DistributedTransport)
    session.port.dtype = torch.float32
    with pytest.raises(UserError, match="set it to 1, or model.dtype bfloat16"):
        root_transport(session, rollout, {}, None)


def test_other_nccl_on_the_servers_side_is_refused_with_both_ways_out() -> None:
    servers = Versions("0.5.23", "2.14.1", "2.30.7", "/opt/sglang/nvidia/nccl/lib/libnccl.so.2")
    check_nccl("2.30.7", servers)
    check_nccl("2.28.3", Versions("0.5.23", "2.14.1", None, None))  # a build without the package: not known
    with pytest.raises(UserError) as refused:
        check_nccl("2.28.3", servers)
    message = str(refused.value)
    assert "2.28.3" in message and "2.30.7" in message
    assert "LD_PRELOAD=/opt/sglang/nvidia/nccl/lib/libnccl.so.2" in message
    assert "image with equal NCCL" in message and "rollout.weight_sync disk" in message


def test_the_loaded_nccl_counts_and_not_the_one_that_torch_was_built_with(monkeypatch: pytest.MonkeyPatch) -> None:
    class Preloaded:
        def __init__(self, name: str, mode: int) -> None:
            assert name == "libnccl.so.2"

        @staticmethod
        def ncclGetVersion(version: Any) -> int:
            version._obj.value = 23007
            return 0

    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 3))
    monkeypatch.setattr(ctypes, "CDLL", Preloaded)
    assert loaded_nccl() == "2.30.7"

    def not_loaded(name: str, mode: int) -> None:
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", not_loaded)
    assert loaded_nccl() == "2.28.3"
