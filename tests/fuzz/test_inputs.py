"""Damaged inputs of every kind are read, or refused by a UserError that names the file: no other error, no hang, no
unbounded memory.

`make test` tries few examples, always the same ones; `pytest -m slow tests/fuzz` tries many new ones.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from asd_megatron.checkpoint.distcp import DistributedCheckpoint
from asd_megatron.checkpoint.huggingface import FolderReader, is_complete, read_config
from asd_megatron.checkpoint.inspection import inspect
from asd_megatron.checkpoint.locate import Found, find
from asd_megatron.config import check_devices, check_model, check_world, dump_recipe, load_recipe
from asd_megatron.data.problems import load_problems
from asd_megatron.data.prompts import PromptRenderer
from asd_megatron.data.sft import load_sft
from asd_megatron.data.tokenizer import check_vocabulary, end_token_ids, load_tokenizer
from asd_megatron.distributed import layout as layouts
from asd_megatron.errors import UserError
from asd_megatron.models.families import shape_of
from asd_megatron.models.loading import refusal as tensors_refusal
from asd_megatron.observe.dumps import read_dump
from asd_megatron.observe.pmi_report import examples_pmi, token_means
from asd_megatron.records import Problem
from asd_megatron.run import method
from asd_megatron.run.report import evaluation_text, method_rows
from tests.checkpoint.trainer import Trainer
from tests.data.tokenizers import byte_tokenizer
from tests.fuzz.damage import damaged_bytes, damaged_json, damaged_pickle, damaged_safetensors, damaged_value
from tests.fuzz.reading import refusal
from tests.models import tiny
from tests.observe.test_dumps import write as write_a_dump

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("examples/**/*.yaml"))
QUICK = {
    "recipe": 60,
    "problems": 150,
    "files": 80,
    "config": 100,
    "index": 60,
    "weights": 100,
    "tokenizer": 15,
    "checkpoint": 40,
    "dump": 60,
}
MANY = 200  # times as many examples in the slow variant


few_and_many = pytest.mark.parametrize(
    "many", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])], ids=["few", "many"]
)


def fuzz(kind: str, many: bool, check: Callable[[Any], None]) -> None:
    """Call `check(data)` for QUICK[kind] examples, always the same; with `many`, for MANY times as many new ones."""
    chosen = settings(
        max_examples=QUICK[kind] * (MANY if many else 1),
        derandomize=not many,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if many else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )

    @chosen
    @given(st.data())
    def run(data: Any) -> None:
        check(data)

    run()


def names(message: str | None, *names: str) -> None:
    """The message of a refusal holds one of the names."""
    assert message is None or any(name in message for name in names), message


# ---------------------------------------------------------------- recipes


@few_and_many
def test_recipes(many: bool, tmp_path: Path) -> None:
    def check(data: Any) -> None:
        source = data.draw(st.sampled_from(RECIPES))
        text = source.read_bytes()
        if data.draw(st.integers(0, 3)):
            values = data.draw(damaged_value(yaml.safe_load(text)))
            damaged = yaml.dump(values).encode("utf-8", "surrogatepass")
        else:
            damaged = data.draw(damaged_bytes(text))
        path = tmp_path / "recipe.yaml"
        path.write_bytes(damaged)
        kind: Any = "sft" if b"\nsft:" in text or "warm_start" in source.name else "train"
        config = json.loads((ROOT / "asd_megatron/models/published/Qwen3-8B.json").read_text())

        def read() -> None:
            recipe = load_recipe(path, kind=kind)
            dump_recipe(recipe)
            evaluation_text(recipe)
            check_devices(recipe, cuda=False, transformer_engine=False)
            check_world(recipe, recipe.parallelism.model_parallel * 2)
            check_model(recipe, config)
            if kind == "train":
                method.make_plan(recipe)
                method_rows(
                    recipe, method.make_method(recipe), method.make_gate(recipe), method.make_perplexity(recipe)
                )

        message = refusal(read)
        assert message is None or "recipe.yaml" in message or re.search(r"\b[a-z]+\.[a-z_]+\b", message), (
            message
        )  # the key

    fuzz("recipe", many, check)


# ---------------------------------------------------------------- problem files

LINES = [
    {"id": "a", "prompt": "What is 1 + 1?", "answer": "2", "solution": "It is 2.", "level": 3},
    {
        "id": 7,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1?"}],
        "answer": 1.50,
    },
    {"prompt": "Why?", "answer": "because", "response": "Because.", "loss_weights": [1] * 9},
    {"problem": "p", "solution": "so \\boxed{4}", "idx": 3},
    {"question": "q", "answer": "2 + 2 = <<2+2=4>> 4\n#### 4"},
]
ROWS = [
    {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": "1"}, "extra_info": {"index": "x"}},
    {"prompt": "q", "ground_truth": ["assert f(1) == 2"], "dataset": "code"},
    {
        "question": "q",
        "input_output": '{"fn_name": "f", "inputs": [[1]], "outputs": [[2]]}',
        "starter_code": "def f(x):",
    },
    {
        "question_content": "q",
        "public_test_cases": '[{"input": "1", "output": "2", "testtype": "functional"}]',
        "private_test_cases": "eJxrYJmqxMjAwFDGoJRYklmWqgQAIYIEKw==",
        "metadata": '{"func_name": "f"}',
    },
    {
        "prompt": "def f(x):",
        "test": "def check(f): pass",
        "entry_point": "f",
        "task_id": "t",
        "canonical_solution": "x",
    },
    {"text": "q", "test_list": ["assert f(1) == 2"], "test_imports": ["import math"], "code": "f = int"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "system": "s"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    {"instruction": "q", "input": "i", "output": "o"},
    {"prompt": "q", "tests": [{"input": "1", "output": "2"}, {"assert": "x"}], "setup": "import math"},
]


@pytest.fixture(scope="module")
def renderer() -> PromptRenderer:
    return PromptRenderer(byte_tokenizer())


@few_and_many
def test_problem_files(many: bool, tmp_path: Path, renderer: PromptRenderer) -> None:
    def check(data: Any) -> None:
        chosen = data.draw(st.lists(st.sampled_from(LINES), min_size=1, max_size=4))
        lines = [
            data.draw(damaged_json(line)) if data.draw(st.booleans()) else json.dumps(line).encode() for line in chosen
        ]
        content = b"\n".join(lines)
        path = tmp_path / "problems.jsonl"
        path.write_bytes(data.draw(damaged_bytes(content)) if data.draw(st.booleans()) else content)
        names(refusal(lambda: renderer.check(load_problems(path).take())), "problems.jsonl", "problem ")
        names(refusal(lambda: load_sft(path, renderer, end_token_ids=[256], max_tokens=1000)), "problems.jsonl")

    fuzz("problems", many, check)


@few_and_many
def test_other_data_files(many: bool, tmp_path: Path, renderer: PromptRenderer) -> None:
    """Parquet, packed text and JSON documents; conversations and rows of published sets with their tests."""
    good = tmp_path / "good"
    good.mkdir()
    pq.write_table(
        pa.Table.from_pylist([{**LINES[0], "id": i, "turns": LINES[1]["messages"]} for i in "abcabc"]),
        good / "a.parquet",
    )
    (good / "a.json").write_text(json.dumps(ROWS, indent=1))
    for name, pack in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        (good / f"a.{name}").write_bytes(pack(json.dumps(LINES[0]).encode()))

    def check(data: Any) -> None:
        source = data.draw(st.sampled_from(sorted(good.iterdir())))
        path = tmp_path / source.name
        if source.suffix == ".json" and data.draw(st.integers(0, 3)):
            path.write_bytes(data.draw(damaged_json(ROWS)))
        elif source.suffix == ".json":
            path.write_bytes(b"\n".join(data.draw(damaged_json(data.draw(st.sampled_from(ROWS)))) for _ in range(2)))
        else:
            path.write_bytes(data.draw(damaged_bytes(source.read_bytes())))
        names(refusal(lambda: load_problems(path)), str(path))
        names(refusal(lambda: load_sft(path, renderer, end_token_ids=[256])), str(path))

    fuzz("files", many, check)


# ---------------------------------------------------------------- model folders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose weights are in two files."""
    folder = tiny.tiny_qwen3(tmp_path_factory.mktemp("model") / "hf", num_hidden_layers=1)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder


