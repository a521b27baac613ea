"""Hugging Face folders: what is written, `transformers` reads; what is damaged, is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asd_megatron.checkpoint.huggingface import INDEX, FolderReader, copy_others, is_complete, read_config
from asd_megatron.data.tokenizer import load_tokenizer
from asd_megatron.errors import UserError
from asd_megatron.models.loading import refusal
from tests.distributed.harness import run_ranks
from tests.models.tiny import tiny_llama, tiny_qwen3

IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_qwen3(tmp_path_factory.mktemp("hf") / "model", tie_word_embeddings=True)
    (made / "LICENSE").write_text("free\n")
    (made / "optimizer.pt").write_bytes(b"not ours")
    (made / "additional_chat_templates").mkdir()
    (made / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    return made


def _port(folder: Path, layout: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    from asd_megatron.distributed.layout import Layout, init
    from asd_megatron.models.port import ModelPort

    sizes = Layout(**layout)
    port = ModelPort.build(read_config(folder), init(sizes), sizes, dtype=dtype, layers="local")
    with FolderReader(folder) as reader:
        port.load(reader)
    return port


def _round_trips(rank: int, source: str, root: str) -> None:
    """Exports in several layouts and sizes; the test reads them. Ends with one that cannot be written."""
    from asd_megatron.checkpoint.huggingface import write_folder

    folder, target = Path(source), Path(root)
    assert write_folder(_port(folder, {"tensor": 2}), folder, target / "tp2") == target / "tp2"
    pp2 = _port(folder, {"pipeline": 2})
    with torch.no_grad():
        for chunk in pp2.chunks:
            for parameter in chunk.parameters():
                parameter.mul_(1.5)
    write_folder(pp2, folder, target / "sharded", max_shard_bytes=6000)
    write_folder(pp2, folder, target / "tp2b")
    write_folder(_port(folder, {"tensor": 2}), folder, target / "tp2b")  # replaces
    write_folder(_port(folder, {"data": 2}, torch.bfloat16), folder, target / "half")
    (target / "file").write_text("")
    with pytest.raises(UserError, match="cannot be exported to .*file/below"):
        write_folder(pp2, folder, target / "file" / "below")
    dist.barrier()  # every rank is in step after the failure


def test_round_trips(folder: Path, tmp_path: Path) -> None:
    run_ranks(_round_trips, 2, str(folder), str(tmp_path))
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # not on every rank: it is slow

    source = AutoModelForCausalLM.from_pretrained(folder)
    original = load_file(folder / "model.safetensors")
    for name in ("tp2", "tp2b"):
        assert _names(tmp_path / name) == _names(folder) - {"optimizer.pt"}
        written = load_file(tmp_path / name / "model.safetensors")
        assert written.keys() == original.keys() and all(torch.equal(written[k], original[k]) for k in original)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(again(IDS).logits, source(IDS).logits)
    assert (tmp_path / "tp2" / "additional_chat_templates" / "rag.jinja").is_file()
    assert GenerationConfig.from_pretrained(tmp_path / "tp2").temperature == 0.6
    chat = [{"role": "user", "content": "w1 w2"}]
    for name in ("tp2", "sharded", "half"):
        tokenizer, theirs = AutoTokenizer.from_pretrained(tmp_path / name), AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    sharded = tmp_path / "sharded"
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(sharded.glob("model-*.safetensors"))
    assert len(files) > 3 and index["weight_map"].keys() == original.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in original.values())
    largest = max(t.nbytes for t in original.values())
    for file in files:
        tensors = load_file(file)
        assert all(index["weight_map"][n] == file.name for n in tensors)
        assert sum(t.nbytes for t in tensors.values()) <= max(6000, largest)
    loaded: Any = AutoModelForCausalLM.from_pretrained(sharded, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.model.norm.weight, 1.5 * source.model.norm.weight)
    with FolderReader(sharded) as reader:
        assert reader.keys() == original.keys()
        assert torch.equal(reader["model.norm.weight"][:], 1.5 * original["model.norm.weight"])

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert read_config(tmp_path / "half")["dtype"] == "bfloat16"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_spelling_of_the_dtype_stays(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    old = tmp_path / "old"
    shutil.copytree(folder, old)
    config = read_config(old)
    config["torch_dtype"] = config.pop("dtype")
    (old / "config.json").write_text(json.dumps(config))
    (tmp_path / "new").mkdir()
    copy_others(old, tmp_path / "new", torch.bfloat16)
    assert read_config(tmp_path / "new") == {**config, "torch_dtype": "bfloat16"}
    assert AutoConfig.from_pretrained(tmp_path / "new").dtype == torch.bfloat16


def _names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.2.self_attn.k_norm.weight"]


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(40, 32)


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)


def _fewer_rows(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:60].clone()


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)


def _ignorable(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def _untied(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def _everything(tensors: dict[str, torch.Tensor]) -> None:
    for change in (_drop, _add, _fewer_rows, _integers):
        change(tensors)


DAMAGE: list[tuple[Callable[[dict[str, torch.Tensor]], None], tuple[str, ...]]] = [
    (_drop, ("no tensor", "model.layers.2.self_attn.k_norm.weight")),
    (_reshape, ("model.safetensors", "model.layers.3.mlp.up_proj.weight", "(40, 32)", "(48, 32)")),
    (_add, ("model.layers.0.self_attn.q_proj.bias",)),
    (_fewer_rows, ("model.embed_tokens.weight", "(60, 32)", "(61, 32)")),
    (_integers, ("model.safetensors", "model.layers.3.mlp.up_proj.weight", "I8", "quantized")),
    (_untied, ("lm_head.weight", "tie_word_embeddings")),
    (_everything, ("cannot be loaded", "k_norm", "q_proj.bias", "(60, 32)", "quantized")),
]


def _load_damaged(rank: int, folders: list[str]) -> list[str]:
    """The error of each folder, empty when it loads."""
    found = []
    for folder in folders:
        try:
            _port(Path(folder), {})
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


def test_the_gate_is_strict(folder: Path, tmp_path: Path) -> None:
    folders = []
    for number, change in enumerate([*(change for change, _ in DAMAGE), _ignorable]):
        damaged = tmp_path / str(number)
        damaged.mkdir()
        shutil.copyfile(folder / "config.json", damaged / "config.json")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, damaged / "model.safetensors")
        folders.append(str(damaged))
    untied = tiny_llama(tmp_path / "untied")
    tensors = load_file(untied / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, untied / "model.safetensors")
    *errors, fine, headless = run_ranks(_load_damaged, 1, [*folders, str(untied)])[0]
    for (_, words), error in zip(DAMAGE, errors, strict=True):
        assert all(word in error for word in words), error
    assert fine == ""
    assert "lm_head.weight" in headless


CONFIGS = [
    ("{", "cannot be read"),
    ("[]", "JSON object"),
    ("[" * 200_000, "nested too deeply"),
    ('{"a":' * 200_000, "nested too deeply"),
    ('{"hidden_size": 1' + "0" * 5000 + "}", "digits"),
    ('{"hidden_size": 64, "hidden_size": 32}', "hidden_size' is given twice"),
    ('{"rms_norm_eps": NaN}', "NaN"),
    ('{"rms_norm_eps": -Infinity}', "-Infinity"),
    ('{"rope_theta": 1e999}', "1e999"),
    ('{"_name_or_path": "\\ud800"}', "surrogate"),
    ("\xff", "utf-8"),
    (" " * (65 << 20), "64 MiB"),
]


@pytest.mark.parametrize(("text", "reason"), CONFIGS, ids=[reason for _, reason in CONFIGS])
def test_damaged_configs(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="download the model again") as caught:
        read_config(tmp_path)
    message = str(caught.value)
    assert str(path) in message and reason in message and len(message) < 400


def test_damaged_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist.*model.path"):
        read_config(tmp_path / "none")
    with pytest.raises(UserError, match="hf download Qwen/Qwen3-8B --local-dir"):
        read_config("Qwen/Qwen3-8B")
    with pytest.raises(UserError, match="no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="config.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match="neither.*convert the model to safetensors .pickled weights are not read"):
        FolderReader(tmp_path)
    assert not is_complete(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    maps = ("1", "{}", '{"a": 1}', '{"a": null}', *(f'{{"a": "{name}"}}' for name in OUTSIDE))
    for text in ("{}", "[]", "{", "[" * 200_000, *(f'{{"weight_map": {names}}}' for names in maps)):
        index.write_text(text)
        with pytest.raises(UserError, match="index.json (is damaged|cannot be read).*download it again"):
            FolderReader(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert re.search("model-00001-of-00001.safetensors is missing, though model.safetensors.index", _refusal(tmp_path))
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    message = _refusal(tmp_path)
    assert re.search("tensor a is in .*two.safetensors and in .*one.safetensors", message)
    assert re.search("tensor b is not in .*two.safetensors, though model.safetensors.index.json says so", message)
    (tmp_path / "model.safetensors").write_bytes(b"GGUF" * 10)
    assert "model.safetensors is not a readable safetensors file" in _refusal(tmp_path)
    torn = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(torn[: len(torn) // 2])
    assert "model.safetensors is not a readable safetensors file" in _refusal(tmp_path)
    assert "has no tensor" not in _refusal(tmp_path)  # that would be noise


def _refusal(folder: Path, expected: dict[str, tuple[int, ...]] | None = None) -> str:
    """What loading a damaged folder says; its tensors cannot be read either."""
    with FolderReader(folder) as reader:
        found = refusal(reader, expected or {"a": (1,), "b": (1,)}, family="qwen3", tied=False) or ""
        for tensor in reader.values() if reader.problems else ():
            with pytest.raises(UserError):
                tensor[:]
    return found


OUTSIDE = ("../b.safetensors", "/b.safetensors", "a/b.safetensors", "..", "", "pytorch_model.bin")


def test_links_out_of_the_folder_are_left_out(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "rag.jinja").write_text("secret")
    source = tmp_path / "model"
    shutil.copytree(folder, source)
    shutil.rmtree(source / "additional_chat_templates")
    (source / "notes.txt").symlink_to(secret)
    (source / "second.txt").symlink_to("notes.txt")  # a link to a link
    (source / "vocab.json").symlink_to("../model/../secret.txt")
    (source / "LICENSE").unlink()
    (source / "LICENSE").symlink_to(secret)
    (source / "additional_chat_templates").symlink_to(tmp_path / "templates")
    (source / "merges.txt").symlink_to("config.json")  # stays inside
    (source / "loop.txt").symlink_to("loop.txt")
    target = tmp_path / "target"
    target.mkdir()
    copy_others(source, target, torch.float32)
    kept = _names(folder) - {"LICENSE", "optimizer.pt", "model.safetensors", "additional_chat_templates"}
    assert _names(target) == kept | {"merges.txt"}
    assert all(path.is_file() and not path.is_symlink() for path in target.iterdir())
    for name in ("notes.txt", "second.txt", "vocab.json", "LICENSE", "rag.jinja"):
        assert name in caplog.text
    assert str(source) in caplog.text


def _beside(path: Path) -> None:
    """A link to a file outside of the folder."""
    elsewhere = path.parent.parent / f"elsewhere_{path.name}"
    shutil.move(path, elsewhere)
    path.symlink_to(f"../{elsewhere.name}")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", [_beside, _pipe, _device, _loop])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "shard"]
)
def test_no_file_outside_of_the_folder_is_read(
    folder: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """And nothing waits for a pipe or reads a device."""
    source = tmp_path / "model"
    shutil.copytree(folder, source)
    if name == "shard":
        name = "model-00001-of-00001.safetensors"
        (source / "model.safetensors").rename(source / name)
        with safe_open(source / name, framework="pt") as file:
            index = dict.fromkeys(file.keys(), name)
        (source / INDEX).write_text(json.dumps({"weight_map": index}))
    damage(source / name)

    with pytest.raises(UserError, match=name) as caught:
        read_config(source)
        load_tokenizer(source)
        with FolderReader(source) as tensors:
            raise UserError("; ".join(tensors.problems))
    if damage is _beside:
        assert "outside of the model folder" in str(caught.value)


def test_what_to_do_about_links_is_said(folder: Path, tmp_path: Path) -> None:
    """Links to another disk, and those that older versions of `hf download --local-dir` have made."""
    disk, blobs = tmp_path / "disk", tmp_path / "hub" / "models--a--b" / "blobs"
    for place, remedy in (
        (disk, f"give that folder, {disk}"),
        (blobs, f"give a folder in {blobs.parent / 'snapshots'}"),
    ):
        place.mkdir(parents=True)
        source = tmp_path / f"model_{place.name}"
        shutil.copytree(folder, source)
        (source / "notes.json").mkdir()  # no file, so nobody's link
        load_tokenizer(source)
        weights = source / "model.safetensors"
        weights.rename(place / "0")
        weights.symlink_to(place / "0")
        with FolderReader(source) as tensors:
            assert remedy in tensors.problems[0]


def test_a_snapshot_of_the_cache_is_copied_completely(folder: Path, tmp_path: Path) -> None:
    """hub/models--NAME: files are links to blobs."""
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in folder.rglob("*") if p.is_file()):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    (tmp_path / "model").symlink_to(snapshot)  # and a link to the snapshot is as good
    for source in (snapshot, tmp_path / "model"):
        target = tmp_path / f"target_{source.name}"
        target.mkdir()
        copy_others(source, target, torch.float32)
        assert _names(target) == _names(folder) - {"optimizer.pt", "model.safetensors"}
        assert (target / "additional_chat_templates" / "rag.jinja").is_file()
        assert read_config(source) == read_config(folder)
        assert is_complete(source)
