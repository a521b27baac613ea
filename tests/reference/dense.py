"""The whole AntiSD update, dense and obvious: plain PyTorch in float64 on a `transformers` model, one sequence at a
time, full logits.

Written from the paper's text and the decisions about what it leaves open, on purpose without any import of the
product's formulas, so that it can check them. Only the containers (`Example`) are shared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from asd_megatron.records import Example

UNGATED = ("grpo", "sd", "no_gate")


@dataclass(frozen=True)
class DensePerplexity:
    """Lambda from the teacher's perplexity (the released code's form)."""

    lambda_0: float = 0.1
    alpha: float = 2.0
    lambda_min: float = -0.02
    cutoff: float = 3.0
    scope: str = "response"  # batch
    shift: str = "none"  # negative, always
    ratio: float | None = None
    offset: float = 0.1
    target: float | None = None


@dataclass(frozen=True)
class DenseRecipe:
    """The settings of one run. `learning_rate` None: gradients only, the weights stay."""

    condition: str = "antisd"
    temperature: float = 1.0
    lambda_max: float = 0.5
    warmup_steps: int | None = None  # None: 5 with a gate, else 0
    tau_down: float = 0.93
    tau_up: float = 1.0
    aggregation: str = "token_mean"
    constant_length: int = 1
    policy_loss: str = "ppo_clip"  # gspo, cispo
    clip_low: float = 0.2
    clip_high: float = 0.2
    entropy_coefficient: float = 0.0
    updates: int = 1
    epochs: int = 1
    pmi_clip: float = math.inf
    term_normalization: str = "none"
    term_clip: float = math.inf
    term_max_position: float = math.inf
    term_max_length: float = math.inf
    composition: str | None = None  # additive, multiplicative, multiplicative_plain, rlsd; None: the condition's
    advantage_weight: float = 1.0
    outlier_deviations: float | None = None
    perplexity: DensePerplexity | None = None  # None: lambda comes from the entropy gate
    importance: str = "none"  # truncated, masked
    importance_level: str = "token"  # sequence, geometric
    importance_cap: float = 2.0
    importance_floor: float = 0.5
    mask_truncated: bool = False
    divergence: str | None = None  # jensen_shannon, reverse_kl, forward_kl: the exact estimator
    ascend: bool = True
    mixture: float = 0.5
    teacher: str = "live"  # initial, ema: whose weights score the privileged sequences
    ema_rate: float = 0.05
    kl: str | None = None  # k1, k2, k3: a penalty on the divergence from the initial weights
    kl_coefficient: float = 0.0
    learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0


@dataclass
class DenseGate:
    """What the gate and its alternatives remember from step to step."""

    open: bool = True
    h_warm: float | None = None
    warmup: list[float] = field(default_factory=list)
    perplexities: list[float] = field(default_factory=list)  # mean over the responses, of every warm-up step
    deviations: list[float] = field(default_factory=list)  # of u, of every warm-up step


@dataclass
class DenseAdam:
    """What AdamW remembers from update to update, by parameter name."""

    step: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)


class DenseModels:
    """The models beside the trained one: as training started, and the moving average over the updates."""

    def __init__(self, model: Any) -> None:
        self.initial, self.ema = copy.deepcopy(model), copy.deepcopy(model)

    @torch.no_grad()
    def follow(self, model: Any, rate: float) -> None:
        for average, p in zip(self.ema.parameters(), model.parameters(), strict=True):
            average.copy_((1 - rate) * average + rate * p)


@dataclass
class DenseResult:
    """Everything that one step computes. Lists are per rollout ([T] float64; None for a teacher that was not asked) or
    per update."""

    student_logprobs: list[Tensor]
    student_entropy: list[Tensor]
    teacher_logprobs: list[Tensor | None]
    teacher_entropy: list[Tensor | None]
    pmi: list[Tensor]
    term: list[Tensor]
    advantage: list[Tensor]
    importance: list[Tensor]
    median_entropy: float | None
    lam: float  # the responses' mean, where each has its own
    lams: list[float]  # of every rollout
    perplexities: list[float | None]  # the teacher's, of every rollout
    teacher_distributions: list[Tensor | None]  # log q [T, V], for the exact estimator
    acts: list[Tensor]  # tokens that carry a term
    reference_logprobs: list[Tensor] = field(default_factory=list)  # under the initial weights, with a KL penalty
    losses: list[float] = field(default_factory=list)
    clipped: list[int] = field(default_factory=list)  # tokens whose gradient the clip removed
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # of the loss, before gradient clipping
    grad_norms: list[float] = field(default_factory=list)
    weights: list[dict[str, Tensor]] = field(default_factory=list)  # after each update


def exact(model: Any) -> Any:
    """The model in float64 throughout, in place: `transformers` computes its RMS norms in float32 whatever the weights
    are.

    (Rotary angles stay float32, as everywhere; they are constants.)
    """

    def rms_norm(module: Any, x: Tensor) -> Tensor:
        return module.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + module.variance_epsilon)

    model.double().eval()
    model.set_attn_implementation("sdpa")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(rms_norm, module)  # a method, so that a deep copy has its own
    return model


def distributions(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], temperature: float
) -> list[Tensor]:
    """For every response, log-probabilities [T, V] of the distributions that its tokens are drawn from.

    One batch, filled up at the end: attention is causal, so no token sees the filling.
    """
    rows = [torch.tensor([*p, *r]) for p, r in zip(prompts, responses, strict=True)]
    if not rows:
        return []
    logits = model(input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), use_cache=False).logits
    return [
        torch.log_softmax(row[len(p) - 1 : len(p) + len(r) - 1] / temperature, dim=-1)
        for row, p, r in zip(logits, prompts, responses, strict=True)
    ]


def score(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], temperature: float
) -> list[tuple[Tensor, Tensor]]:
    """Log-probability of every response token and the entropy of the distribution it was drawn from: two [T] each."""
    return [
        (logp[range(len(response)), list(response)], -(logp.exp() * logp).sum(-1))
        for logp, response in zip(distributions(model, prompts, responses, temperature), responses, strict=True)
    ]


def lower_median(values: Sequence[float]) -> float | None:
    """The smaller of the two middle values of an even count."""
    return sorted(values)[(len(values) - 1) // 2] if values else None


def gate_step(recipe: DenseRecipe, gate: DenseGate, h: float | None) -> float:
    """Eq. 7: this step's lambda; `gate` is brought up to date."""
    if recipe.condition == "grpo":
        return 0.0
    warmup_steps = recipe.warmup_steps
    if warmup_steps is None:
        warmup_steps = 0 if recipe.condition in UNGATED else 5
    if len(gate.warmup) < warmup_steps:
        if h is not None:
            gate.warmup.append(h)
        if len(gate.warmup) == warmup_steps:
            gate.h_warm = lower_median(gate.warmup)
        return 0.0
    if recipe.condition not in UNGATED and h is not None:
        assert gate.h_warm is not None
        gate.open = h >= recipe.tau_down * gate.h_warm if gate.open else h >= recipe.tau_up * gate.h_warm
    return recipe.lambda_max if gate.open else 0.0


