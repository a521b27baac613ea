from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.data.conversations import conversation_of
from asd_megatron.data.prompts import PromptRenderer
from asd_megatron.data.sft import SftExample, load_sft
from asd_megatron.data.tokenizer import load_tokenizer
from asd_megatron.errors import UserError
from asd_megatron.records import Problem
from asd_megatron.run.sources import model_folder
from tests.data.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
RENDERER = PromptRenderer(TOKENIZER, max_prompt_tokens=200)
END = TOKENIZER.eos_token_id


def load(path: Path, *lines: Any, **kwargs: Any) -> list[SftExample]:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return load_sft(path, RENDERER, end_token_ids=[END], **kwargs)


def test_examples(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "2 + 2?"}]
    plain, weighted, ended = load(
        tmp_path / "s.jsonl",
        {"prompt": "2 + 2?", "response": "It is 4"},
        {"messages": turns, "response": "4!", "loss_weights": [1, 0, 0.5], "id": "a"},
        {"messages": turns, "response": "4<|end|>"},
    )
    prompt = RENDERER.student(Problem("x", "", prompt="2 + 2?")).ids
    assert plain.prompt_ids == weighted.prompt_ids == prompt
    assert plain.response_ids[-1] == END and TOKENIZER.decode(plain.response_ids[:-1]) == "It is 4"
    assert plain.loss_weights == (1.0,) * 8
    assert weighted.loss_weights == (1.0, 0.0, 0.5) and len(weighted.response_ids) == 3
    assert {type(w) for w in weighted.loss_weights} == {float}
    assert TOKENIZER.decode(ended.response_ids) == "4<|end|>"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ({"prompt": "x", "response": "y", "id": [1]}, "`id` must be text"),
        ('{"prompt": "x", "response": "y", "loss_weights": [' + "7" * 5000 + "]}", "too large"),
        ({"prompt": "x"}, "`response` is missing"),
        ({"response": "x"}, "found neither"),
        ({"prompt": "x", "response": ""}, "`response` is empty"),
        ({"prompt": "x", "response": "y", "loss_weight": [1]}, "unknown field `loss_weight`"),
        (
            {"prompt": "x", "response": "yz", "loss_weights": [1, 1]},
            "2 entries, the response 3 tokens (its end token included)",
        ),
        ({"prompt": "x", "response": "y", "loss_weights": 1}, "must be a list of numbers"),
        ({"prompt": "x", "response": "y", "loss_weights": [1, True]}, "must be a list of numbers"),
        ({"prompt": "x", "response": "y", "loss_weights": [1, -1]}, "not negative"),
        ({"prompt": "x", "response": "y", "loss_weights": [0, 0]}, "at least one above 0"),
        ({"prompt": "x" * 300, "response": "y"}, "the prompt of problem of line 2 has"),
        ({"prompt": "x", "response": "y" * 300}, "the model takes 256"),
    ],
)
def test_malformed_lines(tmp_path: Path, line: Any, reason: str) -> None:
    with pytest.raises(UserError) as e:
        load(tmp_path / "s.jsonl", {"prompt": "x", "response": "y"}, line, max_tokens=256)
    assert str(e.value).startswith(f"{tmp_path / 's.jsonl'}:2: ") and reason in str(e.value)


