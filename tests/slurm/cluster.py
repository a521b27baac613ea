"""A real Slurm cluster of some nodes on this machine: munged, slurmctld and one slurmd a node, in a folder of its own.

Needs root and Debian's packages slurm-wlm and munge. Nothing outside the folder is read or written.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
CONFIGURATION = """
ClusterName=asd
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1
KillWait=10
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
"""


@dataclass(frozen=True)
class Cluster:
    """The cluster's folder, and the environment in which Slurm's commands find it."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """The output of one of Slurm's commands. Raises CalledProcessError."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    def state(self, job: str) -> str:
        """State and reason of a job, for instance `RUNNING None`."""
        fields = dict(word.split("=", 1) for word in self.call("scontrol", "show", "job", job).split() if "=" in word)
        return f"{fields['JobState']} {fields['Reason']}"


@contextmanager
def cluster(folder: Path, nodes: Sequence[str]) -> Iterator[Cluster]:
    """Start it, wait until every node is idle, and end its daemons, by their ids, on leaving."""
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(nodes))
    text = CONFIGURATION.format(folder=folder, host=host, ports=ports)
    for node, port in zip(nodes, ports[1:], strict=True):
        text += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN\n"
    text += "PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
    configuration = folder / "slurm.conf"
    configuration.write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment["SLURM_CONF"] = str(configuration)
    made = Cluster(folder, environment)
    munge = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed", "--num-threads=1"]
    with ExitStack() as closing:
        _daemon(closing, made, "munged", "--foreground", "--force", *munge)
        _wait_for((folder / "munge.socket").exists, "munged")
        _daemon(closing, made, "slurmctld", "-D", "-f", str(configuration))
        for node in nodes:
            (folder / f"spool_{node}").mkdir()
            _daemon(closing, made, "slurmd", "-D", "-N", node, "-f", str(configuration))
        _wait_for(lambda: _idle(made) == len(nodes), "slurmctld and its nodes")
        try:
            yield made
        finally:
            _cancel_all(made)


def _cancel_all(made: Cluster) -> None:
    """End the jobs that a failed test has left, whose processes would outlive the daemons."""
    jobs = made.call("squeue", "--noheader", "--format=%i").split()
    if jobs:
        made.call("scancel", "--full", "--signal=KILL", *jobs)
        made.call("scancel", *jobs)
        _wait_for(lambda: not made.call("squeue", "--noheader").strip(), "the end of all jobs")


def _daemon(closing: ExitStack, made: Cluster, program: str, *arguments: str) -> None:
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert path is not None, f"{program} is not installed: apt-get install slurm-wlm munge"
    log = closing.enter_context((made.folder / "daemons.log").open("a"))
    process = subprocess.Popen([path, *arguments], env=made.environment, stdout=log, stderr=log)

    def end() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    closing.callback(end)


def _idle(made: Cluster) -> int:
    try:
        return made.call("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").count("\n")
    except subprocess.CalledProcessError:
        return 0


def _wait_for(condition: object, what: str, seconds: float = 60.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)


def _free_ports(number: int) -> list[int]:
    with ExitStack() as closing:
        sockets = [closing.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
