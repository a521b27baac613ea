from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

import asd_megatron
from asd_megatron.data.tokenizer import (
    check_stop_token_ids,
    check_vocabulary,
    decode,
    end_token_ids,
    load_tokenizer,
    undecodable,
)
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


@pytest.mark.parametrize("generation", [None, 258])
def test_end_tokens_of_config_json_count_too(tmp_path: Path, generation: int | None) -> None:
    folder = tokenizer_folder(tmp_path, generation)
    tokenizer = load_tokenizer(folder)
    for given, more in ((65, (65,)), ([65, 256], (65,)), (None, ()), ([], ())):
        (folder / "config.json").write_text(json.dumps({"eos_token_id": given}))
        own = () if generation is None else (generation,)
        assert end_token_ids(folder, tokenizer) == (*own, 256, *more)


@pytest.mark.parametrize("unknown", [261, 151_645, 2**40])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_token_that_the_tokenizer_lacks_is_left_out(
    tmp_path: Path, name: str, unknown: int, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tokenizer_folder(tmp_path)
    tokenizer = load_tokenizer(folder)
    (folder / name).write_text(json.dumps({"eos_token_id": [unknown, 258]}))
    with caplog.at_level(logging.WARNING, logger="asd_megatron"):
        assert set(end_token_ids(folder, tokenizer)) == {256, 258}
    (record,) = caplog.records
    assert str(unknown) in record.message and name in record.message and "sampling.stop_token_ids" in record.message


def test_stop_token_ids_that_the_tokenizer_lacks_are_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path))
    check_stop_token_ids(tokenizer, (0, 260))
    for unknown in (261, 151_645, 2**40):
        with pytest.raises(UserError, match=rf"sampling\.stop_token_ids.* no token {unknown} .*up to 260"):
            check_stop_token_ids(tokenizer, (0, unknown))


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"eos_token_id": "x"}',
        '{"eos_token_id": [1, true]}',
        '{"eos_token_id": -1}',
        "[" * 100_000,
        '{"eos_token_id": ' + "7" * 5000 + "}",
    ],
    ids=range(7),
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


def test_embeddings_without_a_token_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path))
    with caplog.at_level(logging.WARNING, logger="asd_megatron"):
        check_vocabulary(tokenizer, 261)
        assert not caplog.records
        check_vocabulary(tokenizer, 1300)
    assert "1,300 embeddings" in caplog.text and "261 tokens: 1,039 ids" in caplog.text


def test_ids_without_a_token_are_decoded_and_counted(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path))
    a, b = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert decode(tokenizer, [261, a, 256, 300, 2**40, b]) == "\ufffda\ufffd\ufffdb"
    assert decode(tokenizer, (a, 256), skip_special_tokens=False) == "a<|end|>"
    assert undecodable(tokenizer, [(261, a), (), (a, b, 261, 300)]) == 3
    assert undecodable(tokenizer, [(a, b)]) == 0


def spaced_tokenizer() -> Any:
    """Whole words as tokens, and clean-up of spaces on decoding, as in WordPiece models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "</s>", "x", "!=", "y", "1", ",", "2", "."])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=True
    )


def test_responses_are_decoded_as_they_were_sampled() -> None:
    tokenizer = spaced_tokenizer()
    ids = tokenizer("x != y , 1 .", add_special_tokens=False)["input_ids"]
    assert decode(tokenizer, [*ids, 1]) == "x != y , 1 ."


def test_no_other_module_decodes_with_clean_up() -> None:
    package = Path(asd_megatron.__file__).parent
    calls = {
        f"{path.relative_to(package)}: {line.strip()}"
        for path in package.rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if re.search(r"tokenizer\.(batch_)?decode\(", line) and "clean_up_tokenization_spaces=False" not in line
    }
    assert not calls
