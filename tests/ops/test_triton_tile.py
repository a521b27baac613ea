"""The Triton kernels of the head against float64 and PyTorch's operators: in Triton's interpreter, compiled, on CUDA.

The interpreter is chosen by an environment variable when triton is imported. It therefore runs in a process of its own,
whatever this one has imported.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from asd_megatron.ops import tile_kernels
from asd_megatron.ops.divergence_tile import Divergence, DivergenceTile, row_values
from asd_megatron.ops.softmax_tile import Softmax, Targets, merged
from asd_megatron.ops.tile_kernels import TORCH, TileKernels, triton_kernels
from asd_megatron.ops.vocab_divergence import linear_divergence_loss
from asd_megatron.ops.vocab_head import VocabShard, linear_logprob
from tests.distributed.harness import run_ranks
from tests.ops.dense import Head, error, grad
from tests.ops.dense_divergence import Pair, dense_divergence, kl

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: it is part of the `dev` extra on Linux",
)
DIVERGENCES = (
    Divergence(),
    Divergence("jensen_shannon", 0.9),
    Divergence("reverse_kl"),
    Divergence("forward_kl"),
)


@contextmanager
def interpreting() -> Iterator[None]:
    """Processes started inside import triton as an interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function of this module in a process where kernels are interpreted."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        with interpreting():
            pool.submit(os.getpid).result()  # starts the process
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)


@dataclass(frozen=True)
class Case:
    """Logits [n, v] of both, in `parts` parts of the vocabulary, by a kernel with blocks of `block` columns."""

    kind: str = "random"
    n: int = 3
    v: int = 37
    block: int = 16
    parts: int = 2

    def logits(self) -> tuple[Tensor, Tensor, float]:
        """Of student and teacher, float32, and the size of the numbers that are subtracted from each other."""
        g = torch.Generator().manual_seed(self.n)
        student = 3 * torch.randn(self.n, self.v, generator=g)
        teacher = student + torch.randn(self.n, self.v, generator=g)
        if self.kind == "equal":
            return torch.full_like(student, 7.5), torch.full_like(student, -2.0), 1.0
        if self.kind == "huge":
            return student * 1e29, teacher * 1e29, 1e30
        if self.kind == "disjoint":  # each has all its probability where the other's underflows
            student, teacher = torch.zeros_like(student), torch.zeros_like(teacher)
            student[:, 0], teacher[:, -1] = 200.0, 200.0
            return student, teacher, 200.0
        return student, teacher, 1.0


CASES = [
    Case(),
    Case(v=1, parts=1),
    Case(v=16, parts=1),
    Case(n=2, v=2500, block=2048, parts=1),
    Case("equal"),
    Case("huge"),
    Case("disjoint"),
]


@dataclass(frozen=True)
class Inputs:
    student: Tensor  # [n, v]
    teacher: Tensor
    target: Tensor  # [n]
    coefficient: Tensor
    g_logprob: Tensor
    g_entropy: Tensor | None
    parts: int = 1

    @classmethod
    def of(cls, case: Case, device: str, entropy: bool = True) -> Inputs:
        student, teacher, _ = case.logits()
        g = torch.Generator().manual_seed(1)
        columns = torch.randn(3, case.n, generator=g)
        target = torch.randint(0, case.v, (case.n,), generator=g)
        sampled = columns[1].to(device)
        if not entropy:
            sampled = torch.ones((), device=device).expand(case.n)  # stride 0, as the gradient of a sum
        tensors = [t.to(device) for t in (student, teacher, target, columns[0])]
        return cls(*tensors, sampled, columns[2].to(device) if entropy else None, case.parts)


