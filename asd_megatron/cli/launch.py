"""Check a recipe, then start a program on local ranks, as `torchrun --standalone` would.

The launcher imports torch but creates no CUDA context, which would hold memory of GPU 0 during the run. What needs a
device is checked in the ranks.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from asd_megatron.cli.console import flush_output
from asd_megatron.cli.guard import INTERRUPTED, importing
from asd_megatron.cli.placement import Placement, place, placement_text
from asd_megatron.config import AnyRecipe, Kind, check_devices, check_model, load_recipe, render_help
from asd_megatron.config.overrides import check_flag
from asd_megatron.distributed.launch import set_defaults, torchrun_options
from asd_megatron.distributed.launcher import COMMAND, LAUNCHER, end_with_launcher
from asd_megatron.distributed.stop_signals import SIGNALS, forwarded, ranks_of
from asd_megatron.errors import UserError
from asd_megatron.files import utc_now

DRY_RUN = "--dry-run"
# Counts of a job's processes, by launcher: Kubeflow, Open MPI, MPICH's Hydra and Intel MPI, MVAPICH2, jsrun, Flux
COUNTS = (
    "PET_NNODES",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "JSM_NAMESPACE_SIZE",
    "FLUX_JOB_SIZE",
)


def launch_recipe(kind: Kind, module: str, argv: Sequence[str]) -> int:
    """Check the recipe of `RECIPE [--dry-run] [--section.key value ...]`, then run `python -m MODULE` on its ranks.

    Returns the exit status of the first rank that failed, 128 + n after signal n, else 0. Raises UserError for what
    the recipe gets wrong and when another launcher has started this process.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        _parser(kind, module).print_help()
        return 0
    words = [argument for argument in argv if argument != DRY_RUN]
    if words and words[0].startswith("-"):
        check_flag(words[0])
    if not words or words[0].startswith("-"):
        raise UserError(
            f"asd-megatron {kind} takes a recipe first: asd-megatron {kind} RECIPE [MORE.yaml ...]"
            " [--section.key value ...]"
        )
    refuse_other_launchers(kind, module, os.environ)
    end_with_launcher(os.environ)
    recipe = load_recipe(words[0], words[1:], kind)
    print(f"asd-megatron {kind} {words[0]}: importing PyTorch and Megatron-Core takes some seconds", flush=True)
    command = shlex.join(["asd-megatron", kind, *words])
    if DRY_RUN in argv:
        with importing("interrupted: nothing was started"):
            placement = checked_placement(recipe)
            from asd_megatron.run.dry_run import dry_run
        return dry_run(recipe, placement.ranks, placement_text(recipe, placement))
    with importing(f"interrupted before the run began: nothing is lost; to start it: {command}"):
        placement = checked_placement(recipe)
    print(placement_text(recipe, placement), flush=True)
    with environment_of_ranks():
        placement.apply(os.environ)
        set_defaults(placement.ranks, os.environ)
        os.environ[COMMAND] = command
        return _run_and_tell(recipe, module, words, placement.ranks, command)


@contextmanager
def environment_of_ranks() -> Iterator[None]:
    """What is set inside is for the ranks alone: afterwards the environment is as it was, for whoever calls next."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def checked_placement(recipe: AnyRecipe) -> Placement:
    """Where the ranks run. Raises UserError for a machine and a model that the recipe does not fit."""
    gpus = _gpus()
    check_devices(recipe, cuda=gpus > 0, transformer_engine=importlib.util.find_spec("transformer_engine") is not None)
    check_model_folder(recipe)
    return place(recipe, gpus, os.environ)


def _run_and_tell(recipe: AnyRecipe, module: str, words: Sequence[str], ranks: int, command: str) -> int:
    """`run_ranks`; if a signal has ended this process or a rank, say what was kept."""
    since = utc_now()
    try:
        status = run_ranks(module, words, ranks)
    except KeyboardInterrupt:
        status = INTERRUPTED
    if status > 128:
        from asd_megatron.run.interruption import ended_text  # not before a single rank replaces this process

        how = "interrupted" if status - 128 in SIGNALS else "ended"
        print(ended_text(how, recipe, command, since), file=sys.stderr, flush=True)
    return status


def _parser(kind: Kind, module: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"asd-megatron {kind}",
        usage=f"asd-megatron {kind} RECIPE [MORE.yaml ...] [{DRY_RUN}] [--section.key value ...]",
        description=(
            "Run a recipe on this machine: on all GPUs that the layout can use and no SGLang server has, or with as "
            "many ranks as the layout needs on the CPU. The ranks end when this command does. On several machines: "
            f"torchrun ... -m {module} RECIPE [--section.key value ...]. LOGLEVEL=INFO in the environment shows "
            "torchrun's own messages and the traceback of every rank that fails."
        ),
        epilog="keys, with type and [default]:\n\n" + render_help(kind),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file (docs/recipes.md); keys of further ones replace its keys"
    )
    parser.add_argument(
        DRY_RUN, action="store_true", help="check recipe, data, reward and model, show what would run, start nothing"
    )
    return parser


def _gpus() -> int:
    from asd_megatron.distributed import machine  # torch: not for --help

    return machine.gpus()


def check_model_folder(recipe: AnyRecipe) -> None:
    """Raise UserError for a model that is not supported, or that the recipe's layout does not divide."""
    from asd_megatron.checkpoint.huggingface import read_config  # torch and more: not for --help
    from asd_megatron.models.families import shape_of
    from asd_megatron.run.sources import model_folder

    config = read_config(model_folder(recipe.model.path))
    shape_of(config)
    check_model(recipe, config)


