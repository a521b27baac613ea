"""`asd-megatron launch --slurm RECIPE`: print or submit the sbatch script of a run."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence

from asd_megatron.cli.launch import check_model_folder
from asd_megatron.cli.slurm_script import Job, script, server_overrides
from asd_megatron.config import AnyRecipe, Kind, Recipe, check_world, load_recipe
from asd_megatron.config.overrides import split_overrides
from asd_megatron.config.rollout import RolloutSection
from asd_megatron.errors import UserError, plural

TIME = re.compile(r"(\d+-)?\d+(:\d\d){0,2}")  # [days-]hours[:minutes[:seconds]], or minutes[:seconds]
SIZES = {
    "--nodes": "give --nodes and --server-nodes",
    "--ntasks": "leave it out, there is one task a node",
    "--ntasks-per-node": "leave it out, there is one task a node",
    "--gpus-per-node": "give --gpus-per-node without --sbatch",
    "--array": "leave it out, each run has a job of its own",
}
"""Options of sbatch that the rest of the script would contradict, and what to do instead."""
SERVER_KEYS = ("rollout.servers", "rollout.server_devices", "rollout.server_hosts", "rollout.server_launcher")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asd-megatron launch",
        usage="asd-megatron launch --slurm RECIPE [MORE.yaml ...] [--option value ...] [--section.key value ...]",
        description=(
            "Print the sbatch script that trains a recipe under Slurm, after the recipe and its layout have been"
            " checked; with --submit, submit it. The job saves its state before its time limit and is queued again"
            " until the run is complete (docs/cluster.md). Paths are relative to the folder in which it is submitted."
        ),
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--slurm", action="store_true", required=True, help="the scheduler")
    add(
        "recipe",
        metavar="RECIPE",
        nargs="+",
        help="a YAML file (docs/recipes.md); keys of further ones replace its keys",
    )
    add("--sft", action="store_true", help="RECIPE is one of `asd-megatron sft`")
    add("--nodes", type=int, default=1, metavar="N", help="nodes of the trainer [%(default)s]")
    add("--gpus-per-node", type=int, default=8, metavar="G", help="of every node; 0: train on CPUs [%(default)s]")
    add("--server-nodes", type=int, default=0, metavar="M", help="further nodes, for SGLang servers [%(default)s]")
    add("--time", default="04:00:00", help="time limit of one job, as sbatch takes it [%(default)s]")
    add("--partition", metavar="NAME")
    add("--account", metavar="NAME")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further line, such as --sbatch=--exclusive; the last of several counts",
    )
    add("--interface", metavar="NAME", help="network interface for NCCL, gloo and weight sync, for instance ib0")
    add("--python", metavar="PATH", help="of the trainer's environment [this one; python3 with --container]")
    add("--container", metavar="IMAGE", help="run the ranks in a container (pyxis and enroot)")
    add("--container-mounts", metavar="LIST", help="beside the current folder: SOURCE:TARGET,...")
    add("--submit", action="store_true", help="submit the script with sbatch instead of printing it")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the script, or submit it; returns 0, or sbatch's status. Raises UserError for what cannot run."""
    words, overrides = _split(argv)
    given = _parser().parse_intermixed_args(words)
    text = script(make_job(given, overrides, shlex.join(["asd-megatron", "launch", *_shown(argv)])))
    if not given.submit:
        print(text, end="")
        return 0
    try:
        return subprocess.run(["sbatch"], input=text, text=True, check=False).returncode
    except FileNotFoundError:
        raise UserError("sbatch is not here: submit on a login node of the cluster, or leave --submit out") from None