@few_and_many
def test_configs(many: bool, tmp_path: Path) -> None:
    def check(data: Any) -> None:
        published = sorted((ROOT / "asd_megatron/models/published").glob("*.json"))
        config = json.loads(data.draw(st.sampled_from(published)).read_text())
        (tmp_path / "config.json").write_bytes(data.draw(damaged_json(config)))
        names(refusal(lambda: shape_of(read_config(tmp_path))), "config.json")

    fuzz("config", many, check)


def _split(model: Path, folder: Path) -> dict[str, Any]:
    """`model` with its weights in two files under an index, which is returned."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    index = {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name)
        index.update(dict.fromkeys(part, name))
    return {"metadata": {"total_size": 1}, "weight_map": index}


def _load(folder: Path) -> None:
    """Everything that loading a model folder reads, and `asd-megatron convert inspect`."""
    with FolderReader(folder) as tensors:
        family, _ = shape_of(read_config(folder))
        expected = {name: tuple(tensors[name].shape) for name in tensors}
        message = tensors_refusal(tensors, expected, family=family.name, tied=False)
        if message is not None:
            raise UserError(message)
        for tensor in tensors.values():
            if tensor.shape:
                tensor[:]
    is_complete(folder)
    inspect(Found("huggingface", folder))


@few_and_many
def test_indexes(many: bool, tmp_path: Path, model: Path) -> None:
    def check(data: Any) -> None:
        folder = tmp_path / "hf"
        shutil.rmtree(folder, ignore_errors=True)
        index = _split(model, folder)
        (folder / "model.safetensors.index.json").write_bytes(data.draw(damaged_json(index)))
        names(refusal(lambda: _load(folder)), str(folder))

    fuzz("index", many, check)


@few_and_many
def test_weights(many: bool, tmp_path: Path, model: Path) -> None:
    def check(data: Any) -> None:
        folder = tmp_path / "hf"
        shutil.copytree(model, folder, dirs_exist_ok=True)
        content = (model / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data.draw(damaged_safetensors(content)))
        names(refusal(lambda: _load(folder)), str(folder))

    fuzz("weights", many, check)


@few_and_many
def test_tokenizers(many: bool, tmp_path: Path, model: Path) -> None:
    def check(data: Any) -> None:
        folder = tmp_path / "hf"
        shutil.copytree(model, folder, dirs_exist_ok=True)
        name = data.draw(
            st.sampled_from(
                ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
            )
        )
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(
            data.draw(damaged_bytes(content) if name.endswith("jinja") else damaged_json(json.loads(content)))
        )

        def read() -> None:
            tokenizer = load_tokenizer(folder)
            ends = end_token_ids(folder, tokenizer)
            check_vocabulary(tokenizer, 61)
            PromptRenderer(tokenizer, end_token_ids=ends).check([Problem("p", "1", "t1 t2 t3", None, None, {})])

        names(refusal(read), str(folder), "problem p", "chat template", "tokenizer")

    fuzz("tokenizer", many, check)


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """A trainer of one rank, with a checkpoint in its `folder`."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made: Any = Trainer({}, False, 1, num_hidden_layers=1)
    made.steps(range(1))
    made.folder = made.save(tmp_path_factory.mktemp("checkpoints"), 1)
    yield made
    layouts.shutdown_model_parallel()
    dist.destroy_process_group()


