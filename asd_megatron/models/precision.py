"""In which number format a model computes: the FP8 recipe, what it asks of shapes and machines, Megatron's keys for it.

FP8 products run in Transformer Engine's linear layers alone. Embedding, head, norms, router and attention stay in
bfloat16, as do the first and last layers that `Precision` names, and the weights that leave the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from asd_megatron.models.family import ModelShape

Scaling = Literal["none", "current", "blockwise", "mxfp8"]
Version = tuple[int, ...]

MEGATRON_RECIPES = {"current": "tensorwise", "blockwise": "blockwise", "mxfp8": "mxfp8"}
ROW_ALIGNMENT = {"none": 1, "current": 16, "blockwise": 128, "mxfp8": 32}
"""Tokens of a rank's part of a pack are a multiple of this: of Megatron's own padding of experts (16, 32), and of the
128 rows below which Transformer Engine gathers blockwise activations in bfloat16."""
FEATURE_ALIGNMENT = {"none": 1, "current": 16, "blockwise": 16, "mxfp8": 32}
"""Inputs and outputs of a linear layer on one rank are a multiple of this (`assert_dim_for_fp8_exec`; MXFP8's blocks).
Inputs that are no multiple of 128 are gathered in bfloat16 under sequence parallelism and blockwise scaling."""


@dataclass(frozen=True)
class Machine:
    """What decides about FP8 on a machine: the GPU's compute capability, CUDA and Transformer Engine by version."""

    capability: tuple[int, int]
    cuda: Version
    transformer_engine: Version


@dataclass(frozen=True)
class ScoreFormats:
    """The number formats in which a model can compute log-probs and entropies. Numbers are comparable only if the texts
    of their formats are equal.

    Attributes:
        plain: without the FP8 recipe. fp8: with it; None for a model that has none.
        in_fp8: whether scoring passes use the recipe.
    """

    plain: str
    fp8: str | None = None
    in_fp8: bool = False

    @property
    def present(self) -> str:
        """The format of scoring passes."""
        return self.fp8 if self.in_fp8 and self.fp8 is not None else self.plain

    @property
    def other(self) -> str | None:
        """The format that scoring passes could have instead."""
        return self.plain if self.in_fp8 else self.fp8


@dataclass(frozen=True)
class Precision:
    """The FP8 recipe of a model.

    Attributes:
        fp8: `current`: one scale a tensor, from its own maximum; `blockwise`: a scale for 1 x 128 activations and for
            128 x 128 weights; `mxfp8`: a power of two for 1 x 32. "none": bfloat16.
        format: of gradients: `hybrid` e5m2, `e4m3` as everything else; `auto`: hybrid with `current` scaling.
        first_layers, last_layers: how many layers at either end compute in bfloat16.
        scores: whether scoring passes compute in FP8 too.
        parameters: whether the weights themselves are kept and gathered in FP8.
    """

    fp8: Scaling = "none"
    format: Literal["auto", "hybrid", "e4m3"] = "auto"
    first_layers: int = 1
    last_layers: int = 1
    scores: bool = False
    parameters: bool = False

    @property
    def enabled(self) -> bool:
        return self.fp8 != "none"

    @property
    def alignment(self) -> int:
        """The multiple that a rank's tokens of a pack are padded to."""
        return ROW_ALIGNMENT[self.fp8]

    def score_formats(self, dtype: str) -> ScoreFormats:
        """The score formats of a model of `dtype`."""
        weights = " with FP8 weights" if self.parameters else ""
        ends = f"{self.first_layers} + {self.last_layers} layers {dtype}"
        return ScoreFormats(dtype + weights, f"fp8 {self.fp8} ({ends}){weights}" if self.enabled else None, self.scores)

    @property
    def gradient_format(self) -> str:
        if self.format != "auto":
            return self.format
        return "hybrid" if self.fp8 == "current" else "e4m3"

    def text(self, layers: int) -> str:
        """For the start-up report. layers: of the model."""
        gradients = "e5m2" if self.gradient_format == "hybrid" else "e4m3"
        first, last = self.first_layers + 1, layers - self.last_layers
        scoring = "scoring passes too" if self.scores else "scoring passes in bfloat16"
        weights = "kept in FP8" if self.parameters else "kept in bfloat16"
        return (
            f"{self.fp8} scaling in the linear layers of layers {first} to {last} of {layers} (e4m3, gradients"
            f" {gradients}), {scoring}, weights {weights}"
        )

    def model_keys(self) -> dict[str, Any]:
        """For Megatron's TransformerConfig."""
        if not self.enabled:
            return {}
        return {
            "fp8": self.gradient_format,
            "fp8_recipe": MEGATRON_RECIPES[self.fp8],
            "fp8_param": self.parameters,
            "first_last_layers_bf16": self.first_layers + self.last_layers > 0,
            "num_layers_at_start_in_bf16": self.first_layers,
            "num_layers_at_end_in_bf16": self.last_layers,
        }

    def data_parallel_keys(self) -> dict[str, Any]:
        """For Megatron's DistributedDataParallelConfig."""
        return {"fp8_param_gather": True} if self.parameters else {}

    def optimizer_keys(self) -> dict[str, Any]:
        """For Megatron's OptimizerConfig."""
        return {"fp8_recipe": MEGATRON_RECIPES[self.fp8]} if self.parameters else {}

    def machine_problem(self, machine: Machine) -> str | None:
        """Why the machine cannot compute so, with what to change; None if it can. As Transformer Engine decides itself
        (`check_recipe_support`), but before the model is built."""
        if not self.enabled:
            return None
        capability, cuda = ".".join(map(str, machine.capability)), ".".join(map(str, machine.cuda[:2]))
        asked, bf16 = f"precision.fp8 {self.fp8}", "precision.fp8 none"
        if machine.capability < (8, 9):
            return f"{asked}: this GPU (compute capability {capability}) has no FP8 arithmetic; set {bf16}"
        if self.fp8 == "mxfp8" and machine.capability < (10, 0):
            return (
                f"{asked} needs compute capability 10.0 (Blackwell), and this GPU has {capability}; set precision.fp8"
                " blockwise or current"
            )
        if self.fp8 == "mxfp8" and machine.capability >= (12, 0):
            return f"{asked}: Transformer Engine has no MXFP8 for compute capability {capability}; set {bf16}"
        if self.fp8 == "blockwise" and machine.capability < (9, 0):
            return f"{asked} needs compute capability 9.0 (Hopper), and this GPU has {capability}; set {bf16}"
        if self.fp8 == "blockwise" and machine.cuda < (12, 9):
            return f"{asked} needs CUDA 12.9, and torch is built for {cuda}; set precision.fp8 current"
        return None

    def shape_problem(self, shape: ModelShape, tensor: int) -> str | None:
        """Why a model in tensor parallelism `tensor` cannot compute so, with what to change; None if it can."""
        if not self.enabled:
            return None
        if self.first_layers + self.last_layers >= shape.layers:
            return (
                f"precision.bf16_first_layers {self.first_layers} and precision.bf16_last_layers {self.last_layers}"
                f" leave none of the model's {shape.layers} layers to precision.fp8 {self.fp8}: lower them"
            )
        multiple = FEATURE_ALIGNMENT[self.fp8]
        projection = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        sizes = {
            "hidden_size": shape.hidden,
            f"queries, keys and values over {tensor} tensor-parallel ranks": projection // tensor,
            f"attention output over {tensor} tensor-parallel ranks": shape.heads * shape.head_dim // tensor,
        }
        if shape.experts is not None:
            sizes["moe_intermediate_size"] = shape.experts.ffn
        else:
            sizes[f"intermediate_size over {tensor} tensor-parallel ranks"] = shape.ffn // tensor
        wrong = [f"{name} ({size})" for name, size in sizes.items() if size % multiple]
        if not wrong:
            return None
        return (
            f"precision.fp8 {self.fp8} needs multiples of {multiple}, and {', '.join(wrong)} is none; lower"
            " parallelism.tensor, or set precision.fp8 none"
        )


BFLOAT16 = Precision()
