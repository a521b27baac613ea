"""The recipe's SGLang servers: started or attached to, and made into a rollout engine."""

from __future__ import annotations

import os
import random
import secrets
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from asd_megatron.config import Recipe
from asd_megatron.config.rollout import Rollout
from asd_megatron.errors import UserError
from asd_megatron.models.port import ModelPort
from asd_megatron.rollout.sglang.client.api import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from asd_megatron.rollout.sglang.client.fleet import Fleet
from asd_megatron.rollout.sglang.controller import Controller, ServedModel
from asd_megatron.rollout.sglang.engine import SGLangEngine
from asd_megatron.rollout.sglang.grouping import Assembler, Labels
from asd_megatron.rollout.sglang.servers.options import ServerOptions, check_environment, devices_of_servers
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.weight_sync.cuda_ipc import CudaIpcTransport
from asd_megatron.rollout.sglang.weight_sync.disk import DiskTransport
from asd_megatron.rollout.sglang.weight_sync.distributed import DistributedTransport
from asd_megatron.rollout.sglang.weight_sync.protocol import Transport
from asd_megatron.rollout.sglang.weight_sync.verification import Receipt
from asd_megatron.run.session import Session
from asd_megatron.trainer.scorer import score_sequence

MIB = 2**20
PROBE_TOKENS = 32
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}


@dataclass(frozen=True)
class Keys:
    """What the servers are asked with: one key for generation, one for administration."""

    api: str = field(repr=False)
    admin: str = field(repr=False)

    @classmethod
    def given(cls) -> Keys:
        return cls(os.environ.get(API_KEY_VARIABLE, ""), os.environ.get(ADMIN_KEY_VARIABLE, ""))

    @classmethod
    def new(cls) -> Keys:
        return cls(secrets.token_urlsafe(32), secrets.token_urlsafe(32))


def sglang_engine(session: Session) -> SGLangEngine:
    """The engine of a recipe with `rollout.engine: sglang`. Collective. Servers start with `SGLangEngine.start`."""
    port = session.port
    rollout = _rollout(session)
    probe = None
    if rollout.receipt:
        probe = partial(score_sequence, port, session.process_groups, probe_ids(port), session.pack_layout)
    return SGLangEngine(
        session.process_groups,
        session.only_root(lambda: _backend(session, rollout)),
        probe=probe,
        max_positions=port.max_positions,
        end_ids=session.end_ids,
    )


def probe_ids(port: ModelPort) -> tuple[int, ...]:
    """A fixed sequence of any tokens: who computes the same model gives it the same log-probs."""
    return tuple(random.Random(0).choices(range(port.vocab_size), k=min(PROBE_TOKENS, port.max_positions)))


def _rollout(session: Session) -> Rollout:
    assert isinstance(session.recipe, Recipe)
    return session.recipe.rollout


def _backend(session: Session, rollout: Rollout) -> Controller:
    """Everything that global rank 0 needs, nothing of it started yet. Raises UserError for an environment that cannot
    serve."""
    port, labels, closing = session.port, Labels(), ExitStack()
    receipt = None
    if rollout.receipt:  # refuses an architecture that it does not know
        device = "cuda" if torch.cuda.is_available() else "cpu"
        receipt = Receipt(session.hf_config, dtype=port.dtype, device=device)
    pool: ServerPool | None = None
    keys = Keys.given() if rollout.server_urls else Keys.new()
    if not rollout.server_urls:
        pool = ServerPool(
            server_options(session, rollout, keys),
            session.folder / "servers",
            start_timeout=rollout.server_start_timeout,
            router=rollout.router == "start",
            say=lambda text: session.progress.note(text),  # `begin` makes the one that shows
        )
        closing.callback(pool.close)
    transport = _transport(session, rollout)
    closing.callback(transport.close)
    fleet = Fleet(
        list(rollout.server_urls) if pool is None else pool.urls,
        api_key=keys.api,
        admin_key=keys.admin,
        max_concurrent=rollout.max_concurrent_requests,
        request_timeout=rollout.request_timeout,
        retries=rollout.max_retries,
        router_url=rollout.router if pool is None else pool.router_url,
    )
    closing.callback(fleet.close)
    return Controller(
        fleet,
        transport,
        Assembler(session.tokenizer, session.recipe.run.seed, labels),
        labels,
        model=ServedModel(tuple(session.hf_config.get("architectures") or ()), port.vocab_size),
        pool=pool,
        receipt=receipt,
        probe_ids=probe_ids(port),
        tolerance=rollout.receipt_tolerance or TOLERANCE[port.dtype],
        start_timeout=rollout.server_start_timeout,
        wait_timeout=rollout.server_wait_timeout,
        colocated=rollout.placement == "colocated",
        closing=closing,
    )


def server_options(session: Session, rollout: Rollout, keys: Keys) -> list[ServerOptions]:
    """One a server that the run starts."""
    arguments = dict(rollout.server_args)
    if rollout.placement == "colocated" and torch.cuda.is_available():
        arguments.setdefault("enable-memory-saver", True)
    devices = devices_of_servers(list(rollout.server_devices), rollout.servers, rollout.server_tensor_parallel)
    return [
        ServerOptions(
            python=Path(rollout.server_python),
            model=session.source,
            tensor_parallel=rollout.server_tensor_parallel,
            devices=devices[index],
            api_key=keys.api,
            admin_key=keys.admin,
            dtype=str(session.port.dtype).removeprefix("torch."),
            arguments=arguments,
        )
        for index in range(rollout.servers)
    ]


def _transport(session: Session, rollout: Rollout) -> Transport:
    if rollout.weight_sync == "disk":
        folder = Path(rollout.weight_sync_folder or session.folder / "weights")
        return DiskTransport(folder, session.source, timeout=rollout.weight_sync_timeout)
    if rollout.weight_sync == "cuda_ipc":
        return CudaIpcTransport(
            check_environment(Path(rollout.server_python)).torch,
            bucket_bytes=rollout.weight_sync_bucket_mib * MIB,
            timeout=rollout.weight_sync_timeout,
        )
    if not rollout.server_urls and torch.cuda.is_available():
        _check_nccl(Path(rollout.server_python))
    return DistributedTransport(
        address=rollout.weight_sync_address,
        device=session.port.device,
        bucket_bytes=rollout.weight_sync_bucket_mib * MIB,
        timeout=rollout.weight_sync_timeout,
    )


def _check_nccl(python: Path) -> None:
    """Two NCCL versions in one group hang or fail obscurely."""
    theirs, ours = check_environment(python).nccl, ".".join(map(str, torch.cuda.nccl.version()))
    if theirs is not None and theirs != ours:
        raise UserError(
            f"rollout.weight_sync distributed: the trainer has NCCL {ours} and the servers' environment has {theirs};"
            " both sides of a broadcast need the same: install the trainer with the servers' torch"
            " (docs/gpu_checks.md), or set rollout.weight_sync disk"
        )
