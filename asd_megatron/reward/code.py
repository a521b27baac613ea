"""Programs, judged by running their problem's tests in a sandbox."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from asd_megatron.distributed import activity
from asd_megatron.records import Problem
from asd_megatron.reward.base import Response, RewardError
from asd_megatron.reward.code_cases import Case, StdinCase, cases_of, setup_of, tests_field
from asd_megatron.reward.code_program import program_of
from asd_megatron.reward.workers import wall_seconds
from asd_megatron.sandbox.launch import SandboxLimits, find_interpreter
from asd_megatron.sandbox.pool import SandboxPool, Status, TestedProgram, TestResult
from asd_megatron.sandbox.probe import usable_protections

log = logging.getLogger(__name__)

TIMEOUTS = (Status.CPU_TIME, Status.WALL_TIME)
EXHAUSTED = (*TIMEOUTS, Status.MEMORY, Status.OUTPUT, Status.SANDBOX)


class CodeVerifier:
    """The fraction of the problem's tests that the response's program passes (`code_program.program_of`,
    `code_cases.Case`); with `all_or_nothing` 1.0 if it passes all, else 0.0. A response without a program scores 0 and
    counts in `no_code`.

    A test has `timeout_seconds` of processor time for all its processes and `wall_timeout_seconds` in all (None: 10
    times as long); a test that exceeds them counts in `timeouts` and is failed. After `max_exhausted` tests of a
    program that exceeded a limit its remaining tests count as failed without being run (None: they are run).
    `workers` programs are tested at a time. A response whose sandbox did not start scores 0 and counts in `errors`;
    `restarts` counts such starts and sandboxes that a program took down.

    Raises RewardError where the machine lacks a protection, unless `allow_unsafe_sandbox`: then a warning says which.
    """

    def __init__(
        self,
        *,
        timeout_seconds: float = 5.0,
        wall_timeout_seconds: float | None = None,
        workers: int = 2,
        allow_unsafe_sandbox: bool = False,
        python: str | None = None,
        memory_mb: int = 1024,
        processes: int = 16,
        file_mb: int = 64,
        output_kb: int = 4096,
        max_tests: int | None = None,
        max_exhausted: int | None = 3,
        all_or_nothing: bool = False,
    ) -> None:
        self.feedback_kind = "binary" if all_or_nothing else "fraction"
        self.max_tests, self.max_exhausted, self.all_or_nothing = max_tests, max_exhausted, all_or_nothing
        self._counts = {"timeouts": 0, "errors": 0, "no_code": 0}
        limits = SandboxLimits(
            cpu_seconds=timeout_seconds,
            wall_seconds=wall_seconds(timeout_seconds, wall_timeout_seconds),
            memory_bytes=memory_mb << 20,
            processes=processes,
            file_bytes=file_mb << 20,
            output_bytes=output_kb << 10,
        )
        interpreter = find_interpreter(python)
        protections, missing = usable_protections(interpreter)
        if missing:
            lacks = "; ".join(f"{m.protection}: {m.remedy}" for m in missing)
            if not allow_unsafe_sandbox:
                raise RewardError(
                    f"reward.name code runs programs that the model wrote, and this machine lacks protections: {lacks}."
                    " Or accept what such programs may do to your files, keys and network:"
                    " reward.allow_unsafe_sandbox true"
                )
            log.warning("programs that the model wrote run without these protections: %s", lacks)
        self._pool = SandboxPool(interpreter, limits, size=workers, protections=protections, on_wait=activity.mark)

    @property
    def counters(self) -> Mapping[str, int]:
        return {**self._counts, "restarts": self._pool.restarts}

    def score(self, responses: Sequence[Response]) -> list[float]:
        responses = [Response(*response) for response in responses]
        for response in responses:
            tests_field(response.problem)  # whatever the response is: without tests nothing can be scored
        keys = [(r.problem.prompt_id, program_of(r.text)) for r in responses]
        self._counts["no_code"] += sum(program is None for _, program in keys)
        # equal programs of a group are tested once
        asked = {key: r.problem for key, r in zip(keys, responses, strict=True) if key[1] is not None}
        scores = dict(zip(asked, self._scores([(p, key[1] or "") for key, p in asked.items()]), strict=True))
        return [scores.get(key, 0.0) for key in keys]

    def _scores(self, programs: Sequence[tuple[Problem, str]]) -> list[float]:
        by_problem: dict[str, list[Case]] = {}
        for problem, _ in programs:
            if problem.prompt_id not in by_problem:
                by_problem[problem.prompt_id] = cases_of(problem, self.max_tests)
        cases = [by_problem[problem.prompt_id] for problem, _ in programs]
        tested = [
            TestedProgram(program, [case.test for case in cases[i]], setup_of(problem), _longest(cases[i]))
            for i, (problem, program) in enumerate(programs)
        ]
        results = self._pool.run(tested, lambda i, done: self._goes_on(cases[i], done))
        return [self._score(*given) for given in zip(programs, cases, results, strict=True)]

    def _goes_on(self, cases: Sequence[Case], done: Sequence[TestResult]) -> bool:
        """Whether the remaining tests can change the score, and are not given up."""
        if self.all_or_nothing and not cases[len(done) - 1].passed(done[-1]):
            return False
        exhausted = sum(result.status in EXHAUSTED for result in done)
        return self.max_exhausted is None or exhausted < self.max_exhausted

    def _score(
        self, program: tuple[Problem, str], cases: Sequence[Case], results: Sequence[TestResult] | None
    ) -> float:
        if results is None:
            self._counts["errors"] += 1
            log.warning(
                "program for problem %s counted as 0: its sandbox did not start (%s)",
                program[0].prompt_id,
                self._pool.last_failure,
            )
            return 0.0
        self._counts["timeouts"] += sum(result.status in TIMEOUTS for result in results)
        passed = sum(case.passed(result) for case, result in zip(cases, results, strict=False))
        return float(passed == len(cases)) if self.all_or_nothing else passed / len(cases)

    def close(self) -> None:
        """Nothing runs between calls."""


def _longest(cases: Sequence[Case]) -> int:
    """Bytes that no right output exceeds (4 for a character), and room for white space that does not count."""
    return 4 * max((len(case.output) for case in cases if isinstance(case, StdinCase)), default=0)
