"""The rows of the GPU checks, cheap ones first: what each shows and needs, how it is run, where its figures are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gpu import figures
from gpu.machine import ROOT, Needs

TE = ("cuda", "transformer_engine")
SERVERS = ("cuda", "pytest", "sglang")
SERVER_TESTS = "tests/e2e/test_sglang_gpu.py"
MORE_SERVER_TESTS = "tests/e2e/test_sglang_gpus.py"
TF32 = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
REPORT = "{report}"
"""In a command: the file that its figures are read from."""


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        command: arguments of the running Python, REPORT in place of the report's path.
        seconds: within which it has to end.
        read: its figures from the report.
        environment: additional environment variables.
    """

    name: str
    shows: str
    needs: Needs
    command: tuple[str, ...]
    seconds: float = 600.0
    read: Callable[[Path], figures.Figures] = figures.of_tests
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def tests(self) -> tuple[str, ...]:
        """The files and tests that it gives to pytest."""
        return tuple(part for part in self.command if part.startswith("tests/"))

    def absent(self, root: Path = ROOT) -> str | None:
        """The test that the checkout lacks; None if it has all."""
        for test in self.tests:
            path, _, name = test.partition("::")
            if not (root / path).exists() or (name and not _defines(root / path, name)):
                return f"this checkout has no {test}"
        return None


def _defines(path: Path, name: str) -> bool:
    return re.search(rf"^def {re.escape(name.partition('[')[0])}\(", path.read_text(), re.MULTILINE) is not None


def _tests(*tests: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "--color=no", "-m", "gpu", f"--junitxml={REPORT}", *tests)


def _update(recipe: str) -> tuple[str, ...]:
    return ("-m", "asd_megatron.checks.te_update", recipe, "--json", REPORT)


def _parity(*arguments: str) -> tuple[str, ...]:
    return ("-m", "asd_megatron.cli.main", "parity", *arguments, "--json", REPORT)


def _parity_rows(ranks: int) -> tuple[Row, Row]:
    local = Row(
        f"parity_local_{ranks}",
        f"layouts of {ranks} rank{'s' if ranks > 1 else ''} beside one process, local layers, float32",
        Needs(ranks, others=("cuda",)),
        _parity("--ranks", str(ranks)),
        900.0,
        figures.of_parity,
    )
    te = Row(
        f"parity_te_{ranks}",
        f"the same with Transformer Engine's layers in bfloat16: cuDNN's attention{', its ring, NCCL' * (ranks > 1)}",
        Needs(ranks, others=TE),
        _parity("--layers", "te", "--dtype", "bfloat16", "--ranks", str(ranks)),
        900.0,
        figures.of_parity,
    )
    return local, te


def _fp8(recipe: str, what: str) -> Row:
    return Row(
        f"fp8_{recipe}",
        f"an update in FP8 with {what} beside bfloat16: loss, gradients, scores, no stale weights, checkpoints",
        Needs(others=(*TE, f"fp8_{recipe}")),
        _update(recipe),
        read=figures.of_update,
    )


def _server_row(name: str, shows: str, test: str, gpus: int = 1, *more: str) -> Row:
    return Row(name, shows, Needs(gpus, others=(*SERVERS, *more)), _tests(test), 1800.0)


