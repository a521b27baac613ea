"""Section `rollout`: where rollouts come from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from asd_megatron.config.base import Section, Text, TextList


class RolloutSection(Section):
    """The rollout engine."""

    engine: Literal["embedded", "sglang", "replay"] = Field(
        "embedded",
        description=(
            "`embedded`: sample on the training model itself; `sglang`: SGLang servers (docs/sglang.md); `replay`: read"
            " the dumps of an earlier run."
        ),
    )
    replay_folder: Text | None = Field(
        None, description="`replay`: the run folder whose rollout dumps are read, or its folder `rollouts`."
    )
    max_batch_size: int = Field(
        256, ge=1, description="`embedded`: responses that a model-parallel group samples at once."
    )
    collect_timeout: float = Field(
        3600.0,
        gt=0,
        description=(
            "Seconds within which the engine must finish at least one more group (`embedded`: all of them); otherwise"
            " the run saves its state and stops."
        ),
    )

    overlap: bool = Field(
        False,
        description="`sglang`: generate step k + 1 while step k trains. Rollouts are then one step off-policy.",
    )
    oversampling: float = Field(
        1.0,
        ge=1,
        description=(
            "`sglang`: problems requested over problems trained on; the groups that finish last are cancelled, which"
            " prefers short responses."
        ),
    )
    partial_rollouts: bool = Field(
        False,
        description=(
            "`sglang` with `oversampling`: keep the tokens of cancelled groups, and continue them in the next step"
            " under its weights."
        ),
    )
    max_staleness: int = Field(
        1,
        ge=0,
        description=(
            "`sglang`: groups with a response staler than this many weight versions are discarded and resampled."
        ),
    )

    servers: int = Field(
        1, ge=1, description="`sglang`: servers that the run starts, on this machine or on `server_hosts`."
    )
    server_urls: TextList = Field(
        (),
        description=(
            "`sglang`: use these running servers instead of starting any (`asd-megatron serve`). Keys: `server_keys`."
        ),
    )
    server_keys: Text | None = Field(
        None,
        description=(
            "`server_urls`: the file of their keys, as `asd-megatron serve` writes it (`keys.env`), readable by you"
            " alone; null: the environment variables ASD_MEGATRON_API_KEY and ASD_MEGATRON_ADMIN_KEY."
        ),
    )
    server_hosts: TextList = Field(
        (),
        description=(
            "`sglang`: other nodes on which the run starts its servers, by name or address: server k on host k modulo"
            " their number (docs/cluster.md, Servers on other nodes). An entry `a+b` is one server whose tensor"
            " parallelism spans both. Empty: this machine."
        ),
    )
    server_launcher: Text | None = Field(
        None,
        description=(
            "`server_hosts`: the command that starts another on a node, whose name replaces `{host}`, for instance `ssh"
            " -o BatchMode=yes {host}`; null: inside a Slurm job `srun --overlap --nodes=1 --ntasks=1"
            " --nodelist={host}`."
        ),
    )
    server_port: int = Field(
        0,
        ge=0,
        lt=65536,
        description="`server_hosts`: servers take the first free ports of their host from this one on; 0: any.",
    )
    server_python: Text = Field(
        ".venv-sglang/bin/python",
        description="`sglang`: the Python of SGLang's own environment (`tools/sglang_env/create.sh`).",
    )
    server_devices: TextList = Field(
        (),
        description=(
            '`sglang`: CUDA devices of each server that is started, for instance ["4,5", "6,7"]; for one on two hosts'
            " those of each of them."
        ),
    )
    server_tensor_parallel: int = Field(1, ge=1, description="`sglang`: tensor-parallel size of each server.")
    quantization: Literal["none", "fp8"] = Field(
        "none",
        description=(
            "`sglang`: number format of the servers' matrices and their inputs (docs/sglang.md, FP8 rollouts). `fp8`:"
            " e4m3, a scale for each 128 x 128 block of a weight and each 128 values of a token; the trainer quantises"
            " what it sends. Turns on `algorithm.importance_correction` unless the recipe sets it."
        ),
    )
    server_args: dict[str, Any] = Field(
        {}, description="`sglang`: further arguments of the servers that are started, as SGLang names them."
    )
    server_start_timeout: float = Field(
        900.0, gt=0, description="`sglang`: seconds within which a server has to be ready."
    )
    server_wait_timeout: float = Field(
        900.0, gt=0, description="`sglang`: seconds without any server after which the run saves its state and stops."
    )
    router: Text | None = Field(
        None,
        description=(
            "`sglang`: `start` starts an sglang-router in front of the servers and generates through it; a URL uses a"
            " running one; null distributes the requests without a router."
        ),
    )
    max_concurrent_requests: int = Field(
        256, ge=1, description="`sglang`: responses in flight on one server; further ones wait."
    )
    request_timeout: float = Field(
        3600.0, gt=0, description="`sglang`: seconds for one response, after which it is retried on another server."
    )
    max_retries: int = Field(
        3, ge=0, description="`sglang`: times a failed response is retried before its group is given up."
    )
    placement: Literal["disaggregated", "colocated"] = Field(
        "disaggregated",
        description=(
            "`sglang`: `disaggregated`: the servers have devices of their own; `colocated`: they share the trainer's"
            " devices, and release their memory while it trains."
        ),
    )
    offload_optimizer: bool = Field(
        False,
        description=(
            "`colocated`: while rollouts are generated, the optimizer's state is in host memory and gradients have"
            " none."
        ),
    )
    weight_sync: Literal["distributed", "cuda_ipc", "disk"] = Field(
        "distributed",
        description=(
            "`sglang`: transport of the weights to the servers (docs/weight_sync.md). `distributed`: broadcast, NCCL or"
            " gloo; `cuda_ipc`: shared device memory, for `colocated` servers; `disk`: a folder that the servers"
            " read."
        ),
    )
    weight_sync_folder: Text | None = Field(
        None, description="The folder of `weight_sync: disk`; null: `weights` in the run folder."
    )
    weight_sync_bucket_mib: int = Field(
        512, ge=1, description="`sglang`: weights are sent in buckets of at most this many MiB."
    )
    weight_sync_timeout: float = Field(
        180.0,
        gt=0,
        description=(
            "`sglang`: seconds for one bucket, or for the servers to read a folder, after which a server counts as"
            " hanging."
        ),
    )
    weight_sync_address: Text | None = Field(
        None,
        description=(
            "`weight_sync: distributed`: the trainer's address to which the servers connect; null: that of the"
            " interface from which they are reached."
        ),
    )
    weight_sync_full_every: int = Field(
        1,
        ge=1,
        description=(
            "`weight_sync: distributed`, bfloat16: every n-th weight update is complete, the others send only the"
            " elements that have changed since the last one, with the same result bit for bit (docs/weight_sync.md,"
            " Deltas). For slow networks. 1: every update is complete. Takes host memory on the first rank of every"
            " pipeline stage, of the size of that stage's weights."
        ),
    )
    routing_replay: Literal["none", "engine", "scoring"] = Field(
        "none",
        description=(
            "Models with experts: which choices of experts are replayed when the student's log-probs are computed."
            " `none`: the trainer routes every token by itself; `engine`: those of the SGLang servers, returned"
            " with the rollouts; `scoring`: those of the trainer's own scoring pass before the updates."
        ),
    )
    verify_weights: bool = Field(
        True,
        description=(
            "`sglang`: after every weight update compare the servers' checksum of each tensor, and their log-probs of a"
            " fixed sequence (the probe), with the trainer's. A wrong checksum stops the run; log-probs beyond"
            " `verify_tolerance` warn, and stop it after the second update in a row."
        ),
    )
    verify_tolerance: float | None = Field(
        None,
        gt=0,
        description=(
            "Largest mean absolute difference of the probe's log-probs (nats); null: 1e-3 in float32, 0.1 in bfloat16,"
            " 0.5 with `quantization`."
        ),
    )