def say(*texts: str) -> list[dict[str, str]]:
    """User and assistant in turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def learned(tokenizer: Any, example: SftExample) -> list[str]:
    """The runs of response tokens that are learned, as text."""
    runs: list[list[int]] = []
    before = 0.0
    for token, weight in zip(example.response_ids, example.loss_weights, strict=True):
        if weight and not before:
            runs.append([])
        if weight:
            runs[-1].append(token)
        before = weight
    return [tokenizer.decode(run) for run in runs]


def dense_mask(text: str, answers: list[str], opening: str, end: str) -> list[bool]:
    """For each character of a rendered conversation whether the assistant wrote it, by searching for its turns."""
    mask, at = [False] * len(text), 0
    for answer in answers:
        start = text.index(f"{opening}{answer}", at) + len(opening)
        at = text.index(end, start) + len(end)
        mask[start:at] = [True] * (at - start)
    return mask


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|start|>system\nYou are a"
    " helpful AI assistant named SmolLM, trained by Hugging Face<|end|>\n' }}{% endif %}{{'<|start|>' + message['role']"
    " + '\n' + message['content'] + '<|end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start|>assistant\n' }}{% endif %}"
)
"""SmolLM2-Instruct's, with this tokenizer's markers."""


@pytest.mark.parametrize("template", ["byte", "smollm2", "puzzle"])
def test_masks_of_conversations_are_those_of_a_dense_reading(tmp_path: Path, template: str) -> None:
    if template == "puzzle":
        folder = model_folder("puzzle:warm_start")
        tokenizer, answers = load_tokenizer(folder), ["7", "8 + 3", "9"]
        turns = say("1 + 2", answers[0], "3 = 4", answers[1], "5", answers[2])
    else:
        tokenizer, answers = byte_tokenizer(*([SMOLLM2] if template == "smollm2" else [])), ["It is 4.", "\nx", "y" * 9]
        turns = [
            {"role": "system", "content": "S"},
            *say("2 + 2?", answers[0], "And?", answers[1], "Go on", answers[2]),
        ]
    opening = "<|assistant|> " if template == "puzzle" else "assistant\n"
    renderer = PromptRenderer(tokenizer)
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": turns, "source": "x"}))
    end = tokenizer.eos_token_id
    (example,) = load_sft(path, renderer, end_token_ids=[end])
    text = renderer.chat_text(turns, "x", generation_prompt=False)
    ids = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    kept = [*example.prompt_ids, *example.response_ids]
    assert kept == ids["input_ids"][: len(kept)]  # what follows the last end token is left out
    mask = dense_mask(text, answers, opening, tokenizer.eos_token)
    weights = [0.0] * len(example.prompt_ids) + list(example.loss_weights)
    assert weights == [float(all(mask[a:b])) for a, b in ids["offset_mapping"][: len(kept)]]
    assert kept[-1] == end and sum(mask[ids["offset_mapping"][len(kept) - 1][1] :]) == 0
    (last,) = load_sft(path, renderer, end_token_ids=[end], loss_on="last")
    assert learned(tokenizer, last) == learned(tokenizer, example)[-1:] and set(last.loss_weights) == {1.0}
    assert [*last.prompt_ids, *last.response_ids] == kept


THINKS = (  # as Qwen3's, it removes the thinking of earlier turns
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' }}{% if loop.last %}{{ m['content'] }}{% else %}"
    "{{ m['content'].split('</think>')[-1] }}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(THINKS)
    renderer = PromptRenderer(tokenizer)
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": say("a", "<think>t</think>b", "c", "<think>u</think>d")}))
    with pytest.raises(UserError, match=r"c\.jsonl:1: the chat template writes turn 2 in another way.*loss_on last"):
        load_sft(path, renderer, end_token_ids=[END])
    (example,) = load_sft(path, renderer, end_token_ids=[END], loss_on="last")
    assert tokenizer.decode(example.response_ids) == "<think>u</think>d<|end|>"
    assert "<think>" not in tokenizer.decode(example.prompt_ids)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "q", "completion": "a", "source": "x"}, say("q", "a")),
        ({"prompt": say("q"), "completion": say("q", "a")[1:]}, say("q", "a")),
        ({"instruction": "q", "input": "more", "output": "a"}, say("q\n\nmore", "a")),
        ({"instruction": "q", "input": "", "output": "a"}, say("q", "a")),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "S"},
            [{"role": "system", "content": "S"}, *say("q", "a")],
        ),
        ({"problem": "q", "messages": [{**turn, "tool_calls": None} for turn in say("q", "a")]}, say("q", "a")),
        ({"messages": say("q", "a", "r"), "response": "b"}, say("q", "a", "r", "b")),
    ],
)
def test_forms_of_rows(tmp_path: Path, row: dict[str, Any], turns: list[dict[str, str]]) -> None:
    assert [dict(turn) for turn in conversation_of(row).turns] == turns
    (example,) = load(tmp_path / "s.jsonl", row)
    assert TOKENIZER.decode(example.response_ids).endswith(f"{turns[-1]['content']}<|end|>")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": say("q", " ")}, "turn 2, the assistant's, is empty"),
        ({"messages": say("q", "a")[::-1]}, "no `messages` end with the assistant"),
        ({"messages": [*say("q", "a"), {"role": "assistant", "content": "b"}]}, "turn 3 is the assistant's"),
        ({"messages": [{"role": "tool", "content": "x"}, *say("q", "a")]}, "the role 'tool'"),
        ({"messages": [{**turn, "name": "n"} for turn in say("q", "a")]}, "the field `name`, which is not read"),
        ({"messages": say("q", "a"), "loss_weights": [1]}, "`loss_weights` belong to the tokens of `response`"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "the last turn must be the assistant's, found user"),
        ({"prompt": "q", "completion": None}, "`response` is missing"),
        ({"messages": say("q", "a" * 300)}, "the model takes 256"),
    ],
)
def test_conversations_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as e:
        load(tmp_path / "s.jsonl", row, max_tokens=256)
    assert "s.jsonl:1: " in str(e.value) and reason in str(e.value)


def test_raw_format_takes_one_answer(tmp_path: Path) -> None:
    raw = PromptRenderer(TOKENIZER, format="raw", raw_prompt="Q: {prompt}\nA:")
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"messages": say("q", "a")}))
    (example,) = load_sft(path, raw, end_token_ids=[END])
    assert TOKENIZER.decode(example.prompt_ids) == "Q: q\nA:" and example.response_ids[-1] == END
    path.write_text(json.dumps({"messages": say("q", "a", "r", "b")}))
    with pytest.raises(UserError, match="several assistant turns, which data.format raw cannot render"):
        load_sft(path, raw, end_token_ids=[END])


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no examples"):
        load(tmp_path / "s.jsonl")
