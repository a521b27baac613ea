"""The planner's input from a recipe: its model, what a step computes, its layout on given GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from asd_megatron.checkpoint.huggingface import read_config
from asd_megatron.config import AnyRecipe, Recipe
from asd_megatron.distributed.layout import Layout
from asd_megatron.errors import UserError, plural
from asd_megatron.models import published
from asd_megatron.models.families import shape_of
from asd_megatron.models.family import ModelShape
from asd_megatron.models.gpt import Recompute
from asd_megatron.planner.hardware import GIB, Accelerator, accelerator
from asd_megatron.planner.parameters import model_parameters, stage_parameters
from asd_megatron.planner.proposals import propose
from asd_megatron.planner.report import Plan, plan
from asd_megatron.planner.setting import Dtype, Lengths, Serving, Setting, Training, Workload
from asd_megatron.planner.shortage import lacks
from asd_megatron.planner.states import States
from asd_megatron.run.copies import needed_copies
from asd_megatron.run.method import make_plan
from asd_megatron.run.ranks import layout_of
from asd_megatron.run.sources import model_folder
from asd_megatron.trainer.pass_plan import PassPlan

FEEDBACK_TOKENS = 60
"""Of the privileged prompt's own wording and feedback, beside the demonstration: the paper's wording has about 50."""
SERVER_MEMORY = 0.85
"""SGLang's own choice of mem-fraction-static on an 80 GB GPU is between 0.83 and 0.88."""
RUNNING_SERVER = 8
"""GPUs that a server of `rollout.server_urls` is taken to have: a node."""


@dataclass(frozen=True)
class Expected:
    """What a recipe does not say: lengths of prompts and responses, in tokens.

    Attributes:
        prompt: mean length of a problem's prompt; None: 256, or the recipe's limit if that is less.
        response: median length of a response; None: a quarter of the recipe's limit.
        spread: standard deviation of the logarithm of response lengths.
    """

    prompt: float | None = None
    response: float | None = None
    spread: float = 0.8


UNKNOWN = Expected()


def model_config(recipe: Recipe) -> Mapping[str, Any]:
    """config.json of `model.path`, or the published one of a model with this name where there is no such folder. Raises
    UserError when there is neither."""
    folder = model_folder(recipe.model.path)
    if not folder.is_dir():
        known = published.config_of(recipe.model.path)
        if known is not None:
            return known
        raise UserError(
            f"model.path {recipe.model.path}: no such folder, and no model of this name is known: give the folder, or"
            f" --model.path with one of {', '.join(published.names())}"
        )
    return read_config(folder)


def setting_of(
    recipe: Recipe, gpu: Accelerator, layout: Layout, shape: ModelShape, expected: Expected = UNKNOWN
) -> Setting:
    """The recipe in a layout on GPUs of this kind. Dtype and layers that the recipe leaves to the machine (`auto`) are
    those of a GPU: bfloat16, Transformer Engine."""
    passes = make_plan(recipe)
    return Setting(shape, _training(recipe, layout, passes), _serving(recipe), _workload(recipe, passes, expected), gpu)


