"""Lemmas 1, 3, 4 and 5, Eq. 5 and the conditions, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asd_megatron.antisd import (
    CONDITIONS,
    UnknownCondition,
    clipped_policy_loss,
    condition,
    entropy_mask,
    phi,
    pmi,
    signal,
    term,
    term_mask,
)
from asd_megatron.errors import UserError

LOG2 = math.log(2)
nats = st.floats(-700, 700, allow_nan=False)
seeds = st.integers(0, 2**31)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_logits(seed: int, vocabulary: int = 12, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, vocabulary, dtype=torch.float64, generator=g)
    return student.requires_grad_(), teacher


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return (p * (p / m).log() + q * (q / m).log()).sum() / 2


# ------------------------------------------------------------------------------------------------ Lemma 5


@given(nats, nats)
def test_phi_is_strictly_increasing(a: float, b: float) -> None:
    low, high = sorted((a, b))
    if (
        high - low > 1e-9 * max(1.0, abs(low), abs(high)) and low > -30
    ):  # below -30 phi has reached its bound in float64
        assert phi(f64(low)) < phi(f64(high))
    assert phi(f64(low)) <= phi(f64(high))


@given(nats)
def test_phi_has_the_sign_of_u_and_its_bound(u: float) -> None:
    value = phi(f64(u)).item()
    assert value >= -LOG2 / 2
    if abs(u) > 1e-300:
        assert math.copysign(1, value) == math.copysign(1, u)
    assert value <= max(u, 0) / 2


def test_phi_at_zero_and_at_the_ends() -> None:
    assert phi(f64(0.0)).item() == 0.0
    assert phi(torch.zeros(3)).tolist() == [0.0] * 3  # float32 too: an empty context has no term at all
    assert phi(f64(-math.inf)).item() == -LOG2 / 2
    assert phi(f64(1e6)).item() == pytest.approx((1e6 - LOG2) / 2, rel=1e-15)
    assert phi(torch.tensor([-1e4, 1e4])).isfinite().all()


@given(st.floats(-30, 30))
def test_phi_is_the_shifted_softplus(u: float) -> None:
    expected = (math.log1p(math.exp(-abs(u))) + max(u, 0) - LOG2) / 2
    assert phi(f64(u)).item() == pytest.approx(expected, rel=1e-14, abs=1e-15)


@given(st.floats(-40, 40))
def test_phi_derivative_is_half_a_sigmoid(u: float) -> None:
    x = f64(u).requires_grad_()
    phi(x).sum().backward()
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(torch.sigmoid(f64(u)).item() / 2, rel=1e-12)


def test_phi_derivative_at_zero_and_far_out() -> None:
    x = f64(0.0, -800.0, 800.0).requires_grad_()
    phi(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, f64(0.25, 0.0, 0.5))


# ------------------------------------------------------------------------------------------------ Lemma 4


def f_jsd(r: Tensor) -> Tensor:
    return r / 2 * (2 * r / (1 + r)).log() + (2 / (1 + r)).log() / 2


@given(st.floats(-20, 20))
def test_minus_phi_is_the_derivative_of_the_jensen_shannon_f(u: float) -> None:
    r = torch.exp(-f64(u)).requires_grad_()
    f_jsd(r).sum().backward()
    assert r.grad is not None
    torch.testing.assert_close(r.grad, -phi(f64(u)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(-phi(f64(u)), (2 * r.detach() / (1 + r.detach())).log() / 2, rtol=1e-9, atol=1e-12)


@given(seeds)
def test_that_f_makes_the_jensen_shannon_divergence(seed: int) -> None:
    student, teacher = random_logits(seed)
    p, q = student.detach().softmax(0), teacher.softmax(0)
    torch.testing.assert_close((q * f_jsd(p / q)).sum(), jensen_shannon(p, q), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------------------------------------ Lemma 1 and Eq. 5


@given(seeds)
def test_reverse_kl_gradient_is_minus_the_mean_of_u(seed: int) -> None:
    student, teacher = random_logits(seed)
    s, t = student.log_softmax(0), teacher.log_softmax(0)
    (kl,) = torch.autograd.grad((s.exp() * (s - t)).sum(), student, retain_graph=True)
    (identity,) = torch.autograd.grad(-(s.exp().detach() * pmi(t, s) * s).sum(), student)
    torch.testing.assert_close(kl, identity, rtol=1e-9, atol=1e-12)


@given(seeds)
def test_eq5_dense_gradient(seed: int) -> None:
    student, teacher = random_logits(seed)
    s, t = student.log_softmax(0), teacher.log_softmax(0)
    (exact,) = torch.autograd.grad(jensen_shannon(s.exp(), t.exp()), student, retain_graph=True)
    (dense,) = torch.autograd.grad(-(s.exp().detach() * phi(pmi(t, s)) * s).sum(), student)
    torch.testing.assert_close(exact, dense, rtol=1e-9, atol=1e-12)


@settings(max_examples=25)
@given(seeds)
def test_eq5_one_sampled_token_is_unbiased_through_the_policy_loss(seed: int) -> None:
    """Over the token draw, the AntiSD loss (A = -phi) has minus the JSD's gradient: the update ascends it."""
    student, teacher = random_logits(seed)
    s, t = student.log_softmax(0), teacher.log_softmax(0)
    (exact,) = torch.autograd.grad(jensen_shannon(s.exp(), t.exp()), student, retain_graph=True)
    expectation = torch.zeros_like(exact)
    for v in range(len(s)):
        sampled = s[v : v + 1]
        advantage = -term("antisd", signal("antisd", sampled, t[v : v + 1]))
        loss, _ = clipped_policy_loss(sampled, sampled, advantage, torch.ones_like(advantage), 0.2, 0.2)
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        expectation += s[v].exp().detach() * gradient
    torch.testing.assert_close(expectation, -exact, rtol=1e-9, atol=1e-12)


