"""The first process of a sandbox, a program of its own (`launch.PYTHON_OPTIONS`). Runs one tested program on its tests,
one after another, each in a process of its own.

It imports little, so that it starts fast. Standard input is a file with the job (marshal, from the trainer):

    program, setup        Python text; `setup` is executed before the program, in the same namespace
    tests                 ("stdin", text)                    the program as __main__, with this standard input
                          ("call", function, arguments)      `name`, `Class.name` or `Class().name`, after the program;
                                                             `name` may be a method of its class Solution
                          ("statements", text)               executed after the program; records values by RECORD(i, x)
    path, preload         folders added to the module path; modules imported once, before the processes are forked
    sandboxed             whether this is process 1 of a sandbox
    limits                cpu_seconds, wall_seconds, memory_bytes, processes, file_bytes, output_bytes: of one test

Standard output gets READY, then for each test a header of 5 numbers of 4 bytes (one of the statuses below, its detail,
the lengths of what follows) and the bytes of stdout, of the end of stderr, and of the verdict channel. What the right
results are is not known in here: the trainer compares.

As process 1 of its namespace the supervisor cannot be signalled by the tested program, and after each test it ends all
other processes. The verdict channel of a call or of statements carries a line `INDEX VALUE` for each recorded value
and, at the end, a random text that the supervisor made for this test: a program that ends its process early does not
say it.
"""

from __future__ import annotations

import _io
import _signal  # type: ignore[import-not-found]
import builtins
import marshal
import os
import resource
import select
import sys
import time

READY = b"ready\n"
FINISHED, FAILED, NO_VERDICT, SIGNAL, CPU_TIME, WALL_TIME, OUTPUT, LEFTOVERS = range(8)
RECORD = "__asd_record__"
STDERR_BYTES = 2_000  # kept of the end
LOOK_SECONDS = 0.05  # at most between two looks at a test's processor time
SIGKILL = 9
VERDICT = 3  # the file descriptor of the verdict channel in a test's process


def main() -> None:
    """Run the job on standard input; ends early when a test has left files behind."""
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # process 1 receives only what it has a handler for
    with open(0, "rb", closefd=False) as file:
        job = marshal.loads(file.read())  # noqa: S302 (written by the trainer)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in job["preload"]:
        try:
            __import__(name)
        except ImportError:
            continue  # the program will say so
    sys.path += job["path"]
    if any(test[0] != "stdin" for test in job["tests"]):
        import json  # noqa: F401 (for `encoded`, once for all processes)
    write_all(1, READY)
    for test in job["tests"]:
        report(*run_test(job, test))
        if job["sandboxed"] and os.listdir("/tmp"):  # noqa: S108 (the sandbox's own)
            report(LEFTOVERS, 0)
            return


def report(status: int, detail: int, stdout: bytes = b"", stderr: bytes = b"", verdict: bytes = b"") -> None:
    """Write one header and what follows it."""
    numbers = (status, detail, len(stdout), len(stderr), len(verdict))
    header = b"".join(n.to_bytes(4, "big") for n in numbers)
    write_all(1, header + stdout + stderr + verdict)


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# ------------------------------------------------------------------ the supervisor's side of a test


def run_test(job: dict, test: tuple) -> tuple[int, int, bytes, bytes, bytes]:
    """(status, detail, stdout, end of stderr, verdict channel) of one test."""
    nonce = os.urandom(16).hex().encode()
    given = input_file(test[1] if test[0] == "stdin" else "")
    pipes = [os.pipe() for _ in range(3)]
    child = os.fork()
    if child == 0:
        run_child(job, test, nonce, given, [write for _, write in pipes])
    os.close(given)
    for _, write in pipes:
        os.close(write)
    outputs = [bytearray(), bytearray(), bytearray()]  # stdout, stderr, verdict
    by_fd = {read: output for (read, _), output in zip(pipes, outputs, strict=True)}
    exceeded, ended = watch(child, by_fd, job["limits"])
    end_processes(job, child)
    if ended is None:
        _, wait_status, usage = os.wait4(child, 0)
        ended = wait_status, usage.ru_utime + usage.ru_stime
    reap_orphans(job)
    for read, output in by_fd.items():
        if drain(read, output, job["limits"]["output_bytes"], 1 << 30) is False and exceeded is None:
            exceeded = OUTPUT
        os.close(read)
    stdout, stderr, verdict = map(bytes, outputs)
    if exceeded is not None:
        status, detail = exceeded, 0
    else:
        unsaid = test[0] != "stdin" and verdict.splitlines()[-1:] != [nonce]
        status, detail = judged(*ended, unsaid, job["limits"]["cpu_seconds"])
    return status, detail, stdout, stderr[-STDERR_BYTES:], verdict if status == FINISHED else b""


