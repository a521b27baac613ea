"""Which protections of the sandbox this machine has, found out by using them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from asd_megatron.sandbox import seccomp
from asd_megatron.sandbox.launch import Interpreter, Protections, SandboxError, SandboxLimits, bubblewrap_version
from asd_megatron.sandbox.pool import SandboxPool, Status, StdinTest, TestedProgram

OLDEST_BUBBLEWRAP = (0, 8)  # --size, --disable-userns
INSTALL = "install bubblewrap 0.8 or newer (Debian 12, Ubuntu 24.04: apt-get install bubblewrap)"
ALLOW = (
    "let this user create user namespaces (sysctl user.max_user_namespaces; on Ubuntu"
    " kernel.apparmor_restrict_unprivileged_userns=0; in containers see docs/sandbox.md)"
)
PROBE_LIMITS = SandboxLimits(processes=4, cpu_seconds=20.0, wall_seconds=300.0, memory_bytes=512 << 20)
# Prints what an honest program finds: whether a network socket is refused, and how many processes it can start.
PROBE = """
import os, socket
try:
    socket.socket(socket.AF_INET).close()
    print("sockets")
except PermissionError:
    print("no sockets")
read, write = os.pipe()
started = 0
try:
    while started < 20:
        if os.fork() == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        started += 1
except OSError:
    pass
print(started)
"""


@dataclass(frozen=True)
class Missing:
    """A protection that this machine does not give, and what to do about it."""

    protection: str
    remedy: str


def usable_protections(interpreter: Interpreter) -> tuple[Protections, list[Missing]]:
    """What a sandbox can use on this machine, and what is missing. Takes about 0.1 s."""
    version = bubblewrap_version()
    namespaces = "namespaces, read-only system, private /tmp (bubblewrap)"
    if version is None or version < OLDEST_BUBBLEWRAP:
        found = "no bwrap on the path" if version is None else f"bwrap {'.'.join(map(str, version))}"
        return Protections(False, False), [Missing(f"{namespaces}: {found}", INSTALL)]
    missing = []
    protections, reason, lines = Protections(True, seccomp.supported()), "", None
    while lines is None:
        lines, reason = _probe(interpreter, protections)
        if lines is None and not protections.seccomp:
            return Protections(False, False), [Missing(f"{namespaces}: {reason}", ALLOW)]
        protections = protections if lines is not None else Protections(True, False)
    if not protections.seccomp or lines[:1] != ["no sockets"]:
        remedy = "use a kernel with CONFIG_SECCOMP_FILTER, on x86_64 or aarch64"
        missing.append(Missing(f"seccomp filter: {reason or 'it has no effect'}", remedy))
    if len(lines) < 2 or int(lines[1]) > PROBE_LIMITS.processes:
        remedy = "use Linux 5.14 or newer, and do not train as a root that cannot become another user"
        missing.append(Missing("limit on processes: RLIMIT_NPROC has no effect in the sandbox", remedy))
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        remedy = "use a kernel with CONFIG_PROC_CHILDREN, and mount /proc"
        missing.append(Missing("limit on the memory of all processes: a process's children are not known", remedy))
    return protections, missing


def _probe(interpreter: Interpreter, protections: Protections) -> tuple[list[str] | None, str]:
    """What the probe printed; None if no sandbox starts, and why."""
    pool = SandboxPool(interpreter, PROBE_LIMITS, protections=protections)
    try:
        [results] = pool.run([TestedProgram(PROBE, [StdinTest("")])])
    except SandboxError as e:
        return None, str(e)
    if results is None:
        return None, pool.last_failure
    [result] = results
    if result.status is not Status.FINISHED:
        return None, f"a harmless program ended with {result.status}: {result.stderr[-200:]}"
    return result.stdout.decode().splitlines(), ""
