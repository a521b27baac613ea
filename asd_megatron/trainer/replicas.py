"""Compares the copies of training state that different ranks hold: a flipped bit in one of them is found and named.

Data- and context-parallel ranks hold the same weights and, without the distributed optimizer, the same master weights
and moments; tensor-parallel ranks the same norms and routers; the first and the last pipeline stage the same tied
embedding; the ranks of an expert-data-parallel group the same experts. All of these receive the same updates, so they
are equal bit for bit, and every rank's checksum of a tensor must be the others'.

Not covered, for want of a second copy: tensors that one rank alone holds, the distributed optimizer's shards (master
weights and moments), gradients, copies in host memory. On GPUs without sequence parallelism, tensor-parallel ranks are
not compared: atomic additions may round the same gradient differently on each of them.

A checksum is a sum over the tensor's 64-bit words, modulo 2^64 and therefore exact in any order of addition: each word,
its upper half added to it, times an odd number that depends on its place. One flipped bit changes it always, two in the
same chunk of words as well (`checksum`); other changes, such as an exchange of two words, all but certainly.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from asd_megatron.distributed.objects import broadcast_object, gather_objects, on_rank_zero
from asd_megatron.errors import plural
from asd_megatron.models.port import ModelPort
from asd_megatron.trainer.optimizer import Optimizer

CHUNK_WORDS = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Words that are multiplied at a time: what fits into a CPU's cache, 32 MiB three times over on a GPU."""
_NEXT = 0x5851F42D4C957F2D  # odd: what the sum so far is multiplied by before the next chunk is added


def checksum(tensor: Tensor) -> Tensor:
    """The checksum of a tensor's bits: int64, one element, on its device. Equal bits have the same one on every device
    of the kind, wherever they lie in memory.

    Word j of a chunk adds (word + upper half) * (2 j + 1). A flip of bit b < 32 changes that by 2^b (2 j + 1), up to
    the sign; one of bit b + 32 by 2^b (2^32 + 1) (2 j + 1). Neither is 0 modulo 2^64. Two of them, of words j and k,
    cancel only with the same b, and then +-(2 j + 1) = +-(2 k + 1) modulo 2^32, which in a chunk of at most 2^22 words
    means j = k: two bits of one word, 32 places apart, whose changes do not cancel either.
    """
    flat = tensor.detach().reshape(-1)
    chunk_words = CHUNK_WORDS[flat.device.type]
    length = chunk_words * 8 // flat.element_size()
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    factors = torch.arange(1, 2 * min(chunk_words, flat.nbytes // 8 + 1), 2, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(length):
        words = _words(chunk)
        mixed = (words >> 32).add_(words)  # else two flips of the highest bit would cancel
        total = total * _NEXT + mixed.mul_(factors[: words.numel()]).sum()
    return total


def _words(chunk: Tensor) -> Tensor:
    """The bits of a flat tensor as int64, zeros after its end."""
    data = chunk.view(torch.uint8)
    missing = -data.numel() % 8
    if missing:
        data = F.pad(data, (0, missing))
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


@dataclass(frozen=True)
class Difference:
    """A tensor whose copies differ: its ranks by equal content, the most frequent content first."""

    name: str
    ranks: tuple[tuple[int, ...], ...]

    @property
    def suspects(self) -> tuple[int, ...]:
        """The ranks that hold another content than most; () where no content has a majority."""
        first, *others = self.ranks
        rest = [rank for group in others for rank in group]
        return tuple(sorted(rest)) if len(first) > len(rest) else ()


class Replicas:
    """The comparison of a model's and its optimizer's copies. All ranks make one and call `check` together.

    exact_tensor: whether tensor-parallel ranks are compared; None: where they are equal bit for bit.
    """

    def __init__(self, port: ModelPort, optimizer: Optimizer, *, exact_tensor: bool | None = None) -> None:
        self.port, self.optimizer = port, optimizer
        if exact_tensor is None:
            exact_tensor = port.device.type == "cpu" or port.layout.sequence_parallel
        self.exact_tensor = exact_tensor

    @property
    def present(self) -> bool:
        """Whether there is anything to compare: more than one rank."""
        return self.port.process_groups.world.size() > 1

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds, by a name that is the same on every rank with a copy of it."""
        names: dict[int, str] = {}
        for name, parameter, values in self.port.parameters.replicas(self.exact_tensor):
            names[id(parameter)] = name
            yield name, values
        for of, parameter, tensor in self.optimizer.replicated():
            yield f"{of} of {names[id(parameter)]}", tensor

    def check(self) -> str | None:
        """In words, on every rank: which tensor's copies differ and on which ranks; None when all are equal. One
        transfer from the device. Collective."""
        if not self.present:
            return None
        names, sums = [], []
        for name, tensor in self.tensors():
            names.append(name)
            sums.append(checksum(tensor).to(self.port.device))
        host = self.port.process_groups.host
        ids = np.array([_identity(name) for name in names], dtype=np.int64)
        mine = np.stack([ids, torch.stack(sums).cpu().numpy()])
        everyone = gather_objects(mine, 0, host)
        found = broadcast_object(None if everyone is None else _compare(everyone), 0, host)
        if not found:
            return None
        known = {int(i): name for i, name in zip(ids, names, strict=True) if int(i) in found}
        described = gather_objects((known, socket.gethostname()), 0, host)
        return on_rank_zero(lambda: _text(found, described or []), host)


def _identity(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _compare(everyone: Sequence[np.ndarray]) -> dict[int, tuple[tuple[int, ...], ...]]:
    """The tensors whose copies differ, by identity: the ranks by equal content, most frequent first. everyone: of each
    rank, [identities, checksums]."""
    ids, sums = np.concatenate(everyone, axis=1)
    ranks = np.repeat(np.arange(len(everyone)), [one.shape[1] for one in everyone])
    order = np.argsort(ids, kind="stable")
    ids, sums, ranks = ids[order], sums[order], ranks[order]
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    differing = np.minimum.reduceat(sums, starts) != np.maximum.reduceat(sums, starts)
    ends = np.r_[starts[1:], len(ids)]
    found = {}
    for begin, end in zip(starts[differing], ends[differing], strict=True):
        groups: dict[int, list[int]] = {}
        for rank, value in zip(ranks[begin:end].tolist(), sums[begin:end].tolist(), strict=True):
            groups.setdefault(value, []).append(rank)
        found[int(ids[begin])] = tuple(tuple(group) for group in sorted(groups.values(), key=lambda g: (-len(g), g)))
    return found


def _text(found: dict[int, tuple[tuple[int, ...], ...]], described: Sequence[tuple[dict[int, str], str]]) -> str:
    names = {identity: name for known, _ in described for identity, name in known.items()}
    hosts = [host for _, host in described]
    differences = [Difference(names[identity], ranks) for identity, ranks in found.items()]
    # One for which a majority says which rank is wrong; else a weight before the moments computed with it.
    chosen = min(differences, key=lambda one: (not one.suspects, " of " in one.name, one.name))
    more = f" (and of {plural(len(differences) - 1, 'other tensor')})" if len(differences) > 1 else ""
    if chosen.suspects:
        who = f"{_places(chosen.suspects, hosts)} differs from {_ranks(chosen.ranks[0])}"
    else:
        who = " differs from ".join(_places(group, hosts) for group in chosen.ranks[:2])
        who += ", and no majority says which is right"
    return f"the copies of {chosen.name}{more} are not equal: {who}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"global rank{'s' if len(ranks) > 1 else ''} {shown}"


def _places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    return f"{_ranks(ranks)} on {', '.join(names[:4])}"
