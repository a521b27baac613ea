"""The container files without an engine: what the Compose file promises, how images are built and checked, what an
entry point and a health check do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from asd_megatron import __version__
from asd_megatron.config.loading import load_recipe
from asd_megatron.models.te import TESTED
from tests.docker.test_install import COPIED

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
TEXT = (DOCKER / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ON_GPUS = ("server-0", "server-1", "trainer")


def arguments(service: str) -> dict[str, str]:
    """The options of a service's command: {"--port": "30000"}."""
    words = SERVICES[service]["command"]
    return {name: value for name, value in zip(words, words[1:], strict=False) if name.startswith("--")}


def default(text: str) -> str:
    """`${NAME:-value}` -> value."""
    found = re.fullmatch(r"\$\{\w+:-(.*)\}", text)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", SERVICES)
def test_services_have_few_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == "${ASD_UID:-1000}:${ASD_GID:-1000}"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert "host" not in (service.get("network_mode"), service.get("ipc"), service.get("pid"))
    assert service["healthcheck"].get("disable") or service["healthcheck"]["test"][0] == "CMD"
    mounts = [mount.rsplit(":", 2) for mount in service.get("volumes", ())]
    writable = {target for _, target, *mode in (m if m[-1] == "ro" else ["", m[-1]] for m in mounts) if mode != ["ro"]}
    assert writable <= {"/work/runs", "/cache"}


def test_keys_come_from_a_file_alone() -> None:
    assert COMPOSE["secrets"] == {"keys": {"file": "${KEYS:-./keys.env}"}}
    for name, service in SERVICES.items():
        assert service.get("secrets", []) == (["keys"] if name in ON_GPUS else [])
        assert not [key for key in service.get("environment", {}) if key.endswith("_KEY")]
    assert SERVICES["trainer"]["environment"]["ASD_MEGATRON_KEYS_FILE"] == "/run/secrets/keys"


def test_what_is_sent_to_the_engine() -> None:
    """All that an installation needs, and of the rest nothing: no keys, runs or models of this machine."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*" and lines.index("**/*.env") > lines.index("!docker")
    assert allowed == {*COPIED, "examples", "tests"}


def test_servers_are_reached_on_loopback_alone() -> None:
    """All that talks to servers shares a network without a way out, and publishes no port."""
    assert COMPOSE["networks"]["rollouts"] == {"internal": True} and SERVICES["pod"]["networks"] == ["rollouts"]
    assert SERVICES["pod"]["ipc"] == "shareable" and SERVICES["pod"]["shm_size"]
    for name in ON_GPUS:
        service = SERVICES[name]
        assert service["network_mode"] == service["ipc"] == "service:pod" and "ports" not in service
        assert service["ulimits"]["memlock"] == -1 and service["ulimits"]["stack"] == 64 * 2**20
    ports = [arguments(name)["--port"] for name in ("server-0", "server-1")]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    assert len(set(ports)) == 2 and not any("--host" in arguments(name) for name in ("server-0", "server-1"))
    assert yaml.safe_load(arguments("trainer")["--rollout.server_urls"]) == urls
    healths = [SERVICES[name]["healthcheck"]["test"][-1] for name in ("server-0", "server-1")]
    assert healths == [f"{url}/health" for url in urls]


def test_gpus_are_divided() -> None:
    own = [default(arguments(name)["--devices"]) for name in ("server-0", "server-1")]
    own.append(default(SERVICES["trainer"]["environment"]["CUDA_VISIBLE_DEVICES"]))
    assert sorted(int(gpu) for gpus in own for gpu in gpus.split(",")) == list(range(8))
    assert len(own[0].split(",")) == int(default(arguments("server-0")["--tensor-parallel"]))


def test_the_trainers_command_is_a_recipe(tmp_path: Path) -> None:
    """The options of its command are recipe keys, and fit together."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {train: /data/train.jsonl}\nreward: {name: math}\n")
    words = SERVICES["trainer"]["command"]
    assert words[:3] == ["asd-megatron", "train", "/data/recipe.yaml"]
    loaded = load_recipe(recipe, words[3:])
    assert loaded.rollout.server_urls and loaded.run.folder == "/work/runs/compose"


