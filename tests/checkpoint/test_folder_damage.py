"""A damaged model folder is refused by the name of the tensor or the file, or loads exactly the same weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from asd_megatron.checkpoint import huggingface
from asd_megatron.checkpoint.huggingface import INDEX, SINGLE, FolderReader
from asd_megatron.errors import UserError
from asd_megatron.models.loading import SHOWN, refusal

HIDDEN, HEAD_DIM, EXPERTS = 8, 4, 3


def _shapes(experts: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a two-layer Qwen3 or, with experts, Qwen3-MoE."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (11, HIDDEN)}
    for layer in range(2):
        at = f"model.layers.{layer}."
        for name in ("q_proj", "o_proj"):
            rows = 4 * HEAD_DIM
            shapes[f"{at}self_attn.{name}.weight"] = (rows, HIDDEN) if name == "q_proj" else (HIDDEN, rows)
        shapes |= {f"{at}self_attn.{name}_proj.weight": (2 * HEAD_DIM + 4, HIDDEN) for name in "kv"}
        shapes |= {f"{at}self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
        shapes |= {f"{at}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        if experts:
            shapes[f"{at}mlp.gate.weight"] = (experts, HIDDEN)
        for mlp in [f"mlp.experts.{e}." for e in range(experts)] or ["mlp."]:
            shapes |= {f"{at}{mlp}{name}_proj.weight": (6, HIDDEN) for name in ("gate", "up")}
            shapes[f"{at}{mlp}down_proj.weight"] = (HIDDEN, 6)
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (11, HIDDEN)}


class Model:
    """Tensors by file, and the index; `write` makes a folder of them. A folder of one file has no index."""

    def __init__(self, experts: int, files: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.expected = _shapes(experts)
        self.tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in self.expected.items()}
        names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)] if files > 1 else [SINGLE]
        self.index = {name: names[i * files // len(self.tensors)] for i, name in enumerate(self.tensors)}
        self.files: dict[str, dict[str, Tensor]] = {file: {} for file in names}
        for name, file in self.index.items():
            self.files[file][name] = self.tensors[name]

    def write(self, folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for file, tensors in self.files.items():
            save_file(tensors, folder / file)
        if len(self.files) > 1:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.index}))

    def pick(self, rng: random.Random, dims: int | None = None) -> tuple[str, str]:
        """(file, tensor)."""
        names = [n for n, t in self.tensors.items() if dims is None or t.dim() == dims]
        name = rng.choice(names)
        return self.index[name], name


Blame = tuple[str, ...]  # one of these has to be in the message


def _delete(model: Model, rng: random.Random, folder: Path) -> Blame:
    file, name = model.pick(rng)
    del model.files[file][name]
    if rng.random() < 0.5:
        del model.index[name]
    model.write(folder)
    return (name,)


def _rename(model: Model, rng: random.Random, folder: Path) -> Blame:
    file, name = model.pick(rng)
    new = rng.choice([name + "s", name.replace("model", "mode1", 1) + "_", name.upper(), name.removesuffix(".weight")])
    model.files[file][new] = model.files[file].pop(name)
    if rng.random() < 0.5:
        model.index[new] = model.index.pop(name)
    model.write(folder)
    return (name,)


def _transpose(model: Model, rng: random.Random, folder: Path) -> Blame:
    file, name = model.pick(rng, dims=2)
    model.files[file][name] = model.files[file][name].t().contiguous()
    model.write(folder)
    return (name,)


def _swap_shapes(model: Model, rng: random.Random, folder: Path) -> Blame:
    (a_file, a), (b_file, b) = model.pick(rng, dims=1), model.pick(rng, dims=2)
    files = model.files
    files[a_file][a], files[b_file][b] = files[b_file][b], files[a_file][a]
    model.write(folder)
    return (a, b)


def _integers(model: Model, rng: random.Random, folder: Path) -> Blame:
    file, name = model.pick(rng)
    dtype = rng.choice([torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32])
    model.files[file][name] = torch.zeros(model.expected[name]).to(dtype)
    model.write(folder)
    return (name,)


def _duplicate(model: Model, rng: random.Random, folder: Path) -> Blame:
    file, name = model.pick(rng)
    other = rng.choice([f for f in model.files if f != file] or ["model-00002-of-00002.safetensors"])
    alone = len(model.files) == 1
    model.write(folder)
    if alone:  # a file that no index names is not read
        save_file({name: model.tensors[name] + 1}, folder / other)
        return ()
    save_file({**model.files[other], name: model.tensors[name] + 1}, folder / other)
    return (name,)


def _truncate(model: Model, rng: random.Random, folder: Path) -> Blame:
    file, _ = model.pick(rng)
    model.write(folder)
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: rng.randrange(len(data))])
    return (file,)


def _append(model: Model, rng: random.Random, folder: Path) -> Blame:
    file, _ = model.pick(rng)
    model.write(folder)
    with open(folder / file, "ab") as stream:
        stream.write(bytes(rng.randrange(1, 64)))
    return (file,)


def _flip_header(model: Model, rng: random.Random, folder: Path) -> Blame:
    file, _ = model.pick(rng)
    model.write(folder)
    data = bytearray((folder / file).read_bytes())
    data[rng.randrange(8 + int.from_bytes(data[:8], "little"))] ^= 1 << rng.randrange(8)
    (folder / file).write_bytes(data)
    return (file, *model.files[file])


def _remove_file(model: Model, rng: random.Random, folder: Path) -> Blame:
    file, _ = model.pick(rng)
    model.write(folder)
    (folder / file).unlink()
    return (file,)


def _misplace(model: Model, rng: random.Random, folder: Path) -> Blame:
    file, name = model.pick(rng)
    other = rng.choice([f for f in model.files if f != file] or [file])
    model.files[other][name] = model.files[file].pop(name)
    model.write(folder)
    return (name,) if other != file else ()


def _index(model: Model, rng: random.Random, folder: Path) -> Blame:
    """Entries that are gone, that name another file or a tensor that is nowhere."""
    _, name = model.pick(rng)
    nowhere = "model-00009-of-00009.safetensors"
    case = rng.randrange(3)
    if case == 0:
        del model.index[name]
    elif case == 1:
        name = model.index[name] = nowhere
    else:
        name = "model.layers.7.mlp.up_proj.weight"
        model.index[name] = next(iter(model.files))
    model.write(folder)
    return (name,) if len(model.files) > 1 else ()


DAMAGES: list[Callable[[Model, random.Random, Path], Blame]] = [
    _delete,
    _rename,
    _transpose,
    _swap_shapes,
    _integers,
    _duplicate,
    _truncate,
    _append,
    _flip_header,
    _remove_file,
    _misplace,
    _index,
]


def _load(model: Model, folder: Path) -> str | None:
    """The refusal; None when everything expected is there, bit for bit."""
    try:
        reader = FolderReader(folder)
    except UserError as error:
        return str(error)
    with reader:
        message = refusal(reader, model.expected, family="qwen3", tied=False)
        if message is None:
            assert all(torch.equal(reader[name][:], tensor) for name, tensor in model.tensors.items())
            assert {reader[name].dtype for name in model.expected} == {t.dtype for t in model.tensors.values()}
        return message


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
@pytest.mark.parametrize("experts", [0, EXPERTS], ids=["qwen3", "qwen3_moe"])
def test_damage_is_named_or_harmless(
    damage: Callable[[Model, random.Random, Path], Blame], experts: int, tmp_path: Path
) -> None:
    rng = random.Random(f"{damage.__name__} {experts}")
    refused = 0
    for case in range(60):
        model = Model(experts, files=1 + 2 * (case % 2), dtype=[torch.float32, torch.bfloat16][case % 4 // 2])
        blame = damage(model, rng, tmp_path)
        message = _load(model, tmp_path)
        if message is None:
            # A bit of the header may be its padding or the metadata, which hold no weights.
            assert not blame or damage is _flip_header, (case, blame)
            continue
        refused += 1
        assert any(word in message for word in blame) and str(tmp_path) in message, (case, blame, message)
        assert len(message) < 5000
    assert refused >= 25


def test_what_the_structure_cannot_show(tmp_path: Path) -> None:
    """Tensors of equal shape under each other's names, experts among them, and changed numbers: a folder has no
    checksums, so they load as they are."""
    model = Model(EXPERTS, files=3, dtype=torch.bfloat16)
    names = [f"model.layers.1.mlp.experts.{e}.{p}_proj.weight" for p in ("gate", "up", "down") for e in (0, 2)]
    for a, b in zip(names[::2], names[1::2], strict=True):
        files = model.files
        a_file, b_file = model.index[a], model.index[b]
        files[a_file][a], files[b_file][b] = files[b_file][b], files[a_file][a]
        model.tensors[a], model.tensors[b] = model.tensors[b], model.tensors[a]
    model.write(tmp_path)
    assert _load(model, tmp_path) is None


def test_all_violations_at_once(tmp_path: Path) -> None:
    model = Model(EXPERTS, files=4, dtype=torch.float32)
    first, second, third, fourth = model.files
    gone = [name for name in model.expected if "k_norm" in name or ".1.mlp.experts" in name and "down" in name]
    for name in gone:
        del model.files[model.index[name]][name]
        del model.index[name]
    model.files[first]["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, HIDDEN)
    model.files[first]["model.embed_tokens.weight"] = torch.zeros(11, HIDDEN, dtype=torch.int8)
    model.files[first]["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    model.files[third]["model.embed_tokens.weight"] = torch.zeros(11, HIDDEN)
    model.index["visual.proj.weight"] = first
    model.write(tmp_path)
    (tmp_path / second).write_bytes(b"torn")
    (tmp_path / fourth).unlink()
    message = _load(model, tmp_path) or ""
    lines = message.splitlines()
    assert lines[0].endswith("cannot be loaded:") and all(line.startswith("  ") for line in lines[1:])

    def one(*words: str) -> bool:
        return sum(all(word in line for word in words) for line in lines) == 1

    assert one(f"{tmp_path / fourth} is missing")
    assert one(f"{tmp_path / second} is not a readable safetensors file")
    assert one("model.embed_tokens.weight", f"is in {tmp_path / third} and in {tmp_path / first}")
    assert one(f"visual.proj.weight is not in {tmp_path / first}", INDEX)
    assert one(f"q_proj.bias is in {tmp_path / first}", "does not list it")
    assert one("incomplete", f"{gone[0]} (4,)", str(tmp_path)) and "lm_head.weight" not in message  # in a missing file
    assert one("qwen3", f"q_proj.bias (in {tmp_path / first})")
    assert one(f"q_proj.weight in {tmp_path / first} has shape (3, 8), config.json asks for (16, 8)")
    assert one(f"model.embed_tokens.weight in {tmp_path / first} has type I8", "quantized")
    assert len(lines) == 10

    nothing = FolderReader(tmp_path)
    nothing.problems, nothing.lost = [], set()
    many = refusal(nothing, {f"w{i}": (1,) for i in range(30)}, family="qwen3", tied=False) or ""
    assert f"w{SHOWN - 1} (1,) and {30 - SHOWN} more (30 in all)" in many and f"w{SHOWN} " not in many


# ---------------------------------------------------------------- reading


def _mappings(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_mapped_files_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every MAPPED_BYTES; a slice that is still held stays as it is."""
    model = Model(0, files=4, dtype=torch.bfloat16)
    model.write(tmp_path)
    size = 11 * HIDDEN * 2
    monkeypatch.setattr(huggingface, "MAPPED_BYTES", 2 * size)
    with FolderReader(tmp_path) as reader:
        assert _mappings(tmp_path) == 0  # only headers were read
        held = reader["model.embed_tokens.weight"][:, 3:5]
        for name in (*list(model.tensors) * 2, "model.layers.0.input_layernorm.weight"):
            assert torch.equal(reader[name][:], model.tensors[name])
        assert _mappings(tmp_path) == 3  # of the held slice, and of the last two files
        assert torch.equal(held, model.tensors["model.embed_tokens.weight"][:, 3:5])
        for part in (slice(2, 2), slice(11, 11), slice(4, 9), (slice(None), slice(0, 0))):
            assert torch.equal(reader["lm_head.weight"][part], model.tensors["lm_head.weight"][part])
        assert torch.equal(reader["model.norm.weight"][3:5], model.tensors["model.norm.weight"][3:5])
        del held
    assert _mappings(tmp_path) == 0


def test_a_folder_that_changes_meanwhile(tmp_path: Path) -> None:
    model = Model(0, files=1, dtype=torch.float32)
    model.write(tmp_path)
    with FolderReader(tmp_path) as reader:
        save_file({name: tensor + 1 for name, tensor in model.tensors.items()}, tmp_path / SINGLE)
        with pytest.raises(UserError, match=r"model.safetensors has changed since it was opened"):
            reader["model.norm.weight"][:]
