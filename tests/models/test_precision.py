"""FP8 recipes: Megatron's keys, and what machines and shapes are refused."""

from __future__ import annotations

from typing import Any

import pytest

from asd_megatron.models.families import shape_of
from asd_megatron.models.precision import BFLOAT16, Machine, Precision

HOPPER = Machine((9, 0), (12, 9), (2, 11))
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
}


def test_megatron_takes_the_keys() -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    size = {"num_layers": 8, "hidden_size": 64, "num_attention_heads": 4}
    for fp8, name, gradients in (("current", "tensorwise", "hybrid"), ("blockwise", "blockwise", "e4m3")):
        precision = Precision(fp8, first_layers=2, last_layers=1, parameters=True)  # type: ignore[arg-type]
        config = TransformerConfig(**size, bf16=True, **precision.model_keys())
        assert (config.fp8, config.fp8_recipe, config.fp8_param) == (gradients, name, True)
        assert config.first_last_layers_bf16 and not config.fp8_dot_product_attention
        assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (2, 1)
        assert DistributedDataParallelConfig(use_distributed_optimizer=True, **precision.data_parallel_keys())
        assert OptimizerConfig(**precision.optimizer_keys()).fp8_recipe == name
    assert not Precision("current", first_layers=0, last_layers=0).model_keys()["first_last_layers_bf16"]
    text = Precision("blockwise", first_layers=2).text(36)
    assert all(part in text for part in ("blockwise", "3 to 35 of 36", "gradients e4m3", "scoring passes in bfloat16"))
    assert BFLOAT16.model_keys() == BFLOAT16.optimizer_keys() == BFLOAT16.data_parallel_keys() == {}
    assert [Precision(fp8).alignment for fp8 in ("none", "current", "mxfp8", "blockwise")] == [1, 16, 32, 128]


@pytest.mark.parametrize(
    ("fp8", "machine", "problem"),
    [
        ("none", Machine((7, 0), (11, 8), (2, 9)), None),
        ("current", HOPPER, None),
        ("current", Machine((9, 0), (12, 4), (2, 11)), None),
        ("current", Machine((8, 0), (12, 9), (2, 11)), "8.0.* has no FP8.*precision.fp8 none"),
        ("blockwise", HOPPER, None),
        ("blockwise", Machine((9, 0), (13, 0), (2, 11)), None),
        ("blockwise", Machine((9, 0), (12, 8), (2, 11)), "CUDA 12.9, and torch is built for 12.8.*fp8 current"),
        ("blockwise", Machine((8, 9), (12, 9), (2, 11)), "compute capability 9.0.*8.9.*precision.fp8 none"),
        ("mxfp8", Machine((10, 0), (12, 9), (2, 11)), None),
        ("mxfp8", HOPPER, "10.0.*Blackwell.*9.0.*blockwise or current"),
        ("mxfp8", Machine((12, 0), (13, 0), (2, 18)), "no MXFP8 for compute capability 12.0"),
    ],
)
def test_machines(fp8: Any, machine: Machine, problem: str | None) -> None:
    check(Precision(fp8).machine_problem(machine), problem)


@pytest.mark.parametrize(
    ("fp8", "tensor", "change", "problem"),
    [
        ("blockwise", 8, {}, None),
        ("mxfp8", 4, {"hidden_size": 2576}, "multiples of 32.*hidden_size .2576.*precision.fp8 none"),
        ("current", 1, {"hidden_size": 4100}, "multiples of 16.*hidden_size .4100"),
        ("current", 4, {"intermediate_size": 4 * 24}, "intermediate_size over 4 tensor-parallel ranks .24.*lower"),
        ("blockwise", 2, {"num_hidden_layers": 2}, "leave none of the model's 2 layers.*lower them"),
        ("none", 8, {"hidden_size": 4100, "num_hidden_layers": 1}, None),
    ],
)
def test_shapes(fp8: Any, tensor: int, change: dict[str, Any], problem: str | None) -> None:
    _, shape = shape_of({**QWEN3_8B, **change})
    check(Precision(fp8).shape_problem(shape, tensor), problem)


def check(found: str | None, pattern: str | None) -> None:
    if pattern is None:
        assert found is None
    else:
        assert found is not None
        with pytest.raises(AssertionError, match=pattern):
            raise AssertionError(found)