class Engine:
    """A `docker` that notes its arguments and answers `image inspect` with a user, beside `gpus` GPUs."""

    def __init__(self, folder: Path, *, user: str = "10001:10001", gpus: int = 0, reachable: bool = True) -> None:
        self.folder, self._notes = folder, folder / "notes"
        status = 0 if reachable else 1
        self._program("nvidia-smi", f"yes 'GPU 0: H100' | head -n {gpus}")
        self._program(
            "docker",
            f'[[ $1 == info ]] && exit {status}\necho "$@" >>{self._notes}\n[[ $2 != inspect ]] || echo {user}',
        )

    def _program(self, name: str, body: str) -> None:
        file = self.folder / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)

    def run(self, *words: str, name: str = "docker") -> tuple[int, str, list[str]]:
        """Exit status of docker/images.sh, what it says, and what the engine was asked for."""
        variables = os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}", "ENGINE": name}
        script = [str(DOCKER / "images.sh"), *words]
        done = subprocess.run(script, env=variables, capture_output=True, text=True, timeout=60)
        asked = self._notes.read_text().splitlines() if self._notes.exists() else []
        return done.returncode, done.stdout + done.stderr, asked


def test_images_are_those_that_compose_starts(tmp_path: Path) -> None:
    status, said, asked = Engine(tmp_path).run("build")
    assert status == 0, said
    built = {}
    for line in asked:
        tags = rf"-t (\S+):{__version__} -t \2:latest"
        found = re.fullmatch(rf"build (?:--build-arg \S+ )?-f (\S+) {tags} .*VERSION={__version__} .* \.", line)
        assert found is not None, line
        built[found[2]] = ROOT / found[1]
    assert f"TRAINER_IMAGE=asd-megatron-trainer:{__version__}" in asked[-1]
    assert list(built) == ["asd-megatron-trainer", "asd-megatron-sglang", "asd-megatron-colocated"]
    assert all(file.is_file() for file in built.values())
    assert {service["image"].partition(":")[0] for service in SERVICES.values()} <= set(built)
    status, said, after = Engine(tmp_path).run("build", "asd-megatron-sglang", "trainers")
    assert status == 2 and "no image 'trainers': give asd-megatron-trainer" in said and after == asked


def test_images_are_checked(tmp_path: Path) -> None:
    """As a user that no image knows, on a read-only root; on GPUs if there are any, the servers' image excepted."""
    status, said, asked = Engine(tmp_path, gpus=2).run("check")
    assert status == 0, said
    runs = [line for line in asked if line.startswith("run ")]
    assert all("--read-only" in line and "--user 12345:12345" in line for line in runs)
    on_gpus = [line.split(f":{__version__} ")[-1] for line in runs if "--gpus all" in line]
    assert on_gpus == ["asd-megatron parity --ranks 1", on_gpus[1]] * 2 and "tools/gpu_checks.py" in on_gpus[1]
    assert sum("check_base.py compare" in line for line in runs) == 2


@pytest.mark.parametrize(
    ("options", "name", "said"),
    [
        ({}, "no-such-engine", "no container engine: install docker or podman, or name another one with ENGINE="),
        ({"reachable": False}, "docker", "docker cannot reach an engine: start it, or add your user to its group"),
        ({"user": ""}, "docker", "asd-megatron-trainer runs as user '', not as a user of its own"),
        ({"user": "0:0"}, "docker", "runs as user '0:0'"),
    ],
)
def test_images_cannot_be_checked(tmp_path: Path, options: dict[str, Any], name: str, said: str) -> None:
    status, found, _ = Engine(tmp_path, **options).run("check", name=name)
    assert status != 0 and said in found


@pytest.mark.parametrize("name", ["trainer", "sglang", "colocated"])
def test_images_hold_no_secret_and_run_as_a_user(name: str) -> None:
    lines = (DOCKER / f"{name}.Dockerfile").read_text().splitlines()
    bases = [line.split()[-1] for line in lines if line.startswith(("FROM ", "ARG BASE_IMAGE=", "ARG TRAINER_IMAGE="))]
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 10001:10001"
    assert not re.search("API_KEY|ADMIN_KEY|TOKEN|PASSWORD", "\n".join(lines))
    assert name == "colocated" or re.search(r":\d[\w.-]+(@sha256:[0-9a-f]{64})?$", bases[0])  # no moving tag


