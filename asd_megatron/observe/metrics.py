"""The numbers of one step, computed on rank 0 from the global batch. Names, units and meanings: `observe/names.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from asd_megatron.antisd import context_tokens, kl_estimates
from asd_megatron.observe.dumps import DIVERGENCES, NEED_CONTEXT
from asd_megatron.observe.names import PHASES, QUANTILES
from asd_megatron.records import DemonstrationSource, Example, TokenTable, flat

NAN = float("nan")


@dataclass(frozen=True)
class GateReading:
    """The gate as the step's loss saw it. Entropies in nats; None where there is none yet.

    `entropy` is H, the median that the gate read; `close_below` is tau_down * H_warm.
    """

    open: bool
    lam: float
    entropy: float | None = None
    h_warm: float | None = None
    close_below: float | None = None
    warming_up: bool = False


@dataclass(frozen=True)
class PerplexityReading:
    """Lambda from the teacher's perplexity as the step's loss saw it.

    `perplexities` and `lambdas` are float64 [R], one for each of the step's examples; a perplexity is NaN where no
    token counts. `target` is P*, None while it is being measured.
    """

    perplexities: Tensor
    lambdas: Tensor
    cutoff: float
    target: float | None = None
    warming_up: bool = False

    @property
    def counted(self) -> Tensor:
        """Bool [R]: examples with a perplexity."""
        return ~self.perplexities.isnan()

    @property
    def lam(self) -> float:
        """The mean lambda of the examples with a perplexity; 0 without any."""
        counted = self.counted
        return float(self.lambdas[counted].mean()) if counted.any() else 0.0


EXAMPLE_COUNTERS = {
    "demonstration_shortened": "demonstration/shortened",
    "demonstration_empty": "demonstration/empty",
    "teacher_too_long": "demonstration/too_long",
    "undecodable_tokens": "rollouts/undecodable_tokens",
}
ROLLOUT_COUNTERS = {
    "aborted_rollouts": "rollouts/aborted",
    "redrawn_groups": "rollouts/redrawn_groups",
    "dropped_groups": "rollouts/dropped_groups",
    "stale_groups": "rollouts/stale_groups",
    "cut_groups": "rollouts/cut_groups",
    "judged_groups": "rollouts/judged_groups",
    "rejected_groups": "rollouts/rejected_groups",
    "short_groups": "rollouts/short_groups",
    "carried_groups": "rollouts/carried_groups",
    "restored_groups": "rollouts/restored_groups",
    "restored_tokens": "rollouts/restored_tokens",
    "dropped_tokens": "rollouts/dropped_tokens",
}
REWARD_COUNTERS = {name: f"reward/{name}" for name in ("timeouts", "errors", "restarts", "truncated", "no_code")}


class Increments:
    """The increments of the counters of example builder, collector and verifier since the last call."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def of(
        self, *, examples: Mapping[str, int], rollouts: Mapping[str, int], rewards: Mapping[str, int]
    ) -> dict[str, float]:
        """Metrics `demonstration/*`, `rollouts/*` and `reward/*`; a counter that is absent has not counted."""
        sources = ((EXAMPLE_COUNTERS, examples), (ROLLOUT_COUNTERS, rollouts), (REWARD_COUNTERS, rewards))
        now = {metric: counts.get(name, 0) for names, counts in sources for name, metric in names.items()}
        grown = {metric: float(count - self._seen.get(metric, 0)) for metric, count in now.items()}
        self._seen = now
        judged, rejected = grown["rollouts/judged_groups"], grown["rollouts/rejected_groups"]
        return {**grown, "rollouts/rejected_share": rejected / judged} if judged else grown


def sampled_mask(examples: Sequence[Example]) -> Tensor:
    """Bool [N]: response tokens that the policy sampled, flat over the examples."""
    return flat([e.rollout.loss_mask for e in examples], torch.bool)


def context_mask(examples: Sequence[Example], table: TokenTable) -> Tensor:
    """Bool [N]: tokens whose u means something: those of rollouts with context, or all where no teacher was scored."""
    if "teacher_logprobs" not in table:
        return torch.ones(table.tokens, dtype=torch.bool)
    return table.spread(torch.tensor([e.has_context for e in examples], dtype=torch.bool))


def _loss_mask(examples: Sequence[Example], table: TokenTable) -> Tensor:
    """Bool [N]: tokens that the loss sees; the sampled ones where the table does not say."""
    return table["loss_mask"].to("cpu", torch.bool) if "loss_mask" in table else sampled_mask(examples)


