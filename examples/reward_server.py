"""A reward server for `reward.name: http` (docs/rewards.md): 1 for a response that ends with the answer, else 0.

(umask 077; python -c 'import secrets; print(secrets.token_hex())' > reward.key)
python examples/reward_server.py reward.key 9000
asd-megatron train RECIPE --reward.name http --reward.http.url http://127.0.0.1:9000 --reward.http.key_file reward.key
"""

import hmac
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def reward(problem: dict, response: str, truncated: bool) -> float | None:
    """The reward of one response; None: it cannot be scored."""
    return float(response.rstrip(" .\n").endswith(problem["answer"]) and not truncated)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    key = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        given = self.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            self.answer(401, {"error": "wrong key"})
            return
        rewards = [reward(r["problem"], r["response"], r["truncated"]) for r in json.loads(body)["responses"]]
        self.answer(200, {"rewards": rewards})

    def answer(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    Handler.key = Path(sys.argv[1]).read_text().strip()
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler) as server:
        print(f"listening on port {server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