def test_what_the_base_is_said_to_have_fits() -> None:
    """By the comment beside its tag: a tested Transformer Engine, the servers' NCCL, the tests' release of torch."""
    text = (DOCKER / "trainer.Dockerfile").read_text().partition("26.08 has")[0]
    release = re.search(r"Transformer Engine (\d+)\.(\d+)", text)
    nccl, torch = re.search(r"NCCL ([\d.]+)", text), re.search(r"torch (\d+\.\d+)\.", text)
    assert release is not None and nccl is not None and torch is not None
    oldest, newest = TESTED[(0, 19)]
    assert oldest <= (int(release[1]), int(release[2])) <= newest
    servers = (ROOT / "tools" / "sglang_env" / "requirements-gpu.txt").read_text()
    assert f"nvidia-nccl-cu13=={nccl[1]}\n" in servers
    assert f"\ntorch=={torch[1]}." in (ROOT / "constraints.txt").read_text()


def test_keys_reach_the_command_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "keys.env"
    for _ in range(2):  # the second time it is kept
        subprocess.run([DOCKER / "keys.sh", file], check=True, capture_output=True)
        assert file.stat().st_mode & 0o777 == 0o600
        text = file.read_text()
    keys = re.findall(r"^export ASD_MEGATRON_(?:API|ADMIN)_KEY=([0-9a-f]{64})$", text, re.MULTILINE)
    assert len(set(keys)) == 2

    def shown(**variables: str) -> subprocess.CompletedProcess[str]:
        command = [DOCKER / "entrypoint.sh", "sh", "-c", "echo $ASD_MEGATRON_API_KEY $ASD_MEGATRON_ADMIN_KEY"]
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)

    assert shown(ASD_MEGATRON_KEYS_FILE=str(file)).stdout.split() == keys
    missing = shown(ASD_MEGATRON_KEYS_FILE=str(tmp_path / "none"))
    assert missing.returncode == 2 and "cannot read" in missing.stderr
    file.write_text("export ASD_MEGATRON_API_KEY=x\n")
    half = shown(ASD_MEGATRON_KEYS_FILE=str(file))
    assert half.returncode == 2 and "docker/keys.sh writes such a file" in half.stderr


def test_keys_are_made_in_no_unfit_place(tmp_path: Path) -> None:
    """A file that others can read, or without keys, is not taken for one with keys; nothing is overwritten."""
    (tmp_path / "half.env").write_text("export ASD_MEGATRON_API_KEY=x\n")
    (tmp_path / "open.env").write_text("ASD_MEGATRON_API_KEY=x\nASD_MEGATRON_ADMIN_KEY=y\n")
    for name, mode in (("half.env", 0o600), ("open.env", 0o640)):
        (tmp_path / name).chmod(mode)
    (tmp_path / "link.env").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    for name, words in (
        *(("half.env", "no file with both keys"), ("open.env", "chmod 600"), ("link.env", "no file with both keys")),
        *((".", "no file with both keys"), ("absent/keys.env", "make it first"), ("--help", "docker/keys.sh [FILE]")),
    ):
        done = subprocess.run([DOCKER / "keys.sh", name], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and not done.stdout, name
    assert sorted(tmp_path.iterdir()) == before


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Answers) as here:
        threading.Thread(target=here.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{here.server_port}"
        here.shutdown()


def health(*words: object) -> tuple[int, str]:
    command = [sys.executable, str(DOCKER / "healthy.py"), *map(str, words)]
    done = subprocess.run(
        command, env=os.environ | {"http_proxy": "http://127.0.0.1:9"}, capture_output=True, text=True
    )
    return done.returncode, done.stdout


def test_health_of_servers(server: str) -> None:
    assert health(f"{server}/health") == (0, "healthy\n")
    status, said = health(f"{server}/health", f"{server}/other")
    assert status == 1 and "/other: HTTP Error 503" in said and "/health:" not in said


def test_health_of_a_run(tmp_path: Path) -> None:
    assert health("--changed-within", 60, tmp_path / "run") == (1, f"{tmp_path}/run has no files\n")
    (tmp_path / "metrics.jsonl").touch()
    assert health("--changed-within", 60, tmp_path)[0] == 0
    os.utime(tmp_path / "metrics.jsonl", (1.0e9, 1.0e9))
    status, said = health("--changed-within", 60, tmp_path)
    assert status == 1 and "nothing in" in said
