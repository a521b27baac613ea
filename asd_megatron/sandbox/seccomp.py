"""The seccomp filter of the sandbox, as a classic BPF program for `bwrap --seccomp`.

Written out here rather than compiled by libseccomp: a filter that denies a list of calls is two instructions a call,
which can be read in full, and needs no library on the machine. The numbers below are the kernel's (a test compares them
with libseccomp's). What is not listed is allowed; what is listed fails with EPERM, so that the interpreter raises
PermissionError. Calls of another architecture (32-bit x86, x32), whose numbers differ, end the process.
"""

from __future__ import annotations

import errno
import platform
import struct

# name -> number on x86_64, on aarch64 (None: the call does not exist there)
DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes' memory and files
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # mounts and namespaces (clone and clone3 below)
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # parts of the kernel with a large attack surface
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "personality": (135, 92),
    "vhangup": (153, 58),
    "acct": (163, 89),
    "lookup_dcookie": (212, 18),
    # memory placement of other processes
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # the machine
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "ioperm": (173, None),
    "iopl": (172, None),
    "modify_ldt": (154, None),
    # memory that belongs to no process, or outlives its own
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
}
SOCKET = (41, 198)
CLONE = (56, 220)
CLONE3 = (435, 435)
IOCTL = (16, 29)

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
X32_BIT = 0x40000000
AF_UNIX = 1
NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
TERMINAL_IOCTLS = (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX put characters into a terminal's input

_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24  # offsets in struct seccomp_data, low words
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _fail(number: int) -> bytes:
    return _instruction(_RETURN, _ERRNO | number)


def supported(machine: str | None = None) -> bool:
    """Whether there is a filter for this machine's architecture."""
    return (machine or platform.machine()) in ARCHITECTURES


def filter_program(machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`. Raises KeyError for an architecture that is not supported."""
    column, audit = ARCHITECTURES[machine or platform.machine()]
    load_number = _instruction(_LOAD, _NUMBER)
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_EQUAL, audit, if_true=1),
        _instruction(_RETURN, _KILL_PROCESS),
        load_number,
    ]
    if column == 0:
        program += [_instruction(_JUMP_AT_LEAST, X32_BIT, if_false=1), _instruction(_RETURN, _KILL_PROCESS)]
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            program += [_instruction(_JUMP_EQUAL, number, if_false=1), _fail(errno.EPERM)]
    # clone3's flags are in memory, which a filter cannot read: the C library falls back to clone
    program += [_instruction(_JUMP_EQUAL, CLONE3[column], if_false=1), _fail(errno.ENOSYS)]
    # clone with a flag for a namespace
    program += [
        _instruction(_JUMP_EQUAL, CLONE[column], if_false=4),
        _instruction(_LOAD, _ARGUMENT_0),
        _instruction(_JUMP_ANY_BIT, NAMESPACE_FLAGS, if_false=1),
        _fail(errno.EPERM),
        load_number,
    ]
    # sockets of other families than Unix: network namespaces do not hold back all of them (vsock)
    program += [
        _instruction(_JUMP_EQUAL, SOCKET[column], if_false=4),
        _instruction(_LOAD, _ARGUMENT_0),
        _instruction(_JUMP_EQUAL, AF_UNIX, if_true=1),
        _fail(errno.EPERM),
        load_number,
    ]
    program += [_instruction(_JUMP_EQUAL, IOCTL[column], if_false=1 + 2 * len(TERMINAL_IOCTLS))]
    program += [_instruction(_LOAD, _ARGUMENT_1)]
    for request in TERMINAL_IOCTLS:
        program += [_instruction(_JUMP_EQUAL, request, if_false=1), _fail(errno.EPERM)]
    program += [_instruction(_RETURN, _ALLOW)]
    return b"".join(program)
