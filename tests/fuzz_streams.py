"""Message streams for fuzzing: legal and nearly legal, in every order.

A stream is a list of units; a unit is a list of fragments of a few messages each, chosen by name, so
that what hypothesis shrinks to can be read. Every unit ends with a barrier: whatever went wrong in it,
an open copy and an error without Sync included, the replies up to there are known to be complete.
"""

import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from hypothesis import strategies as st

from sidecar.protocol import messages as m
from tests.wire import (
    COPY_DONE,
    FLUSH,
    SYNC,
    Client,
    Message,
    bind,
    close,
    copy_data,
    copy_fail,
    describe,
    execute,
    parse,
    query,
)

BARRIER = copy_fail("the barrier") + SYNC + query("")
"""Ends a copy, ends the skipping, and answers even in a failed transaction: with an
EmptyQueryResponse, which no other message here is answered with."""

TABLE = "create table if not exists fuzz (a int); truncate fuzz"

# -- the words -----------------------------------------------------------------------------------

PLAIN_SQL = [
    *("select 1", "select 'x', null, 3", "select i from generate_series(1, 5) i", "select 1/0"),
    *("selec", "select * from nowhere", "show timezone", "show application_name"),
    *("insert into fuzz values (1)", "select count(*) from fuzz", "delete from fuzz"),
    *("copy fuzz from stdin", "copy (select 1, 'x') to stdout", "copy nowhere from stdin"),
    *("select 1/(3 - i) from generate_series(1, 5) i", "do $$ begin raise notice 'n'; end $$"),
    *(
        "select set_config('application_name', 'f', true)",
        "notify fuzz",
        "select repeat('y', 9000)",
    ),
]
"""Leaves nothing on the connection, outside of a transaction."""

BLOCK_SQL = [
    *("begin", "commit", "rollback", "savepoint s", "rollback to s", "release s", "begin"),
    *("declare k cursor for select i from generate_series(1, 9) i", "fetch 2 from k", "close k"),
    *("set local timezone = 'Asia/Tokyo'", "create temp table u (a int) on commit drop"),
    *("select pg_advisory_xact_lock(4711)", "start transaction read only"),
]

STATE_SQL = [
    *("set timezone = 'Asia/Tokyo'", "set timezone = 'nowhere'", "reset timezone", "reset all"),
    *("set application_name = 'set'", "set search_path = pg_catalog, public", "show search_path"),
    *(
        "set work_mem = '1MB'",
        "show work_mem",
        "set fuzz.mine = 'x'",
        "select coalesce(current_setting('fuzz.mine', true), '')",
    ),
    *("select set_config('fuzz.mine', 'y', false)", "set datestyle = 'German'"),
    *("select '2020-03-04'::date, '2020-03-04 05:06+00'::timestamptz", "discard all"),
    *("listen fuzz", "unlisten *", "select pg_listening_channels()"),
    *("create temp table t (a int)", "insert into t values (2)", "select * from t", "drop table t"),
    *("select pg_advisory_lock(4712)", "select pg_advisory_unlock(4712)"),
    "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
    *("declare h cursor with hold for select i from generate_series(1, 9) i", "fetch 2 from h"),
    *("close h", "prepare sp as select 7", "execute sp", "deallocate sp", "deallocate all"),
    *("set session characteristics as transaction read only", "set role none"),
]
"""Leaves something behind, or shows what is there."""

SEVERAL_SQL = [
    *(
        "select 1; select 2",
        "begin; select 1",
        "select 1; commit",
        "begin; select 1/0",
        "select 1;",
    ),
    *("select 1/0; select 2", "insert into fuzz values (1); select 1/0", "begin; commit; begin"),
    *("copy (select 1) to stdout; select 2", "copy fuzz from stdin; select 3"),
]
SEVERAL_STATE_SQL = [
    *("set timezone = 'Asia/Tokyo'; select 1/0", "set timezone = 'Asia/Tokyo'; show timezone"),
    *("begin; set application_name = 'rolled back'; rollback", "begin; listen fuzz; rollback"),
    *("begin; create temp table t (a int); commit", "reset all; set work_mem = '2MB'"),
]

PARAMETER_SQL = ["select $1::int", "select $1::text", "insert into fuzz values ($1::int)"]

STATEMENTS = ("", "a", "b", "c", "d")
PORTALS = ("", "p", "q")


def _function_call(oid: int, *arguments: bytes) -> bytes:
    body = struct.pack("!IHH", oid, 0, len(arguments))
    body += b"".join(struct.pack("!i", len(a)) + a for a in arguments)
    return m.message(m.FUNCTION_CALL, body + struct.pack("!H", 0))


