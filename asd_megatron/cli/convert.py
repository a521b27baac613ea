"""`asd-megatron convert hf-to-megatron | megatron-to-hf | inspect | verify`: without GPUs, in one process."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asd_megatron.cli.guard import FAILED, importing
from asd_megatron.errors import UserError

if TYPE_CHECKING:
    import torch

    from asd_megatron.checkpoint.locate import Found

CHECKPOINT = "a checkpoint (RUN/checkpoints/step_NNNNNN, Megatron-LM's iter_NNNNNNN), or a folder with several: newest"
LINE_SECONDS = 5.0
SHOWN = 8  # differing tensors
_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str]) -> int:
    """Run one of the four tools; `verify` returns 1 when the logits differ by more than the tolerance."""
    arguments = _parser().parse_args(argv)
    with importing("interrupted"):
        import torch  # noqa: F401 - it and what follows take seconds to import
    return int(arguments.run(arguments) or 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asd-megatron convert",
        description="Convert, inspect and compare model weights: Hugging Face folders and Megatron's torch_dist "
        "checkpoints of any parallel layout. Runs in one process without GPUs and without building the model; memory "
        "is that of the largest tensor. What it writes is complete or absent.",
    )
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")

    def tool(name: str, run: Callable[[Any], Any], about: str, more: str, example: str) -> argparse.ArgumentParser:
        found = tools.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}. {more}",
            epilog=f"example: asd-megatron convert {name} {example}",
        )
        found.set_defaults(run=run)
        return found

    out = tool(
        "megatron-to-hf",
        _megatron_to_hf,
        "write a checkpoint's weights as a Hugging Face folder",
        "Reads training checkpoints of asd_megatron, and of Megatron-LM (--ckpt-format torch_dist, GPT models) whose "
        "tensors are exactly those of --model.",
        "runs/a/checkpoints/step_000060 out --model models/Qwen3-0.6B",
    )
    out.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=CHECKPOINT)
    out.add_argument("out", type=Path, metavar="OUT", help="the folder to write; must not exist")
    out.add_argument(
        "--model",
        type=Path,
        metavar="FOLDER",
        help="the Hugging Face folder with the model's config, tokenizer and chat template, which OUT gets (default: "
        "model.path of the run's recipe)",
    )
    out.add_argument(
        "--weights",
        choices=("live", "initial", "ema"),
        default="live",
        help="the trained weights, or a copy that the checkpoint stores: those before training, their moving average",
    )
    _add_dtype(out, "that of the checkpoint's live weights")
    out.add_argument("--shard-gb", type=float, default=4.0, metavar="GB", help="largest file of weights (default: 4)")

    back = tool(
        "hf-to-megatron",
        _hf_to_megatron,
        "write a Hugging Face folder's weights as a Megatron checkpoint",
        "OUT is a folder for Megatron-LM's --load: OUT/release in torch_dist format with the weights alone (no "
        "optimizer), which any layout reads, and OUT/latest_checkpointed_iteration.txt. Layers of Transformer Engine "
        "ask for extra states, which it does not have: add --dist-ckpt-strictness log_unexpected.",
        "models/Qwen3-0.6B out",
    )
    back.add_argument("folder", type=Path, metavar="HF_FOLDER", help="a model folder: config.json and safetensors")
    back.add_argument("out", type=Path, metavar="OUT", help="the folder to write; must not exist")
    _add_dtype(back, "that of the folder's tensors")

    look = tool(
        "inspect",
        _inspect,
        "print what a checkpoint or a model folder holds",
        "Step, who wrote it, layout, precision, and every tensor with its shape, bytes and cuts. Reads descriptions "
        "alone, and runs nothing that they contain.",
        "runs/a/checkpoints/step_000060 --json found.json",
    )
    look.add_argument("path", type=Path, metavar="PATH", help=f"{CHECKPOINT}, or a Hugging Face folder")
    look.add_argument("--json", type=Path, metavar="FILE", help="write the same to FILE")

    check = tool(
        "verify",
        _verify,
        "compare two sides of a conversion: tensors, then logits",
        "Every tensor of both is compared, then the logits of fixed prompts: A as our Megatron model, B as "
        "transformers runs it, both in float32. Exits with 1 when a logit differs by more than the tolerance.",
        "runs/a/checkpoints/step_000060 out",
    )
    check.add_argument("a", type=Path, metavar="A", help=f"{CHECKPOINT}, or a Hugging Face folder")
    check.add_argument("b", type=Path, metavar="B", help="a Hugging Face folder")
    check.add_argument("--weights", choices=("live", "initial", "ema"), default="live", help="which of a checkpoint")
    check.add_argument("--prompts", type=int, default=4, metavar="N", help="number of prompts (default: 4; 0: none)")
    check.add_argument(
        "--tolerance", type=float, default=1e-4, metavar="X", help="largest difference of a logit (default: 1e-4)"
    )
    return parser


def _add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--dtype", choices=_DTYPES, help=f"type of the written weights (default: {default})")


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)


def _megatron_to_hf(arguments: Any) -> None:
    from asd_megatron.checkpoint.conversion import megatron_to_hf
    from asd_megatron.checkpoint.distcp import DistributedCheckpoint
    from asd_megatron.checkpoint.locate import find_checkpoint

    if not (math.isfinite(arguments.shard_gb) and arguments.shard_gb > 0):
        raise UserError(f"--shard-gb is {arguments.shard_gb:g}: give a number of gigabytes above 0")
    _refuse_existing(arguments.out)
    folder = find_checkpoint(arguments.checkpoint)
    with ByteProgress() as progress:
        megatron_to_hf(
            DistributedCheckpoint(folder),
            arguments.model or _model_of(folder),
            arguments.out,
            weights=arguments.weights,
            dtype=_dtype(arguments.dtype),
            max_shard_bytes=int(arguments.shard_gb * 1e9),
            progress=progress,
        )
    print(f"{arguments.out}: {progress.summary()}")


def _hf_to_megatron(arguments: Any) -> None:
    from asd_megatron.checkpoint.conversion import hf_to_megatron

    _refuse_existing(arguments.out)
    with ByteProgress() as progress:
        hf_to_megatron(arguments.folder, arguments.out, dtype=_dtype(arguments.dtype), progress=progress)
    print(f"{arguments.out}: {progress.summary()}")


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists already: remove it or choose another folder")


def _model_of(checkpoint: Path) -> Path:
    """`model.path` of the recipe of a checkpoint's run. Raises UserError where there is none, or no such folder."""
    from asd_megatron.config.yaml_text import read_yaml
    from asd_megatron.run.folder import RECIPE_FILE
    from asd_megatron.run.sources import model_folder

    run = checkpoint.resolve().parents[1]
    try:
        named = str(read_yaml(run / RECIPE_FILE, "recipe")["model"]["path"])
    except (UserError, OSError, KeyError, TypeError):
        raise UserError(
            f"{checkpoint} does not say which model it is of: give the Hugging Face folder with --model"
        ) from None
    folder = model_folder(named)
    if not folder.is_dir():
        raise UserError(
            f"{run / RECIPE_FILE} names the model {named}, which is no folder (from {Path.cwd()}): give it with --model"
        )
    return folder


