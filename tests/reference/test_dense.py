"""The dense reference against the product's pure functions, against finite differences and against torch's AdamW."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.antisd import (
    CONDITIONS,
    Gate,
    clipped_policy_loss,
    compose,
    condition,
    entropy_mask,
    finish_term,
    group_advantages,
    importance_weights,
    ratio_statistics,
    signal,
    term,
    term_mask,
    term_statistics,
    token_weights,
)
from asd_megatron.records import Example, FinishReason, Rollout, TokenTable
from tests.reference.dense import DenseAdam, DenseGate, DenseRecipe, dense_update, exact, score, score_batch

VOCABULARY = 40


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def tiny() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    return exact(Qwen3ForCausalLM(config))


@pytest.fixture
def model(tiny: Any) -> Any:
    return copy.deepcopy(tiny)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Two groups of four: very unequal lengths, two rollouts without context, one truncated, one with a hole in its
    mask, one with the student's own prompt as the teacher's."""
    g = torch.Generator().manual_seed(1)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCABULARY, (n,), generator=g).tolist())

    out: list[Example] = []
    for prompt_id, lengths in (("p", [1, 17, 5, 9]), ("q", [3, 12, 2, 6])):
        prompt = ids(4)
        rewards = [1.0, 0.0, 0.0, 1.0] if prompt_id == "p" else [0.0, 0.0, 0.25, 0.0]
        advantages = group_advantages(torch.tensor(rewards)).tolist()
        for k, n in enumerate(lengths):
            rollout = Rollout(
                prompt_id=prompt_id,
                sample=k,
                prompt_ids=prompt,
                response_ids=ids(n),
                logprobs=tuple((-3 - torch.randn(n, generator=g)).tolist()),
                finish_reason=FinishReason.LENGTH if k == 1 else FinishReason.STOP,
                weight_version=0,
                loss_mask=tuple(j % 4 != 2 for j in range(n)) if k == 3 else (),
            )
            teacher: tuple[int, ...] | None = ids(7)
            if (prompt_id, k) in (("p", 2), ("q", 0)):
                teacher = None
            elif (prompt_id, k) == ("q", 2):
                teacher = prompt
            out.append(Example(rollout, rewards[k], advantages[k], teacher))
    return out


