"""Programs that try to harm the machine, to read what they may not, or to look right without being right: what
`asd-megatron sandbox check`, the tests and the table in docs/sandbox.md are made of."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from asd_megatron.sandbox.pool import CallTest, StatementsTest, Status, StdinTest, Test

ESCAPED = "ESCAPED"  # printed by a program that got what it wanted
AGAIN = (StdinTest(""), StdinTest(""))  # the second test shows that the supervisor is unharmed

# Every program is preceded by this. CANARY: a file that anybody may read and delete, outside; SOCKET a Unix socket
# beside it; PORT: a TCP and UDP port, ABSTRACT: an abstract Unix socket, on which this machine listens; PARENT: the
# process that tests.
PRELUDE = """
CANARY, SOCKET, PORT, ABSTRACT, PARENT = {canary!r}, {socket!r}, {port}, {abstract!r}, {parent}
def must_fail(f, *args):
    try:
        value = f(*args)
    except (OSError, ValueError):
        return
    print("ESCAPED", f, args, value)
def syscall(number, *args):
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    number = number[os.uname().machine == "aarch64"]
    if libc.syscall(number, *args) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""


@dataclass(frozen=True)
class Attack:
    """A hostile program. `stopped_by`: what stops it, in words; `expected`: how each of its tests may end."""

    name: str
    program: str
    stopped_by: str
    expected: frozenset[Status]
    tests: Sequence[Test] = (StdinTest(""),)


def _attack(name: str, stopped_by: str, program: str, *expected: Status, tests: Sequence[Test] = AGAIN[:1]) -> Attack:
    return Attack(name, textwrap.dedent(program).strip(), stopped_by, frozenset(expected or (Status.FINISHED,)), tests)


TIME = (Status.CPU_TIME, Status.WALL_TIME)

