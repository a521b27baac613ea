"""Runs inside the server's own Python environment: `python child.py PARENT_PID MODULE ARGUMENT...`.

Becomes `python -m MODULE ARGUMENT...` with three differences. Further arguments, the secret ones, are read as a JSON
list from standard input, so that no process list shows them. The server's answers about itself omit them. And a small
watcher process, forked before anything is imported, ends the process group as soon as the parent has ended, for
whatever reason, or the server has died and left children behind. (PR_SET_PDEATHSIG alone is not enough: it follows the
thread that started the child, and does not reach the grandchildren.)

`python child.py PARENT_PID --lease FOLDER COMMAND...` starts a server on another node: it becomes COMMAND, which ends
with the agent's command line (`agent.py`). The watcher counts up the number in FOLDER/lease, and removes FOLDER at the
end.

Standard library only, any Python 3.10 or later: nothing of this package can be imported here.
"""

import contextlib
import importlib
import json
import os
import runpy
import shutil
import signal
import sys
import time
from typing import Any

POLL_SECONDS = 0.5
LEASED = "--lease"
LEASE = "lease"  # the file
RENDEZVOUS = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
RENDEZVOUS_FOLDER = "sglang_server_"  # prefix of the temporary folder that is created for each start
TIDY_SECONDS = 1.0  # SGLang's children end with it, and then multiprocessing removes the memory that they shared


def parent_of(pid: int) -> int:
    """The parent of process `pid`; 0 if that has ended (a zombie has)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, parent = file.read().rpartition(b")")[2].split()[:2]
    except OSError:
        return 0
    return 0 if state in (b"Z", b"X") else int(parent)


def watch(server: int, parent: int, leased: str = "") -> None:
    """Wait until process `server` has ended or is no child of `parent` any more, then end this process group. Until
    then the lease in folder `leased` is renewed."""
    count = 0
    while parent_of(server) == parent:
        count += 1
        if leased:
            renew(leased, count)
        time.sleep(POLL_SECONDS)
    if leased:
        shutil.rmtree(leased, ignore_errors=True)
    with contextlib.suppress(ProcessLookupError):
        os.kill(server, signal.SIGKILL)  # its id is not reused as long as its group has members
    time.sleep(TIDY_SECONDS)
    folder = os.path.dirname(os.environ.get(RENDEZVOUS, "").removeprefix("file://"))
    if os.path.basename(folder).startswith(RENDEZVOUS_FOLDER):  # not an address that the user has set
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def renew(folder: str, count: int) -> None:
    """Write `count` into the lease. If it has been removed, or the file system fails, there is nothing to do."""
    with contextlib.suppress(OSError), open(os.path.join(folder, LEASE), "r+") as file:
        file.write(str(count))


def start_watcher(parent: int, leased: str = "") -> None:
    """Fork the watcher twice, so that it is no child of the server, which ends its children when it ends."""
    server = os.getpid()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)
    for ending in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(ending, signal.SIG_IGN)  # the server handles these itself, and the watcher outlives it
    os.close(0)
    watch(server, parent, leased)


def hide_keys(keys: "list[str]") -> None:
    """Redact `keys` in the log and in `GET /server_info`, where SGLang 0.5.23 shows both to every holder of the
    generation key.

    SGLang redacts other secrets there with a function that receives everything before it is shown; this wraps it.
    """
    try:
        core = importlib.import_module("sglang.srt.sampling.watermarking.core")
        redact = core.redact_watermark_secrets
    except (ImportError, AttributeError):  # another version of SGLang
        print("warning: this SGLang may show its administration key to holders of the generation key", flush=True)
        return

    def without_keys(value: Any, **options: Any) -> Any:
        return hidden(redact(value, **options))

    def hidden(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: hidden(item) for name, item in value.items()}
        if isinstance(value, list):
            return [hidden(item) for item in value]
        for key in keys if isinstance(value, str) else ():
            value = value.replace(key, "(hidden)")
        return value

    vars(core)["redact_watermark_secrets"] = without_keys


def main() -> None:
    """Start the watcher, then become the server, or the command that starts it on another node."""
    parent, module, *arguments = sys.argv[1:]
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm sends it to every process; it asks the trainer to stop
    if module == LEASED:
        folder, *command = arguments
        start_watcher(int(parent), folder)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            sys.exit(f"{command[0]} cannot be started ({error})")
    start_watcher(int(parent))
    secret = json.loads(sys.stdin.readline() or "[]")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    del sys.path[0]  # this file's folder, whose modules the server must not import
    if module.startswith("sglang."):
        hide_keys([word.partition("=")[2] for word in secret])
    sys.argv = [module, *arguments, *secret]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
