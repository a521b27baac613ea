"""The full tensors of a sharded model, on one rank (`stream`) or on the first rank of each pipeline stage (`steps`).

Parameters travel in buckets: gathered on tensor-parallel rank 0 of their pipeline stage, and for `stream` sent from
there to the first stage; there they are unsharded. The next bucket is in flight while the current one is consumed:

    tp 0, tp 1 of stage 1  --gather-->  tp 0 of stage 1  --send-->  tp 0 of stage 0: unshard, yield (name, tensor)

Experts are not sharded: the rank that holds one sends it to the first rank of its stage, over the group of the experts'
parts. (gloo confuses messages between two ranks with a collective of the same group that passes them, so none are on
`world`, on which the ranks meet meanwhile.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, groupby, zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.distributed import activity
from asd_megatron.distributed.layout import ProcessGroups
from asd_megatron.distributed.objects import broadcast_object, gather_objects, meet
from asd_megatron.models import te
from asd_megatron.models.parameters import Key
from asd_megatron.models.weights import Rule, Shapes

BUCKET_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Part:
    """One parameter of the model.

    Attributes:
        stage: the first pipeline stage that has it.
        owner: of an expert's parameter, the global rank that sends it; None: it is sharded over `tp`.
        shard: this rank's shard, if any.
    """

    rule: Rule
    key: Key
    stage: int
    owner: int | None
    shard: Tensor | None


@dataclass(frozen=True)
class Block:
    """Full tensors of one shape and dtype: the elements of `sources`, one source after another, are those of the
    tensors `names`, one after another. An expert's gate and up projection are one source:

        names    experts.0.gate_proj, experts.0.up_proj, experts.1.gate_proj, ...    each `shape`
        sources  [gate and up rows of expert 0], [those of expert 1], ...
    """

    names: tuple[str, ...]
    shape: torch.Size
    sources: tuple[Tensor, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Block:
        """A tensor by itself."""
        return cls((name,), tensor.shape, (tensor,))

    @property
    def dtype(self) -> torch.dtype:
        return self.sources[0].dtype

    @property
    def nbytes(self) -> int:
        return len(self.names) * self.shape.numel() * self.dtype.itemsize

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor by itself: views of contiguous sources."""
        each = len(self.names) // len(self.sources)
        parts = (part for source in self.sources for part in source.reshape(each, *self.shape).unbind())
        return zip(self.names, parts, strict=True)


@dataclass(frozen=True)
class Step:
    """A bucket of full tensors. `blocks` is empty on every rank but `sender`, the global rank that has them; they are
    valid until the next step, and may be live parameters."""

    sender: int
    blocks: tuple[Block, ...]


@dataclass
class _Bucket:
    """Consecutive parameters from one place, a stage or an owner, for the global rank `root`; `numel` counts the
    elements of one rank's shards."""

    stage: int
    owner: int | None
    root: int
    parts: list[Part]
    numel: int


@dataclass
class _Transfer:
    """A bucket in flight. `gathered` [tp, numel], on the ranks that it passes, is complete after `work`; None on its
    root where the parameters are its own, not sharded, and are read in place."""

    bucket: _Bucket
    gathered: Tensor | None
    work: dist.Work | None

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        self.work = None  # frees the copy of this rank's shards


def first_stages(keys: Iterable[Key], stage: int, host: dist.ProcessGroup) -> dict[Key, int]:
    """The first pipeline stage that holds each parameter, from the `keys` of every rank and its stage. Collective over
    `host`, all ranks."""
    first: dict[Key, int] = {}
    for held_by, held in gather_objects((stage, list(keys)), 0, host) or []:
        for key in held:
            first[key] = min(held_by, first.get(key, held_by))
    return broadcast_object(first, 0, host)


