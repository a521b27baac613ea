"""The metrics of the last step over HTTP."""

from __future__ import annotations

import http.client
import math
import re
import socket

import pytest

from asd_megatron.errors import UserError
from asd_megatron.observe.prometheus import MetricsServer, exposition

LINE = re.compile(r'^(?P<name>[a-zA-Z_][a-zA-Z0-9_]*)\{run="(?P<run>(?:[^"\\\n]|\\.)*)"\} (?P<value>\S+)$')


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def get(port: int, path: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.headers.get("Content-Type", ""), answer.read().decode()
    finally:
        connection.close()


def samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    matches = [LINE.match(line) for line in lines]
    assert all(matches), lines
    return {m["name"]: float(m["value"]) for m in matches if m is not None}


def test_the_text_format() -> None:
    metrics = {"gpu/power_w": 350.5, "puzzle/u_so-far": -1e-7, "gate/h_warm": math.nan, "reward/mean": math.inf}
    text = exposition(7, metrics, 'a "b" \\ c')
    assert samples(text) == {
        "asd_megatron_step": 7.0,
        "asd_megatron_gpu_power_w": 350.5,
        "asd_megatron_puzzle_u_so_far": -1e-7,
    }
    assert r'{run="a \"b\" \\ c"}' in text and text.endswith("\n")
    assert "# HELP asd_megatron_gpu_power_w power of a GPU (W)\n# TYPE asd_megatron_gpu_power_w gauge\n" in text


def test_the_server_serves_the_last_step_until_it_is_closed() -> None:
    server = MetricsServer(free_port(), "run")
    try:
        assert get(server.port, "/metrics")[0] == 200
        server.publish(1, {"reward/mean": 0.25, "evaluation/accuracy": 1.0})
        server.publish(2, {"reward/mean": 0.5})
        status, kind, text = get(server.port, "/metrics")
        assert status == 200 and kind.startswith("text/plain; version=0.0.4")
        assert samples(text) == {"asd_megatron_step": 2.0, "asd_megatron_reward_mean": 0.5}
        assert get(server.port, "/")[0] == get(server.port, "/metrics/../etc/passwd")[0] == 404
        with pytest.raises(UserError, match=rf"logging.prometheus_port {server.port}.*choose another port"):
            MetricsServer(server.port, "other")
    finally:
        server.close()
    with pytest.raises(ConnectionRefusedError):
        get(server.port, "/metrics")
    MetricsServer(server.port, "next").close()
