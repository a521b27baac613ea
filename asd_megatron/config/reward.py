"""Section `reward`: how a response is scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from asd_megatron.config.base import Section
from asd_megatron.config.code_reward import CodeSection


class RewardSection(Section):
    """The verifier that scores responses."""

    name: Annotated[
        str,
        StringConstraints(
            pattern=r"^(math|exact|puzzle|reasoning_gym|code|([A-Za-z_]\w*(\.[A-Za-z_]\w*)*|[^:\n]+\.py):[A-Za-z_]\w*)$"
        ),
    ] = Field(
        "math",
        description=(
            "`math`: math-verify on the final answer; `exact`: equal text; `puzzle`: the search puzzle;"
            " `reasoning_gym`: the reasoning_gym task's own verifier; `code`: the response's program on the problem's"
            " tests, in a sandbox (docs/sandbox.md); or your own function as"
            " `package.module:function` or `path/to/file.py:function`."
        ),
    )
    timeout_seconds: float = Field(
        5.0,
        gt=0,
        description=(
            "`math` and `reasoning_gym`: longest processor time (seconds) for one answer; then it scores 0 and counts"
            " in `reward/timeouts`. `code`: of one test, which then is failed."
        ),
    )
    wall_timeout_seconds: float | None = Field(
        None,
        gt=0,
        description=(
            "Longest wall time (seconds) for one answer, for one test of `code` or for one call of your own function;"
            " null: 10 times `timeout_seconds`. At least `timeout_seconds`."
        ),
    )
    workers: int = Field(
        2, ge=1, description="Processes in which `math`, `reasoning_gym` and `code` judge in parallel."
    )
    truncated: Literal["zero", "judge"] = Field(
        "zero",
        description=(
            "A response that the token budget cut off: `zero`, it scores 0 without being judged and counts in"
            " `reward/truncated`; `judge`, it is scored like any other."
        ),
    )
    on_error: Literal["stop", "zero"] = Field(
        "stop",
        description=(
            "When your own function raises, exits, exceeds its time or returns no number: stop the run, or score 0,"
            " count and log it."
        ),
    )
    allow_unsafe_sandbox: bool = Field(
        False,
        description=(
            "`code`: run programs that the model wrote on a machine that lacks protections (`asd-megatron sandbox"
            " check` names them); they can then read and delete your files. Without it such a run is refused."
        ),
    )
    code: CodeSection = Field(
        CodeSection(),
        description=(
            "`code`: `python`, the interpreter of programs, with its packages (null: this one without packages);"
            " `memory_mb` of each process and of all of a test's together; `processes` and threads of a test;"
            " `file_mb`, the size of `/tmp` and of a file; `output_kb` of a test; `max_tests` of a problem, evenly"
            " chosen (null: all); `max_exhausted`, tests of a program that may exceed a limit before the rest counts"
            " as failed (null: all run); `all_or_nothing`, a reward of 1 for passing all tests and else 0, instead of"
            " the fraction. Keys that are left out keep their defaults."
        ),
    )

    @property
    def max_tests(self) -> int | None:
        """How many tests of a problem are run at most; None: all."""
        return self.code.max_tests if self.name == "code" else None
