"""One server process in its own process group, with its log in a file: start, health check, stop."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.servers.child import RENDEZVOUS, RENDEZVOUS_FOLDER, TIDY_SECONDS

CHILD = Path(__file__).with_name("child.py")
HEALTH_SECONDS = 5.0  # for one answer: SGLang generates a token first and polls once a second
END_SECONDS = 10.0
TAIL_LINES = 15
HARMLESS = "openai_harmony"  # SGLang logs that it is missing and runs without it
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # servers of this machine, whatever http_proxy is
CAUSES = (  # text in a log -> what to do; the first match counts
    ("address already in use", "another program uses its port: choose another one, or 0 for a free one"),
    ("Port is already in use", "another program uses a port next to its own: choose another one, or 0 for a free one"),
    ("unrecognized arguments", "this SGLang does not know one of the server arguments"),
    (
        "out of memory",
        "the device has too little free memory: lower mem-fraction-static or raise tensor parallelism",
    ),
    (
        "Not enough memory",
        "the device has too little free memory: raise mem-fraction-static or tensor parallelism",
    ),
    ("No module named", "its environment is incomplete: create it again with tools/sglang_env/create.sh"),
    ("CUDA driver", "the environment's torch does not fit this machine's CUDA driver"),
    ("No such file or directory", "a file is missing, probably in the model's folder"),
    ("Repo id must be in the form", "the model's folder does not exist"),
    ("is not a local folder and is not a valid model identifier", "the model's folder does not exist"),
    ("Unrecognized model in", "the model's folder has no config.json that SGLang knows"),
)


class ServerProcess:
    """A process that answers `GET {url}{health}`: the command `[python, "-m", module, *arguments]`.

    `secret` arguments are passed through a pipe. It ends with this process, however this one ends, and so do its
    children; ending it signals its own process group alone. `name` is shown in messages.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        url: str,
        log: Path,
        secret: Sequence[str] = (),
        environment: Mapping[str, str] = os.environ,
        health: str = "/health",
    ) -> None:
        self.name, self.command, self.url, self.log = name, list(command), url, log
        self._secret, self._environment, self._health = list(secret), environment, health
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def pid(self) -> int | None:
        """The server's main process, the leader of its group; None before the first start."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """Whether the main process runs."""
        return self._process is not None and self._exit_status() is None

    @property
    def status(self) -> str:
        """Not started, running, or how it ended: for messages."""
        if self._process is None:
            return "not started"
        code = self._exit_status()
        if code is None:
            return "running"
        return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def _exit_status(self) -> int | None:
        """As `Popen.poll`, without reaping a process that has ended: its id, and so its group's, is not given to
        another process before the group has been ended.
        """
        assert self._process is not None
        if self._process.returncode is not None:
            return self._process.returncode
        found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def start(self) -> None:
        """Start it, or start it again when it has ended. Raises UserError if its Python cannot be started."""
        assert not self.alive, f"{self.name} runs already"
        self._end_group()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        words, environment = self._prepare()
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)  # SGLang logs its keys
        try:
            os.write(handle, f"\n=== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(self.command)}\n".encode())
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=handle,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"{self.name}: {words[0]} cannot be started ({error})") from error
        finally:
            os.close(handle)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(json.dumps(self._secret).encode() + b"\n")

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        """The words that start it, and its variables. Makes the folder that lives as long as the process."""
        python, _, module, *arguments = self.command
        self._scratch = tempfile.TemporaryDirectory(prefix=RENDEZVOUS_FOLDER, ignore_cleanup_errors=True)
        # Its ranks rendezvous through a file: over TCP one of them would listen on every interface.
        environment = {RENDEZVOUS: f"file://{self._scratch.name}/ranks"} | dict(self._environment)
        return [python, str(CHILD), str(os.getpid()), module, *arguments], environment

    def healthy(self, timeout: float = HEALTH_SECONDS) -> bool:
        """Whether it answers as healthy within `timeout` seconds."""
        if not self.alive:
            return False
        try:
            with DIRECT.open(self.url + self._health, timeout=timeout) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException, ValueError):
            return False

    def stop(self, grace: float = 10.0) -> None:
        """End it and its children: SIGTERM to the main process, after `grace` seconds SIGKILL to its group."""
        if self.alive and grace > 0:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + grace
            while self.alive and time.monotonic() < deadline:
                time.sleep(0.02)
        self._end_group()

    def _end_group(self) -> None:
        """Kill what is left of its process group and wait, some seconds at most, until nothing of it runs: its devices
        are free then.
        """
        if self._process is None or self._process.returncode is not None:
            return
        group = self._process.pid
        self._signal(signal.SIGKILL)
        _wait_for_group(group, 1, TIDY_SECONDS)  # the watcher stays
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        _wait_for_group(group, 0, END_SECONDS)
        with suppress(subprocess.TimeoutExpired):  # it may hang in a driver call
            self._process.wait(END_SECONDS)
        if self._scratch is not None:
            self._scratch.cleanup()

    def _signal(self, number: signal.Signals) -> None:
        """To the main process alone, which has not been reaped."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def tail(self, lines: int = TAIL_LINES) -> list[str]:
        """The last lines that the log has of the latest start."""
        try:
            text = self.log.read_bytes()[-200_000:].decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.rpartition("\n=== ")[2].splitlines()[1:] if line.strip()][-lines:]

    @property
    def port_taken(self) -> bool:
        """Whether its log says that a port was in use."""
        return "already in use" in "\n".join(self.tail(400)).lower()

    def explain(self) -> str:
        """`: likely cause`, and the last lines of the log with its path, to be appended to a sentence."""
        text = "\n".join(line for line in self.tail(400) if HARMLESS not in line).lower()
        cause = next((advice for words, advice in CAUSES if words.lower() in text), "")
        said = "\n".join(f"    {line[:300]}" for line in self.tail()) or "    (nothing)"
        return f"{f': {cause}' if cause else ''}\n  the last lines of {self.log}:\n{said}"


def _wait_for_group(group: int, left: int, seconds: float) -> None:
    """Wait until at most `left` processes of process group `group` run, for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while _running(group) > left and time.monotonic() < deadline:
        time.sleep(0.02)


def _running(group: int) -> int:
    """Number of running processes of a group. Zombies, which may stay unreaped in a container, do not count."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = path.read_bytes().rpartition(b")")[2].split()[:3]
            found += int(its_group) == group and state not in (b"Z", b"X")
    return found
