"""Prompts and privileged prompts as text and token ids (the method's section 4 set-up and Appendix C).

The teacher's prompt is the student's with a block after the question, in the paper's wording
(`templates.PAPER_WORDING`) or a recipe's own. A part that is not known is left out with its heading; with neither
demonstration nor feedback the teacher's ids are the student's, so that u is exactly 0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from asd_megatron.data.chat import TemplateError, render_chat
from asd_megatron.data.demonstration import clean, shorten, special_token_texts
from asd_megatron.data.templates import (
    PAPER_WORDING,
    fill_lines,
    fill_paragraphs,
    student_template_fault,
    teacher_template_fault,
)
from asd_megatron.data.tokenizer import encode
from asd_megatron.errors import UserError
from asd_megatron.records import Problem, Prompt, as_array

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from asd_megatron.records import TokenIds

REMEMBERED = 256  # texts whose tokens are kept
OWN_ARGUMENTS = (
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "messages",
    "return_dict",
    "return_tensors",
    "tokenize",
)

log = logging.getLogger("asd_megatron")


class PromptError(UserError, ValueError):
    """A prompt cannot be rendered, is too long, or its template is unusable."""


@dataclass(frozen=True)
class TeacherLimits:
    """Bounds on a teacher's sequence, in tokens.

    The demonstration has at most `max_solution_tokens`; prompt, demonstration and response together at most
    `max_teacher_tokens` (None: no bound). A demonstration is shortened to fit, but not below
    `min_solution_tokens`.
    """

    max_solution_tokens: int = 8192
    min_solution_tokens: int = 128
    max_teacher_tokens: int | None = None
    strip_thinking: bool = False


class TeacherPrompt(NamedTuple):
    """A teacher's prompt for one rollout.

    ids: int32 [tokens]; equal prompts share them; None when there can be none. outcome: what metrics count:
    `demonstration_shortened`, or why there is none, `teacher_too_long` or `demonstration_empty` (nothing was left after
    cleaning); None: nothing. solution_tokens: of the demonstration as shown.
    """

    ids: TokenIds | None
    outcome: Literal["demonstration_shortened", "teacher_too_long", "demonstration_empty"] | None = None
    solution_tokens: int = 0


class PromptRenderer:
    """Renders problems for the student and, with privileged context, for the teacher.

    Args:
        format: `chat` renders through the tokenizer's chat template, `raw` through `raw_prompt`.
        system: a system turn for chat problems that do not start with one of their own.
        raw_prompt: text that holds `{prompt}` once; braces elsewhere are plain text.
        chat_template: the teacher's last user turn in chat format, with `{prompt}`, `{solution}` and `{feedback}`; a
            paragraph whose placeholder has no value is left out.
        raw_template: the teacher's complete prompt in raw format, with the same placeholders; a line whose placeholder
            has no value is left out. None: `raw_prompt` with the paper's wording in place of `{prompt}`.
        chat_template_kwargs: variables for the chat template (`enable_thinking: false`, for instance).
        max_prompt_tokens: the longest student prompt that is accepted.
        end_token_ids: end tokens beside the tokenizer's own, removed from demonstrations.

    Several threads may render at the same time.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        format: str = "chat",
        system: str | None = None,
        raw_prompt: str = "{prompt}",
        raw_template: str | None = None,
        chat_template: str = PAPER_WORDING,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_prompt_tokens: int = 2048,
        end_token_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.format, self.system = tokenizer, format, system
        self.raw_prompt, self.raw_template, self.chat_template = raw_prompt, raw_template, chat_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.max_prompt_tokens = max_prompt_tokens
        self._special_tokens = special_token_texts(tokenizer, end_token_ids)
        self._begin: list[int] = []
        # The rollouts of a group share few demonstrations, so the same texts are tokenised many times.
        self._shorten = lru_cache(REMEMBERED)(partial(shorten, tokenizer))
        self._encode = lru_cache(REMEMBERED)(self._encode_text)
        self._check_templates()
        if format == "raw":
            self._begin = self._begin_tokens()

    def _check_templates(self) -> None:
        if self.format == "chat":
            if not self.tokenizer.chat_template:
                raise PromptError(
                    "the tokenizer has no chat template: set data.format to raw, "
                    "or add a chat_template.jinja to the model folder"
                )
            for name in OWN_ARGUMENTS:
                if name in self.chat_template_kwargs:
                    raise PromptError(f"data.chat_template_kwargs: {name!r} is set by asd_megatron itself; remove it")
            fault = teacher_template_fault(self.chat_template, paragraphs=True)
            if fault is not None:
                raise PromptError(f"privileged.chat_template {fault}")
        elif self.format == "raw":
            fault = student_template_fault(self.raw_prompt)
            if fault is not None:
                raise PromptError(f"data.raw_prompt {fault}")
            fault = None if self.raw_template is None else teacher_template_fault(self.raw_template, paragraphs=False)
            if fault is not None:
                raise PromptError(f"privileged.raw_template {fault}")
        else:
            raise PromptError(f"data.format {self.format!r} does not exist; choose chat or raw")

    # --- text ---

    def student_text(self, problem: Problem) -> str:
        """The student's prompt as text."""
        return self.teacher_text(problem, None, None)

    def teacher_text(self, problem: Problem, solution: str | None, feedback: str | None) -> str:
        """The teacher's prompt as text, with `solution` as it is given."""
        values = {"solution": solution, "feedback": feedback}
        privileged = any(value is not None for value in values.values())
        if self.format == "chat":
            return self._chat(problem, values if privileged else None)
        question = self._raw_question(problem)
        if privileged and self.raw_template is not None:
            return fill_lines(self.raw_template, {"prompt": question, **values})
        if privileged:
            question = fill_paragraphs(PAPER_WORDING, {"prompt": question, **values})
        return fill_lines(self.raw_prompt, {"prompt": question})

    def _chat(self, problem: Problem, privileged: Mapping[str, str | None] | None) -> str:
        """The chat prompt; with `privileged` values the last user turn is written by `chat_template`."""
        if problem.messages is not None:
            turns = [dict(m) for m in problem.messages]
        else:
            turns = [{"role": "user", "content": problem.question}]
        if privileged is not None:
            last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
            turns[last]["content"] = fill_paragraphs(
                self.chat_template, {"prompt": turns[last]["content"], **privileged}
            )
        return self.chat_text(turns, problem.prompt_id)

    def chat_text(self, turns: Sequence[Mapping[str, str]], name: str, *, generation_prompt: bool = True) -> str:
        """Turns through the chat template, after the system turn of the recipe if they have none. name: of the problem,
        for errors. Raises PromptError."""
        if self.system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.system}, *turns]
        try:
            return render_chat(self.tokenizer, turns, self.chat_template_kwargs, generation_prompt=generation_prompt)
        except TemplateError as e:
            raise PromptError(f"problem {name}: {e}") from e

    def _raw_question(self, problem: Problem) -> str:
        if problem.messages is not None and [m["role"] for m in problem.messages] != ["user"]:
            raise PromptError(
                f"problem {problem.prompt_id} has several chat turns, which data.format raw cannot render; use chat"
            )
        return problem.question

    # --- ids ---

    def _begin_tokens(self) -> list[int]:
        """The ids that the tokenizer puts before a text (a begin token), which raw prompts get once; those that it puts
        after a text (an end token) are left out and named in the log, since a prompt does not end there.
        """
        probe = self.tokenizer("1", return_special_tokens_mask=True, verbose=False)
        ids, added = list(probe["input_ids"]), list(probe["special_tokens_mask"])  # [1, 0, 1]: one before, one after
        text = [i for i, special in enumerate(added) if not special]
        first, last = (text[0], text[-1] + 1) if text else (len(ids), len(ids))
        if ids[last:]:
            log.warning(
                "data.format raw: the tokenizer appends %s to a text; prompts do not get it",
                self.tokenizer.convert_ids_to_tokens(ids[last:]),
            )
        return ids[:first]

    def _encode_text(self, text: str) -> TokenIds:
        ids = encode(self.tokenizer, text)
        # `_begin` is empty for chat prompts, whose template writes the begin token; raw text may hold it already
        begins = ids[: len(self._begin)].tolist() == self._begin
        return ids if begins else np.concatenate([as_array(self._begin, "int32"), ids])

    def student(self, problem: Problem) -> Prompt:
        """The student's prompt. Raises PromptError if it is empty or longer than `max_prompt_tokens`."""
        ids = self._encode(self.student_text(problem))
        if not len(ids):
            raise PromptError(f"problem {problem.prompt_id} renders to no tokens at all")
        if len(ids) > self.max_prompt_tokens:
            raise PromptError(
                f"the prompt of problem {problem.prompt_id} has {len(ids)} tokens, more than "
                f"sampling.max_prompt_tokens ({self.max_prompt_tokens}): raise it to at least {len(ids)}, "
                "or remove the problem"
            )
        return Prompt(problem, tuple(ids.tolist()))

    def tokens(self, problem: Problem) -> int:
        """Tokens of the student's prompt, however long."""
        return len(self._encode(self.student_text(problem)))

    def check(self, problems: Iterable[Problem]) -> int:
        """Render every problem once; returns the longest prompt's tokens.

        Raises PromptError if prompts are too long: how many, the longest of them, what to change.
        """
        longest, worst, over = 0, "", 0
        for problem in problems:
            tokens = self.tokens(problem)
            over += tokens > self.max_prompt_tokens
            if tokens > longest:
                longest, worst = tokens, problem.prompt_id
            if not tokens:
                raise PromptError(f"problem {problem.prompt_id} renders to no tokens at all")
        if over:
            raise PromptError(
                f"{over} of the problems have prompts longer than sampling.max_prompt_tokens "
                f"({self.max_prompt_tokens}); "
                f"the longest, problem {worst}, has {longest} tokens: raise sampling.max_prompt_tokens to {longest}, "
                "or remove these problems (of data.train: data.filter.long_prompts drop)"
            )
        return longest

    def teacher(
        self,
        problem: Problem,
        demonstration: str | None,
        feedback: str | None,
        response_len: int,
        limits: TeacherLimits,
    ) -> TeacherPrompt:
        """The teacher's prompt for a response of `response_len` tokens.

        `demonstration` is cleaned and shortened here. With neither demonstration nor feedback the ids are exactly the
        student's.
        """
        solution, tokens, shortened = None, 0, False
        if demonstration is not None:
            full = clean(demonstration, self._special_tokens, strip_thinking=limits.strip_thinking)
            solution, tokens = self._shorten(full, limits.max_solution_tokens)
            if not solution:
                return TeacherPrompt(None, "demonstration_empty")
            shortened = solution != full
        while True:
            ids = self._encode(self.teacher_text(problem, solution, feedback))
            excess = 0 if limits.max_teacher_tokens is None else len(ids) + response_len - limits.max_teacher_tokens
            if excess <= 0:
                break
            if solution is None or tokens - excess < limits.min_solution_tokens:
                return TeacherPrompt(None, "teacher_too_long")
            bound = tokens - excess
            (solution, tokens), shortened = self._shorten(full, bound), True
            if not solution:
                return TeacherPrompt(None, "teacher_too_long")
            tokens = min(tokens, bound)
        return TeacherPrompt(ids, "demonstration_shortened" if shortened else None, tokens)
