"""What real drivers and a real server say, recorded through a sidecar, and mutants of it."""

import asyncio
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

import asyncpg
import psycopg
from hypothesis import strategies as st

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.protocol import messages as m
from tests.tap import Tap
from tests.wire import COPY_DONE, SYNC, Client, Sidecar, bind, copy_data, execute, parse, query, run

# -- recording -----------------------------------------------------------------------------------


@dataclass
class Recording:
    """One connection, both ways."""

    said: list[bytes] = field(default_factory=list)
    answered: list[bytes] = field(default_factory=list)

    @property
    def requests(self) -> list[bytes]:
        """The startup packet, then message by message."""
        data = b"".join(self.said)
        (length,) = struct.unpack_from("!I", data)
        return [data[:length], *messages_of(data[length:])]

    @property
    def replies(self) -> list[list[bytes]]:
        """The login, then what came up to each ReadyForQuery: message by message."""
        groups: list[list[bytes]] = [[]]
        for message in messages_of(b"".join(self.answered)):
            groups[-1].append(message)
            if message[0] == m.READY_FOR_QUERY:
                groups.append([])
        return [group for group in groups if group]


def messages_of(data: bytes) -> list[bytes]:
    found, at = [], 0
    while len(data) - at >= 5:
        end = at + 1 + m.HEADER.unpack_from(data, at)[1]
        found.append(data[at:end])
        at = end
    return found


class Recorder(Tap):
    def __init__(self, to: int) -> None:
        super().__init__(to)
        self.recordings: list[Recording] = []

    def books(self) -> tuple[list[bytes], list[bytes]]:
        recording = Recording()
        self.recordings.append(recording)
        return recording.said, recording.answered


class Recordings(NamedTuple):
    drivers: list[Recording]
    """What psycopg, asyncpg and one like pgbench said to the sidecar, and heard."""
    server: Recording
    """What the sidecar said to PostgreSQL on its busiest connection, and heard."""


def record(postgres: EmbeddedPostgres) -> Recordings:
    with Recorder(postgres.port) as behind:
        pools = {
            "main": {
                "dsn": postgres.dsn(port=behind.port, sslmode="disable"),
                "max_size": 2,
                "min_idle": 1,
            }
        }
        with Sidecar(pools=pools) as sidecar, Recorder(sidecar.port) as before:
            dsn = f"postgresql://app@127.0.0.1:{before.port}/main?sslmode=disable"
            _psycopg(dsn)
            asyncio.run(_asyncpg(dsn))
            _pgbench(("127.0.0.1", before.port))
    return Recordings(before.recordings, max(behind.recordings, key=lambda each: len(each.replies)))


def _psycopg(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True, application_name="recorded") as connection:
        connection.execute("select %s::int, %s", (1, "x")).fetchall()
        for number in range(2):
            connection.execute("select %s::int", (number,), prepare=True)
        with connection.pipeline():
            connection.execute("select 1", prepare=True)
            connection.execute("insert into fuzz values (%s)", (2,))
        with connection.transaction(), connection.cursor() as cursor:
            with cursor.copy("copy fuzz from stdin") as copy:
                copy.write_row((3,))
            with cursor.copy("copy fuzz to stdout") as out:
                assert list(out)
        connection.execute("set timezone to 'Asia/Tokyo'")
        connection.execute("listen fuzz").connection.execute("notify fuzz, 'x'")
        connection.execute("unlisten *")
        try:
            connection.execute("select 1/0")
        except psycopg.errors.DivisionByZero:
            pass  # as it should


async def _asyncpg(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        for number in range(3):
            assert await connection.fetchval("select $1::int", number) == number
        async with connection.transaction():
            async for _ in connection.cursor("select * from generate_series(1, 60)"):
                pass
        await connection.executemany("insert into fuzz values ($1)", [(1,), (2,)])
        await connection.copy_records_to_table("fuzz", records=[(4,), (5,)])
        await connection.reset()
    finally:
        await connection.close()


def _pgbench(address: tuple[str, int]) -> None:
    with Client.login(address) as client:
        client.ask(parse("select $1::int", "p1"), SYNC)
        for _ in range(3):
            client.ask(query("begin"))
            client.ask(run("insert into fuzz values ($1)", "7"))
            client.ask(bind("8", name="p1"), execute(), SYNC)
            client.ask(query("end"))
        client.send(query("copy fuzz from stdin"), copy_data(b"9\n"), COPY_DONE)
        client.until_ready()


# -- mutants -------------------------------------------------------------------------------------


class Mutation(NamedTuple):
    """``at``: which message, modulo their number; ``how``: more of it, whatever it means there."""

    kind: str
    at: int
    how: int


KINDS = ["flip", "flip", "set", "cut", "drop", "double", "swap", "length", "insert", "remove"]
_LENGTHS = (0, 1, 3, 4, 5, 8, 200, 65_536, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0xFFFFFFFF)

mutations: st.SearchStrategy[list[Mutation]] = st.lists(
    st.builds(Mutation, st.sampled_from(KINDS), st.integers(0, 999), st.integers(0, 9999)),
    min_size=1,
    max_size=4,
)


def mutant(messages: list[bytes], changes: list[Mutation]) -> list[bytes]:
    found = list(messages)
    for kind, at, how in changes:
        if not found:
            break
        at %= len(found)
        data = bytearray(found[at])
        byte = how % (len(data) or 1)
        match kind:
            case "flip" if data:
                data[byte] ^= 1 << (how % 8)
            case "set" if data:
                data[byte] = (0, 1, 4, 127, 255, *b"ZESTDCKR")[how % 13]
            case "length" if len(data) >= 5:
                data[1:5] = struct.pack("!I", _LENGTHS[how % len(_LENGTHS)])
            case "insert":
                data[byte:byte] = bytes((how + i) % 256 for i in range(1 + how % 9))
            case "remove":
                del data[byte : byte + 1 + how % 9]
            case "cut":
                del found[at + 1 :], data[byte:]
            case "drop":
                del found[at]
                continue
            case "double":
                found.insert(at, found[at])
                continue
            case "swap":
                other = how % len(found)
                found[at], found[other] = found[other], found[at]
                continue
        found[at] = bytes(data)
    return found
