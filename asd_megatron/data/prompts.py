"""Prompts and privileged prompts as text and ids (the method's section 4 set-up and Appendix C).

The teacher's prompt is the student's with a block put after the question:

    QUESTION

    Your previous attempt:
    SOLUTION

    Previous assessment:
    FEEDBACK

    Now solve this problem step by step.

A part that is not known is left out with its heading; with neither part the teacher's ids are the student's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from asd_megatron.data.demonstration import clean, count, shorten, special_token_texts
from asd_megatron.errors import UserError
from asd_megatron.records import Problem, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ATTEMPT_HEADING = "Your previous attempt:"
ASSESSMENT_HEADING = "Previous assessment:"
INSTRUCTION = "Now solve this problem step by step."

PLACEHOLDER = re.compile(r"\{(prompt|solution|feedback)\}")
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


class PromptError(UserError, ValueError):
    """A prompt cannot be rendered, is too long, or its template is unusable."""


@dataclass(frozen=True)
class TeacherLimits:
    """Bounds on a teacher's sequence, in tokens.

    The demonstration has at most `max_solution_tokens`; prompt, demonstration and response together at most
    `max_teacher_tokens` (None: no bound). A demonstration is shortened to make room, but not below
    `min_solution_tokens`.
    """

    max_solution_tokens: int = 8192
    min_solution_tokens: int = 128
    max_teacher_tokens: int | None = None
    strip_thinking: bool = False


@dataclass(frozen=True)
class TeacherInfo:
    """The demonstration of a teacher prompt as shown (None: no solution block), its tokens, whether it was cut."""

    solution: str | None
    solution_tokens: int
    shortened: bool


def privileged_block(solution: str | None, feedback: str | None) -> str:
    """The block that the teacher's prompt has and the student's has not; empty if nothing is known."""
    parts = []
    if solution is not None:
        parts.append(f"{ATTEMPT_HEADING}\n{solution}")
    if feedback is not None:
        parts.append(f"{ASSESSMENT_HEADING}\n{feedback}")
    return "\n\n".join([*parts, INSTRUCTION]) if parts else ""


class PromptRenderer:
    """Renders problems for the student and, with privileged context, for the teacher.

    Args:
        format: `chat` renders through the tokenizer's chat template, `raw` through `raw_prompt`.
        system: a system turn for chat problems that do not start with one of their own.
        raw_prompt: text that holds `{prompt}` once; braces elsewhere are plain text.
        raw_template: the teacher's whole prompt in raw format, with `{prompt}`, `{solution}` and `{feedback}`; a
            line whose placeholder has no value is left out. None: `raw_prompt`, the ordinary block after `{prompt}`.
        chat_template_kwargs: variables for the chat template (`enable_thinking: false`, for instance).
        max_prompt_tokens: the longest student prompt that is accepted.
        end_token_ids: end tokens beside the tokenizer's own, removed from demonstrations.

    `counters` counts what happened to teacher prompts: `demonstration_shortened`, and by reason those that came out
    as None: `teacher_too_long`, `demonstration_empty` (nothing was left after cleaning).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        format: str = "chat",
        system: str | None = None,
        raw_prompt: str = "{prompt}",
        raw_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_prompt_tokens: int = 2048,
        end_token_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.format, self.system = tokenizer, format, system
        self.raw_prompt, self.raw_template = raw_prompt, raw_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.max_prompt_tokens = max_prompt_tokens
        self.counters: Counter[str] = Counter()
        self._special_tokens = special_token_texts(tokenizer, end_token_ids)
        # The rollouts of a group share few demonstrations, so their texts come again and again.
        self._shorten = lru_cache(REMEMBERED)(partial(shorten, tokenizer))
        self._count = lru_cache(REMEMBERED)(partial(count, tokenizer))
        self._encode = lru_cache(REMEMBERED)(self._encode_text)
        self._check_templates()

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
        elif self.format == "raw":
            if PLACEHOLDER.findall(self.raw_prompt) != ["prompt"]:
                raise PromptError(
                    "data.raw_prompt must hold {prompt} exactly once, and neither {solution} nor {feedback}"
                )
            if self.raw_template is not None:
                found = PLACEHOLDER.findall(self.raw_template)
                if found.count("prompt") != 1 or "solution" not in found:
                    raise PromptError(
                        "privileged.raw_template must hold {prompt} exactly once and {solution}; {feedback} is optional"
                    )
        else:
            raise PromptError(f"data.format {self.format!r} does not exist; choose chat or raw")

    # --- text ---

    def student_text(self, problem: Problem) -> str:
        """The student's prompt as text."""
        return self.teacher_text(problem, None, None)

    def teacher_text(self, problem: Problem, solution: str | None, feedback: str | None) -> str:
        """The teacher's prompt as text, with `solution` as it is given."""
        block = privileged_block(solution, feedback)
        if self.format == "chat":
            return self._chat(problem, block)
        text = self._raw_question(problem)
        if block and self.raw_template is not None:
            return _fill(self.raw_template, {"prompt": text, "solution": solution, "feedback": feedback})
        return _fill(self.raw_prompt, {"prompt": f"{text}\n\n{block}" if block else text})

    def _chat(self, problem: Problem, block: str) -> str:
        if problem.messages is not None:
            turns = [dict(m) for m in problem.messages]
        else:
            turns = [{"role": "user", "content": problem.question}]
        if block:
            last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
            turns[last]["content"] += f"\n\n{block}"
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        try:
            text = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
            )
        except Exception as e:  # a template is a program of the model's authors
            raise PromptError(f"problem {problem.prompt_id}: the chat template failed: {type(e).__name__}: {e}") from e
        assert isinstance(text, str)
        return text

    def _raw_question(self, problem: Problem) -> str:
        if problem.messages is not None and [m["role"] for m in problem.messages] != ["user"]:
            raise PromptError(
                f"problem {problem.prompt_id} has several chat turns, which data.format raw cannot render; use chat"
            )
        return problem.question

    def _encode_text(self, text: str) -> tuple[int, ...]:
        # a chat template writes the special tokens itself; raw text gets those that the tokenizer puts around text
        return tuple(self.tokenizer(text, add_special_tokens=self.format == "raw", verbose=False)["input_ids"])

    # --- ids ---

    def student(self, problem: Problem) -> Prompt:
        """The student's prompt. Raises PromptError if it is empty or longer than `max_prompt_tokens`."""
        ids = self._encode(self.student_text(problem))
        if not ids:
            raise PromptError(f"problem {problem.prompt_id} renders to no tokens at all")
        if len(ids) > self.max_prompt_tokens:
            raise PromptError(
                f"the prompt of problem {problem.prompt_id} has {len(ids)} tokens, more than "
                f"sampling.max_prompt_tokens ({self.max_prompt_tokens}): raise it to at least {len(ids)}, "
                "or remove the problem"
            )
        return Prompt(problem, ids)

    def check(self, problems: Iterable[Problem]) -> int:
        """Render every problem once; returns the longest prompt's tokens.

        Raises PromptError if prompts are too long: how many, the longest of them, what to change.
        """
        longest, worst, over = 0, "", 0
        for problem in problems:
            tokens = len(self._encode(self.student_text(problem)))
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
                "or remove these problems"
            )
        return longest

    def teacher(
        self,
        problem: Problem,
        demonstration: str | None,
        feedback: str | None,
        response_len: int,
        limits: TeacherLimits,
    ) -> tuple[tuple[int, ...], TeacherInfo] | None:
        """The teacher's prompt ids for a response of `response_len` tokens; None (and counted) if there can be none.

        `demonstration` is cleaned and shortened here. With neither demonstration nor feedback the ids are exactly the
        student's.
        """
        solution, tokens, shortened = None, 0, False
        if demonstration is not None:
            full = clean(demonstration, self._special_tokens, strip_thinking=limits.strip_thinking)
            solution = self._shorten(full, limits.max_solution_tokens)
            if not solution:
                self.counters["demonstration_empty"] += 1
                return None
            tokens, shortened = self._count(solution), solution != full
        while True:
            ids = self._encode(self.teacher_text(problem, solution, feedback))
            excess = 0 if limits.max_teacher_tokens is None else len(ids) + response_len - limits.max_teacher_tokens
            if excess <= 0:
                break
            if solution is None or tokens - excess < limits.min_solution_tokens:
                self.counters["teacher_too_long"] += 1
                return None
            tokens -= excess  # the bound, not the count: the loop must make progress
            solution, shortened = self._shorten(full, tokens), True
            if not solution:
                self.counters["teacher_too_long"] += 1
                return None
        if solution is not None:
            tokens = self._count(solution)
        self.counters["demonstration_shortened"] += shortened
        return ids, TeacherInfo(solution, tokens, shortened)


def _fill(template: str, values: Mapping[str, str | None]) -> str:
    """Replace the placeholders; a template line that holds one without a value is left out."""
    lines = [
        line
        for line in template.splitlines(keepends=True)
        if all(values.get(name) is not None for name in PLACEHOLDER.findall(line))
    ]
    return PLACEHOLDER.sub(lambda m: values[m[1]] or "", "".join(lines))
