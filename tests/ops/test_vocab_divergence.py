"""The exact divergence on one process, against full logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asd_megatron.ops import softmax_tile
from asd_megatron.ops.divergence_tile import complete_divergence_, row_values
from asd_megatron.ops.softmax_tile import Targets
from asd_megatron.ops.vocab_divergence import Divergence, VocabShard, linear_divergence_loss
from tests.ops.dense import Head, error, grad
from tests.ops.dense_divergence import Pair, dense_divergence, kl
from tools.head.memory import peak_bytes

T, H, V, PADDED = 29, 16, 101, 128
DIVERGENCES = [
    Divergence(),
    Divergence("reverse_kl"),
    Divergence("forward_kl"),
    Divergence("jensen_shannon", 0.9),
    Divergence("jensen_shannon", 0.1),
]


def problem(
    seed: int = 0,
    *,
    rows: int | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    sizes: tuple[int, int, int] = (T, H, V),
    own_head: bool = False,
) -> tuple[Pair, Tensor, Tensor]:
    """A problem, its padded weight and the teacher's, whose padding is garbage that would dominate every softmax."""
    g = torch.Generator().manual_seed(seed)
    tokens, width, vocab = sizes
    hidden = torch.randn(tokens, width, generator=g)
    weight = torch.randn(vocab + 27, width, generator=g) * scale
    weight[vocab:] = 1e4
    other = weight + 0.1 * torch.randn(weight.shape, generator=g) if own_head else weight
    index = None if rows is None else torch.randperm(tokens, generator=g)[:rows]
    selected = hidden if index is None else hidden[index]
    target = torch.randint(0, vocab, (len(selected),), generator=g)
    teacher = selected + 0.5 * torch.randn(selected.shape, generator=g)
    coefficient = torch.randn(len(selected), generator=g)
    coefficient[::5] = 0.0  # rows without privileged context
    head = Head(hidden, weight[:vocab], target, index, temperature)
    return Pair(head, teacher, other[:vocab], coefficient), weight, other