def perplexities_of(teacher: Sequence[tuple[Tensor, Tensor] | None], counts: Sequence[Tensor]) -> list[float | None]:
    """The teacher's perplexity of every response; None for one that it did not score or that does not count."""
    found: list[float | None] = []
    for scored, m in zip(teacher, counts, strict=True):
        tokens = [] if scored is None else scored[0][m].tolist()
        found.append(math.exp(-sum(tokens) / len(tokens)) if tokens else None)
    return found


def perplexity_step(
    recipe: DenseRecipe, p: DensePerplexity, memory: DenseGate, found: Sequence[float | None]
) -> list[float]:
    """This step's lambda of every response; `memory` is brought up to date."""
    known = [x for x in found if x is not None]
    if not known:
        return [0.0] * len(found)
    warmup_steps = 5 if recipe.warmup_steps is None else recipe.warmup_steps
    usable = [x for x in memory.perplexities if x < 10]
    if len(memory.perplexities) < warmup_steps or (p.target is None and not usable):
        memory.perplexities.append(sum(known) / len(known))
        return [0.0] * len(found)
    target = p.target
    if target is None:
        median = lower_median(usable)
        assert median is not None
        target = max(1.01, median - p.offset if p.ratio is None else p.ratio * median)

    def bounded(x: float, low: float, high: float) -> float:
        return min(max(x, low), high)

    logs = [math.log(bounded(x / target, 0.5, 3.0)) for x in known]
    if p.scope == "batch":
        logs = [sum(logs) / len(logs)] * len(logs)
    lams = [bounded(p.lambda_0 * p.alpha * x, p.lambda_min, recipe.lambda_max) for x in logs]
    within = [x <= p.cutoff for x in known]
    mean = sum(lam for lam, ok in zip(lams, within, strict=True) if ok) / max(sum(within), 1)
    if p.shift == "always" or (p.shift == "negative" and mean < 0):
        lams = [lam - mean for lam in lams]
    rest = iter([lam if ok else 0.0 for lam, ok in zip(lams, within, strict=True)])
    return [0.0 if x is None else next(rest) for x in found]


