"""How a sandbox is started: the interpreter, the limits, the command line of bubblewrap."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from asd_megatron.errors import UserError
from asd_megatron.sandbox import seccomp

SUPERVISOR = Path(__file__).with_name("supervisor.py")
NOBODY = 65534
SYSTEM_PYTHON = "/usr/bin/python3"
SYSTEM_FOLDERS = ("/bin", "/lib", "/lib32", "/lib64", "/libx32", "/sbin")
DEVICES = ("null", "zero", "full", "random", "urandom")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",  # noqa: S108 (the sandbox's own)
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same program gets the same reward again
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
# Not -I, which would ignore PYTHONHASHSEED: no user folder (-s), nothing put in front of the module path (-P), no
# `site` and so no .pth files (-S), no .pyc files (-B)
PYTHON_OPTIONS = ("-s", "-P", "-S", "-B")
DESCRIBE = (
    "import json, os, sys, sysconfig; print(json.dumps([os.path.realpath(sys._base_executable), sys.base_prefix,"
    " sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), sys.version_info[:2]]))"
)


class SandboxError(UserError):
    """The sandbox cannot be used on this machine, or not with these settings."""


@dataclass(frozen=True)
class SandboxLimits:
    """The limits of one test. Seconds of processor and of wall time; bytes of a process's address space and of the
    resident memory of all processes together (`memory_bytes`), of /tmp and of any file (`file_bytes`), of stdout,
    stderr and the verdict channel each (`output_bytes`); `processes` and threads at a time."""

    cpu_seconds: float = 5.0
    wall_seconds: float = 50.0
    memory_bytes: int = 1 << 30
    processes: int = 16
    file_bytes: int = 64 << 20
    output_bytes: int = 4 << 20


@dataclass(frozen=True)
class Protections:
    """Which protections a sandbox has beside the limits of its processes: the namespaces of bubblewrap, and in them the
    seccomp filter."""

    namespaces: bool = True
    seccomp: bool = True


@dataclass(frozen=True)
class Interpreter:
    """The Python that runs tested programs. `prefix`: its folder; `packages`: folders whose modules programs can
    import beside the standard library."""

    executable: str
    prefix: str
    packages: tuple[str, ...] = ()

    def readable_folders(self) -> Iterator[str]:
        """Folders that the sandbox has to show beside the system's."""
        for folder in (self.prefix, *self.packages):
            if not Path(folder).is_relative_to("/usr"):
                yield folder


def sandbox_user() -> int | None:
    """The user that sandboxes run as: nobody if this process is root, whose processes the kernel does not limit; None:
    this process's own."""
    return NOBODY if os.geteuid() == 0 and _can_change_user() else None


