"""The filter, call by call: its numbers are libseccomp's, and its jumps lead where they should."""

from __future__ import annotations

import ctypes
import errno
import struct
from functools import cache

import pytest

from asd_megatron.sandbox import seccomp

ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
MACHINES = sorted(seccomp.ARCHITECTURES)


@cache
def instructions(machine: str) -> list[tuple[int, int, int, int]]:
    """(code, jump if true, jump if false, value) of each instruction."""
    return list(struct.iter_unpack("=HBBI", seccomp.filter_program(machine)))


def decide(machine: str, number: int, *arguments: int, audit: int | None = None) -> int:
    """What the kernel's BPF machine returns for a call."""
    six = (*arguments, *[0] * 6)[:6]
    data = struct.pack("<IIQ6Q", number, audit or seccomp.ARCHITECTURES[machine][1], 0, *six)
    program, at, accumulator = instructions(machine), 0, 0
    while True:
        code, if_true, if_false, value = program[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == 0x06:
            return value
        else:
            jump = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += if_true if jump else if_false


def test_numbers_of_calls() -> None:
    library = ctypes.CDLL("libseccomp.so.2")  # Debian's apt brings it
    resolve = library.seccomp_syscall_resolve_name_arch
    resolve.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    others = {"socket": seccomp.SOCKET, "clone": seccomp.CLONE, "clone3": seccomp.CLONE3, "ioctl": seccomp.IOCTL}
    for column, audit in seccomp.ARCHITECTURES.values():
        for name, numbers in {**seccomp.DENIED, **others}.items():
            found = resolve(audit, name.encode())
            assert (found if found >= 0 else None) == numbers[column], name


@pytest.mark.parametrize("machine", MACHINES)
def test_decisions(machine: str) -> None:
    column = seccomp.ARCHITECTURES[machine][0]
    denied = {numbers[column] for numbers in seccomp.DENIED.values()} - {None}
    special = {numbers[column] for numbers in (seccomp.SOCKET, seccomp.CLONE, seccomp.CLONE3, seccomp.IOCTL)}
    for number in range(600):
        if number not in special:
            assert decide(machine, number) == (EPERM if number in denied else ALLOW), number
    assert decide(machine, 0, audit=0x40000003) == KILL  # 32-bit x86
    assert decide(machine, seccomp.CLONE3[column]) == ENOSYS
    clone, socket, ioctl = seccomp.CLONE[column], seccomp.SOCKET[column], seccomp.IOCTL[column]
    assert decide(machine, clone, 17) == decide(machine, clone, 0x3D0F00) == ALLOW  # a fork, a thread
    for flag in (0x20000, *(1 << bit for bit in range(25, 31))):
        assert decide(machine, clone, 17 | flag) == EPERM
    assert [decide(machine, socket, family) for family in (1, 2, 10, 16, 17, 40)] == [ALLOW, *[EPERM] * 5]
    assert [decide(machine, ioctl, 0, request) for request in (0x5401, 0x5412, 0x541C)] == [ALLOW, EPERM, EPERM]
    if machine == "x86_64":
        assert decide(machine, 0x40000000) == decide(machine, 0x40000000 | clone) == KILL  # x32
