"""The start-up report of a run: what it does, on which devices, and which package supplies each part."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from asd_megatron.antisd import Condition, Gate, PerplexityLambda
from asd_megatron.config import AnyRecipe, Recipe
from asd_megatron.config.model import ModelSection
from asd_megatron.config.rollout import RolloutSection
from asd_megatron.errors import plural
from asd_megatron.models import te
from asd_megatron.models.compat import layers_text
from asd_megatron.observe.startup import (
    environment,
    formula,
    gate_text,
    perplexity_text,
    startup_report,
    suppliers,
    term_text,
    write_environment,
)
from asd_megatron.rollout.sglang.servers.options import nccl_settings
from asd_megatron.run.continual import recorded_origin
from asd_megatron.run.folder import writing
from asd_megatron.run.history import read_history
from asd_megatron.run.session import Session
from asd_megatron.run.strength import TermStrength
from asd_megatron.trainer.pass_plan import PassPlan
from asd_megatron.trainer.token_method import Method

DIVERGENCES = {
    "jensen_shannon": "Jensen-Shannon divergence of student and teacher",
    "reverse_kl": "reverse KL(student, teacher)",
    "forward_kl": "forward KL(teacher, student)",
}
"""The exact divergences in words."""


def announce(
    session: Session, batch: Mapping[str, str], passes: Sequence[str], method: Mapping[str, str] | None = None
) -> None:
    """Print the report, show it in TensorBoard, write RUN/environment.json. Global rank 0 only. `batch`, `passes` and
    `method`: of `startup_report`."""
    if not session.is_root or session.files.writer is None:
        return
    found = environment()
    parts = suppliers(session.port.chunks, session.optimizer)
    weights = sum(p.numel() for chunk in session.port.chunks for p in chunk.parameters())
    model = {
        "source": os.fspath(session.source),
        **_origin(session),
        "family": session.hf_config.get("model_type", "?"),
        "layers": session.hf_config.get("num_hidden_layers", "?"),
        "parameters": f"{weights:,} on this rank",
        "dtype": session.port.dtype,
        "implementation": layers_text(session.recipe.model.layers, session.port.layers, session.port.dtype),
        "vocabulary": f"{session.port.vocab_size:,} (padded to {session.port.padded_vocab_size:,})",
        **_precision(session),
        "recompute": _recompute(session.recipe.model),
        **_experts(session),
    }
    report = startup_report(
        name=session.recipe.run.name,
        run_folder=session.folder,
        environment=found,
        layout=session.layout,
        suppliers=parts,
        model=model,
        batch=batch,
        passes=passes,
        method=method,
    )
    print(report, flush=True)
    session.files.writer.text("start-up report", report)
    with writing(session.folder):
        write_environment(session.folder, found, layout=session.layout, suppliers=parts)
    if session.resumed is not None:
        session.progress.note(f"resumed after step {session.first_step - 1}")


def _origin(session: Session) -> dict[str, str]:
    """The row of a run that has begun from another run's checkpoint."""
    origin = session.start.origin or recorded_origin(read_history(session.folder))
    return {} if origin is None else {"continual from": str(origin)}


def _precision(session: Session) -> dict[str, str]:
    """The rows of Transformer Engine and of FP8."""
    port = session.port
    rows = {"weight gradients": port.weight_gradients_text()}
    if port.precision.enabled:
        rows["FP8"] = port.precision.text(port.shape.layers)
    if port.layers == "te":
        untested = te.untested()
        if untested is not None:
            rows["Transformer Engine"] = untested
    if port.te_attention:
        backend = session.recipe.model.attention_backend
        either = "FlashAttention or cuDNN's" if backend == "auto" else backend
        rows["attention backend"] = f"{either}; the console names it after the first step"
    return rows


def _recompute(model: ModelSection) -> str:
    return model.recompute + ("" if model.recompute_layers is None else f", {model.recompute_layers} layers a stage")


def _experts(session: Session) -> dict[str, str]:
    """The row of a mixture of experts; {} for other models."""
    experts, balance = session.port.shape.experts, session.balance
    if experts is None or balance is None:
        return {}
    ranks = session.layout.expert
    where = "all on every rank" if ranks == 1 else f"over {ranks} ranks"
    loss = f"auxiliary loss x {balance.coefficient:g}" if balance.coefficient else "no auxiliary loss"
    return {"experts": f"{experts.count} a layer, {experts.per_token} a token, {where}; {loss}"}