def test_eq5_monte_carlo() -> None:
    student, teacher = random_logits(3, vocabulary=6, scale=1.0)
    s, t = student.log_softmax(0), teacher.log_softmax(0)
    (exact,) = torch.autograd.grad(jensen_shannon(s.exp(), t.exp()), student)
    p = s.detach().exp()
    draws = torch.multinomial(p, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    scores = torch.eye(6, dtype=torch.float64)[draws] - p  # grad log p(v) in the logits
    estimates = -phi(pmi(t, s))[draws, None] * scores
    error = estimates.mean(0) - exact
    assert (error.abs() < 5 * estimates.std(0) / len(draws) ** 0.5).all()


# ------------------------------------------------------------------------------------------------ Lemma 3


@settings(max_examples=25)
@given(seeds)
def test_u_telescopes_over_a_consistent_joint(seed: int) -> None:
    """One joint table of contexts c and responses y of three tokens: sum_t u_t = log p(c | y) - log p(c), which is the
    log-ratio of the whole response with and without c.
    """
    g = torch.Generator().manual_seed(seed)
    contexts, v = 4, 3
    joint = torch.rand(contexts, v, v, v, dtype=torch.float64, generator=g).add(1e-3)
    joint /= joint.sum()
    c = int(torch.randint(contexts, (), generator=g))
    y = torch.randint(v, (3,), generator=g).tolist()

    def conditional(table: Tensor) -> Tensor:
        """log p(y_t | y_<t) of each token under a (not normalised) table over responses."""
        out = []
        for token in y:
            marginal = table.reshape(v, -1).sum(1)
            out.append((marginal[token] / marginal.sum()).log())
            table = table[token]
        return torch.stack(out)

    u = signal("antisd", conditional(joint.sum(0)), conditional(joint[c]))
    p_y = joint[:, y[0], y[1], y[2]]
    torch.testing.assert_close(u.sum(), (p_y[c] / p_y.sum()).log() - joint[c].sum().log())
    whole = (p_y[c] / joint[c].sum()).log() - p_y.sum().log()
    torch.testing.assert_close(u.sum(), whole)


# ------------------------------------------------------------------------------------------------ conditions


def test_every_condition_of_the_paper_is_there() -> None:
    assert set(CONDITIONS) == {
        "grpo",
        "sd",
        "antisd",
        "reverse_kl_ascent",
        "no_gate",
        "multiplicative",
        "student_entropy_gate",
        "no_teacher",
    }
    assert [c.name for c in CONDITIONS.values() if not c.uses_teacher] == ["grpo", "no_teacher"]
    assert [c.name for c in CONDITIONS.values() if not c.gated] == ["grpo", "sd", "no_gate"]
    assert {c.name for c in CONDITIONS.values() if c.gate_entropy == "student"} == {
        "student_entropy_gate",
        "no_teacher",
    }


def test_an_unknown_condition_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="'antisdd' does not exist.*antisd,"):
        condition("antisdd")
    assert issubclass(UnknownCondition, ValueError)


