"""What a server is started with: its command line, where it listens, its environment."""

from __future__ import annotations

import socket
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from asd_megatron.distributed import determinism
from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.servers import options as options_module
from asd_megatron.rollout.sglang.servers.options import (
    ServerOptions,
    check_listening,
    command,
    devices_of_servers,
    free_port,
    parse_arguments,
    pass_through,
    pick_ports,
    secret_arguments,
    server_environment,
    server_variables,
)
from asd_megatron.rollout.sglang.servers.versions import check_environment, ipc_arguments
from tests.rollout.sglang.fake_environment import fake_python


def options(**over: Any) -> ServerOptions:
    values: dict[str, Any] = {"python": Path("p"), "model": Path("m"), "api_key": "generate-1", "admin_key": "admin-2"}
    return ServerOptions(**{**values, **over})


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "_has_cuda", lambda: True)


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "_has_cuda", lambda: False)


def flags(given: ServerOptions) -> dict[str, str]:
    """A command's arguments by name; "" for those without a value."""
    words = command(given)[3:]
    return {
        word: "" if index + 1 == len(words) or words[index + 1].startswith("--") else words[index + 1]
        for index, word in enumerate(words)
        if word.startswith("--")
    }


def test_command_on_gpus(gpus: None) -> None:
    given = options(
        port=7, tensor_parallel=2, context_length=99, arguments={"mem_fraction_static": 0.8, "--quiet": True}
    )
    assert command(given)[:3] == ["p", "-m", "sglang.launch_server"]
    assert flags(given) == {
        "--model-path": "m",
        "--host": "127.0.0.1",
        "--port": "7",
        "--tp-size": "2",
        "--dtype": "auto",
        "--context-length": "99",
        "--weight-version": "default",
        "--mem-fraction-static": "0.8",
        "--quiet": "",
    }


