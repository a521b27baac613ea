"""The per-token report: the tokens with the lowest and the highest mean u.

Low u: tokens that the privileged context makes less likely (deliberation). High u: shortcuts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from asd_megatron.errors import UserError, plural
from asd_megatron.observe.dumps import read_dump
from asd_megatron.observe.metrics import context_mask, sampled_mask
from asd_megatron.records import Example, TokenTable, flat


class Decoder(Protocol):
    """What the report needs of a tokenizer: Hugging Face's."""

    @property
    def all_special_ids(self) -> Sequence[int]: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...


@dataclass(frozen=True)
class TokenMean:
    """One token id's statistics of u, in nats."""

    token_id: int
    count: int
    mean: float
    std: float
    negative_share: float


def examples_pmi(examples: Sequence[Example], table: TokenTable) -> tuple[Tensor, Tensor]:
    """(ids int64 [M], u float32 [M]) of the sampled tokens whose u means something (rollouts with context).

    Raises ValueError if the table has no column `pmi`.
    """
    if "pmi" not in table:
        raise ValueError("the token table has no pmi column: this recipe did not compute u")
    mask = sampled_mask(examples) & context_mask(examples, table)
    ids = flat([e.rollout.response_ids for e in examples], torch.int64)
    return ids[mask], table["pmi"].cpu()[mask]


def dumps_pmi(paths: Sequence[str | os.PathLike[str]]) -> tuple[Tensor, Tensor]:
    """(ids, u) of several rollout dumps together. Raises UserError for a dump without u."""
    ids, pmi = [], []
    for path in paths:
        dump = read_dump(path)
        if "pmi" not in dump.table:
            why = "train with a teacher, or with `algorithm.log_pmi: true`"
            if dump.info.reason is not None:
                why = f"it was not computed, or the recipe has none ({dump.info.reason})"
            raise UserError(f"{os.fspath(path)} holds no u: {why}")
        some_ids, some_pmi = examples_pmi(dump.examples, dump.table)
        ids.append(some_ids)
        pmi.append(some_pmi)
    if not ids:
        raise UserError("no rollout dump to read: give at least one Parquet file of RUN/rollouts")
    return torch.cat(ids), torch.cat(pmi)


def token_means(ids: Tensor, pmi: Tensor, *, min_count: int = 1) -> list[TokenMean]:
    """Statistics by token id [M], [M], lowest mean first; ids seen fewer than `min_count` times are left out."""
    keep = torch.isfinite(pmi)
    unique, inverse = torch.unique(ids[keep], return_inverse=True)
    values = pmi[keep].to(torch.float64)
    count = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, inverse, torch.ones_like(values))
    mean = torch.zeros_like(count).index_add_(0, inverse, values) / count
    square = torch.zeros_like(count).index_add_(0, inverse, (values - mean[inverse]) ** 2)
    negative = torch.zeros_like(count).index_add_(0, inverse, (values < 0).to(torch.float64))
    rows = zip(unique.tolist(), count.tolist(), mean.tolist(), square.tolist(), negative.tolist(), strict=True)
    means = [TokenMean(i, int(n), m, (s / n) ** 0.5, neg / n) for i, n, m, s, neg in rows if n >= min_count]
    return sorted(means, key=lambda t: (t.mean, t.token_id))


def _byte_characters() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary (GPT-2, Qwen, Llama 3): a printable byte of Latin-1 is its
    own character, the others have those from 256 on, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_characters()


def token_text(tokenizer: Decoder, token_id: int) -> str:
    """A token as text, escaped as in Python: `\\n`. Bytes that are only a part of a character, which `decode` replaces
    by U+FFFD, are shown as such: `\\xe2\\x82`."""
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    if "\ufffd" in text:
        token = str(tokenizer.convert_ids_to_tokens(token_id))
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):  # SentencePiece's byte fallback
            text = bytes([int(token[3:5], 16)]).decode("utf-8", "surrogateescape")
        elif all(character in BYTES for character in token):
            text = bytes(BYTES[character] for character in token).decode("utf-8", "surrogateescape")
    return re.sub(r"\\udc([89a-f][0-9a-f])", r"\\x\1", repr(text)[1:-1])


def _table(title: str, rows: Sequence[TokenMean], tokenizer: Decoder) -> list[str]:
    lines = [title, f"  {'token':<20} {'id':>8} {'count':>7} {'mean u':>8} {'std':>7} {'u < 0':>6}"]
    for row in rows:
        text = token_text(tokenizer, row.token_id)
        text = text if len(text) <= 18 else text[:17] + "~"
        cells = f"{row.token_id:>8} {row.count:>7} {row.mean:>+8.3f} {row.std:>7.3f} {row.negative_share:>6.0%}"
        lines.append(f"  {'|' + text + '|':<20} {cells}")
    return lines


def lowest_and_highest(means: Sequence[TokenMean], top: int) -> tuple[Sequence[TokenMean], Sequence[TokenMean]]:
    """At most `top` tokens of each end of `means` (lowest mean first); no token is in both, so that a token in the
    table of the highest is above every token in that of the lowest."""
    lower = min(top, (len(means) + 1) // 2)
    upper = min(top, len(means) - lower)
    return means[:lower], means[::-1][:upper]


def pmi_report(ids: Tensor, pmi: Tensor, tokenizer: Decoder, *, min_count: int = 5, top: int = 15) -> str:
    """Tables of the `top` tokens with the lowest and with the highest mean u, and of the special tokens, as text.

    Special tokens (the end token above all) stand apart: their u says how much likelier the response ends there.
    Raises UserError when no token was seen `min_count` times.
    """
    special_ids = set(tokenizer.all_special_ids)
    every = token_means(ids, pmi, min_count=min_count)
    means = [mean for mean in every if mean.token_id not in special_ids]
    if not every:
        raise UserError(
            f"no token was seen {plural(min_count, 'time')} in {plural(len(ids), 'token')}: lower the minimum count"
        )
    overall = f"{plural(len(ids), 'token')} with privileged context, mean u {pmi[torch.isfinite(pmi)].mean():+.3f} nats"
    lines = [f"{overall}; {plural(len(every), 'token id')} seen at least {plural(min_count, 'time')}", ""]
    low, high = lowest_and_highest(means, top)
    special = [mean for mean in every if mean.token_id in special_ids]
    tables = (("Lowest mean u (deliberation)", low), ("Highest mean u (shortcuts)", high), ("Special tokens", special))
    lines += "\n\n".join("\n".join(_table(title, rows, tokenizer)) for title, rows in tables if rows).splitlines()
    return "\n".join(lines) + "\n"