def _servers(rollout: RolloutSection) -> dict[str, str]:
    """The rows of the SGLang servers, with the settings that are not checked; {} for other engines."""
    if rollout.engine != "sglang":
        return {}
    where = ", ".join(rollout.server_urls)
    if not where:
        hosts = f"on {', '.join(rollout.server_hosts)}" if rollout.server_hosts else "here"
        where = f"{rollout.servers} started {hosts}, tensor parallelism {rollout.server_tensor_parallel}"
    turns = "generating ahead" if rollout.overlap else "in turns with training"
    report = {
        "servers": f"{where}, {rollout.placement}, {turns}"
        + (f", through the router {rollout.router}" if rollout.router else ""),
        "weight updates": f"{rollout.weight_sync}, "
        + (f"deltas, all weights every {every} updates, " if (every := rollout.weight_sync_full_every) > 1 else "")
        + ("verified by checksums and log-probs" if rollout.verify_weights else "NOT VERIFIED (verify_weights false)"),
    }
    if rollout.weight_sync == "distributed" and torch.cuda.is_available():
        settings = " ".join(f"{name}={value}" for name, value in nccl_settings(os.environ).items())
        report["NCCL"] = settings + (
            " here: servers that `asd-megatron serve` did not start need the same (SGLang's own default is 0)"
            if rollout.server_urls
            else ", trainer and servers alike"
        )
    if rollout.server_args:
        given = ", ".join(f"{name} {value}" for name, value in rollout.server_args.items())
        report["passed on"] = f"to SGLang, unchecked: {given}"
    return report


def _quantized(recipe: Recipe) -> dict[str, str]:
    """The rows of quantised servers; {} for others."""
    a = recipe.algorithm
    if recipe.rollout.quantization == "none":
        return {}
    unit = "token" if a.importance_level == "token" else f"response ({a.importance_level})"
    correction = f"{a.importance_correction} at {a.importance_cap:g}, one weight a {unit}"
    return {
        "servers' format": f"{recipe.rollout.quantization}, quantised here for every weight update",
        "importance": "NOT CORRECTED (importance_correction none)"
        if a.importance_correction == "none"
        else f"{correction}: quantised servers sample from another distribution",
    }


def _demonstrations(recipe: Recipe, teacher: bool) -> dict[str, str]:
    if not teacher:
        return {}
    if not recipe.privileged.use_group:
        return {"demonstrations": "the data's" if recipe.privileged.use_reference else "none"}
    shared = recipe.privileged.demonstrations_per_group
    return {"demonstrations": "drawn by each rollout" if shared is None else f"{shared} shared by a group"}


def weights_rows(recipe: Recipe, plan: PassPlan) -> dict[str, str]:
    """The rows about the teacher's weights and the KL penalty."""
    a, rate = recipe.algorithm, recipe.teacher.ema_rate
    teachers = {
        "live": "the trained weights themselves",
        "initial": "the initial weights, those of model.path",
        "ema": f"moving average of the weights, rate {rate:g}, in float32",
    }
    rows = {"teacher": teachers[recipe.teacher.weights]} if plan.teacher_scoring else {}
    if a.kl_coefficient > 0:
        where = "advantage" if a.kl_estimator == "k1" else "loss"
        rows["KL penalty"] = f"{a.kl_coefficient:g} x {a.kl_estimator} to the initial weights, in the {where}"
    return rows