def make_job(given: argparse.Namespace, overrides: tuple[str, ...], command: str) -> Job:
    """The job of the checked recipe. Raises UserError for a layout, nodes or options that cannot work."""
    kind: Kind = "sft" if given.sft else "train"
    placed_here = ("--rollout.server_devices", "[]") if given.server_nodes and kind == "train" else ()
    recipe = load_recipe(given.recipe[0], (*given.recipe[1:], *overrides, *placed_here), kind)
    _check_numbers(given)
    _check_model(recipe)
    if recipe.checkpoint.resume == "never":
        raise UserError(
            "checkpoint.resume never: a job that is queued again would begin at step 1: leave it out (auto), or set"
            " run.overwrite true to replace what the run folder holds"
        )
    spans = 1
    colocated = given.nodes > 1 and _is_colocated(recipe)
    if given.server_nodes or colocated:
        rollout = _checked_servers(given, recipe, {key for key, _ in split_overrides(overrides)})
        nodes = given.nodes if colocated else given.server_nodes
        more, spans = server_overrides(given.gpus_per_node, rollout.server_tensor_parallel, nodes)
        overrides += more
    if recipe.run.time_limit is None:
        overrides += ("--run.time_limit", "slurm")
    options = [f"--time={given.time}"]
    options += [f"--{name}={value}" for name in ("partition", "account") if (value := getattr(given, name))]
    return Job(
        command=command,
        verb=kind,
        module=f"asd_megatron.{kind}",
        recipes=tuple(given.recipe),
        overrides=_joined(overrides),
        run_folder=str(recipe.run.path),
        run_name=recipe.run.name,
        python=given.python or ("python3" if given.container else sys.executable),
        trainer_nodes=given.nodes,
        ranks_per_node=_ranks_per_node(given, recipe),
        gpus=given.gpus_per_node,
        server_nodes=given.server_nodes,
        hosts_per_server=spans,
        colocated=colocated,
        options=(*options, *given.sbatch),
        interface=given.interface,
        container=given.container,
        container_mounts=given.container_mounts,
    )


