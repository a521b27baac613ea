"""Supervised examples: JSONL of `prompt` or `messages`, `response`, optional `loss_weights`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asd_megatron.data.jsonl import DataError, LineError, prompt_or_messages, scalar_field, text_field
from asd_megatron.data.files import read_rows
from asd_megatron.data.prompts import PromptError, PromptRenderer
from asd_megatron.records import Problem


@dataclass(frozen=True)
class SftExample:
    """One response to learn, its end token included; `loss_weights[t]` >= 0 scales the loss of response token t."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    loss_weights: tuple[float, ...]


def load_sft(
    path: str | Path, renderer: PromptRenderer, *, end_token_id: int, max_tokens: int | None = None
) -> list[SftExample]:
    """Read and tokenise a supervised file: the prompt as for a student, then the response and `end_token_id`.

    Without `loss_weights` every response token, the end token included, weighs 1. Raises DataError, as `file:line:
    reason` for a line that cannot be used, also when a sequence is longer than `max_tokens`.
    """
    examples = []
    for row in read_rows(path):
        try:
            examples.append(_example(row.value, row.number, renderer, end_token_id, max_tokens))
        except (LineError, PromptError) as e:
            raise DataError(f"{path}:{number}: {e}") from e
    if not examples:
        raise DataError(f"{path} has no examples: every line is blank; write one JSON object a line")
    return examples


def _example(
    line: dict[str, Any], number: int, renderer: PromptRenderer, end_token_id: int, max_tokens: int | None
) -> SftExample:
    unknown = sorted(set(line) - {"prompt", "messages", "response", "loss_weights", "id"})
    if unknown:
        raise LineError(
            f"unknown field `{unknown[0]}`: a line has `prompt` or `messages`, `response`, "
            "optional `loss_weights` and `id`"
        )
    prompt, messages = prompt_or_messages(line)
    response = text_field(line, "response")
    if response is None:
        raise LineError("`response` is missing")
    problem = Problem(scalar_field(line, "id") or f"of line {number}", "", prompt, messages)
    prompt_ids = renderer.student(problem).ids
    ids = tuple(renderer.tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"])
    if ids[-1:] != (end_token_id,):
        ids += (end_token_id,)
    if max_tokens is not None and len(prompt_ids) + len(ids) > max_tokens:
        raise LineError(
            f"prompt and response have {len(prompt_ids) + len(ids)} tokens, "
            f"the model takes {max_tokens}; shorten the line"
        )
    weights = line.get("loss_weights")
    return SftExample(prompt_ids, ids, (1.0,) * len(ids) if weights is None else _weights(weights, len(ids)))


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
