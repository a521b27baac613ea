"""The product's update under the dense reference's settings: what one training step does after the rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from asd_megatron.antisd import Condition, Gate, KlPenalty, OutlierLimit, PerplexityLambda, PerplexityRule, condition
from asd_megatron.checkpoint.huggingface import FolderReader, read_config
from asd_megatron.data.sft import SftExample
from asd_megatron.distributed import layout as layouts
from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.models.flops import flops_model
from asd_megatron.models.gpt import NO_RECOMPUTE, Recompute
from asd_megatron.models.port import ModelPort
from asd_megatron.models.precision import BFLOAT16, Precision
from asd_megatron.models.weight_copies import WeightCopies
from asd_megatron.observe.metrics import GateReading, PerplexityReading
from asd_megatron.ops.vocab_divergence import Divergence
from asd_megatron.records import Example, TokenTable
from asd_megatron.run.strength import TermStrength
from asd_megatron.trainer import passes, token_method
from asd_megatron.trainer.align import gather_table
from asd_megatron.trainer.batch import PackLayout
from asd_megatron.trainer.columns import table_columns
from asd_megatron.trainer.local_batch import LocalBatch
from asd_megatron.trainer.optimizer import Optimizer, StepResult
from asd_megatron.trainer.pass_plan import Fp8, PassPlan, plan_passes
from asd_megatron.trainer.sft import SupervisedStats, supervised_update
from asd_megatron.trainer.teacher_states import TeacherStates
from asd_megatron.trainer.updater import UpdateStats, update
from tests.models import everywhere
from tests.reference.dense import DenseRecipe

ALONE = Layout()


def condition_of(recipe: DenseRecipe) -> Condition:
    named = condition(recipe.condition)
    by_gate = recipe.perplexity is None
    return replace(named, composition=recipe.composition or named.composition, gated=named.gated and by_gate)  # type: ignore[arg-type]


def strength_of(recipe: DenseRecipe, process_groups: ProcessGroups, gate: Gate | None = None) -> TermStrength:
    """What sets lambda and the outlier limit, before its warm-up."""
    perplexity = outliers = None
    warmup_steps = 5 if recipe.warmup_steps is None else recipe.warmup_steps
    if recipe.perplexity is not None:
        p = recipe.perplexity
        rule = PerplexityRule(
            p.lambda_0,
            p.alpha,
            p.lambda_min,
            recipe.lambda_max,
            p.cutoff,
            p.scope,
            p.shift,
            p.ratio,
            p.offset,  # type: ignore[arg-type]
        )
        perplexity = PerplexityLambda(rule, warmup_steps, p.target)
    if recipe.outlier_deviations is not None:
        outliers = OutlierLimit(recipe.outlier_deviations, warmup_steps)
    return TermStrength(process_groups, method_of(recipe), gate or gate_of(recipe), perplexity, outliers)


def method_of(recipe: DenseRecipe) -> token_method.Method:
    limit = recipe.term_max_position
    return token_method.Method(
        condition=condition_of(recipe),
        clip_low=recipe.clip_low,
        clip_high=recipe.clip_high,
        aggregation=recipe.aggregation,
        constant_length=recipe.constant_length,
        pmi_clip=None if recipe.pmi_clip == math.inf else recipe.pmi_clip,
        term_normalization=recipe.term_normalization,
        term_clip=None if recipe.term_clip == math.inf else recipe.term_clip,
        term_max_position=None if limit == math.inf else int(limit),
        term_max_length=None if recipe.term_max_length == math.inf else int(recipe.term_max_length),
        advantage_weight=recipe.advantage_weight,
        importance_cap=None if recipe.importance == "none" else recipe.importance_cap,
        importance_floor=recipe.importance_floor if recipe.importance == "masked" else None,
        importance_level=recipe.importance_level,  # type: ignore[arg-type]
        exact=None
        if recipe.divergence is None
        else token_method.ExactTerm(
            Divergence(recipe.divergence, recipe.mixture),  # type: ignore[arg-type]
            -1 if recipe.ascend else 1,
        ),
        kl=None if recipe.kl is None else KlPenalty(recipe.kl, recipe.kl_coefficient),  # type: ignore[arg-type]
        policy_loss=recipe.policy_loss,  # type: ignore[arg-type]
        entropy_coefficient=recipe.entropy_coefficient,
    )


def gate_of(recipe: DenseRecipe, h_warm: float | None = None) -> Gate:
    warmup_steps = recipe.warmup_steps
    if warmup_steps is None:
        warmup_steps = 5 if condition(recipe.condition).gated and h_warm is None else 0
    return Gate.for_condition(
        condition_of(recipe),
        warmup_steps=warmup_steps,
        lambda_max=recipe.lambda_max,
        tau_down=recipe.tau_down,
        tau_up=recipe.tau_up,
        h_warm=h_warm,
    )


@dataclass
class Step:
    """What one step of the product came to. `table`: the global batch's, on global rank 0 (None elsewhere)."""

    plan: PassPlan
    median_entropy: float | None
    lam: float  # the responses' mean, where each has its own
    reading: GateReading | PerplexityReading
    stats: UpdateStats
    table: TokenTable | None
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # of each update, before clipping
    weights: list[dict[str, Tensor]] = field(default_factory=list)  # after each update