class Product:
    """The same numbers through the product's functions, from the reference's log-probs and entropies alone."""

    def __init__(self, examples: list[Example], recipe: DenseRecipe, scored: Any) -> None:
        self.c = condition(recipe.condition)
        self.table = TokenTable.for_lengths([len(e.rollout.response_ids) for e in examples])
        spread = self.table.spread
        self.segment = spread(torch.arange(len(examples)))
        self.positions = torch.arange(self.table.tokens) - spread(self.table.offsets[:-1])
        sampled = torch.tensor([m for e in examples for m in e.rollout.loss_mask])
        truncated = spread(torch.tensor([e.rollout.truncated for e in examples]))
        self.sampled = sampled & ~truncated if recipe.mask_truncated else sampled
        context = spread(torch.tensor([e.has_context for e in examples]))
        self.student = torch.cat(scored.student_logprobs)
        blank = [torch.full_like(s, math.nan) for s in scored.student_logprobs]
        teacher = torch.cat([b if t is None else t for t, b in zip(scored.teacher_logprobs, blank, strict=True)])
        entropy = {
            "student": torch.cat(scored.student_entropy),
            "teacher": torch.cat([b if t is None else t for t, b in zip(scored.teacher_entropy, blank, strict=True)]),
        }[self.c.gate_entropy or "teacher"]
        heard = entropy[entropy_mask(self.c, self.sampled, context)].sort().values
        self.h = heard[(len(heard) - 1) // 2].item() if len(heard) else None
        self.u = signal(self.c, self.student, teacher, context)
        limit = None if recipe.term_max_position == math.inf else int(recipe.term_max_position)
        acts = term_mask(self.c, self.sampled, context, self.positions, limit)
        q = term(self.c, self.u, pmi_clip=None if recipe.pmi_clip == math.inf else recipe.pmi_clip)
        by_rollout = self.segment if recipe.term_normalization == "sequence" else None
        statistics = None
        if recipe.term_normalization != "none":
            statistics = term_statistics(q, acts, by_rollout, len(examples) if by_rollout is not None else 1)
        clip = None if recipe.term_clip == math.inf else recipe.term_clip
        self.term = finish_term(q, acts, statistics=statistics, segment=by_rollout, clip=clip)
        self.group_advantage = spread(torch.tensor([e.group_advantage for e in examples], dtype=torch.float64))
        self.behaviour = torch.tensor([x for e in examples for x in e.rollout.logprobs], dtype=torch.float64)

    def advantage(self, lam: float) -> Tensor:
        return compose(self.c, self.group_advantage, self.term, lam)

    def loss(
        self, recipe: DenseRecipe, logprobs: Tensor, lam: float, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        mask = self.sampled if rows is None else self.sampled & rows
        weights = token_weights(
            mask,
            self.segment,
            aggregation=recipe.aggregation,
            total_tokens=int(mask.sum()),
            total_sequences=len(self.segment[mask].unique()),
            constant_length=recipe.constant_length,
            dtype=torch.float64,
        )
        return clipped_policy_loss(
            logprobs,
            self.student,
            self.advantage(lam),
            weights,
            recipe.clip_low,
            recipe.clip_high,
            self.importance(recipe),
        )

    def importance(self, recipe: DenseRecipe) -> Tensor | None:
        if recipe.importance == "none":
            return None
        sums = ratio_statistics(self.student, self.behaviour, self.sampled, self.segment, self.table.rollouts)
        return importance_weights(
            self.student,
            self.behaviour,
            recipe.importance_cap,
            recipe.importance_floor if recipe.importance == "masked" else None,
            level=recipe.importance_level,  # type: ignore[arg-type]
            statistics=sums,
            segment=self.segment,
        )[0]


def live_logprobs(model: Any, examples: list[Example], temperature: float) -> Tensor:
    prompts, responses = zip(*((e.rollout.prompt_ids, e.rollout.response_ids) for e in examples), strict=True)
    return torch.cat([logprobs for logprobs, _ in score(model, prompts, responses, temperature)])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"pmi_clip": 0.8, "term_clip": 0.2},
    {"term_normalization": "sequence", "term_clip": 1.5},
    {"term_normalization": "batch", "term_max_position": 6},
    {"mask_truncated": True, "temperature": 1.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("name", list(CONDITIONS))
def test_advantages(name: str, options: dict[str, Any], model: Any, examples: list[Example]) -> None:
    recipe = DenseRecipe(condition=name, warmup_steps=1, tau_down=1e-6, tau_up=1e-6, **options)
    memory = DenseGate()
    lams = []
    for _ in range(2):
        scored = score_batch(model, examples, recipe, memory)
        lams.append(scored.lam)
        product = Product(examples, recipe, scored)
        same(product.u, torch.cat(scored.pmi))
        same(product.term, torch.cat(scored.term))
        same(product.advantage(scored.lam), torch.cat(scored.advantage))
        if condition(name).gate_entropy is not None:
            assert product.h == scored.median_entropy
    assert lams == [0.0, 0.0 if name == "grpo" else 0.5]


def test_no_context_and_empty_context(model: Any, examples: list[Example]) -> None:
    scored = score_batch(model, examples, DenseRecipe(condition="no_gate"), DenseGate())
    for k, e in enumerate(examples):
        if not e.has_context or tuple(e.teacher_prompt_ids) == tuple(e.rollout.prompt_ids):
            assert (scored.pmi[k] == 0).all() and (scored.term[k] == 0).all()
            torch.testing.assert_close(scored.advantage[k], torch.full_like(scored.advantage[k], e.group_advantage))
        else:
            assert (scored.pmi[k] != 0).all()


@pytest.mark.parametrize("name", list(CONDITIONS))
def test_gate_decisions(name: str, model: Any, examples: list[Example]) -> None:
    """Temperature moves the entropies from step to step; one step has no rollout with context."""
    memory, gate = DenseGate(), Gate.for_condition(name, warmup_steps=0 if name == "grpo" else 2)
    lams = []
    for k, temperature in enumerate([1.0, 0.9, 1.0, 0.5, 0.92, 1.1, 1.0, 0.4]):
        recipe = DenseRecipe(condition=name, temperature=temperature, warmup_steps=2)
        batch = [replace(e, teacher_prompt_ids=None) for e in examples] if k == 1 else examples
        scored = score_batch(model, batch, recipe, memory)
        product = Product(batch, recipe, scored)
        assert gate.update(product.h if condition(name).gate_entropy else None) == scored.lam
        if name != "grpo":
            assert gate.h_warm == memory.h_warm
        lams.append(scored.lam)
    if condition(name).gated and name != "no_teacher":
        assert lams[3:] == [0.0, 0.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant_length"])
@pytest.mark.parametrize("importance", ["none", "truncated", "masked"])
def test_loss_and_gradient(aggregation: str, importance: str, model: Any, examples: list[Example]) -> None:
    recipe = DenseRecipe(
        condition="no_gate", temperature=0.7, aggregation=aggregation, constant_length=20, importance=importance
    )
    result = dense_update(model, examples, recipe)
    product = Product(examples, recipe, result)
    model.zero_grad(set_to_none=True)
    loss, clipped = product.loss(recipe, live_logprobs(model, examples, 0.7), result.lam)
    loss.backward()
    assert loss.item() == pytest.approx(result.losses[0], abs=1e-12)
    assert not clipped.any() and result.clipped == [0]
    assert set(result.gradients[0]) == {n for n, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert result.gradients[0][name].abs().max() > 0
        assert p.grad is not None
        same(result.gradients[0][name], p.grad)
    assert result.weights == []


@pytest.mark.parametrize(("level", "cap"), [("token", 1.5), ("sequence", 2.0), ("geometric", 1.25)])
@pytest.mark.parametrize("kind", ["truncated", "masked"])
def test_importance(kind: str, level: str, cap: float, model: Any, examples: list[Example]) -> None:
    """Weights of every kind: some cut, some not; the hole in a mask and truncated responses count nowhere."""
    recipe = DenseRecipe(
        condition="grpo",
        importance=kind,
        importance_level=level,
        importance_cap=cap,
        importance_floor=1 / cap,
        mask_truncated=True,
    )
    scored = score_batch(model, examples, DenseRecipe(condition="grpo"), DenseGate())
    g = torch.Generator().manual_seed(3)
    close = []
    for k, (e, s) in enumerate(zip(examples, scored.student_logprobs, strict=True)):
        engine = s + 0.3 * torch.randn(len(s), generator=g, dtype=torch.float64) + (k - 4) * 0.15
        close.append(replace(e, rollout=replace(e.rollout, logprobs=tuple(engine.tolist()))))
    scored = score_batch(model, close, recipe, DenseGate())
    product = Product(close, recipe, scored)
    weights = product.importance(recipe)
    assert weights is not None
    same(weights, torch.cat(scored.importance))
    used = weights[product.sampled]
    cut = used == (0.0 if kind == "masked" else recipe.importance_cap)
    assert 0 < cut.sum() < len(cut)
    rows = torch.split(weights, [len(e.rollout.response_ids) for e in close])
    assert any(len(row.unique()) > 1 for row in rows) == (level == "token")
    assert not product.sampled.all()
    product.behaviour[~product.sampled] = 5.0
    moved = product.importance(recipe)
    assert moved is not None
    same(moved[product.sampled], used)


def test_several_updates_with_active_clipping(model: Any, examples: list[Example]) -> None:
    """Two disjoint mini-batches, two epochs, against the product's loss on live log-probs and torch's own AdamW."""
    recipe = DenseRecipe(
        condition="no_gate",
        temperature=0.7,
        updates=2,
        epochs=2,
        clip_low=0.05,
        clip_high=0.1,
        learning_rate=1e-2,
        weight_decay=0.1,
        clip_grad=0.5,
    )
    twin = copy.deepcopy(model)
    result = dense_update(model, examples, recipe)
    assert len(result.losses) == len(result.weights) == 4
    product = Product(examples, recipe, result)
    matrices = [p for p in twin.parameters() if p.dim() > 1]
    vectors = [p for p in twin.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )
    for k in range(4):
        rows = product.segment < 4 if k % 2 == 0 else product.segment >= 4
        loss, clipped = product.loss(recipe, live_logprobs(twin, examples, 0.7), result.lam, rows)
        optimizer.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(result.losses[k], abs=1e-11)
        assert int(clipped.sum()) == result.clipped[k]
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        assert norm.item() == pytest.approx(result.grad_norms[k], rel=1e-9)
        optimizer.step()
        for name, p in twin.named_parameters():
            torch.testing.assert_close(result.weights[k][name], p.detach(), rtol=1e-8, atol=1e-10)
    assert result.clipped[0] == 0 and min(result.clipped[2:]) > 0


def test_gradient_against_finite_differences(model: Any, examples: list[Example]) -> None:
    recipe = DenseRecipe(condition="no_gate", temperature=0.7)
    result = dense_update(model, examples, recipe)
    product = Product(examples, recipe, result)  # advantages stay as they were: constants of the policy gradient
    g = torch.Generator().manual_seed(5)
    direction = {n: torch.randn(p.shape, dtype=p.dtype, generator=g) for n, p in model.named_parameters()}
    slope = sum(float((result.gradients[0][n] * d).sum()) for n, d in direction.items())
    step = 1e-6

    @torch.no_grad()
    def loss_at(distance: float) -> float:
        for n, p in model.named_parameters():
            p += distance * direction[n]
        value = product.loss(recipe, live_logprobs(model, examples, 0.7), result.lam)[0].item()
        for n, p in model.named_parameters():
            p -= distance * direction[n]
        return value

    assert (loss_at(step) - loss_at(-step)) / (2 * step) == pytest.approx(slope, rel=1e-6)


def test_memory_goes_on_over_steps(model: Any, examples: list[Example]) -> None:
    """Two steps with one optimizer are not two first steps; the second step's scores are under the updated weights."""
    recipe = DenseRecipe(condition="sd", learning_rate=1e-3)
    adam, gate = DenseAdam(), DenseGate()
    first = dense_update(model, examples, recipe, gate, adam)
    second = dense_update(model, examples, recipe, gate, adam)
    assert adam.step == 2
    name = "lm_head.weight"
    assert not torch.equal(first.weights[0][name], second.weights[0][name])
    assert not torch.equal(first.student_logprobs[0], second.student_logprobs[0])


def test_an_update_without_tokens_leaves_a_zero_gradient(model: Any, examples: list[Example]) -> None:
    truncated = [e for e in examples if e.rollout.truncated]
    result = dense_update(model, truncated, DenseRecipe(mask_truncated=True))
    assert result.median_entropy is None and result.losses == [0.0] and result.grad_norms == [0.0]