@dataclass(frozen=True)
class Evaluation:
    """What the ops compute with the kernels, part by part of the vocabulary as on several ranks."""

    kernels: TileKernels
    x: Inputs
    dtype: torch.dtype = torch.float32

    @cached_property
    def tiles(self) -> list[tuple[Tensor, Tensor, Targets]]:
        x = self.x
        bounds = [x.student.shape[1] * k // x.parts for k in range(x.parts + 1)]
        found = []
        for start, end in itertools.pairwise(bounds):
            local = (x.target - start).clamp(0, end - start - 1)
            owned = (x.target >= start) & (x.target < end)
            found.append((x.student[:, start:end].clone(), x.teacher[:, start:end].clone(), Targets(local, owned)))
        return found

    @cached_property
    def softmax(self) -> tuple[Softmax, Softmax]:
        """Of student and teacher."""
        statistics = self.kernels.softmax_statistics
        p = merged(torch.stack([statistics(student, target) for student, _, target in self.tiles]))
        return p, merged(torch.stack([statistics(teacher, target) for _, teacher, target in self.tiles]))

    def policy(self) -> dict[str, Tensor]:
        p, x = self.softmax[0], self.x
        parts = [
            self.kernels.logit_gradient_(student.clone(), target, p, x.g_logprob, x.g_entropy, self.dtype)
            for student, _, target in self.tiles
        ]
        return _on_cpu({**p._asdict(), "gradient": torch.cat(parts, 1)})

    def divergence(self, divergence: Divergence) -> dict[str, Tensor]:
        x = self.x
        if len(self.tiles) == 1:
            student, teacher, target = self.tiles[0]
            tile, sums = self.kernels.complete_divergence_(
                torch.stack([student, teacher]), target, x.coefficient, divergence
            )
            pairs = [tile]
        else:
            p, q = self.softmax
            pairs = [
                DivergenceTile(torch.stack([student, teacher]), p, q, x.coefficient, divergence)
                for student, teacher, _ in self.tiles
            ]
            sums = torch.stack([self.kernels.divergence_sums_(pair) for pair in pairs]).sum(0)
        values = row_values(sums, divergence)
        parts = [
            self.kernels.divergence_gradient_(pair, values.mean, target, x.g_logprob, x.g_entropy, self.dtype)
            for pair, (_, _, target) in zip(pairs, self.tiles, strict=True)
        ]
        return _on_cpu({**values._asdict(), "gradient": torch.cat(parts, 1)})


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def exact(x: Inputs, divergence: Divergence | None) -> dict[str, Tensor]:
    """The same in float64 by autograd through the definitions; None: `Evaluation.policy`."""
    z = x.student.cpu().double().requires_grad_()
    logp, logq = torch.log_softmax(z, 1), torch.log_softmax(x.teacher.cpu().double(), 1)
    entropy = -torch.where(logp.exp() > 0, logp.exp() * logp, 0.0).sum(1)
    logprob = logp.gather(1, x.target.cpu()[:, None])[:, 0]
    loss = (x.g_logprob.cpu().double() * logprob).sum()
    if x.g_entropy is not None:
        loss = loss + (x.g_entropy.cpu().double() * entropy).sum()
    found = {"top_logprob": logp.amax(1), "logprob": logprob, "entropy": entropy}
    if divergence is not None:
        value = dense_divergence(logp, logq, divergence)
        loss = loss + (x.coefficient.cpu().double() * value).sum()
        agreement = ((logp == logp.amax(1, True)) & (logq == logq.amax(1, True))).any(1).double()
        found = {"divergence": value, "agreement": agreement}
        found |= {"reverse_kl": kl(logp, logq), "forward_kl": kl(logq, logp)}
    (found["gradient"],) = torch.autograd.grad(loss, z)
    return {name: value.detach() for name, value in found.items()}


def errors(case: Case, device: str) -> dict[str, float]:
    """Largest errors of the kernels against float64 and against PyTorch's operators."""
    from asd_megatron.ops import triton_tile

    kernels = triton_kernels()
    assert kernels is not None
    worst: dict[str, float] = {}
    size = case.logits()[2]

    def compare(reference: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
        for name, value in want.items():
            scale = max(size, value.abs().max().item())
            worst[f"{name} {reference}"] = (got[name].double() - value.double()).abs().max().item() / scale

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tile, "BLOCK", case.block)
        x = Inputs.of(case, device)
        ours, twin = Evaluation(kernels, x), Evaluation(TORCH, x)
        policy = ours.policy()
        compare("float64", policy, exact(x, None))
        compare("torch", policy, twin.policy())
        for divergence in DIVERGENCES:
            got = ours.divergence(divergence)
            compare(f"{divergence} float64", got, exact(x, divergence))
            compare(f"{divergence} torch", got, twin.divergence(divergence))
    return worst


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}-{c.n}x{c.v}")
def test_interpreted_kernels_equal_float64_and_torch(case: Case, interpreted: Callable[..., Any]) -> None:
    for name, value in interpreted(errors, case, "cpu").items():
        assert value < 1e-5, (name, value)


