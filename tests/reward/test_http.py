"""Rewards by HTTP, from a server that does as it is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.data.jsonl import FrozenDict
from asd_megatron.errors import UserError
from asd_megatron.records import Problem
from asd_megatron.reward import http
from asd_megatron.reward.base import Response
from asd_megatron.reward.factory import make_verifier

PROBLEM = Problem("p1", "5", prompt="2 + 3?", extra=FrozenDict(tests=(1, FrozenDict(a=2))))
Reply = Callable[[list[dict[str, Any]]], tuple[int, Any, dict[str, str]]]


class Server(ThreadingHTTPServer):
    """Answers what `reply` makes of the responses asked for, and keeps requests and headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Reply = lambda asked: (200, {"rewards": [len(r["response"]) for r in asked]}, {})
        self.asked: list[list[dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.now = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["responses"]
        with self.server.lock:
            self.server.asked.append(asked)
            self.server.headers.append(dict(self.headers))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        status, value, headers = self.server.reply(asked)
        with self.server.lock:
            self.server.now -= 1
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # a proxy that nothing goes through
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.01)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@contextmanager
def verifier(server: Server, on_error: str = "stop", **options: Any) -> Iterator[Any]:
    made = make_verifier("http", on_error=on_error, truncated="judge", http={"url": server.url, **options})
    yield made
    made.close()


def test_responses_are_scored_in_batches(server: Server, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    (tmp_path / "key").chmod(0o600)
    texts = [Response(PROBLEM, "x" * n, truncated=n == 2) for n in range(10)]
    with verifier(server, batch=4, concurrency=2, key_file=str(tmp_path / "key")) as v:
        assert v.score(texts) == [float(n) for n in range(10)] and v.score([]) == [] and server.most <= 2
    assert sorted(map(len, server.asked)) == [0, 2, 4, 4]
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers)
    asked = next(r for batch in server.asked for r in batch if r["response"] == "xx")
    problem = {"id": "p1", "question": "2 + 3?", "messages": None, "answer": "5", "solution": None}
    assert asked == {
        "problem": {**problem, "extra": {"tests": [1, {"a": 2}]}},
        "response": "xx",
        "truncated": True,
    }


def test_a_failed_request_is_sent_again(server: Server) -> None:
    failures: list[tuple[int, Any, dict[str, str]]] = [(503, {}, {}), (429, {}, {"Retry-After": "0"}), (500, b"oh", {})]
    with verifier(server) as v:
        good, server.reply = server.reply, lambda asked: failures.pop() if failures else good(asked)
        assert v.score([Response(PROBLEM, "abc")]) == [3.0] and len(server.asked) == 5
        assert v.counters["errors"] == 0


FAILURES = [
    ((500, b"out of memory", {}), "status 500: out of memory", 3),  # sent again twice
    ((400, b"what?", {}), "status 400: what?", 1),
    ((302, b"", {"Location": "http://elsewhere"}), "status 302", 1),  # followed nowhere: the key stays here
    ((200, {"rewards": [1, 2]}, {}), "its answer has 2 rewards for 1 responses", 1),
    ((200, {"scores": [1]}, {}), "its answer is no JSON object", 1),
    ((200, b"<html>", {}), "its answer is no JSON object", 1),
    ((200, b"[" * 100_000, {}), "its answer is no JSON object", 1),
    ((200, {"rewards": ["1"]}, {}), "its answer has the reward '1', which is no finite number", 1),
    ((200, b'{"rewards": [NaN]}', {}), "which is no finite number", 1),
    ((200, {"rewards": [10**400]}, {}), "which is no finite number", 1),
    ((200, {"rewards": [None]}, {}), "its answer has null for it", 1),
    ((200, b" " * 70_000, {}), "its answer has more than 0 MiB", 1),
]


def test_what_has_no_reward_stops_or_counts(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 150_000)
    with verifier(server, retries=2) as stop, verifier(server, "zero", retries=2, batch=1) as zero:
        good = server.reply
        for failure, reason, attempts in FAILURES:
            monkeypatch.setattr(http, "MAX_ANSWER_BYTES", 60_000 if "0 MiB" in reason else 150_000)
            server.asked.clear()
            server.reply = lambda asked, failure=failure: failure  # type: ignore[misc]
            with pytest.raises(UserError) as e:
                stop.score([Response(PROBLEM, "a")])
            assert reason in str(e.value) and "(problem p1)" in str(e.value) and "reward.on_error" in str(e.value)
            assert len(server.asked) == attempts
            server.reply = lambda asked, failure=failure: failure if asked[0]["response"] == "a" else good(asked)  # type: ignore[misc]
            assert zero.score([Response(PROBLEM, "bb"), Response(PROBLEM, "a"), Response(PROBLEM, "cc")]) == [
                2.0,
                0.0,
                2.0,
            ]
        assert zero.counters["errors"] == len(FAILURES) and "counted as 0 (errors so far: 12)" in caplog.text


def test_a_server_that_hangs_is_a_timeout(server: Server) -> None:
    with verifier(server, "zero", timeout_seconds=0.2, retries=1) as v:
        over = threading.Event()
        server.reply = lambda asked: (200, {"rewards": [1] * over.wait(60)}, {})
        assert v.score([Response(PROBLEM, "a")] * 2) == [0.0, 0.0]
        assert v.counters["timeouts"] == 2 and v.counters["errors"] == 0 and len(server.asked) == 3
        over.set()


def test_settings_that_no_response_can_be_scored_with(server: Server, tmp_path: Path) -> None:
    for status, key in ((401, "key_file"), (403, "key_file"), (404, "url")):
        server.reply = lambda asked, status=status: (status, b"no", {})  # type: ignore[misc]
        with pytest.raises(UserError, match=rf"answered status {status}: no. Correct reward.http.{key}"):
            make_verifier("http", on_error="zero", http={"url": server.url})
    (tmp_path / "key").write_text("a b")
    (tmp_path / "key").chmod(0o644)
    for mode, reason in ((0o644, "can be read by others: chmod 600"), (0o600, "holds no key")):
        (tmp_path / "key").chmod(mode)
        with pytest.raises(UserError, match=reason):
            make_verifier("http", http={"url": server.url, "key_file": str(tmp_path / "key")})
    with pytest.raises(UserError, match=r"nobody here|no connection.*Start it first"):
        make_verifier("http", http={"url": "http://127.0.0.1:9/", "retries": 0})


def test_retry_after() -> None:
    assert http.retry_after("3") == 3.0 and http.retry_after("") is None and http.retry_after("soon") is None
    assert http.retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_the_example_server(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o600)
    program = Path(__file__).parents[2] / "examples" / "reward_server.py"
    process = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path / "key"), "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    try:
        assert process.stdout is not None
        port = re.fullmatch(r"listening on port (\d+)\n", process.stdout.readline())
        assert port is not None
        settings = {"url": f"http://127.0.0.1:{port[1]}", "key_file": str(tmp_path / "key"), "batch": 2}
        v = make_verifier("http", truncated="judge", http=settings)
        texts = [Response(PROBLEM, "It is 5."), Response(PROBLEM, "6"), Response(PROBLEM, "5", truncated=True)]
        assert v.score(texts) == [1.0, 0.0, 0.0]
        (tmp_path / "key").write_text("other")
        with pytest.raises(UserError, match="wrong key.*Correct reward.http.key_file"):
            make_verifier("http", http=settings)
    finally:
        process.kill()
        process.communicate()
