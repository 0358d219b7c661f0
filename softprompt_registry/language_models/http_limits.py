"""What an HTTP client does not do by itself: end the wait for a silent server, and an answer that drips in for ever.

Knows the client by its documented hooks only, because `openai` 2 and 3 bring different ones.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any


class OpenSockets:
    """The sockets of a client, to be cut when it closes: closing one alone does not wake the thread that reads from it."""

    def __init__(self) -> None:
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._is_cut = False

    def watch(self, request: Any) -> None:
        """An event hook for the client's requests."""
        request.extensions["trace"] = self._on_event

    def _on_event(self, name: str, info: dict[str, Any]) -> None:
        if name.endswith(("connect_tcp.complete", "start_tls.complete")):
            opened = info["return_value"].get_extra_info("socket")
            if opened is not None:
                with self._lock:
                    self._sockets.add(opened)
                    is_cut = self._is_cut
                if is_cut:
                    _shut_down(opened)

    def cut(self) -> None:
        """End every connection, and those that are still being opened as soon as they are."""
        with self._lock:
            self._is_cut = True
            sockets = list(self._sockets)
        for opened in sockets:
            _shut_down(opened)


def _shut_down(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side was first
        opened.shutdown(socket.SHUT_RDWR)


def joined_until(chunks: Iterable[bytes], deadline: float) -> bytes:
    """The chunks of an answer as one; a `TimeoutError` when they are still coming at `deadline` (monotonic seconds)."""
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if time.monotonic() >= deadline:
            raise TimeoutError("the answer was still coming in at the deadline")
    return bytes(content)