def without_entropy_in_bfloat16(device: str) -> None:
    kernels = triton_kernels()
    assert kernels is not None
    x = Inputs.of(Case(), device, entropy=False)
    found = Evaluation(kernels, x, torch.bfloat16)
    for divergence in (None, *DIVERGENCES):
        got = found.divergence(divergence) if divergence else found.policy()
        want = exact(x, divergence)["gradient"]
        assert got["gradient"].dtype is torch.bfloat16
        # to the nearest on CUDA; the interpreter truncates
        assert ((got["gradient"].double() - want).abs() <= 2**-7 * want.abs() + 1e-6).all(), divergence


@needs_triton
def test_gradients_in_the_dtype_of_the_products(interpreted: Callable[..., Any]) -> None:
    interpreted(without_entropy_in_bfloat16, "cpu")


def masked(device: str) -> None:
    from asd_megatron.ops import triton_tile

    kernels = triton_kernels()
    assert kernels is not None
    x = Inputs.of(Case(n=2, v=24, parts=1), device)
    kept = torch.arange(24, device=device) % 3 == 2  # the first two columns are gone
    kept[8:16] = False  # a block without any
    hidden = [torch.where(kept, z, -torch.inf) for z in (x.student, x.teacher)]
    target = torch.tensor([5, 20], device=device)
    rest = (x.coefficient, x.g_logprob, x.g_entropy)
    less = Inputs(x.student[:, kept], x.teacher[:, kept], (kept.cumsum(0) - 1)[target], *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tile, "BLOCK", 8)
        found = Evaluation(kernels, Inputs(hidden[0], hidden[1], target, *rest))
        for divergence in (None, *DIVERGENCES):
            got = found.divergence(divergence) if divergence else found.policy()
            assert not got["gradient"][:, ~kept.cpu()].any(), "a column of -inf has no gradient"
            got["gradient"] = got["gradient"][:, kept.cpu()]
            for name, value in exact(less, divergence).items():
                assert (got[name] - value).abs().max() < 1e-5, (divergence, name)


@needs_triton
def test_columns_of_minus_infinity_count_for_nothing(interpreted: Callable[..., Any]) -> None:
    interpreted(masked, "cpu")


def nan(device: str) -> None:
    kernels = triton_kernels()
    assert kernels is not None
    for which in ("student", "teacher"):
        x = Inputs.of(Case(n=2), device)
        getattr(x, which)[1, 9] = torch.nan
        found = Evaluation(kernels, x)
        results = {"policy": found.policy()} if which == "student" else {}
        results |= {divergence.kind: found.divergence(divergence) for divergence in DIVERGENCES[1:]}
        for kind, got in results.items():
            for name in {"logprob", "entropy", "divergence", "reverse_kl", "forward_kl", "gradient"} & set(got):
                assert got[name][1].isnan().all(), (which, kind, name)
                assert got[name][0].isfinite().all(), (which, kind, name)


@needs_triton
def test_nan_stays(interpreted: Callable[..., Any]) -> None:
    interpreted(nan, "cpu")


@needs_triton
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_tiles_start_no_kernel(shape: tuple[int, int], interpreted: Callable[..., Any]) -> None:
    assert interpreted(_empty, shape)


def _empty(shape: tuple[int, int]) -> bool:
    kernels = triton_kernels()
    assert kernels is not None
    row = torch.zeros(shape[0])
    target = Targets(row.long(), row.bool())
    softmax, same = Softmax(row, row, row, row), True
    for divergence in DIVERGENCES:
        found = []
        for k in (kernels, TORCH):
            student, teacher = torch.empty(shape), torch.empty(shape)
            pair = DivergenceTile(torch.stack([student, teacher]), softmax, softmax, row, divergence)
            found.append(
                [
                    k.softmax_statistics(student, target),
                    k.divergence_sums_(pair),
                    k.logit_gradient_(student, target, softmax, row, row, torch.bfloat16),
                    k.divergence_gradient_(pair, row, target, row, None, torch.bfloat16),
                ]
            )
        same &= all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*found, strict=True))
    return same