def input_file(text: str) -> int:
    """A descriptor of a file without a name, for reading only, in the working folder, whose size is limited."""
    write = os.open("input", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        read = os.open("input", os.O_RDONLY)
    finally:
        os.unlink("input")
    write_all(write, text.encode("utf-8", "surrogateescape"))
    os.close(write)
    return read


def judged(wait_status: int, seconds: float, unsaid: bool, cpu_seconds: float) -> tuple[int, int]:
    """The status of a process that has ended by itself, and its detail: an exit status or the number of a signal."""
    if os.WIFSIGNALED(wait_status):
        number = os.WTERMSIG(wait_status)
        return (CPU_TIME, 0) if number == SIGKILL and seconds >= cpu_seconds else (SIGNAL, number)
    code = os.WEXITSTATUS(wait_status)
    if code:
        return FAILED, code
    return NO_VERDICT if unsaid else FINISHED, 0


def watch(child: int, by_fd: dict, limits: dict) -> tuple[int | None, tuple[int, float] | None]:
    """Read what a test writes until its process ends or exceeds a limit: (which limit, None) or (None, its wait status
    and its processor time)."""
    poll = select.poll()
    for fd in by_fd:
        os.set_blocking(fd, False)
        poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + limits["wall_seconds"]
    clock = (~child << 3) | 2  # the processor time of a process: CPUCLOCK_SCHED in the kernel's headers
    pause = LOOK_SECONDS
    while True:
        for fd, _ in poll.poll(1000 * pause):
            more = drain(fd, by_fd[fd], limits["output_bytes"], 1)
            if more is False:
                return OUTPUT, None
            if more is None:
                poll.unregister(fd)
                pause = 0.002  # it is about to end
        ended, wait_status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            return None, (wait_status, usage.ru_utime + usage.ru_stime)
        if time.clock_gettime(clock) >= limits["cpu_seconds"]:
            return CPU_TIME, None
        if time.monotonic() >= deadline:
            return WALL_TIME, None


def drain(fd: int, output: bytearray, limit: int, reads: int) -> bool | None:
    """Read what is there, at most so many times: None at the end of the file, False beyond the limit, else True."""
    for _ in range(reads):
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return True
        if not data:
            return None
        output += data
        if len(output) > limit:
            del output[limit:]
            return False
    return True


def end_processes(job: dict, child: int) -> None:
    """End the test's process and what it has started."""
    try:
        if job["sandboxed"] and os.getpid() == 1:  # all processes of the sandbox, but never those of a machine
            os.kill(-1, SIGKILL)
        else:
            os.killpg(child, SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def reap_orphans(job: dict) -> None:
    """Wait for the ended orphans that process 1 has inherited."""
    while job["sandboxed"]:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


# ------------------------------------------------------------------ the process of a test


def run_child(job: dict, test: tuple, nonce: bytes, given: int, writes: list[int]) -> None:
    """Run the program and one test in this process. Does not return."""
    code = 1
    try:
        os.setsid()
        for target, fd in enumerate([given, *writes]):
            os.dup2(fd, 100 + target)
        for target in range(4):
            os.dup2(100 + target, target, inheritable=target < 3)
        os.closerange(4, 256)
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
        set_limits(job["limits"], job["sandboxed"])
        new_streams()
        code = execute(job, test, nonce)
    except SystemExit as e:
        code = exit_status(e.code)
    except BaseException as e:
        say(e)
    finally:
        try:
            if test[0] == "stdin":
                finish_interpreter()
            flush_streams()
        except BaseException as e:
            code = code or 1
            say(e)
        finally:
            os._exit(code)


def set_limits(limits: dict, sandboxed: bool) -> None:
    """The limits of one process, which cannot be raised again."""
    values = {
        "CPU": int(limits["cpu_seconds"]) + 2,
        "AS": limits["memory_bytes"],
        "FSIZE": limits["file_bytes"],
        "NOFILE": 128,
        "MEMLOCK": 1 << 16,
        "MSGQUEUE": 0,
    }
    if sandboxed:  # counted in the sandbox's user namespace; elsewhere with all processes of the user
        values["NPROC"] = limits["processes"] + 1
    for name, value in values.items():
        which = getattr(resource, "RLIMIT_" + name)
        _, hard = resource.getrlimit(which)
        lower = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (lower, lower))
    # recursion through C functions (lru_cache, sort) needs more than the usual 8 MiB; the address space is the limit
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))


