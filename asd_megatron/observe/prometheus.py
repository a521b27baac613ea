"""The last step's metrics for Prometheus: a small HTTP server on the loopback interface. Global rank 0 only."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from asd_megatron.errors import UserError
from asd_megatron.files import system_reason
from asd_megatron.observe.names import declared

ADDRESS = "127.0.0.1"
PREFIX = "asd_megatron_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_SECONDS = 5.0


def sample_name(metric: str) -> str:
    """`gpu/power_w` as `asd_megatron_gpu_power_w`."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", metric)


def exposition(step: int, metrics: Mapping[str, float], run: str) -> str:
    """Prometheus' text format, all gauges with the label `run`; numbers that do not exist are left out."""
    label = run.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines: list[str] = []
    for name, value in {"step": float(step), **metrics}.items():
        if not math.isfinite(value):
            continue
        metric, shown = declared(name), sample_name(name)
        text = f"{metric.meaning} ({metric.unit})" if metric is not None else name
        escaped = text.replace("\\", r"\\").replace("\n", r"\n")
        lines += [f"# HELP {shown} {escaped}", f"# TYPE {shown} gauge", f'{shown}{{run="{label}"}} {value!r}']
    return "\n".join(lines) + "\n"


class MetricsServer:
    """Serves what was published last at http://127.0.0.1:PORT/metrics, on daemon threads, until `close`. Raises
    UserError when the port cannot be used."""

    def __init__(self, port: int, run: str) -> None:
        self._run = run
        self._text = b"\n"
        server = self

        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_SECONDS

            def do_GET(self) -> None:
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404)
                    return
                text = server._text
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                """No access log on the run's console."""

        try:
            self._server = _Server((ADDRESS, port), Handler)
        except OSError as error:
            raise UserError(
                f"logging.prometheus_port {port} cannot be used on {ADDRESS} ({system_reason(error)}): choose another"
                " port, or set logging.prometheus_port null"
            ) from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics server", daemon=True
        )
        self._thread.start()

    def publish(self, step: int, metrics: Mapping[str, float]) -> None:
        """Replace what is served."""
        self._text = exposition(step, metrics, self._run).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        """Without the look-up of the address's name, which may ask a slow name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing is printed about clients that disconnect."""
