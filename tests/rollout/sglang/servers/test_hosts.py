"""Servers on other nodes, here addresses of loopback, with a launcher that passes on no signal, as ssh does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.servers import hosts, remote
from asd_megatron.rollout.sglang.servers.hosts import SLURM_LAUNCHER, Launcher
from asd_megatron.rollout.sglang.servers.options import ServerOptions
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.servers.remote import JointProcess
from tests.rollout.sglang.fake_environment import alive, fake_python, wait_until

SECONDS = 30.0
DETACHED = 'host=$1; shift; echo "welcome to $host"; ON_HOST=$host setsid "$@" & wait $!'


@pytest.fixture
def options(tmp_path: Path) -> ServerOptions:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return ServerOptions(
        python=fake_python(tmp_path / "environment"),
        model=tmp_path / "model",
        api_key="generate",
        admin_key="administer",
    )


def launcher(tmp_path: Path, script: str = DETACHED) -> Launcher:
    path = tmp_path / "launch.sh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Launcher.of(f"{path} {{host}}", tmp_path / "logs")


def pool_of(options: ServerOptions, nodes: list[tuple[str, ...]], **over: Any) -> ServerPool:
    folder = options.model.parent
    settings: dict[str, Any] = {"start_timeout": SECONDS, "backoff": (0.1, 1.0), "say": lambda text: None}
    settings |= {"launcher": launcher(folder)} | over
    return ServerPool([replace(options, nodes=names) for names in nodes], folder / "logs", **settings)


def processes(folder: Path) -> dict[int, str]:
    """The command lines of running processes that name `folder`."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line and alive(int(path.parent.name)):
            found[int(path.parent.name)] = line
    return found


