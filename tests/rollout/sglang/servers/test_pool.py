"""A pool's care for its processes, with a fake SGLang: restarts, limits, ends, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.servers.options import ServerOptions
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from tests.rollout.sglang.fake_environment import alive, fake_python, group_members, wait_until

SECONDS = 30.0  # within which everything here has happened, on a busy machine


@pytest.fixture
def options(tmp_path: Path) -> ServerOptions:
    (tmp_path / "model").mkdir()
    return ServerOptions(
        python=fake_python(tmp_path / "environment"),
        model=tmp_path / "model",
        api_key="generate",
        admin_key="administer",
    )


def pool_of(options: ServerOptions, servers: int = 1, *arguments: str, **over: Any) -> ServerPool:
    """A pool whose servers get these flags."""
    given = ServerOptions(**{**vars(options), "arguments": dict.fromkeys(arguments, True)})
    settings: dict[str, Any] = {"start_timeout": SECONDS, "backoff": (0.1, 1.0), "say": lambda text: None} | over
    return ServerPool([given] * servers, options.model.parent / "logs", **settings)


def child_of(pool: ServerPool, options: ServerOptions, index: int = 0) -> int:
    port = pool.urls[index].rpartition(":")[2]
    return int((options.model / f"child_{port}").read_text())


def test_a_port_that_two_servers_chose_at_once_is_no_reason_to_give_up(options: ServerOptions) -> None:
    said: list[str] = []
    with pool_of(options, 1, "port-in-use", say=said.append) as pool:
        assert pool.states == ["healthy"] and any("found a port in use" in line for line in said)


def test_start_and_stop(options: ServerOptions) -> None:
    with pool_of(options, 2) as pool:
        assert pool.states == ["healthy", "healthy"] and len(set(pool.urls)) == 2
        groups = [process.pid or 0 for process in pool.processes]
        children = [child_of(pool, options, index) for index in range(2)]
        assert all(os.getpgid(child) == group != os.getpgid(0) for child, group in zip(children, groups, strict=True))
        for group in groups:
            os.killpg(group, signal.SIGUSR1)  # as Slurm does; it asks the trainer to stop
        time.sleep(0.2)
        assert all(process.healthy() for process in pool.processes)
        log = pool.processes[0].log
        text = log.read_text()
        assert "'--api-key=generate', '--admin-api-key=administer'" in text  # the server has them
        assert b"administer" not in Path(f"/proc/{groups[0]}/cmdline").read_bytes()
        assert "administer" not in text.splitlines()[1]  # the command line that heads the log
        assert log.stat().st_mode & 0o077 == 0
    assert [group_members(group) for group in groups] == [[], []]
    pool.close()


def test_servers_of_this_machine_are_asked_without_a_proxy(
    options: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pool_of(options, start_timeout=10.0) as pool:
        assert pool.states == ["healthy"]
        environment = Path(f"/proc/{pool.processes[0].pid}/environ").read_bytes().split(b"\0")
    assert {b"no_proxy=localhost,127.0.0.1,::1,[::1]", b"NO_PROXY=localhost,127.0.0.1,::1,[::1]"} <= set(environment)


def test_a_router_is_kept_like_a_server(options: ServerOptions) -> None:
    with pool_of(options, 2, router=True) as pool:
        assert pool.states == ["healthy"] * 3 and pool.router_url not in [None, *pool.urls]
        text = (options.model.parent / "logs" / "router.log").read_text()
        assert f"'--worker-urls', '{pool.urls[0]}', '{pool.urls[1]}'" in text
        assert "'--api-key=generate'" in text and "administer" not in text
        heads = [line for line in text.splitlines() if line.startswith("=== ")]
        assert len(heads) == 1 and "generate" not in heads[0]
        assert pool.router is not None and pool.router.pid is not None
        os.kill(pool.router.pid, signal.SIGKILL)
        wait_until(lambda: pool.counters["restarts"] == 1 and pool.states == ["healthy"] * 3)


def test_a_dead_server_comes_back_at_its_address(options: ServerOptions) -> None:
    said: list[str] = []
    with pool_of(options, 2, say=said.append) as pool:
        urls, pids = list(pool.urls), [process.pid for process in pool.processes]
        orphan = child_of(pool, options)
        os.kill(pids[0] or 0, signal.SIGKILL)
        wait_until(lambda: pool.counters["deaths"] == 1)
        wait_until(lambda: not alive(orphan))
        wait_until(lambda: pool.states == ["healthy", "healthy"])
        assert pool.urls == urls and pool.processes[0].healthy()
        assert pool.processes[0].pid != pids[0] and pool.processes[1].pid == pids[1]
        assert pool.counters == {"deaths": 1, "restarts": 1, "gave_up": 0}
    assert [sentence.partition(") ")[2].partition(":")[0] for sentence in said] == [
        "died (signal SIGKILL)",
        "is healthy again",
    ]


def test_backoff_doubles_and_ends(options: ServerOptions, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []
    with pool_of(options, max_restarts=3, say=said.append, backoff=(0.1, 0.2)) as pool:
        for _ in range(4):
            wait_until(lambda: pool.states == ["healthy"])
            pool.processes[0].stop(grace=0)
            wait_until(lambda: pool.states in (["starting"], ["given up"]))
        assert pool.states == ["given up"] and not pool.processes[0].alive
        assert pool.counters == {"deaths": 4, "restarts": 3, "gave_up": 1}
    pauses = [sentence.split("again in ")[1].split(" s")[0] for sentence in said if "again in" in sentence]
    assert pauses == ["0.1", "0.2", "0.2"]
    assert "is given up" in caplog.text


def test_no_server_is_started_while_starts_are_deferred(options: ServerOptions) -> None:
    with pool_of(options, 2) as pool:
        assert pool.restarting == []
        pool.defer_starts()
        pool.kill(pool.urls[0])
        assert pool.restarting == [pool.processes[0].name]
        wait_until(lambda: pool.states == ["waiting", "healthy"])
        time.sleep(0.3)  # longer than the pause before a restart
        assert pool.counters["restarts"] == 0 and not pool.processes[0].alive
        pool.allow_starts()
        wait_until(lambda: pool.processes[0].alive)
        pool.defer_starts()  # in the middle of its start, or just after: either way nothing starts now
        wait_until(lambda: pool.states[0] in ("waiting", "healthy"))
        assert pool.processes[0].alive == (pool.states[0] == "healthy")
        pool.allow_starts()
        wait_until(lambda: pool.restarting == [] and pool.states == ["healthy", "healthy"])
        assert pool.counters["gave_up"] == 0 and pool.processes[0].healthy()


def test_a_proxy_of_the_environment_is_not_asked(options: ServerOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pool_of(options) as pool:
        assert pool.processes[0].healthy()


def test_without_restarts(options: ServerOptions) -> None:
    with pool_of(options, restart=False) as pool:
        pool.processes[0].stop(grace=0)
        wait_until(lambda: pool.states == ["given up"])
        assert pool.counters == {"deaths": 1, "restarts": 0, "gave_up": 1}


def test_a_server_that_cannot_start(options: ServerOptions) -> None:
    pool = pool_of(options, 2, "fail")
    with pytest.raises(UserError) as raised:
        pool.start()
    message = str(raised.value)
    assert "ended with exit status 1 before it was ready: the device has too little free memory" in message
    assert "CUDA out of memory. Tried to allocate 7 GiB" in message
    assert any(str(process.log) in message for process in pool.processes)  # whichever ended first
    assert [group_members(process.pid or 0) for process in pool.processes] == [[], []]


def test_a_start_is_bounded(options: ServerOptions) -> None:
    pool = pool_of(options, 1, "never-healthy", start_timeout=2.0)
    begin = time.monotonic()
    with pytest.raises(UserError, match="was not ready after 2 s"):
        pool.start()
    assert time.monotonic() - begin < SECONDS
    assert group_members(pool.processes[0].pid or 0) == []


def test_a_server_that_ignores_sigterm_is_killed(options: ServerOptions) -> None:
    with pool_of(options, 1, "stubborn") as pool:
        process = pool.processes[0]
        begin = time.monotonic()
        process.stop(grace=0.5)
        assert time.monotonic() - begin >= 0.5
        assert group_members(process.pid or 0) == []
        assert process.status == "signal SIGKILL"


def test_a_missing_environment_is_told_at_once(options: ServerOptions, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"create\.sh"):
        ServerPool([ServerOptions(**{**vars(options), "python": tmp_path / "nowhere"})], tmp_path)


TRAINER = """
import sys, time
from pathlib import Path
from asd_megatron.rollout.sglang.servers.options import ServerOptions
from asd_megatron.rollout.sglang.servers.pool import ServerPool
pool = ServerPool([ServerOptions(python=Path(sys.argv[1]), model=Path(sys.argv[2]))], Path(sys.argv[2]))
pool.start()
print(pool.processes[0].pid, flush=True)
if sys.argv[3] == "exit":
    sys.exit(0)
time.sleep(600)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, None], ids=["SIGKILL", "SIGTERM", "exit"])
def test_servers_end_with_the_trainer(options: ServerOptions, ending: signal.Signals | None) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    words = [sys.executable, "-c", TRAINER, str(options.python), str(options.model), "stay" if ending else "exit"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as trainer:
        try:
            assert trainer.stdout is not None
            group = int(trainer.stdout.readline())
            if ending:
                assert len(group_members(group)) == 3  # the server, its child and the watcher
                trainer.send_signal(ending)
            wait_until(lambda: group_members(group) == [])
            assert trainer.wait(SECONDS) == (-ending if ending else 0)
            assert bystander.poll() is None
        finally:
            trainer.kill()
            bystander.kill()
            bystander.wait()