def _finite(values: Tensor) -> np.ndarray:
    array = values.detach().to("cpu", torch.float64).numpy()
    return array[np.isfinite(array)]


def _mean(values: Tensor) -> float:
    finite = _finite(values)
    return float(finite.mean()) if finite.size else NAN


def _lower_median(values: Tensor) -> float:
    finite = _finite(values)
    return float(np.quantile(finite, 0.5, method="inverted_cdf")) if finite.size else NAN


def _distribution(prefix: str, values: Tensor) -> Iterator[tuple[str, float]]:
    finite = _finite(values)
    yield f"{prefix}/mean", float(finite.mean()) if finite.size else NAN
    at = np.quantile(finite, list(QUANTILES.values()), method="inverted_cdf") if finite.size else [NAN] * len(QUANTILES)
    yield from zip((f"{prefix}/{q}" for q in QUANTILES), map(float, at), strict=True)
    yield f"{prefix}/negative_share", float((finite < 0).mean()) if finite.size else NAN


def _of_rollouts(examples: Sequence[Example], success_threshold: float) -> Iterator[tuple[str, float]]:
    rewards = [e.reward for e in examples]
    lengths = [len(e.rollout.response_ids) for e in examples]
    groups = [[e.reward for e in group] for _, group in groupby(examples, key=lambda e: e.rollout.prompt_id)]
    yield "reward/mean", _average(rewards)
    yield "reward/pass_rate", _average([r >= success_threshold for r in rewards])
    yield "reward/mixed_groups", _average([min(g) != max(g) for g in groups])
    penalties = [e.overlong_penalty for e in examples if e.overlong_penalty is not None]
    if penalties:
        yield "reward/overlong_share", _average([p < 0 for p in penalties])
        yield "reward/overlong_mean", _average(penalties)
    yield "response/length_mean", _average(lengths)
    yield "response/length_max", float(max(lengths, default=0))
    yield "response/truncated", _average([e.rollout.truncated for e in examples])
    yield "rollouts/total", float(len(examples))


def _of_contexts(examples: Sequence[Example]) -> Iterator[tuple[str, float]]:
    with_context = sum(e.has_context for e in examples)
    yield "rollouts/masked", float(len(examples) - with_context)
    yield "pmi/coverage", with_context / len(examples) if examples else NAN
    for source in DemonstrationSource:
        yield f"demonstration/{source.value}", float(sum(e.demonstration_source is source for e in examples))


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else NAN


def _of_tokens(examples: Sequence[Example], table: TokenTable) -> Iterator[tuple[str, float]]:
    sampled = sampled_mask(examples)
    with_context = sampled & context_mask(examples, table)
    loss_mask = _loss_mask(examples, table)

    if "student_entropy" in table:
        student = table["student_entropy"].cpu()[loss_mask]
        yield "entropy/student_mean", _mean(student)
        yield "entropy/student_median", _lower_median(student)
    if "teacher_entropy" in table:
        counted = context_tokens(loss_mask, context_mask(examples, table))  # as for the gate's H
        teacher = table["teacher_entropy"].cpu()[counted]
        yield "entropy/teacher_mean", _mean(teacher)
        yield "entropy/teacher_median", _lower_median(teacher)
    for name in ("pmi", "term"):
        if name in table:
            yield from _distribution(name, table[name].cpu()[with_context])
    if "divergence" in table:
        for name in DIVERGENCES:
            yield f"divergence/{'mean' if name == 'divergence' else name}", _mean(table[name].cpu()[with_context])
    if "advantage" in table:
        advantage = _finite(table["advantage"].cpu()[loss_mask])
        yield "advantage/mean", float(advantage.mean()) if advantage.size else NAN
        yield "advantage/std", float(advantage.std()) if advantage.size else NAN
        yield "advantage/abs_mean", float(np.abs(advantage).mean()) if advantage.size else NAN
    if "reference_logprobs" in table:
        student, reference = (table[f"{of}_logprobs"].cpu().double()[loss_mask] for of in ("student", "reference"))
        yield from ((f"kl/{name}", _mean(k)) for name, k in kl_estimates(student, reference)._asdict().items())
    if "update_logprobs" in table:
        drift = table["update_logprobs"].cpu().double() - table["student_logprobs"].cpu().double()
        yield "fp8/update_drift", _mean(drift.abs()[loss_mask])
    if "clipped" in table:
        yield "loss/clip_fraction", _mean(table["clipped"].cpu()[loss_mask])
        yield "loss/clipped_responses", _of_responses(table, table["clipped"].cpu() > 0, loss_mask)
    if "importance" in table:
        yield "importance/mean", _mean(table["importance"].cpu()[loss_mask])
        yield "importance/affected", _mean(table["importance_affected"].cpu()[loss_mask])
    if "student_logprobs" in table:
        yield from _mismatch(examples, table, loss_mask)

    prompt = sum(len(e.rollout.prompt_ids) for e in examples)
    teacher_tokens = sum(
        len(e.teacher_prompt_ids) + len(e.rollout.response_ids) for e in examples if e.teacher_prompt_ids is not None
    )
    yield "tokens/prompt", float(prompt)
    yield "tokens/response", float(table.tokens)
    yield "tokens/teacher", float(teacher_tokens if "teacher_logprobs" in table else 0)
    yield "tokens/trained", float(loss_mask.sum())
    yield "tokens/not_finite", float(_not_finite(table, sampled, with_context))