def policy(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
    a, b = torch.randn(2, T, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(logprobs.dtype)
    own = torch.exp(logprobs - logprobs.detach()) * (a[block] - 0.5 * logprobs.detach())
    return own.sum() + (entropy * b[block]).sum()


def nothing(logprobs: Tensor, entropy: Tensor, block: slice) -> Tensor:
    return logprobs.new_zeros(())


def run(
    pair: Pair,
    weight: Tensor,
    divergence: Divergence,
    *,
    teacher_weight: Tensor | None = None,
    loss: Any = policy,
    block: int | None = 10,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    head = pair.student
    h, w = head.hidden.to(dtype).clone().requires_grad_(), weight.to(dtype).clone().requires_grad_()
    value, columns = linear_divergence_loss(
        h,
        w,
        head.target,
        loss,
        pair.coefficient.to(torch.promote_types(dtype, torch.float32)),
        lambda b: pair.teacher_hidden.to(dtype)[b],
        divergence,
        VocabShard.of(len(head.weight), len(weight)),
        teacher_weight=None if teacher_weight is None else teacher_weight.to(dtype),
        rows=head.rows,
        temperature=head.temperature,
        token_block=block,
    )
    value.backward()
    return {"loss": value.detach(), **columns._asdict(), "d hidden": grad(h), "d weight": grad(w)}


def difference(got: Tensor, want: Tensor, floor: float = 1.0) -> float:
    """Largest absolute difference over the largest absolute value or `floor`, whichever is larger."""
    if want.numel() == 0:
        return 0.0
    return (got.double() - want).abs().max().item() / max(floor, want.abs().max().item())


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    vocab = len(want["d weight"])
    assert not got["d weight"][vocab:].any(), "padded rows have no gradient"
    got = {**got, "d weight": got["d weight"][:vocab]}
    for name, value in want.items():
        # A divergence is a difference of numbers of the size of the entropy.
        floor = want["entropy"].abs().max().item() if name in ("divergence", "reverse_kl", "forward_kl") else 1e-30
        assert difference(got[name], value, floor) <= tolerance, name


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.mixture}")
@pytest.mark.parametrize(("rows", "temperature", "own_head"), [(None, 1.0, False), (17, 0.7, False), (17, 1.3, True)])
def test_equals_dense_float64(divergence: Divergence, rows: int | None, temperature: float, own_head: bool) -> None:
    pair, weight, other = problem(rows=rows, temperature=temperature, own_head=own_head)
    want = pair.evaluate(policy, divergence)
    assert_close(run(pair, weight, divergence, teacher_weight=other if own_head else None), want, 5e-6)
    exact = run(pair, weight, divergence, teacher_weight=other if own_head else None, dtype=torch.float64)
    assert_close(exact, want, 1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.mixture}")
def test_numerical_gradient(divergence: Divergence) -> None:
    """Numerical differences of the op's own loss, the teacher held fixed."""
    pair, weight, _ = problem(sizes=(5, 3, 7), temperature=0.8)
    shard = VocabShard.of(7, len(weight))
    teacher, target = pair.teacher_hidden.double(), pair.student.target

    def loss(hidden: Tensor, valid: Tensor) -> Tensor:
        padded = torch.cat([valid, weight[7:].double()])
        return linear_divergence_loss(
            hidden,
            padded,
            target,
            lambda p, e, b: (p * pair.coefficient.double()[b]).sum(),
            pair.coefficient.double(),
            lambda b: teacher[b],
            divergence,
            shard,
            teacher_weight=weight.double(),
            temperature=0.8,
            token_block=2,
        )[0]

    inputs = [pair.student.hidden.double(), weight[:7].double()]
    leaves = [t.clone().requires_grad_() for t in inputs]
    loss(*leaves).backward()
    for number, (tensor, leaf) in enumerate(zip(inputs, leaves, strict=True)):
        numerical = torch.zeros_like(tensor)
        for k in range(tensor.numel()):
            step = torch.zeros_like(tensor)
            step.view(-1)[k] = 1e-5
            up, down = ([*inputs[:number], tensor + sign * step, *inputs[number + 1 :]] for sign in (1, -1))
            with torch.no_grad():
                numerical.view(-1)[k] = (loss(*up) - loss(*down)) / 2e-5
        assert error(grad(leaf), numerical) < 1e-7


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 40)),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e3, 1e8]),
    divergence=st.sampled_from(DIVERGENCES),
    block=st.integers(1, 10),
)
def test_shapes_and_extremes(
    seed: int, sizes: tuple[int, int, int], scale: float, divergence: Divergence, block: int
) -> None:
    """Uniform, nearly equal and disjoint distributions (p and q underflow): finite, D in its range, gradient right."""
    pair, weight, _ = problem(seed, sizes=sizes, scale=scale)
    got = run(pair, weight, divergence, loss=nothing, block=block)
    assert all(torch.isfinite(t).all() for t in got.values())
    assert (got["divergence"] >= 0).all()
    if divergence == Divergence():
        assert (got["divergence"] <= 0.6931473).all()
    if scale <= 30:  # beyond that float32 does not resolve the logits themselves
        want = pair.evaluate(nothing, divergence)
        for name, size in (("d hidden", scale * scale), ("d weight", scale)):  # weights of that size, logits too
            assert difference(got[name][: len(want[name])], want[name]) <= 1e-5 * max(1.0, size), name


def test_disjoint_distributions_within_1e5() -> None:
    """p and q on different tokens, the other's logits 200 lower, so that both underflow in float32."""
    vocab = 6
    weight = torch.eye(vocab) * 200
    pair = Pair(
        Head(torch.eye(vocab), weight, torch.arange(vocab), None, 1.0),
        torch.eye(vocab).roll(1, 0),
        weight,
        torch.ones(vocab),
    )
    for divergence in DIVERGENCES:
        got, want = run(pair, weight, divergence), pair.evaluate(policy, divergence)
        # A logit's derivative is of the size of u, 200, and each hidden state is multiplied by weights of 200.
        for name, floor in (("divergence", 1.0), ("d hidden", 200.0 * 200.0), ("d weight", 200.0)):
            assert torch.isfinite(got[name]).all()
            assert difference(got[name], want[name], floor) < 1e-6, (divergence, name)


def test_equal_distributions_have_neither_divergence_nor_gradient() -> None:
    pair, weight, _ = problem()
    pair.teacher_hidden = pair.student.hidden
    for divergence in DIVERGENCES:
        got = run(pair, weight, divergence, loss=nothing)
        assert got["divergence"].max() < 2e-6 and got["d hidden"].abs().max() < 2e-5
        assert got["agreement"].all()


