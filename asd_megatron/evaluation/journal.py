"""FOLDER/journal-SET.jsonl: the problems of a set that are answered and scored, so that an evaluation that was ended in
the middle continues with the others.

    {"format": 1, "identity": {...}}                             what the samples depend on
    {"problem": 17, "id": "p17", "samples": [["The answer is 4.", 6, "stop", 1.0, "4"], ...]}
    {"problem": 3, "id": "p3", "samples": [...], "failures": {"timeouts": 1}}

A line is written when its problem is complete. A last line that a kill has torn is cut off.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import IO, Any

from asd_megatron.errors import UserError
from asd_megatron.evaluation.outcomes import Sample
from asd_megatron.files import remedy, system_reason, to_json

FORMAT = 1
MOST_SHOWN = 60  # characters of a value in a refusal


class Journal:
    """The journal of one set, in the file `path`. `done`: the samples of each complete problem, by its place in the
    set; `failures`: the verifier's counts while they were scored.

    Raises UserError for a file that cannot be read or written, and for one whose samples were made by other weights or
    settings than `identity` says.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[int, tuple[Sample, ...]] = {}
        self.failures: Counter[str] = Counter()
        self._file: IO[bytes] | None = None
        try:
            lines = _complete_lines(path)
            if lines:
                check_identity(path, lines[0].get("identity"), identity)
            for line in lines[1:]:
                self.done[line["problem"]] = tuple(Sample(*values) for values in line["samples"])
                self.failures.update(line.get("failures", {}))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            if not lines:
                self._write(to_json({"format": FORMAT, "identity": identity}) + "\n")
        except OSError as error:
            raise self._refused(error) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it to evaluate the set from its beginning") from error

    def add(
        self, problems: Sequence[tuple[int, str, Sequence[Sample]]], failures: Mapping[str, int] | None = None
    ) -> None:
        """Record complete problems (place, id, samples), and what the verifier has counted since the last call, in one
        write, flushed to the disk."""
        new = {kind: count for kind, count in (failures or {}).items() if count}
        text = ""
        for number, (place, name, samples) in enumerate(problems):
            line: dict[str, Any] = {"problem": place, "id": name, "samples": [list(astuple(s)) for s in samples]}
            text += to_json(line | ({"failures": new} if new and number == 0 else {})) + "\n"
            self.done[place] = tuple(samples)
        self.failures.update(new if problems else {})
        try:
            self._write(text)
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what a full disk has refused is refused again
                file.close()

    def remove(self) -> None:
        """Close and remove the file: its content is in the results."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _write(self, text: str) -> None:
        assert self._file is not None
        self._file.write(text.encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _refused(self, error: OSError) -> UserError:
        return UserError(
            f"{self.path} cannot be written ({system_reason(error)}): {remedy(error)}, then start the same command"
            " again: what is answered is kept"
        )


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the file, which is cut after the last complete one; [] without a file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return [json.loads(line) for line in data[:end].split(b"\n")[:-1]]  # a text may hold other ends of lines


def check_identity(path: Path, recorded: object, identity: Mapping[str, Any]) -> None:
    """Raise UserError when the samples in `path` were made by other weights or settings than `identity`."""
    now = json.loads(to_json(identity))
    before = recorded if isinstance(recorded, dict) else {}
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        what = "; ".join(f"{key}: {_short(before.get(key))} -> {_short(now[key])}" for key in changed)
        raise UserError(
            f"{path} holds samples of other weights or settings ({what}): set them back, give another --out folder, or"
            " --overwrite to evaluate from the beginning"
        )


def _short(value: object) -> str:
    text = to_json(value)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."
