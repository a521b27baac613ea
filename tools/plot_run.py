"""Plot a run: RUN/metrics.jsonl to RUN/curves.png, finished or not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from asd_megatron.config import load_recipe
from asd_megatron.errors import UserError
from asd_megatron.observe.plots import plot_run


def _label(folder: Path) -> str:
    """The condition of a run, as its recipe has it."""
    if (folder / "recipe.yaml").is_file():
        return load_recipe(folder / "recipe.yaml").algorithm.name
    return folder.resolve().name


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--beside", metavar="RUN", help="another run's folder, drawn in the same panels")
    parser.add_argument("--output", metavar="PNG", help="where to write the picture (default: RUN/curves.png)")
    arguments = parser.parse_args(argv)
    try:
        beside = None if arguments.beside is None else (_label(Path(arguments.beside)), arguments.beside)
        print(plot_run(arguments.run, arguments.output, beside=beside))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
