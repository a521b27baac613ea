"""Rendering of chat templates. A template is a program that comes with the model, so its time and memory are bounded.

Loops and arithmetic of a template are Python code, which a signal handler ends. One operation in native code is not
(`'a' * 10 ** 10`, `'%1000000000d' % 1`): what it may allocate is bounded, and so is the time that it takes over it. The
few that need no memory (comparing lists of lists of lists) end the process.

These bounds are the main thread's. They are limits of the process: set by a worker thread, which renders privileged
prompts, the one of memory would refuse what the main thread allocates meanwhile (a bucket of weights, logits), and only
the main thread receives signals. Each problem's prompt is rendered in the main thread before a privileged one. In a
worker thread, a loop is ended by an exception from outside; memory has no bound there but that of the written text.
"""

from __future__ import annotations

import ctypes
import faulthandler
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from asd_megatron.limits import memory_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_SECONDS = 10.0  # of processor time for one prompt; a template takes well under a millisecond
END_SECONDS = 60.0  # of processor time after which a template that cannot be interrupted ends the process
RENDER_BYTES = 1 << 28  # of memory for one prompt; a template takes a few times the prompt's size
MAX_CHARACTERS = 1 << 24  # of one prompt: tokenizing it takes seconds
REMEDY = "repair the template of the model folder (chat_template.jinja), or set data.format raw"


class TemplateError(ValueError):
    """A chat template failed, did not end, or needs too much memory."""


class _OutOfTime(BaseException):
    """No `Exception`: Jinja catches those while it compiles a template."""


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, str]],
    variables: Mapping[str, Any],
    *,
    generation_prompt: bool = True,
) -> str:
    """`turns` through the tokenizer's chat template, by default with the generation prompt. Several threads may call
    it. Raises TemplateError."""
    try:
        with _bounded():
            text = tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], add_generation_prompt=generation_prompt, tokenize=False, **variables
            )
    except _OutOfTime:
        raise TemplateError(
            f"the chat template did not end within {RENDER_SECONDS:g} s of processor time: it loops or computes a huge "
            f"number; {REMEDY}"
        ) from None
    except MemoryError:
        raise TemplateError(
            f"the chat template needs more than {RENDER_BYTES >> 20} MiB of memory for this prompt: {REMEDY}"
        ) from None
    except Exception as e:  # whatever the template's authors raise
        raise TemplateError(
            f"the chat template failed: {type(e).__name__}: {e}; change the turns if it refuses them, or {REMEDY}"
        ) from e
    assert isinstance(text, str)
    if len(text) > MAX_CHARACTERS:
        raise TemplateError(
            f"the chat template writes {len(text):,} characters, and a prompt has at most {MAX_CHARACTERS:,}: {REMEDY}"
        )
    return text


@contextmanager
def _bounded() -> Iterator[None]:
    """The bounds of a rendering: of time and memory in the main thread, of time in others."""
    if threading.current_thread() is not threading.main_thread():
        with _THREADS.bounded(RENDER_SECONDS):
            yield
        return
    with memory_limit(RENDER_BYTES), _processor_time(RENDER_SECONDS):
        yield


@cache  # once
def _show_traceback_at_end() -> None:
    with suppress(OSError, ValueError, AttributeError, RuntimeError):  # where stderr is no file
        faulthandler.register(signal.SIGVTALRM, all_threads=False, chain=True)


@contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """Raise _OutOfTime in the body after `seconds` of this process's processor time. Costs microseconds.

    Native code that does not return until END_SECONDS ends the process, with the traceback of what it was called for
    (SIGVTALRM). Processor time, so that a busy machine is never mistaken for a template that loops.
    """

    def out_of_time(number: int, frame: Any) -> NoReturn:
        raise _OutOfTime

    _show_traceback_at_end()
    previous = signal.signal(signal.SIGPROF, out_of_time)
    signal.setitimer(signal.ITIMER_VIRTUAL, END_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGPROF, previous or signal.SIG_DFL)


@dataclass
class _Rendering:
    """A rendering in a worker thread: it may use processor time of its thread until the thread's clock says `end`."""

    clock: int
    end: float
    late: bool = False


class _Threads:
    """Ends renderings in worker threads: one thread looks at their clocks while there are any."""

    INTERVAL = 0.5  # seconds

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._renderings: dict[int, _Rendering] = {}
        self._watched = False

    @contextmanager
    def bounded(self, seconds: float) -> Iterator[None]:
        """Raise _OutOfTime in the body after `seconds` of this thread's processor time. Costs microseconds."""
        thread = threading.get_ident()
        clock = time.pthread_getcpuclockid(thread)
        rendering = _Rendering(clock, time.clock_gettime(clock) + seconds)
        with self._lock:
            self._renderings[thread] = rendering
            start, self._watched = not self._watched, True
        if start:
            threading.Thread(target=self._watch, name="chat templates", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                del self._renderings[thread]
            if rendering.late:  # the exception may not have arrived yet
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)

    def _watch(self) -> None:
        while True:
            time.sleep(self.INTERVAL)
            with self._lock:
                self._watched = bool(self._renderings)
                if not self._watched:
                    return
                for thread, rendering in self._renderings.items():
                    if not rendering.late and time.clock_gettime(rendering.clock) > rendering.end:
                        rendering.late = True
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_OutOfTime))


_THREADS = _Threads()
