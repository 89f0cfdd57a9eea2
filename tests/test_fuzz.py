"""Fuzz: whatever a client or a server says, nobody else notices, nothing hangs, nothing is left.

Clients that say legal and nearly legal things in every order are answered as on a direct connection.
How many examples are tried: see ``fuzz_whole``.
"""

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.errors import SidecarError
from sidecar.pool.pool import Pool
from sidecar.pool.state import ConnectionState
from tests.fuzz_recordings import Mutation, Recordings, mutant, mutations, record
from tests.fuzz_streams import (
    BARRIER,
    HOSTILE,
    TABLE,
    WITH_STATE,
    WITHOUT_STATE,
    Answer,
    Stream,
    Words,
    converse,
    data_of,
    streams,
)
from tests.fuzz_whole import check_books, check_newcomer, examples, quiet
from tests.server_connection import opened
from tests.sidecar_process import eventually
from tests.test_lying_server import (
    Connection,
    Liar,
    between,
    check_honest_again,
    pool_of,
    says_and_waits,
)
from tests.wire import TERMINATE, Client, Sidecar

AT_ONCE = 5.0  # s; nothing here takes as long

# -- clients, compared with direct ones --------------------------------------------------------

POOLS: dict[str, tuple[Words, int, dict[str, object]]] = {
    "session": (WITH_STATE, 2, {"mode": "session"}),
    "transaction": (WITH_STATE, 1, {"max_prepared_statements": 2}),
    "one statement": (WITH_STATE, 1, {"max_prepared_statements": 1}),
    "wandering": (WITH_STATE, 2, {"max_prepared_statements": 2}),
    "pin refuse": (WITHOUT_STATE, 1, {"pin": "refuse", "max_prepared_statements": 1}),
    "pin off": (WITHOUT_STATE, 1, {"pin": "off", "reset": "always"}),
}
"""What clients say, on how many connections, in a pool with these options."""

ONCE_WRONG = [
    [["cycle 'a' select * from nowhere", "cycle 'a' close h"]],
    [["cycle 'a' deallocate all", "cycle 'a' close h"]],
    [["Query discard all", "cycle 'a' insert into fuzz values (1)", "Parse 'b' select 1"]],
    [
        ["cycle 'b' drop table t", "Parse 'c' copy (select 1, 'x') to stdout"],
        ["Bind '' '' ('1',)", "cycle 'a' show timezone", "cycle 'b' begin"],
    ],
]
"""Found by hypothesis, and mended."""


@pytest.mark.parametrize("name", POOLS)
def test_client_is_answered_as_on_a_direct_connection(postgres: EmbeddedPostgres, name: str):
    words, size, options = POOLS[name]
    postgres.psql(TABLE)
    direct = (postgres.host, postgres.port)
    with (
        Client.login(direct, postgres.user, postgres.database) as control,
        Sidecar(postgres, max_size=size, min_idle=size, **options) as sidecar,  # type: ignore[arg-type]  # passed on
        quiet(),
    ):

        @examples(25)
        @given(stream=streams(words))
        def check(stream: Stream) -> None:
            with Client.login(direct, postgres.user, postgres.database) as client:
                expected = converse(client, words, stream)
                leave(client)
            control.rows("truncate fuzz")
            with sidecar.login() as client, sidecar.login() as blocker:
                client.socket.settimeout(AT_ONCE)

                def begin(unit: int) -> None:
                    if name == "wandering":  # the one it has had last is somebody else's
                        blocker.rows("begin" if unit % 2 else "rollback")

                found = converse(client, words, stream, lambda: settle(sidecar), begin)
                leave(client)
            sidecar._clients.clear()
            try:
                sidecar.until_whole()
                same(expected, found)
                check_newcomer(sidecar)
                if name != "session":
                    check_books(sidecar)
            finally:
                control.rows("truncate fuzz")
                forget_all(sidecar)

        if words is WITH_STATE:
            for units in ONCE_WRONG:
                check.hypothesis.inner_test(stream=Stream(units, []))  # type: ignore[attr-defined]
        check()


def leave(client: Client) -> None:
    with suppress(OSError):  # it has been closed already
        client.send(TERMINATE)


def same(expected: list[Answer], found: list[Answer]) -> None:
    """Unit by unit; where the server ended the connection, we do."""
    for number, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        if theirs.is_end and ours.is_end:
            return
        assert ours == theirs, f"unit {number}"


def forget_all(sidecar: Sidecar) -> None:
    """So that each example begins as the others did."""
    with ExitStack() as stack:
        for _ in range(sidecar.pool.config.max_size):
            stack.enter_context(sidecar.login()).rows("begin; deallocate all")
    sidecar._clients.clear()
    sidecar.until_whole()


def settle(sidecar: Sidecar) -> None:
    """What has been sent is received, as far as can be told."""
    for _ in range(2):
        sidecar.call(lambda: None)


