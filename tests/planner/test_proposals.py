"""The search: what it proposes fits and can be sharded, and nothing faster is left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from asd_megatron.errors import UserError
from asd_megatron.models.gpt import Recompute
from asd_megatron.models.parameters import check_layout
from asd_megatron.planner import proposals
from asd_megatron.planner.layouts import between, layouts, server_sizes, splits
from asd_megatron.planner.memory import fits, kv_tokens
from asd_megatron.planner.proposals import Search, propose
from asd_megatron.planner.setting import Serving, Setting
from asd_megatron.planner.step_time import step_time
from tests.planner.settings import WORK, setting, shape


@pytest.mark.parametrize(("model", "gpus"), [("Qwen3-8B", 8), ("Qwen3-30B-A3B", 16), ("Olmo-3-7B-Instruct", 24)])
def test_proposals_fit_and_use_all_gpus(model: str, gpus: int) -> None:
    found = propose(setting(model), gpus)
    assert len(found) == 5
    assert [p.time.total for p in found] == sorted(p.time.total for p in found)
    for proposal in found:
        s = proposal.setting
        check_layout(s.shape, s.training.layout)
        assert fits(s) and kv_tokens(s) > WORK.responses.most
        assert s.gpus == gpus
        assert s.training.layout.data <= WORK.rollouts
        assert not (s.serving.colocated and s.serving.transport == "distributed")
        assert proposal.time.total == pytest.approx(step_time(s).total)
        assert proposal.reasons


def test_nothing_faster_is_left_out() -> None:
    """All layouts, recomputations, packs and servers on 4 GPUs, one by one."""
    template = setting("Qwen3-4B-Instruct-2507", work=replace(WORK, problems=8))
    best = propose(template, 4, top=1)[0]
    least = min(step_time(s).total for s in _everything(template, 4))
    assert best.time.total == pytest.approx(least)


def _everything(template: Setting, gpus: int) -> Iterator[Setting]:
    """Every setting of `gpus` GPUs that fits with the template's optimizer."""
    search = Search(template, gpus)
    for ranks in (*splits(template.gpu, gpus), gpus):
        for serving in search._servings(ranks):
            for layout in layouts(template.shape, template.gpu, ranks, template.workload.rollouts):
                for kind, pack in itertools.product(proposals.RECOMPUTE, proposals.PACKS):
                    training = replace(template.training, layout=layout, recompute=Recompute(kind), pack=pack)
                    found = replace(template, training=training, serving=serving)
                    if fits(found):
                        yield found


@pytest.mark.parametrize(("model", "gpus"), [("Qwen3-8B", 1024), ("Qwen3-30B-A3B", 32)])
def test_the_search_is_bounded(model: str, gpus: int) -> None:
    search = Search(setting(model), gpus)
    search.run(1)
    assert search.timed < 5000 and search.checked < 5000


def test_overlap_is_kept_and_rules_colocated_servers_out() -> None:
    found = propose(setting(serving=Serving(overlap=True)), 16)
    assert all(p.setting.serving.overlap and not p.setting.serving.colocated for p in found)


def test_what_changes_numbers_is_chosen_only_where_nothing_else_fits() -> None:
    roomy = propose(setting("Qwen3-4B-Instruct-2507", gpu="b200"), 8)[0]
    assert (roomy.setting.training.moments, roomy.setting.training.offload) == ("float32", "none")
    tight = propose(setting("Qwen3-30B-A3B"), 4)[0]
    assert (tight.setting.training.moments, tight.setting.training.offload) != ("float32", "none")
    assert any("optimizer" in reason for reason in tight.reasons)


def test_a_model_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match="1 x a100-40gb.*more GPUs"):
        propose(setting("Qwen3-30B-A3B", gpu="a100-40gb"), 1)


def test_layouts_of_sixteen_gpus() -> None:
    gpu = setting().gpu
    found = list(layouts(shape("Qwen3-30B-A3B"), gpu, 16, rollouts=256))
    assert len(found) == len(set(found))
    assert all(layout.world_size == 16 and layout.tensor in (1, 2, 4) for layout in found)
    assert {layout.expert for layout in found if layout.pipeline == 1} == {4, 8}  # 1 and 2 hold too many weights
    assert all(layout.data <= 4 for layout in layouts(shape("Qwen3-8B"), gpu, 64, rollouts=4))


def test_splits_are_complete_nodes_beyond_one() -> None:
    gpu = setting().gpu
    assert splits(gpu, 4) == [1, 2, 3]
    assert splits(gpu, 24) == [8, 16]
    assert splits(gpu, 12) == [4, 8]
    many = splits(gpu, 1024)
    assert len(many) == 6 and all(n % 8 == 0 and 0 < n < 1024 for n in many)
    assert between(gpu, 1024, [8, 64, 128], 64) == [32, 96]
    assert between(gpu, 24, [8, 16], 16) == []
    assert [(s.servers, s.tensor_parallel) for s in server_sizes(shape("Qwen3-8B"), gpu, Serving(), 12)] == [
        (12, 1), (6, 2), (3, 4),
    ]  # fmt: skip
