"""Prepared statements that clients name, on connections they do not own.

Pure. In transaction mode a client's statement may be missing on the connection it gets, and two
clients may use one name for different texts. So a statement has a name of ours on every server
connection, derived from text, parameter types and the settings they are parsed by; ``statements``
renames, and sends a Parse first where a connection lacks it. Statements are shared by all clients of a
pool and forgotten with the last of them; how many one server connection keeps is bounded (least
recently used first out).
"""

from itertools import count
from typing import Final
from weakref import WeakValueDictionary

from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.sql import Query

PREFIX: Final[bytes] = b"pgsidecar_"


class Prepared:
    """A statement that clients of a pool prepared by name: text, parameter types and dialect are
    its identity, the name is the one it has on server connections."""

    __slots__ = ("__weakref__", "dialect", "is_stale", "name", "parse", "query", "shape")

    def __init__(self, name: bytes, definition: bytes, dialect: bytes, query: Query) -> None:
        self.name: Final = name
        self.parse: Final = m.parse(name, definition)  # the whole message
        self.dialect: Final = dialect
        self.query: Final = query
        self.shape: bytes | None = None  # types of parameters and columns, once a server has told
        self.is_stale = False  # they are others now: who has it has to prepare it anew

    @property
    def definition(self) -> bytes:
        """What a Parse carries after the name."""
        return self.parse[5 + len(self.name) + 1 :]


class PreparedTable:
    """The named statements that clients of one pool have now."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._known: WeakValueDictionary[tuple[bytes, bytes], Prepared] = WeakValueDictionary()

    def renew(self) -> None:
        """A table has changed: who prepares from now on shares nothing with who did before."""
        self._known.clear()

    def __len__(self) -> int:
        return len(self._known)

    def intern(self, definition: bytes, dialect: bytes, query: Query) -> Prepared:
        """The statement of this definition: what a Parse carries after the name.

        ``dialect``: the settings it is parsed by. What a statement says may depend on them.
        """
        found = self._known.get((definition, dialect))
        if found is None:
            found = self.unshared(definition, dialect, query)
            self._known[definition, dialect] = found
        return found

    def unshared(self, definition: bytes, dialect: bytes, query: Query) -> Prepared:
        """A statement of one client only."""
        name = PREFIX + str(next(self._numbers)).encode()
        return Prepared(name, definition, dialect, query)


def shape(parameters: bytes, columns: bytes) -> bytes:
    """What a client relies on of a ParameterDescription and a RowDescription (bodies; empty: NoData).

    Of a column its name, type and modifier, not the table it comes from: those are what PostgreSQL
    compares (plancache.c, RevalidateCachedQuery). Raises ValueError if malformed.
    """
    parts = [parameters]
    pos = 2
    while pos < len(columns):
        end = columns.index(0, pos) + 1
        parts.append(columns[pos:end] + columns[end + 6 : end + 10] + columns[end + 12 : end + 16])
        pos = end + 18
    return b"\0".join(parts)


def touch(server: ServerConnection, statement: Prepared) -> bool:
    """Note the use of a statement; False if this connection does not have it."""
    prepared = server.prepared
    if statement not in prepared:
        return False
    del prepared[statement]
    prepared[statement] = None
    return True


def oldest(server: ServerConnection, limit: int) -> Prepared | None:
    """A statement to close before another is prepared; None while there is room."""
    if len(server.prepared) < limit:
        return None
    statement: Prepared = next(iter(server.prepared))
    return statement
