"""Programs that try to harm the machine, to read what they may not, or to look right without being right: what
`asd-megatron sandbox check`, the tests and the table in docs/sandbox.md are made of."""

from __future__ import annotations

from asd_megatron.sandbox.attack import AGAIN, Attack, attack
from asd_megatron.sandbox.exhausting_attacks import EXHAUSTING
from asd_megatron.sandbox.pool import CallTest, StatementsTest, Status

ATTACKS: tuple[Attack, ...] = (
    *EXHAUSTING,
    # ---------------------------------------------------------------- files
    attack(
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
    attack(
        "overwriting the interpreter and the supervisor",
        "read-only mounts",
        """
        import os
        for path in ('/supervisor.py', os.__file__, '/usr/bin/env', '/etc/passwd', '/new'):
            must_fail(open, path, 'ab')
        """,
    ),
    attack(
        "reading secrets (shadow, keys, home folders, the trainer's data)",
        "mount namespace: only the system's and the interpreter's folders are there",
        """
        import os
        paths = ['/etc/shadow', '/etc/ssh', '/root/.ssh', '/root/.bash_history', '/var/lib', '/run', '/home', CANARY]
        for path in [*paths, os.path.dirname(CANARY)]:
            must_fail(os.listdir if os.path.isdir(path) else open, path)
        """,
    ),
    attack(
        "reading the trainer's environment",
        "the environment is cleared",
        """
        import os
        if any('SECRET' in name for name in os.environ):
            print('ESCAPED')
        """,
    ),
    attack(
        "reading /proc of the trainer",
        "there is no /proc",
        """
        import os
        for path in ('/proc/self', '/proc/1/environ', f'/proc/{PARENT}/environ', f'/proc/{PARENT}/mem'):
            must_fail(open, path)
        must_fail(os.listdir, '/proc/self')
        """,
    ),
    attack(
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
    attack(
        "inherited file descriptors",
        "none but stdin, stdout, stderr and the verdict channel",
        """
        import os
        for fd in range(4, 300):
            must_fail(os.fstat, fd)
        must_fail(os.read, 3, 1)
        """,
    ),
    attack(
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
    attack(
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
    attack(
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
    attack(
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
    attack(
        "ptrace, reading other processes' memory",
        "seccomp",
        """
        must_fail(syscall, (101, 117), 16, 1, 0, 0)
        must_fail(syscall, (310, 270), 1, 0, 0, 0, 0, 0)
        """,
    ),
    attack(
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
    attack(
        "bpf, keyrings, io_uring",
        "seccomp",
        """
        must_fail(syscall, (321, 280), 0, 0, 0)
        must_fail(syscall, (250, 219), 0, -3, 1)
        must_fail(syscall, (425, 425), 8, 0)
        """,
    ),
    attack(
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
    attack(
        "characters into the terminal (TIOCSTI)",
        "no terminal, new session, seccomp",
        """
        import fcntl
        for fd in (0, 1, 2):
            must_fail(fcntl.ioctl, fd, 0x5412, b'x')
        """,
    ),
    # ---------------------------------------------------------------- network
    attack(
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
    attack(
        "Unix sockets of the machine, by path and abstract",
        "mount and network namespaces",
        """
        import socket
        for address in (SOCKET, '\\0' + ABSTRACT, '/run/dbus/system_bus_socket', '/var/run/docker.sock'):
            must_fail(socket.socket(socket.AF_UNIX).connect, address)
        """,
    ),
    # ---------------------------------------------------------------- looking right
    attack(
        "sys.exit(0) before the asserts",
        "no verdict without the random text that follows the test",
        """
        import sys
        sys.exit(0)
        """,
        Status.NO_VERDICT,
        tests=(StatementsTest("assert False"), CallTest("f", ())),
    ),
    attack(
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
    attack(
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
