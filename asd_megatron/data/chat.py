"""Rendering of chat templates. A template is a program that comes with the model, so its time and memory are bounded.

Loops and arithmetic of a template are Python code, which a signal handler ends. One operation in native code is not
(`'a' * 10 ** 10`, `'%1000000000d' % 1`): what it may allocate is bounded, and so is the time that it takes over it. The
few that need no memory (comparing lists of lists of lists) end the process.

The bounds are the main thread's. They are limits of the process: set by a worker thread, which renders privileged
prompts, the one of memory would refuse what the main thread allocates meanwhile (a bucket of weights, logits), and only
the main thread receives signals. Each problem's prompt is rendered in the main thread before a privileged one.
"""

from __future__ import annotations

import faulthandler
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

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
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], variables: Mapping[str, Any]
) -> str:
    """`turns` through the tokenizer's chat template, with the generation prompt. Several threads may call it. Raises
    TemplateError."""
    try:
        with _bounded():
            text = tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], add_generation_prompt=True, tokenize=False, **variables
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
    """The bounds of a rendering, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with _memory(RENDER_BYTES), _processor_time(RENDER_SECONDS):
        yield


@cache  # once
def _show_traceback_at_end() -> None:
    with suppress(OSError, ValueError, AttributeError, RuntimeError):  # where stderr is no file
        faulthandler.register(signal.SIGVTALRM, all_threads=False, chain=True)


@contextmanager
def _memory(bytes_: int) -> Iterator[None]:
    """Raise MemoryError in the body when this process maps `bytes_` more than it has. Costs microseconds.

    The limit holds for all threads, so `bytes_` leaves room for what others allocate in the time of a rendering. No
    bound where /proc does not tell what is mapped.
    """
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            pages = int(file.read().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([pages * resource.getpagesize() + bytes_, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


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