T, H = 6, 8


def _policy(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
    a, b = torch.randn(2, T, generator=torch.Generator().manual_seed(5)).to(logprobs)
    return (torch.exp(logprobs - logprobs.detach()) * a[block]).sum() + (entropy * b[block]).sum()


def _ops(rank: int) -> dict[str, float]:
    tile_kernels.uses_triton = lambda tile: True  # type: ignore[assignment]
    from asd_megatron.ops import triton_tile

    triton_tile.BLOCK = 16
    # of 23 tokens, the second rank has none
    return _op_errors(rank, 37, Divergence("jensen_shannon", 0.3)) | _op_errors(rank, 23, Divergence("forward_kl"))


def _op_errors(rank: int, vocab: int, divergence: Divergence, local_rows: int = 24) -> dict[str, float]:
    group = dist.group.WORLD
    assert group is not None
    start = rank * local_rows
    shard = VocabShard.of(vocab, local_rows, group)
    own = slice(start, start + shard.rows)
    g = torch.Generator().manual_seed(vocab)
    hidden, weight = torch.randn(T, H, generator=g), torch.randn(local_rows * group.size(), H, generator=g)
    head = Head(hidden, weight[:vocab], torch.randint(0, vocab, (T,), generator=g), None, 0.7)
    pair = Pair(head, hidden + torch.randn(T, H, generator=g), weight[:vocab], torch.randn(T, generator=g))
    worst: dict[str, float] = {}

    def leaves() -> tuple[Tensor, Tensor]:
        return hidden.clone().requires_grad_(), weight[start : start + local_rows].clone().requires_grad_()

    def compare(op: str, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
        for name, value in got.items():
            worst[f"{op} {vocab} {name}"] = error(value, want[name])

    h, w = leaves()
    loss, columns = linear_divergence_loss(
        h, w, head.target, _policy, pair.coefficient, lambda b: pair.teacher_hidden[b], divergence, shard,
        temperature=0.7, token_block=4,
    )  # fmt: skip
    loss.backward()
    want = pair.evaluate(_policy, divergence)
    want["d weight"] = want["d weight"][own]
    compare("divergence", {**columns._asdict(), "d hidden": grad(h), "d weight": grad(w)[: shard.rows]}, want)
    h, w = leaves()
    logprobs, entropy = linear_logprob(h, w, head.target, shard, temperature=0.7, token_block=4)
    _policy(logprobs, entropy, slice(0, T)).backward()
    _, *dense = head.evaluate(_policy)
    names = ("logprobs", "entropy", "d hidden", "d weight")
    got = (logprobs.detach(), entropy.detach(), grad(h), grad(w)[: shard.rows])
    compare("logprob", dict(zip(names, got, strict=True)), dict(zip(names, (*dense[:3], dense[3][own]), strict=True)))
    return worst


@needs_triton
def test_interpreted_ops_on_two_ranks() -> None:
    with interpreting():
        ranks = run_ranks(_ops, 2, fresh=True)
    for worst in ranks:
        for name, value in worst.items():
            assert value < 5e-6, (name, value)


F, C = "*fp32", "constexpr"
SIGNATURES: dict[str, list[str]] = {
    "_softmax_statistics": [F, "i64", "i32", "*i64", "*i1", F, C],
    "_logit_gradient": [F, "i64", "*bf16", "i64", "i32", "*i64", "*i1", F, F, F, F, "entropy", C],
    "_divergence_sums": [F, "i64", F, "i64", "i32", F, F, F, F, F, "fp32", C, C],
    "_divergence_gradient": [
        F, "i64", F, "i64", "*bf16", "i64", "i32", "*i64", "*i1", *[F] * 8, "entropy", "fp32", C, C,
    ],
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels_compile_for_hopper(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, without a GPU: what the interpreter accepts need not be valid Triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from asd_megatron.ops import triton_tile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(triton_tile, name)
    for kind in ("jensen_shannon", "reverse_kl", "forward_kl") if "KIND" in kernel.arg_names else ("",):
        for entropy in (F, C) if "g_entropy" in kernel.arg_names else (F,):
            types = [entropy if t == "entropy" else t for t in SIGNATURES[name]]
            values = {"BLOCK": triton_tile.BLOCK, "KIND": kind, "g_entropy": None}
            signature = dict(zip(kernel.arg_names, types, strict=True))
            constants = {key: values[key] for key, kind_of in signature.items() if kind_of == C}
            source = ASTSource(kernel, signature, constants)
            options = {"num_warps": triton_tile.WARPS}
            assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]


def test_the_choice_between_triton_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = torch.empty(2, 3)
    assert tile_kernels.tile_kernels(tile) is TORCH
    monkeypatch.setattr(tile_kernels, "uses_triton", lambda tile: True)
    monkeypatch.setitem(sys.modules, "asd_megatron.ops.triton_tile", None)  # importing it raises ImportError
    monkeypatch.delattr("asd_megatron.ops.triton_tile", raising=False)
    triton_kernels.cache_clear()
    try:
        assert tile_kernels.tile_kernels(tile) is TORCH
    finally:
        triton_kernels.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, Case(n=64, v=50_001, block=2048)], ids=lambda c: f"{c.kind}-{c.n}x{c.v}")
def test_kernels_on_cuda_equal_float64_and_torch(case: Case) -> None:
    assert tile_kernels.tile_kernels(torch.empty(1, 1, device="cuda")) is triton_kernels() is not None
    for name, value in errors(case, "cuda").items():
        assert value < 1e-5, (name, value)


@pytest.mark.gpu
@pytest.mark.parametrize("check", [without_entropy_in_bfloat16, masked, nan])
def test_special_values_on_cuda(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.mixture}")
def test_divergence_op_in_bfloat16_on_cuda(divergence: Divergence) -> None:
    def loss(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
        return logprobs.sum()

    g = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(2, 50, 32, generator=g).bfloat16()
    weight = (0.5 * torch.randn(300, 32, generator=g)).bfloat16()
    coefficient = torch.randn(50, generator=g)
    head = Head(hidden, weight, torch.randint(0, 300, (50,), generator=g), None, 1.0)
    h, w = (t.cuda().requires_grad_() for t in (hidden, weight))
    target, factors, on_device = head.target.cuda(), coefficient.cuda(), teacher.cuda()
    value, columns = linear_divergence_loss(
        h, w, target, loss, factors, lambda b: on_device[b], divergence, VocabShard.of(300, 300), token_block=20
    )
    value.backward()
    want = Pair(head, teacher, weight, coefficient).evaluate(loss, divergence)
    for name, column in columns._asdict().items():
        assert (column.cpu().double() - want[name]).abs().max() < 2e-5, name
    assert error(grad(h).cpu(), want["d hidden"]) < 1e-2 and error(grad(w).cpu(), want["d weight"]) < 1e-2


@pytest.mark.gpu
def test_a_tile_of_more_than_2_to_the_31_elements_on_cuda() -> None:
    kernels = triton_kernels()
    assert kernels is not None
    n, v = (1 << 21) + 3, 1024
    tile = torch.zeros(n, v, device="cuda")
    tile[-1, 5] = 3.0
    target = Targets(torch.full((n,), 5, device="cuda"), torch.ones(n, dtype=torch.bool, device="cuda"))
    statistics = kernels.softmax_statistics(tile, target)
    assert statistics[0, -1] == statistics[3, -1] == 3.0 and statistics[0, :-1].abs().max() == 0
    softmax = merged(statistics[None])
    gradient = kernels.logit_gradient_(tile, target, softmax, torch.ones_like(softmax.logprob), None, torch.bfloat16)
    expected = 1 - softmax.logprob[-1].exp()
    assert (gradient[-1, 5].float() - expected).abs() < 5e-3
