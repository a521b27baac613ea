"""Servers on other nodes: how commands are started there, and what is found there before a server is.

A launcher is a command prefix in which {host} stands for a node's name, for instance

    srun --overlap --nodes=1 --ntasks=1 --nodelist={host}
    ssh -o BatchMode=yes -o ServerAliveInterval=15 {host}

It is followed by three words that no shell changes: the servers' Python, `agent.py` and a file. Both files are in the
run's log folder, which every node sees, in folders that their owner alone can read: keys are on no command line.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from asd_megatron.distributed.addresses import resolve
from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.servers.agent import ANSWER
from asd_megatron.rollout.sglang.servers.options import PLUGIN, ServerOptions, trainer_variables_removed
from asd_megatron.rollout.sglang.servers.versions import LIST_VERSIONS, Versions, read_versions

HOST = "{host}"
SLURM_LAUNCHER = f"srun --overlap --nodes=1 --ntasks=1 --nodelist={HOST}"
SURVEY_SECONDS = 120.0  # for a launcher to start a small program: Slurm may be busy
TASK = "task.json"  # in a folder of its own for each task
PROGRAM = "program"  # the folder in the log folder
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Launcher:
    """Starts commands on other nodes. `folder`: on a file system that they see under the same path."""

    text: str
    folder: Path

    @classmethod
    def of(cls, text: str | None, folder: Path, environment: Mapping[str, str] = os.environ) -> Launcher:
        """The launcher of a recipe; None: Slurm's, inside one of its jobs. Raises UserError outside."""
        if text is None and "SLURM_JOB_ID" not in environment:
            raise UserError(
                "rollout.server_hosts names other nodes, and nothing says how to start a command there: set"
                " rollout.server_launcher, a command with {host}, for instance 'ssh -o BatchMode=yes {host}'"
                " (inside a Slurm job srun is the default)"
            )
        return cls(SLURM_LAUNCHER if text is None else text, folder.absolute())

    @property
    def plugin(self) -> Path:
        """The folder of SGLang's plugin, as the nodes see it."""
        return self.folder / PROGRAM / PLUGIN.name

    def install(self) -> None:
        """Put the programs that run on the nodes into the folder, and remove what a lost run left there: its keys, and
        the leases of servers that may still run."""
        for task in self.folder.glob(f"*/{TASK}"):
            shutil.rmtree(task.parent, ignore_errors=True)
        target = self.folder / PROGRAM
        target.mkdir(parents=True, exist_ok=True)
        for name in ("agent.py", "child.py"):
            shutil.copy(HERE / name, target)
        shutil.copytree(PLUGIN, self.plugin, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))

    def task_folder(self, name: str) -> tempfile.TemporaryDirectory[str]:
        """A new folder that its owner alone can read, for one task of the agent."""
        return tempfile.TemporaryDirectory(prefix=f"{name}.", dir=self.folder, ignore_cleanup_errors=True)

    def command(self, host: str, python: Path, folder: Path, task: Mapping[str, Any]) -> list[str]:
        """The words that have the agent do `task`, whose file is written into `folder`."""
        file = folder / TASK
        file.touch(mode=0o600)
        file.write_text(json.dumps(task))
        words = [str(python), str(self.folder / PROGRAM / "agent.py"), str(file)]
        changed = next((word for word in words if shlex.quote(word) != word), None)
        if changed is not None:
            raise UserError(
                f"rollout.server_hosts: a shell on {host} would read {changed!r} as something else: use paths of"
                " letters, digits and / . _ - for run.folder and rollout.server_python"
            )
        return [*(word.replace(HOST, host) for word in shlex.split(self.text)), *words]


@dataclass(frozen=True)
class Survey:
    """What a node offers: its address, free ports there, and the versions in the servers' environment."""

    address: str
    ports: tuple[int, ...]
    versions: Versions