def _of_responses(table: TokenTable, flags: Tensor, loss_mask: Tensor) -> float:
    """The fraction of the responses that the loss sees with a flagged token among those that it sees."""
    owner = table.spread(torch.arange(table.rollouts))
    seen, flagged = owner[loss_mask].unique().numel(), owner[loss_mask & flags].unique().numel()
    return flagged / seen if seen else NAN


def _of_packs(total: int, real: int, sequences: int) -> Iterator[tuple[str, float]]:
    yield "tokens/computed", float(total)
    yield "tokens/padding_share", 1 - real / total if total else NAN
    yield "tokens/shared_share", 1 - real / sequences if sequences else NAN


def _mismatch(examples: Sequence[Example], table: TokenTable, loss_mask: Tensor) -> Iterator[tuple[str, float]]:
    """The engine's log-probs against the trainer's (d = trainer - engine), over the tokens that the loss sees."""
    engine = flat([e.rollout.logprobs for e in examples], torch.float64)
    d = table["student_logprobs"].cpu().to(torch.float64) - engine
    counts = loss_mask & torch.isfinite(d)
    by_rollout = torch.zeros(table.rollouts, dtype=torch.float64)
    owner = table.spread(torch.arange(table.rollouts))[counts]
    by_rollout.index_add_(0, owner, d[counts])
    found = d[counts].numpy()
    yield "mismatch/max_abs", float(np.abs(found).max()) if found.size else NAN
    yield "mismatch/mean_abs", float(np.abs(found).mean()) if found.size else NAN
    with np.errstate(over="ignore"):
        yield "mismatch/k3", float((np.expm1(found) - found).mean()) if found.size else NAN
    yield "mismatch/ess", _effective_fraction(found)
    yield "mismatch/ess_sequence", _effective_fraction(by_rollout[owner.unique()].numpy())


def _effective_fraction(log_weights: np.ndarray) -> float:
    """(sum w)^2 / (n * sum w^2), in (0, 1]: effective sample size over n."""
    if not log_weights.size:
        return NAN
    w = np.exp(log_weights - log_weights.max())  # the scale cancels: no overflow
    return min(1.0, float(w.sum() ** 2 / (w.size * np.square(w).sum())))  # rounding may lie above


def _of_versions(examples: Sequence[Example], step: int) -> Iterator[tuple[str, float]]:
    behind = [step - 1 - e.rollout.weight_version for e in examples]
    yield "rollouts/stale", _average(behind)
    yield "rollouts/stale_max", float(max(behind, default=0))
    yield "rollouts/across_versions", float(sum(e.rollout.across_versions for e in examples))


def _not_finite(table: TokenTable, sampled: Tensor, with_context: Tensor) -> int:
    """Tokens with a non-finite number in any column that holds for them."""
    bad = torch.zeros(table.tokens, dtype=torch.bool)
    for name, column in table.columns.items():
        if column.is_floating_point():
            needs_context = name in (*NEED_CONTEXT, "term")
            bad |= ~torch.isfinite(column.cpu()) & (with_context if needs_context else sampled)
    return int(bad.sum())


def _of_gate(gate: GateReading, tokens: int) -> Iterator[tuple[str, float]]:
    yield "gate/open", float(gate.open)
    yield "gate/lambda", gate.lam
    yield "gate/entropy", NAN if gate.entropy is None else gate.entropy
    yield "gate/tokens", float(tokens)
    yield "gate/h_warm", NAN if gate.h_warm is None else gate.h_warm
    yield "gate/close_below", NAN if gate.close_below is None else gate.close_below
    yield "gate/warming_up", float(gate.warming_up)


