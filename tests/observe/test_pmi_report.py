"""Mean u by token, against numbers computed by hand, and its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asd_megatron.errors import UserError
from asd_megatron.observe.dumps import dump_path, write_dump
from asd_megatron.observe.pmi_report import dumps_pmi, examples_pmi, pmi_report, token_means, token_text
from asd_megatron.records import TokenTable
from tests.observe.batch import make_examples, make_table
from tools import inspect_pmi

METADATA: dict[str, Any] = {"lam": 0.5, "H": 0.3, "h_warm": 0.3, "temperature": 1.0, "recipe_hash": "r"}


class Words:
    all_special_ids = (8,)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        known = {7: "Wait", 8: "\n", 9: "a" * 30, 20: " \ufffd", 21: "\ufffd", 22: "\ufffd"}
        return known.get(token_ids[0], f"w{token_ids[0]}")

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return {20: "\u0120\u00e2\u0124", 21: "<0xE2>", 22: "\ufffd"}[token_id]


def dump(path: Path, table: TokenTable) -> Path:
    return write_dump(path, make_examples(), table, step=1, **METADATA)


def test_means_by_hand() -> None:
    ids, pmi = torch.tensor([5, 7, 5, 7, 7, 6]), torch.tensor([1.0, -1.0, 3.0, -2.0, -6.0, float("nan")])
    low, high = token_means(ids, pmi)
    assert (low.token_id, low.count, low.mean, low.negative_share) == (7, 3, -3.0, 1.0)
    assert low.std == pytest.approx((14 / 3) ** 0.5)
    assert (high.token_id, high.count, high.mean, high.std, high.negative_share) == (5, 2, 2.0, 1.0, 0.0)
    assert [t.token_id for t in token_means(ids, pmi, min_count=3)] == [7]


def test_only_sampled_tokens_with_context() -> None:
    ids, pmi = examples_pmi(make_examples(), make_table())
    assert ids.tolist() == [7, 8, 9, 7]
    assert pmi.tolist() == [-1.0, 0.5, -0.25, 0.0]
    with pytest.raises(ValueError, match="no pmi column"):
        examples_pmi(make_examples(), make_table(teacher=False))


def test_report() -> None:
    ids, pmi = examples_pmi(make_examples(), make_table())
    text = pmi_report(ids, pmi, Words(), min_count=1, top=2)
    assert text.splitlines()[0] == (
        "4 tokens with privileged context, mean u -0.188 nats; 3 token ids seen at least 1 time"
    )
    low, rest = text.split("Highest mean u")
    high, special = rest.split("Special tokens")
    assert "|Wait|" in low and "-0.500" in low
    assert "|aaaaaaaaaaaaaaaaa~|" in high and "Wait" not in high  # a token is lowest or highest, never both
    assert "|\\n|" in special and "+0.500" in special and "|\\n|" not in low + high
    with pytest.raises(UserError, match="no token was seen 3 times in 4 tokens"):
        pmi_report(ids, pmi, Words(), min_count=3)


def test_bytes_that_are_no_text_are_shown() -> None:
    """A part of a character in a byte-level vocabulary and in SentencePiece's byte fallback; U+FFFD itself."""
    assert [token_text(Words(), i) for i in (20, 21, 22, 8)] == [" \\xe2\\x82", "\\xe2", "\ufffd", "\\n"]


def test_dumps_are_pooled(tmp_path: Path) -> None:
    paths = [dump(dump_path(tmp_path, step), make_table()) for step in (1, 2)]
    ids, pmi = dumps_pmi(paths)
    assert ids.tolist() == [7, 8, 9, 7] * 2 and pmi.sum() == -1.5
    with pytest.raises(UserError, match="at least one Parquet file"):
        dumps_pmi([])
    with pytest.raises(UserError, match="holds no u"):
        dumps_pmi([dump(tmp_path / "grpo.parquet", make_table(teacher=False))])


def make_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(12)} | {"Wait": 12}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")))
    tokenizer.save_pretrained(str(folder))
    return folder


def test_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump(dump_path(tmp_path / "run", 1), make_table())
    folder = str(make_tokenizer(tmp_path / "tokenizer"))
    run = [str(tmp_path / "run"), "--tokenizer", folder]
    assert inspect_pmi.main([*run, "--min-count", "2"]) == 0
    assert "|w7|" in capsys.readouterr().out
    assert inspect_pmi.main([str(tmp_path), "--tokenizer", folder]) == 2
    assert "holds no rollout dumps" in capsys.readouterr().err
    assert inspect_pmi.main([str(tmp_path / "run"), "--tokenizer", "nowhere"]) == 2
    assert "tokenizer folder nowhere does not exist" in capsys.readouterr().err


def test_tool_finds_the_runs_own_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    dump(dump_path(run, 1), make_table())
    assert inspect_pmi.main([str(run), "--min-count", "2"]) == 2
    assert "give the model's folder with --tokenizer" in capsys.readouterr().err
    folder = make_tokenizer(tmp_path / "tokenizer")
    (run / "recipe.yaml").write_text(f"model:\n  path: {folder}\ndata:\n  train: problems.jsonl\n")
    assert inspect_pmi.main([str(run), "--min-count", "2"]) == 0
    assert "|w7|" in capsys.readouterr().out
