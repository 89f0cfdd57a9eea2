"""What a client says while it has no lease: what needs a server connection, and what is ignored.

Pure. Of a refused cycle the rest is ignored, as a server does after an error: the rest of a simple
query, or everything up to Sync. Owns how much of that is still to come.
"""

from typing import Final

from sidecar.protocol import messages as m
from sidecar.proxy.requests import INSPECTED, check_header

_NEEDS_SERVER: Final = frozenset(
    {m.QUERY, m.PARSE, m.BIND, m.DESCRIBE, m.EXECUTE, m.CLOSE, m.SYNC, m.FUNCTION_CALL}
)
"""Without a lease the others have nothing to apply to: Flush, and the rest of a copy that failed."""

# What ``find`` may come upon.
NOTHING: Final = 0  # more bytes have to come first
NEED: Final = 1  # a message that needs a server connection
IGNORED_SYNC: Final = 2  # the end of an ignored cycle: ReadyForQuery is due
GOODBYE: Final = 3  # Terminate


class Unleased:
    """The messages of one client, as long as it has no lease."""

    __slots__ = ("_ignored", "_ignores_to_sync", "found")

    def __init__(self) -> None:
        self._ignored = 0  # bytes of a message that are still to come
        self._ignores_to_sync = False
        self.found = NOTHING

    def find(self, data: bytes, pos: int) -> int:
        """Go on from ``pos`` up to the next thing to be done: ``found`` says what it is.

        Returns the position of the message, or behind it where it needs nothing more. Raises
        ClientProtocolError.
        """
        size = len(data)
        self.found = NOTHING
        while pos < size:
            if self._ignored:
                ignored = min(self._ignored, size - pos)
                self._ignored -= ignored
                pos += ignored
                continue
            if size - pos < 5:
                break
            kind = data[pos]
            length = data[pos + 4]
            if data[pos + 1] or data[pos + 2] or data[pos + 3]:
                length = m.length_at(data, pos)
            if kind not in _NEEDS_SERVER or length < 4 or length >= size - pos:
                check_header(kind, length)
                if kind == m.TERMINATE:
                    self.found = GOODBYE
                    break
            if self._ignores_to_sync or kind not in _NEEDS_SERVER:
                self._ignored = 1 + length
                if self._ignores_to_sync and kind == m.SYNC:
                    self._ignores_to_sync = False
                    self.found = IGNORED_SYNC
                    break
                continue
            if size - pos > length or size - pos >= INSPECTED:
                self.found = NEED  # who is still writing does not need a connection yet
            break
        return pos

    def ignore_cycle(self, data: bytes, pos: int) -> bool:
        """The cycle that begins here is refused. True if ReadyForQuery is due at once."""
        kind, length = m.HEADER.unpack_from(data, pos)
        if kind == m.QUERY or kind == m.FUNCTION_CALL:
            self._ignored = 1 + length
            return True
        self._ignores_to_sync = True
        return False

    def ignore_to_sync(self) -> None:
        self._ignores_to_sync = True
