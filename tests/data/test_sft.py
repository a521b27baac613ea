from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.data.prompts import PromptRenderer
from asd_megatron.data.sft import SftExample, load_sft
from asd_megatron.errors import UserError
from asd_megatron.records import Problem
from tests.data.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
RENDERER = PromptRenderer(TOKENIZER, max_prompt_tokens=200)
END = TOKENIZER.eos_token_id


def load(path: Path, *lines: Any, **kwargs: Any) -> list[SftExample]:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return load_sft(path, RENDERER, end_token_id=END, **kwargs)


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


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no examples"):
        load(tmp_path / "s.jsonl")
