"""Training checkpoints of any layout to Hugging Face folders, and folders to Megatron's checkpoints and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from asd_megatron.checkpoint.conversion import hf_to_megatron, megatron_to_hf
from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.huggingface import FolderReader, read_config, write_folder
from asd_megatron.checkpoint.locate import find, find_checkpoint
from asd_megatron.checkpoint.stored_model import StoredModel
from asd_megatron.errors import UserError
from asd_megatron.models.families import shape_of
from asd_megatron.models.stored import parameters, unpadded
from tests.checkpoint.trainer import CONFIG, MOE, Trainer
from tests.distributed.harness import run_ranks
from tests.models import everywhere, tiny

SHARD = 20_000  # bytes: several files
UNTIED = {"tie_word_embeddings": False, "vocab_size": 61}  # two tensor-parallel ranks pad it
# layout, distributed optimizer, dtype, config
RUNS: dict[str, tuple[dict[str, Any], bool, torch.dtype, dict[str, Any]]] = {
    "tp2": ({"tensor": 2}, False, torch.float32, UNTIED),
    "pp2_vpp2": ({"pipeline": 2, "virtual_pipeline": 2}, True, torch.float32, {}),
    "dp2_bf16": ({"data": 2}, True, torch.bfloat16, UNTIED),
    "ep2": ({"data": 2, "expert": 2}, True, torch.float32, MOE),
    "tp2_ep2": ({"tensor": 2, "sequence_parallel": True, "expert": 2}, False, torch.bfloat16, {**MOE, **UNTIED}),
    "tp2_pp2": ({"tensor": 2, "pipeline": 2}, True, torch.bfloat16, UNTIED),
}


def _model(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _train(rank: int, root: str, case: str) -> None:
    """Train, save, and export the same weights: live ones, and with a copy its moving average."""
    layout, distributed, dtype, config = RUNS[case]
    folder = Path(root) / case
    model = _model(folder / "model", config) if rank == 0 else folder / "model"
    trainer = Trainer(layout, distributed, 1, dtype, copies=case == "dp2_bf16", **config)
    trainer.steps(range(2))
    trainer.save(folder / "checkpoints", 2)
    write_folder(trainer.port, model, folder / "live", max_shard_bytes=SHARD)
    if trainer.copies is not None:
        with trainer.copies.in_place("ema"):
            write_folder(trainer.port, model, folder / "ema", max_shard_bytes=SHARD)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", RUNS)
def test_a_checkpoint_of_any_layout_becomes_the_folder_that_its_run_exports(tmp_path: Path, case: str) -> None:
    run_ranks(_train, 4 if case == "tp2_pp2" else 2, str(tmp_path), case)
    folder = tmp_path / case
    checkpoint = DistributedCheckpoint(find_checkpoint(folder))
    seen: list[tuple[int, int]] = []
    for weights in ("live", "ema") if (folder / "ema").exists() else ("live",):
        out = megatron_to_hf(
            checkpoint,
            folder / "model",
            tmp_path / f"out_{weights}",
            weights=weights,  # type: ignore[arg-type]
            max_shard_bytes=SHARD,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert _files(out) == _files(folder / weights)
        assert len(list(out.glob("*.safetensors"))) > 1
    assert seen[-1] == (seen[-1][1], sum(t.nbytes for p in out.glob("*.safetensors") for t in load_file(p).values()))


FAMILIES: dict[str, Callable[..., Path]] = {
    "qwen3": tiny.tiny_qwen3,
    "qwen3_moe": tiny.tiny_qwen3_moe,
    "olmo3": tiny.tiny_olmo3,
    "llama": tiny.tiny_llama,
    "qwen2": tiny.tiny_qwen2,
    "mistral": tiny.tiny_mistral,
}


def _all_tensors(folder: Path) -> dict[str, Tensor]:
    with FolderReader(folder) as reader:
        return {name: reader[name][:].clone() for name in reader}


def _half(folder: Path, out: Path) -> Path:
    """The folder in bfloat16."""
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = {name: tensor.bfloat16() for name, tensor in _all_tensors(folder).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bitwise_the_same(tmp_path: Path, family: str) -> None:
    single = FAMILIES[family](tmp_path / "single", tie_word_embeddings=family == "qwen3")
    for folder in (single, _half(single, tmp_path / "half")):
        saved = hf_to_megatron(folder, tmp_path / f"megatron_{folder.name}")
        back = megatron_to_hf(DistributedCheckpoint(find_checkpoint(saved)), folder, tmp_path / f"back_{folder.name}")
        assert (back / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    narrow = hf_to_megatron(single, tmp_path / "narrow", dtype=torch.bfloat16)
    with pytest.raises(UserError, match="exists already"):
        hf_to_megatron(single, narrow)
    wide = megatron_to_hf(
        DistributedCheckpoint(narrow / "release"), single, tmp_path / "wide", dtype=torch.float32, max_shard_bytes=SHARD
    )
    rounded = {name: tensor.bfloat16().float() for name, tensor in _all_tensors(single).items()}
    found = _all_tensors(wide)
    assert found.keys() == rounded.keys() and all(torch.equal(found[name], rounded[name]) for name in rounded)


SHARDED: dict[str, Any] = {"tensor": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[dict[str, Any], ...]] = {
    "qwen3": (SHARDED, {"data": 2}, {"pipeline": 2, "virtual_pipeline": 2}),
    "qwen3_moe": (SHARDED, {"data": 2, "expert": 2}),
}


def _load(rank: int, root: str) -> list[str]:
    """What Megatron-Core's own strict load gives in each layout."""
    from megatron.core import dist_checkpointing

    from asd_megatron.distributed.layout import Layout, init
    from asd_megatron.models.port import ModelPort

    loaded = []
    for family in FAMILIES:
        folder = Path(root) / family
        want = _all_tensors(folder)
        for layout in LAYOUTS.get(family, (SHARDED,)):
            sizes = Layout(**layout)
            port = ModelPort.build(read_config(folder), init(sizes), sizes, layers="local")
            names = ["model"] if len(port.chunks) == 1 else [f"model{i}" for i in range(len(port.chunks))]
            metadata = dist_checkpointing.load_content_metadata(str(Path(root) / f"{family}_megatron" / "release"))
            state = {
                name: {k: v for k, v in chunk.sharded_state_dict(metadata=metadata).items() if "_extra_state" not in k}
                for name, chunk in zip(names, port.chunks, strict=True)
            }
            got = dist_checkpointing.load(state, str(Path(root) / f"{family}_megatron" / "release"), strict="raise_all")
            for name, chunk in zip(names, port.chunks, strict=True):
                chunk.load_state_dict(got[name], strict=False)
            found = everywhere.weights(port)
            assert found.keys() == want.keys()
            assert all(torch.equal(found[n], want[n]) for n in want), (family, layout)
            loaded.append(f"{family} {layout}")
    return loaded


