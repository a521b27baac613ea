"""Responses that survive a kill: a run whose servers are simulated token by token, killed at random moments."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asd_megatron.records import FinishReason, Group, Prompt, SamplingParams
from asd_megatron.rollout import journal
from asd_megatron.rollout.bank import Key, Response, RolloutBank
from asd_megatron.rollout.collector import Collector
from asd_megatron.rollout.draw import Plan, Redraw
from asd_megatron.rollout.sglang.client.scheduling import SampleRequest, SampleResult
from asd_megatron.rollout.sglang.grouping import Assembler, Labels, extended
from tests.rollout.test_collector import Problems, Renderer, Verifier
from tests.rollout.test_turns import Blocks
from tests.rollout.toy import Versioned

PARAMS = SamplingParams(n=2, max_new_tokens=32)
PROBLEMS = "".join(chr(0x4E00 + i) for i in range(200))
STEPS, EVERY = 8, 3


class Killed(BaseException):
    """SIGKILL."""


def length_of(name: str, sample: int) -> int:
    """Tokens of a response: 1 to 24."""
    return 1 + hashlib.blake2b(f"{name}/{sample}".encode()).digest()[0] % 24


def name_of(request: SampleRequest) -> str:
    return chr(request.input_ids[0])


class Servers:
    """An engine whose log-probs say which weights sampled which position: -(weights + position / 64).

    weights: the identity of every version that this process has, or has restored. killed_at: the tick of the kill.
    """

    def __init__(self, bank: RolloutBank | None, weights: dict[int, int], killed_at: int | None, tag: str) -> None:
        self.labels, self.weights, self.version = Labels(tag), weights, -1
        self.assembler = Assembler(None, 0, self.labels, bank=bank)
        self.running: dict[Any, tuple[SampleRequest, list[int], list[float], list[tuple[int, str]]]] = {}
        self.done: list[SampleResult] = []
        self.asked: list[tuple[str, int, int]] = []  # problem, sample, tokens that it had
        self.made: list[tuple[str, int, Response]] = []  # finished or suspended
        self.sampled = self.pending = self.now = 0
        self.killed_at = killed_at

    def load_weights(self, weights: Versioned) -> None:
        self.version = weights.version

    def submit(self, prompts: Sequence[Prompt], params: SamplingParams, step: int) -> None:
        self.pending += len(prompts)
        for request in self.assembler.add(prompts, params, step):
            self.asked.append((name_of(request), request.key[1], len(request.input_ids) - 1))  # type: ignore[index]
            self.running[request.key] = (request, [], [], [])

    def tick(self) -> None:
        """Every response gets a token."""
        self.now += 1
        if self.now == self.killed_at:
            raise Killed
        for key, (request, ids, logprobs, spans) in list(self.running.items()):
            label, position = self.labels.label(self.version), len(request.input_ids) - 1 + len(ids)
            if not spans or spans[-1][1] != label:
                spans.append((len(ids), label))
            ids.append(position)
            logprobs.append(-(self.weights[self.version] + position / 64))
            self.sampled += 1
            if position + 1 >= length_of(name_of(request), key[1]):
                result = self.result(key, "stop")
                self.assembler.arrived(result)
                self.done.append(result)

    def result(self, key: Any, reason: str) -> SampleResult:
        request, ids, logprobs, spans = self.running.pop(key)
        result = SampleResult(key, np.int32(ids), np.float32(logprobs), reason, tuple(spans))
        before = self.assembler._pending[key[0]].partial.get(key[1], Response())
        self.made.append((name_of(request), key[1], extended(before, result, self.labels)))
        return result

    def collect(self, timeout: float) -> list[Group]:
        while True:
            done, self.done = self.done, []
            groups = self.assembler.take(done)
            if groups:
                self.pending -= len(groups)
                return groups
            self.tick()

    def suspend(self) -> None:
        partial = [self.result(key, "abort") for key in list(self.running)]
        done, self.done = self.done, []
        self.assembler.suspend([*done, *partial])

    def abort(self) -> None:
        self.running.clear()
        self.done.clear()
        self.assembler.clear()
        self.pending = 0

    def release(self) -> None: ...

    def resume(self) -> None: ...


class Run:
    """A training run that resumes from its newest checkpoint until it is done. `trained`: what every step of the branch
    that counts has trained on."""

    def __init__(self, process_groups: Any, folder: Path, plan: Plan, seed: int, redraw: Redraw | None = None) -> None:
        self.redraw = redraw
        self.process_groups, self.folder, self.plan, self.random = process_groups, folder, plan, random.Random(seed)
        self.saved: tuple[int, str] = (0, json.dumps({"asked": 1, "left_over": []}))
        self.weights, self.made = {0: 0}, 0  # version -> identity, of the branch that counts
        self.trained: dict[int, list[Group]] = {}
        self.sampled: list[int] = []
        self.said: list[str] = []

    def start(self, killed_at: int | None = None, stop_after: int = STEPS) -> tuple[Servers, RolloutBank]:
        """One start of the program, until it is killed, asked to stop, or done."""
        done = self.saved[0]
        self.weights = {version: weights for version, weights in self.weights.items() if version <= done}
        bank = RolloutBank(
            self.folder, resumed=done, saved_step=lambda: self.saved[0], identity="1", say=self.said.append
        )
        engine = Servers(bank, self.weights, killed_at, f"start{self.made}")
        source = Versioned(done)
        collector = Collector(
            engine,  # type: ignore[arg-type]
            source,
            Verifier(),
            Blocks(PROBLEMS),
            Renderer(),
            self.process_groups,
            params=PARAMS,
            problems_per_step=3,
            seed=0,
            timeout=60.0,
            plan=replace(self.plan, last_step=STEPS),
            bank=bank,
            redraw=self.redraw,
        )
        collector.restore(json.loads(self.saved[1]))
        try:
            for step in range(done + 1, STEPS + 1):
                self.trained[step] = collector.next(step)
                for _ in range(3):  # the update, while servers may be at work on the next step
                    engine.tick()
                self.made += 1
                source.version, self.weights[step] = step, self.made
                if step == 4:
                    collector.evaluate(Problems("XY"), PARAMS, step=step)
                if step % EVERY == 0 or step == stop_after < STEPS:
                    self.saved = step, json.dumps(collector.state())
                if step == stop_after < STEPS:
                    collector.suspend()
                    break
        except Killed:
            pass
        self.sampled.append(engine.sampled)
        self.collector = collector
        bank._journal.close()
        return engine, bank


PLANS = {
    "synchronous": Plan(),
    "overlap": Plan(overlap=True),
    "oversampled": Plan(oversampling=1.6),
    "carried": Plan(oversampling=1.6, carry=True),
    "overlap_carried": Plan(overlap=True, oversampling=1.6, carry=True),
}


def test_a_killed_run_draws_the_same_problems_in_place_of_others(process_groups: Any, tmp_path: Path) -> None:
    """Dynamic sampling: steps take as many problems as they need, and a resumed run goes on where its checkpoint is."""
    kept = Redraw(lambda group, step: ord(group.problem.prompt_id) % 3 > 0, limit=9)
    for name in ("synchronous", "overlap", "overlap_carried"):
        straight, run = (Run(process_groups, tmp_path / name / str(i), PLANS[name], 1, kept) for i in range(2))
        straight.start()
        for kill in range(8):
            run.start(run.random.randint(1, 60) if kill < 7 else None)
        _check(run, replace(PLANS[name], oversampling=1.0001))
        trained = [[[g.problem.prompt_id for g in r.trained[k]] for k in sorted(r.trained)] for r in (straight, run)]
        assert all(ord(problem) % 3 > 0 for groups in trained[1] for problem in groups)
        if PLANS[name].oversampling == 1:
            assert trained[0] == trained[1]
            every = [problem for problem in PROBLEMS if ord(problem) % 3 > 0]
            assert sum(trained[0], []) == every[: 3 * STEPS], "none of an epoch is passed over"


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_again_and_again(process_groups: Any, tmp_path: Path, name: str, seed: int) -> None:
    plan, folder = PLANS[name], tmp_path / "bank"
    run = Run(process_groups, folder, plan, seed)
    known: dict[tuple[str, int], int] = {}  # tokens that there were before, by weights that the resumed run has
    left_once = set[str]()
    for kill in range(12):
        engine, bank = run.start(run.random.randint(1, 60) if kill < 11 else None)
        for (problem, sample), tokens in known.items():
            begun = [had for name, index, had in engine.asked if (name, index) == (problem, sample)]
            assert not begun or tokens <= begun[0] < length_of(problem, sample), "what there was is used"
        for problem, sample, response in engine.made:
            tokens = len(response.until(run.saved[0]).ids)
            known[problem, sample] = max(known.get((problem, sample), 0), tokens)
        left = {(step, name) for step, name, _ in json.loads(run.saved[1])["left_over"]}
        left_once |= {name for _, name in left}
        if run.random.random() < 0.3:
            for path in folder.glob("step_*.jsonl"):
                with path.open("ab") as file:
                    file.write(b"0123456789abcdef torn {")
    trained = {group.problem.prompt_id for groups in run.trained.values() for group in groups}
    assert left_once <= trained | {name for _, name, _ in run.collector.state()["left_over"]}, "no problem is lost"
    assert sorted(run.trained) == list(range(1, STEPS + 1))
    _check(run, plan)
    bank.close()
    steps = {int(path.stem[5:]) for path in folder.glob("step_*.jsonl")}
    assert steps <= {step for step, _ in left} | {run.saved[0] + 1, run.saved[0] + 2}, "the bank is bounded"


def _check(run: Run, plan: Plan) -> None:
    names = [group.problem.prompt_id for step in sorted(run.trained) for group in run.trained[step]]
    assert len(names) == len(set(names)) == 3 * STEPS, "no problem is trained on twice"
    if plan.oversampling == 1:
        assert set(names) == set(PROBLEMS[: 3 * STEPS]), "and none is skipped"
    for step, groups in run.trained.items():
        for rollout in (rollout for group in groups for rollout in group.rollouts):
            assert rollout.finish_reason is FinishReason.STOP
            length = length_of(rollout.prompt_id, rollout.sample)
            assert list(rollout.response_ids) == list(range(length)), "continued where it was"
            versions = [(0, rollout.weight_version), *rollout.version_changes]
            assert all(version < step for _, version in versions)
            for position, logprob in enumerate(rollout.logprobs):
                version = [version for start, version in versions if start <= position][-1]
                # by weights of the branch that counts
                assert logprob == -(run.weights[version] + position / 64)


def test_only_what_servers_had_of_unfinished_responses_is_sampled_again(process_groups: Any, tmp_path: Path) -> None:
    straight = Run(process_groups, tmp_path / "straight", Plan(), 0)
    straight.start()
    run = Run(process_groups, tmp_path / "bank", Plan(), 0)
    engine, _ = run.start(killed_at=5)
    lost = sum(len(ids) for _, ids, _, _ in engine.running.values())
    _, bank = run.start()
    assert sum(run.sampled) - lost == straight.sampled[0] and lost > 0
    assert bank.restored_groups > 0 and bank.restored_tokens > 0 and bank.dropped_tokens == 0
    assert len(run.said) == 1 and run.said[0].startswith("rollout bank: ")


def test_a_run_that_stops_on_request_samples_no_token_again(process_groups: Any, tmp_path: Path) -> None:
    """The next step is in flight meanwhile: its responses are suspended."""
    plan, sampled = Plan(overlap=True), []
    for name, stops in (("straight", ()), ("stopped", (2, 5))):
        run = Run(process_groups, tmp_path / name, plan, 0)
        engines = [run.start(stop_after=step) for step in (*stops, STEPS)]
        _check(run, plan)
        sampled.append(sum(run.sampled))
    assert sampled[0] == sampled[1] and all(bank.restored_tokens > 0 for _, bank in engines[1:])


def draw(bank: RolloutBank, key: Key, params: SamplingParams = PARAMS) -> dict[int, Response]:
    return bank.draw(key, (1, 2), params)


def response(*versions: tuple[int, int], tokens: int, finished: bool = True) -> Response:
    ids = np.arange(tokens, dtype=np.int32)
    return Response(ids, np.float32(ids) / -8, versions, FinishReason.STOP if finished else None)


def test_what_may_not_be_used_is_dropped_and_counted(tmp_path: Path) -> None:
    said: list[str] = []

    def opened(resumed: int) -> RolloutBank:
        return RolloutBank(tmp_path / "bank", resumed=resumed, saved_step=lambda: 4, identity="1", say=said.append)

    bank = opened(4)
    bank.begin_step(set(), None)
    for name in "abcd":
        assert draw(bank, (5, name)) == {}
    bank.keep((5, "a"), 0, response((0, 4), tokens=3))
    bank.keep((5, "a"), 1, replace(response((0, 4), (2, 5), (6, 6), tokens=9), routed_experts=np.ones((4, 2, 1), "i2")))
    bank.keep((5, "b"), 0, response((0, 2), tokens=4))
    bank.keep((5, "c"), 0, response((0, 4), tokens=5, finished=False))
    bank.keep((5, "d"), 0, response((0, 5), tokens=6))
    bank.close()

    bank = opened(4)
    bank.begin_step({(3, "e")}, oldest_allowed=3)
    assert bank.dropped_tokens == 7 + 6 and "4 groups" not in said[0] and "13 tokens of weights after step 4" in said[0]
    assert draw(bank, (5, "a")) == {0: response((0, 4), tokens=3), 1: response((0, 4), tokens=2, finished=False)}
    assert draw(bank, (5, "b")) == {}, "older than allowed"
    assert draw(bank, (5, "c"), replace(PARAMS, temperature=0.5)) == {}, "other settings"
    assert bank.dropped_tokens == 13 + 4 + 5 and (bank.restored_groups, bank.restored_tokens) == (1, 5)
    bank.close()
    bank = opened(4)
    bank.begin_step(set(), None)
    stops = replace(PARAMS, stop=("zz",))
    assert set(draw(bank, (5, "a"))) == {0, 1} and draw(bank, (5, "b")) == draw(bank, (5, "d"), stops) == {}
    bank.end_step(5, set())
    bank.close()
    assert (tmp_path / "bank" / "step_000005.jsonl").exists(), "step 5 is trained, not saved"
    bank = RolloutBank(tmp_path / "bank", resumed=5, saved_step=lambda: 5, identity="1", say=said.append)
    bank.begin_step(set(), None)
    bank.close()
    assert not (tmp_path / "bank").exists()


def test_damage_costs_lines_and_a_disk_that_refuses_costs_a_warning(tmp_path: Path) -> None:
    path, said = tmp_path / "step_000001.jsonl", list[str]()
    lines = [journal.encoded({"id": str(i), "ids": np.arange(i, dtype=np.int32)}) for i in range(1, 6)]
    damaged = lines[1].replace(b'"2"', b'"7"')
    path.write_bytes(lines[0] + damaged + b"\xff\n" + lines[2] + lines[3][:-9] + b"\n" + lines[4][:20])
    records, unusable = journal.read(path)
    assert [r["id"] for r in records] == ["1", "3"] and list(records[1]["ids"]) == [0, 1, 2] and unusable == 4

    bank = RolloutBank(tmp_path / "gone" / "bank", resumed=0, saved_step=lambda: 0, identity="1", say=said.append)
    bank.begin_step(set(), None)
    draw(bank, (1, "a"))
    bank.keep((1, "a"), 0, response((0, 0), tokens=3))
    bank.close()
    assert len(said) == 1 and "cannot be written (No such file or directory" in said[0]
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / "step_000001.jsonl").mkdir()
    bank = RolloutBank(tmp_path / "bank", resumed=0, saved_step=lambda: 0, identity="1", say=said.append)
    bank.begin_step(set(), None)
    assert "cannot be read (Is a directory" in said[1]
    bank.close()