def _simple(*lists: list[str]) -> dict[str, bytes]:
    return {f"Query {sql}": query(sql) for texts in lists for sql in texts}


# What these say depends on another statement, of SQL's: prepared, they are not carried over faithfully.
_NOT_PREPARED = {"execute sp", "fetch 2 from h", "fetch 2 from k"}


def _parses(*lists: list[str]) -> dict[str, bytes]:
    return {
        f"Parse {name!r} {sql}": parse(sql, name)
        for texts in lists
        for sql in texts
        for name in STATEMENTS
        if not name or sql not in _NOT_PREPARED
    }


def _cycles(*lists: list[str]) -> dict[str, bytes]:
    """As drivers do it."""
    cycles = {}
    for sql in (sql for texts in lists for sql in texts):
        values = ("1",) if "$1" in sql else ()
        for name in STATEMENTS[:3]:
            if name and sql in _NOT_PREPARED:
                continue
            made = parse(sql, name) + describe("S", name) + bind(*values, name=name)
            cycles[f"cycle {name!r} {sql}"] = made + execute() + SYNC
    return cycles


_BINDS = {
    f"Bind {portal!r} {name!r} {values}": bind(*values, name=name, portal=portal)
    for portal in PORTALS
    for name in STATEMENTS
    for values in ((), ("1",), ("x",))
}
# Never Execute of the unnamed portal alone: in a failed transaction, after a Query that failed, that
# crashes PostgreSQL 16.
_USES = {
    **{f"Execute {p!r} {n}": execute(n, p) for p in PORTALS[1:] for n in (0, 1, 2)},
    **{
        f"Bind {name!r} Execute {n}": bind(name=name) + execute(n)
        for name in STATEMENTS
        for n in (0, 1, 2)
    },
    **{f"Describe S {name!r}": describe("S", name) for name in STATEMENTS},
    **{f"Describe P {name!r}": describe("P", name) for name in PORTALS},
    **{f"use {name!r}": bind(name=name) + execute() + SYNC for name in STATEMENTS},
    **{f"use {name!r} 1": bind("1", name=name) + execute() + SYNC for name in STATEMENTS},
}
_CLOSES = {
    **{f"Close S {name!r}": close("S", name) for name in STATEMENTS},
    **{f"Close P {name!r}": close("P", name) for name in PORTALS},
    **{
        f"another {name!r}": close("S", name) + parse("select 9", name) + FLUSH
        for name in STATEMENTS
    },
}
_ENDS = {"Sync": SYNC, "Flush": FLUSH}
_COPIES = {
    "CopyData": copy_data(b"1\n"),
    "CopyData bad": copy_data(b"x\n"),
    "CopyData half": copy_data(b"1"),
    "CopyDone": COPY_DONE,
    "CopyFail": copy_fail("no"),
    "copy in": query("copy fuzz from stdin") + copy_data(b"1\n2\n") + COPY_DONE,
    "copy in that fails": query("copy fuzz from stdin") + copy_data(b"x\n") * 3 + COPY_DONE,
    "copy in as libpq": (
        parse("copy fuzz from stdin")
        + (bind() + describe("P") + execute() + SYNC)
        + (copy_data(b"1\n") + COPY_DONE + SYNC)
    ),
}
_CALLS = {
    "FunctionCall abs": _function_call(1397, b"\xff\xff\xff\xf9"),
    "FunctionCall wrong": _function_call(1397),
    "FunctionCall nothing": _function_call(1),
}

Words = list[Mapping[str, bytes]]
"""Fragments by name, in groups of about the same weight."""

