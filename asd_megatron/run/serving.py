"""The rollout engine on the recipe's SGLang servers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from asd_megatron.config import Recipe
from asd_megatron.config.host_checks import host_of_server, hosts_of
from asd_megatron.config.rollout import RolloutSection
from asd_megatron.data.problems import ProblemSource
from asd_megatron.data.prompts import PromptRenderer
from asd_megatron.distributed.objects import gather_objects
from asd_megatron.errors import UserError
from asd_megatron.rollout.bank import RolloutBank
from asd_megatron.rollout.sglang.client.fleet import Fleet
from asd_megatron.rollout.sglang.client.routing import SERVER_ARGUMENT, Routing
from asd_megatron.rollout.sglang.controller import Controller, ServedModel
from asd_megatron.rollout.sglang.engine import SGLangEngine
from asd_megatron.rollout.sglang.grouping import Assembler, Labels
from asd_megatron.rollout.sglang.servers.hosts import Launcher
from asd_megatron.rollout.sglang.servers.keys import Keys
from asd_megatron.rollout.sglang.servers.options import ServerOptions, devices_of_servers
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.weight_sync.protocol import Transport
from asd_megatron.rollout.sglang.weight_sync.quantize import write_model_without_weights
from asd_megatron.rollout.sglang.weight_sync.verification import WeightVerifier
from asd_megatron.run.model_session import ModelSession
from asd_megatron.run.sending import Place, hosts_of_servers, root_transport, sending
from asd_megatron.trainer.scorer import score_sequence

PROBE_TOKENS = 256
CONTINUATION = "Now solve this problem step by step. The final answer is:"
"""Of the probe's prompt; the built-in puzzle's small vocabulary has these words too."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest mean absolute difference of the probe's log-probs, in nats."""
QUANTIZED_TOLERANCE = 0.5
"""The same for servers that compute in FP8 (docs/sglang.md has the measurements)."""
WITH_FP8 = (8, 9)  # compute capability
BLACKWELL = 10  # its major number
BLACKWELL_ARGUMENTS = {"fp8-gemm-backend": "flashinfer_trtllm"}
"""SGLang's own choice there is DeepGEMM, for which it rewrites weights and scales in place as they are loaded: other
ones could not be loaded into them."""


def sglang_engine(
    session: ModelSession, renderer: PromptRenderer, problems: ProblemSource, bank: RolloutBank | None
) -> SGLangEngine:
    """The engine of a recipe with `rollout.engine: sglang`. Collective. Servers start with `SGLangEngine.start`. bank:
    keeps its responses, on global rank 0."""
    port = session.port
    rollout = _rollout(session)
    ids = probe_ids(renderer, problems, port.max_positions)
    probe = None
    if rollout.verify_weights:
        probe = partial(score_sequence, port, session.process_groups, ids, session.pack_layout)
    verifier = _verifier(session, rollout)
    places = gather_objects(Place.of_this_rank(), 0, session.process_groups.host) or []
    made = session.only_root(lambda: _controller(session, rollout, ids, verifier, places, bank))
    return SGLangEngine(
        session.process_groups,
        None if made is None else made[0],
        sending=sending(session, rollout, verifier, None if made is None else made[1]),
        probe=probe,
        max_positions=port.max_positions,
        end_ids=session.end_ids,
        meeting=session.stopping.while_waiting,
    )


def probe_ids(renderer: PromptRenderer, problems: ProblemSource, max_positions: int) -> tuple[int, ...]:
    """The sequence of the probe: the prompt of the first training problem and a fixed continuation, cut to
    `PROBE_TOKENS`. It is text of the kind that the model is trained on, where log-probs in bfloat16 are most alike."""
    (problem,) = problems.take(1)
    continuation = renderer.tokenizer(CONTINUATION, add_special_tokens=False)["input_ids"]
    return (*renderer.student(problem).ids, *continuation)[: min(PROBE_TOKENS, max_positions)]


def _rollout(session: ModelSession) -> RolloutSection:
    assert isinstance(session.recipe, Recipe)
    return session.recipe.rollout


def _controller(
    session: ModelSession,
    rollout: RolloutSection,
    probe: tuple[int, ...],
    verifier: WeightVerifier | None,
    places: Sequence[Place],
    bank: RolloutBank | None,
) -> tuple[Controller, Transport]:
    """The controller with all that it needs on global rank 0, and its transport; no server is started yet. Raises
    UserError for an environment that cannot serve."""
    port, labels, closing = session.port, Labels(), ExitStack()
    _check_quantization(session, rollout)
    routing = _routing(session, rollout)
    keys = _keys(rollout)
    pool = None if rollout.server_urls else _pool(session, rollout, keys)
    if pool is not None:
        closing.callback(pool.close)
    hosts: dict[str, tuple[int, ...]] = {}
    if pool is not None and rollout.weight_sync == "cuda_ipc":
        names = rollout.server_hosts
        machines = [host_of_server(names, server) for server in range(rollout.servers)] if names else ()
        hosts = hosts_of_servers(pool.urls, _devices(rollout), rollout.server_tensor_parallel, places, machines)
    transport = root_transport(session, rollout, hosts, None if pool is None else pool.versions)
    closing.callback(transport.close)
    fleet = _fleet(rollout, keys, pool)
    closing.callback(fleet.close)
    controller = Controller(
        fleet,
        transport,
        Assembler(session.tokenizer, session.recipe.run.seed, labels, routing, bank),
        labels,
        model=ServedModel(tuple(session.hf_config.get("architectures") or ()), port.vocab_size, routing),
        pool=pool,
        verifier=verifier,
        probe_ids=probe,
        tolerance=rollout.verify_tolerance or default_tolerance(rollout, port.dtype),
        quantize=rollout.quantization != "none",
        start_timeout=rollout.server_start_timeout,
        wait_timeout=rollout.server_wait_timeout,
        colocated=rollout.placement == "colocated",
        closing=closing,
    )
    return controller, transport


