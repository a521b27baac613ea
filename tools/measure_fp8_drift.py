"""How far log-probs, u and entropies drift from float32's in bfloat16 and in FP8, on texts of your own.

    python tools/measure_fp8_drift.py FOLDER TEXTS.jsonl [--ends 1 3] [--json FILE]

FOLDER: a Hugging Face model. TEXTS: one {"prompt", "teacher_prompt", "response"} a line; the response is scored after
both prompts. In one process. FP8 needs Transformer Engine on CUDA; the tests' stand-in rounds as FP8 does on CPUs:

    PYTHONPATH=tests/te_double python tools/measure_fp8_drift.py ...

Columns, over the response tokens, nats: mean |difference| of s (log-prob after `prompt`), of t (after `teacher_prompt`)
and of u = t - s, the 99% quantile of the last, the lower median of the teacher's entropies, and the fraction of tokens
with another sign of u among those with |u| > 0.05 in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from asd_megatron.checkpoint.huggingface import FolderReader, read_config
from asd_megatron.data.files import read_rows
from asd_megatron.data.tokenizer import load_tokenizer
from asd_megatron.distributed import device, layout
from asd_megatron.distributed.layout import Layout, ProcessGroups
from asd_megatron.errors import UserError
from asd_megatron.files import user_error, write_json
from asd_megatron.models.port import ModelPort
from asd_megatron.models.precision import BFLOAT16, Precision
from asd_megatron.ops.quantile import lower_median
from asd_megatron.trainer.batch import PackLayout, TokenSequence, build_packs
from asd_megatron.trainer.fp8_probe import sign_flips
from asd_megatron.trainer.scorer import score

KEYS = ("prompt", "teacher_prompt", "response")


@dataclass(frozen=True)
class Format:
    """A row of the table: a number format to score in."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    layers: Literal["te", "local"] = "te"
    precision: Precision = BFLOAT16


@dataclass(frozen=True)
class Texts:
    """The sequences to score, after either prompt; `tokens`: of all responses."""

    student: list[TokenSequence]
    teacher: list[TokenSequence]
    tokens: int


@dataclass(frozen=True)
class Scored:
    """Log-probs and entropies of every response token [N], on the CPU. s: after the prompt; t: after the teacher's."""

    s: Tensor
    t: Tensor
    teacher_entropy: Tensor

    @property
    def u(self) -> Tensor:
        return self.t - self.s


@dataclass(frozen=True)
class Drift:
    """One row's figures; see the module."""

    student: float
    teacher: float
    pmi: float
    pmi_q99: float
    teacher_median_entropy: float
    sign_flips: float


def formats(ends: Sequence[int]) -> Iterator[Format]:
    """The table's rows. `ends`: how many layers at either end stay in bfloat16, in the last ones."""
    yield Format("bf16")
    yield Format("current", precision=Precision("current", first_layers=0, last_layers=0))
    yield Format("blockwise", precision=Precision("blockwise", first_layers=0, last_layers=0))
    for n in ends:
        precision = Precision("blockwise", first_layers=n, last_layers=n)
        yield Format(f"blockwise, first and last {n} bf16", precision=precision)


def read_texts(path: Path, folder: Path) -> Texts:
    """The lines of `path` as sequences. Raises UserError for a file or a line that cannot be used, and without any
    response token."""
    tokenizer = load_tokenizer(folder)
    student, teacher, row = [], [], 0
    for line in read_rows(path):
        texts = line.value
        if texts is None or not all(isinstance(texts.get(key), str) for key in KEYS):
            raise UserError(f"{line.place}: " + (line.error or f"give the strings {', '.join(KEYS)}"))
        prompt, privileged, response = (tokenizer(texts[k], add_special_tokens=False).input_ids for k in KEYS)
        if not prompt or not privileged or not response:
            raise UserError(f"{line.place}: {', '.join(KEYS)} need a token each")
        student.append(TokenSequence.of(prompt, response, row))
        teacher.append(TokenSequence.of(privileged, response, row))
        row += len(response)
    if not row:
        raise UserError(f"{path} has no texts: give one object with {', '.join(KEYS)} a line")
    return Texts(student, teacher, row)


def scored(folder: Path, texts: Texts, process_groups: ProcessGroups, how: Format) -> Scored:
    """The texts under the model in one number format. Raises UserError where this machine cannot compute so."""
    port = ModelPort.build(
        read_config(folder), process_groups, Layout(), dtype=how.dtype, layers=how.layers, precision=how.precision
    )
    with FolderReader(folder) as tensors:
        port.load(tensors)
    packs = PackLayout(alignment=how.precision.alignment, device=port.device)

    def of(sequences: list[TokenSequence]) -> tuple[Tensor, Tensor]:
        found = score(
            port, process_groups, build_packs([sequences], 0, 1024, packs), texts.tokens, temperature=1.0, fp8=True
        )
        return found.logprobs.cpu(), found.entropy.cpu()

    (s, _), (t, entropy) = of(texts.student), of(texts.teacher)
    return Scored(s, t, entropy)


def drift(found: Scored, reference: Scored) -> Drift:
    pairs = ((found.s, reference.s), (found.t, reference.t), (found.u, reference.u))
    differences = [(a.double() - b.double()).abs() for a, b in pairs]
    flips, large = sign_flips(found.u, reference.u)
    return Drift(
        *(float(d.mean()) for d in differences),
        pmi_q99=float(differences[2].quantile(0.99)),
        teacher_median_entropy=lower_median(found.teacher_entropy),
        sign_flips=flips / max(large, 1),
    )


def _layers(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is no number of layers: give 0 or more")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--ends", type=_layers, nargs="*", default=[1, 3], help="bfloat16 layers at either end (1 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args(argv)
    try:
        report(arguments.folder, arguments.texts, arguments.ends, arguments.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(folder: Path, file: Path, ends: Sequence[int], json_file: Path | None) -> None:
    """Print the table. Raises UserError where no format could be measured, or the figures cannot be written."""
    device.prepare()
    process_groups = layout.init(Layout())
    texts = read_texts(file, folder)
    reference = scored(folder, texts, process_groups, Format("float32", torch.float32, "local"))
    median, size = lower_median(reference.teacher_entropy), float(reference.u.abs().mean())
    print(f"{texts.tokens} response tokens; in float32 mean |u| {size:.3f}, teacher's median entropy {median:.3f}\n")
    print("| | mean abs d(s) | d(t) | d(u) | q99 d(u) | teacher's median entropy | sign of u differs |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows: dict[str, dict[str, float]] = {}
    for how in formats(ends):
        try:
            d = drift(scored(folder, texts, process_groups, how), reference)
        except UserError as error:
            print(f"{how.name}: {error}", file=sys.stderr)
            continue
        rows[how.name] = asdict(d)
        figures = f"{d.student:.3f} | {d.teacher:.3f} | {d.pmi:.3f} | {d.pmi_q99:.2f} | {d.teacher_median_entropy:.3f}"
        print(f"| {how.name} | {figures} | {d.sign_flips:.1%} |", flush=True)
    if json_file is not None:
        content = {"tokens": texts.tokens, "mean_abs_u": size, "teacher_median_entropy": median, "rows": rows}
        with user_error(f"{json_file} cannot be written", "give --json another path"):
            write_json(json_file, content)
    layout.shutdown()
    if not rows:
        raise UserError("no format could be measured: the reasons are above")


if __name__ == "__main__":
    sys.exit(main())
