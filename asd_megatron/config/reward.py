"""Section `reward`: how a response is scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from asd_megatron.config.base import Section, Text, to_tuple
from asd_megatron.config.code_reward import CodeSection

Name = Annotated[
    str,
    StringConstraints(
        pattern=r"^(math|exact|puzzle|reasoning_gym|code|http|([A-Za-z_]\w*(\.[A-Za-z_]\w*)*|[^:\n]+\.py):[A-Za-z_]\w*)$"
    ),
]


class HttpSection(Section):
    """The server that scores responses with `name: http`."""

    url: Text | None = None
    key_file: Text | None = None
    batch: int = Field(32, ge=1)
    concurrency: int = Field(4, ge=1)
    timeout_seconds: float = Field(120.0, gt=0)
    retries: int = Field(4, ge=0, le=20)
    environment_proxy: bool = False


class VerifierSection(Section):
    """One verifier with its limits."""

    name: Name = Field(
        "math",
        description=(
            "`math`: math-verify on the final answer; `exact`: equal text; `puzzle`: the search puzzle;"
            " `reasoning_gym`: the reasoning_gym task's own verifier; `code`: the response's program on the problem's"
            " tests, in a sandbox (docs/sandbox.md); `http`: a server (`http`); or your own function"
            " as `package.module:function` or `path/to/file.py:function`."
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
    workers: int | None = Field(
        None,
        ge=1,
        description=(
            "Processes that judge in parallel; null: 2, or 1 for your own function, whose state lasts in each process"
            " by itself."
        ),
    )
    memory_gb: float | None = Field(
        None,
        gt=0,
        description=(
            "Most memory (GiB, resident) of a process of your own function, with what it starts; null: half of the"
            " machine's, divided by `workers`."
        ),
    )
    on_error: Literal["stop", "zero"] = Field(
        "stop",
        description=(
            "When your own function raises, exits, exceeds a limit or returns no number, or when the server of `http`"
            " does not score a response: stop the run, or score 0, count and log it."
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
            "The sandbox of `name: code` (docs/sandbox.md). `python`: the interpreter of programs, with its packages"
            " (null: this one, without packages); `memory_mb` (MiB): of each process, and of all of a test's together;"
            " `processes`: and threads of a test; `file_mb` (MiB): the size of `/tmp` and of a file; `output_kb`"
            " (KiB): of a test; `max_tests`: of a problem, evenly chosen (null: all); `max_exhausted`: tests of a"
            " program that may exceed a limit before the rest counts as failed (null: all run); `all_or_nothing`: a"
            " reward of 1 for passing all tests and else 0, instead of the fraction. Keys that are left out keep their"
            " defaults."
        ),
    )
    http: HttpSection = Field(
        HttpSection(),
        description=(
            "The server of `name: http` (docs/rewards.md). `url`: where responses are posted; `key_file`: file with"
            " the key that is sent as `Authorization: Bearer KEY`, readable by its owner alone; `batch`: responses of"
            " a request, at most; `concurrency`: requests at a time; `timeout_seconds` (wall time): for one request;"
            " `retries`: how often a failed request is sent again, after growing pauses; `environment_proxy`: use the"
            " proxies that `http_proxy` and its kind name. Keys that are left out keep their defaults."
        ),
    )


class RewardPart(VerifierSection):
    """One of several verifiers whose rewards are added."""

    name: Name
    weight: float = 1.0
    label: Annotated[str, StringConstraints(pattern=r"^[\w.-]{0,40}$")] = ""

    @property
    def short_name(self) -> str:
        """Its name in metrics: the label, else the verifier's name, of a user's function the function's."""
        return self.label or self.name.rpartition(":")[2]


class RewardSection(VerifierSection):
    """The verifier that scores responses."""

    truncated: Literal["zero", "judge"] = Field(
        "zero",
        description=(
            "A response that the token budget cut off: `zero`, it scores 0 without being judged and counts in"
            " `reward/truncated`; `judge`, it is scored like any other."
        ),
    )
    parts: Annotated[tuple[RewardPart, ...], BeforeValidator(to_tuple)] = Field(
        (),
        description=(
            "Several verifiers instead of one, each with `name`, `weight` (1), `label` (its name in metrics) and the"
            " options above: the reward is the sum of weight times reward."
        ),
    )

    @property
    def max_tests(self) -> int | None:
        """How many tests of a problem `code` alone runs at most; None: all."""
        return self.code.max_tests if self.name == "code" and not self.parts else None

    @property
    def verifiers(self) -> tuple[VerifierSection, ...]:
        """The parts, or the section itself."""
        return self.parts or (self,)

    @property
    def in_words(self) -> str:
        """`math`, or `0.9 math + 0.1 brief`."""
        return " + ".join(f"{part.weight:g} {part.short_name}" for part in self.parts) or self.name
