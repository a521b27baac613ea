"""What a hostile program is: its text, what stops it, and how its tests may end."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from asd_megatron.sandbox.pool import Status, StdinTest, Test

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


def attack(name: str, stopped_by: str, program: str, *expected: Status, tests: Sequence[Test] = AGAIN[:1]) -> Attack:
    """An attack whose `program` is indented. Without `expected`: its tests finish, having got nothing."""
    return Attack(name, textwrap.dedent(program).strip(), stopped_by, frozenset(expected or (Status.FINISHED,)), tests)