def test_experts_are_not_reordered_on_gpus(gpus: None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_local_experts": 4}')
    assert flags(options(model=tmp_path))["--moe-runner-backend"] == "triton"
    assert flags(options(model=tmp_path, arguments={"moe_runner_backend": "auto"}))["--moe-runner-backend"] == "auto"
    assert "--moe-runner-backend" not in flags(options(model=tmp_path, devices=""))  # on the CPU
    (tmp_path / "config.json").write_text("{}")
    assert "--moe-runner-backend" not in flags(options(model=tmp_path))


def test_command_on_cpus(no_gpus: None) -> None:
    found = flags(options(arguments={"max-running-requests": 3, "disable-overlap-schedule": False}))
    assert found["--device"] == "cpu" and found["--attention-backend"] == "torch_native"
    assert found["--dtype"] == "float32" and "--context-length" not in found
    assert found["--max-running-requests"] == "3" and "--disable-overlap-schedule" not in found  # the user's win


def test_deterministic_servers(gpus: None) -> None:
    """Also on another node, whose launcher passes nothing on; the user's own variables stay."""
    flag = "--enable-deterministic-inference"
    assert flag in flags(options(deterministic=True)) and flag not in flags(options())
    wanted = determinism.variables(cuda=True)
    for nodes in ((), ("node1",)):
        found = server_variables(options(deterministic=True, nodes=nodes), {"NCCL_ALGO": "Tree"})
        assert {**wanted, "NCCL_ALGO": "Tree"}.items() <= found.items()
    assert not wanted.keys() & server_variables(options(), {}).keys()


def test_no_gpu_may_be_asked_for(gpus: None) -> None:
    assert options(devices="").on_cpu and options(arguments={"device": "cpu"}).on_cpu
    assert not options(devices="1").on_cpu and not options().on_cpu


def test_a_gpu_that_was_named_is_not_silently_left_out(no_gpus: None) -> None:
    assert options().on_cpu and not options(devices="1").on_cpu


def test_values_of_every_kind(gpus: None) -> None:
    words = command(options(arguments={"a": [1, 2], "b": {"x": 1}, "c": None, "d": False, "e": True}))
    assert words[-6:] == ["--a", "1", "2", "--b", '{"x": 1}', "--e"]


def test_keys_are_in_neither_command_nor_text() -> None:
    given = options()
    assert not {"generate-1", "admin-2"} & set(command(given))
    assert "generate-1" not in repr(given) and "admin-2" not in repr(given)
    assert secret_arguments(given) == ["--api-key=generate-1", "--admin-api-key=admin-2"]
    assert secret_arguments(options(api_key="", admin_key="")) == []


@pytest.mark.parametrize("name", ["port", "model_path", "--admin-api-key", "tp", "dtype", "weight-version", "config"])
def test_arguments_that_are_set_here(name: str) -> None:
    with pytest.raises(UserError, match=r"is set by .*: remove it"):
        command(options(arguments={name: 1}))


def test_replicas_inside_a_server_are_refused() -> None:
    with pytest.raises(UserError, match="--dp-size above 1 .* start more servers"):
        command(options(arguments={"dp_size": 2}))
    with pytest.raises(UserError, match="--ep-size above 1"):
        command(options(arguments={"ep-size": 2}))
    assert pass_through(options(arguments={"dp_size": 1})) == {"dp-size": 1}


def test_variables_of_the_trainer_stay_outside(gpus: None) -> None:
    base = {
        "OMP_NUM_THREADS": "1",
        "PATH": "/bin",
        "RANK": "0",
        "TORCHELASTIC_RUN_ID": "x",
        "PYTHONPATH": "y",
        "ASD_MEGATRON_ADMIN_KEY": "z",
        "TORCH_FR_DUMP_TEMP_FILE": "run/flight_recorder_rank_",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "run/flight_recorder_rank_",
    }
    found = server_environment(options(devices="3", environment={"MORE": "1"}), base)
    assert found["PATH"] == "/bin" and found["MORE"] == "1" and found["CUDA_VISIBLE_DEVICES"] == "3"
    added = {
        "CUDA_VISIBLE_DEVICES",
        "PYTHONPATH",
        "PYTHONUNBUFFERED",
        "NCCL_CUMEM_ENABLE",
        "NCCL_NVLS_ENABLE",
        "no_proxy",
        "NO_PROXY",
    }
    assert set(found) == {"PATH", "MORE"} | added
    plugins = [entry for found in distributions(path=[found["PYTHONPATH"]]) for entry in found.entry_points]
    assert [(entry.group, entry.module) for entry in plugins] == [("sglang.srt.plugins", "asd_weight_delta")]
    assert (Path(found["PYTHONPATH"]) / "asd_weight_delta.py").is_file()
    assert server_environment(options(devices=""), {})["SGLANG_USE_CPU_ENGINE"] == "1"


def test_the_trainers_torch_is_not_on_the_library_path(tmp_path: Path) -> None:
    """NVIDIA's containers put their torch there: a server's own torch would load its libraries."""
    torch, other = tmp_path / "torch" / "lib", tmp_path / "compat"
    torch.mkdir(parents=True)
    (torch / "libtorch.so").touch()
    base = {"LD_LIBRARY_PATH": f"{torch}:{other}:/usr/local/nvidia/lib"}
    assert server_environment(options(), base)["LD_LIBRARY_PATH"] == f"{other}:/usr/local/nvidia/lib"


def test_a_server_has_the_trainers_settings_of_nccl(gpus: None) -> None:
    """SGLang would set both to 0: one communicator of two settings. 2 is NCCL's default of the second."""
    assert nccl_of({}) == ("1", "2")
    assert nccl_of({"NCCL_CUMEM_ENABLE": "0"}) == ("0", "2")
    assert nccl_of({"NCCL_CUMEM_ENABLE": "", "NCCL_NVLS_ENABLE": "0"}) == ("1", "0")


def nccl_of(base: dict[str, str]) -> tuple[str, str]:
    found = server_environment(options(), base)
    return found["NCCL_CUMEM_ENABLE"], found["NCCL_NVLS_ENABLE"]


@pytest.mark.parametrize(
    ("base", "host", "expected"),
    [
        ({}, "127.0.0.1", ["localhost", "127.0.0.1", "::1", "[::1]"]),
        ({"no_proxy": "a.b, c"}, "10.1.2.3", ["a.b", "c", "localhost", "127.0.0.1", "::1", "[::1]", "10.1.2.3"]),
        ({"NO_PROXY": "::1", "no_proxy": "x"}, "fe80::2",
         ["x", "::1", "localhost", "127.0.0.1", "[::1]", "fe80::2", "[fe80::2]"]),
        ({"no_proxy": "*"}, "10.1.2.3", ["*"]),  # it counts only when it stands alone
    ],
)  # fmt: skip
def test_a_server_reaches_itself_without_a_proxy(base: dict[str, str], host: str, expected: list[str]) -> None:
    found = server_environment(options(host=host), {"http_proxy": "http://proxy:1", **base})
    assert found["http_proxy"] == "http://proxy:1"
    assert found["no_proxy"] == found["NO_PROXY"] and found["no_proxy"].split(",") == expected


def test_parse_arguments() -> None:
    words = ["--mem-fraction-static", "0.8", "--a=b=c", "--flag", "--many", "1", "2", "3", "--last", "-1"]
    assert parse_arguments(words) == {
        "mem-fraction-static": "0.8",
        "a": "b=c",
        "flag": True,
        "many": ["1", "2", "3"],
        "last": "-1",
    }
    with pytest.raises(UserError, match="'0.8' stands before"):
        parse_arguments(["0.8", "--flag"])


def test_devices_of_servers(gpus: None) -> None:
    assert devices_of_servers(["0,1", "2,3"], 2, 2) == ["0,1", "2,3"]
    assert devices_of_servers([], 1, 4) == [None]
    with pytest.raises(UserError, match="would share the same GPUs"):
        devices_of_servers([], 2, 1)
    with pytest.raises(UserError, match="given for 1 servers, and there are 2"):
        devices_of_servers(["0"], 2, 1)
    with pytest.raises(UserError, match="tensor-parallel size 2 .*'0'"):
        devices_of_servers(["0", "1"], 2, 2)


def test_devices_of_servers_on_cpus(no_gpus: None) -> None:
    assert devices_of_servers([], 2, 1) == [None, None]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"host": "0.0.0.0"}, "on every interface"),
        ({"host": "::"}, "on every interface"),
        ({"host": "node7"}, "is not an address"),
        ({"host": "192.0.2.1"}, "no interface of this machine"),
        ({"host": "192.0.2.1", "admin_key": ""}, "needs both keys"),
    ],
)
def test_where_a_server_must_not_listen(over: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_listening(options(**over))


def test_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="is in use"):
            check_listening(options(port=other.getsockname()[1]))
    check_listening(options(api_key="", admin_key=""))


