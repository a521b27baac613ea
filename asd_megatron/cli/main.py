"""The console command `asd-megatron`: a table of verbs, each imported when it is called."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence

from asd_megatron import __version__
from asd_megatron.cli.guard import guarded
from asd_megatron.errors import UserError, did_you_mean

# verb -> (module with `main(argv) -> int`, what `--help` says). A verb's arguments are its module's own.
VERBS: dict[str, tuple[str, str]] = {
    "train": ("asd_megatron.cli.train", "train a model with AntiSD from a recipe"),
    "sft": ("asd_megatron.cli.sft", "supervised training on given responses, from a recipe"),
    "evaluate": ("asd_megatron.cli.evaluate", "answer sets of problems with models or runs, and compare them"),
    "launch": ("asd_megatron.cli.slurm", "print or submit the Slurm script of a run on one node or many"),
    "stop": ("asd_megatron.cli.stop", "ask a run to save its state and end"),
    "data": ("asd_megatron.cli.data", "what is read from a file of problems, and the prompts of one"),
    "serve": ("asd_megatron.cli.serve", "start SGLang servers of a model and keep them running"),
    "quickstart": ("asd_megatron.cli.quickstart", "train the built-in puzzle and print what changed"),
    "study": ("asd_megatron.cli.study", "run many recipes and seeds, resumable, and compare them in one table"),
    "plan": ("asd_megatron.cli.plan", "memory, time and layouts of a recipe on GPUs that are not here"),
    "convert": ("asd_megatron.cli.convert", "checkpoints to Hugging Face folders and back; inspect and verify them"),
    "checkpoint": ("asd_megatron.cli.checkpoint", "list, inspect and verify the checkpoints of a run"),
    "drill": ("asd_megatron.cli.drill", "break small runs in many ways and check that nothing is lost"),
    "sandbox": ("asd_megatron.cli.sandbox", "check the sandbox of programs that the model writes, on this machine"),
    "parity": ("asd_megatron.cli.parity", "check that an update is the same in every parallel layout"),
    "models-table": ("asd_megatron.cli.models_table", "compare every model family, in every layout, with transformers"),
    "recipes": ("asd_megatron.cli.recipes", "print, write or check the reference of every recipe key"),
}
EMPTY = re.compile(r"--[a-z-]+=--")  # argparse takes the -- away and fails on the empty rest


def usage() -> str:
    """What `asd-megatron --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {about}" for verb, (_, about) in VERBS.items())
    return (
        f"usage: asd-megatron VERB ...\n\nasd_megatron {__version__}: AntiSD on Megatron-Core\n\n{verbs}\n\n"
        "`asd-megatron VERB --help` says more about each."
    )


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"asd_megatron {__version__}")
        return 0
    verb = argv[0]
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS) or f"choose one of {', '.join(VERBS)}"
        raise UserError(f"no verb {verb!r}: {hint}")
    for argument in argv[1:]:
        if EMPTY.fullmatch(argument):
            raise UserError(f"{argument!r}: write a value after the equals sign")
    module = importlib.import_module(VERBS[verb][0])
    return int(module.main(list(argv[1:])) or 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0, a verb's own, or 2 for an error that the user can fix."""
    arguments = sys.argv[1:] if argv is None else argv
    return guarded(lambda: _dispatch(arguments))


if __name__ == "__main__":
    sys.exit(main())
