"""Plot a run: RUN/metrics.jsonl to RUN/curves.png, finished or not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from asd_megatron.errors import UserError
from asd_megatron.observe.plots import plot_run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--beside", metavar="RUN", help="another run's folder, drawn in the same panels")
    parser.add_argument("--output", metavar="PNG", help="where to write the picture (default: RUN/curves.png)")
    arguments = parser.parse_args(argv)
    try:
        print(plot_run(arguments.run, arguments.output, beside=arguments.beside))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