def _split(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The options of this command, and the recipe's overrides, `--section.key value` or `--section.key=value`."""
    words: list[str] = []
    overrides: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name.startswith("--") and "." in name:
            overrides.append(argument)
            overrides += [] if equals else [value for value in [next(arguments, None)] if value is not None]
        else:
            words.append(argument)
    return words, tuple(overrides)


def _joined(overrides: Sequence[str]) -> tuple[str, ...]:
    """Key and value in turn."""
    return tuple(word for key, value in split_overrides(overrides) for word in (f"--{key}", value))


def _shown(argv: Sequence[str]) -> list[str]:
    return [argument for argument in argv if argument != "--submit"]


def _ranks_per_node(given: argparse.Namespace, recipe: AnyRecipe) -> int:
    """Ranks on each of the trainer's nodes. Raises UserError when nodes and layout do not fit."""
    nodes, gpus, layout = given.nodes, given.gpus_per_node, recipe.parallelism
    if not gpus:
        if layout.ranks % nodes:
            raise UserError(
                f"the layout's {plural(layout.ranks, 'rank')} do not divide into {nodes} nodes: change --nodes or the"
                " parallelism section"
            )
        check_world(recipe, layout.ranks)
        return layout.ranks // nodes
    rollout = None if given.server_nodes else _with_own_servers(recipe)
    if rollout is not None and rollout.server_hosts:
        rollout = None  # its servers run on nodes outside the job
    taken = 0 if rollout is None else sum(len(entry.split(",")) for entry in rollout.server_devices)
    if nodes > 1 and rollout is not None:
        raise UserError(
            "the run would start its SGLang servers on the first node alone, on GPUs that the trainer's ranks there"
            " have: give --server-nodes, set rollout.placement colocated, or name running servers in"
            " rollout.server_urls"
        )
    if layout.ranks + taken > nodes * gpus:
        servers = f" and rollout.server_devices {taken}" if taken else ""
        raise UserError(
            f"the layout needs {plural(layout.ranks, 'GPU')}{servers}, and there are {nodes * gpus}: raise --nodes or"
            " --gpus-per-node, or make the parallelism section smaller"
        )
    if nodes == 1 and not given.server_nodes:  # `asd-megatron train` uses what the layout can use
        check_world(recipe, layout.ranks)
        return layout.ranks if layout.data is not None else int((gpus - taken) // layout.ranks * layout.ranks)
    check_world(recipe, nodes * gpus)
    return int(gpus)


def _with_own_servers(recipe: AnyRecipe) -> RolloutSection | None:
    """The section `rollout` of a run that starts servers with devices of their own; None for any other."""
    if not isinstance(recipe, Recipe):
        return None
    rollout = recipe.rollout
    starts = rollout.engine == "sglang" and not rollout.server_urls and rollout.placement == "disaggregated"
    return rollout if starts else None


def _check_model(recipe: AnyRecipe) -> None:
    """Refuse what the model refuses, where its folder is here; a node or a container may have it elsewhere."""
    from asd_megatron.run.sources import model_folder  # takes seconds, which a wrong option should not

    if (model_folder(recipe.model.path) / "config.json").is_file():
        check_model_folder(recipe)
    else:
        print(
            f"warning: model.path {recipe.model.path} is not here, so that it is not checked against the layout",
            file=sys.stderr,
        )


def _check_numbers(given: argparse.Namespace) -> None:
    if given.nodes < 1 or given.gpus_per_node < 0 or given.server_nodes < 0:
        raise UserError("--nodes is at least 1, --gpus-per-node and --server-nodes at least 0")
    if TIME.fullmatch(given.time) is None:
        raise UserError(f"--time {given.time!r}: write it as sbatch takes it, minutes, HH:MM:SS or DAYS-HH:MM:SS")
    for option in given.sbatch:
        if not option.startswith("--"):
            raise UserError(f"--sbatch {option!r}: write a long option with its value, such as --sbatch=--qos=high")
        if (name := option.partition("=")[0]) in SIZES:
            raise UserError(f"--sbatch={name}: the script is written for its nodes: {SIZES[name]}")
    if given.container_mounts and not given.container:
        raise UserError("--container-mounts belongs to --container IMAGE")


def _is_colocated(recipe: AnyRecipe) -> bool:
    """Whether the run starts servers on the trainer's GPUs."""
    if not isinstance(recipe, Recipe) or recipe.rollout.engine != "sglang":
        return False
    return recipe.rollout.placement == "colocated" and not recipe.rollout.server_hosts


def _checked_servers(given: argparse.Namespace, recipe: AnyRecipe, keys: set[str]) -> RolloutSection:
    """The section `rollout` of a run whose servers this command places: on nodes of their own, or on all of the
    trainer's. Raises UserError for what it cannot place."""
    if given.server_nodes and _with_own_servers(recipe) is None:
        raise UserError(
            "--server-nodes are for SGLang servers that the run starts: set rollout.engine sglang, rollout.placement"
            " disaggregated and rollout.server_urls '[]', or leave --server-nodes out"
        )
    which = "--server-nodes" if given.server_nodes else f"--nodes {given.nodes} with rollout.placement colocated"
    if given.gpus_per_node == 0:
        raise UserError(f"{which} needs --gpus-per-node: the servers are dealt to the nodes' GPUs")
    if clash := sorted(keys & set(SERVER_KEYS)):
        raise UserError(f"{which} sets {clash[0]} itself, so that servers fill their nodes: leave it out")
    if given.container:
        raise UserError(
            f"--container and {which}: the run starts servers on other nodes with srun, which a container has not:"
            " start them in a job of their own (`asd-megatron serve`) and name them in rollout.server_urls"
        )
    assert isinstance(recipe, Recipe)
    rollout = recipe.rollout
    if not given.server_nodes and rollout.server_tensor_parallel > given.gpus_per_node:
        raise UserError(
            f"rollout.server_tensor_parallel {rollout.server_tensor_parallel}: a colocated server has GPUs of one node:"
            f" set it to at most {given.gpus_per_node}"
        )
    return rollout
