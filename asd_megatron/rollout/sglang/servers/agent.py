"""Runs on another node, in the servers' own Python environment: `python agent.py FILE`.

FILE is JSON on a file system that both nodes see. Its "task" is one of

    survey  Say in one line what a server would find here: model folder, address, free ports, versions of packages.
    serve   Start a server through `child.py` beside this file, and end it when the run has ended.

The run holds a lease, a file with a number that it counts up. The agent ends the server's process group when the lease
has been removed (a second or two later), when its number has stood still for `lease_seconds` (the run's node, or the
network, is lost), and at SIGTERM, SIGINT or SIGHUP, as launchers forward them. `child.py` ends it when the agent dies.
It relies neither on a common clock nor on the launcher's standard input.

Standard library only, any Python 3.10 or later: nothing of this package can be imported here.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

ANSWER = "asd-megatron-survey "  # begins the line of a survey: launchers and logins print lines of their own
POLL_SECONDS = 0.5
PORT_SECONDS = 30.0  # for a server's predecessor to give its port up
END_SECONDS = 5.0  # for a server to end after SIGTERM
PORTS_TRIED = 100
VERSION_SECONDS = 60.0
LEASE_LOST = 3  # exit status


def main() -> int:
    """Do the task of the file that is named; returns the exit status."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm sends it to every process; it asks the trainer to stop
    with open(sys.argv[1]) as file:
        task = json.load(file)
    if task["task"] == "survey":
        print(ANSWER + json.dumps(survey(task)), flush=True)
        return 0
    return serve(task)


# ---------------------------------------------------------------- survey


def survey(task: "dict[str, Any]") -> "dict[str, Any]":
    """What is here of `model` (a folder) and `address`; `count` free ports; what `versions` prints, run by `python`."""
    address = task["address"]
    found: dict[str, Any] = {
        "hostname": socket.gethostname(),
        "model": os.path.isfile(os.path.join(task["model"], "config.json")),
        "address": can_listen(address, 0),
    }
    if found["address"]:
        found["ports"] = free_ports(address, task["count"], task["first_port"])
    words = [task["python"], "-I", "-c", task["versions"]]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=VERSION_SECONDS)
        found["versions"] = json.loads(done.stdout.strip().rpartition("\n")[2])
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        found["versions"], found["python_error"] = None, str(error)
    return found


def free_ports(address: str, count: int, first: int) -> "list[int]":
    """`count` free ports of `address`, fewer if there are not so many: from `first` on, or with 0 any below those that
    the system gives to outgoing connections."""
    if not first:
        with suppress(OSError, ValueError), open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            first = max(int(file.read().split()[0]) - 10_000, 10_000)
        first = (first or 22_000) + int.from_bytes(os.urandom(2), "big") % 9_000
    found: list[int] = []
    for port in range(first, min(first + PORTS_TRIED, 65_536)):
        if len(found) < count and can_listen(address, port):
            found.append(port)
    return found


def can_listen(address: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


# ---------------------------------------------------------------- serve


class Lease:
    """The run's sign of life. `lost`: why the server has to end, or ""."""

    def __init__(self, path: str, seconds: float) -> None:
        self.path, self.seconds = path, seconds
        self.content, self.since = "", time.monotonic()

    def lost(self) -> str:
        try:
            with open(self.path) as file:  # opened each time: NFS looks at the server then
                content = file.read()
        except FileNotFoundError:
            return "the run has ended this server"
        except OSError:  # the file system does not answer: as if it stood still
            content = self.content
        if content != self.content:
            self.content, self.since = content, time.monotonic()
        if time.monotonic() - self.since > self.seconds:
            return f"no sign of life from the run for {self.seconds:.0f} s"
        return ""


def serve(task: "dict[str, Any]") -> int:
    """Run the server of `task` until it, the run or the launcher has ended."""
    ending: list[str] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: ending.append(signal.Signals(number).name))
    lease = Lease(task["lease"], task["lease_seconds"])
    deadline = time.monotonic() + PORT_SECONDS
    while not can_listen(task["address"], task["port"]) and time.monotonic() < deadline:
        if ending or lease.lost():
            return LEASE_LOST
        time.sleep(POLL_SECONDS)
    server, scratch = start(task)
    try:
        while server.poll() is None:
            why = ending[0] if ending else lease.lost()
            if why:
                say(f"{why}: ending the server")
                return LEASE_LOST
            time.sleep(POLL_SECONDS)
        return server.returncode if server.returncode >= 0 else 128 - server.returncode
    finally:
        end(server)
        shutil.rmtree(scratch, ignore_errors=True)


def start(task: "dict[str, Any]") -> "tuple[subprocess.Popen[bytes], str]":
    """The server's process, and a folder that exists as long as it."""
    scratch = tempfile.mkdtemp(prefix=task["scratch_prefix"])
    environment = {name: value for name, value in os.environ.items() if not re.fullmatch(task["not_passed"], name)}
    if task["rendezvous"]:  # of ranks on this node alone, in a file: over TCP it would be open on every interface
        environment[task["rendezvous"]] = f"file://{scratch}/ranks"
    environment.update(task["variables"])
    child = os.path.join(os.path.dirname(os.path.abspath(__file__)), "child.py")
    server = subprocess.Popen(
        [task["python"], child, str(os.getpid()), task["module"], *task["arguments"]],
        stdin=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    assert server.stdin is not None
    with suppress(BrokenPipeError), server.stdin as pipe:
        pipe.write(json.dumps(task["secret"]).encode() + b"\n")
    return server, scratch


def end(server: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to the server, END_SECONDS later SIGKILL to its process group, in which its watcher may still be."""
    if server.poll() is None:
        with suppress(ProcessLookupError):
            server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(END_SECONDS)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, signal.SIGKILL)


def say(text: str) -> None:
    with suppress(OSError):  # the launcher, which reads it, may be gone
        os.write(1, f"agent: {text}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