def test_servers_on_two_hosts(options: ServerOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with pool_of(options, [("127.0.0.2",), ("127.0.0.3",)], first_port=28000) as pool:
        assert pool.states == ["healthy", "healthy"] and pool.versions.sglang == "0.5.23"
        assert [re.fullmatch(r"http://127\.0\.0\.(\d):280\d\d", url)[1] for url in pool.urls] == ["2", "3"]  # type: ignore[index]
        running = processes(tmp_path)
        assert not any("administer" in line for line in running.values())
        tasks = list((tmp_path / "logs").glob("server_*/task.json"))
        assert len(tasks) == 2 and all(
            path.stat().st_mode & 0o077 == 0 for path in (*tasks, *(t.parent for t in tasks))
        )
        server = next(pid for pid, line in running.items() if "sglang.launch_server" in line and "127.0.0.3" in line)
        environment = dict(
            entry.split("=", 1) for entry in Path(f"/proc/{server}/environ").read_text().split("\0") if "=" in entry
        )
        assert environment["ON_HOST"] == "127.0.0.3" and environment["GLOO_SOCKET_IFNAME"] == "lo"
        assert "RANK" not in environment and "127.0.0.3" in environment["no_proxy"].split(",")
        assert environment["PYTHONPATH"].startswith(str(tmp_path / "environment"))  # the fake's; else the plugin
        text = pool.processes[1].log.read_text()
        assert "welcome to 127.0.0.3" in text and "'--admin-api-key=administer'" in text
        # The launcher's death is the server's, and it comes back at its address.
        os.kill(pool.processes[0].pid or 0, signal.SIGKILL)
        wait_until(lambda: pool.counters["restarts"] == 1 and pool.states == ["healthy", "healthy"])
        assert pool.processes[0].healthy() and server in processes(tmp_path)
    wait_until(lambda: not processes(tmp_path))
    assert not list((tmp_path / "logs").glob("*/task.json"))


def test_a_run_that_is_killed_leaves_no_server(options: ServerOptions, tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from asd_megatron.rollout.sglang.servers.hosts import Launcher
from asd_megatron.rollout.sglang.servers.options import ServerOptions
from asd_megatron.rollout.sglang.servers.pool import ServerPool
options = ServerOptions(Path({str(options.python)!r}), Path({str(options.model)!r}), api_key="a", admin_key="b",
                        nodes=("127.0.0.2",))
launcher = Launcher({launcher(tmp_path).text!r}, Path({str(tmp_path / "logs")!r}))
ServerPool([options], launcher.folder, launcher=launcher, start_timeout={SECONDS}).start()
print("ready", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=2 * SECONDS)
    assert done.stdout == "ready\n", done.stderr
    wait_until(lambda: not processes(tmp_path))


def test_a_server_ends_when_its_lease_stands_still(
    options: ServerOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As when the run's node is lost, or the network: nothing reaches the agent any more."""
    monkeypatch.setattr(remote, "LEASE_SECONDS", 2.0)
    with pool_of(options, [("127.0.0.2",)], restart=False) as pool:
        time.sleep(3.0)
        assert pool.states == ["healthy"]
        group = os.getpgid(pool.processes[0].pid or 0)
        watcher = next(
            pid for pid, line in processes(tmp_path).items() if "--lease" in line and os.getpgid(pid) == group
        )
        os.kill(watcher, signal.SIGSTOP)
        wait_until(lambda: "given up" in pool.states)
        assert "no sign of life from the run for 2 s: ending the server" in pool.processes[0].log.read_text()
    wait_until(lambda: not processes(tmp_path))


def test_one_server_on_two_hosts(options: ServerOptions, tmp_path: Path) -> None:
    with pool_of(replace(options, tensor_parallel=4), [("127.0.0.2", "127.0.0.3")]) as pool:
        (server,) = pool.processes
        assert isinstance(server, JointProcess) and len(server.parts) == 2
        commands = [" ".join(part.command) for part in server.parts]
        meeting = re.search(r"--dist-init-addr (127\.0\.0\.2:\d+)", commands[0])
        assert meeting and all(f"--nnodes 2 --node-rank {n} {meeting[0]}" in c for n, c in enumerate(commands))
        assert all("--tp-size 4" in line for line in commands) and meeting[1] not in pool.urls[0]
        assert [re.search(r"--host (\S+)", line)[1] for line in commands] == ["127.0.0.2", "127.0.0.3"]  # type: ignore[index]
        task = json.loads(next((tmp_path / "logs").glob("server_0_node_1.*/task.json")).read_text())
        assert task["rendezvous"] == ""  # its ranks meet over TCP, not in a file of one node
        assert Path(task["variables"]["PYTHONPATH"], "asd_weight_delta.py").is_relative_to(tmp_path / "logs")
        assert Path(task["variables"]["PYTHONPATH"], "asd_weight_delta.py").is_file()
        os.kill(server.parts[1].pid or 0, signal.SIGKILL)  # a part's death is the server's
        first = server.parts[0].pid
        wait_until(lambda: pool.counters["restarts"] == 1 and pool.states == ["healthy"])
        assert server.parts[0].pid != first and all(part.alive for part in server.parts)
    wait_until(lambda: not processes(tmp_path))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("model", r"127.0.0.2 does not see the model's folder .*/absent: put it on a file system"),
        ("python", r"127.0.0.2 has no .*/no/python \(rollout.server_python\)"),
        ("old", r"SGLang 0.5.9 in the environment of .* on 127.0.0.2 is older"),
        ("run folder", r"127.0.0.2 does not see the run folder"),
        ("refused", r"no command can be started on 127.0.0.2.*exit status 255 and said:\n    Permission denied"),
        ("launcher", r"rollout.server_launcher: /no/launcher cannot be started"),
        ("late", r"127.0.0.2 has not answered after 1 s to .*launch.sh 127.0.0.2"),
        ("address", r"192.0.2.1 is 192.0.2.1 here, and no interface of that node \(\S+\) has this address"),
        ("name", r"the host 'no-such-host.invalid' cannot be resolved"),
        ("space", r"would read '.*/a b/program/agent.py' as something else"),
        ("ports", r"127.0.0.2 has too few free ports from 65535 \(rollout.server_port\) on"),
    ],
)
def test_what_a_host_lacks(
    case: str, message: str, options: ServerOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = {"run folder": 'exec "$2" /nowhere/agent.py', "refused": "echo Permission denied >&2; exit 255"}
    scripts["late"] = "exec sleep 30"
    given = launcher(tmp_path, scripts.get(case, DETACHED))
    if case == "late":
        monkeypatch.setattr(hosts, "SURVEY_SECONDS", 1.0)
    over = {"model": tmp_path / "absent"} if case == "model" else {}
    over |= {"python": tmp_path / "no" / "python"} if case == "python" else {}
    over |= {"python": fake_python(tmp_path / "old", "0.5.9")} if case == "old" else {}
    given = replace(given, text="/no/launcher {host}") if case == "launcher" else given
    given = replace(given, folder=tmp_path / "a b") if case == "space" else given
    node = {"address": "192.0.2.1", "name": "no-such-host.invalid"}.get(case, "127.0.0.2")
    count, first = (2, 65535) if case == "ports" else (1, 0)
    with pytest.raises(UserError, match=message):
        hosts.placed([replace(options, nodes=(node,), **over)] * count, given, first)


def test_slurms_launcher_is_the_default_inside_its_jobs(tmp_path: Path) -> None:
    assert Launcher.of(None, tmp_path, {"SLURM_JOB_ID": "7"}).text == SLURM_LAUNCHER
    with pytest.raises(UserError, match="set rollout.server_launcher, a command with {host}"):
        Launcher.of(None, tmp_path, {})
