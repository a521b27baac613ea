"""`asd-megatron serve`: start SGLang servers of a model on this machine, and keep them running until Ctrl-C.

The servers are OpenAI-compatible: any OpenAI client works with `URL/v1` as its base URL and the generation key.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from asd_megatron.distributed.addresses import resolve
from asd_megatron.errors import UserError, hub_hint, plural
from asd_megatron.rollout.sglang.client.api import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from asd_megatron.rollout.sglang.servers.keys import Keys
from asd_megatron.rollout.sglang.servers.options import ServerOptions, devices_of_servers, parse_arguments, pass_through
from asd_megatron.rollout.sglang.servers.pool import ServerPool
from asd_megatron.rollout.sglang.servers.versions import check_environment

LOOK_SECONDS = 0.5
QUESTION = "What is 6 * 7?"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asd-megatron serve",
        usage="asd-megatron serve MODEL [--option value ...] [-- SGLang's own arguments]",
        description="Start SGLang servers of a model on this machine and keep them running until Ctrl-C."
        " A run uses them with `rollout.server_urls`, any OpenAI client with URL/v1 as its base URL.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="a Hugging Face folder")
    parser.add_argument(
        "--servers", type=int, metavar="N", help="number of servers [one for each entry of --devices, else 1]"
    )
    parser.add_argument(
        "--devices", nargs="+", default=[], metavar="IDS", help="CUDA devices of each server: --devices 0,1 2,3"
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs of one server [1]")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address or name of the one interface to listen on [127.0.0.1: this machine only]",
    )
    parser.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help="keys of an earlier start, the keys.env of its log folder, so that several nodes have the same"
        " [those of the environment, else new ones]",
    )
    parser.add_argument("--port", type=int, default=0, help="of the first server, the others follow [0: free ports]")
    parser.add_argument("--dtype", default="auto", help="as SGLang names it [auto: the model's; float32 without GPUs]")
    parser.add_argument("--context-length", type=int, metavar="TOKENS", help="prompt and response [the model's limit]")
    parser.add_argument(
        "--python", type=Path, default=Path(".venv-sglang/bin/python"), help="of SGLang's environment [%(default)s]"
    )
    parser.add_argument("--log-folder", type=Path, default=Path("runs/servers"), help="[%(default)s]")
    parser.add_argument("--router", action="store_true", help="start an sglang-router in front of the servers")
    parser.add_argument("--start-timeout", type=float, default=900.0, metavar="SECONDS", help="[%(default)s]")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the servers; returns 0 after Ctrl-C or SIGTERM, 1 when every server has been given up."""
    words = list(argv)
    split = words.index("--") if "--" in words else len(words)
    given = _parser().parse_args(words[:split])
    arguments = parse_arguments(words[split + 1 :])
    check_model_and_environment(given.model, given.python)
    server_keys, file = keys(os.environ, given.log_folder, given.keys)
    options = server_options(given, arguments, server_keys)
    for name in pass_through(options[0]):
        print(f"passed on to SGLang unchecked: --{name}")
    print(f"starting {plural(len(options), 'SGLang server')} of {given.model}, logs in {given.log_folder}", flush=True)
    pool = ServerPool(options, given.log_folder, start_timeout=given.start_timeout, router=given.router, say=_say)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with pool:
            print("\n".join([*pool.urls, *([f"{pool.router_url}  (router)"] if pool.router_url else [])]))
            print(_keys_line(file))
            print(
                "OpenAI-compatible API under URL/v1; to try it, in a terminal" + " with the keys" * (file is None) + ":"
            )
            print(f"  {curl_line(pool.router_url or pool.urls[0], given.model, file)}")
            print("ready; Ctrl-C ends the servers", flush=True)
            while set(pool.states) != {"given up"}:
                time.sleep(LOOK_SECONDS)
        print("error: every server has been given up", flush=True)
        return 1
    except KeyboardInterrupt:
        print("the servers have ended", flush=True)
        return 0


def check_model_and_environment(model: Path, python: Path) -> None:
    """Raise UserError for a model that is no folder, and for a `--python` without a usable SGLang."""
    if not (model / "config.json").is_file():
        raise UserError(f"{model} is no Hugging Face model folder: it has no config.json{hub_hint(model)}")
    try:
        check_environment(python)
    except UserError as error:
        raise UserError(f"{error} with --python") from None


def server_options(
    given: argparse.Namespace, arguments: Mapping[str, object], server_keys: Keys
) -> list[ServerOptions]:
    """Options of every server. Raises UserError for numbers that cannot be."""
    servers = len(given.devices) or 1 if given.servers is None else given.servers
    if servers < 1 or given.tensor_parallel < 1:
        raise UserError("--servers and --tensor-parallel are at least 1")
    devices = devices_of_servers(given.devices, servers, given.tensor_parallel)
    host = resolve(given.host, "--host:")
    return [
        ServerOptions(
            python=given.python,
            model=given.model,
            tensor_parallel=given.tensor_parallel,
            devices=devices[index],
            host=host,
            port=given.port + index if given.port else 0,
            api_key=server_keys.api,
            admin_key=server_keys.admin,
            dtype=given.dtype,
            context_length=given.context_length,
            arguments=arguments,
        )
        for index in range(servers)
    ]


def keys(environment: Mapping[str, str], folder: Path, file: Path | None = None) -> tuple[Keys, Path | None]:
    """The keys, and the file that holds them: those of `file`; else of the environment, without a file; else new ones
    in a file of `folder` that its owner alone can read. Raises UserError if one is missing, or both are the same."""
    if file is not None:
        return Keys.read(file), file.absolute()
    given = Keys.of_environment(environment)
    if given.api and given.admin:
        given.check("environment")
        return given, None
    if given.api or given.admin:
        raise UserError(f"set both {API_KEY_VARIABLE} and {ADMIN_KEY_VARIABLE}, or none of them")
    path = (folder / "keys.env").absolute()
    made = Keys.new()
    made.write(path)
    return made, path


def _keys_line(file: Path | None) -> str:
    if file is None:
        return f"keys: those of {API_KEY_VARIABLE} and {ADMIN_KEY_VARIABLE}"
    return f"keys: in {file} (for a run: --rollout.server_keys {shlex.quote(str(file))})"


def curl_line(url: str, model: Path, file: Path | None) -> str:
    """A shell command that asks the server at `url` a question: a chat completion for a model with a chat template, a
    plain completion otherwise. It reads the generation key from `file` (None: from the environment), so that the
    terminal does not show it."""
    body: dict[str, object]
    if _has_chat_template(model):
        path, body = "chat/completions", {"messages": [{"role": "user", "content": QUESTION}]}
    else:
        path, body = "completions", {"prompt": QUESTION}
    request = json.dumps({"model": "default", **body, "max_tokens": 64})
    words = ["curl", "--noproxy", "*", "-sS", f"{url}/v1/{path}", "-H", "Content-Type: application/json"]
    load = [] if file is None else [f". {shlex.quote(str(file))};"]
    key = f'-H "Authorization: Bearer ${API_KEY_VARIABLE}"'
    return " ".join([*load, shlex.join(words), key, "-d", shlex.quote(request)])


def _has_chat_template(model: Path) -> bool:
    if (model / "chat_template.jinja").is_file() or (model / "chat_template.json").is_file():
        return True
    try:
        config = json.loads((model / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
