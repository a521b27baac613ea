"""A user's own `reward(problem, response) -> float`: `package.module:function` or `path/to/file.py:function`."""

from __future__ import annotations

import base64
import logging
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

from asd_megatron.records import Problem
from asd_megatron.reward.base import Response, RewardError, new_counters, tests_of
from asd_megatron.reward.workers import Limits, WorkerPool, wall_seconds, worker_command

log = logging.getLogger(__name__)

JUDGE = Path(__file__).with_name("custom_worker.py")
START_SECONDS = 600.0  # the module may load a model


class CustomVerifier:
    """Calls a user's function in one process of its own, one response after the other.

    The process imports the function and keeps its state; what the function prints goes to the trainer's stderr. It has
    no limit on processor time or memory (it may use threads and devices), but a call takes at most
    `wall_timeout_seconds`, 10 times `timeout_seconds` if None. Attributes of the function are read: `feedback_kind`
    (`binary`, the default, or `fraction`: the problem's `tests` field then says how many tests there are).

    `on_error`, when the function raises (SystemExit included), returns no finite number, exceeds its time or ends its
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
    ) -> None:
        if on_error not in ("stop", "zero"):
            raise RewardError(f"reward.on_error {on_error!r} does not exist; choose stop or zero")
        self.name, self.on_error = name, on_error
        self.counters = new_counters()
        limits = Limits(wall_seconds(timeout_seconds, wall_timeout_seconds), start_seconds=START_SECONDS)
        command = worker_command(JUDGE, limits, [name], quiet=False, path=sys.path)
        self._last_problem: tuple[Problem, str] | None = None
        try:
            self._pool = WorkerPool(command, 1, limits, self.counters, own_stderr=False, may_end=True)
        except RewardError as e:
            raise RewardError(f"reward.name {name!r} cannot be imported: {e}") from e
        try:
            description = self._ask({"describe": True})
            if "feedback_kind" not in description:
                raise RewardError(f"the reward {name} {description['error']} right after it was imported")
            self.feedback_kind = description["feedback_kind"]
        except BaseException:
            self.close()
            raise

    def score(self, responses: Sequence[Response]) -> list[float]:
        return [self._score(*response) for response in responses]

    def _score(self, problem: Problem, text: str, truncated: bool = False) -> float:
        if self.feedback_kind == "fraction" and not tests_of(problem):
            raise RewardError(
                f"{self.name} says feedback_kind = 'fraction', but problem {problem.prompt_id} has no field `tests`"
            )
        answer = self._ask({"problem": self._pickled(problem), "response": text, "truncated": truncated})
        if "reward" in answer:
            return float(answer["reward"])
        counter = answer.get("failure", "error") + "s"
        case = f"(problem {problem.prompt_id}, response {_excerpt(text)})"
        message = f"the reward {self.name} {answer['error']} {case}{answer.get('where', '')}"
        if self.on_error == "stop":
            limit = ", raise the limit" if counter == "timeouts" else ""
            raise RewardError(
                f"{message}. Fix the function{limit}, or set reward.on_error to zero to count such responses as 0"
            )
        self.counters[counter] += 1
        log.warning("%s: counted as 0 (%s so far: %d)", message, counter, self.counters[counter])
        return 0.0

    def _ask(self, request: dict[str, object]) -> dict[str, str]:
        """The worker's answer; `error` and `failure` if there is none. Raises RewardError for an unusable function."""
        [outcome] = self._pool.run([request])
        if outcome.answer is None:
            timeout = outcome.failure == "timeout"
            error = f"gave {outcome.reason}" if timeout else f"ended its process ({outcome.reason})"
            return {"error": error, "failure": outcome.failure}
        if "refused" in outcome.answer:
            raise RewardError(outcome.answer["refused"])
        return dict(outcome.answer)

    def _pickled(self, problem: Problem) -> str:
        # the responses of a group come one after the other
        if self._last_problem is None or self._last_problem[0] is not problem:
            self._last_problem = problem, base64.b64encode(pickle.dumps(problem)).decode()
        return self._last_problem[1]

    def close(self) -> None:
        """End the process. Safe to call twice."""
        self._pool.close()


def _excerpt(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")