ROWS: tuple[Row, ...] = (
    Row(
        "nvml",
        "which readings of NVML the driver gives this user, GPM included",
        Needs(others=("cuda", "pytest", "nvml")),
        _tests("tests/observe/test_gpu_telemetry.py"),
    ),
    Row(
        "te_signatures",
        "the installed Transformer Engine takes the arguments of the stand-in that the CPU tests use",
        Needs(others=("cuda", "pytest", "transformer_engine")),
        _tests("tests/models/test_te_gpu.py"),
    ),
    Row(
        "te_bfloat16",
        "which attention Transformer Engine chose; weight gradients are added in float32",
        Needs(others=TE),
        _update("none"),
        read=figures.of_update,
    ),
    _fp8("current", "current scaling"),
    _fp8("blockwise", "blocks of 128"),
    _fp8("mxfp8", "MXFP8"),
    Row(
        "te_checkpoints",
        "checkpoints of Transformer Engine's layers and optimizer for local layers, and the reverse, in bfloat16",
        Needs(others=("cuda", "pytest", "transformer_engine")),
        _tests("tests/checkpoint/test_te_gpu.py"),
    ),
    Row(
        "replicas",
        "checksums of tensors on a GPU, which compare the copies that ranks hold",
        Needs(others=("cuda", "pytest")),
        _tests("tests/trainer/test_replicas.py::test_on_cuda"),
    ),
    Row(
        "moments",
        "moments in bfloat16, the optimizer on the host, and its memory handed over: updates and checkpoints",
        Needs(others=("cuda", "pytest", "transformer_engine")),
        _tests("tests/trainer/test_precision_aware.py"),
    ),
    Row(
        "cuda_ipc",
        "weights passed between processes by CUDA IPC",
        Needs(others=("cuda", "pytest")),
        _tests("tests/rollout/sglang/weight_sync/test_cuda_ipc.py"),
    ),
    Row(
        "weight_deltas",
        "what has changed of weights on a GPU, found there and applied there bit for bit",
        Needs(others=("cuda", "pytest")),
        _tests("tests/rollout/sglang/weight_sync/test_delta.py"),
    ),
    Row(
        "ops",
        "the head and its Triton kernels against float64, and a tile of more than 2^31 logits",
        Needs(memory_gib=30, others=("cuda", "pytest")),
        _tests("tests/ops"),
    ),
    Row(
        "flex",
        "FlexAttention compiled against the local attention over prefix trees",
        Needs(others=("cuda", "pytest")),
        _tests("tests/models/test_flex.py"),
    ),
    Row(
        "head",
        "the fused head's time and memory beside the bare products, at Qwen3-4B's sizes",
        Needs(memory_gib=30, others=("cuda",)),
        ("tools/benchmark_head.py", "--tokens", "4096", "--vocab", "151936", "--hidden", "2560", "--json", REPORT),
        read=figures.of_head,
    ),
    Row(
        "cuda",
        "a run on one GPU beside the same rollouts trained on the CPU; bfloat16; the embedded engine",
        Needs(others=("cuda", "pytest")),
        _tests("tests/e2e/test_cuda.py"),
        1200.0,
    ),
    Row(
        "cuda_tf32",
        "the same where the environment asks for TF32, as in NVIDIA's containers: float32 stays float32",
        Needs(others=("cuda", "pytest")),
        _tests("tests/e2e/test_cuda.py"),
        1200.0,
        environment=TF32,
    ),
    Row(
        "apex",
        "weight gradients of local layers added by Apex's kernel: bfloat16 beside float32",
        Needs(others=("cuda", "apex")),
        _parity("bf16_micro_batches", "bf16_recompute_full"),
        900.0,
        figures.of_parity,
    ),
    *_parity_rows(1),
    *_parity_rows(2),
    *_parity_rows(4),
    _server_row(
        "sglang_disk",
        "training with a colocated server, weights through a folder",
        f"{SERVER_TESTS}::test_weights_through_a_folder",
    ),
    _server_row(
        "sglang_colocated",
        "the same by CUDA IPC: memory released and resumed, optimizer state in host memory, weight verification",
        f"{SERVER_TESTS}::test_colocated_servers_give_their_memory_to_the_trainer",
    ),
    _server_row(
        "sglang_evaluation",
        "a colocated server that also answers evaluations, of the same weights as a step before or after",
        f"{MORE_SERVER_TESTS}::test_a_colocated_server_evaluates",
    ),
    _server_row(
        "sglang_on_each_gpu",
        "two colocated servers, each with the memory of the trainer's rank on its own GPU",
        f"{MORE_SERVER_TESTS}::test_a_colocated_server_on_each_gpu",
        2,
    ),
    _server_row(
        "sglang_fp8",
        "a colocated server in block-wise FP8 under a bfloat16 trainer",
        f"{SERVER_TESTS}::test_a_quantised_server",
        1,
        "fp8_servers",
    ),
    _server_row(
        "nccl_1x1",
        "weights broadcast over NCCL from one GPU to one server on another",
        f"{SERVER_TESTS}::test_servers_on_other_devices_are_sent_weights_over_nccl",
        2,
    ),
    _server_row(
        "nccl_2x1",
        "the same from a trainer of TP2 to two servers on a GPU each",
        f"{MORE_SERVER_TESTS}::test_weights_over_nccl[2x1]",
        4,
    ),
    _server_row(
        "nccl_1x2",
        "the same to one server of TP2",
        f"{MORE_SERVER_TESTS}::test_weights_over_nccl[1x2]",
        4,
    ),
    _server_row(
        "nccl_2x2",
        "the same to two servers of TP2",
        f"{MORE_SERVER_TESTS}::test_weights_over_nccl[2x2]",
        6,
    ),
)
