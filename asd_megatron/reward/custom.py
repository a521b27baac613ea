"""A user's own `reward(problem, response) -> float`: `package.module:function` or `path/to/file.py:function`."""

from __future__ import annotations

import base64
import logging
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asd_megatron.records import Problem
from asd_megatron.reward.base import Response, RewardError, new_counters, tests_of
from asd_megatron.reward.usage import memory_bytes
from asd_megatron.reward.workers import GIB, Limits, Outcome, WorkerPool, wall_seconds, worker_command

log = logging.getLogger(__name__)

JUDGE = Path(__file__).with_name("custom_worker.py")
START_SECONDS = 600.0  # the module may load a model
MAX_TASKS = 4_096  # processes and threads of one worker


class CustomVerifier:
    """Calls a user's function in `workers` processes of its own; with one, for one response after the other.

    Each process imports the function and keeps its own state; what the function prints goes to the trainer's stderr.
    Processor time has no limit (it may use threads and devices), but a call takes at most `wall_timeout_seconds`, 10
    times `timeout_seconds` if None. A process may use `memory_gb` (GiB, resident; None: half of the machine's memory
    divided by `workers`) and MAX_TASKS processes and threads, those that it starts included. Attributes of the function
    are read: `feedback_kind` (`binary`, the default, or `fraction`: the problem's `tests` field then says how many
    tests there are).

    `on_error`, when the function raises (SystemExit included), returns no finite number, exceeds a limit or ends its
    process: `stop` raises RewardError; `zero` scores 0, counts it in `errors` or `timeouts` and logs it. A process that
    ended is replaced, and its state is lost. Raises RewardError at once for a function that cannot be imported or has
    another signature.
    """

    def __init__(
        self,
        name: str,
        *,
        on_error: str = "stop",
        timeout_seconds: float = 5.0,
        wall_timeout_seconds: float | None = None,
        workers: int = 1,
        memory_gb: float | None = None,
    ) -> None:
        self.name, self.on_error = name, on_error
        self.counters = new_counters()
        limits = Limits(
            wall_seconds(timeout_seconds, wall_timeout_seconds),
            start_seconds=START_SECONDS,
            resident_bytes=memory_bytes() // (2 * workers) if memory_gb is None else int(memory_gb * GIB),
            tasks=MAX_TASKS,
        )
        command = worker_command(JUDGE, limits, [name], quiet=False, path=sys.path)
        self._last_problem: tuple[Problem, str] | None = None
        try:
            self._pool = WorkerPool(command, workers, limits, self.counters, own_stderr=False, may_end=True)
        except RewardError as e:
            raise RewardError(f"reward.name {name!r} cannot be imported: {e}") from e
        try:
            [outcome] = self._pool.run([{"describe": True}])
            description = _answer(outcome)
            if "feedback_kind" not in description:
                raise RewardError(f"the reward {name} {description['error']} right after it was imported")
            self.feedback_kind = description["feedback_kind"]
        except BaseException:
            self.close()
            raise

    def score(self, responses: Sequence[Response]) -> list[float]:
        responses = [Response(*response) for response in responses]
        requests = [self._request(response) for response in responses]
        rewards = [0.0] * len(responses)

        def check(i: int, outcome: Outcome) -> None:
            rewards[i] = self._reward(responses[i], _answer(outcome))

        self._pool.run(requests, check)
        return rewards

    def _request(self, response: Response) -> dict[str, object]:
        problem = response.problem
        if self.feedback_kind == "fraction" and not tests_of(problem):
            raise RewardError(
                f"{self.name} says feedback_kind = 'fraction', but problem {problem.prompt_id} has no field `tests`"
            )
        return {"problem": self._pickled(problem), "response": response.text, "truncated": response.truncated}

    def _reward(self, response: Response, answer: Mapping[str, str]) -> float:
        if "reward" in answer:
            return float(answer["reward"])
        counter = answer.get("failure", "error") + "s"
        case = f"(problem {response.problem.prompt_id}, response {_excerpt(response.text)})"
        message = f"the reward {self.name} {answer['error']} {case}{answer.get('where', '')}"
        if self.on_error == "stop":
            limit = ", raise the limit" if counter == "timeouts" else ""
            raise RewardError(
                f"{message}. Fix the function{limit}, or set reward.on_error to zero to count such responses as 0"
            )
        self.counters[counter] += 1
        log.warning("%s: counted as 0 (%s so far: %d)", message, counter, self.counters[counter])
        return 0.0

    def _pickled(self, problem: Problem) -> str:
        # the responses of a group come one after the other
        if self._last_problem is None or self._last_problem[0] is not problem:
            self._last_problem = problem, base64.b64encode(pickle.dumps(problem)).decode()
        return self._last_problem[1]

    def close(self) -> None:
        """End the processes. Safe to call twice."""
        self._pool.close()


def _answer(outcome: Outcome) -> Mapping[str, Any]:
    """A worker's answer; `error` and `failure` if there is none. Raises RewardError for an unusable function."""
    if outcome.answer is None:
        errors = {"timeout": f"gave {outcome.reason}", "excess": outcome.reason}
        error = errors.get(outcome.failure, f"ended its process ({outcome.reason})")
        return {"error": error, "failure": "timeout" if outcome.failure == "timeout" else "error"}
    if "refused" in outcome.answer:
        raise RewardError(outcome.answer["refused"])
    return outcome.answer


def _excerpt(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")
