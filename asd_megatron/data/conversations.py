"""Rows of supervised files as conversations that end with the assistant.

=========================================  ============================================================
a row has                                  read as
=========================================  ============================================================
`response`                                 `prompt` or `messages`, then the response
`messages` that end with the assistant     these turns
`conversations` (ShareGPT)                 these turns: `from` human, gpt or system, `value`; `system`
`prompt`, `completion`                     text or turns, then text or turns
`instruction`, `output` (Alpaca)           `instruction` and, below it, `input`; then `output`
=========================================  ============================================================

The first that fits. Beside `response` only `loss_weights` and `id` may stand; other fields of the other forms are not
read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asd_megatron.data.jsonl import Line, LineError, kind_of, optional_text_field, prompt_or_messages, text_field

Turn = dict[str, str]
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
"""ShareGPT's names of roles."""


@dataclass(frozen=True)
class Conversation:
    """Turns that end with the assistant's. loss_weights: one number for each token of the last turn, as given; None:
    the row has none."""

    turns: tuple[Turn, ...]
    loss_weights: Any = None

    @property
    def answered_once(self) -> bool:
        """Whether the assistant speaks in the last turn alone."""
        return sum(turn["role"] == "assistant" for turn in self.turns) == 1


def conversation_of(line: Line) -> Conversation:
    """The conversation of a row. Raises LineError."""
    if line.get("response") is not None:
        return _responded(line)
    turns = _turns_of(line)
    if turns is None:
        if line.get("messages") is not None or line.get("prompt") is not None:
            raise LineError("`response` is missing, and no `messages` end with the assistant")
        found = ", ".join(f"`{name}`" for name in line) or "none"
        raise LineError(
            "found neither `prompt` nor `messages`: a supervised row has one of them and `response`, or `messages` that"
            f" end with the assistant, `conversations`, `prompt` and `completion`, or `instruction` and `output`"
            f" (fields: {found})"
        )
    if line.get("loss_weights") is not None:
        raise LineError("`loss_weights` belong to the tokens of `response`: give that, or leave them out")
    _check(turns)
    return Conversation(tuple(turns))


def _responded(line: Line) -> Conversation:
    unknown = sorted(set(line) - {"prompt", "messages", "response", "loss_weights", "id"})
    if unknown:
        raise LineError(
            f"unknown field `{unknown[0]}`: a line has `prompt` or `messages`, `response`, "
            "optional `loss_weights` and `id`"
        )
    prompt, messages = prompt_or_messages(line)
    response = text_field(line, "response")
    assert response is not None
    turns = [{"role": "user", "content": prompt}] if prompt is not None else [dict(turn) for turn in messages or ()]
    return Conversation((*turns, {"role": "assistant", "content": response}), line.get("loss_weights"))


def _turns_of(line: Line) -> list[Turn] | None:
    """The turns of a row without `response`; None if it has none of the forms."""
    given = line.get("messages")
    if isinstance(given, list) and given and isinstance(given[-1], dict) and given[-1].get("role") == "assistant":
        return _turns(given, "messages", "role", "content")
    if line.get("conversations") is not None:
        turns = _turns(line["conversations"], "conversations", "from", "value")
        system = optional_text_field(line, "system")
        return (
            [{"role": "system", "content": system}, *turns]
            if system and turns[:1] and not _is(turns[0], "system")
            else turns
        )
    if line.get("completion") is not None:
        asked = _either(line, "prompt", "user")
        return [*asked, *_either(line, "completion", "assistant")]
    if line.get("instruction") is not None and line.get("output") is not None:
        instruction, more = text_field(line, "instruction"), optional_text_field(line, "input")
        question = f"{instruction}\n\n{more}" if more else str(instruction)
        return [{"role": "user", "content": question}, *_either(line, "output", "assistant")]
    return None


def _is(turn: Turn, role: str) -> bool:
    return turn["role"] == role


def _either(line: Line, name: str, role: str) -> list[Turn]:
    """A field that is text, a turn of `role`, or a list of turns."""
    if isinstance(line.get(name), list):
        return _turns(line[name], name, "role", "content")
    text = text_field(line, name)
    if text is None:
        raise LineError(f"`{name}` is missing")
    return [{"role": role, "content": text}]


def _turns(given: Any, name: str, role: str, content: str) -> list[Turn]:
    if not isinstance(given, list) or not given:
        raise LineError(f"`{name}` must be a list of turns that is not empty, found {kind_of(given)}")
    turns = []
    for number, turn in enumerate(given, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get(role), str):
            raise LineError(f"turn {number} of `{name}` must be an object with `{role}` and `{content}`")
        other = next(
            (key for key, value in turn.items() if key not in (role, content) and value not in (None, [], {})), None
        )
        if other is not None:
            raise LineError(f"turn {number} of `{name}` has the field `{other}`, which is not read: remove it")
        if not isinstance(turn.get(content), str):
            raise LineError(
                f"turn {number} of `{name}` must have text as `{content}`, found {kind_of(turn.get(content))}"
            )
        turns.append({"role": ROLES.get(turn[role], turn[role]), "content": turn[content]})
    return turns


def _check(turns: list[Turn]) -> None:
    """Raise LineError unless roles are known, every assistant turn answers a user turn and has text, and the last turn
    is one."""
    for number, turn in enumerate(turns, start=1):
        if turn["role"] not in ("system", "user", "assistant"):
            raise LineError(f"turn {number} has the role {turn['role']!r}; use system, user or assistant")
        if not _is(turn, "assistant"):
            continue
        if number == 1 or not _is(turns[number - 2], "user"):
            raise LineError(f"turn {number} is the assistant's and follows no user turn")
        if not turn["content"].strip():
            raise LineError(f"turn {number}, the assistant's, is empty")
    if not _is(turns[-1], "assistant"):
        raise LineError(f"the last turn must be the assistant's, found {turns[-1]['role']}")
