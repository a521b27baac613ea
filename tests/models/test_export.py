"""Export of a model that is cut over ranks: once, whole, on one rank, a bucket ahead, in bounded memory."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asd_megatron.distributed.layout import Layout
from asd_megatron.distributed.objects import gather_objects
from tests.distributed.harness import run_ranks
from tests.models.tiny import tiny_llama, tiny_qwen3, tiny_qwen3_moe

BUCKET = 16_000
SOME = 45_000  # bytes, a layer's parameters and a few more
LARGEST = 96 * 32 * 4  # bytes of the largest parameter: the fused projections of one layer
SIZES = (1, BUCKET, 2**20)
"""Every parameter a bucket of its own, several in each, one bucket for each run of a stage's parameters."""
TWO = [
    Layout(tensor=2, sequence_parallel=True),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(data=2),  # either replica is as one process alone
    Layout(context=2),
]
FOUR = [
    Layout(tensor=2, pipeline=2),
    Layout(tensor=2, pipeline=2, virtual_pipeline=2),
    Layout(tensor=2, data=2),
    Layout(pipeline=2, context=2),
    Layout(pipeline=4),
]
EXPERTS = [
    Layout(data=2, pipeline=2, expert=2),  # owners of experts that are in no replica's first ranks
    Layout(tensor=2, pipeline=2, sequence_parallel=True, expert=2),
    Layout(tensor=2, data=2, sequence_parallel=True, expert=1),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_qwen3(root / "tied", tie_word_embeddings=True)
    tiny_llama(root / "untied")
    tiny_qwen3_moe(root / "experts", tie_word_embeddings=True)
    return root


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type != "meta":
                storage = x.untyped_storage()
                if storage._cdata not in self.sizes and storage._cdata not in given:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    @property
    def now(self) -> int:
        return sum(list(self.sizes.values()))


def _port(folder: Path, layout: Layout, dtype: torch.dtype = torch.float32) -> Any:
    from asd_megatron.checkpoint.huggingface import FolderReader, read_config
    from asd_megatron.distributed.layout import init
    from asd_megatron.models.port import ModelPort

    port = ModelPort.build(read_config(folder), init(layout), layout, dtype=dtype, layers="local")
    with FolderReader(folder) as reader:
        port.load(reader)
    return port


def _exports(rank: int, root: str, layouts: list[Layout]) -> None:
    for layout in layouts:
        for name in ("tied", "untied"):
            folder = Path(root) / name
            port = _port(folder, layout)
            for bytes_ in SIZES:
                _once_and_whole(port, folder, bytes_)
            _in_bounded_memory(port)
            _an_early_end(port, folder)
        _once_and_whole(_port(folder, layout, torch.bfloat16), folder, BUCKET)


def _once_and_whole(port: Any, folder: Path, bucket_bytes: int) -> None:
    from asd_megatron.checkpoint.huggingface import FolderReader

    if bucket_bytes == BUCKET:
        _steps_of_every_stage(port, bucket_bytes)
    found = list(port.export(bucket_bytes=bucket_bytes))
    if dist.get_rank() != 0:
        assert found == []
        return
    assert [name for name, _ in found] == list(port.expected())  # each once
    with FolderReader(folder) as reader:
        want = {name: reader[name][:].to(port.dtype) for name in port.expected()}
        for name, tensor in found:
            assert tensor.is_contiguous() and not tensor.requires_grad
            assert tensor.dtype == port.dtype and torch.equal(tensor, want[name]), name
    before = [p.detach().clone() for chunk in port.chunks for p in chunk.parameters()]
    for _, tensor in found:
        tensor.zero_()
    after = [p for chunk in port.chunks for p in chunk.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _steps_of_every_stage(port: Any, bucket_bytes: int) -> None:
    """The tensors of `export`, each on the first rank of its stage; the same steps everywhere."""
    mine, senders = {}, []
    for step in port.export_steps(bucket_bytes=bucket_bytes):
        senders.append(step.sender)
        assert bool(step.blocks) == (step.sender == dist.get_rank())
        size = 0
        for block in step.blocks:
            assert block.dtype == port.dtype
            for name, tensor in block.tensors():
                assert name not in mine and tensor.shape == block.shape
                mine[name] = tensor.clone().view(torch.uint8).numpy().tobytes()
            size += block.nbytes
        assert size <= max(bucket_bytes, 2 * LARGEST)  # one parameter may be larger
    stages = range(port.layout.pipeline)
    assert set(senders) == {stage * port.layout.stage_size for stage in stages}
    assert senders[: len(stages)] == sorted(set(senders)), "in turn"
    everybody = gather_objects((mine, senders), 0, port.process_groups.host)
    found = {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in port.export()}
    if everybody is not None:
        assert all(order == senders for _, order in everybody)
        assert sum(len(tensors) for tensors, _ in everybody) == len(found)
        assert {name: value for tensors, _ in everybody for name, value in tensors.items()} == found


def _in_bounded_memory(port: Any) -> None:
    """Two buckets, one parameter being made whole, and under tensor parallelism the shards that are in flight."""
    gathers = port.layout.tensor > 1
    bound = 2 * SOME + 2 * LARGEST + (SOME // port.layout.tensor if gathers else 0)
    with LiveBytes() as live:
        for _ in port.export(bucket_bytes=SOME):
            if gathers:  # gloo's threads let go of what they gathered a little later than they say so
                _wait(lambda: live.now <= bound, live.sizes)
    assert gathers or live.peak <= bound, live.peak
    if dist.get_rank() != 0:
        list(port.export(bucket_bytes=SOME))
        return
    if port.layout.tensor * port.layout.pipeline > 1:
        assert live.peak > SOME
    else:  # nothing is gathered: each parameter is copied once
        assert live.peak <= 2 * LARGEST
    with LiveBytes() as kept:  # what the reader keeps is all that stays: no bucket behind a small tensor
        found = list(port.export(bucket_bytes=SOME))
        del _
    whole = sum(t.nbytes for _, t in found)
    _wait(lambda: kept.now < 1.02 * whole, kept.sizes)  # the vocabulary has padding
    assert kept.now >= whole


def _wait(condition: Callable[[], bool], what: object) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def _an_early_end(port: Any, folder: Path) -> None:
    """The others get through, and the next export is whole."""
    stream = port.export(bucket_bytes=BUCKET)
    if dist.get_rank() == 0:
        for _ in range(3):
            next(stream)
        stream.close()
    else:
        assert list(stream) == []
    _once_and_whole(port, folder, BUCKET)


class _Watched:
    """Patches what an export does with its buckets, and puts it back."""

    def __init__(self, **replacements: Any) -> None:
        self.replacements = replacements

    def __enter__(self) -> None:
        from asd_megatron.models.export import FullTensors

        self.saved = {name: getattr(FullTensors, name) for name in self.replacements}
        for name, made in self.replacements.items():
            setattr(FullTensors, name, made(self.saved[name]))

    def __exit__(self, *_: object) -> None:
        from asd_megatron.models.export import FullTensors

        for name, function in self.saved.items():
            setattr(FullTensors, name, function)


def _one_bucket_ahead(port: Any) -> None:
    """A bucket's transfer has begun before the one before it is handed out, and no later one's has."""
    events: list[str] = []

    def start(original: Any) -> Any:
        def starting(self: Any, bucket: Any) -> Any:
            events.append("start")
            return original(self, bucket)

        return starting

    def hand_out(original: Any) -> Any:
        def handing_out(self: Any, flight: Any) -> Iterator[Any]:
            events.append("hand out")
            yield from original(self, flight)

        return handing_out

    with _Watched(_start=start, _copies=hand_out):
        for _ in port.export(bucket_bytes=BUCKET):
            pass
    if dist.get_rank() == 0:
        buckets = events.count("hand out")
        assert buckets > 3
        assert events == ["start", *["start", "hand out"] * (buckets - 1), "hand out"]


def _a_rank_fails(rank: int, port: Any) -> None:
    """Rank 1 raises at its third bucket; rank 0 raises too, after the group's timeout at the latest."""
    short = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    assert short is not None
    which = "tp" if port.layout.tensor > 1 else "pp"
    port.parameters.process_groups = dataclasses.replace(port.process_groups, **{which: short, "host": short})
    list(port.export())  # the group's connections are made
    started = 0

    def failing(original: Any) -> Any:
        def start(self: Any, bucket: Any) -> Any:
            nonlocal started
            started += 1
            if rank == 1 and started == 3:
                raise MemoryError("no room for the third bucket")
            return original(self, bucket)

        return start

    begin = time.monotonic()
    with _Watched(_start=failing), pytest.raises(MemoryError if rank == 1 else RuntimeError):
        list(port.export(bucket_bytes=BUCKET))
    assert time.monotonic() - begin < 20
    dist.barrier()


def _two(rank: int, root: str) -> None:
    _exports(rank, root, TWO)
    for layout in (Layout(tensor=2), Layout(pipeline=2)):
        _one_bucket_ahead(_port(Path(root) / "tied", layout))
    for layout in (Layout(tensor=2), Layout(pipeline=2)):
        _a_rank_fails(rank, _port(Path(root) / "tied", layout))


def test_two_ranks(folders: Path) -> None:
    run_ranks(_two, 2, str(folders), timeout=240)


def _four(rank: int, root: str) -> None:
    _exports(rank, root, FOUR)
    folder = Path(root) / "experts"
    for layout in EXPERTS:
        port = _port(folder, layout)
        for bytes_ in SIZES:
            _once_and_whole(port, folder, bytes_)
        _an_early_end(port, folder)


def test_four_ranks(folders: Path) -> None:
    run_ranks(_four, 4, str(folders), timeout=240)