def _of_perplexity(reading: PerplexityReading) -> Iterator[tuple[str, float]]:
    perplexities, lambdas = reading.perplexities[reading.counted], reading.lambdas[reading.counted]
    yield "perplexity/mean", float(perplexities.mean()) if perplexities.numel() else NAN
    yield "perplexity/median", _lower_median(perplexities)
    yield "perplexity/target", NAN if reading.target is None else reading.target
    yield "perplexity/above_cutoff", _mean((perplexities > reading.cutoff).double())
    yield "perplexity/warming_up", float(reading.warming_up)
    yield "lambda/mean", _mean(lambdas)
    yield "lambda/min", float(lambdas.min()) if lambdas.numel() else NAN
    yield "lambda/max", float(lambdas.max()) if lambdas.numel() else NAN
    yield "lambda/zero_share", _mean((lambdas == 0).double())


def _of_outliers(table: TokenTable, with_context: Tensor, limit: float) -> Iterator[tuple[str, float]]:
    yield "outliers/limit", limit
    beyond = table["pmi"].cpu()[with_context].abs() > limit  # none is above NaN
    yield "outliers/share", _mean(beyond.double())


def _of_times(times: Mapping[str, float], tokens: int) -> Iterator[tuple[str, float]]:
    unknown = sorted(set(times) - set(PHASES))
    if unknown:
        raise ValueError(f"undeclared phases {', '.join(unknown)}; observe/names.py declares {', '.join(PHASES)}")
    total = times.get("total", math.fsum(times.values()))
    yield from ((f"time/{phase}", times[phase]) for phase in PHASES if phase in times and phase != "total")
    yield "time/total", total
    yield "tokens/per_second", tokens / total if total > 0 else NAN


def step_metrics(
    examples: Sequence[Example],
    table: TokenTable,
    *,
    learning_rate: float,
    grad_norm: float,
    policy_loss: float,
    times: Mapping[str, float],
    reading: GateReading | PerplexityReading | None = None,
    outlier_limit: float | None = None,
    step: int | None = None,
    computed: tuple[int, int, int] | None = None,
    skipped_updates: int = 0,
    success_threshold: float = 1.0,
) -> dict[str, float]:
    """All metrics of one training step, from the examples and token table of the *global* batch (the same order in
    both).

    `reading` None leaves the metrics of lambda out (conditions without a per-token term). `outlier_limit`: of |u| in
    nats, NaN while it is being measured; None: no such rule. Columns that were not computed leave theirs out, and so
    does `step` None with the age of the rollouts (step s trains weights of version s - 1).
    `computed` counts the tokens of all packs of the step: with padding, without, and as if no prefix were shared.
    `times` are seconds by phase; `total` is their sum unless given. A statistic over no tokens, and any statistic's
    non-finite inputs, come out as NaN and as `tokens/not_finite`: the writer turns NaN into null.
    Raises ValueError if the table's rows are not the examples' tokens, or for an undeclared phase.
    """
    lengths = [len(e.rollout.response_ids) for e in examples]
    if (table.offsets[1:] - table.offsets[:-1]).tolist() != lengths:
        raise ValueError(f"the token table holds {table.rollouts} rollouts, {table.tokens} tokens; the examples differ")
    out: dict[str, float] = {}
    out.update(_of_rollouts(examples, success_threshold))
    if step is not None:
        out.update(_of_versions(examples, step))
    if "teacher_logprobs" in table:
        out.update(_of_contexts(examples))
    out.update(_of_tokens(examples, table))
    if computed is not None:
        out.update(_of_packs(*computed))
    counts = _loss_mask(examples, table) & context_mask(examples, table)
    if isinstance(reading, PerplexityReading):
        out.update(_of_perplexity(reading))
    elif reading is not None:
        out.update(_of_gate(reading, int(counts.sum())))
    if outlier_limit is not None and "pmi" in table:
        out.update(_of_outliers(table, counts, outlier_limit))
    out["loss/policy"] = policy_loss
    out["optimizer/grad_norm"] = grad_norm
    out["optimizer/learning_rate"] = learning_rate
    out["optimizer/skipped"] = float(skipped_updates)
    out.update(_of_times(times, table.tokens))
    return out


def supervised_metrics(
    *,
    loss: float,
    tokens: int,
    learning_rate: float,
    grad_norm: float,
    times: Mapping[str, float],
    skipped_updates: int = 0,
) -> dict[str, float]:
    """Metrics of one step of the supervised stage; `tokens` are its response tokens."""
    return {
        "sft/loss": loss,
        "optimizer/grad_norm": grad_norm,
        "optimizer/learning_rate": learning_rate,
        "optimizer/skipped": float(skipped_updates),
        "tokens/response": float(tokens),
        **dict(_of_times(times, tokens)),
    }