def _size(size: float) -> str:
    """Bytes in GiB, or in MiB where that is less than one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _copies(session: Session) -> dict[str, str]:
    if session.copies is None:
        return {}
    names, size = " and ".join(session.copies.names), _size(session.copies.bytes)
    return {"copies of weights": f"{names}: {size} of host memory on this rank"}


def evaluation_text(recipe: AnyRecipe) -> str:
    """When the run evaluates, on what, and how it samples there; `none` if it does not."""
    if not recipe.evaluates:
        return "none"
    e = recipe.evaluation
    every = "every step" if e.every == 1 else f"every {e.every} steps"
    when = [every] * bool(e.every) + ["at the start"] * e.at_start + ["at the end"] * e.at_end
    sets = " + ".join([*([recipe.data.test] if recipe.data.test else []), *e.sets])
    parts = [sets if e.problems is None else f"{plural(e.problems, 'problem')} of {sets}"]
    parts += [f"{e.samples} responses each"] * (e.samples > 1)
    parts += [*when, f"temperature {e.temperature:g}", f"top_p {e.top_p:g}"]
    return ", ".join(parts + [f"top_k {e.top_k}"] * bool(e.top_k))


def method_rows(recipe: Recipe, method: Method, gate: Gate, perplexity: PerplexityLambda | None) -> dict[str, str]:
    """The rows about the method: condition, advantage, what is done to the term, how lambda is set."""
    rows = {"condition": method.condition.name, "advantage": _advantage(recipe, method), **_options(recipe)}
    if term := _term(recipe, method.condition):
        rows["term"] = term
    rows["gate" if perplexity is None else "lambda"] = _lambda(recipe, method.condition, gate, perplexity)
    return rows


A_SEQ = {
    "normalized": "(R - mean of the group) / its standard deviation",
    "centered": "R - mean of the group (Dr. GRPO)",
    "leave_one_out": "R - mean of the group's other responses (RLOO)",
}
REDRAWN = {"no_signal": "that teach nothing", "equal_rewards": "with equal rewards"}
"""`sampling.redraw` in words: groups ..."""


def _options(recipe: Recipe) -> dict[str, str]:
    """The rows of what differs from plain GRPO with a clipped ratio."""
    a, s = recipe.algorithm, recipe.sampling
    rows = {}
    if a.group_advantage != "normalized" or a.whiten_advantages:
        batch = ", divided by the standard deviation over the batch" if a.whiten_advantages else ""
        rows["A_seq"] = A_SEQ[a.group_advantage] + batch
    if a.overlong_buffer:
        rows["overlong"] = (
            f"A_seq is of rewards lower by up to {a.overlong_penalty:g} in the last {a.overlong_buffer} of"
            f" {s.max_response_tokens} tokens"
        )
    if a.policy_loss != "ppo_clip":
        rows["policy loss"] = f"{a.policy_loss}, ratio within 1 - {a.clip_low:g} and 1 + {a.clip_high:g}"
    if a.entropy_coefficient:
        rows["entropy bonus"] = f"{a.entropy_coefficient:g} x the mean entropy"
    if s.redraw != "never":
        limit = "9 x problems_per_step" if s.redraw_limit is None else s.redraw_limit
        rows["redraw"] = f"groups {REDRAWN[s.redraw]} are discarded for others, at most {limit} a step"
    return rows


def _lambda(recipe: Recipe, condition: Condition, gate: Gate, perplexity: PerplexityLambda | None) -> str:
    """How lambda is set in a run of the recipe."""
    if perplexity is not None:
        target, warmup_steps = recipe.perplexity.target, perplexity.warmup_steps
        return perplexity_text(perplexity.rule, warmup_steps=warmup_steps, target=target)
    return gate_text(
        condition,
        lambda_max=gate.lambda_max,
        warmup_steps=gate.warmup_steps,
        tau_down=gate.tau_down,
        tau_up=gate.tau_up,
        h_warm=recipe.gate.h_warm,
    )


def _term(recipe: Recipe, condition: Condition) -> str:
    """What is done to the term beside its formula; empty where nothing is."""
    a = recipe.algorithm
    if condition.sign == 0:
        return ""
    return term_text(
        outlier_deviations=a.outlier_deviations,
        pmi_clip=a.pmi_clip,
        normalization=a.term_normalization,
        term_clip=a.term_clip,
        max_position=a.term_max_position,
        max_length=a.term_max_length,
    )


def _advantage(recipe: Recipe, method: Method) -> str:
    """The advantage of a token, or the loss of the exact estimator, in one line."""
    exact, weight = method.exact, recipe.algorithm.advantage_weight
    if exact is None:
        return formula(method.condition, weight)
    divergence = exact.divergence
    name = DIVERGENCES[divergence.kind]
    if divergence.mixture != 0.5:
        name += f" with mixture {divergence.mixture:g}"
    sign = "+" if exact.sign > 0 else "-"
    a_seq = "A_seq" if weight == 1 else f"{weight:g} * A_seq"
    return f"A = {a_seq}; the loss of a token {sign} lambda * D, D = {name}, over the vocabulary"


def _teacher_states(recipe: Recipe, session: Session, method: Method) -> dict[str, str]:
    """How much the exact estimator keeps of the teacher until the update, at most."""
    if method.exact is None:
        return {}
    s, layout = recipe.sampling, session.layout
    tokens = s.problems_per_step * s.rollouts_per_problem * s.max_response_tokens / layout.data / layout.context
    size = tokens * session.port.config.hidden_size / layout.tensor * session.port.dtype.itemsize
    return {"teacher's states": f"at most {_size(size)} a rank, in the {recipe.algorithm.teacher_states}'s memory"}


def announce_training(
    recipe: Recipe, session: Session, strength: TermStrength, plan: PassPlan, sets: Mapping[str, str]
) -> None:
    """The report of an RL run. sets: the problem sets, in words, by the name of their row. Global rank 0 only."""
    method, s = strength.method, recipe.sampling
    announce(
        session,
        {
            **sets,
            "problems a step": f"{s.problems_per_step}",
            "rollouts": f"{s.rollouts_per_problem} a problem, at most {s.max_response_tokens} tokens, "
            f"temperature {s.temperature:g}, from the {recipe.rollout.engine} engine",
            **_servers(recipe.rollout),
            **_quantized(recipe),
            "reward": recipe.reward.in_words,
            "micro-batches": f"at most {recipe.batching.tokens_per_microbatch:,} tokens"
            + (", shared prefixes computed once" if session.pack_layout.share_prefixes else ""),
            "steps": f"{recipe.run.steps}, learning rate {recipe.optimizer.learning_rate:g}",
            "evaluation": evaluation_text(recipe),
            **_demonstrations(recipe, plan.teacher_scoring),
            **weights_rows(recipe, plan),
            **_copies(session),
            **_teacher_states(recipe, session, method),
        },
        plan.reasons,
        method_rows(recipe, method, strength.gate, strength.perplexity),
    )
