"""A real HTTP server on this machine that fails in the ways tracking servers and what stands before them do."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from running_server import running


class FaultyServer(ThreadingHTTPServer):
    def __init__(self, fault: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault = fault
        """A status to answer every request with, or hang, drip, reset, html, json, or old: MLflow 2."""
        self.stopping = threading.Event()
        self.requests = 0


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests += 1
        fault = self.server.fault
        if fault == "hang":
            self.server.stopping.wait()
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif fault == "drip":
            self._answer(200, b"", length=1_000_000)
            while not self.server.stopping.wait(0.05):
                self.wfile.write(b" ")
        elif fault in ("html", "json"):
            self._answer(200, b"<html>\nWelcome" if fault == "html" else b'{"status": "ok"}')
        elif fault == "old" and "/experiments/search" in self.path:
            self._answer(200, b"{}")
        elif fault == "old" and "/experiments/get?" in self.path:
            experiment_id = parse_qs(urlsplit(self.path).query)["experiment_id"][0]
            experiment = {"experiment_id": experiment_id, "lifecycle_stage": "active", "artifact_location": "s3://b"}
            self._answer(200, json.dumps({"experiment": experiment}).encode())
        elif fault == "old":
            self._answer(404, b"<html>")
        else:
            self._answer(int(fault), b"<html>\nsomething secret went wrong")

    def _answer(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def faulty_server(fault: str) -> Iterator[FaultyServer]:
    with running(FaultyServer(fault)) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the client hung up
        yield server
