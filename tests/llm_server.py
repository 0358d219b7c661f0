"""A real HTTP server on this machine that speaks OpenAI's API and replies what each test writes down."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-0123456789abcdef"


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: Any = None
    """Sent as JSON, or as it is when it is bytes; None: the prompt in upper case, as a chat completion."""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: bool = False
    """Close the connection in the middle of the body."""
    drip: bool = False
    """Send a space every 50 ms, as some providers do to keep a connection open, and never an answer."""


@dataclass(frozen=True)
class Received:
    path: str
    authorization: str | None
    body: dict[str, Any]
    at: float
    api_key: str | None = None
    """The header that Azure takes the key in."""


class LlmServer(ThreadingHTTPServer):
    """Answers with `replies` in order, then by upper-casing; or by the prompt or the whole body, where `reply_to` or
    `reply_to_body` is set."""

    daemon_threads = False  # server_close() waits for every handler, so no socket outlives the test

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list[Reply] = []
        self.reply_to: Callable[[str], Reply] | None = None
        self.reply_to_body: Callable[[dict[str, Any]], Reply] | None = None
        self.received: list[Received] = []
        self.most_at_once = 0
        self.at_once = 0
        self.lock = threading.Lock()
        self.stopping = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client hung up: several tests want that
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: LlmServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        content = self.rfile.read(length := int(self.headers["Content-Length"]))
        if len(content) < length:  # the client was killed
            self.close_connection = True
            return
        body = json.loads(content)
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        with server.lock:
            received = Received(
                self.path, self.headers["Authorization"], body, time.monotonic(), self.headers["api-key"]
            )
            server.received.append(received)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            if server.reply_to_body is not None:
                reply = server.reply_to_body(body)
            elif server.reply_to is not None:
                reply = server.reply_to(prompt)
            else:
                reply = server.replies.pop(0) if server.replies else Reply()
        server.stopping.wait(reply.delay_s)
        with server.lock:
            server.at_once -= 1  # before the answer leaves: after it the client may already send the next request
        self._send(reply, prompt)

    def _send(self, reply: Reply, prompt: str) -> None:
        content = chat(prompt.upper()) if reply.body is None else reply.body
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(reply.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if not reply.drip else 1_000_000))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if reply.cut:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif reply.drip:
            while not self.server.stopping.wait(0.05):
                self.wfile.write(b" ")
        else:
            self.wfile.write(content)


def chat(
    text: str | None, *, finish_reason: str = "stop", prompt_tokens: int = 7, completion_tokens: int = 3
) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason},
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def error_body(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "code": code}}
