"""The exception type for errors that the user can fix, and words for messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave is wrong: a recipe, a file, a model folder, a layout, a reward.

    The message states the cause and the next action, and stands alone: the command line prints it as `error: MESSAGE`,
    without a traceback, and exits with status 2. Modules may subclass it to be caught more narrowly; a bug of ours is
    never a `UserError`.
    """


class NotFinite(UserError):
    """Training met a number that is not finite and cannot continue. Its weights are not worth saving."""


class ReplicasDiffer(UserError):
    """Ranks that must hold equal copies of a tensor hold different bits. The state is not worth saving."""


class LearnsNothing(UserError):
    """The model cannot learn any more: its gradient is 0 whatever it is trained on."""


def hub_hint(path: object, options: str = "") -> str:
    """` (...)` with the command that downloads it, for a missing path that reads like a Hugging Face hub id, such as
    Qwen/Qwen3-8B; empty for other paths. `options`: of the command."""
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(path)):
        return ""
    command = f"hf download {path}{options} --local-dir FOLDER"
    return f" (nothing is downloaded: if {path} is a hub id, run `{command}` and give what it wrote)"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`did you mean 'antisd'?` for the one of `names` that is most like `name`; empty if none is."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def plural(n: int, one: str) -> str:
    """`1 cell`, `2 cells`."""
    return f"{n} {one}{'' if n == 1 else 's'}"
