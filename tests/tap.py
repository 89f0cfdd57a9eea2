"""A port that leads to another one: what passes is kept, and may be changed or held up."""

import socket
import threading
from collections.abc import Callable, Mapping
from typing import Self

from tests.sidecar_process import PATIENCE


class Tap:
    """Keeps what clients said. What the server says can be changed. A connection has threads of its own;
    those that look at how it begins override ``serve``, others ``books``."""

    def __init__(self, to: int, instead: Mapping[bytes, bytes] | None = None) -> None:
        self._to = to
        self._instead = instead or {}
        self.seen: list[bytes] = []
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._socket, *self._sockets):
            end(each)
        for thread in self._threads:
            thread.join(PATIENCE)
        for each in (self._socket, *self._sockets):
            each.close()

    def serve(self, client: socket.socket) -> None:
        self.pass_on(client)

    def books(self) -> tuple[list[bytes], list[bytes]]:
        """Where to keep what is said on a new connection, by the client and by the server."""
        return self.seen, []

    def pass_on(self, client: socket.socket, head: bytes = b"") -> None:
        """Both ways, until the end. ``head`` has been read of the client already."""
        said, answered = self.books()
        server = socket.create_connection(("127.0.0.1", self._to))
        self._sockets.append(server)
        server.sendall(head)
        self._start(_pass, server, client, answered, self._instead)
        _pass(client, server, said, {})

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self._sockets.append(client)
            self._start(self.serve, client)


def end(sock: socket.socket) -> None:
    """Wake who waits for it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended already


def _pass(
    source: socket.socket, sink: socket.socket, seen: list[bytes], instead: Mapping[bytes, bytes]
) -> None:
    try:
        while data := source.recv(65536):
            seen.append(data)
            for old, new in instead.items():
                data = data.replace(old, new)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other direction ended it
