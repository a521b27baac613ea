"""Programs that try to use up the machine: processes, memory, output, time, disk."""

from __future__ import annotations

from asd_megatron.sandbox.attack import AGAIN, Attack, attack
from asd_megatron.sandbox.pool import Status

TIME = (Status.CPU_TIME, Status.WALL_TIME)

EXHAUSTING: tuple[Attack, ...] = (
    attack(
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
    attack(
        "threads without end",
        "limit on processes",
        """
        import threading, time
        while True:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        """,
        Status.FAILED,
    ),
    attack(
        "memory bomb, one process",
        "limit on the address space: MemoryError",
        """
        x = []
        while True:
            x.append(bytearray(1 << 24))
        """,
        Status.FAILED,
    ),
    attack(
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
    attack(
        "memory outside any process (memfd, shared memory)",
        "seccomp; /tmp and /dev/shm are one small tmpfs",
        """
        import os, ctypes
        must_fail(os.memfd_create, 'x')
        must_fail(syscall, (29, 194), 1, 1 << 20, 0o1666)
        """,
    ),
    attack(
        "endless stdout",
        "limit on output",
        """
        while True:
            print('x' * 1000)
        """,
        Status.OUTPUT,
    ),
    attack(
        "endless stderr",
        "limit on output",
        """
        import sys
        while True:
            sys.stderr.write('x' * 1000)
        """,
        Status.OUTPUT,
    ),
    attack(
        "endless loop",
        "processor time",
        """
        while True:
            pass
        """,
        *TIME,
    ),
    attack(
        "sleeping",
        "wall time",
        """
        import time
        time.sleep(1000)
        """,
        Status.WALL_TIME,
    ),
    attack(
        "stopping itself",
        "wall time",
        """
        import os, signal
        os.kill(os.getpid(), signal.SIGSTOP)
        """,
        Status.WALL_TIME,
    ),
    attack(
        "reading more input than there is",
        "end of the file",
        """
        input()
        """,
        Status.FAILED,
    ),
    attack(
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
    attack(
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
    attack(
        "a huge file",
        "limit on the size of files",
        """
        import os
        f = open('/tmp/huge', 'wb')
        must_fail(os.truncate, '/tmp/huge', 1 << 40)
        """,
    ),
    attack(
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
)
