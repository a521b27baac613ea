"""The page of all tasks: `python -m asd_megatron.gym.page > docs/reasoning_gym_tasks.md`."""

from __future__ import annotations

import json
from typing import Any

from asd_megatron.gym.tasks import findings, parameters_of, registry, why_unusable

LONGEST = 40  # characters of a default that is shown in full

INTRO = """\
# The tasks of reasoning-gym

<!-- Written by `make docs` from the installed reasoning-gym and asd_megatron/gym/findings.json. -->

What `data.train: reasoning_gym:TASK` may name, with the parameters that `data.reasoning_gym` may set and their defaults
([how to use them](reasoning_gym.md)). Scores: `0 or 1`; `partial`: answers that are nearly right, or only in the right
form, score in between; `contains`: not judged by rules of its own, an answer that contains the right text scores the
fraction of its length that this text is. Notes: *slow*: an item takes more than 50 ms to make; *lines*: an answer has
several lines, so only `<answer>` tags or `\\boxed{}` can hold it; *no answer*: items come without one and the rules
alone judge, so `privileged.when_no_solution: reference_answer` has nothing to show.
"""


def render() -> str:
    """The page: a table of usable tasks, and those that cannot be used with the reason."""
    found = findings()
    usable = [task for task in sorted(registry(), key=lambda t: (category(t), t)) if not why_unusable(task)]
    rows = ["| task | category | scores | notes | parameters |", "|---|---|---|---|---|"]
    for task in usable:
        about = found.get(task, {})
        notes = ", ".join(n for n in ("slow", "lines", "no answer") if about.get(n.replace(" ", "_")))
        rows.append(f"| `{task}` | {category(task)} | {about.get('scores', '?')} | {notes} | {_parameters(task)} |")
    refused = ["| task | why not |", "|---|---|"]
    refused += [f"| `{task}` | {why_unusable(task)} |" for task in sorted(registry()) if why_unusable(task)]
    return "\n".join([INTRO, *rows, "\n## Refused\n", *refused, ""])


def category(task: str) -> str:
    """The folder of reasoning-gym that a task is in, as `algebra`."""
    parts = registry()[task][0].__module__.split(".")
    return parts[1] if len(parts) > 2 else "several tasks"


def _parameters(task: str) -> str:
    return ", ".join(f"`{name}: {_default(value)}`" for name, value in parameters_of(task).items()).replace("|", "\\|")


def _default(value: Any) -> str:
    text = json.dumps(value)
    if len(text) <= LONGEST:
        return text
    return f"[{len(value)} values]" if isinstance(value, list) else f"{text[:LONGEST]}..."


if __name__ == "__main__":
    print(render(), end="")