@dataclass(frozen=True)
class FullTensors:
    """Gathers one replica's parameters. `dtype` and `device` are those of every `Part.shard`. `replica`: whether this
    rank takes part in what is sharded over `tp`; the owners of experts need not."""

    process_groups: ProcessGroups
    shapes: Shapes
    dtype: torch.dtype
    device: torch.device
    replica: bool

    def stream(self, parts: Sequence[Part], bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
        """Each part's full tensors by Hugging Face name, in the order of `parts`, on global rank 0; nothing on the
        others, which take part until the iterator is exhausted.

        Every tensor owns its memory. At most two buckets are alive at a time, beside the tensor being consumed; a
        parameter above `bucket_bytes` is a bucket of its own.
        """
        transfers = self._transfers(parts, bucket_bytes)
        if self.process_groups.world.rank() != 0:
            for given in transfers:
                self._complete(given)
            return
        transfer = next(transfers, None)
        following = None
        try:
            while transfer is not None:
                following = next(transfers, None)
                activity.mark()
                transfer.wait()
                yield from self._copies(transfer)
                transfer = following
        except GeneratorExit:  # the consumer stops early; the other ranks send all the same
            while following is not None:
                following.wait()
                following = next(transfers, None)
            raise

    def steps(self, parts: Sequence[Part], bucket_bytes: int, senders: Sequence[int]) -> Iterator[Step]:
        """Every parameter's full tensors on global rank `senders[stage]`, the first of its stage. The same steps on all
        ranks, the stages' in turn. Collective: every rank exhausts the iterator.

        A step's tensors have `bucket_bytes` at most, unless one parameter has more. The gathers of this rank's next
        step are in flight while the current one is consumed. Where nothing has to be gathered, nothing is copied.
        """
        per_root: list[list[list[_Bucket]]] = [[] for _ in senders]
        for bucket in self._buckets(parts, bucket_bytes, senders):
            steps = per_root[senders.index(bucket.root)]
            if steps and sum(map(self._nbytes, [*steps[-1], bucket])) <= bucket_bytes:
                steps[-1].append(bucket)
            else:
                steps.append([bucket])
        ordered = [step for turn in zip_longest(*per_root) for step in turn if step is not None]
        mine = iter([step for step in ordered if any(map(self._takes_part, step))])

        def start() -> list[_Transfer]:
            return [self._start(bucket) for bucket in next(mine, ()) if self._takes_part(bucket)]

        transfers = start()
        for step in ordered:
            if not any(map(self._takes_part, step)):
                yield Step(step[0].root, ())
                continue
            following = start()
            activity.mark()
            for transfer in transfers:
                self._complete(transfer)
            is_root = step[0].root == self.process_groups.world.rank()
            yield Step(step[0].root, tuple(chain(*map(self._blocks, transfers))) if is_root else ())
            transfers = following

    def _takes_part(self, bucket: _Bucket) -> bool:
        return self.process_groups.world.rank() == bucket.root or self._gives(bucket) or self._is_first(bucket.stage)

    def _is_first(self, stage: int) -> bool:
        """Whether this rank is the first of the stage: all that is gathered of the stage comes here."""
        return self.replica and self.process_groups.tp.rank() == 0 and self.process_groups.pp.rank() == stage

    def _nbytes(self, bucket: _Bucket) -> int:
        return bucket.numel * self._ranks(bucket.owner) * self.dtype.itemsize

    def _transfers(self, parts: Sequence[Part], bucket_bytes: int) -> Iterator[_Transfer]:
        """This rank's transfers of `stream`, started as they are asked for. All ranks meet on the host group before
        each bucket: global rank 0 may write what it has to a slow disk first, and nobody waits for that in a collective
        of GPUs."""
        for bucket in self._buckets(parts, bucket_bytes, [0] * self.process_groups.pp.size()):
            meet(self.process_groups.host)
            if self._takes_part(bucket):
                yield self._start(bucket)

    def _gives(self, bucket: _Bucket) -> bool:
        """Whether this rank's shards are in the bucket."""
        if bucket.owner is not None:
            return bucket.owner == self.process_groups.world.rank()
        return self.replica and bucket.stage == self.process_groups.pp.rank()

    def _ranks(self, owner: int | None) -> int:
        """Over how many ranks a parameter is sharded."""
        return self.process_groups.tp.size() if owner is None else 1

    def _buckets(self, parts: Sequence[Part], bucket_bytes: int, roots: Sequence[int]) -> list[_Bucket]:
        """The same on every rank. Bytes are those of the shards of all tensor-parallel ranks. `roots`: by stage."""
        buckets: list[_Bucket] = []
        for part in parts:
            ranks = self._ranks(part.owner)
            numel = _shard_shape(part.rule, self.shapes, ranks).numel()
            latest = buckets[-1] if buckets else None
            if (
                latest is None
                or (latest.stage, latest.owner) != (part.stage, part.owner)
                or (latest.numel + numel) * ranks * self.dtype.itemsize > bucket_bytes
            ):
                latest = _Bucket(part.stage, part.owner, roots[part.stage], [], 0)
                buckets.append(latest)
            latest.parts.append(part)
            latest.numel += numel
        return buckets

    def _start(self, bucket: _Bucket) -> _Transfer:
        """Start the transfer that brings the bucket to this rank, or takes this rank's shards from it."""
        tp, pp, ep = self.process_groups.tp, self.process_groups.pp, self.process_groups.ep
        rank, gives = self.process_groups.world.rank(), self._gives(bucket)
        if gives and self._ranks(bucket.owner) == 1 and rank == bucket.root:
            return _Transfer(bucket, None, None)
        if not gives:
            gathered = self._empty(self._ranks(bucket.owner), bucket.numel)
            if bucket.owner is not None and self._is_first(bucket.stage):
                return _Transfer(bucket, gathered, dist.irecv(gathered, src=bucket.owner, group=ep))
            return _Transfer(bucket, gathered, dist.irecv(gathered, group=pp, group_src=bucket.stage))
        mine = self._empty(1, bucket.numel)
        for part, shard in self._shards(bucket, mine):
            assert part.shard is not None, part.rule
            shard[0].copy_(te.values(part.shard.detach()))
        if self._ranks(bucket.owner) == 1:
            sent = None if self._is_first(bucket.stage) else dist.isend(mine, group=ep, group_dst=0)
            return _Transfer(bucket, mine, sent)
        if tp.rank() != 0:
            return _Transfer(bucket, None, dist.gather(mine[0], group=tp, group_dst=0, async_op=True))
        gathered = self._empty(tp.size(), bucket.numel)
        return _Transfer(bucket, gathered, dist.gather(mine[0], list(gathered), group=tp, group_dst=0, async_op=True))

    def _complete(self, transfer: _Transfer) -> None:
        """Wait for a transfer; the first rank of a stage sends on to its root what only passes."""
        transfer.wait()
        bucket, gathered = transfer.bucket, transfer.gathered
        if gathered is not None and self._is_first(bucket.stage) and self.process_groups.world.rank() != bucket.root:
            dist.send(gathered, group=self.process_groups.pp, group_dst=0)

    def _copies(self, transfer: _Transfer) -> Iterator[tuple[str, Tensor]]:
        for part, shards in self._received(transfer):
            storage = shards[0].untyped_storage().data_ptr()
            full = part.rule.operation.unshard(shards, self.shapes)
            for name, tensor in zip(part.rule.names(part.key.layer, part.key.expert), full, strict=True):
                # A tensor that the consumer keeps must neither keep the bucket's memory nor be the live parameter.
                alias = tensor.untyped_storage().data_ptr() == storage
                yield name, tensor.clone(memory_format=torch.contiguous_format) if alias else tensor.contiguous()

    def _blocks(self, transfer: _Transfer) -> Iterator[Block]:
        """The bucket's full tensors, views where nothing has to be joined. Consecutive experts of a rule are one block:
        an expert's tensors have one shape and lie one after another in its parameter."""
        for (rule, layer, stacked), run in groupby(self._received(transfer), _stack_of):
            received = list(run)
            if stacked:
                names = [name for part, _ in received for name in rule.names(layer, part.key.expert)]
                shape = torch.Size(rule.operation.shapes(self.shapes)[0])
                yield Block(tuple(names), shape, tuple(shards[0] for _, shards in received))
                continue
            for _, shards in received:
                full = rule.operation.unshard(shards, self.shapes)
                for name, tensor in zip(rule.names(layer), full, strict=True):
                    yield Block.of(name, tensor)

    def _received(self, transfer: _Transfer) -> Iterator[tuple[Part, list[Tensor]]]:
        """Each part's shards: views of what was gathered, or the live parameter."""
        if transfer.gathered is not None:
            yield from self._shards(transfer.bucket, transfer.gathered)
            return
        for part in transfer.bucket.parts:
            assert part.shard is not None, part.rule
            yield part, [te.values(part.shard.detach())]

    def _shards(self, bucket: _Bucket, flat: Tensor) -> Iterator[tuple[Part, list[Tensor]]]:
        """Each part's shards as views of `flat` [n, numel], one row for each of n ranks."""
        start = 0
        for part in bucket.parts:
            shape = _shard_shape(part.rule, self.shapes, self._ranks(bucket.owner))
            end = start + shape.numel()
            yield part, [row[start:end].view(shape) for row in flat]
            start = end

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def _stack_of(received: tuple[Part, list[Tensor]]) -> tuple[Rule, int | None, bool]:
    """Parts of equal rule and layer are the experts of one stack."""
    part, _ = received
    return part.rule, part.key.layer, part.key.expert is not None


@cache
def _shard_shape(rule: Rule, shapes: Shapes, size: int) -> torch.Size:
    """The shape of one of `size` ranks' shards, which all have the same."""
    full = [torch.empty(shape, device="meta") for shape in rule.operation.shapes(shapes)]
    return rule.operation.shard(full, 0, size, shapes).shape
