"""`run.deterministic`: the same recipe on the same machine and layout gives the same bits.

A reproducible run needs more than seeds: kernels that add in a fixed order, collectives that always take the same
algorithm, and on a CPU matrix products whose rows do not depend on how many rows there are (`rows_are_independent`).
Libraries read their environment variables at their first call, so `prepare` comes before CUDA starts and before the
first product.

Whether it is on, the other modules ask PyTorch: `torch.are_deterministic_algorithms_enabled()`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch

from asd_megatron.errors import UserError

log = logging.getLogger("asd_megatron")


@dataclass(frozen=True)
class _Variable:
    """An environment variable: the value that is set where the user set none, the values that are as good, and why."""

    name: str
    value: str
    accepted: tuple[str, ...]
    why: str

    def conflict(self, environment: Mapping[str, str]) -> str | None:
        given = environment.get(self.name)
        if given is None or given in self.accepted:
            return None
        return f"{self.name} is {given!r}, and {self.why}: unset it, or set it to {' or '.join(self.accepted)}"


_ON_CUDA = (
    _Variable(
        "CUBLAS_WORKSPACE_CONFIG",
        ":4096:8",
        (":4096:8", ":16:8"),
        "with another workspace cuBLAS adds in an order that depends on its streams",
    ),
    _Variable(
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
        "0",
        ("0",),
        "Transformer Engine then takes attention kernels that add gradients in any order",
    ),
    _Variable(
        "NCCL_ALGO",
        "Ring",
        ("Ring", "Tree", "ring", "tree"),
        "NCCL may then change its algorithm, and with it the order of sums",
    ),
)
_ON_CPU = (
    _Variable(
        "MKL_CBWR",
        "AUTO,STRICT",
        ("AUTO,STRICT", "AVX2,STRICT", "AVX512,STRICT", "AVX512_E1,STRICT"),
        "MKL then takes another kernel for few rows, which adds in another order",
    ),
)


def variables(*, cuda: bool) -> dict[str, str]:
    """The environment variables of a process that computes deterministically, on CUDA or on the CPU alone."""
    return {variable.name: variable.value for variable in (_ON_CUDA if cuda else _ON_CPU)}


def prepare(environment: MutableMapping[str, str], *, cuda: bool, dtype: str = "auto") -> None:
    """Make this process deterministic; `environment` is its own, `os.environ`, `dtype` the recipe's `model.dtype`.
    Before CUDA starts and before the first matrix product. Raises UserError for a variable of the user's that cannot
    be, and warns, on rank 0, where log-probs of engine and trainer may differ in their last bits."""
    wanted = _ON_CUDA if cuda else _ON_CPU
    conflicts = [text for variable in wanted if (text := variable.conflict(environment)) is not None]
    if conflicts:
        raise UserError(f"run.deterministic: {'; '.join(conflicts)}")
    for variable in wanted:
        environment.setdefault(variable.name, variable.value)
    # Strict: an operation without a deterministic kernel raises, and attention's backward pass takes one that has none
    # where only a warning is asked for.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all are written first
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if not cuda and environment.get("RANK", "0") == "0" and not rows_are_independent(kind):
        log.warning(
            "run.deterministic: on this CPU a row of a product in %s depends on how many rows there are. The run is"
            " reproducible, but log-probs of the engine may differ from the trainer's in their last bits",
            str(kind).removeprefix("torch."),
        )


def rows_are_independent(dtype: torch.dtype) -> bool:
    """Whether a row of a matrix product on this CPU is the same number for number in a product of any number of rows.

    Then a token has the same log-prob in whatever batch it is sampled, and in whatever pack it is scored. MKL's strict
    mode has it for float32; oneDNN, which multiplies bfloat16, does not promise it. Looks at some products, in
    milliseconds.
    """
    generator = torch.Generator().manual_seed(0)
    for width, columns in ((64, 61), (96, 192), (576, 1536)):
        x = torch.randn(67, width, generator=generator).to(dtype)
        weight = torch.randn(columns, width, generator=generator).to(dtype).t()
        complete = torch.mm(x, weight)
        for rows in (*range(1, 20), 31, 48, 66):
            if not torch.equal(torch.mm(x[:rows].clone(), weight), complete[:rows]):
                return False
    return True