def new_streams() -> None:
    """Python's standard streams on the descriptors of this process, and what the module `site` would provide."""
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))
    sys.argv = ["program.py"]
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.exit)


def execute(job: dict, test: tuple, nonce: bytes) -> int:
    """Execute set-up, program and test; the exit status."""
    write, record = os.write, encoded  # the program may replace what it finds in modules

    def send(line: bytes) -> None:
        view = memoryview(line + b"\n")
        while view:
            view = view[write(VERDICT, view) :]

    kind = test[0]
    module = type(sys)("__main__" if kind == "stdin" else "program")
    sys.modules["__main__"] = sys.modules[module.__name__] = module
    space = module.__dict__
    if job["setup"]:
        exec(compile(job["setup"], "<setup>", "exec", dont_inherit=True), space)  # noqa: S102
    exec(compile(job["program"], "<program>", "exec", dont_inherit=True), space)  # noqa: S102
    if kind == "stdin":
        return 0
    if kind == "call":
        send(b"0 " + record(resolved(test[1], space)(*test[2])))
    else:
        space[RECORD] = lambda index, value: send(b"%d " % index + record(value))
        exec(compile(test[1], "<test>", "exec", dont_inherit=True), space)  # noqa: S102
    send(nonce)
    return 0


def resolved(function: str, space: dict):  # type: ignore[no-untyped-def]
    """The callable that `name`, `Class.name` or `Class().name` means; `name` also the method of a class Solution."""
    if function.isidentifier() and hasattr(space.get("Solution"), function):
        function = f"Solution().{function}"
    value = None
    for i, part in enumerate(function.split(".")):
        name = part.removesuffix("()")
        if i:
            value = getattr(value, name)
        elif name in space:
            value = space[name]
        else:
            raise NameError(f"the program defines no {name!r}")
        value = value() if part.endswith("()") else value  # type: ignore[misc]
    return value


def exit_status(code: object) -> int:
    """As the interpreter does for SystemExit."""
    if code is None or isinstance(code, int):
        return (code or 0) & 0xFF
    say(SystemExit(code))
    return 1


def say(error: BaseException) -> None:
    """The exception, at the end of stderr."""
    try:
        sys.stderr.write(f"\n{type(error).__name__}: {error}"[:500] + "\n")
    except BaseException:
        os.write(2, type(error).__name__.encode()[:100] + b"\n")


def finish_interpreter() -> None:
    """What the interpreter does at the end of a program: wait for its threads, call what it registered."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    import atexit

    atexit._run_exitfuncs()


def flush_streams() -> None:
    """Write what is in the buffers of the standard streams, those that the program has replaced too, and of files that
    it has left open, as the interpreter does at its end."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name, None)
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()
    for value in [sys.__stdout__, sys.__stderr__, *vars(sys.modules["__main__"]).values()]:
        if type(value) in (_io.TextIOWrapper, _io.BufferedWriter):
            try:
                value.flush()
            except (OSError, ValueError):  # closed, detached, or for reading
                continue


def encoded(value: object) -> bytes:
    """A result as JSON: scalars as they are, else [KIND, ...]; what has no form of its own is ["other", TYPE]."""
    import json

    return json.dumps(tagged(value)).encode()


def tagged(value) -> object:  # type: ignore[no-untyped-def]
    """See `encoded`. Subclasses count as what they are derived from; numpy's values as Python's."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]
    if isinstance(value, float):
        return ["float", float.__repr__(value)]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", repr(value.real), repr(value.imag)]
    for kinds, name in ((list, "list"), (tuple, "tuple"), ((set, frozenset), "set")):
        if isinstance(value, kinds):
            return [name, *map(tagged, value)]
    if isinstance(value, dict):
        return ["dict", *([tagged(k), tagged(v)] for k, v in value.items())]
    kind = type(value)
    if kind.__module__.partition(".")[0] == "numpy":
        return tagged(value.tolist())
    if (kind.__module__, kind.__name__) == ("fractions", "Fraction"):
        return ["fraction", hex(value.numerator), hex(value.denominator)]
    if (kind.__module__, kind.__name__) == ("decimal", "Decimal"):
        return ["decimal", str(value)]
    return ["other", f"{kind.__module__}.{kind.__qualname__}"[:100]]


if __name__ == "__main__":
    main()