ATTACKS: tuple[Attack, ...] = (
    # ---------------------------------------------------------------- exhausting the machine
    _attack(
        "fork bomb",
        "limit on processes, then the test's time",
        """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
        *TIME,
    ),
    _attack(
        "threads without end",
        "limit on processes",
        """
        import threading, time
        while True:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        """,
        Status.FAILED,
    ),
    _attack(
        "memory bomb, one process",
        "limit on the address space: MemoryError",
        """
        x = []
        while True:
            x.append(bytearray(1 << 24))
        """,
        Status.FAILED,
    ),
    _attack(
        "memory bomb, many processes",
        "limit on the memory of all processes, watched from outside",
        """
        import os, time
        for i in range(3):
            os.fork()
        x = b'x' * (150 << 20)
        time.sleep(60)
        """,
        Status.MEMORY,
    ),
    _attack(
        "memory outside any process (memfd, shared memory)",
        "seccomp; /tmp and /dev/shm are one small tmpfs",
        """
        import os, ctypes
        must_fail(os.memfd_create, 'x')
        must_fail(syscall, (29, 194), 1, 1 << 20, 0o1666)
        """,
    ),
    _attack(
        "endless stdout",
        "limit on output",
        """
        while True:
            print('x' * 1000)
        """,
        Status.OUTPUT,
    ),
    _attack(
        "endless stderr",
        "limit on output",
        """
        import sys
        while True:
            sys.stderr.write('x' * 1000)
        """,
        Status.OUTPUT,
    ),
    _attack(
        "endless loop",
        "processor time",
        """
        while True:
            pass
        """,
        *TIME,
    ),
    _attack(
        "sleeping",
        "wall time",
        """
        import time
        time.sleep(1000)
        """,
        Status.WALL_TIME,
    ),
    _attack(
        "stopping itself",
        "wall time",
        """
        import os, signal
        os.kill(os.getpid(), signal.SIGSTOP)
        """,
        Status.WALL_TIME,
    ),
    _attack(
        "reading more input than there is",
        "end of the file",
        """
        input()
        """,
        Status.FAILED,
    ),
    _attack(
        "endless recursion",
        "limits on stack and address space",
        """
        import sys
        sys.setrecursionlimit(10**9)
        def f(x):
            return f(x + 1)
        f(0)
        """,
        Status.FAILED,
        Status.SIGNAL,
        *TIME,
    ),
    _attack(
        "filling /tmp",
        "size of the tmpfs",
        """
        import os
        written = 0
        try:
            for i in range(1000):
                with open(f'/tmp/{i}', 'wb') as f:
                    written += f.write(bytes(1 << 20))
        except OSError:
            pass
        if written > 64 << 20:
            print('ESCAPED', written)
        """,
        tests=AGAIN,
    ),
    _attack(
        "a huge file",
        "limit on the size of files",
        """
        import os
        f = open('/tmp/huge', 'wb')
        must_fail(os.truncate, '/tmp/huge', 1 << 40)
        """,
    ),
    _attack(
        "raising its limits and its priority",
        "no capabilities",
        """
        import os, resource as r
        for which in (r.RLIMIT_NPROC, r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_FSIZE):
            must_fail(r.setrlimit, which, (1 << 40, 1 << 40))
        must_fail(os.nice, -5)
        must_fail(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))
        """,
    ),
    # ---------------------------------------------------------------- files
    _attack(
        "deleting files (rm -rf)",
        "mount namespace: the system is read-only, nothing else is there",
        """
        import os, subprocess
        must_fail(os.unlink, CANARY)
        folders = [os.path.dirname(CANARY), '/tmp', '/root', '/home', '/var', '/etc', '/dev', '/usr/bin']
        subprocess.run(['/bin/rm', '-rf', *folders], capture_output=True)
        if not os.path.exists('/usr/bin/env'):
            print('ESCAPED')
        """,
        tests=AGAIN,
    ),
    _attack(
        "overwriting the interpreter and the supervisor",
        "read-only mounts",
        """
        import os
        for path in ('/supervisor.py', os.__file__, '/usr/bin/env', '/etc/passwd', '/new'):
            must_fail(open, path, 'ab')
        """,
    ),
    _attack(
        "reading secrets (shadow, keys, home folders, the trainer's data)",
        "mount namespace: only the system's and the interpreter's folders are there",
        """
        import os
        paths = ['/etc/shadow', '/etc/ssh', '/root/.ssh', '/root/.bash_history', '/var/lib', '/run', '/home', CANARY]
        for path in [*paths, os.path.dirname(CANARY)]:
            must_fail(os.listdir if os.path.isdir(path) else open, path)
        """,
    ),
    _attack(
        "reading the trainer's environment",
        "the environment is cleared",
        """
        import os
        if any('SECRET' in name for name in os.environ):
            print('ESCAPED')
        """,
    ),
    _attack(
        "reading /proc of the trainer",
        "there is no /proc",
        """
        import os
        for path in ('/proc/self', '/proc/1/environ', f'/proc/{PARENT}/environ', f'/proc/{PARENT}/mem'):
            must_fail(open, path)
        must_fail(os.listdir, '/proc/self')
        """,
    ),
    _attack(
        "symbolic and hard links to the outside",
        "they lead to files of the sandbox",
        """
        import os
        os.symlink(CANARY, '/tmp/link')
        must_fail(open, '/tmp/link')
        os.unlink('/tmp/link')
        must_fail(os.link, '/usr/bin/env', '/tmp/hard')
        must_fail(os.chroot, '/tmp')
        must_fail(open, '/../../..' + CANARY)
        """,
    ),
    _attack(
        "inherited file descriptors",
        "none but stdin, stdout, stderr and the verdict channel",
        """
        import os
        for fd in range(4, 300):
            must_fail(os.fstat, fd)
        must_fail(os.read, 3, 1)
        """,
    ),
    _attack(
        "devices and new device files",
        "only null, zero, full and random; no capabilities",
        """
        import os, stat
        for name in ('mem', 'kmsg', 'sda', 'vda', 'nvidia0', 'kvm', 'fuse', 'tty', 'ptmx'):
            must_fail(open, '/dev/' + name)
        must_fail(os.mknod, '/tmp/disk', 0o600 | stat.S_IFBLK, os.makedev(254, 0))
        """,
    ),
    # ---------------------------------------------------------------- other processes, the kernel
    _attack(
        "signals to the trainer and to process 1",
        "pid namespace: the trainer has no number there, process 1 receives none",
        """
        import os, signal
        must_fail(os.kill, PARENT, signal.SIGTERM)
        for n in (signal.SIGKILL, signal.SIGSTOP, signal.SIGINT, signal.SIGTERM):
            os.kill(1, n)
        must_fail(os.kill, -1, 9)
        """,
        tests=AGAIN,
    ),
    _attack(
        "a thread that outlives the test",
        "the process of a test is ended",
        """
        import threading
        def f():
            def forever():
                while True: pass
            threading.Thread(target=forever).start()
            return 1
        """,
        tests=(CallTest("f", ()), CallTest("f", ())),
    ),
    _attack(
        "a daemon that outlives the test (double fork, setsid)",
        "all processes of the sandbox are ended after each test",
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                while True: time.sleep(1)
            os._exit(0)
        """,
        tests=AGAIN,
    ),
    _attack(
        "ptrace, reading other processes' memory",
        "seccomp",
        """
        must_fail(syscall, (101, 117), 16, 1, 0, 0)
        must_fail(syscall, (310, 270), 1, 0, 0, 0, 0, 0)
        """,
    ),
    _attack(
        "new namespaces and mounts",
        "seccomp; no user namespaces inside",
        """
        must_fail(syscall, (272, 97), 0x10000000)
        must_fail(syscall, (165, 40), b'none', b'/tmp', b'tmpfs', 0, 0)
        must_fail(syscall, (308, 268), 0, 0)
        import subprocess
        if subprocess.run(['/usr/bin/unshare', '-Ur', '/bin/true'], capture_output=True).returncode == 0:
            print('ESCAPED')
        """,
    ),
    _attack(
        "bpf, keyrings, io_uring",
        "seccomp",
        """
        must_fail(syscall, (321, 280), 0, 0, 0)
        must_fail(syscall, (250, 219), 0, -3, 1)
        must_fail(syscall, (425, 425), 8, 0)
        """,
    ),
    _attack(
        "becoming root (setuid, su)",
        "no new privileges, one user in the namespace",
        """
        import os, subprocess
        must_fail(os.setuid, 0)
        must_fail(os.setgroups, [0])
        for name in ('su', 'sudo'):
            path = '/usr/bin/' + name
            if os.path.exists(path) and not subprocess.run([path, '-c', 'id'], capture_output=True).returncode:
                print('ESCAPED', name)
        """,
    ),
    _attack(
        "characters into the terminal (TIOCSTI)",
        "no terminal, new session, seccomp",
        """
        import fcntl
        for fd in (0, 1, 2):
            must_fail(fcntl.ioctl, fd, 0x5412, b'x')
        """,
    ),
    # ---------------------------------------------------------------- network
    _attack(
        "network: TCP, UDP, name lookup, vsock, netlink",
        "network namespace without interfaces; seccomp refuses all sockets but Unix ones",
        """
        import socket
        must_fail(socket.create_connection, ('127.0.0.1', PORT), 2)
        must_fail(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT)))
        must_fail(socket.getaddrinfo, 'example.org', 80)
        for family in (socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, 40, 38):
            must_fail(socket.socket, family, socket.SOCK_RAW if family != 40 else socket.SOCK_STREAM)
        """,
    ),
    _attack(
        "Unix sockets of the machine, by path and abstract",
        "mount and network namespaces",
        """
        import socket
        for address in (SOCKET, '\\0' + ABSTRACT, '/run/dbus/system_bus_socket', '/var/run/docker.sock'):
            must_fail(socket.socket(socket.AF_UNIX).connect, address)
        """,
    ),
    # ---------------------------------------------------------------- looking right
    _attack(
        "sys.exit(0) before the asserts",
        "no verdict without the random text that follows the test",
        """
        import sys
        sys.exit(0)
        """,
        Status.NO_VERDICT,
        tests=(StatementsTest("assert False"), CallTest("f", ())),
    ),
    _attack(
        "os._exit(0) inside the tested function",
        "no verdict without the random text that follows the test",
        """
        import os
        def f():
            print('all tests passed', flush=True)
            os._exit(0)
        """,
        Status.NO_VERDICT,
        tests=(StatementsTest("assert f() == 1"), CallTest("f", ())),
    ),
    _attack(
        "writing a verdict of its own",
        "no verdict without the random text that follows the test",
        """
        import os
        os.write(3, b'0 true\\n' + b'0' * 32 + b'\\n')
        os._exit(0)
        """,
        Status.NO_VERDICT,
        tests=(StatementsTest("assert False"), CallTest("f", ())),
    ),
)