@pytest.mark.parametrize("precision", ["highest", "medium"])  # medium: float32 products may be those of bfloat16
def test_small_divergences_are_no_difference_of_large_numbers(precision: str) -> None:
    """Of nearly equal distributions with an entropy of 5 nats, which float32 rounds by 5e-7. The sums of 4,096 products
    are the CPU's matrix library's: on an Intel Xeon the errors stay below 1e-6, on an AMD EPYC below 2e-6."""
    g = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(40, 4096, generator=g)
    teacher = student + 0.01 * torch.randn(student.shape, generator=g)
    target = Targets(torch.zeros(40, dtype=torch.long), torch.ones(40, dtype=torch.bool))
    logp, logq = (torch.log_softmax(z.double(), 1) for z in (student, teacher))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for divergence in DIVERGENCES:
            _, sums = complete_divergence_(torch.stack([student, teacher]), target, torch.ones(40), divergence)
            got, want = row_values(sums, divergence), dense_divergence(logp, logq, divergence)
            assert want.min() > 1e-6 and want.max() < 1e-4
            for found, exact in (
                (got.divergence, want),
                (got.reverse_kl, kl(logp, logq)),
                (got.forward_kl, kl(logq, logp)),
            ):
                assert (found - exact).abs().max() < 3e-6, divergence
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_of_a_tile() -> None:
    """Beside the gradients: student's and teacher's logits of two thirds of the tile's rows, and a slab."""
    tokens, vocab, width, block = 256, 4096, 32, 96
    g = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (torch.randn(n, width, generator=g) for n in (tokens, vocab, tokens))
    hidden.requires_grad_()
    weight.requires_grad_()

    def action() -> None:
        linear_divergence_loss(
            hidden, weight, torch.zeros(tokens, dtype=torch.long), nothing, torch.ones(tokens), lambda b: teacher[b],
            Divergence(), VocabShard.of(vocab, vocab), token_block=block,
        )[0].backward()  # fmt: skip

    longest = 86  # three tiles
    tile, results = 4 * vocab * 2 * 58, 4 * width * (tokens + vocab)
    slab = 4 * 3 * vocab * softmax_tile.slab_step(torch.empty(longest, vocab), 3)
    peak = peak_bytes(action, torch.device("cpu"))
    assert tile + results <= peak <= tile + results + slab + 64 * tokens * 8 + 4 * 2 * longest * width * 4


def test_bfloat16_operands_have_float32_sums() -> None:
    pair, weight, _ = problem(scale=0.5)
    head = pair.student
    head.hidden, weight = head.hidden.bfloat16(), weight.bfloat16()
    pair.teacher_hidden = pair.teacher_hidden.bfloat16()
    head.weight = pair.teacher_weight = weight[:V]
    got, want = run(pair, weight, Divergence(), dtype=torch.bfloat16), pair.evaluate(policy, Divergence())
    assert got["divergence"].dtype == torch.float32 and got["d hidden"].dtype == torch.bfloat16
    assert (got["divergence"].double() - want["divergence"]).abs().max() < 5e-6
    assert error(got["d hidden"], want["d hidden"]) < 8e-3 and error(got["d weight"][:V], want["d weight"]) < 8e-3


def test_main_grad_takes_the_weight_gradient_once() -> None:
    pair, weight, _ = problem()
    head, want = pair.student, pair.evaluate(policy, Divergence())
    w = torch.nn.Parameter(weight.clone())
    w.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    h = head.hidden.clone().requires_grad_()

    def loss() -> Tensor:
        return linear_divergence_loss(
            h, w, head.target, policy, pair.coefficient, lambda b: pair.teacher_hidden[b], Divergence(),
            VocabShard.of(V, len(weight)), token_block=7,
        )[0]  # fmt: skip

    with torch.no_grad():
        assert not loss().requires_grad
    assert not w.main_grad.any()  # type: ignore[attr-defined]
    loss().backward()
    assert error(w.main_grad[:V], want["d weight"]) < 5e-6  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="linear_divergence_loss has already added"):
        (loss() * 2).backward()


def test_wrong_arguments_are_named() -> None:
    pair, weight, _ = problem()
    arguments: dict[str, Any] = {
        "hidden": pair.student.hidden,
        "weight": weight,
        "target": pair.student.target,
        "token_loss": policy,
        "coefficient": pair.coefficient,
        "teacher": lambda b: pair.teacher_hidden[b],
        "divergence": Divergence(),
        "shard": VocabShard.of(V, len(weight)),
    }
    for wrong, match in (
        ({"coefficient": pair.coefficient[1:]}, "coefficient"),
        ({"teacher_weight": weight[1:]}, "teacher_weight"),
        ({"teacher": lambda b: pair.teacher_hidden[b][1:]}, "teacher"),
    ):
        with pytest.raises(ValueError, match=match):
            linear_divergence_loss(**{**arguments, **wrong})
    with pytest.raises(ValueError, match="mixture"):
        Divergence(mixture=1.0)
    with pytest.raises(ValueError, match="choose one of"):
        Divergence("kl")  # type: ignore[arg-type]