def minus_f_prime(u: Tensor) -> Tensor:
    """Minus f'(r) = 1/2 log(2 r / (1 + r)) of the Jensen-Shannon divergence at r = pi_S / pi_T = exp(-u)."""
    return -(math.log(2) - u - torch.logaddexp(torch.zeros_like(u), -u)) / 2


def divergence(recipe: DenseRecipe, logp: Tensor, logq: Tensor) -> Tensor:
    """D of every token [T] from the student's and the teacher's log-probabilities [T, V]."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if recipe.divergence == "reverse_kl":
        return kl(logp, logq)
    if recipe.divergence == "forward_kl":
        return kl(logq, logp)
    b = recipe.mixture
    logm = (b * logq.exp() + (1 - b) * logp.exp()).log()
    return b * kl(logq, logm) + (1 - b) * kl(logp, logm)


def per_token_term(
    recipe: DenseRecipe, pmi: Sequence[Tensor], acts: Sequence[Tensor], limit: float = math.inf
) -> list[Tensor]:
    """What lambda multiplies, before its sign: shaped, scaled over the tokens where it acts, clamped, 0 elsewhere.
    `limit`: a |u| beyond it counts as 0."""
    ordinary = [torch.stack([x if abs(float(x)) <= limit else 0 * x for x in u]) if len(u) else u for u in pmi]
    shaped = [u.clamp(-recipe.pmi_clip, recipe.pmi_clip) for u in ordinary]
    if recipe.condition not in ("sd", "reverse_kl_ascent"):
        shaped = [minus_f_prime(u) for u in shaped]
    everywhere = torch.cat([q[m] for q, m in zip(shaped, acts, strict=True)])
    out = []
    for q, m in zip(shaped, acts, strict=True):
        over = {"none": None, "sequence": q[m], "demean": q[m], "batch": everywhere}
        population = over[recipe.term_normalization]
        if population is not None and len(population) and recipe.term_normalization == "demean":
            q = q - population.mean()
        elif population is not None and len(population):
            spread = ((population - population.mean()) ** 2).mean().sqrt()
            q = (q - population.mean()) / max(spread.item(), 1e-6)
        q = q.clamp(-recipe.term_clip, recipe.term_clip)
        out.append(torch.where(m, q, 0.0))
    return out


def advantage(condition: str, a: float, q: Tensor, lam: float, composition: str | None = None) -> Tensor:
    """The paper's table of conditions, one formula each, and the released code's compositions."""
    sign = (a > 0) - (a < 0)
    if condition == "grpo":
        return torch.full_like(q, a)
    towards = q if condition == "sd" else -q
    if composition == "multiplicative_plain":
        return a * (1 + lam * towards)
    if composition == "rlsd":
        factors = [min(max(math.exp(sign * x), 0.8), 1.2) for x in towards.tolist()]
        return q.new_tensor([a * ((1 - lam) + lam * w) for w in factors])
    if condition == "sd" and composition != "multiplicative":
        return a + lam * q
    if "multiplicative" in (condition, composition):
        if condition == "sd":
            q = -q
        return torch.stack([q.new_tensor(a * max(0.0, 1 - lam * x * sign)) for x in q.tolist()]) if len(q) else q
    return a - lam * q


def importance(recipe: DenseRecipe, scoring: Tensor, behaviour: Tensor, counts: Tensor) -> Tensor:
    """What a response's tokens are worth in the loss, [T]: how much likelier they were than to whatever sampled them.
    `counts`: tokens that the loss sees."""
    if recipe.importance == "none":
        return torch.ones_like(scoring)
    ratios = scoring.exp() / behaviour.exp()
    if recipe.importance_level != "token":
        n = int(counts.sum())
        product = math.prod(ratios[counts].tolist())
        ratios = torch.full_like(
            ratios, product if recipe.importance_level == "sequence" else product ** (1 / (n or 1))
        )
    if recipe.importance == "truncated":
        return scoring.new_tensor([min(w, recipe.importance_cap) for w in ratios.tolist()])
    kept = [w if recipe.importance_floor <= w <= recipe.importance_cap else 0.0 for w in ratios.tolist()]
    return scoring.new_tensor(kept)


def dense_update(
    model: Any,
    examples: Sequence[Example],
    recipe: DenseRecipe,
    gate: DenseGate | None = None,
    adam: DenseAdam | None = None,
    mini_batches: Sequence[Sequence[int]] | None = None,
    models: DenseModels | None = None,
) -> DenseResult:
    """One whole step: scores, gate, advantages, then every update.

    Args:
        model: a float64 `transformers` causal language model (see `exact`); its weights change when the recipe has a
            learning rate.
        examples: rewarded rollouts with their group advantages.
        gate, adam, models: memory, changed in place; None: new.
        mini_batches: indices of each update's examples; None: `recipe.updates` contiguous ones of equal size, the first
            ones one longer when it does not divide. Repeated `recipe.epochs` times.
    """
    gate = DenseGate() if gate is None else gate
    adam = DenseAdam() if adam is None else adam
    if models is None and (recipe.teacher != "live" or recipe.kl is not None):
        models = DenseModels(model)
    result = score_batch(model, examples, recipe, gate, models)
    if mini_batches is None:
        rest = list(range(len(examples)))
        mini_batches = []
        for k in range(recipe.updates, 0, -1):
            size = -(-len(rest) // k)
            mini_batches.append(rest[:size])
            rest = rest[size:]
    for chosen in [m for _ in range(recipe.epochs) for m in mini_batches]:
        _one_update(model, examples, recipe, result, adam, chosen)
        if models is not None:
            models.follow(model, recipe.ema_rate)
    return result


def loss_tokens(example: Example, recipe: DenseRecipe) -> Tensor:
    """Which response tokens count: sampled ones, none of a truncated response when the recipe masks those. Bool [T]."""
    sampled = torch.tensor(example.rollout.loss_mask, dtype=torch.bool)
    return torch.zeros_like(sampled) if recipe.mask_truncated and example.rollout.truncated else sampled


@torch.no_grad()
def score_batch(
    model: Any,
    examples: Sequence[Example],
    recipe: DenseRecipe,
    gate: DenseGate,
    models: DenseModels | None = None,
) -> DenseResult:
    """Steps 1 to 9 of Algorithm 1: everything before the update, under the weights as they are."""
    teaching = model if recipe.teacher == "live" or models is None else getattr(models, recipe.teacher)
    prompts = [e.rollout.prompt_ids.tolist() for e in examples]
    responses = [e.rollout.response_ids.tolist() for e in examples]
    taught = [i for i, e in enumerate(examples) if e.teacher_prompt_ids is not None]
    contexts = [list(examples[i].teacher_prompt_ids) for i in taught], [responses[i] for i in taught]
    student = score(model, prompts, responses, recipe.temperature)
    teacher: list[tuple[Tensor, Tensor] | None] = [None] * len(examples)
    for i, scores in zip(taught, score(teaching, *contexts, recipe.temperature), strict=True):
        teacher[i] = scores

    no_teacher = recipe.condition == "no_teacher"
    pmi, listened, acts, entropies = [], [], [], []
    for e, s, t in zip(examples, student, teacher, strict=True):
        if no_teacher:
            pmi.append(-s[0])
        else:
            pmi.append(torch.zeros_like(s[0]) if t is None else t[0] - s[0])
        counts = loss_tokens(e, recipe) & (no_teacher or t is not None)
        listened.append(counts)
        short = len(counts) < recipe.term_max_length
        acts.append(counts & (torch.arange(len(counts)) < recipe.term_max_position) & short)
        source = s if recipe.condition in ("student_entropy_gate", "no_teacher") else t
        if source is not None:
            entropies += source[1][counts].tolist()

    h = lower_median(entropies)
    found = perplexities_of(teacher, listened)
    if recipe.perplexity is None:
        lams = [gate_step(recipe, gate, h)] * len(examples)
        lam = lams[0]
    else:
        lams = perplexity_step(recipe, recipe.perplexity, gate, found)
        known = [x for x, p in zip(lams, found, strict=True) if p is not None]
        lam = sum(known) / len(known) if known else 0.0
    limit = math.inf
    if recipe.outlier_deviations is not None:
        warmup_steps = 5 if recipe.warmup_steps is None else recipe.warmup_steps
        if len(gate.deviations) >= warmup_steps:
            limit = recipe.outlier_deviations * sum(gate.deviations) / len(gate.deviations)
        else:
            every = torch.cat([u[m] for u, m in zip(pmi, acts, strict=True)])
            if len(every):
                gate.deviations.append(float(every.std(correction=0)))
    teachers: list[Tensor | None] = [None] * len(examples)
    if recipe.divergence is None:
        term = per_token_term(recipe, pmi, acts, limit)
    else:
        for i, logq in zip(taught, distributions(teaching, *contexts, recipe.temperature), strict=True):
            teachers[i] = logq
        term = [
            torch.where(acts[i], divergence(recipe, logp, logp if teachers[i] is None else teachers[i]), 0)
            for i, logp in enumerate(distributions(model, prompts, responses, recipe.temperature))
        ]
    advantages = [
        advantage(
            "grpo" if recipe.divergence else recipe.condition,
            recipe.advantage_weight * e.group_advantage,
            q,
            lams[i],
            recipe.composition,
        )
        for i, (e, q) in enumerate(zip(examples, term, strict=True))
    ]
    reference = []
    if recipe.kl is not None and models is not None:
        reference = [logprobs for logprobs, _ in score(models.initial, prompts, responses, recipe.temperature)]
        if recipe.kl == "k1":
            advantages = [
                a - recipe.kl_coefficient * (s[0] - r) for a, s, r in zip(advantages, student, reference, strict=True)
            ]
    return DenseResult(
        student_logprobs=[s[0] for s in student],
        student_entropy=[s[1] for s in student],
        teacher_logprobs=[None if t is None else t[0] for t in teacher],
        teacher_entropy=[None if t is None else t[1] for t in teacher],
        pmi=pmi,
        term=term,
        advantage=advantages,
        importance=[
            importance(recipe, s[0], torch.tensor(e.rollout.logprobs, dtype=torch.float64), loss_tokens(e, recipe))
            for e, s in zip(examples, student, strict=True)
        ],
        median_entropy=h,
        lam=lam,
        lams=lams,
        perplexities=found,
        teacher_distributions=teachers,
        acts=acts,
        reference_logprobs=reference,
    )


def _one_update(
    model: Any,
    examples: Sequence[Example],
    recipe: DenseRecipe,
    result: DenseResult,
    adam: DenseAdam,
    chosen: Sequence[int],
) -> None:
    """One mini-batch: the clipped policy gradient over its own global denominators, then AdamW."""
    masks = {i: mask for i in chosen if (mask := loss_tokens(examples[i], recipe)).any()}
    tokens = sum(int(m.sum()) for m in masks.values())
    sequences = len(masks)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    model.zero_grad(set_to_none=True)
    total, clipped_tokens = torch.zeros((), dtype=torch.float64), 0
    rollouts = [examples[i].rollout for i in masks]
    prompts, responses = [r.prompt_ids.tolist() for r in rollouts], [r.response_ids.tolist() for r in rollouts]
    for (i, mask), logp in zip(
        masks.items(), distributions(model, prompts, responses, recipe.temperature), strict=True
    ):
        response = examples[i].rollout.response_ids
        now = logp[range(len(response)), list(response)]
        old, a = result.student_logprobs[i], result.advantage[i]
        ratio = (now - old).exp()
        if recipe.policy_loss == "gspo":  # each token has the response's ratio, and the gradient of its own log-prob
            product = math.exp(sum((now - old)[mask].tolist()) / int(mask.sum()))
            ratio = product * now.exp() / now.exp().detach()
        plain = ratio * a
        bounded = ratio.clamp(1 - recipe.clip_low, 1 + recipe.clip_high) * a
        objective = torch.where(bounded < plain, bounded, plain) * result.importance[i]
        if recipe.policy_loss == "cispo":
            cut = [min(max(r, 1 - recipe.clip_low), 1 + recipe.clip_high) for r in ratio.tolist()]
            objective = now * a * now.new_tensor(cut) * result.importance[i]
        denominator = {
            "token_mean": tokens,
            "sequence_mean": int(mask.sum()) * sequences,
            "constant_length": recipe.constant_length * sequences,
        }[recipe.aggregation]
        loss = -objective[mask].sum() / denominator
        logq = result.teacher_distributions[i]
        if logq is not None:
            sign = -1 if recipe.ascend else 1
            loss = loss + sign * result.lams[i] * divergence(recipe, logp, logq)[result.acts[i]].sum() / denominator
        entropy = -(logp.exp() * logp).sum(-1)
        loss = loss - recipe.entropy_coefficient * entropy[mask].sum() / denominator
        if recipe.kl in ("k2", "k3"):
            log_ratio = result.reference_logprobs[i] - now
            estimate = log_ratio**2 / 2 if recipe.kl == "k2" else log_ratio.exp() - 1 - log_ratio
            penalty = (estimate * result.importance[i])[mask].sum()
            loss = loss + recipe.kl_coefficient * penalty / denominator
        total = total + loss
        beyond = (ratio < 1 - recipe.clip_low) | (ratio > 1 + recipe.clip_high)
        clipped_tokens += int((beyond if recipe.policy_loss == "cispo" else bounded < plain)[mask].sum())
    if masks:
        total.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
    result.losses.append(total.item())
    result.clipped.append(clipped_tokens)
    result.gradients.append(gradients)
    result.grad_norms.append(norm)
    if recipe.learning_rate is not None:
        scale = min(1.0, recipe.clip_grad / (norm + 1e-6))
        adamw(parameters, {n: g * scale for n, g in gradients.items()}, recipe, adam, recipe.learning_rate)
        result.weights.append({n: p.detach().clone() for n, p in parameters.items()})


@torch.no_grad()
def adamw(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    recipe: DenseRecipe,
    adam: DenseAdam,
    learning_rate: float,
) -> None:
    """Decoupled weight decay on matrices (not on norms and biases), then Adam with bias correction."""
    adam.step += 1
    for name, p in parameters.items():
        g = gradients[name]
        m = recipe.beta1 * adam.first.get(name, torch.zeros_like(p)) + (1 - recipe.beta1) * g
        v = recipe.beta2 * adam.second.get(name, torch.zeros_like(p)) + (1 - recipe.beta2) * g * g
        adam.first[name], adam.second[name] = m, v
        if p.dim() > 1 and not name.endswith(".bias"):
            p -= learning_rate * recipe.weight_decay * p
        m_hat, v_hat = m / (1 - recipe.beta1**adam.step), v / (1 - recipe.beta2**adam.step)
        p -= learning_rate * m_hat / (v_hat.sqrt() + recipe.epsilon)
