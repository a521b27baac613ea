"""The pure parts of tools/benchmark_step.py."""

import statistics
import sys
from pathlib import Path

import pytest
import torch

from asd_megatron.records import Problem, Prompt
from asd_megatron.trainer.batch import PackLayout, TokenSequence, build_pack

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import benchmark_step
from machine_load import others
from step.conditions import _padding
from step.figures import Figure, forwards, paired_ratio, phase_table, phases, summary, table
from step.sampling import _left_padded, _until_end


def test_passes_in_units_of_a_student_forward() -> None:
    assert forwards(scored=0, trained=250, batch=250) == 3  # GRPO: forward and backward of the batch
    assert forwards(scored=250, trained=250, batch=250) == 4  # a teacher whose sequences are as long
    assert forwards(scored=500, trained=250, batch=250) == 5


def test_a_slow_moment_cancels_in_a_paired_ratio() -> None:
    grpo, antisd = [1.0, 1.0, 8.0], [1.2, 1.2, 9.6]
    assert paired_ratio(antisd, grpo) == pytest.approx(1.2)
    with pytest.raises(ValueError):
        paired_ratio(antisd, grpo[:2])


def test_what_phases_leave_is_other() -> None:
    rows = [{"time/rollout": 1.0, "time/update": 2.0, "time/total": 9.0, "reward/mean": 0.5}, {"time/update": 2.0}]
    found = phases(rows, seconds=[3.5, 2.5])
    assert found == {"rollout": 0.5, "update": 2.0, "other": 0.5}
    shown = phase_table({"a": {"update": 2.0, "student": 1e-6}, "b": {"update": 1.0}})
    assert "| update | 2,000.0 | 1,000.0 |" in shown and "student" not in shown


def test_targets_are_judged_in_their_direction() -> None:
    figures = [
        Figure("a.antisd_over_grpo", 1.3, target=1.25, bound="most"),
        Figure("a.over_generate", 1.6, target=1.5, bound="least"),
        Figure("a.share", 0.0123, "%"),
    ]
    assert [figure.met for figure in figures] == [False, True, None]
    lines = table(figures).splitlines()
    assert lines[2].endswith("| at most 1.25 | no |") and lines[3].endswith("| at least 1.5 | yes |")
    assert "1.23%" in lines[4]


def test_summary_tells_median_and_spread() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    found = summary(values)
    low, middle, high = statistics.quantiles(values, n=4)
    assert (found["median"], found["least"], found["most"]) == (middle, 1.0, 100.0)
    assert found["spread"] == pytest.approx((high - low) / 3.0)
    assert summary([2.0])["spread"] == 0.0


def test_padding_of_packs_and_inside_attention() -> None:
    sequences = [TokenSequence((1, 2, 3, 4), 1, 0), TokenSequence((1, 2), 1, 3), TokenSequence((1, 2, 3, 4), 1, 4)]
    found = _padding([build_pack(sequences, PackLayout(context=2))])  # lengths become multiples of 4
    assert (found["tokens"], found["real"], found["sequences"]) == (12, 10, 10)
    assert found["padding_share"] == pytest.approx(1 - 10 / 12)
    prompt = tuple(range(48))  # prefixes are shared in whole blocks
    group = [TokenSequence((*prompt, 50, 51), 48, 0), TokenSequence((*prompt, 52), 48, 2)]
    shared = _padding([build_pack(group, PackLayout(share_prefixes=True))])
    assert shared["padding_share"] == 0
    assert (shared["tokens"], shared["sequences"]) == (48 + 2 + 1, 50 + 49)
    assert 0 <= shared["attention_padding_share"] < 1


def test_tokens_after_the_end_do_not_count() -> None:
    responses = torch.tensor([[5, 9, 9], [5, 5, 5], [9, 5, 5]])
    assert _until_end(responses, ends=[9]) == 2 + 3 + 1
    assert _until_end(responses, ends=[]) == 9


def test_prompts_are_padded_on_the_left() -> None:
    problem = Problem("p", "1", prompt="?")
    ids, mask = _left_padded([Prompt(problem, (3, 4)), Prompt(problem, (5,))], samples=2, pad=0)
    assert ids.tolist() == [[3, 4], [3, 4], [0, 5], [0, 5]]
    assert mask.tolist() == [[1, 1], [1, 1], [0, 1], [0, 1]]


def test_own_work_is_not_others() -> None:
    with others() as share:
        sum(range(100_000))
    assert len(share) == 1 and 0 <= share[0] <= 1


@pytest.mark.parametrize("argument", ["--only nothing", "--models nothing"])
def test_unknown_names_are_refused(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark_step.main(argument.split()) == 2
    assert "choose of" in capsys.readouterr().err
