"""Block-wise FP8: against a float64 search of the nearest e4m3 number, which tensors, their checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from asd_megatron.rollout.sglang.weight_sync.checksums import ServerChecksums, server_pieces
from asd_megatron.rollout.sglang.weight_sync.disk import DiskTransport
from asd_megatron.rollout.sglang.weight_sync.quantize import (
    BLOCK,
    FP8,
    QUANTIZATION,
    dequantize,
    is_quantized,
    quantize,
    quantized,
    write_model_without_weights,
)
from tests.models import tiny
from tests.rollout.sglang.weight_sync.world import FakeReceiver, Named, tensors

BLOCKS: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
REPRESENTABLE = torch.arange(256, dtype=torch.uint8).view(FP8).double()
REPRESENTABLE = REPRESENTABLE[REPRESENTABLE.isfinite()].unique()


def _reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(what each element may be rounded to at most away from it, scales) by block in float64."""
    nearest = torch.empty(weight.shape, dtype=torch.float64)
    scales = torch.empty(weight.shape[0] // BLOCK, weight.shape[1] // BLOCK, dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1))
            block = weight[at].double()
            scales[i, j] = block.abs().max() / 448 if block.any() else 1.0
            distances = (block.flatten() / scales[i, j])[:, None] - REPRESENTABLE
            nearest[at] = distances.abs().amin(dim=1).view(BLOCK, BLOCK)
    return nearest, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_is_the_nearest_of_its_block(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 384).mul(torch.logspace(-6, 3, 384)).to(dtype)  # blocks of very different sizes
    weight[128:, :128] = 0
    weight[0, 200] = 1e4  # an outlier costs its own block alone
    values, scales = quantize(weight)
    nearest, wanted = _reference(weight)
    assert values.dtype == FP8 and values.shape == weight.shape and scales.dtype == torch.float32
    torch.testing.assert_close(scales.double(), wanted, rtol=1e-6, atol=0)
    each = scales.double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    distance = (weight.double() / each - values.double()).abs()
    assert (distance <= nearest + 1e-4).all() and values.double().abs().max() == 448
    assert torch.equal(dequantize(values, scales, torch.float32).double(), (values.double() * each).float().double())


def test_a_number_that_is_not_finite_stays_one_and_sizes_have_to_fit() -> None:
    weight = torch.ones(128, 256)
    weight[3, 5] = torch.nan
    found = dequantize(*quantize(weight))
    assert found[:, :128].isnan().all() and (found[:, 128:] == 1).all()
    with pytest.raises(ValueError, match="100 x 128"):
        quantize(torch.ones(100, 128))


@pytest.mark.parametrize("family", ["llama", "mistral", "olmo3", "qwen2", "qwen3", "qwen3_moe"])
def test_the_matrices_of_every_family_and_nothing_else(family: str, tmp_path: Path) -> None:
    over = {"moe_intermediate_size": 128} if family == "qwen3_moe" else {}
    stream = tensors(getattr(tiny, f"tiny_{family}")(tmp_path / "model", **BLOCKS, **over), 1)
    kept = {name for name, _ in stream if not is_quantized(name)}
    assert all("norm" in n or n.endswith((".bias", "mlp.gate.weight")) or "layers" not in n for n in kept)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= kept
    sent = list(quantized(stream))
    assert [name for name, _ in sent if not name.endswith("_scale_inv")] == [name for name, _ in stream]
    assert len(sent) == len(stream) + len(stream) - len(kept)
    assert all((tensor.dtype == FP8) == is_quantized(name) for name, tensor in sent)


def _sha(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _checksums(config: dict[str, Any], stream: Named, ranks: int) -> list[dict[str, str]]:
    sums = ServerChecksums(config, [ranks], torch.bfloat16, "cpu")
    assert [name for name, _ in sums.watch(quantized(stream))] == [name for name, _ in quantized(stream)]
    return [sums.expected(ranks, rank) for rank in range(ranks)]


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_checksums_are_of_the_numbers_that_values_and_scales_stand_for(family: str, tmp_path: Path) -> None:
    """The dense reference quantises what each rank holds, fused: blocks do not cross parts or ranks."""
    over = {"moe_intermediate_size": 256} if family == "qwen3_moe" else {}
    folder = getattr(tiny, f"tiny_{family}")(tmp_path / "model", **{**BLOCKS, "num_key_value_heads": 4}, **over)
    config = json.loads((folder / "config.json").read_text())
    stream = [(name, tensor.bfloat16()) for name, tensor in tensors(folder, 1)]
    parts: dict[str, list[Tensor]] = {}
    found = _checksums(config, stream, 2)
    for rank in (0, 1):
        parts = {}
        for name, piece in server_pieces(config, "cpu").items():
            tensor = dict(stream)[name]
            cut = piece.cut(tensor, rank, 2).contiguous()
            parts.setdefault(piece.target, []).append(dequantize(*quantize(cut)) if is_quantized(name) else cut)
        assert found[rank] == {name: _sha(torch.cat(held)) for name, held in parts.items()}


def test_one_step_of_one_value_or_of_one_scale_is_another_checksum(tmp_path: Path) -> None:
    folder = tiny.tiny_qwen3(tmp_path / "model", **BLOCKS)
    config = json.loads((folder / "config.json").read_text())
    stream = [(name, tensor.bfloat16()) for name, tensor in tensors(folder, 1)]

    def sums(spoiled: str, change: Any) -> dict[str, str]:
        checksums = ServerChecksums(config, [1], torch.bfloat16, "cpu")
        for _ in checksums.watch((n, change(t.clone()) if n == spoiled else t) for n, t in quantized(stream)):
            pass
        return checksums.expected(1, 0)

    right, up = sums("", None), "model.layers.2.mlp.up_proj.weight"

    def one_value(tensor: Tensor) -> Tensor:
        tensor.view(torch.uint8)[7, 9] ^= 1  # the last bit of the mantissa
        return tensor

    def one_scale(tensor: Tensor) -> Tensor:
        tensor[1, 0] *= 1.01
        return tensor

    for name, change in ((up, one_value), (up + "_scale_inv", one_scale)):
        wrong = sums(name, change)
        assert [k for k in right if wrong[k] != right[k]] == ["model.layers.2.mlp.gate_up_proj.weight"]


def test_folders_for_servers_say_what_their_weights_are(tmp_path: Path) -> None:
    source = tiny.tiny_qwen3(tmp_path / "model", **BLOCKS)
    served = write_model_without_weights(source, tmp_path / "run" / "served", torch.bfloat16)
    config = json.loads((served / "config.json").read_text())
    assert config["quantization_config"] == dict(QUANTIZATION) and config["dtype"] == "bfloat16"
    assert (served / "tokenizer.json").exists() and not list(served.glob("*.safetensors"))
    sent = list(quantized([(name, tensor.bfloat16()) for name, tensor in tensors(source, 1)]))

    def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
        folder = Path(body["model_path"])
        assert json.loads((folder / "config.json").read_text())["quantization_config"] == dict(QUANTIZATION)
        stored = load_file(str(folder / "model.safetensors"))
        assert stored.keys() == dict(sent).keys()
        assert all(torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in sent)
        return {"success": True}

    transport = DiskTransport(tmp_path / "weights", source, quantized=True)
    assert transport.send([FakeReceiver(answer=answer)], iter(sent), "aa-1") == {}