def _inspect(arguments: Any) -> None:
    from asd_megatron.checkpoint.inspection import inspect
    from asd_megatron.checkpoint.locate import find
    from asd_megatron.files import user_error, write_json

    report = inspect(find(arguments.path))
    print(report.text())
    if arguments.json is not None:
        with user_error(f"{arguments.json} cannot be written", "choose another --json"):
            write_json(arguments.json, report.as_json())


def _verify(arguments: Any) -> int:
    from asd_megatron.checkpoint.huggingface import read_config
    from asd_megatron.checkpoint.locate import find
    from asd_megatron.checks.conversion import compare_tensors, reading

    if arguments.prompts < 0 or not arguments.tolerance >= 0:
        raise UserError("--prompts and --tolerance must not be negative")
    a, b = find(arguments.a), find(arguments.b)
    if b.kind != "huggingface":
        raise UserError(f"{arguments.b} is a checkpoint: B is the Hugging Face folder, give the checkpoint as A")
    config = read_config(b.folder)
    with reading(a, config, arguments.weights) as one, reading(b, config, "live") as other:
        tensors = compare_tensors(one, other, config)
    differing = list(tensors.differing.items())
    print(f"tensors: {tensors.tensors - len(differing)} of {tensors.tensors} equal")
    for name, difference in differing[:SHOWN]:
        print(f"  {name} differs by up to {difference:.3g}")
    if len(differing) > SHOWN:
        print(f"  and {len(differing) - SHOWN} more by less")
    return _verify_logits(arguments, a, b.folder) if arguments.prompts else (FAILED if differing else 0)


def _verify_logits(arguments: Any, a: Found, folder: Path) -> int:
    from asd_megatron.checks.conversion import compare_logits

    worst = 0.0
    for number, (tokens, difference) in enumerate(
        compare_logits(a, folder, arguments.prompts, arguments.weights), start=1
    ):
        print(f"prompt {number} ({tokens} tokens): largest difference of a logit {difference:.3g}")
        worst = difference if math.isnan(difference) else max(worst, difference)
    passed = worst <= arguments.tolerance
    print(f"{'passed' if passed else 'FAILED'}: {worst:.3g}, tolerance {arguments.tolerance:g}")
    return 0 if passed else FAILED


class ByteProgress:
    """Bytes written: a tqdm bar on a terminal, else a line every LINE_SECONDS. Called with (bytes done, all bytes)."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._done = 0
        self._started = time.monotonic()
        self._last: float | None = None  # line, or the first call

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr)
        now = time.monotonic()
        self._last = now if self._last is None else self._last
        if self._bar is not None:
            self._bar.update(done - self._done)
        elif now - self._last >= LINE_SECONDS:
            self._last = now
            print(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)
        self._done = done

    def summary(self) -> str:
        """`1.19 GB in 2.3 s (0.52 GB/s)`."""
        seconds = time.monotonic() - self._started
        return f"{self._done / 1e9:.2f} GB in {seconds:.1f} s ({self._done / 1e9 / max(seconds, 1e-9):.2f} GB/s)"

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