def test_signal_of_teacher_and_student_sources() -> None:
    s, t = f64(-1.0, -2.0).requires_grad_(), f64(-0.5, -4.0).requires_grad_()
    assert signal("antisd", s, t).tolist() == [0.5, -2.0]
    assert signal("no_teacher", s, None).tolist() == [1.0, 2.0]
    assert not signal("antisd", s, t).requires_grad
    with pytest.raises(ValueError, match="teacher_logprobs"):
        signal("antisd", s, None)


def test_a_rollout_without_context_has_no_u_whatever_stands_in_its_place() -> None:
    context = torch.tensor([True, False, False])
    u = signal("antisd", f64(-1, -1, -1), f64(-2.0, math.nan, math.inf), context)
    assert u.tolist() == [-1.0, 0.0, 0.0]
    assert term("antisd", u)[1:].tolist() == [0.0, 0.0]
    assert signal("no_teacher", f64(-1, -1, -1), None, context).tolist() == [1.0, 1.0, 1.0]


def test_equal_logprobs_have_no_term() -> None:
    s = torch.randn(100)
    for name in ("sd", "antisd", "multiplicative", "reverse_kl_ascent"):
        assert (term(name, signal(name, s, s.clone())) == 0).all()


def test_term_shapes_and_pmi_clip() -> None:
    u = f64(-9.0, -1.0, 0.0, 2.0, 9.0)
    assert term("sd", u).tolist() == u.tolist()
    assert term("reverse_kl_ascent", u, pmi_clip=5).tolist() == [-5.0, -1.0, 0.0, 2.0, 5.0]
    torch.testing.assert_close(term("antisd", u, pmi_clip=5), phi(u.clamp(-5, 5)))
    for name in ("no_gate", "multiplicative", "student_entropy_gate", "no_teacher", "grpo"):
        torch.testing.assert_close(term(name, u), phi(u))


def test_masks() -> None:
    sampled = torch.tensor([True, True, False, True])
    context = torch.tensor([True, True, True, False])
    positions = torch.tensor([0, 1, 2, 0])
    assert entropy_mask("antisd", sampled, context).tolist() == [True, True, False, False]
    assert entropy_mask("student_entropy_gate", sampled, context).tolist() == [True, True, False, False]
    assert entropy_mask("no_teacher", sampled, context).tolist() == [True, True, False, True]
    assert term_mask("antisd", sampled, context).tolist() == [True, True, False, False]
    assert term_mask("antisd", sampled, context, positions, 1).tolist() == [True, False, False, False]
    assert term_mask("no_teacher", sampled, context, positions, 1).tolist() == [True, False, False, True]
    lengths = torch.tensor([11_999, 12_000, 3, 9])
    assert term_mask("antisd", sampled, context, lengths=lengths, max_length=12_000).tolist() == [True] + [False] * 3
    with pytest.raises(ValueError, match="positions"):
        term_mask("antisd", sampled, context, None, 1)
    with pytest.raises(ValueError, match="lengths"):
        term_mask("antisd", sampled, context, max_length=12_000)
