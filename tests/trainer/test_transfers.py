"""The shapes that a pipeline stage expects are those that its neighbours send, by Megatron's own table."""

from __future__ import annotations

import pytest

from asd_megatron.distributed import device
from asd_megatron.trainer.transfers import KnownShapes


def shape(pack: int) -> list[int]:
    return [100 + pack, 1, 8]


@pytest.mark.parametrize(("stages", "chunks", "packs"), [(2, 1, 5), (4, 1, 3), (2, 2, 6), (4, 3, 8), (3, 2, 3)])
def test_stages_receive_what_their_neighbours_send(stages: int, chunks: int, packs: int) -> None:
    device.prepare()
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = get_schedule_table(packs, chunks, stages)  # (pack, chunk) in the order in which every stage works
    shapes = [shape(pack) for pack in range(packs)]
    for stage in range(stages):
        before, after = (stage - 1) % stages, (stage + 1) % stages
        sent = [pack for pack, chunk in table if (before, chunk) != (stages - 1, chunks - 1)]
        returned = [pack for pack, chunk in table if (after, chunks - 1 - chunk) != (0, 0)]
        known = KnownShapes.of(shapes, stage=stage, stages=stages, chunks=chunks, backward=True)
        assert [known(None, None, True, False)[0] for _ in sent] == [shape(pack) for pack in sent]
        assert [known(None, None, False, True)[1] for _ in returned] == [shape(pack) for pack in returned]
        known.finish()
        with pytest.raises(IndexError):
            known(None, None, True, False)


def test_a_schedule_that_receives_less_is_noticed() -> None:
    known = KnownShapes.of([shape(0)], stage=0, stages=2, chunks=1, backward=True)
    with pytest.raises(RuntimeError, match=r"0 activations and 1 gradients .* not supported"):
        known.finish()
    KnownShapes.of([shape(0)], stage=0, stages=2, chunks=1, backward=False).finish()
    with pytest.raises(ValueError, match="3 packs make no complete rounds of 2"):
        KnownShapes.of([shape(0)] * 3, stage=0, stages=2, chunks=2, backward=True)
