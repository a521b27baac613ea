"""Rendering of chat templates. A template is a program that comes with the model, so its processor time is bounded."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDER_SECONDS = 10.0  # of processor time for one prompt; a template takes well under a millisecond


class TemplateError(ValueError):
    """A chat template failed, or did not end."""


class _OutOfTime(BaseException):
    """No `Exception`: Jinja catches those while it compiles a template."""


def render_chat(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], variables: Mapping[str, Any]
) -> str:
    """`turns` through the tokenizer's chat template, with the generation prompt. Raises TemplateError."""
    try:
        with _processor_time(RENDER_SECONDS):
            text = tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], add_generation_prompt=True, tokenize=False, **variables
            )
    except _OutOfTime:
        raise TemplateError(
            f"the chat template did not end within {RENDER_SECONDS:g} s of processor time: it loops or computes a huge "
            "number; repair the template of the model folder (chat_template.jinja), or set data.format raw"
        ) from None
    except Exception as e:  # whatever the template's authors raise
        raise TemplateError(f"the chat template failed: {type(e).__name__}: {e}") from e
    assert isinstance(text, str)
    return text


@contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """Raise _OutOfTime in the body after `seconds` of this process's processor time. Costs microseconds.

    Only the main thread receives signals; in other threads there is no bound. Processor time, so that a busy machine
    is never mistaken for a template that loops.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def out_of_time(number: int, frame: Any) -> NoReturn:
        raise _OutOfTime

    previous = signal.signal(signal.SIGPROF, out_of_time)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous or signal.SIG_DFL)
