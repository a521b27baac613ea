from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from asd_megatron.errors import UserError
from asd_megatron.records import Problem
from asd_megatron.reward import custom as custom_reward
from asd_megatron.reward import workers
from asd_megatron.reward.base import Response
from asd_megatron.reward.base import tests_of as count_tests
from asd_megatron.reward.custom import CustomVerifier
from asd_megatron.reward.custom_worker import NotANumber, load_function, number, refuse_other_signatures
from asd_megatron.reward.exact import ExactVerifier
from asd_megatron.reward.factory import make_verifier, one_verifier
from asd_megatron.reward.workers import Limits

PROBLEM = Problem("p7", "a  b", prompt="?", extra={"tests": (1, 2, 3)})

REWARDS = """
import os, sys, time
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

@dataclass
class Helper:
    value: float

class Mute(Exception):
    def __str__(self): raise RuntimeError("no text")

calls = 0

def length(problem, response): return Helper(len(response) / 10).value
def same(problem, response): return response == problem.answer
def fields(problem, response): return len(problem.extra["tests"]) + len(problem.question)
def count(problem, response):
    global calls
    calls += 1
    return calls
def fraction(problem, response): return 2 / 3
fraction.feedback_kind = "fraction"
def odd(problem, response): return 0.0
odd.feedback_kind = "stars"
constant = 3
def prints(problem, response):
    print("seen by the user")
    return 1
class Callable:
    def __call__(self, problem, response): return 0.25
instance = Callable()

def by_name(problem, response):
    if response == "divide": return 1 / 0
    if response == "exit": sys.exit(0)
    if response == "interrupt": raise KeyboardInterrupt
    if response == "die": os._exit(0)
    if response == "sleep": time.sleep(600)
    while response == "spin": pass
    if response == "kill": os.kill(os.getpid(), 9)
    if response == "leak":
        leaked = bytearray(400 << 20)
        time.sleep(600)
    if response == "forks":
        for _ in range(40):
            if os.fork() == 0: time.sleep(600)
        time.sleep(600)
    if response == "child" and os.fork() == 0: raise ValueError  # answers nothing
    if response == "mute": raise Mute
    if response == "text": return "1.0"
    if response == "nan": return float("nan")
    if response == "huge": return 10**400
    return 0.5

def verl(data_source, solution_str, ground_truth, extra_info=None): return 1.0
def trl(prompts, completions, **kwargs): return [1.0]
def trl_short(completions, **kwargs): return [1.0]
def openrlhf(queries, prompts, labels): return 1.0
def nemo_rl(message_log_batch, metadata): return 1.0
def reversed_arguments(response, problem): return 1.0
def one(response): return 1.0
def keyword_only(problem, response, *, level): return 1.0
async def asynchronous(problem, response): return 1.0
def generator(problem, response): yield 1.0
def busy(problem, response):
    open(response + str(os.getpid()), "w").close()
    while len(os.listdir(response)) < 3: time.sleep(0.01)  # until all processes are here
    return 1
def ended(problem, response, truncated, *, finish_reason=None): return [0.1, 0.2][truncated] + len(finish_reason)
def own_keyword(problem, response, *, extra_info=None): return 1.0
def anything(*args): return 1.0
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "math.py"  # shadows nothing
    path.write_text(REWARDS)
    return path


@contextmanager
def custom(name: str, **kwargs: Any) -> Iterator[Any]:
    verifier = one_verifier(name, **kwargs)
    try:
        yield verifier
    finally:
        verifier.close()


def test_exact() -> None:
    v = ExactVerifier()
    assert v.score([(PROBLEM, " a\nb "), (PROBLEM, "ab"), (PROBLEM, "A b"), (PROBLEM, "")]) == [1.0, 0.0, 0.0, 0.0]
    v.close()
    tested = Problem("t", "", prompt="Add.", extra={"tests": ({"input": "1", "output": "1"},)})
    with pytest.raises(UserError, match=r"exact compares .* problem t has none, but tests: set reward.name code"):
        ExactVerifier().score([Response(tested, "1")])


def test_custom_from_a_file(rewards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with custom(f"{rewards}:length") as v:
        assert v.score([(PROBLEM, "12345"), (PROBLEM, "")]) == [0.5, 0.0] and v.feedback_kind == "binary"
    with custom(f"{rewards}:same") as v:
        assert v.score([(PROBLEM, "a  b"), (PROBLEM, "x")]) == [1.0, 0.0]
    with custom(f"{rewards}:fields") as v:
        assert v.score([(PROBLEM, ""), (Problem("q", "1", prompt="", extra={"tests": ()}), "")]) == [4.0, 0.0]
    with custom(f"{rewards}:count") as v:
        assert v.score([(PROBLEM, "")] * 2) + v.score([(PROBLEM, "")]) == [1.0, 2.0, 3.0]  # state is kept
    with custom(f"{rewards}:prints") as v:
        assert v.score([(PROBLEM, "")]) == [1.0] and "seen by the user" in capfd.readouterr().err
    with custom(f"{rewards}:fraction") as v:
        assert v.feedback_kind == "fraction" and v.score([(PROBLEM, "x")]) == [2 / 3]
        with pytest.raises(UserError, match="problem q has no field `tests`"):
            v.score([(Problem("q", "1", prompt="?"), "x")])


def test_a_truncated_response_scores_0_unjudged_unless_the_recipe_says_so(rewards: Path) -> None:
    cut_off, complete = Response(PROBLEM, "a b", truncated=True), Response(PROBLEM, "a b")
    v = make_verifier("exact")
    assert v.score([cut_off, complete, cut_off]) == [0.0, 1.0, 0.0] and v.score([cut_off]) == [0.0]
    assert v.counters["truncated"] == 3 and v.feedback_kind == "binary"
    assert v.take_part_means() == {}
    assert make_verifier("exact", truncated="judge").score([cut_off, complete]) == [1.0, 1.0]
    with custom(f"{rewards}:ended") as v:  # a function of one's own may ask
        assert v.score([cut_off, complete]) == [0.2 + len("length"), 0.1 + len("stop")]
    with pytest.raises(UserError, match="reward.truncated 'no' does not exist; choose zero or judge"):
        make_verifier("exact", truncated="no")


def test_several_rewards_with_weights(rewards: Path) -> None:
    parts = [
        {"name": "exact", "weight": 0.5},
        {"name": f"{rewards}:length", "weight": -2.0, "label": "brief"},
        {"name": f"{rewards}:by_name", "on_error": "zero"},
    ]
    v = make_verifier(parts=parts)
    try:
        texts = [Response(PROBLEM, "a b"), Response(PROBLEM, "divide"), Response(PROBLEM, "a b", truncated=True)]
        assert v.score(texts) == pytest.approx([0.5 - 2 * 0.3 + 0.5, -2 * 0.6, 0.0])
        assert v.take_part_means() == pytest.approx({"exact": 1 / 3, "brief": 0.9 / 3, "by_name": 0.5 / 3})
        assert v.take_part_means() == {} and v.feedback_kind == "binary"
        assert v.counters == {"timeouts": 0, "errors": 1, "restarts": 0, "truncated": 1}
    finally:
        v.close()
    with custom(f"{rewards}:fraction") as first, pytest.raises(UserError, match="'nothing' does not exist"):
        assert first.feedback_kind == "fraction"
        halved = make_verifier(parts=[{"name": f"{rewards}:fraction", "weight": 0.5}])
        assert halved.feedback_kind == "binary"
        halved.close()
        make_verifier(parts=[{"name": f"{rewards}:fraction"}, {"name": "nothing"}])


def test_custom_from_a_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_module.py").write_text("def reward(problem, response): return 0.25\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    with custom("my_rewards_module:reward") as v:
        assert v.score([(PROBLEM, "x")]) == [0.25]


FAILURES = [
    ("divide", "raised ZeroDivisionError: division by zero"),
    ("exit", "raised SystemExit: 0"),  # must not end the run with status 0
    ("interrupt", "raised KeyboardInterrupt"),
    ("die", "ended its process (a reward worker ended with status 0"),
    ("kill", "ended its process (a reward worker ended with status -9"),
    ("mute", "raised Mute"),
    ("text", "returned str, not a number"),
    ("nan", "returned nan, which is not finite"),
    ("huge", "which is not finite"),
]


def test_a_reward_that_fails(rewards: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = f"{rewards}:by_name"
    with custom(name) as v:
        for response, reason in FAILURES:
            with pytest.raises(UserError) as e:
                v.score([(PROBLEM, response)])
            assert all(x in str(e.value) for x in (name, reason, f"(problem p7, response {response!r})"))
            assert "reward.on_error" in str(e.value)
            assert (") at math.py:" in str(e.value)) == ("raised" in reason)
        assert v.counters["errors"] == v.counters["timeouts"] == 0
    with custom(name, on_error="zero") as v:
        responses = [response for response, _ in FAILURES]
        assert v.score([(PROBLEM, response) for response in [*responses, "fine"]]) == [0.0] * len(responses) + [0.5]
        assert v.score([(PROBLEM, text) for text in ("child", "nan", "fine")]) == [0.5, 0.0, 0.5]
        assert v.counters == {
            "errors": 10,
            "timeouts": 0,
            "restarts": 4,
        }  # `die` and `kill` were tried in two processes
        assert all(reason in caplog.text for _, reason in FAILURES)


@pytest.mark.parametrize("response", ["die", "kill"])
def test_a_reward_that_keeps_ending_its_process(rewards: Path, response: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MAX_DEATHS_IN_A_ROW", 4)
    with custom(f"{rewards}:by_name", on_error="zero") as v:
        assert v.score([(PROBLEM, response)] * 3 + [(PROBLEM, "fine")]) == [0.0] * 3 + [0.5]
        assert v.counters == {"errors": 3, "timeouts": 0, "restarts": 6}
    with custom(f"{rewards}:by_name") as v:
        for _ in range(3):
            with pytest.raises(UserError, match="by_name ended its process"):
                v.score([(PROBLEM, response)])


@pytest.mark.parametrize("response", ["sleep", "spin"])
def test_a_reward_that_hangs(rewards: Path, response: str, caplog: pytest.LogCaptureFixture) -> None:
    for on_error in ("stop", "zero"):
        with custom(f"{rewards}:by_name", on_error=on_error, wall_timeout_seconds=60.0) as v:
            assert isinstance(v, CustomVerifier)
            v._pool.limits = Limits(wall_seconds=0.3)
            if on_error == "stop":
                with pytest.raises(UserError, match=r"by_name gave no answer .* \(reward.wall_timeout_seconds\)"):
                    v.score([(PROBLEM, response)])
            else:
                assert v.score([(PROBLEM, response)]) == [0.0]
                assert v.counters == {"errors": 0, "timeouts": 1, "restarts": 1}
                assert "counted as 0 (timeouts so far: 1)" in caplog.text
            v._pool.limits = Limits(wall_seconds=60.0)
            assert v.score([(PROBLEM, "fine")]) == [0.5]


def test_a_reward_that_takes_the_machine(
    rewards: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom_reward, "MAX_TASKS", 20)
    monkeypatch.setattr(workers, "LOOK_SECONDS", 0.05)
    with custom(f"{rewards}:by_name", on_error="zero", wall_timeout_seconds=60.0, memory_gb=0.3) as v:
        assert v.score([Response(PROBLEM, text) for text in ("leak", "fine", "forks", "fine")]) == [0.0, 0.5, 0.0, 0.5]
        assert v.counters == {"errors": 2, "timeouts": 0, "restarts": 2}
    assert "by_name used more than 0.3 GiB of memory (reward.memory_gb) (problem p7, response 'leak')" in caplog.text
    assert "by_name used more than 20 processes and threads" in caplog.text


def test_a_reward_in_several_processes(rewards: Path, tmp_path: Path) -> None:
    with custom(f"{rewards}:busy", workers=3, wall_timeout_seconds=60.0) as v:
        assert v.score([Response(PROBLEM, f"{tmp_path}/")] * 3) == [1.0] * 3
        assert len(list(tmp_path.iterdir())) == 3
        score = (Path("/proc") / str(v._pool._workers[0].process.pid) / "oom_score_adj").read_text()
        assert score == "1000\n"  # the kernel ends it before the trainer


VALUES = [
    *(numpy.dtype(kind).type(1) for kind in ("bool", "int8", "uint64", "float16", "float32", "float64")),
    *(numpy.array(1.0), numpy.array(True), torch.tensor(1.0, requires_grad=True), torch.tensor(1), torch.tensor(True)),
    *(torch.tensor(1.0, dtype=torch.bfloat16), True, 1, Fraction(2, 2), Decimal("1.0")),
]
NO_NUMBERS = [
    *(None, "1", 1j, [1.0], float("nan"), float("inf"), 10**400, numpy.float32("nan"), torch.tensor(float("inf"))),
    *(numpy.array([1.0]), torch.ones(1), numpy.str_("1"), numpy.complex64(1), numpy.datetime64("2020-01-01"), object()),
]


def test_numbers_of_every_kind() -> None:
    assert [number(value) for value in VALUES] == [1.0] * len(VALUES)
    assert all(type(number(value)) is float for value in VALUES)
    for value in NO_NUMBERS:
        with pytest.raises(NotANumber, match="returned"):
            number(value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("verl", ["verl has it", "verl(problem.extra.get('data_source'), response, problem.answer"]),
        ("trl", ["TRL has it", "completions=[response]"]),
        ("trl_short", ["TRL has it"]),
        ("openrlhf", ["OpenRLHF has it"]),
        ("nemo_rl", ["NeMo RL has it"]),
        ("reversed_arguments", ["the other way round"]),
        ("one", ["(response)", "two arguments"]),
        ("keyword_only", ["level", "two arguments"]),
        ("asynchronous", ["async"]),
        ("generator", ["yield"]),
        ("Helper", ["is a class"]),
    ],
)
def test_other_signatures_are_refused_with_the_expected_one(rewards: Path, name: str, words: list[str]) -> None:
    function = load_function(f"{rewards}:{name}")
    with pytest.raises(UserError) as e:
        refuse_other_signatures(function, f"{rewards}:{name}")
    assert all(word in str(e.value) for word in [*words, "reward(problem, response)"])


@pytest.mark.parametrize("name", ["length", "instance", "ended", "own_keyword", "anything"])
def test_usable_signatures(rewards: Path, name: str) -> None:
    refuse_other_signatures(load_function(f"{rewards}:{name}"), name)


def test_another_signature_is_refused_when_the_verifier_starts(rewards: Path) -> None:
    with pytest.raises(UserError, match="verl has it"):
        make_verifier(f"{rewards}:verl")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("no.such.module:f", "importing no.such.module failed: ModuleNotFoundError"),
        ("{rewards}:missing", "has no 'missing'; it has Callable, Decimal, Fraction, Helper, Mute, anything"),
        ("{rewards}:constant", "'constant' is a int, not a function"),
        ("{rewards}:odd", "feedback_kind 'stars' does not exist"),
        ("{rewards}:", "write package.module:function"),
        ("maths", "'maths' does not exist; did you mean 'math'? Choose code, exact, http, "),
    ],
)
def test_unusable_names(rewards: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError) as e:
        make_verifier(name.replace("{rewards}", str(rewards)))
    assert reason in str(e.value)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('not today')", "failed: RuntimeError: not today"),
        ("import sys; sys.exit(0)", "failed: SystemExit: 0"),
        ("class Mute(Exception): __str__ = None\nraise Mute", "failed: Mute"),
        ("import os; os._exit(0)", "reward workers do not start"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path: Path, code: str, reason: str) -> None:
    (tmp_path / "r.py").write_text(code)
    with pytest.raises(UserError, match=rf"reward.name .*r\.py:f.*{reason}"):
        make_verifier(f"{tmp_path}/r.py:f")


def test_unusable_settings_of_a_custom_reward(rewards: Path) -> None:
    with pytest.raises(UserError, match="reward.on_error 'ignore' does not exist"):
        make_verifier(f"{rewards}:length", on_error="ignore")
    with pytest.raises(UserError, match="reward.wall_timeout_seconds"):
        make_verifier(f"{rewards}:length", timeout_seconds=2.0, wall_timeout_seconds=1.0)


@pytest.mark.parametrize(("tests", "number"), [((1, 2), 2), (5, 5), ([], 0), (True, None), ("x", None), (None, None)])
def test_number_of_tests(tests: Any, number: int | None) -> None:
    assert count_tests(Problem("p", "1", prompt="?", extra={"tests": tests})) == number


def test_puzzle_and_math_by_name() -> None:
    from asd_megatron.puzzle.task import PuzzleStream

    problem = PuzzleStream("test", 1, 0).take(1)[0]
    v = make_verifier("puzzle")
    assert v.score([(problem, f"So {problem.answer}"), (problem, "So")]) == [1.0, 0.0]
    v.close()
    m = make_verifier("math", timeout_seconds=20.0, workers=1)
    assert m.score([(Problem("p", "1/2", prompt="?"), "#### 0.5")]) == [1.0]
    m.close()
