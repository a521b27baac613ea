"""Supervised examples: conversations (`conversations` reads them from rows) as token ids with a loss weight each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from asd_megatron.data.conversations import Conversation, Turn, conversation_of
from asd_megatron.data.files import Row, read_rows
from asd_megatron.data.jsonl import DataError, LineError, scalar_field
from asd_megatron.data.prompts import PromptError, PromptRenderer
from asd_megatron.data.tokenizer import encode
from asd_megatron.records import Problem

LossOn = Literal["all", "last"]


@dataclass(frozen=True)
class SftExample:
    """One response to learn, its end token included; `loss_weights[t]` >= 0 scales the loss of response token t.

    Of a conversation with several assistant turns, the prompt is what stands before the first that is learned, the
    response all that follows; what the assistant did not write has weight 0.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    loss_weights: tuple[float, ...]


@dataclass(frozen=True)
class SftReader:
    """Turns rows into examples.

    end_token_ids: the model's end tokens; the first ends a response that the template does not end. max_tokens: of an
    example; None: no bound. loss_on: which of the assistant's turns are learned.
    """

    renderer: PromptRenderer
    end_token_ids: Sequence[int]
    max_tokens: int | None = None
    loss_on: LossOn = "all"

    def example(self, row: Row) -> SftExample:
        """The example of a row. Raises LineError and PromptError."""
        if row.value is None:
            raise LineError(row.error or "")
        conversation = conversation_of(row.value)
        identity = scalar_field(row.value, "id") or f"of {row.unit} {row.number}"
        pair = conversation.answered_once and (row.value.get("response") is not None or self.renderer.format == "raw")
        example = self._pair(conversation, identity) if pair else self._turns(conversation.turns, identity)
        tokens = len(example.prompt_ids) + len(example.response_ids)
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise LineError(
                f"prompt and response have {tokens} tokens, the model takes {self.max_tokens}; shorten the line"
            )
        return example

    def _pair(self, conversation: Conversation, identity: str) -> SftExample:
        """A prompt, as for a student, and the response's tokens with an end token."""
        *asked, answer = conversation.turns
        alone = len(asked) == 1
        problem = Problem(
            identity, "", asked[0]["content"] if alone else None, messages=None if alone else tuple(asked)
        )
        prompt_ids = self.renderer.student(problem).ids
        ids = tuple(encode(self.renderer.tokenizer, answer["content"]).tolist())
        if ids[-1:] != (self.end_token_ids[0],):
            ids += (self.end_token_ids[0],)
        given = conversation.loss_weights
        return SftExample(prompt_ids, ids, (1.0,) * len(ids) if given is None else _weights(given, len(ids)))

    def _turns(self, turns: Sequence[Turn], identity: str) -> SftExample:
        """A conversation through the chat template, in parts that the template writes one after another:

            <user>2 + 2?</user><assistant>   4</end>    \n<user>3 + 3?</user><assistant>   6</end>
            prompt                           weight 1   weight 0                           weight 1

        Each part is tokenised by itself, as when the model writes its turn: a token never spans two parts.
        """
        if self.renderer.format == "raw":
            raise LineError("several assistant turns, which data.format raw cannot render: use chat")
        learned = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        learned = learned if self.loss_on == "all" else learned[-1:]
        complete = self.renderer.chat_text(turns, identity, generation_prompt=False)
        prompt: list[int] = []
        ids: list[int] = []
        weights: list[float] = []
        done = 0
        for i in learned:
            before = self.renderer.chat_text(turns[:i], identity, generation_prompt=True)
            after = self.renderer.chat_text(turns[: i + 1], identity, generation_prompt=False)
            if not (complete.startswith(after) and after.startswith(before) and done <= len(before) < len(after)):
                raise LineError(self._rewritten(i, len(turns)))
            context = self._encode(complete[done : len(before)])
            spoken, rest = self._split_at_end(self._encode(after[len(before) :]), last=i == len(turns) - 1)
            if i == learned[0]:
                prompt = context
            else:
                ids += context
                weights += [0.0] * len(context)
            ids += spoken + rest
            weights += [1.0] * len(spoken) + [0.0] * len(rest)
            done = len(after)
        return SftExample(tuple(prompt), tuple(ids), tuple(weights))

    def _rewritten(self, i: int, turns: int) -> str:
        what = "after its generation prompt" if i == turns - 1 else "when other turns follow (it may drop thinking)"
        remedy = "change the template" if i == turns - 1 else "set sft.loss_on last, or give each answer its own row"
        return (
            f"the chat template writes turn {i + 1} in another way {what}, so that the model would learn what it never"
            f" sees: {remedy}"
        )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = encode(self.renderer.tokenizer, text).tolist()
        return ids

    def _split_at_end(self, ids: list[int], *, last: bool) -> tuple[list[int], list[int]]:
        """An assistant turn's tokens to its last end token, and what the template puts after that (a line break), which
        is dropped at the end of the conversation. A turn without an end token gets one there."""
        ends = [at for at, token in enumerate(ids) if token in self.end_token_ids]
        if not ends:
            return ([*ids, self.end_token_ids[0]], []) if last else (ids, [])
        end = ends[-1] + 1
        return ids[:end], [] if last else ids[end:]


def load_sft(
    path: str | Path,
    renderer: PromptRenderer,
    *,
    end_token_ids: Sequence[int],
    max_tokens: int | None = None,
    loss_on: LossOn = "all",
) -> list[SftExample]:
    """Read and tokenise a supervised file, a folder or a pattern of files.

    Tokens of the assistant weigh 1, end tokens included, unless a row has `loss_weights`. Raises DataError, as
    `file:line: reason` for a row that cannot be used, also when a sequence is longer than `max_tokens`.
    """
    reader = SftReader(renderer, end_token_ids, max_tokens, loss_on)
    examples: list[SftExample] = []
    seen: dict[int, SftExample] = {}  # by row number, of files with copies
    for row in read_rows(path):
        if row.copy_of is not None:
            examples.append(seen[row.copy_of])
            continue
        try:
            examples.append(reader.example(row))
        except (LineError, PromptError) as e:
            raise DataError(f"{row.place}: {e}") from e
        if row.unit == "row":
            seen[row.number] = examples[-1]
    if not examples:
        raise DataError(f"{path} has no examples: every line is blank; write one JSON object a line")
    return examples


def _weights(values: Any, tokens: int) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise LineError("`loss_weights` must be a list of numbers")
    if len(values) != tokens:
        raise LineError(
            f"`loss_weights` has {len(values)} entries, the response {tokens} tokens (its end token included)"
        )
    if not all(math.isfinite(v) and v >= 0 for v in values) or not any(values):
        raise LineError("`loss_weights` must be finite and not negative, at least one above 0")
    return tuple(float(v) for v in values)