@cache
def _can_change_user() -> bool:
    try:
        subprocess.run(["/bin/true"], user=NOBODY, group=NOBODY, extra_groups=[], check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


@cache
def find_interpreter(python: str | None = None) -> Interpreter:
    """The interpreter of a given path, with its packages. None: the one that runs this process, without any packages,
    or the system's if the sandbox's user cannot read that. Raises SandboxError."""
    if python is not None:
        found, packages = _describe(python)
        if not _readable(found):
            raise SandboxError(
                f"reward.code.python {python}: the sandbox runs as user {NOBODY} (nobody) when root trains, who may not"
                f" read {found.prefix}. Name an interpreter outside root's home folder, such as {SYSTEM_PYTHON}"
            )
        return _checked(Interpreter(found.executable, found.prefix, packages))
    own, _ = _describe(sys.executable)
    if _readable(own):
        return _checked(own)
    if not os.path.exists(SYSTEM_PYTHON):
        raise SandboxError(
            f"the sandbox's user cannot read {own.prefix}, and there is no {SYSTEM_PYTHON}: install Debian's python3,"
            " or name an interpreter as reward.code.python"
        )
    return _describe(SYSTEM_PYTHON)[0]


def _describe(python: str) -> tuple[Interpreter, tuple[str, ...]]:
    command = [python, "-I", "-c", DESCRIBE]
    try:
        output = subprocess.run(command, capture_output=True, check=True, timeout=60, text=True).stdout
        executable, prefix, *packages, version = json.loads(output.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as e:
        raise SandboxError(f"reward.code.python {python} is no Python interpreter that runs: {e}") from e
    if tuple(version) < (3, 11):  # python -P
        raise SandboxError(f"reward.code.python {python} is Python {version[0]}.{version[1]}; the sandbox needs 3.11")
    return Interpreter(executable, prefix), tuple(dict.fromkeys(packages))


def _checked(interpreter: Interpreter) -> Interpreter:
    for folder in interpreter.readable_folders():
        if Path.home().is_relative_to(folder) or Path.cwd().is_relative_to(folder):
            raise SandboxError(
                f"the interpreter's folder {folder} holds your home folder or the current one, and tested programs"
                " would read it: name another interpreter as reward.code.python"
            )
    return interpreter


def _readable(interpreter: Interpreter) -> bool:
    """Whether the sandbox's user can reach and read the interpreter's folder."""
    if sandbox_user() is None:
        return True
    path = Path(interpreter.prefix)
    return all(part.stat().st_mode & stat.S_IXOTH for part in (path, *path.parents))


@dataclass
class Launched:
    """A sandbox that has been started. `process`: bubblewrap, or the supervisor where there is none. `first`: the
    number of process 1 of the sandbox as seen from here, once `info` has said it. `folder`: its working folder, where
    there is no private /tmp."""

    process: subprocess.Popen[bytes]
    info: int | None
    folder: tempfile.TemporaryDirectory[str] | None = None
    first: int | None = None


def launch(job: bytes, interpreter: Interpreter, limits: SandboxLimits, protections: Protections) -> Launched:
    """Start the supervisor on a job (`supervisor.py`) in a sandbox. Its output comes through pipes. Raises OSError."""
    stdin = _file(job)
    if not protections.namespaces:
        return _launch_unprotected(stdin, interpreter)
    passed = [_file(SUPERVISOR.read_bytes()), _file(b"nobody:x:65534:65534:nobody:/tmp:/bin/false\n")]
    info_read, info_write = os.pipe()
    options = ["--info-fd", str(info_write)]
    if protections.seccomp:
        passed.append(_file(seccomp.filter_program()))
        options += ["--seccomp", str(passed[2])]
    command = ["bwrap", *options, *_mounts(interpreter, limits, *passed[:2]), "--", interpreter.executable]
    user = sandbox_user()
    try:
        process = subprocess.Popen(
            [*command, *PYTHON_OPTIONS, "/supervisor.py", *_mark()],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[*passed, info_write],
            start_new_session=True,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin")},
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            cwd="/",
        )
    except BaseException:
        os.close(info_read)
        raise
    finally:
        for fd in (stdin, info_write, *passed):
            os.close(fd)
    os.set_blocking(info_read, False)
    return Launched(process, info_read)


def _launch_unprotected(stdin: int, interpreter: Interpreter) -> Launched:
    folder = tempfile.TemporaryDirectory(prefix="asd_megatron_code_", ignore_cleanup_errors=True)
    try:
        process = subprocess.Popen(
            [interpreter.executable, *PYTHON_OPTIONS, str(SUPERVISOR), *_mark()],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**ENVIRONMENT, "HOME": folder.name},
            cwd=folder.name,
        )
    except BaseException:
        folder.cleanup()
        raise
    finally:
        os.close(stdin)
    return Launched(process, None, folder)


def _mounts(interpreter: Interpreter, limits: SandboxLimits, supervisor: int, passwd: int) -> list[str]:
    """Bubblewrap's options: new namespaces of every kind, and the folders that the sandbox sees."""
    options = ["--unshare-all", "--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    if not os.statvfs("/proc/sys").f_flag & os.ST_RDONLY:  # it is in most containers: then the filter alone denies them
        options.append("--disable-userns")
    options += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        options += ["--setenv", name, value]
    options += ["--ro-bind", "/usr", "/usr"]
    for folder in SYSTEM_FOLDERS:
        if os.path.islink(folder):
            options += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            options += ["--ro-bind", folder, folder]
    for folder in interpreter.readable_folders():
        options += ["--ro-bind", folder, folder]
    options += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    options += ["--ro-bind-data", str(passwd), "/etc/passwd", "--ro-bind-data", str(supervisor), "/supervisor.py"]
    options += ["--dir", "/dev"]
    for device in DEVICES:
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    # no /proc: nothing of other processes can be read, and containers that hide parts of theirs allow no new one
    options += ["--size", str(limits.file_bytes), "--tmpfs", "/tmp", "--symlink", "/tmp", "/dev/shm"]  # noqa: S108
    return [*options, "--remount-ro", "/", "--chdir", "/tmp"]  # noqa: S108


def _mark() -> list[str]:
    """Arguments without effect, which tell whose sandbox a process belongs to."""
    return ["--of", str(os.getpid())]


def _file(data: bytes) -> int:
    """The descriptor of a file in memory with this content, at its beginning."""
    fd = os.memfd_create("sandbox")
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def bubblewrap_version() -> tuple[int, ...] | None:
    """Of the `bwrap` on the path; None if there is none."""
    if shutil.which("bwrap") is None:
        return None
    output = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, timeout=60).stdout
    return tuple(int(part) for part in output.split()[-1].split(".") if part.isdigit()) if output.split() else (0,)