# A Query or another request amid a COPY ends the connection, here and there: a stray fragment
# after COPY does that often enough.
WITHOUT_STATE: Words = [
    *(_simple(PLAIN_SQL, SEVERAL_SQL), _cycles(PLAIN_SQL, PARAMETER_SQL)),
    *(_parses(PLAIN_SQL, PARAMETER_SQL), _BINDS, _USES, _CLOSES, _ENDS, _COPIES, _CALLS),
    *(_simple(BLOCK_SQL), _cycles(BLOCK_SQL)),
]
WITH_STATE: Words = [
    *WITHOUT_STATE,
    _simple(STATE_SQL, SEVERAL_STATE_SQL),
    *(_simple(STATE_SQL), _cycles(STATE_SQL), _parses(STATE_SQL)),
]
HOSTILE: Words = [
    *WITH_STATE,
    {
        "nothing": query("") + parse("") + bind() + execute(),
        "deallocate a prepared one": query("deallocate a"),
        "execute a prepared one": query("execute a"),
        "Query without an end": m.message(m.QUERY, b"select 1"),
        "Bind of nothing": m.message(m.BIND, b""),
        "Bind of half": m.message(m.BIND, b"\0a\0\0\0\0\7"),
        "Parse without an end": m.message(m.PARSE, b"a"),
        "Parse of ours": parse("select 'ours'", "pgsidecar_1"),
        "Bind of ours": bind(name="pgsidecar_1"),
        "Describe of half": m.message(m.DESCRIBE, b"S"),
        "Close of nothing": m.message(m.CLOSE, b""),
        "Execute of nothing": m.message(m.EXECUTE, b""),
        "unknown message": m.message(0x21, b"abc"),
        "an answer": m.READY_IDLE_MESSAGE,
        "length 3": b"Q\0\0\0\3",
        "length -1": b"P\xff\xff\xff\xff",
        "a beginning": b"Q\0\0\1\0select",
        "a long Sync": m.message(m.SYNC, bytes(3000)),
        "Terminate": m.TERMINATE_MESSAGE,
    },
]


class Stream(NamedTuple):
    """What a client says."""

    units: list[list[str]]
    cuts: list[int]
    """Where its bytes are cut into pieces: thousandths of a unit."""

    def pieces(self, unit: bytes) -> list[bytes]:
        places = sorted({len(unit) * cut // 1000 for cut in self.cuts})
        pairs = zip([0, *places], [*places, len(unit)], strict=True)
        return [unit[begin:end] for begin, end in pairs if begin < end]


def streams(words: Words) -> st.SearchStrategy[Stream]:
    fragment = st.one_of([st.sampled_from(sorted(group)) for group in words])
    unit = st.lists(fragment, min_size=1, max_size=8)
    return st.builds(
        Stream,
        st.lists(unit, min_size=1, max_size=5),
        st.one_of(st.just([]), st.lists(st.integers(1, 999), max_size=6)),
    )


def data_of(words: Words, unit: list[str]) -> bytes:
    return b"".join(next(group[name] for group in words if name in group) for name in unit)


# -- the client ----------------------------------------------------------------------------------


class Answer(NamedTuple):
    """To a unit."""

    replies: list[tuple[str, object]]
    is_end: bool  # the connection was closed


def converse(
    client: Client,
    words: Words,
    stream: Stream,
    settle: Callable[[], None] = lambda: None,
    begin: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """Say all of it, unit by unit. ``settle`` lets what has been sent so far be looked at; ``begin`` is
    called before each unit."""
    answers: list[Answer] = []
    is_failed = False
    for number, unit in enumerate(stream.units):
        begin(number)
        try:
            for piece in stream.pieces(data_of(words, unit) + BARRIER):
                client.send(piece)
                settle()
        except (BrokenPipeError, ConnectionResetError):
            pass  # what it said before is to be read
        answers.append(_up_to_barrier(client, is_failed))
        is_failed = answers[-1].replies[-1:] == [("Z", b"E")]
        if answers[-1].is_end:
            break
    return answers


def _up_to_barrier(client: Client, is_failed: bool) -> Answer:
    messages: list[Message] = []
    try:
        while not (len(messages) > 1 and messages[-2].kind == "I" and messages[-1].kind == "Z"):
            messages.append(client.receive())
    except (EOFError, ConnectionResetError):
        return Answer(_essence(messages, is_failed), True)
    return Answer(_essence(messages, is_failed), False)


def _essence(messages: list[Message], is_failed: bool) -> list[tuple[str, object]]:
    """Without what comes at a time of its own, and without what numbers and wording there are.

    ``is_failed``: in a failed transaction. Anything but its end is an error there, and which one depends
    on what is prepared where.
    """
    found: list[tuple[str, object]] = []
    for message in messages:
        match message.kind:
            case "A" | "N" | "S":
                continue
            case "E":
                sqlstate = "in a failed transaction" if is_failed else message.fields.get("C")
                found.append(("E", (message.fields.get("S"), sqlstate)))
            case "D":
                found.append(("D", message.columns))
            case "T":
                found.append(("T", _columns(message.body)))
            case kind:
                if kind == "Z":
                    is_failed = message.body == b"E"
                found.append((kind, message.body))
    return found


def _columns(body: bytes) -> list[tuple[bytes, bytes]]:
    """Name and type of each column: a table's own number is another for each temporary table."""
    (count,) = struct.unpack_from("!H", body)
    at, found = 2, []
    for _ in range(count):
        end = body.index(0, at)
        found.append((body[at:end], body[end + 7 : end + 19]))
        at = end + 19
    return found
