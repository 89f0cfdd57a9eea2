"""Receives pages: the webhooks of Alertmanager's receivers, on a thread of its own.

Each path is a receiver: ``/pager``, ``/chat``. Format: Alertmanager's webhook, version 4.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from deploy.observe.processes import HOST

_LONGEST = 1 << 20  # bytes of one notification


@dataclass(frozen=True, slots=True)
class Page:
    """One alert in one notification."""

    at: float  # time.monotonic()
    receiver: str
    status: str  # firing or resolved
    labels: dict[str, str]
    annotations: dict[str, str]

    @property
    def alert(self) -> str:
        return self.labels["alertname"]


class Receiver:
    def __init__(self, told: Callable[[Page], None] | None = None) -> None:
        """``told`` is called for each page, on the receiver's thread."""
        self.pages: list[Page] = []
        self._told = told
        self._server = ThreadingHTTPServer((HOST, 0), self._handler())

    def url(self, receiver: str) -> str:
        return f"http://{HOST}:{self._server.server_port}/{receiver}"

    @contextmanager
    def running(self) -> Iterator["Receiver"]:
        thread = threading.Thread(target=self._server.serve_forever, name="receiver", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _take(self, receiver: str, body: Any) -> None:
        now = time.monotonic()
        for alert in body["alerts"]:
            page = Page(now, receiver, alert["status"], alert["labels"], alert["annotations"])
            self.pages.append(page)
            if self._told is not None:
                self._told(page)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        take = self._take

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # seconds; nobody else is to talk to it

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                if not 0 < length <= _LONGEST:
                    self.send_error(413)
                    return
                take(self.path.strip("/"), json.loads(self.rfile.read(length)))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: what is received is told by ``told``."""

        return Handler
