"""What replies a server connection owes, in order: the ledger between requests and replies.

Pure. For every message that is forwarded and has a reply of its own, ``ServerConnection.expected``
gets one entry: the message's type byte, or one of the codes below. The server answers strictly in
order (54.2.3), so the head of the ledger tells what the next reply belongs to, and whether the
client is to see it. After an error in the extended protocol the server skips to the next Sync, and
so does the ledger; what the skipped messages had changed in our books is undone.
"""

from typing import Final

from sidecar.pool.server import ServerConnection
from sidecar.protocol import messages as m
from sidecar.proxy.prepared import Prepared
from sidecar.sql import Query
from sidecar.work import Statement

# Codes below any message type. The first two have no reply of the server's own.
FAKE_PARSE: Final = 1  # the client's Parse was not sent: the statement is there; we answer
COPY_END: Final = 2  # CopyDone or CopyFail
AUTOMATIC: Final = 2  # codes up to here are settled when they come to the head
PARSE_NAMED: Final = 3  # the client's Parse of a named statement, renamed
CLOSE_NAMED: Final = 4
OUR_PARSE: Final = 5  # of a named statement; the client did not ask for it
OUR_UNNAMED_PARSE: Final = 6
OUR_CLOSE: Final = 7
OUR_UNNAMED_CLOSE: Final = 9  # of an unnamed statement that is not the client's
SETUP: Final = 8  # our Query that carries over settings
PARSE_TAKEN: Final = 11  # the client's Parse of a name that is taken: the server must refuse it
OUR_SYNC: Final = 10  # behind a Flush: the client would keep the connection, but needs it no more
REFUSED_QUERY: Final = 12  # in its place the server got what it has to refuse; the error is ours
REFUSED_PARSE: Final = 13
DEALLOCATED: Final = 14  # a Sync in place of a Query that was DEALLOCATE of a renamed statement
OUR_DESCRIBE: Final = 15  # of a named statement, behind its Parse
LAST: Final = 15

REFUSED: Final = (REFUSED_QUERY, REFUSED_PARSE)
_WITH_REFUSAL: Final = (*REFUSED, PARSE_TAKEN)

_WITH_UNDO: Final = frozenset({FAKE_PARSE, PARSE_NAMED, CLOSE_NAMED, OUR_PARSE, OUR_CLOSE})

Undo = tuple[dict[bytes, Prepared] | None, bytes, Prepared]
"""The client's statements (None: not concerned), the client's name, the statement."""


def remove_ignored_syncs(server: ServerConnection) -> bool:
    """The server is in copy-in mode: it ignores each Sync up to CopyDone or CopyFail (54.2.6).

    libpq sends such a Sync along with the Execute of a COPY. Returns whether the end of the copy
    has been sent already.
    """
    kept: list[int] = []
    has_ended = False
    for at, code in enumerate(server.expected):
        if code == COPY_END:
            has_ended = True
        if at and code == m.SYNC and not has_ended:
            continue
        kept.append(code)
    server.expected.clear()
    server.expected.extend(kept)
    return has_ended


def skip_to_sync(server: ServerConnection) -> int:
    """An error in the extended protocol: drop what the server will skip, undo it in our books.

    Returns how many queries are dropped. If no Sync has been sent yet, the server goes on
    skipping: ``server.is_skipping``.
    """
    expected = server.expected
    queries = 0
    skipped: list[tuple[int, Undo]] = []
    while expected and expected[0] not in (m.SYNC, OUR_SYNC, DEALLOCATED):
        code = expected.popleft()
        if code <= AUTOMATIC:
            server.automatic -= 1
        if code in (m.EXECUTE, m.QUERY, m.FUNCTION_CALL, REFUSED_QUERY):
            queries += 1
        if code in _WITH_UNDO:
            skipped.append((code, server.undo.popleft()))
        elif code in _WITH_REFUSAL:
            server.refusals.popleft()
        elif code == OUR_DESCRIBE:
            server.described.popleft()
    for code, undo in reversed(skipped):  # what was done last is undone first
        _undo(server, code, undo)
    server.is_skipping = not expected
    return queries


def failing(server: ServerConnection, unnamed: Query | None) -> Statement | None:
    """The statement that an error is about which comes now, if it is known. ``unnamed``: what the client
    prepared last without a name."""
    head = server.expected[0] if server.expected else 0
    found: Statement | None = None
    if server.queries:
        found = server.queries[0]
    elif head in (PARSE_NAMED, OUR_PARSE):
        undo: Undo = server.undo[0]
        found = undo[2].query.statement
    elif head == m.PARSE and unnamed is not None:
        found = unnamed.statement
    return None if found is None else found.shared or found


def has_cycles(server: ServerConnection) -> bool:
    """Whether a cycle is under way that ends before the next message begins."""
    return any(code in (m.SYNC, m.QUERY, m.FUNCTION_CALL, DEALLOCATED) for code in server.expected)


def is_open(
    server: ServerConnection, name: bytes, statements: tuple[Prepared | None, Prepared | None]
) -> bool:
    """Whether a cycle that is under way, but ends before the next one begins, prepares or closes what
    has this name or is one of these statements."""
    undo = iter(server.undo)
    is_concerned = False
    for code in server.expected:
        if code in _WITH_UNDO:
            names, its_name, statement = next(undo)
            if statement in statements or (names is not None and its_name == name):
                is_concerned = True
        elif is_concerned and code in (m.SYNC, DEALLOCATED):
            return True
    return False


def _undo(server: ServerConnection, code: int, undo: Undo) -> None:
    statements, name, statement = undo
    if code in (PARSE_NAMED, OUR_PARSE):
        server.prepared.pop(statement, None)
    elif code == OUR_CLOSE:
        server.prepared[statement] = None
    if statements is None:
        return
    if code == CLOSE_NAMED:
        statements.setdefault(name, statement)
    elif statements.get(name) is statement:
        del statements[name]
