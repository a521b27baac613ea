"""Print the tokens with the lowest and the highest mean u of a run's rollout dumps (run.dump_rollouts: true)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asd_megatron.config import load_recipe
from asd_megatron.errors import UserError
from asd_megatron.observe.dumps import read_dump
from asd_megatron.observe.pmi_report import dumps_pmi, pmi_report
from asd_megatron.run.sources import model_folder


def _dumps(names: Sequence[str]) -> list[Path]:
    """The dumps named: files as they are, a run's or a dump folder as all its Parquet files."""
    found: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            inside = sorted((path / "rollouts").glob("step_*.parquet")) or sorted(path.glob("step_*.parquet"))
            if not inside:
                raise UserError(f"{path} holds no rollout dumps: train with `run.dump_rollouts: true`")
            found += inside
        else:
            found.append(path)
    return found


def _tokenizer(names: Sequence[str]) -> Path:
    """The model folder of the first run named, as its recipe has it."""
    for path in map(Path, names):
        if (path / "recipe.yaml").is_file():
            return model_folder(load_recipe(path / "recipe.yaml").model.path)
    raise UserError("no run folder with a recipe.yaml is named: give the model's folder with --tokenizer")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dumps", nargs="+", help="dump files, or a run's folder for all of its steps")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="Hugging Face folder (default: the model of RUN/recipe.yaml)"
    )
    parser.add_argument("--min-count", type=int, default=5, help="leave out tokens seen less often (default: 5)")
    parser.add_argument("--top", type=int, default=15, help="rows of each table (default: 15)")
    arguments = parser.parse_args(argv)
    try:
        dumps = _dumps(arguments.dumps)
        for path in dumps:
            if path.name.startswith("bad_step_"):
                info = read_dump(path).info
                print(f"{path.name}: step {info.step} was kept because of its numbers: {info.reason}")
        ids, pmi = dumps_pmi(dumps)
        folder = Path(arguments.tokenizer) if arguments.tokenizer else _tokenizer(arguments.dumps)
        if not folder.is_dir():
            raise UserError(
                f"the tokenizer folder {folder} does not exist (from {Path.cwd()}): give it with --tokenizer"
            )
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        print(pmi_report(ids, pmi, tokenizer, min_count=arguments.min_count, top=arguments.top), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