def placed(
    options: Sequence[ServerOptions], launcher: Launcher, first_port: int = 0
) -> tuple[list[ServerOptions], Versions]:
    """`options`, which name nodes, with addresses and free ports there, and the versions of the first node's packages.

    A server gets one port, one of several nodes a second one on its first node, where its ranks meet. Raises UserError
    that names the node which cannot be reached or lacks something.
    """
    launcher.install()
    options = [replace(given, python=given.python.absolute(), model=given.model.absolute()) for given in options]
    needed: Counter[str] = Counter()
    for given in options:
        needed.update(given.nodes)
        needed[given.nodes[0]] += len(given.nodes) > 1
    names = list(needed)
    with ThreadPoolExecutor(len(names)) as threads:
        found = threads.map(lambda name: survey(launcher, name, options[0], needed[name], first_port), names)
        surveys = dict(zip(names, found, strict=True))
    free = {name: iter(found.ports) for name, found in surveys.items()}
    result = []
    for given in options:
        first = given.nodes[0]
        address = surveys[first].address
        ports = {node: next(free[node]) for node in given.nodes}
        meeting = f"{f'[{address}]' if ':' in address else address}:{next(free[first])}" if len(given.nodes) > 1 else ""
        parts = {node: (surveys[node].address, port) for node, port in ports.items()}
        result.append(replace(given, host=address, port=ports[first], meeting=meeting, places=parts))
    return result, surveys[names[0]].versions


def survey(launcher: Launcher, host: str, options: ServerOptions, count: int, first_port: int) -> Survey:
    """What `host` offers to servers of `options`, with `count` free ports. Raises UserError that names the host."""
    address = resolve(host, "rollout.server_hosts: the host")
    task = {
        "task": "survey",
        "python": str(options.python),
        "model": str(options.model),
        "address": address,
        "count": count,
        "first_port": first_port,
        "versions": LIST_VERSIONS,
    }
    with launcher.task_folder(f"survey_{host}") as folder:
        answer = _ask(host, launcher.command(host, options.python, Path(folder), task), options.python)
    if not answer["model"]:
        raise UserError(
            f"rollout.server_hosts: {host} does not see the model's folder {options.model}: put it on a file system"
            " that every node sees under the same path"
        )
    if not answer["address"]:
        raise UserError(
            f"rollout.server_hosts: {host} is {address} here, and no interface of that node ({answer['hostname']}) has"
            " this address: give an address that `ip address` shows there"
        )
    if len(answer["ports"]) < count:
        where = f"from {first_port} (rollout.server_port) on" if first_port else "below the system's own"
        raise UserError(f"rollout.server_hosts: {host} has too few free ports {where}: end other programs there")
    versions = read_versions(f"{options.python} on {host}", answer["versions"], answer.get("python_error", ""))
    return Survey(address, tuple(answer["ports"]), versions)


def _ask(host: str, words: Sequence[str], python: Path) -> dict[str, Any]:
    """The answer of the agent, started by `words`."""
    command = shlex.join(words)
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SURVEY_SECONDS,
            env=trainer_variables_removed(os.environ),
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"rollout.server_hosts: {host} has not answered after {SURVEY_SECONDS:.0f} s to {command}:"
            " run that command by hand to see what it waits for"
        ) from error
    except OSError as error:
        raise UserError(f"rollout.server_launcher: {words[0]} cannot be started ({error})") from error
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode == 0 and answers:
        return dict(json.loads(answers[-1].removeprefix(ANSWER)))
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-5:]
    text = "\n".join(said)
    why = f"no command can be started on {host}"
    if "can't open file" in text:
        why = f"{host} does not see the run folder: put run.folder on a file system that every node sees"
    elif "No such file or directory" in text and str(python) in text:
        why = f"{host} has no {python} (rollout.server_python): install SGLang's environment where every node sees it"
    raise UserError(
        f"rollout.server_hosts: {why}. {command} ended with exit status {done.returncode} and said:"
        + "".join(f"\n    {line[:300]}" for line in said or ["(nothing)"])
    )
