"""The real SGLang under a pool: its keys, where it listens, why it cannot start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.servers.versions import check_environment, ipc_arguments
from tests.rollout.sglang.fake_environment import group_members
from tests.rollout.sglang.sglang_world import ADMIN_KEY, API_KEY, START_SECONDS, SGLangWorld, request, server_options

pytestmark = pytest.mark.sglang

PROMPT: dict[str, Any] = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2}}


def test_the_environment() -> None:
    python = server_options(Path()).python
    found = check_environment(python)
    assert ipc_arguments(python)[:2] == ("tensor_cls", "tensor_size")
    assert found.sglang == "0.5.23" and found.torch.startswith("2.13.0")


@pytest.mark.parametrize(
    ("path", "body", "key", "status"),
    [
        ("/health", None, "", 200),
        ("/generate", PROMPT, API_KEY, 200),
        ("/generate", PROMPT, "", 401),
        ("/generate", PROMPT, "wrong", 401),
        ("/generate", PROMPT, ADMIN_KEY, 401),
        ("/flush_cache", {}, ADMIN_KEY, 200),
        ("/flush_cache", {}, API_KEY, 401),
        ("/update_weights_from_disk", {"model_path": "x"}, API_KEY, 401),
        ("/update_weights_from_tensor", {"serialized_named_tensors": []}, "", 401),
        ("/abort_request", {"abort_all": True}, API_KEY, 401),
    ],
    ids=range(10),  # a server inherits the test's name, in PYTEST_CURRENT_TEST: it must not hold a key
)
def test_keys(sglang_pair: SGLangWorld, path: str, body: Any, key: str, status: int) -> None:
    for url in sglang_pair.urls:
        assert request(url, path, body, key=key)[0] == status


def test_who_generates_does_not_learn_the_administration_key(sglang_pair: SGLangWorld) -> None:
    for path in ("/server_info", "/get_server_info", "/model_info"):
        status, answer = request(sglang_pair.urls[0], path, key=API_KEY)
        assert status == 200 and API_KEY not in str(answer) and ADMIN_KEY not in str(answer)
    for pid in group_members(sglang_pair.pids[0]):
        assert ADMIN_KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert ADMIN_KEY.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert ADMIN_KEY not in sglang_pair.pool.processes[0].log.read_text()


def test_servers_listen_on_their_own_address_alone(sglang_pair: SGLangWorld) -> None:
    inodes = {
        link.removeprefix("socket:[").removesuffix("]")
        for group in sglang_pair.pids
        for pid in group_members(group)
        for descriptor in Path(f"/proc/{pid}/fd").iterdir()
        if (link := os.readlink(descriptor)).startswith("socket:")
    }
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]
    assert len(listening) >= 2 and set(listening) == {"0100007F"}  # 127.0.0.1


def test_why_a_server_cannot_start(tmp_path: Path) -> None:
    pool = ServerPool([server_options(tmp_path / "no_model")], tmp_path, start_timeout=START_SECONDS)
    with pytest.raises(UserError) as raised:
        pool.start()
    message = str(raised.value)
    assert "before it was ready: the model's folder does not exist\n" in message and "no_model" in message
    assert group_members(pool.processes[0].pid or 0) == []
