"""A local HTTP server in a thread, for the time of a block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any, TypeVar

ServerT = TypeVar("ServerT", bound=ThreadingHTTPServer)


@contextmanager
def running(server: ServerT) -> Iterator[ServerT]:
    """The server, which has an event `stopping` for replies that wait."""
    stoppable: Any = server
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        stoppable.stopping.set()
        server.shutdown()
        thread.join()
