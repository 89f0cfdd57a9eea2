"""What is written to the server instead of a client's bytes.

Pure. Owns the pieces of one write: what stays of the client's bytes, and what is put in between or in
their place. Where nothing changes there are no pieces, and nothing is copied. Also what the server
gets in place of a message that is refused, and the error that the client is told then (``replies``).
"""

from typing import Final

from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy import expect

# In place of a statement that the pool refuses: certain to fail, whatever the state, and found in
# the server's log by those who wonder. What the client is told is ours (``replies``).
_REFUSED: Final = b"REFUSED /* by pgsidecar: the client is told why */"
_REFUSED_QUERY: Final = m.query(_REFUSED)
_REFUSED_PARSE: Final = m.parse(b"", _REFUSED + b"\0\0\0")


class Rewriter:
    """The next write to the server. All positions are in the client's bytes, ``data``, and go up."""

    __slots__ = ("_done", "pieces")

    def __init__(self) -> None:
        self.pieces: list[bytes] | None = None  # None: as the client has sent it
        self._done = 0  # up to here ``data`` is in the pieces, or left out

    def insert(self, data: bytes, pos: int, piece: bytes) -> None:
        """Before what begins at ``pos``."""
        pieces = self.pieces
        if pieces is None:
            pieces = self.pieces = []
        if self._done < pos:
            pieces.append(data[self._done : pos])
            self._done = pos
        pieces.append(piece)

    def replace(self, data: bytes, pos: int, end: int, instead: bytes) -> None:
        self.insert(data, pos, instead)
        self._done = end

    def refuse_query(
        self, server: ServerConnection, data: bytes, pos: int, end: int, refusal: bytes
    ) -> None:
        """``refusal``: the ErrorResponse that the client gets."""
        self.replace(data, pos, end, _REFUSED_QUERY)
        server.expected.append(expect.REFUSED_QUERY)
        server.refusals.append(refusal)

    def refuse_parse(
        self, server: ServerConnection, data: bytes, pos: int, end: int, refusal: bytes
    ) -> None:
        """As ``refuse_query``, in the extended protocol: what follows is skipped up to Sync."""
        self.replace(data, pos, end, _REFUSED_PARSE)
        server.expected.append(expect.REFUSED_PARSE)
        server.refusals.append(refusal)

    def take(self, data: bytes, end: int) -> bytes:
        """All of it, the rest of ``data`` up to ``end`` included."""
        pieces = self.pieces
        assert pieces is not None
        pieces.append(data[self._done : end])
        self.pieces = None
        self._done = 0
        return b"".join(pieces)
