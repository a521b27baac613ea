"""Start a program on as many local ranks as a recipe's layout needs, as `torchrun --standalone` would."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence

from asd_megatron.config import AnyRecipe, Kind, check_devices, check_model, check_world, load_recipe, render_help
from asd_megatron.distributed.launch import set_defaults
from asd_megatron.errors import UserError


def launch_recipe(kind: Kind, module: str, argv: Sequence[str]) -> int:
    """Check the recipe of `RECIPE [--section.key value ...]`, then run `python -m MODULE ARGV` on its ranks.

    Returns the exit status of the first rank that failed, 128 + n after signal n, else 0. Raises UserError for what
    the recipe gets wrong and when called under torchrun already.
    """
    parser = argparse.ArgumentParser(
        prog=f"asd-megatron {kind}",
        usage=f"asd-megatron {kind} RECIPE [--section.key value ...]",
        description=(
            "Run a recipe on this machine, with as many ranks as its layout needs. On several machines: torchrun "
            f"... -m {module} RECIPE [--section.key value ...]"
        ),
        epilog="keys, with type and [default]:\n\n" + render_help(kind),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file (docs/recipes.md)")
    if any(argument in ("-h", "--help") for argument in argv):
        parser.print_help()
        return 0
    if not argv or argv[0].startswith("-"):
        raise UserError(
            f"asd-megatron {kind} takes a recipe first: asd-megatron {kind} RECIPE [--section.key value ...]"
        )
    refuse_torchrun(kind, module, os.environ)
    recipe = load_recipe(argv[0], argv[1:], kind)
    ranks = recipe.parallelism.ranks
    check_world(recipe, ranks)
    check_devices(recipe)
    _check_model(recipe)
    _enough_gpus(ranks)
    set_defaults(ranks, os.environ)
    return run_ranks(module, argv, ranks)


def _check_model(recipe: AnyRecipe) -> None:
    from asd_megatron.checkpoint.huggingface import read_config  # torch and more: not for --help
    from asd_megatron.run.sources import model_folder

    check_model(recipe, read_config(model_folder(recipe.model.path)))


def refuse_torchrun(kind: Kind, module: str, environment: Mapping[str, str]) -> None:
    """Raise UserError when the command itself was started by torchrun: it would start ranks on every rank."""
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
        raise UserError(
            f"asd-megatron {kind} starts the ranks itself and was started by torchrun: start `torchrun ... -m {module}"
            f" RECIPE`, or `asd-megatron {kind} RECIPE` without torchrun"
        )


def _enough_gpus(ranks: int) -> None:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < ranks:
        raise UserError(
            f"the recipe's layout needs {ranks} ranks and this machine has {gpus} GPUs: make the parallelism section"
            " smaller, or use torchrun on several machines"
        )


def run_ranks(module: str, argv: Sequence[str], ranks: int) -> int:
    """Run `python -m MODULE ARGV` as local ranks under torch's elastic launcher, which hands signals on to them."""
    if ranks == 1:
        _become_single_rank(module, argv)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # Without --local-addr ranks meet at the machine's name, which need not resolve.
    options = ["--nproc-per-node", str(ranks), "--standalone", "--local-addr", "127.0.0.1", "-m", module, *argv]
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed") and not os.environ.get("LOGLEVEL"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # its report of a failed rank: the rank has spoken
    try:
        run(parse_args(options))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode
        if status < 0:
            print(f"error: rank {rank} was ended by signal {-status}", file=sys.stderr)
            return 128 - status
        return status or 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


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
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *argv], environment)
