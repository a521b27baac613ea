"""The word-level tokenizer: ordinary to load, lossless, and it knows every word of the ordinary templates."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from asd_megatron.antisd.privileged import feedback
from asd_megatron.data.prompts import PromptRenderer, TeacherLimits
from asd_megatron.puzzle.task import PuzzleStream
from asd_megatron.puzzle.tokenizer import (
    SPECIAL_TOKENS,
    UNKNOWN_TOKEN,
    VOCABULARY_SIZE,
    build_tokenizer,
    vocabulary,
    write_tokenizer,
)

TOKENIZER = build_tokenizer()
ORDINARY = st.integers(len(SPECIAL_TOKENS), VOCABULARY_SIZE - 1)


def test_vocabulary() -> None:
    words = vocabulary()
    assert len(words) == len(set(words)) == len(TOKENIZER) == VOCABULARY_SIZE
    assert VOCABULARY_SIZE % 16 == 0
    assert TOKENIZER.convert_ids_to_tokens(list(range(VOCABULARY_SIZE))) == words


@settings(max_examples=50, deadline=None)
@given(st.lists(ORDINARY, max_size=40))
def test_encode_undoes_decode(ids: list[int]) -> None:
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids


def test_end_tokens_are_skipped() -> None:
    ids = TOKENIZER.encode("Let 7 =14 +1 yes So 7 <|end|>")
    assert ids[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "Let 7 =14 +1 yes So 7"


def test_a_saved_folder_loads_as_an_ordinary_tokenizer(tmp_path: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer"))
    turns = [{"role": "user", "content": "Solve"}, {"role": "assistant", "content": "So 7"}]
    text = loaded.apply_chat_template(turns, tokenize=False)
    assert text == "<|user|> Solve <|end|> <|assistant|> So 7 <|end|> "
    prompt = loaded.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    assert prompt == "<|user|> Solve <|end|> <|assistant|>" and text.startswith(prompt)
    assert (loaded.eos_token, loaded.pad_token, loaded.unk_token) == ("<|end|>", "<|pad|>", UNKNOWN_TOKEN)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize("template", ["{solution}", "The final answer is: {answer}", None])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_privileged_prompts_have_no_unknown_word(template: str | None, reward: float) -> None:
    renderer = PromptRenderer(TOKENIZER, system="Solve this problem")
    unknown = TOKENIZER.unk_token_id
    for problem in PuzzleStream.of("test").take(100):
        demonstration = template and template.format(solution=problem.solution, answer=problem.answer)
        for limit in (8192, 5):  # 5: a demonstration shortened around an ellipsis
            ids = renderer.teacher(problem, demonstration, feedback(reward), 64, TeacherLimits(limit, 1)).ids
            assert ids is not None and unknown not in ids
        assert unknown not in renderer.student(problem).ids