def _keys(rollout: RolloutSection) -> Keys:
    """Those of running servers as the recipe says where they are, else new ones. Raises UserError."""
    if not rollout.server_urls:
        return Keys.new()
    if rollout.server_keys is not None:
        return Keys.read(Path(rollout.server_keys))
    return Keys.of_environment()


def _devices(rollout: RolloutSection) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each server that the run starts, on each of its hosts. Raises UserError."""
    hosts = rollout.server_hosts
    if hosts and not rollout.server_devices and rollout.servers <= len(hosts):
        return [None] * rollout.servers  # a host each, with all of its devices
    ranks = rollout.server_tensor_parallel // (len(hosts_of(hosts[0])) if hosts else 1)
    return devices_of_servers(list(rollout.server_devices), rollout.servers, ranks)


def default_tolerance(rollout: RolloutSection, dtype: torch.dtype) -> float:
    """`rollout.verify_tolerance` where the recipe leaves it out."""
    return TOLERANCE[dtype] if rollout.quantization == "none" else QUANTIZED_TOLERANCE


def _check_quantization(session: ModelSession, rollout: RolloutSection) -> None:
    """Raises UserError for quantised servers beside a trainer, or on devices, that they do not work with."""
    if rollout.quantization == "none":
        return
    if session.port.dtype != torch.bfloat16:
        raise UserError(
            f"rollout.quantization {rollout.quantization} needs a trainer in bfloat16, which model.dtype auto is on"
            " GPUs alone: set model.dtype bfloat16"
        )
    if torch.cuda.is_available() and not rollout.server_urls and torch.cuda.get_device_capability() < WITH_FP8:
        raise UserError(
            f"rollout.quantization {rollout.quantization}: {torch.cuda.get_device_name()} has no FP8 arithmetic, and"
            " SGLang repacks the weights there so that no others can be loaded: set rollout.quantization none"
        )


def _routing(session: ModelSession, rollout: RolloutSection) -> Routing | None:
    """What the servers return of the experts; None: nothing. Raises UserError for a model without experts."""
    if rollout.routing_replay != "engine":
        return None
    routing = Routing.of(session.hf_config)
    if routing is None:
        raise UserError("rollout.routing_replay engine: the model has no experts: set it to none")
    return routing


def _verifier(session: ModelSession, rollout: RolloutSection) -> WeightVerifier | None:
    """Raises UserError for an architecture that cannot be verified."""
    if not rollout.verify_weights:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return WeightVerifier(session.hf_config, dtype=session.port.dtype, device=device)


def _pool(session: ModelSession, rollout: RolloutSection, keys: Keys) -> ServerPool:
    folder = session.folder / "servers"
    return ServerPool(
        server_options(session, rollout, keys),
        folder,
        launcher=Launcher.of(rollout.server_launcher, folder) if rollout.server_hosts else None,
        first_port=rollout.server_port,
        start_timeout=rollout.server_start_timeout,
        router=rollout.router == "start",
        say=lambda text: session.progress.note(text),  # looked up late: `begin` replaces `progress`
    )


def _fleet(rollout: RolloutSection, keys: Keys, pool: ServerPool | None) -> Fleet:
    return Fleet(
        list(rollout.server_urls) if pool is None else pool.urls,
        api_key=keys.api,
        admin_key=keys.admin,
        max_concurrent=rollout.max_concurrent_requests,
        request_timeout=rollout.request_timeout,
        retries=rollout.max_retries,
        router_url=rollout.router if pool is None else pool.router_url,
    )


def server_options(session: ModelSession, rollout: RolloutSection, keys: Keys) -> list[ServerOptions]:
    """One for each server that the run starts."""
    arguments = dict(rollout.server_args)
    if rollout.placement == "colocated" and torch.cuda.is_available():
        arguments.setdefault("enable-memory-saver", True)
    if rollout.routing_replay == "engine":
        arguments.setdefault(SERVER_ARGUMENT, True)
    model = session.source
    if rollout.quantization != "none":
        model = write_model_without_weights(session.source, session.folder / "servers" / "model", session.port.dtype)
        arguments["load-format"] = "dummy"  # the first weight update brings all weights
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == BLACKWELL:
            arguments = {**BLACKWELL_ARGUMENTS, **arguments}
    devices, hosts = _devices(rollout), rollout.server_hosts
    return [
        ServerOptions(
            python=Path(rollout.server_python),
            model=model,
            tensor_parallel=rollout.server_tensor_parallel,
            devices=devices[index],
            api_key=keys.api,
            admin_key=keys.admin,
            dtype=str(session.port.dtype).removeprefix("torch."),
            deterministic=session.recipe.run.deterministic,
            arguments=arguments,
            nodes=tuple(hosts_of(host_of_server(hosts, index))) if hosts else (),
        )
        for index in range(rollout.servers)
    ]