def test_ports() -> None:
    chosen = [given.port for given in pick_ports([options(), options(port=5), options()])]
    assert chosen[1] == 5 and len(set(chosen)) == 3 and all(chosen)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port("127.0.0.1")))


def test_check_environment(tmp_path: Path) -> None:
    found = check_environment(fake_python(tmp_path / "new", "0.5.10.post1"))
    assert (found.sglang, found.torch, found.nccl) == ("0.5.10.post1", "2.13.0+cpu", None)
    with pytest.raises(UserError, match=r"0\.5\.9 .* older than 0\.5\.10 .*CVE-2026-3059.*create\.sh"):
        check_environment(fake_python(tmp_path / "old", "0.5.9"))
    with pytest.raises(UserError, match=r"no Python that can be started.*create\.sh"):
        check_environment(tmp_path / "absent")
    with pytest.raises(UserError, match=r"not installed .*create\.sh"):
        check_environment(Path(sys.executable))  # the trainer's has none
    with pytest.raises(UserError, match="exit status 1"):
        check_environment(Path("/bin/false"))
    with pytest.raises(UserError, match="does not answer as a Python does"):
        check_environment(Path("/bin/echo"))


def test_the_servers_nccl_library_is_found(tmp_path: Path) -> None:
    """As pip installs it: the error about two versions of NCCL names the file to load."""
    import venv

    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    for name, version in (("sglang", "0.5.23"), ("torch", "2.13.0"), ("nvidia_nccl_cu13", "2.30.7")):
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text("nvidia/nccl/lib/libnccl.so.2,,\n")
    found = check_environment(tmp_path / "venv" / "bin" / "python")
    assert (found.nccl, found.nccl_library) == ("2.30.7", str(packages / "nvidia" / "nccl" / "lib" / "libnccl.so.2"))


def test_ipc_arguments_are_those_of_the_servers_torch(tmp_path: Path) -> None:
    assert ipc_arguments(fake_python(tmp_path, ipc='["tensor_cls", "storage_device"]')) == (
        "tensor_cls",
        "storage_device",
    )