class RecordingOptimizer(Optimizer):
    """Keeps every update's gradients and weights. Without a learning rate the weights stay."""

    def __init__(self, port: ModelPort, recipe: DenseRecipe, *, distributed: bool = False) -> None:
        self.frozen = recipe.learning_rate is None
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        super().__init__(
            port,
            learning_rate=recipe.learning_rate or 1.0,
            min_learning_rate=0.0,
            schedule="constant",
            warmup_steps=0,
            total_steps=10,
            weight_decay=recipe.weight_decay,
            beta1=recipe.beta1,
            beta2=recipe.beta2,
            epsilon=recipe.epsilon,
            clip_grad=recipe.clip_grad,
            distributed=distributed,
        )

    def step(self, *, loss: float = 0.0) -> StepResult:
        self.gradients.append(snapshot(everywhere.gradients(self.port).items()))
        if self.frozen:
            norm = math.sqrt(sum(float((g * g).sum()) for g in self.gradients[-1].values()))
            return StepResult(norm, True)
        result = super().step(loss=loss)
        self.weights.append(snapshot(everywhere.weights(self.port).items()))
        return result


def snapshot(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", torch.float64) for name, tensor in tensors}


class Product:
    """A model folder on this rank, in a layout. Collective where its parts are."""

    def __init__(
        self,
        folder: Path,
        layout: Layout = ALONE,
        *,
        distributed_optimizer: bool = False,
        layers: Literal["te", "local"] = "local",
        precision: Precision = BFLOAT16,
        recompute: Recompute = NO_RECOMPUTE,
        alignment: int | None = None,
        process_groups: ProcessGroups | None = None,
    ) -> None:
        """`alignment`: of packs; None: the precision's. `process_groups`: those of an earlier one in the process."""
        self.process_groups = process_groups or layouts.init(layout)
        self.reader = FolderReader(folder)
        self.port = ModelPort.build(
            read_config(folder),
            self.process_groups,
            layout,
            dtype=torch.float32,
            layers=layers,
            precision=precision,
            recompute=recompute,
        )
        self.port.load(self.reader)
        self.port.wrap_ddp(distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False)
        aligned = precision.alignment if alignment is None else alignment
        self.pack_layout = PackLayout.of(
            layout, self.process_groups, self.port.device, alignment=aligned, flops=flops_model(self.port.shape)
        )
        self.copies: WeightCopies | None = None

    def reload(self) -> None:
        self.port.load(self.reader)
        self.copies = None

    @property
    def fp8(self) -> Fp8:
        """Which passes compute in FP8."""
        precision = self.port.precision
        return "none" if not precision.enabled else "all" if precision.scores else "update"

    def keep_copies(self, recipe: DenseRecipe) -> WeightCopies:
        """Copies of the present weights, for a teacher and a KL penalty of other weights than the live ones."""
        self.copies = WeightCopies(self.port, initial=True, ema_rate=recipe.ema_rate)
        return self.copies

    def load_others(self) -> None:
        """Weights near those of the folder, the same in every layout."""
        others = {}
        for name, tensor in self.reader.items():
            noise = torch.Generator().manual_seed(sum(name.encode()))
            others[name] = tensor[:] + 0.05 * torch.randn(tensor.shape, generator=noise)
        self.port.load(others)

    def batch(self, examples: Sequence[Example], recipe: DenseRecipe, tokens_per_microbatch: int) -> LocalBatch:
        return LocalBatch.receive(
            examples,
            self.port.layout,
            self.process_groups,
            self.pack_layout,
            updates=recipe.updates,
            tokens_per_microbatch=tokens_per_microbatch,
            mask_truncated=recipe.mask_truncated,
        )

    def step(
        self,
        examples: Sequence[Example],
        recipe: DenseRecipe,
        gate: Gate | TermStrength,
        *,
        tokens_per_microbatch: int = 200,
    ) -> Step:
        """The lines of `train.train` from `build_batch` on."""
        method = method_of(recipe)
        strength = gate if isinstance(gate, TermStrength) else strength_of(recipe, self.process_groups, gate)
        needed = plan_passes(
            method.condition,
            recipe.updates,
            recipe.term_normalization,
            epochs=recipe.epochs,
            importance=method.importance_cap is not None,
            importance_level=method.importance_level,
            exact=method.exact is not None,
            teacher_copy=None if recipe.teacher == "live" else recipe.teacher,  # type: ignore[arg-type]
            kl_penalty=method.kl is not None,
            fp8=self.fp8,
            policy_loss=method.policy_loss,
        )
        batch = self.batch(examples, recipe, tokens_per_microbatch)
        inputs = token_method.token_inputs(batch, method)
        states = None
        if method.exact is not None:
            states = TeacherStates(self.port, self.process_groups, batch.table.tokens, on_host=True)
        where, temperature = (self.port, self.process_groups, batch, needed), recipe.temperature
        teacher = passes.score_teacher(*where, temperature=temperature, states=states, copies=self.copies)
        student = passes.score_student(*where, temperature=temperature)
        reference = passes.score_reference(*where, temperature=temperature, copies=self.copies)
        lam = strength.step(batch, inputs, teacher, student)
        old = passes.score_old(*where, temperature=temperature)
        optimizer = RecordingOptimizer(self.port, recipe)
        stats = update(
            self.port,
            self.process_groups,
            optimizer,
            batch,
            inputs,
            teacher=teacher,
            student=student,
            method=strength.method,
            plan=needed,
            lam=lam,
            temperature=recipe.temperature,
            epochs=recipe.epochs,
            states=states,
            reference=reference,
            old=old,
            copies=self.copies,
        )
        strength.learn(inputs, stats.columns)
        columns = table_columns(inputs, teacher, stats.columns, reference)
        table = gather_table(batch.table, columns, batch.indices, self.process_groups)
        reading = strength.reading
        entropy = reading.entropy if isinstance(reading, GateReading) else None
        return Step(needed, entropy, reading.lam, reading, stats, table, optimizer.gradients, optimizer.weights)

    def supervised_step(
        self, examples: Sequence[SftExample], optimizer: RecordingOptimizer, *, tokens_per_microbatch: int = 64
    ) -> SupervisedStats:
        return supervised_update(
            self.port,
            self.process_groups,
            optimizer,
            examples,
            layout=self.pack_layout,
            tokens_per_microbatch=tokens_per_microbatch,
        )