def trainer_layout(recipe: Recipe, gpus: int) -> Layout:
    """The trainer's layout on `gpus` GPUs in all, the servers' included. Raises UserError where it does not fit
    them."""
    parallelism, serving = recipe.parallelism, _serving(recipe)
    ranks, fewest = gpus - serving.gpus, needed_gpus(recipe) - serving.gpus
    if ranks < fewest:
        raise UserError(
            f"the trainer and servers on its GPUs need {fewest} of them, and {max(ranks, 0)} are left: plan with"
            f" --gpus {needed_gpus(recipe)} or more, or make parallelism or the servers smaller"
        )
    unit = parallelism.ranks  # with which the experts divide
    return layout_of(recipe, parallelism.data or ranks // unit * unit // parallelism.model_parallel)


def memory_notes(recipe: AnyRecipe, layout: Layout, config: Mapping[str, Any], memory: float | None) -> list[str]:
    """Compare what the recipe's ranks need with the `memory` (bytes) of this rank's GPU, before anything is built.

    Returns a line for the console where the estimate exceeds it; none without a GPU, and for the supervised stage.
    Raises UserError when weights, gradients and optimizer alone exceed it: their sizes are exact.
    """
    if memory is None or not isinstance(recipe, Recipe):
        return []
    gpu = replace(accelerator("h100"), name="GPU", memory_gib=memory / GIB)
    setting = setting_of(recipe, gpu, layout, shape_of(config)[1])
    stages = [States(count, setting.training) for count in stage_parameters(setting.shape, layout)]
    held = max(stage.weights + stage.gradients + stage.optimizer for stage in stages)
    advice = f"`asd-megatron plan RECIPE --gpus {setting.gpus}` shows the layouts that fit"
    if held > memory:
        raise UserError(
            f"weights, gradients and optimizer take {held / GIB:.1f} GiB of a GPU with {memory / GIB:.1f}: raise"
            " parallelism.tensor, parallelism.pipeline or parallelism.expert, set parallelism.distributed_optimizer"
            f" true, optimizer.moments bfloat16 or optimizer.offload host; {advice}"
        )
    lacking = lacks(setting)
    return [f"warning: the GPU's memory is too small by estimate: {lacking[0]}; {advice}"] if lacking else []


def needed_gpus(recipe: Recipe) -> int:
    """The fewest GPUs that the recipe's layout and servers take."""
    serving = _serving(recipe)
    shared = serving.servers * serving.tensor_parallel if serving.colocated else 0
    return max(recipe.parallelism.ranks, shared) + serving.gpus


def _training(recipe: Recipe, layout: Layout, plan: PassPlan) -> Training:
    dtype: Dtype = "float32" if recipe.model.dtype == "float32" else "bfloat16"
    layers: Literal["te", "local"] = "local" if recipe.model.layers == "local" or dtype == "float32" else "te"
    # As `models.compat.resolve_attention` decides on a GPU.
    shares = recipe.batching.share_prefixes is not False and layout.context == 1 and dtype == "bfloat16"
    copies = needed_copies(recipe)
    return Training(
        layout=layout,
        dtype=dtype,
        layers=layers,
        attention="flex" if shares else "own",
        recompute=Recompute(recipe.model.recompute, recipe.model.recompute_layers),
        pack=recipe.batching.tokens_per_microbatch,
        distributed_optimizer=recipe.parallelism.distributed_optimizer,
        overlap_grad_reduce=recipe.parallelism.overlap_grad_reduce,
        moments=recipe.optimizer.moments,
        offload=recipe.optimizer.offload,
        copies=len(copies),
        average="ema" in copies,
        fp8=plan.fp8 != "none",
        fp8_scores=plan.fp8 == "all",
        fp8_parameters=recipe.precision.fp8_parameters,
        async_save=recipe.checkpoint.async_save,
        teacher_states=recipe.algorithm.teacher_states,
    )


def _serving(recipe: Recipe) -> Serving:
    r = recipe.rollout
    if r.engine != "sglang":
        return Serving(engine="embedded", requests=r.max_batch_size)
    given = r.server_args.get("mem-fraction-static", r.server_args.get("mem_fraction_static"))
    return Serving(
        servers=len(r.server_urls) or r.servers,
        tensor_parallel=RUNNING_SERVER if r.server_urls else r.server_tensor_parallel,
        colocated=r.placement == "colocated",
        offload_optimizer=r.offload_optimizer,
        overlap=r.overlap,
        memory_fraction=SERVER_MEMORY if given is None else float(given),
        fp8=r.quantization == "fp8",
        requests=r.max_concurrent_requests,
        bucket_mib=r.weight_sync_bucket_mib,
        transport=r.weight_sync,
        verify=r.verify_weights,
        full_every=r.weight_sync_full_every,
    )


def _workload(recipe: Recipe, plan: PassPlan, expected: Expected) -> Workload:
    s, a = recipe.sampling, recipe.algorithm
    most = s.max_response_tokens
    median = most / 4 if expected.response is None else expected.response
    prompt = min(256, s.max_prompt_tokens) if expected.prompt is None else expected.prompt
    for option, value, key, limit in (
        ("--response-tokens", median, "max_response_tokens", most),
        ("--prompt-tokens", prompt, "max_prompt_tokens", s.max_prompt_tokens),
    ):
        if value > limit:
            raise UserError(f"{option} {value:g} is beyond sampling.{key} {limit}: give at most that, or raise the key")
    return Workload(
        problems=s.problems_per_step,
        samples=s.rollouts_per_problem,
        prompt=prompt,
        responses=Lengths(median, most, expected.spread),
        privileged=min(recipe.privileged.max_solution_tokens, median) + FEEDBACK_TOKENS,
        teacher=int(plan.teacher_scoring),
        student=int(plan.student_scoring) + int(plan.old_scoring),
        reference=int(plan.reference_scoring),
        updates=a.updates_per_batch * a.epochs,
        epochs=a.epochs,
        recomputed_head=int(plan.head == "two_phase"),
        exact=plan.head == "exact",
        steps=recipe.run.steps,
        checkpoint_every=recipe.checkpoint.every,
    )


def hardware(name: str, *, calibrate: bool = False, price: float | None = None) -> Accelerator:
    """The GPU of a plan, by name; with `calibrate` this machine with the rates that it reaches. `price`: dollars an
    hour."""
    if calibrate:
        from asd_megatron.planner.calibration import calibrate as measured

        found = measured()
    else:
        found = accelerator(name)
    return found if price is None else replace(found, dollars_per_hour=price)


def plan_recipe(recipe: Recipe, gpu: Accelerator, gpus: int | None, expected: Expected, *, proposals: int = 5) -> Plan:
    """The plan of a recipe on `gpus` GPUs (None: the fewest that it needs, and complete model copies on the rest of a
    node where `parallelism.data` is null), with other settings that fit them. Raises UserError for a recipe that
    cannot be planned."""
    count = gpus or default_gpus(recipe, gpu)
    _, shape = shape_of(model_config(recipe))
    setting = setting_of(recipe, gpu, trainer_layout(recipe, count), shape, expected)
    where = "" if model_folder(recipe.model.path).is_dir() else " (published config.json)"
    nodes = -(-count // gpu.per_node)
    title = (
        f"{Path(recipe.model.path).name}{where}, {parameters_text(model_parameters(shape))} parameters, on"
        f" {count} x {gpu.name} ({plural(nodes, 'node')});"
        f" {setting.workload.rollouts} responses a step, median {setting.workload.responses.median:,.0f} of at most"
        f" {setting.workload.responses.most:,} tokens"
    )
    found = plan(title, setting)
    if not proposals:
        return found
    try:
        return replace(found, proposals=tuple(propose(setting, count, proposals)))
    except UserError as error:
        return replace(found, unproposed=str(error))


def parameters_text(count: int) -> str:
    """`8.2 billion`, `135 million`, `104,000`."""
    if count >= 10**9:
        return f"{count / 1e9:.1f} billion"
    return f"{count / 1e6:.0f} million" if count >= 10**6 else f"{count:,}"


def default_gpus(recipe: Recipe, gpu: Accelerator) -> int:
    """GPUs of a recipe that does not say how many: complete nodes where data parallelism fills what is left."""
    needed = needed_gpus(recipe)
    if recipe.parallelism.data is not None or needed == 1:
        return needed
    return -(-needed // gpu.per_node) * gpu.per_node
