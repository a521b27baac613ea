"""A Python environment with a fake SGLang, a small HTTP server, so that a pool's processes start in a second.

Its server, or router, answers every path (a POST with the key alone: what it was sent), has a child process, and
misbehaves as its arguments say: `--fail` (says why and ends), `--port-in-use` (the same, the first time),
`--never-healthy`, `--stubborn` (ignores SIGTERM).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = """
import http.server, json, pathlib, signal, subprocess, sys, time

arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1]
print("arguments", arguments, flush=True)
if "--fail" in arguments:
    sys.exit("RuntimeError: CUDA out of memory. Tried to allocate 7 GiB")
tried = pathlib.Path(__file__).with_name("tried")
if "--port-in-use" in arguments and not tried.exists():
    tried.touch()
    sys.exit("OSError: [Errno 98] error while attempting to bind on address: address already in use")
if "--stubborn" in arguments:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if "--model-path" in arguments:
    pathlib.Path(value("--model-path"), "child_" + value("--port")).write_text(str(child.pid))

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if "--never-healthy" in arguments else 200)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        allowed = "--api-key=" + self.headers.get("Authorization", "").removeprefix("Bearer ") in arguments
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"path": self.path, "body": body}).encode())
    def log_message(self, *arguments):
        pass

http.server.HTTPServer((value("--host"), int(value("--port"))), Handler).serve_forever()
"""
INTERPRETER = """#!/bin/sh
case "$1 $3" in
    "-I "*rebuild_cuda_tensor*) echo '{ipc}' ;;
    "-I "*) echo '{{"sglang": "{version}", "torch": "2.13.0+cpu", "nccl": null, "nccl_library": null}}' ;;
    *) PYTHONPATH={folder} exec {python} "$@" ;;
esac
"""


def fake_python(folder: Path, version: str = "0.5.23", ipc: str = "[]") -> Path:
    """An interpreter in `folder` that finds the fake SGLang, of that version, whose torch has these arguments of
    `rebuild_cuda_tensor` (JSON), and is this one otherwise."""
    for module in ("sglang/launch_server.py", "sglang_router/launch_router.py"):
        (folder / module).parent.mkdir(parents=True)
        (folder / module).write_text(SERVER)
    path = folder / "python"
    path.write_text(INTERPRETER.format(version=version, ipc=ipc, folder=folder, python=sys.executable))
    path.chmod(0o755)
    return path


def alive(pid: int) -> bool:
    """Whether process `pid` runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def group_members(group: int) -> list[int]:
    """The processes of process group `group` that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) == group and alive(int(path.name)):
                found.append(int(path.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Within `seconds`, on a busy machine too."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
