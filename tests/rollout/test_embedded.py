"""The embedded engine on a toy model in one process: batching, stops, noise, failures."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from asd_megatron.errors import NotFinite, UserError
from asd_megatron.records import FinishReason, Group, SamplingParams
from asd_megatron.rollout.embedded.engine import EmbeddedEngine, GroupSlice, plan_chunks
from asd_megatron.rollout.engine import RolloutEngine, RolloutError
from tests.rollout.toy import VOCAB, ToyPort, ToyTokenizer, Versioned, prompt

PROMPTS = [prompt(f"p{i}", [(7 * i + j) % (VOCAB - 1) + 1 for j in range(1 + 3 * (i % 4))]) for i in range(6)]
PARAMS = SamplingParams(n=3, max_new_tokens=12, stop_token_ids=(0, 5, 6, 7))


def _engine(process_groups: Any, port: ToyPort | None = None, *, seed: int = 1, rows: int = 256) -> EmbeddedEngine:
    return EmbeddedEngine(port or ToyPort(), process_groups, ToyTokenizer(), seed, rows)  # type: ignore[arg-type]


def _run(engine: RolloutEngine, prompts: Any = PROMPTS, params: SamplingParams = PARAMS, step: int = 1) -> list[Group]:
    engine.submit(prompts, params, step)
    assert engine.pending == len(prompts)
    found = engine.collect(60)
    assert engine.pending == 0
    return found


def _tokens(found: list[Group]) -> dict[tuple[str, int], tuple[int, ...]]:
    return {(r.prompt_id, r.sample): tuple(r.response_ids) for g in found for r in g.rollouts}


def test_groups_are_whole_and_in_submitted_order(process_groups: Any) -> None:
    engine = _engine(process_groups)
    engine.load_weights(Versioned(4))
    found = _run(engine)
    assert [g.problem for g in found] == [p.problem for p in PROMPTS]
    for group, asked in zip(found, PROMPTS, strict=True):
        assert [r.sample for r in group.rollouts] == [0, 1, 2]
        for r in group.rollouts:
            assert tuple(r.prompt_ids) == asked.ids and r.weight_version == 4
            ended = r.response_ids[-1] in PARAMS.stop_token_ids
            assert not any(t in PARAMS.stop_token_ids for t in r.response_ids[:-1])
            assert r.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
            assert ended or len(r.response_ids) == 12
            assert r.text == "".join(chr(96 + t) for t in r.response_ids if t)
    assert len({tuple(r.response_ids) for g in found for r in g.rollouts}) > 12
    assert {r.finish_reason for g in found for r in g.rollouts} == {FinishReason.STOP, FinishReason.LENGTH}


def test_logprobs_equal_the_forward_of_the_whole_sequence(process_groups: Any) -> None:
    port = ToyPort()
    for params in (PARAMS, dataclasses.replace(PARAMS, temperature=0.6, top_k=9, top_p=0.9)):
        for group in _run(_engine(process_groups, port), params=params):
            for r in group.rollouts:
                logits = port.full((*r.prompt_ids, *r.response_ids))[len(r.prompt_ids) - 1 : -1]
                expected = torch.log_softmax(logits / params.temperature, -1)
                expected = expected[torch.arange(len(r.response_ids)), r.response_ids]
                torch.testing.assert_close(torch.tensor(r.logprobs), expected, atol=1e-5, rtol=0)


def test_greedy(process_groups: Any) -> None:
    port = ToyPort()
    found = _run(_engine(process_groups, port), params=dataclasses.replace(PARAMS, temperature=0.0))
    for group in found:
        assert len({tuple(r.response_ids) for r in group.rollouts}) == 1
        r = group.rollouts[0]
        logits = port.full((*r.prompt_ids, *r.response_ids))[len(r.prompt_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == list(r.response_ids)


def test_samples_depend_on_neither_batch_nor_order(process_groups: Any) -> None:
    expected = _tokens(_run(_engine(process_groups)))
    assert _tokens(_run(_engine(process_groups))) == expected
    for rows in (1, 2, 3, 5, 6, 7):
        port = ToyPort()
        assert _tokens(_run(_engine(process_groups, port, rows=rows))) == expected
        assert max(batch for batch, _ in port.forwards) <= max(rows, 1)
    assert _tokens(_run(_engine(process_groups), list(reversed(PROMPTS)))) == expected
    assert _tokens(_run(_engine(process_groups), PROMPTS[2:3])).items() <= expected.items()
    more = _tokens(_run(_engine(process_groups), params=dataclasses.replace(PARAMS, n=5)))
    assert expected.items() <= more.items()


def test_noise_differs_by_seed_step_and_repetition(process_groups: Any) -> None:
    expected = _tokens(_run(_engine(process_groups)))
    for other in (_run(_engine(process_groups, seed=2)), _run(_engine(process_groups), step=2)):
        assert sum(v == expected[k] for k, v in _tokens(other).items()) < 9
    twice = _run(_engine(process_groups), [PROMPTS[3], PROMPTS[3]])
    first, second = ([tuple(r.response_ids) for r in group.rollouts] for group in twice)
    assert first != second


def test_long_responses_go_on_through_noise_and_cache_blocks(process_groups: Any) -> None:
    params = SamplingParams(n=2, max_new_tokens=300)
    whole = _tokens(_run(_engine(process_groups), PROMPTS[:2], params))
    assert {len(ids) for ids in whole.values()} == {300}
    cut = _tokens(_run(_engine(process_groups), PROMPTS[:2], dataclasses.replace(params, max_new_tokens=70)))
    assert {k: v[:70] for k, v in whole.items()} == cut


def test_finished_rows_leave_and_prompts_are_computed_once(process_groups: Any) -> None:
    port = ToyPort()
    engine = _engine(process_groups, port)
    found = _run(engine)
    lengths = [len(r.response_ids) for g in found for r in g.rollouts]
    assert port.forwards[0][0] == len(PROMPTS)
    assert [rows for rows, steps in port.forwards[1:]] == [sum(n > t for n in lengths) for t in range(1, max(lengths))]
    assert engine.stats.prompt_tokens == sum(len(p.ids) for p in PROMPTS)
    assert engine.stats.forwards == max(lengths) - 1
    assert engine.stats.rows == sum(lengths) - len(lengths)


def test_prefill_is_cut_by_tokens(process_groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _tokens(_run(_engine(process_groups)))
    monkeypatch.setattr("asd_megatron.rollout.embedded.engine.PREFILL_TOKENS", 11)
    port = ToyPort()
    assert _tokens(_run(_engine(process_groups, port))) == expected
    assert port.forwards[:4] == [(2, 1), (2, 4), (1, 7), (1, 10)]


def test_a_beginning_that_all_prompts_share_is_computed_once(
    process_groups: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt(f"p{i}", [*range(1, 13), *range(5, 5 + i)]) for i in range(1, 6)]
    expected = _tokens(_run(_engine(process_groups), prompts))
    monkeypatch.setattr("asd_megatron.rollout.embedded.engine.PREFIX_TOKENS", 48)
    port = ToyPort()
    assert _tokens(_run(_engine(process_groups, port), prompts)) == expected
    assert port.forwards[:2] == [(1, 12), (5, 5)]
    # Of prompts that are equal, each keeps a token of its own, whose logits are sampled from.
    alike = [prompts[0], prompts[0], prompts[0], prompts[0], prompts[0]]
    port = ToyPort()
    _run(_engine(process_groups, port), alike)
    assert port.forwards[:2] == [(1, 12), (5, 1)]


def test_stop_strings_end_the_response_with_the_string_in_it(process_groups: Any) -> None:
    free = _run(_engine(process_groups), params=SamplingParams(n=3, max_new_tokens=40))
    stop = free[0].rollouts[1].text[10:12]
    found = _run(_engine(process_groups), params=SamplingParams(n=3, max_new_tokens=40, stop=(stop, "zzzz")))
    for a, b in zip((r for g in free for r in g.rollouts), (r for g in found for r in g.rollouts), strict=True):
        full = "".join(ToyTokenizer().decode([t], False) for t in a.response_ids)
        mine = "".join(ToyTokenizer().decode([t], False) for t in b.response_ids)
        if stop in full:
            assert mine == full[: full.index(stop) + len(stop)] and b.finish_reason is FinishReason.STOP
        else:
            assert mine == full and b.finish_reason is FinishReason.LENGTH
    assert found[0].rollouts[1].text.endswith(stop)


def test_a_stop_at_the_last_position_is_a_stop(process_groups: Any) -> None:
    free = (
        _run(_engine(process_groups), PROMPTS[:1], SamplingParams(n=1, max_new_tokens=30))[0].rollouts[0].response_ids
    )
    at = next(t for t in range(3, 30) if free[t] not in free[:t])
    params = SamplingParams(n=1, max_new_tokens=at + 1, stop_token_ids=(free[at],))
    ended = _run(_engine(process_groups), PROMPTS[:1], params)[0].rollouts[0]
    assert tuple(ended.response_ids) == tuple(free[: at + 1]) and ended.finish_reason is FinishReason.STOP


def test_refusals(process_groups: Any) -> None:
    engine = _engine(process_groups)
    with pytest.raises(UserError, match=r"p9.*513 tokens.*500"):
        engine.submit([prompt("p9", [1] * 513)], PARAMS, 1)
    with pytest.raises(UserError, match="0 tokens"):
        engine.submit([prompt("p9", [])], PARAMS, 1)
    with pytest.raises(UserError, match="top_p"):
        engine.submit(PROMPTS, dataclasses.replace(PARAMS, top_p=0.0), 1)
    assert engine.pending == 0 and engine.collect(1) == []
    bare = EmbeddedEngine(ToyPort(), process_groups, None, 1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tokenizer"):
        bare.submit(PROMPTS, dataclasses.replace(PARAMS, stop=("x",)), 1)
    assert _run(bare)[0].rollouts[0].text == ""
    port = ToyPort()
    port.chunks = [port, port]
    with pytest.raises(UserError, match="virtual pipeline"):
        _engine(process_groups, port)
    with pytest.raises(UserError, match="max_batch_size"):
        _engine(process_groups, rows=0)
    engine.load_weights(Versioned(3))
    with pytest.raises(ValueError, match="never decrease"):
        engine.load_weights(Versioned(2))


def test_context_parallelism_is_refused(process_groups: Any) -> None:
    class Two:
        def size(self) -> int:
            return 2

    process_groups.cp = Two()
    with pytest.raises(UserError, match="context parallelism"):
        _engine(process_groups)


@pytest.mark.parametrize("forward", [1, 4])
def test_non_finite_logits_stop_the_run(process_groups: Any, forward: int) -> None:
    port = ToyPort()
    port.poison_at = forward
    engine = _engine(process_groups, port)
    engine.submit(PROMPTS, PARAMS, 1)
    engine.submit(PROMPTS, PARAMS, 2)
    with pytest.raises(NotFinite, match="non-finite"):
        engine.collect(60)
    assert engine.pending == 0 and not port.inside


def test_time_limit(process_groups: Any) -> None:
    engine = _engine(process_groups)
    engine.submit(PROMPTS, PARAMS, 1)
    with pytest.raises(RolloutError, match="rollout.collect_timeout"):
        engine.collect(0.0)
    assert engine.pending == 0
    assert len(_run(engine)) == len(PROMPTS)


def test_abort_and_two_submissions(process_groups: Any) -> None:
    engine = _engine(process_groups)
    engine.submit(PROMPTS[:2], PARAMS, 1)
    engine.submit(PROMPTS[2:], PARAMS, 1)
    assert engine.pending == 6
    engine.abort()
    assert engine.pending == 0 and engine.collect(1) == []
    engine.submit(PROMPTS[:2], PARAMS, 1)
    engine.submit(PROMPTS[2:], PARAMS, 1)
    first, second = engine.collect(60), engine.collect(60)
    assert _tokens(first + second) == _tokens(_run(_engine(process_groups)))


def test_plan_chunks() -> None:
    assert plan_chunks([4, 2, 7], 3, 6) == [[GroupSlice(4, 0, 3), GroupSlice(2, 0, 3)], [GroupSlice(7, 0, 3)]]
    assert plan_chunks([4, 2], 5, 2) == [[GroupSlice(i, f, c)] for i in (4, 2) for f, c in ((0, 2), (2, 2), (4, 1))]
    assert plan_chunks([], 5, 2) == []
