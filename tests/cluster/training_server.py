"""A stand-in for an SGLang server that takes part in training: it receives weights over gloo, in the process group that
the trainer invites it to, and what it answers depends on them.

A response is drawn from a hash of the weights, the prompt and the request's seed, so that a run repeats exactly. It
needs seconds less to start than a real one.
"""

from __future__ import annotations

import hashlib
import http.server
import importlib
import json
import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = timedelta(seconds=20)
GENERATION_SECONDS = 0.1


def main() -> None:
    value = {name: text for name, text in zip(sys.argv, sys.argv[1:], strict=False) if name.startswith("--")}
    keys = dict(word.split("=", 1) for word in sys.argv if word.startswith(("--api-key=", "--admin-api-key=")))
    server = Server(Path(value["--model-path"]), keys["--api-key"], keys["--admin-api-key"])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(*server.get(self.path, self.headers.get("Authorization", "")))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            self.answer(*server.post(self.path, body, self.headers.get("Authorization", "")))

        def answer(self, status: int, body: Mapping[str, Any]) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None: ...

    print(f"serving at {value['--host']}", flush=True)
    http.server.ThreadingHTTPServer((value["--host"], int(value["--port"])), Handler).serve_forever()


class Server:
    """What it answers: (HTTP status, JSON)."""

    def __init__(self, model: Path, api_key: str, admin_key: str) -> None:
        config = json.loads((model / "config.json").read_text())
        self.vocab_size, self.architectures = config["vocab_size"], config["architectures"]
        self.keys = {False: f"Bearer {api_key}", True: f"Bearer {admin_key}"}
        self.label, self.weights = "default", hashlib.sha256(b"")
        self.groups: dict[str, dist.ProcessGroup] = {}

    def get(self, path: str, key: str) -> tuple[int, dict[str, Any]]:
        if path == "/health":
            return 200, {}
        if key != self.keys[False]:
            return 401, {"error": "Unauthorized"}
        info = {"version": "0.5.23", "tp_size": 1, "weight_version": self.label, "architectures": self.architectures}
        return 200, info

    def post(self, path: str, body: dict[str, Any], key: str) -> tuple[int, dict[str, Any]]:
        if key != self.keys[path != "/generate"]:
            return 401, {"error": "Unauthorized"}
        if path == "/generate":
            return self.generate(body)
        if path == "/begin_weight_update":
            self.weights = hashlib.sha256(b"")
        elif path == "/init_weights_update_group":
            self.join(body)
        elif path == "/destroy_weights_update_group":
            self.groups.pop(body["group_name"], None)
        elif path == "/update_weights_from_distributed":
            if body["group_name"] not in self.groups:
                return 400, {"success": False, "message": "no such group"}
            self.receive(body)
        elif path == "/update_weight_version":
            self.label = body["new_version"]
        return 200, {"success": True}

    def join(self, body: dict[str, Any]) -> None:
        """As SGLang's own helper does."""
        c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")
        name, size, rank = body["group_name"], body["world_size"], body["rank_offset"]
        client = dist.TCPStore(body["master_address"], body["master_port"], None, False, LIMIT)
        store = dist.PrefixStore(name, client)
        group, _ = c10d._new_process_group_helper(
            size, rank, [], c10d.Backend("gloo"), store, group_name=name, timeout=LIMIT
        )
        c10d._world.pg_group_ranks[group] = {r: r for r in range(size)}
        self.groups[name] = group

    def receive(self, body: dict[str, Any]) -> None:
        sizes = [
            math.prod(shape) * getattr(torch, kind).itemsize
            for shape, kind in zip(body["shapes"], body["dtypes"], strict=True)
        ]
        if not sizes:
            return
        data = torch.empty(sum(sizes), dtype=torch.uint8)
        self.groups[body["group_name"]].broadcast([data], dist.BroadcastOptions()).wait()
        self.weights.update(data.numpy().tobytes())

    def generate(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if max(body.get("token_ids_logprob") or [0]) >= self.vocab_size:
            return 400, {"error": "unknown token"}
        time.sleep(GENERATION_SECONDS)
        sampling, seen = body["sampling_params"], self.weights.copy()
        seen.update(json.dumps([body["input_ids"], sampling.get("sampling_seed")]).encode())
        ids = [byte % self.vocab_size for byte in seen.digest()[: sampling["max_new_tokens"]]]
        meta = {
            "finish_reason": {"type": "length"},
            "weight_version": self.label,
            "weight_versions": [{"version": self.label, "start": 0, "end": len(ids)}],
            "output_token_logprobs": [[-1.0, token, None] for token in ids],
        }
        return 200, {"output_ids": ids, "meta_info": meta}
