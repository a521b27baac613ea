"""A container's health check: exit status 0 if all that is named is well, 1 and a line that says why otherwise.

healthy.py URL ...: every URL answers with a status below 400.
healthy.py --changed-within SECONDS FOLDER: a file directly in FOLDER has changed. A run writes metrics each step.
"""

from __future__ import annotations

import argparse
import sys
import time
import urllib.request
from pathlib import Path

ANSWER_SECONDS = 12.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # servers of this machine, whatever http_proxy is


def unanswered(url: str) -> str | None:
    """Why `url` does not count as healthy; None if it does."""
    try:
        with DIRECT.open(url, timeout=ANSWER_SECONDS):
            return None
    except OSError as error:  # a status of 400 or more, too
        return f"{url}: {error}"


def unchanged(folder: Path, seconds: float) -> str | None:
    """Why `folder` is not written to; None if it is."""
    times = [file.stat().st_mtime for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    if not times:
        return f"{folder} has no files"
    age = time.time() - max(times)
    return None if age <= seconds else f"nothing in {folder} has changed for {age:.0f} seconds"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--changed-within", type=float, metavar="SECONDS")
    parser.add_argument("targets", nargs="+", metavar="URL or FOLDER")
    given = parser.parse_args(argv)
    if given.changed_within is None:
        wrong = [unanswered(url) for url in given.targets]
    else:
        wrong = [unchanged(Path(folder), given.changed_within) for folder in given.targets]
    lines = [line for line in wrong if line]
    print("\n".join(lines) or "healthy")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
