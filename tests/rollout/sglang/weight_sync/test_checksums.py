"""What each rank of a server holds, by checksum: fused, cut, filled up; and what is refused."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.weight_sync.checksums import ServerChecksums
from asd_megatron.rollout.sglang.weight_sync.hashes import word_hash

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 12,
    "vocab_size": 70,
    "tie_word_embeddings": False,
}


MOE = {
    **CONFIG,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_local_experts": 3,  # transformers 5; published folders say num_experts
    "intermediate_size": 99,  # not of its experts
    "moe_intermediate_size": 12,
}


def _model(config: dict[str, Any] = CONFIG) -> dict[str, Tensor]:
    """Random tensors in export order."""
    torch.manual_seed(0)
    (architecture,) = config["architectures"]
    hidden, size = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        if architecture != "Olmo3ForCausalLM":
            shapes[at + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
        if architecture == "Qwen2ForCausalLM":
            shapes |= {f"{at}self_attn.{x}_proj.bias": (rows,) for x, rows in (("q", q), ("k", kv), ("v", kv))}
        if "Qwen3" in architecture:
            shapes |= {f"{at}self_attn.{x}_norm.weight": (size,) for x in "qk"}
        if architecture == "Olmo3ForCausalLM":
            shapes |= {f"{at}self_attn.{x}_norm.weight": (rows,) for x, rows in (("q", q), ("k", kv))}
        shapes[at + "self_attn.o_proj.weight"] = (hidden, q)
        shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        for mlp, width in _mlps(config):
            shapes |= {f"{at}{mlp}{x}_proj.weight": (width, hidden) for x in ("gate", "up")}
            shapes[f"{at}{mlp}down_proj.weight"] = (hidden, width)
        if architecture == "Olmo3ForCausalLM":
            shapes[at + "post_feedforward_layernorm.weight"] = (hidden,)
        if architecture == "Qwen3MoeForCausalLM":
            shapes[at + "mlp.gate.weight"] = (config["num_local_experts"], hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def _mlps(config: dict[str, Any]) -> list[tuple[str, int]]:
    """(name, width) of the MLPs of a layer."""
    if "num_local_experts" not in config:
        return [("mlp.", config["intermediate_size"])]
    return [(f"mlp.experts.{e}.", config["moe_intermediate_size"]) for e in range(config["num_local_experts"])]


def _sums(
    model: dict[str, Tensor],
    ranks: int,
    device: str,
    config: dict[str, Any] = CONFIG,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, str]]:
    sums = ServerChecksums(config, [ranks], dtype, device)
    assert [name for name, _ in sums.watch(model.items())] == list(model)
    return [sums.expected(ranks, rank) for rank in range(ranks)]


def _sha(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def _cuda(tensor: Tensor) -> str:
    return f"{word_hash(tensor.contiguous().reshape(-1).view(torch.uint8)):016x}"


def test_one_rank_holds_fused_tensors_and_a_filled_vocabulary() -> None:
    model = _model()
    (found,) = _sums(model, 1, "cuda")
    at = "model.layers.1.self_attn."
    assert found[at + "qkv_proj.weight"] == _cuda(torch.cat([model[f"{at}{x}_proj.weight"] for x in "qkv"]))
    assert found["lm_head.weight"] == _cuda(torch.cat([model["lm_head.weight"], torch.zeros(58, 8)]))
    fused = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "self_attn.q_norm"}
    fused |= {"self_attn.k_norm", "input_layernorm", "post_attention_layernorm"}
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(found) == ends | {f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in fused}


def test_two_ranks_cut_rows_columns_heads_and_vocabulary() -> None:
    model, at = _model(), "model.layers.0."
    for rank, found in enumerate(_sums(model, 2, "cuda")):
        q, k, v = (model[f"{at}self_attn.{x}_proj.weight"].chunk(2)[rank] for x in "qkv")
        assert found[at + "self_attn.qkv_proj.weight"] == _cuda(torch.cat([q, k, v]))
        gate, up = (model[f"{at}mlp.{x}_proj.weight"].chunk(2)[rank] for x in ("gate", "up"))
        assert found[at + "mlp.gate_up_proj.weight"] == _cuda(torch.cat([gate, up]))
        assert found[at + "mlp.down_proj.weight"] == _cuda(model[at + "mlp.down_proj.weight"].chunk(2, dim=1)[rank])
        assert found[at + "input_layernorm.weight"] == _cuda(model[at + "input_layernorm.weight"])
    first, second = (found["model.embed_tokens.weight"] for found in _sums(model, 2, "cuda"))
    rows = model["model.embed_tokens.weight"]
    assert first == _cuda(rows[:64])
    assert second == _cuda(torch.cat([rows[64:], torch.zeros(58, 8)]))


def test_ranks_that_do_not_divide_64_get_64_rows_each() -> None:
    config = {**CONFIG, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
    model = _model(config)
    found = [sums["model.embed_tokens.weight"] for sums in _sums(model, 3, "cuda", config)]
    rows = torch.cat([model["model.embed_tokens.weight"], torch.zeros(3 * 64 - 70, 8)])
    assert found == [_cuda(part) for part in rows.chunk(3)]


def test_more_ranks_than_key_heads_share_them_on_cuda() -> None:
    model, name = _model(), "model.layers.0.self_attn.{}_proj.weight"
    for rank, found in enumerate(_sums(model, 4, "cuda")):
        q = model[name.format("q")].chunk(4)[rank]
        k, v = (model[name.format(x)].chunk(2)[rank // 2] for x in "kv")
        assert found[name.format("qkv")] == _cuda(torch.cat([q, k, v]))


def test_on_the_cpu_what_does_not_come_out_even_is_filled_with_zeros() -> None:
    """Seen with SGLang 0.5.23: the MLP in multiples of 32 a rank; key heads up to the ranks, query heads with them."""
    config = {**CONFIG, "num_key_value_heads": 1}
    model, at = _model(config), "model.layers.0."
    for rank, found in enumerate(_sums(model, 2, "cpu", config)):
        q, k, v = (model[f"{at}self_attn.{x}_proj.weight"] for x in "qkv")
        parts = [q, k, v] if rank == 0 else [torch.zeros_like(x) for x in (q, k, v)]
        assert found[at + "self_attn.qkv_proj.weight"] == _sha(torch.cat(parts))
        ffn = torch.zeros(64, 8)
        ffn[:12] = model[at + "mlp.gate_proj.weight"]
        up = torch.zeros(64, 8)
        up[:12] = model[at + "mlp.up_proj.weight"]
        assert found[at + "mlp.gate_up_proj.weight"] == _sha(torch.cat([ffn.chunk(2)[rank], up.chunk(2)[rank]]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_are_stacked(ranks: int) -> None:
    """w13_weight [experts, gate then up, hidden], w2_weight [experts, hidden, ffn]; the router on every rank."""
    model, at = _model(MOE), "model.layers.1.mlp."
    for rank, found in enumerate(_sums(model, ranks, "cuda", MOE)):
        experts = [{x: model[f"{at}experts.{e}.{x}_proj.weight"] for x in ("gate", "up", "down")} for e in range(3)]
        w13 = [torch.cat([e[x].chunk(ranks)[rank] for x in ("gate", "up")]) for e in experts]
        assert found[at + "experts.w13_weight"] == _cuda(torch.stack(w13))
        assert found[at + "experts.w2_weight"] == _cuda(torch.stack([e["down"].chunk(ranks, 1)[rank] for e in experts]))
        assert found[at + "gate.weight"] == _cuda(model[at + "gate.weight"])
        assert not [name for name in found if "gate_up_proj" in name]


def test_experts_that_change_places_are_found() -> None:
    model = _model(MOE)
    (before,) = _sums(model, 1, "cpu", MOE)
    first, second = (f"model.layers.0.mlp.experts.{e}.down_proj.weight" for e in (0, 2))
    model[first], model[second] = model[second], model[first]
    (after,) = _sums(model, 1, "cpu", MOE)
    assert [n for n in before if before[n] != after[n]] == ["model.layers.0.mlp.experts.w2_weight"]


def test_an_expert_without_its_up_projection_is_refused() -> None:
    model = _model(MOE)
    sums = ServerChecksums(MOE, [1], torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=r"experts\.1\.gate_proj\.weight came twice or out of order"):
        list(sums.watch((n, t) for n, t in model.items() if not n.endswith("0.up_proj.weight")))


def test_biases_are_stacked_like_their_weights() -> None:
    config = {**CONFIG, "architectures": ["Qwen2ForCausalLM"]}
    model, name = _model(config), "model.layers.0.self_attn.{}_proj.bias"
    for rank, found in enumerate(_sums(model, 2, "cuda", config)):
        assert found[name.format("qkv")] == _cuda(torch.cat([model[name.format(x)].chunk(2)[rank] for x in "qkv"]))


def test_olmo_3_has_norms_after_the_sublayers_and_over_all_heads() -> None:
    config = {**CONFIG, "architectures": ["Olmo3ForCausalLM"]}
    model, at = _model(config), "model.layers.0."
    for found in _sums(model, 2, "cuda", config):
        for name in ("self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "post_feedforward_layernorm"):
            assert found[f"{at}{name}.weight"] == _cuda(model[f"{at}{name}.weight"])
        assert at + "input_layernorm.weight" not in found


def test_a_tied_llama_has_neither_head_nor_head_norms() -> None:
    config = {**CONFIG, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (found,) = _sums(_model(config), 1, "cpu", config)
    assert "lm_head.weight" not in found
    assert not [name for name in found if "q_norm" in name]


def test_hashes_are_of_the_servers_dtype() -> None:
    model = _model()
    (found,) = _sums(model, 1, "cpu", dtype=torch.bfloat16)
    expected = hashlib.sha256(model["model.norm.weight"].bfloat16().view(torch.uint8).numpy().tobytes()).hexdigest()
    assert found["model.norm.weight"] == expected[:16]


@pytest.mark.parametrize("name", list(_model()))
def test_a_changed_element_changes_the_tensor_that_it_is_in_alone(name: str) -> None:
    model = _model()
    (before,) = _sums(model, 1, "cuda")
    model[name].view(-1)[-1] += 1
    (after,) = _sums(model, 1, "cuda")
    changed = [n for n in before if before[n] != after[n]]
    fused = re.sub(r"\b(gate|up)_proj", "gate_up_proj", re.sub(r"\b[qkv]_proj", "qkv_proj", name))
    assert changed == [fused]


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UserError, match=r"MixtralForCausalLM is not known.*set rollout.verify_weights to false"):
        ServerChecksums({**CONFIG, "architectures": ["MixtralForCausalLM"]}, [1], torch.float32, "cpu")


def test_an_unknown_tensor_is_refused() -> None:
    model = {**_model(), "model.layers.0.self_attn.q_proj.bias": torch.zeros(24)}
    with pytest.raises(UserError, match="q_proj.bias is not known"):
        _sums(model, 1, "cpu")


def test_what_ranks_do_not_divide_is_refused_on_cuda() -> None:
    with pytest.raises(UserError, match="5 tensor-parallel ranks"):
        _sums(_model(), 5, "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names[:-1], "lm_head.weight missing"),
        (lambda names: [*names, names[0]], "came twice"),
        (lambda names: [*names[:3], names[2], *names[4:]], "out of order"),
    ],
)
def test_tensors_that_are_missing_doubled_or_out_of_order(change: Any, message: str) -> None:
    model = _model()
    sums = ServerChecksums(CONFIG, [1], torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=message):
        list(sums.watch((name, model[name]) for name in change(list(model))))