@few_and_many
def test_checkpoints(many: bool, tmp_path: Path, trainer: Any) -> None:
    folder = tmp_path / "step_000001"

    def check(data: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trainer.folder, folder)
        files = sorted(path.name for path in folder.iterdir() if path.stat().st_size)
        path = folder / data.draw(st.sampled_from([*files, ".metadata", ".metadata"]))
        content = path.read_bytes()
        if path.suffix == ".json":
            damaged = data.draw(damaged_json(json.loads(content)))
        elif path.name == ".metadata" and data.draw(st.booleans()):
            damaged = data.draw(damaged_pickle(content))
        else:
            damaged = data.draw(damaged_bytes(content))
        path.write_bytes(damaged)
        names(refusal(lambda: trainer.load(folder)), str(folder))
        names(refusal(lambda: inspect(find(folder))), str(folder))
        names(refusal(read_all), str(folder))

    def read_all() -> None:
        checkpoint = DistributedCheckpoint(folder)
        for key in checkpoint.tensors:
            checkpoint.read(key)

    fuzz("checkpoint", many, check)


# ---------------------------------------------------------------- rollout dumps


@few_and_many
def test_dumps(many: bool, tmp_path: Path) -> None:
    def check(data: Any) -> None:
        path = tmp_path / "step_000007.parquet"
        if not (tmp_path / "good").exists():
            shutil.move(write_a_dump(path), tmp_path / "good")
        path.write_bytes(data.draw(damaged_bytes((tmp_path / "good").read_bytes())))

        def read() -> None:
            dump = read_dump(path)
            if "pmi" in dump.table:
                token_means(*examples_pmi(dump.examples, dump.table))

        names(refusal(read), str(path))

    fuzz("dump", many, check)
