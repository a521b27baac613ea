"""Output that cannot be written decides nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest

from asd_megatron.cli.guard import guarded
from asd_megatron.cli.main import main
from asd_megatron.observe.progress import Progress
from tests.e2e.world import make_world

ROOT = Path(__file__).parents[2]


@contextmanager
def closed_pipe() -> Iterator[TextIO]:
    """A stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream:
        yield stream


@contextmanager
def full_disk() -> Iterator[TextIO]:
    with open("/dev/full", "w", buffering=1) as stream:
        yield stream


class Terminal:
    """What tqdm draws a bar on, with another stream's errors."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def isatty(self) -> bool:
        return True

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


@pytest.mark.parametrize("kind", [closed_pipe, full_disk])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_program_that_prints_reaches_its_end(monkeypatch: pytest.MonkeyPatch, kind: object, terminal: bool) -> None:
    import logging

    with kind() as broken:  # type: ignore[operator]
        stream = Terminal(broken) if terminal else broken
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        reached = []

        def program() -> int:
            print("report" * 10_000, flush=True)
            handler = logging.StreamHandler()
            logging.getLogger("test_console").addHandler(handler)
            logging.getLogger("test_console").warning("warning")
            with Progress(3, every_seconds=0.0) as progress:
                for step in range(1, 4):
                    progress.update(step, {"reward/mean": 0.5})
                    progress.note("evaluation")
                    reached.append(step)
            return 0

        assert guarded(program) == 0
        assert reached == [1, 2, 3]
        assert sys.stdout is stream  # restored


def test_a_pipe_that_breaks_inside_a_program_is_an_error() -> None:
    def program() -> int:
        raise BrokenPipeError("a server's socket")

    with pytest.raises(BrokenPipeError):
        guarded(program)


def test_characters_that_the_encoding_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert guarded(lambda: print("\u03bb \ud800") or 0) == 0  # type: ignore[func-returns-value]
    assert (tmp_path / "out").read_text() == "\\u03bb \\ud800\n"


def test_help_into_a_closed_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    with closed_pipe() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["--help"]) == 0


@pytest.mark.timeout(300)
def test_training_continues_without_a_reader(tmp_path: Path) -> None:
    """`asd-megatron train ... | head -1`."""
    world = make_world(tmp_path)
    recipe = world.recipe(logging={"progress": True}, checkpoint={"export_at_end": True})
    command = f"{sys.executable} -m asd_megatron.cli.main train {recipe} --run.name piped 2>&1 | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, timeout=280)
    folder = world.run_folder("piped")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert (folder / "summary.json").is_file() and (folder / "hf" / "step_000002").is_dir()


@pytest.mark.parametrize("redirections", [">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>&1", ">/dev/full 2>&-"])
def test_standard_streams_that_cannot_be_written_from_the_start(tmp_path: Path, redirections: str) -> None:
    """A file that is opened later does not become standard output, and the exit status is the program's."""
    code = (
        "import sys; from asd_megatron.cli.guard import guarded\n"
        "def program(): print('x' * 100_000); print('x', file=sys.stderr); return open('later').fileno()\n"
        "sys.exit(guarded(program))"
    )
    (tmp_path / "later").touch()
    command = f'{sys.executable} -c "$CODE" {redirections}'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CODE": code}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, timeout=60)
    assert 3 <= done.returncode < 100
