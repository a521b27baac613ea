"""Two real SGLang servers of one tiny float32 Qwen3, started once a test session, when the first test asks for them.

A test takes `sglang_pair`: both servers healthy, idle, with the weights of `folder` under the label "default",
whatever an earlier test did to them. `sglang_world` is the same pair as it happens to be, for fixtures of a wider
scope, which call `restore` themselves. Such tests carry `@pytest.mark.sglang`.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.rollout.sglang.servers.options import ServerOptions
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.servers.process import DIRECT

ROOT = Path(__file__).parents[3]
API_KEY = "generation-key-of-the-tests"
ADMIN_KEY = "administration-key-of-the-tests"
START_SECONDS = 400.0  # 25 for the pair on two quiet cores


def sglang_python() -> Path:
    """The interpreter of the SGLang environment; fails the test if there is none."""
    python = Path(os.environ.get("ASD_MEGATRON_SGLANG_PYTHON") or ROOT / ".venv-sglang" / "bin" / "python")
    if not python.exists():
        pytest.fail(f"no SGLang environment at {python}: run `make sglang`", pytrace=False)
    return python


def server_options(folder: Path, **over: Any) -> ServerOptions:
    """Options of a test server for the model in `folder`; `over` replaces some."""
    values: dict[str, Any] = {"python": sglang_python(), "model": folder, "api_key": API_KEY, "admin_key": ADMIN_KEY}
    return ServerOptions(**{**values, **over})


def request(url: str, path: str, body: Any = None, *, key: str = "", timeout: float = 60.0) -> tuple[int, Any]:
    """(status, JSON or text) of a POST with `body`, or of a GET without; `key` is the bearer token."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with DIRECT.open(urllib.request.Request(url + path, data, headers), timeout=timeout) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


@dataclass(frozen=True)
class SGLangWorld:
    """The pool, what its servers were started from, and their keys."""

    pool: ServerPool
    folder: Path
    api_key: str = API_KEY
    admin_key: str = ADMIN_KEY

    @property
    def urls(self) -> list[str]:
        return self.pool.urls

    @property
    def pids(self) -> list[int]:
        """Main processes, in the order of the URLs; a restart changes them."""
        return [process.pid or 0 for process in self.pool.processes]

    def generate(self, index: int, body: dict[str, Any], timeout: float = 60.0) -> tuple[int, Any]:
        """`/generate` of server `index` with the generation key."""
        return request(self.urls[index], "/generate", body, key=self.api_key, timeout=timeout)

    def admin(self, index: int, path: str, body: Any = None, timeout: float = 60.0) -> tuple[int, Any]:
        """A POST to server `index` with the administration key."""
        return request(self.urls[index], path, {} if body is None else body, key=self.admin_key, timeout=timeout)

    def info(self, index: int) -> dict[str, Any]:
        """`/server_info` of server `index`."""
        return dict(request(self.urls[index], "/server_info", key=self.api_key)[1])

    def wait_healthy(self, seconds: float = START_SECONDS) -> None:
        """Until both servers are healthy: the pool starts a dead one again."""
        deadline = time.monotonic() + seconds
        while set(self.pool.states) != {"healthy"}:
            if time.monotonic() > deadline:
                pytest.fail(f"servers are {self.pool.states} after {seconds:.0f} s{self.pool.processes[0].explain()}")
            time.sleep(0.2)

    def slow(self, seconds: float | None) -> None:
        """Make every forward of the servers that live take so much longer, so that there is a middle of a generation;
        None: no longer. `restore` undoes it too."""
        for index in range(len(self.urls)):
            with suppress(OSError):
                self.admin(index, "/slow_down", {"forward_sleep_time": seconds})

    def restore(self) -> None:
        """Both servers running, idle, with the weights of `folder` under the label "default"."""
        for index, process in enumerate(self.pool.processes):
            if self.pool.states[index] == "healthy" and not self._reset(index):
                process.stop(grace=0)  # beyond repair: the pool starts it again, from the folder
        self.wait_healthy()

    def _reset(self, index: int) -> bool:
        try:
            for path, body in (
                ("/abort_request", {"abort_all": True}),
                ("/end_weight_update", {}),  # refused when none is open
                ("/continue_generation", {}),
                ("/slow_down", {"forward_sleep_time": None}),
            ):
                self.admin(index, path, body, timeout=10.0)
            body = {"model_path": str(self.folder), "weight_version": "default"}
            return self.admin(index, "/update_weights_from_disk", body, timeout=30.0)[0] == 200
        except OSError:
            return False


@pytest.fixture(scope="session")
def sglang_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangWorld]:
    """The pair, started at its first use."""
    from tests.models.tiny import tiny_qwen3

    folder = tiny_qwen3(tmp_path_factory.mktemp("sglang") / "model")
    options = [server_options(folder)] * 2
    logs = tmp_path_factory.mktemp("sglang_logs")
    pool = ServerPool(options, logs, start_timeout=START_SECONDS, max_restarts=1000, backoff=(0.1, 0.1))
    with pool:
        yield SGLangWorld(pool, folder)


@pytest.fixture
def sglang_pair(sglang_world: SGLangWorld) -> SGLangWorld:
    """The pair in its original state."""
    sglang_world.restore()
    return sglang_world
