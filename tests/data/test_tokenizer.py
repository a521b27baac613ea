from __future__ import annotations

from pathlib import Path

import pytest

from asd_megatron.data.tokenizer import check_vocabulary, decode, end_token_ids, load_tokenizer
from asd_megatron.errors import UserError
from tests.data.tokenizers import tokenizer_folder


def test_load_and_decode(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path))
    ids = tokenizer("a , b <think>\n", add_special_tokens=False)["input_ids"]
    assert decode(tokenizer, [*ids, tokenizer.eos_token_id]) == "a , b <think>\n"


def test_missing_and_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model folder .* does not exist"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="cannot load the tokenizer of"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="cannot load the tokenizer of"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("given", [None, 258, [258, 256], [256]])
def test_end_tokens(tmp_path: Path, given: object) -> None:
    folder = tokenizer_folder(tmp_path, given)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id == 256
    expected = {None: (256,), 258: (258, 256)}.get(given) if not isinstance(given, list) else None
    assert end_token_ids(folder, tokenizer) == (expected or ((258, 256) if given == [258, 256] else (256,)))


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [1, true]}', '{"eos_token_id": -1}']
)
def test_broken_generation_config(tmp_path: Path, content: str) -> None:
    folder = tokenizer_folder(tmp_path)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        end_token_ids(folder, load_tokenizer(folder))


def test_vocabulary_smaller_than_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path))
    check_vocabulary(tokenizer, 261)
    with pytest.raises(UserError, match="vocab_size is 260, the tokenizer has ids up to 260"):
        check_vocabulary(tokenizer, 260)
