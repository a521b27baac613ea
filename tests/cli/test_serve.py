"""`asd-megatron serve`: what it starts, what it says, where the keys are, how it ends."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import asd_megatron
from asd_megatron.cli.main import main
from asd_megatron.cli.serve import curl_line, keys, server_options
from asd_megatron.errors import UserError
from asd_megatron.rollout.sglang.servers.keys import Keys
from tests.rollout.sglang.fake_environment import fake_python, group_members
from tests.rollout.sglang.sglang_world import request, sglang_python

SECONDS = 60.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_servers_from_start_to_end(model: Path, tmp_path: Path) -> None:
    """The printed curl command is run as it stands, in a folder whose name has a space."""
    words = [str(model), "--servers", "2", "--python", str(fake_python(tmp_path / "environment")), "--log-folder"]
    words += [str(tmp_path / "the logs"), "--router", "--", "--max-running-requests", "3"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ASD_MEGATRON_")}
    command = [sys.executable, "-m", "asd_megatron.cli.main", "serve", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as serve:
        try:
            assert serve.stdout is not None
            said = ""
            while "ready" not in said and (line := serve.stdout.readline()):
                said += line
            assert "passed on to SGLang unchecked: --max-running-requests\n" in said
            urls = re.findall(r"^http://127.0.0.1:\d+", said, re.MULTILINE)
            assert len(urls) == 3 and [request(url, "/health")[0] for url in urls] == [200] * 3
            assert "OpenAI-compatible" in said and urls[2] in curl(said)  # the router
            asked = subprocess.run(curl(said), shell=True, capture_output=True, text=True, timeout=SECONDS)
            answer = json.loads(asked.stdout)
            assert answer["path"] == "/v1/completions" and answer["body"]["max_tokens"] > 0
            path = tmp_path / "the logs" / "keys.env"
            assert f"keys: in {path}" in said and path.stat().st_mode & 0o077 == 0
            made = dict(re.findall(r"export (\w+)=(\S{30,})", path.read_text()))
            log = (tmp_path / "the logs" / "server_0.log").read_text()
            assert f"'--admin-api-key={made['ASD_MEGATRON_ADMIN_KEY']}'" in log
            assert "'--max-running-requests', '3'" in log
            groups = [int(pid) for pid in children(serve.pid)]
            assert len(groups) == 3
            serve.send_signal(signal.SIGTERM)
            rest = serve.stdout.read()
            assert serve.wait(SECONDS) == 0 and "the servers have ended" in rest
            assert [group_members(group) for group in groups] == [[], [], []]
        finally:
            serve.kill()


def curl(said: str) -> str:
    (line,) = [line for line in said.splitlines() if "curl " in line]
    return line.strip()


def children(pid: int) -> list[str]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


def given(model: Path, **over: Any) -> argparse.Namespace:
    values = {"servers": None, "devices": [], "tensor_parallel": 1, "host": "127.0.0.1", "port": 0, "dtype": "auto"}
    return argparse.Namespace(**{**values, "context_length": None, "python": Path("p"), "model": model, **over})


def test_ports_and_devices_in_order(model: Path) -> None:
    options = server_options(
        given(model, devices=["0,1", "2,3"], tensor_parallel=2, port=30000), {"x": "y"}, Keys("a", "b")
    )
    assert [(o.devices, o.port) for o in options] == [("0,1", 30000), ("2,3", 30001)]
    assert {(o.api_key, o.admin_key, o.arguments["x"]) for o in options} == {("a", "b", "y")}
    assert [o.port for o in server_options(given(model, host="localhost"), {}, Keys("a", "b"))] == [0]


def test_what_cannot_be_served(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    with pytest.raises(UserError, match="at least 1"):
        server_options(given(model, servers=0), {}, Keys("a", "b"))
    with pytest.raises(UserError, match=r"--host: 'no-such-host\.invalid' cannot be resolved"):
        server_options(given(model, host="no-such-host.invalid"), {}, Keys("a", "b"))
    with monkeypatch.context() as names:  # as Debian's /etc/hosts names a machine
        names.setattr("socket.getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.1.1", 0))])
        with pytest.raises(UserError, match=r"--host: 'node1' is 127\.0\.1\.1 on this machine.*correct /etc/hosts"):
            server_options(given(model, host="node1"), {}, Keys("a", "b"))
    assert main(["serve", str(model / "absent")]) == 2
    assert "is no Hugging Face model folder" in capsys.readouterr().err
    assert main(["serve", str(model), "--python", "/no/python"]) == 2
    said = capsys.readouterr()
    assert "create.sh" in said.err and "--python" in said.err
    assert "starting" not in said.out and not (model / "runs").exists()  # no keys either


def test_keys_of_the_environment(tmp_path: Path) -> None:
    both = {"ASD_MEGATRON_API_KEY": "a", "ASD_MEGATRON_ADMIN_KEY": "b"}
    assert keys(both, tmp_path) == (Keys("a", "b"), None) and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="set both"):
        keys({"ASD_MEGATRON_API_KEY": "a"}, tmp_path)
    with pytest.raises(UserError, match="are the same"):
        keys(dict.fromkeys(both, "a"), tmp_path)


def test_made_keys_are_new_each_time_and_can_be_given_to_other_nodes(tmp_path: Path) -> None:
    (first, _), (second, path) = keys({}, tmp_path), keys({}, tmp_path)
    assert len({first.api, first.admin, second.api, second.admin}) == 4
    assert path == tmp_path / "keys.env" and path.stat().st_mode & 0o077 == 0
    both = {"ASD_MEGATRON_API_KEY": "a", "ASD_MEGATRON_ADMIN_KEY": "b"}
    assert keys(both, tmp_path / "other", path) == (second, path) and not (tmp_path / "other").exists()
    path.chmod(0o640)
    with pytest.raises(UserError, match="can be read by others: chmod 600"):
        Keys.read(path)
    path.chmod(0o600)
    path.write_text("ASD_MEGATRON_API_KEY='a'\n# ASD_MEGATRON_ADMIN_KEY=b\n")
    with pytest.raises(UserError, match="has not both keys"):
        Keys.read(path)
    path.write_bytes("ASD_MEGATRON_API_KEY=ä\nASD_MEGATRON_ADMIN_KEY=b\n".encode("latin-1"))
    with pytest.raises(UserError, match="has not both keys"):
        Keys.read(path)
    with pytest.raises(UserError, match=r"keys.env cannot be read .*No such file"):
        Keys.read(tmp_path / "absent" / "keys.env")


def test_a_model_with_a_chat_template_is_asked_in_chat(model: Path) -> None:
    """With the keys in the environment, the command reads them there."""
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    line = curl_line("http://127.0.0.1:30000", model, None)
    words = shlex.split(line)
    assert words[0] == "curl" and "http://127.0.0.1:30000/v1/chat/completions" in words
    assert '"Authorization: Bearer $ASD_MEGATRON_API_KEY"' in line  # in double quotes: the shell fills the key in
    assert json.loads(words[words.index("-d") + 1])["messages"][0]["role"] == "user"
    (model / "tokenizer_config.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert "/chat/completions" in curl_line("http://127.0.0.1:30000", model, None)


@pytest.mark.sglang
def test_a_real_server_answers_the_printed_line_and_ends_with_a_killed_command(tmp_path: Path) -> None:
    """The puzzle's model, which has a chat template."""
    model = Path(asd_megatron.__file__).parent / "puzzle" / "warm_start"
    command = [sys.executable, "-m", "asd_megatron.cli.main", "serve", str(model), "--python", str(sglang_python())]
    with subprocess.Popen([*command, "--log-folder", str(tmp_path)], stdout=subprocess.PIPE, text=True) as serve:
        try:
            assert serve.stdout is not None
            said = ""
            while "ready" not in said and (line := serve.stdout.readline()):
                said += line
            asked = subprocess.run(curl(said), shell=True, capture_output=True, text=True, timeout=SECONDS)
            answer = json.loads(asked.stdout)
            assert answer["object"] == "chat.completion" and answer["choices"][0]["message"]["content"]
            started = [
                int(pid) for f in Path(f"/proc/{serve.pid}/task").glob("*/children") for pid in f.read_text().split()
            ]
            members = [pid for server in started for pid in group_members(server)]
            assert any(b"sglang::scheduler" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in members)
            serve.kill()
            deadline = time.monotonic() + SECONDS
            while left := [pid for server in started for pid in group_members(server)]:
                assert time.monotonic() < deadline, left
                time.sleep(0.1)
        finally:
            serve.kill()