# -- clients that break off --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["transaction", "session", "statement"])
def test_hostile_stream_that_breaks_off_anywhere_leaves_nothing(postgres: EmbeddedPostgres, mode):
    postgres.psql(TABLE)
    with (
        Sidecar(postgres, mode=mode, max_size=1, max_prepared_statements=2) as sidecar,
        quiet(),
    ):

        @examples(25)
        @given(streams(HOSTILE), st.integers(0, 1000), st.sampled_from(sorted(ENDS)))
        def check(stream: Stream, length: int, end: str) -> None:
            data = b"".join(data_of(HOSTILE, unit) + BARRIER for unit in stream.units)
            with sidecar.login() as client:
                say(client, stream.pieces(data[: len(data) * length // 1000]), sidecar)
                ENDS[end](client)
            check_nothing_is_left(sidecar)

        check()


def say(client: Client, pieces: list[bytes], sidecar: Sidecar) -> None:
    """And hear some of the answers, if there are any."""
    with suppress(ConnectionError):
        for piece in pieces:
            client.send(piece)
            settle(sidecar)
    hear_out(client)


def hear_out(client: Client) -> None:
    """Until the other side says nothing for a moment."""
    client.socket.settimeout(0.01)
    with suppress(TimeoutError, ConnectionError):
        while client.socket.recv(65536):
            pass


def shuts_down(client: Client) -> None:
    with suppress(OSError):
        client.socket.shutdown(socket.SHUT_WR)


def cancels(client: Client) -> None:
    """And goes at once: the request finds a connection that is being given back."""
    client.cancel()
    client.abort()


ENDS: dict[str, Callable[[Client], None]] = {
    "terminate": leave,
    "close": lambda client: client.socket.close(),
    "reset": Client.abort,
    "half close": shuts_down,
    "cancel": cancels,
}


def check_nothing_is_left(sidecar: Sidecar) -> None:
    sidecar._clients.clear()
    sidecar.until_whole()
    check_newcomer(sidecar)
    sidecar.until_whole()


# -- mutants of recordings ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(postgres: EmbeddedPostgres) -> Recordings:
    postgres.psql(TABLE)
    return record(postgres)


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_mutant_of_a_driver_leaves_nothing(postgres: EmbeddedPostgres, recorded, mode):
    with (
        Sidecar(
            postgres,
            mode=mode,
            max_size=1,
            max_prepared_statements=2,
            listen={"login_timeout": "1s"},
        ) as sidecar,
        quiet(),
    ):

        @examples(30)
        @given(st.integers(0, 2), mutations, st.sampled_from(sorted(set(ENDS) - {"cancel"})))
        def check(driver: int, changes: list[Mutation], end: str) -> None:
            said = recorded.drivers[driver].requests
            with sidecar.connect() as client:
                say(client, [b"".join(mutant(said, changes))], sidecar)
                ENDS[end](client)
            check_nothing_is_left(sidecar)

        check()


class Replayer(Liar):
    """A liar that answers each Query, Sync and Flush with the next of its replies."""

    def __init__(self) -> None:
        super().__init__()
        self.replies: list[bytes] = []

    async def _answer(self, connection: Connection, kind: str, body: bytes) -> None:
        if not self.replies:
            await super()._answer(connection, kind, body)
        elif kind in "QSH":
            await connection.send(self.replies.pop(0))


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_mutant_of_a_server_harms_its_own_client_only(postgres, recorded, caplog, mode):
    options = {"mode": mode, "max_size": 2, "max_prepared_statements": 2}
    with Replayer() as liar, between(postgres, liar, caplog, **options) as sidecar:
        pool = pool_of(sidecar)

        @examples(30)
        @given(st.integers(0, 2), st.integers(0, 20), mutations, st.booleans())
        def check(driver: int, skip: int, changes: list[Mutation], is_whole: bool) -> None:
            groups = recorded.server.replies[1:][skip:]
            changed = mutant([b"".join(group) for group in groups], changes)
            if is_whole:  # message by message, so that what is left is well-formed
                changed = [b"".join(mutant(group, changes)) for group in groups]
            liar.replies = changed
            with sidecar.login(database="liar") as client:
                say(client, [b"".join(recorded.drivers[driver].requests[1:])], sidecar)
            liar.replies = []
            sidecar._clients.clear()
            sidecar.until(lambda: is_free(pool), "nobody uses the liar")
            check_honest_again(sidecar)
            sidecar._clients.clear()

        check()


def is_free(pool: Pool) -> bool:
    state = pool.state
    return not (state.active or state.waiters or state.by_state[ConnectionState.CHECKING])


def test_mutant_of_a_login_ends_in_time(recorded):
    """Each attempt is in or refused, by its own deadline."""
    replies = recorded.server.replies[0]
    with Liar() as liar:

        @examples(40)
        @given(mutations)
        def check(changes: list[Mutation]) -> None:
            liar.log_in = says_and_waits(*mutant(replies, changes))
            dsn = f"postgresql://postgres@127.0.0.1:{liar.port}/x?sslmode=disable"
            asyncio.run(attempt(dsn))

        check()
        eventually(lambda: not liar._tasks, "the liar has seen them go")


async def attempt(dsn: str) -> None:
    began = time.monotonic()
    with suppress(SidecarError, TimeoutError):
        async with opened(dsn, within=0.2):
            pass
    assert time.monotonic() - began < AT_ONCE
    assert len(asyncio.all_tasks()) == 1