def test_megatron_loads_what_was_written_in_any_layout(tmp_path: Path) -> None:
    for family, make in FAMILIES.items():
        hf_to_megatron(make(tmp_path / family), tmp_path / f"{family}_megatron")
        assert (tmp_path / f"{family}_megatron" / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    assert len(run_ranks(_load, 2, str(tmp_path))[0]) == len(FAMILIES) + 3


def _written(folder: Path, tensors: dict[str, Tensor]) -> DistributedCheckpoint:
    """A checkpoint of these tensors, each one chunk."""
    folder.mkdir()
    torch_checkpoint.save(tensors, storage_writer=torch_checkpoint.FileSystemWriter(folder), no_dist=True)
    return DistributedCheckpoint(folder)


@pytest.mark.parametrize("form", ["stacked", "layers_apart", "experts_apart", "all_apart"])
def test_layers_and_experts_may_be_stacked_or_apart(tmp_path: Path, form: str) -> None:
    """As Megatron-LM writes them, with a padded vocabulary, an optimizer and random states."""
    folder = tiny.tiny_qwen3_moe(tmp_path / "hf")
    family, shape = shape_of(read_config(folder))
    full, stored = _all_tensors(folder), {}
    for parameter in parameters(family, shape):
        places = {len(place.index): place for place in reversed(parameter.places(shape))}
        number = {"stacked": 2, "layers_apart": 1, "experts_apart": 1, "all_apart": 0}[form]
        place = places[min(number, max(places))]
        if form == "layers_apart" and parameter.expert is None:
            place = places[0]
        if form == "layers_apart" and parameter.expert is not None:
            place = next(
                p for p in parameter.places(shape) if p.index == (parameter.expert,) and ".layers.mlp" not in p.key
            )
        if form == "experts_apart" and parameter.expert is not None:
            place = next(p for p in parameter.places(shape) if p.index == (parameter.layer,) and ".layers.mlp" in p.key)
        tensor = parameter.rule.operation.shard([full[n] for n in parameter.names], 0, 1, unpadded(shape))
        if parameter.is_vocabulary:
            tensor = torch.cat([tensor, torch.full((128 - len(tensor), shape.hidden), torch.nan)])
        stored.setdefault(place.key, torch.full((*place.leading, *tensor.shape), torch.nan))[place.index] = tensor
    stored |= {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(2), "rng_state": torch.ones(3)}
    stored["decoder.layers.mlp.linear_fc1._extra_state"] = torch.ones(1)
    found = StoredModel(_written(tmp_path / "iter_0000007", stored), read_config(folder))
    assert found.keys() == full.keys() and all(torch.equal(found[name][:], full[name]) for name in full)


def test_another_model_is_refused_with_every_tensor_that_does_not_fit(tmp_path: Path) -> None:
    folder = tiny.tiny_qwen3(tmp_path / "hf")
    saved = DistributedCheckpoint(hf_to_megatron(folder, tmp_path / "out") / "release")
    tensors = {key: saved.read(key) for key in saved.tensors}
    del tensors["decoder.layers.self_attention.k_layernorm.weight"]
    tensors["decoder.layers.mlp.linear_fc2.weight"] = tensors["decoder.layers.mlp.linear_fc2.weight"][:, :, :-1].clone()
    tensors["decoder.layers.self_attention.linear_proj.weight"] = torch.ones(5, 32, 48)
    tensors["output_layer.weight"] = torch.ones(60, 32)
    tensors["decoder.layers.mixer.A_log"] = torch.ones(4, 2)
    tensors["decoder.layers.self_attention.linear_qkv.bias"] = torch.ones(4, 96)
    tensors["decoder.layers.self_attention.linear_kv_down_proj.weight"] = torch.ones(4, 8, 32)
    with pytest.raises(UserError) as caught:
        StoredModel(_written(tmp_path / "other", tensors), read_config(folder))
    for line in (
        "decoder.layers.self_attention.k_layernorm.weight is missing, (4, 12) in the model",
        "decoder.layers.mlp.linear_fc2.weight has the shape (4, 32, 47), (4, 32, 48) in the model",
        "decoder.layers.self_attention.linear_proj.weight has the shape (5, 32, 48), (4, 32, 48) in the model",
        "output_layer.weight has the shape (60, 32), (61, 32) in the model",
        "decoder.layers.mixer.A_log (4, 2) is not in the model (Mamba layers)",
        "decoder.layers.self_attention.linear_qkv.bias (4, 96) is not in the model (biases)",
        "decoder.layers.self_attention.linear_kv_down_proj.weight (4, 8, 32) is not in the model"
        " (multi-latent attention)",
    ):
        assert f"\n  {line}\n" in str(caught.value)
    assert str(caught.value).count("\n") == 8
    for weights in ("initial", "ema"):
        with pytest.raises(UserError, match=f"stores no {weights} weights"):
            StoredModel(saved, read_config(folder), weights=weights)  # type: ignore[arg-type]


def test_a_path_is_found_in_every_form(tmp_path: Path) -> None:
    folder = tiny.tiny_qwen3(tmp_path / "hf")
    out = hf_to_megatron(folder, tmp_path / "out")
    assert find(folder).kind == "huggingface"
    assert find_checkpoint(out) == find_checkpoint(out / "release") == out / "release"
    (out / "release").rename(out / "iter_0000120")
    (out / "latest_checkpointed_iteration.txt").write_text("120\n")
    assert find_checkpoint(out) == out / "iter_0000120"
    for named in ("121", "../x", "", "²"):
        (out / "latest_checkpointed_iteration.txt").write_text(named)
        with pytest.raises(UserError, match="names '.*', which is no checkpoint"):
            find_checkpoint(out)
    old = tmp_path / "old"
    (old / "mp_rank_00").mkdir(parents=True)
    for path, message in (
        (folder, "model folder, not a checkpoint"),
        (old, "--ckpt-convert-format torch_dist"),
        (tmp_path, "neither a checkpoint nor a model folder"),
        (tmp_path / "absent", "is no folder"),
    ):
        with pytest.raises(UserError, match=message):
            find_checkpoint(path)