def refuse_other_launchers(kind: str, module: str, environment: Mapping[str, str]) -> None:
    """Raise UserError when another launcher has started this process as one of several: each of them would train a
    model of its own."""
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
        raise UserError(
            f"asd-megatron {kind} starts the ranks itself and was started by torchrun: start `torchrun ... -m {module}"
            f" RECIPE`, or `asd-megatron {kind} RECIPE` without torchrun"
        )
    for name, unset in _counts_of_processes(environment).items():
        most = environment.get(name, "1").rpartition(":")[2].strip()  # PET_NNODES may be a range, 1:4
        if most.isdigit() and int(most) > 1:
            raise UserError(
                f"{name} is {environment[name].strip()}: this is one of several processes of a job (Kubeflow, Slurm,"
                f" MPI), and asd-megatron {kind} starts ranks on one machine alone: start `torchrun -m {module} RECIPE`"
                " once on each machine (with its options or PET_* variables; under Slurm with srun"
                f" --ntasks-per-node=1), or unset {unset} to train on this machine"
            )


def _counts_of_processes(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that count the processes of a job that this one is part of, each with the one to unset. A Slurm
    batch script or `salloc` shell, which is process 0 or none, counts by the tasks of its step, not of its job."""
    counts = {name: name for name in COUNTS}
    if environment.keys() & {"RANK", "LOCAL_RANK"}:
        counts["WORLD_SIZE"] = "WORLD_SIZE"
    process = environment.get("SLURM_PROCID", "").strip()
    if "SLURM_STEP_NUM_TASKS" in environment and process:
        counts["SLURM_STEP_NUM_TASKS"] = "SLURM_PROCID"
    elif process not in ("", "0"):
        counts["SLURM_NTASKS"] = "SLURM_PROCID"
    return counts


def run_ranks(module: str, argv: Sequence[str], ranks: int) -> int:
    """Run `python -m MODULE ARGV` as local ranks under torch's elastic launcher. They end when this process dies.

    Signals that ask for a stop are passed on to the ranks, and this process waits for them.
    """
    if ranks == 1:
        _become_single_rank(module, argv)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ[LAUNCHER] = str(os.getpid())
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed") and not os.environ.get("LOGLEVEL"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # its table of a failed rank: the rank has reported
    arguments = parse_args([*torchrun_options(ranks), "-m", module, *argv])
    # older and newer torch
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = arguments.signals_to_handle = "SIGQUIT"

    def unheard(number: int) -> None:  # torch ends what it has started
        raise SignalException("no rank runs yet", sigval=signal.Signals(number))

    try:
        with forwarded(lambda: ranks_of(os.getpid()), unheard=unheard):
            run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        if status < 0:
            print(f"error: rank {rank} {_how_it_ended(-status)}", file=sys.stderr)
            return 128 - status
        return status or 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _how_it_ended(number: int) -> str:
    """How a process ended that signal `number` has ended."""
    name = signal.Signals(number).name if number in {s.value for s in signal.Signals} else f"signal {number}"
    if number == signal.SIGKILL:
        return f"was killed by {name} (by the system when its memory ran out, or by hand)"
    if number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL):
        return f"crashed ({name}): its Python stacks are in its log, logs/rank_N.log in the run folder"
    return f"was ended by {name}"


def _become_single_rank(module: str, argv: Sequence[str]) -> None:
    """Replace this process by the program as rank 0 of 1, with torchrun's variables. Does not return."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    flush_output()
    os.execve(sys.executable, [sys.executable, "-m", module, *argv], environment)
