"""Fuzz of what is not the relay of queries: our own questions to a server that lies, cancel requests,
startup packets, TLS handshakes, the console. How many examples are tried: see ``fuzz_whole``."""

import itertools
import struct
from collections.abc import Callable
from contextlib import suppress

import pytest

from sidecar.pool import steering
from sidecar.pool.server import clock
from sidecar.pool.telling import servers
from sidecar.protocol import messages as m
from tests.sidecar_process import eventually
from tests.test_fuzz import is_free
from tests.test_lying_server import (
    COLUMNS,
    GIB,
    READY,
    REPLIES,
    TAG,
    Act,
    Connection,
    Liar,
    between,
    check_honest_again,
    head,
    hear,
    login,
    pool_of,
    says,
    says_and_waits,
)
from tests.wire import (
    SYNC,
    Client,
    Sidecar,
    bind,
    describe,
    execute,
    kinds,
    parse,
    query,
    startup,
)

# -- our own questions ---------------------------------------------------------------------------


def _row(*values: bytes | None) -> bytes:
    body = struct.pack("!H", len(values))
    for value in values:
        body += struct.pack("!i", -1) if value is None else struct.pack("!i", len(value)) + value
    return m.message(m.DATA_ROW, body)


ANSWERS: dict[str, Act] = {
    **REPLIES,
    "silence": says_and_waits(),
    "no columns": says(m.message(m.DATA_ROW, b"\0\0"), TAG, READY),
    "half a count": says(m.message(m.DATA_ROW, b"\0"), TAG, READY),
    "two columns": says(_row(b"l", b""), TAG, READY),
    "four columns": says(_row(b"l", b"", b"", b"more"), TAG, READY),
    "NULL": says(_row(None, None, None), TAG, READY),
    "an unknown kind": says(_row(b"?", b"", b""), TAG, READY),
    "a column longer than its row": says(
        m.message(m.DATA_ROW, struct.pack("!Hi", 3, 1000) + b"l"), TAG, READY
    ),
    "a column of -7 bytes": says(m.message(m.DATA_ROW, struct.pack("!Hi", 3, -7)), TAG, READY),
    "a setting of noise": says(_row(b"s", b"\xff'\\", b"\xff\xfe"), TAG, READY),
    "a setting without a name": says(_row(b"s", b"", b"x"), TAG, READY),
    "a long setting": says(_row(b"s", b"a.b", b"x" * 100_000), TAG, READY),
    "many settings": says(*(_row(b"s", b"a.b%d" % i, b"x" * 90) for i in range(3000)), TAG, READY),
    "all of it": says(*(_row(bytes([c]), b"", b"") for c in b"ltacpr"), TAG, READY),
    "an endless row": says_and_waits(COLUMNS, head(m.DATA_ROW, GIB - 1), b"x" * 100_000),
    "no columns at all": says(m.message(m.NO_DATA, b""), READY),
    "columns of noise": says(m.message(m.ROW_DESCRIPTION, b"\0\7abc"), READY),
    "parameters of noise": says(m.message(m.PARAMETER_DESCRIPTION, b"\0"), COLUMNS, READY),
    "other columns": says(
        m.message(m.ROW_DESCRIPTION, struct.pack("!H", 1) + b"other\0" + bytes(18)), READY
    ),
}


class Deceiver(Liar):
    """Answers with ``lie`` what ``concerns`` says, once it ``deceives``."""

    def __init__(self, concerns: Callable[[str, bytes], bool]) -> None:
        super().__init__()
        self.lie: Act = says()
        self.deceives = False
        self.has_lied = False
        self._concerns = concerns

    async def _answer(self, connection: Connection, kind: str, body: bytes) -> None:
        if self.deceives and self._concerns(kind, body):
            self.has_lied = True
            await self.lie(connection)
        else:
            await super()._answer(connection, kind, body)


def _hear_out(client: Client, liar: Deceiver) -> None:
    """As far as the server's lies let it."""
    eventually(lambda: liar.has_lied, "the server was asked")
    client.socket.settimeout(0.05)
    with suppress(TimeoutError):
        hear(client)


def _asks_what_is_left(kind: str, body: bytes) -> bool:
    return kind == "Q" and b"pg_listening_channels" in body


def _about_a_listener(sidecar: Sidecar, liar: Deceiver) -> None:
    with login(sidecar) as client:
        liar.deceives = True
        assert kinds(client.ask(query("listen x"))) == "CZ"
        client.send(query("select 1"))  # behind the question
        _hear_out(client, liar)


def _asks_for_the_types(kind: str, body: bytes) -> bool:
    return kind == "D" and body.startswith(b"Spgsidecar_")


def _about_a_statement(sidecar: Sidecar, liar: Deceiver) -> None:
    """On a connection where it has to be prepared again, as only one is kept."""
    with login(sidecar) as client:
        assert kinds(client.ask(parse("select 1", "a"), describe("S", "a"), SYNC)) == "1TZ"
        assert kinds(client.ask(parse("select 2", "b"), SYNC)) == "1Z"
        liar.deceives = True
        client.send(bind(name="a"), execute(), SYNC)
        _hear_out(client, liar)


def _sets_what_it_brings(kind: str, body: bytes) -> bool:
    return kind == "Q" and b"brought" in body


def _about_settings(sidecar: Sidecar, liar: Deceiver) -> None:
    """Other ones each time: those that a server has accepted need no question in the login."""
    liar.deceives = True
    with sidecar.connect() as client:
        brought = {"search_path": f"brought{next(_numbers)}"}
        client.send(startup({"user": "app", "database": "liar", **brought}))
        _hear_out(client, liar)
        with suppress(ConnectionError):
            client.send(query("select 1"))
            _hear_out(client, liar)


_numbers = itertools.count()

QUESTIONS: dict[str, tuple[Callable[..., bool], Callable[..., None], dict[str, object]]] = {
    "a listener": (_asks_what_is_left, _about_a_listener, {"ping_timeout": "100ms"}),
    "a statement": (_asks_for_the_types, _about_a_statement, {"max_prepared_statements": 1}),
    "settings": (_sets_what_it_brings, _about_settings, {}),
    "settings in session mode": (_sets_what_it_brings, _about_settings, {"mode": "session"}),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_lie_about_a_question_of_ours_is_over_with_its_client(postgres, caplog, name):
    """Whatever the answer, when the client has gone its connection is given back, or gone, too."""
    concerns, ask, options = QUESTIONS[name]
    with Deceiver(concerns) as liar, between(postgres, liar, caplog, **options) as sidecar:
        for what, lie in ANSWERS.items():
            liar.lie, liar.has_lied = lie, False
            ask(sidecar, liar)
            liar.deceives = False
            sidecar._clients.clear()
            sidecar.until(lambda: is_free(pool_of(sidecar)), f"{what}: it is given back")
            # what is left of a lie may still be on its way, to whoever has the connection then
            sidecar.call(lambda: steering.replace_all(pool_of(sidecar), clock()))
            sidecar.until(lambda: not any(s.is_replaced for s in servers(pool_of(sidecar))), "anew")
            check_honest_again(sidecar)
            sidecar._clients.clear()
