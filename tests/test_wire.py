"""Through the sidecar, every conversation is the one a client has with PostgreSQL itself.

The same bytes go to both, in whole and in small pieces, in transaction and in session mode; the answers
have to be the same bytes.
"""

import asyncio
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import asyncpg
import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.protocol import messages as m
from tests.wire import (
    COPY_DONE,
    FLUSH,
    SYNC,
    TERMINATE,
    Client,
    Message,
    Sidecar,
    bind,
    close,
    copy_data,
    copy_fail,
    describe,
    error,
    execute,
    kinds,
    parse,
    query,
    run,
)

SCHEMA = """
    drop table if exists wire_copy, wire_items, wire_child;
    create table wire_copy (a int, b text);
    create table wire_items (id int primary key, name text);
    create table wire_child (i int references wire_items deferrable initially deferred);
    insert into wire_items select i, 'item ' || i from generate_series(1, 100) i;
"""


@pytest.fixture(scope="module")
def database(postgres: EmbeddedPostgres) -> EmbeddedPostgres:
    postgres.psql(SCHEMA)
    return postgres


@pytest.fixture(scope="module", params=["transaction", "session"])
def sidecar(database, request) -> Iterator[Sidecar]:
    with Sidecar(database, max_size=2, mode=request.param) as running:
        yield running


Step = bytes | tuple[bytes, int | str]
"""What to send, and what to wait for: so many ReadyForQuery (1), or a message of one of these kinds."""


def function_call(oid: int, *arguments: bytes) -> bytes:
    """Arguments and result as text."""
    body = struct.pack("!IHH", oid, 0, len(arguments))
    for argument in arguments:
        body += struct.pack("!I", len(argument)) + argument
    return m.message(m.FUNCTION_CALL, body + struct.pack("!H", 0))


def replay(client: Client, steps: Sequence[Step], piece: int = 0) -> list[list[Message]]:
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    answers = []
    for step in steps:
        data, end = (step, 1) if isinstance(step, bytes) else step
        size = piece or len(data) or 1
        for at in range(0, len(data), size):
            client.send(data[at : at + size])
        answers.append(client.until_ready(end) if isinstance(end, int) else client.until(end))
    return answers


def both(database: EmbeddedPostgres, sidecar: Sidecar, steps: Sequence[Step], piece: int) -> None:
    address = (database.host, database.port)
    with Client.login(address, database.user, database.database) as direct:
        expected = replay(direct, steps)
    with sidecar.login() as client:
        answers = replay(client, steps, piece)
        assert answers == expected, f"{list(map(kinds, answers))}, not {list(map(kinds, expected))}"
        assert client.value("select 'still here'") == "still here"
    sidecar.until_whole()


NOTICE = "do $$ begin raise notice 'hear %', 'hear'; end $$"
ROW = copy_data(b"1\tone\n")
BAD_ROW = copy_data(b"one\t1\n")
COPY_IN = "copy wire_copy from stdin"
CURSOR = "select i from generate_series(1, 10) i"
SLEEP = "select pg_sleep(0.001)"

CONVERSATIONS: dict[str, list[Step]] = {
    # simple
    "a query": [query("select 1 as a, null as b, 'x' as c")],
    "no query": [query(""), query(";"), query("-- nothing"), query(" ; ; ")],
    "several statements": [query("select 1; select 2, 3; values ('a'), ('b')")],
    "an error among several": [query("select 1; select 1/0; select 3"), query("select 4")],
    "errors": [query("selec 1"), query("select nothing"), query("select 1/0"), query("select 1")],
    "a transaction": [query("begin"), query("select 1"), query("commit")],
    "a transaction in one": [query("begin; select 1; savepoint a; rollback to a; commit")],
    "a failed transaction": [
        *(
            query("begin"),
            query("select 1/0"),
            query("select 1"),
            query("commit"),
            query("select 1"),
        ),
    ],
    "a savepoint": [
        query("begin"),
        *(query("savepoint a"), query("select 1/0"), query("rollback to a"), query("select 2")),
        query("rollback"),
    ],
    "commands out of place": [query("commit"), query("rollback"), query("begin; begin; end")],
    "a notice": [query(NOTICE), query(f"{NOTICE}; {NOTICE}")],
    "many notices": [
        query("do $$ begin for i in 1..2000 loop raise notice '%', i; end loop; end $$")
    ],
    "a long error": [query("do $$ begin raise exception '%', repeat('x', 200000); end $$")],
    "a long notice": [query("do $$ begin raise notice '%', repeat('x', 200000); end $$")],
    "many rows": [query("select i, 'row ' || i from generate_series(1, 20000) i")],
    "rows of no columns": [query("select from generate_series(1, 10)")],
    "long rows": [
        query("select repeat('x', 3000000), repeat('y', 200000) from generate_series(1, 2)")
    ],
    "a long query": [query("select length('" + "x" * 100_000 + "')")],
    "settings told": [
        query("set application_name to 'a'; set datestyle to german; set timezone to 'Asia/Tokyo'"),
        *(
            query("select '2020-03-04'::date"),
            query("show timezone"),
            query("show application_name"),
        ),
        query("set local application_name to 'b'"),
        *(query("begin; set local datestyle to sql"), query("select '2020-03-04'::date")),
        *(query("rollback"), query("select '2020-03-04'::date")),
    ],
    "settings reset": [
        *(query("set datestyle to german"), query("reset datestyle"), query("show datestyle")),
        *(query("set datestyle to german"), query("discard all"), query("show datestyle")),
    ],
    "a cursor": [
        query("begin; declare c scroll cursor for " + CURSOR),
        *(query("fetch 3 from c"), query("fetch backward 2 from c"), query("move all in c")),
        query("close c; commit"),
    ],
    "several cycles at once": [
        (query("select 1") + query("select 1/0") + query("select 3"), 3),
        (query("begin") + query("select 1/0") + query("select 3") + query("rollback"), 4),
    ],
    # extended
    "extended": [run("select $1::int + 1", "41"), run("select 1"), run("")],
    "extended, empty": [parse("") + bind() + execute() + SYNC],
    "extended transaction": [run("begin"), run("select 1"), run("commit")],
    "description of a statement": [
        parse("select $1::int, $2::text", types=[0, 25]) + describe("S") + SYNC,
        parse("insert into wire_items values ($1, $2)") + describe("S") + SYNC,
    ],
    "sync alone": [SYNC, (SYNC * 5, 5)],
    "error in Parse": [parse("selec") + bind() + describe("P") + execute() + SYNC, run("select 1")],
    "error in Bind": [parse("select $1::int") + bind("x") + execute() + SYNC, run("select 1")],
    "error in Execute": [parse("select 1/$1::int") + bind("0") + execute() + SYNC, run("select 1")],
    "error at commit": [
        run("insert into wire_child values (0)"),
        query("insert into wire_child values (0)"),
        *(run("begin"), run("insert into wire_child values (0)"), run("commit"), run("select 1")),
    ],
    "nothing there": [
        *(bind(portal="p") + SYNC, bind(name="nobody") + SYNC, execute(portal="nobody") + SYNC),
        *(describe("P", "nobody") + SYNC, describe("S", "nobody") + SYNC),
        *(close("P", "nobody") + SYNC, close("S", "nobody") + SYNC),
    ],
    "a pipeline": [
        (run("select 1") + run("select 2") + run("select 1/0") + run("select 4") + SYNC, 5),
    ],
    "a pipeline in one transaction": [
        parse("select 1") + bind() + execute() + parse("select 2") + bind() + execute() + SYNC,
        parse("select 1") + bind() + execute() + parse("selec") + bind() + execute() + SYNC,
    ],
    "a name that is not taken after all": [
        (
            (parse("select * from nowhere", "a") + SYNC)
            + (parse("select 1", "a") + bind(name="a") + execute() + SYNC),
            2,
        ),
        (
            (parse("deallocate all", "c") + describe("S", "c") + bind(name="c") + execute() + SYNC)
            + (parse("select 3", "c") + describe("S", "c") + bind(name="c") + execute() + SYNC),
            2,
        ),
        (close("S", "b") + SYNC + parse("select 2", "b") + SYNC + close("S", "b") + SYNC, 3),
    ],
    "a text that is not prepared after all": [
        query("begin"),
        (
            (query("select 1/0") + parse("select 5", "a") + SYNC)
            + (parse("select 5", "b") + bind(name="b") + execute() + SYNC),
            3,
        ),
        query("rollback"),
    ],
    "a text in a failed transaction": [
        *(parse("select 6", "a") + SYNC, query("begin"), query("select 1/0")),
        *(parse("select 6", "b") + SYNC, parse("rollback", "c") + SYNC, query("rollback")),
        *(bind(name="b") + SYNC, bind(name="c") + execute() + SYNC, parse("select 6", "b") + SYNC),
    ],
    "the unnamed statement after what pins": [
        parse("create temp table wire_unnamed (a int)") + bind() + execute() + SYNC,
        *(bind() + execute() + SYNC, query("drop table wire_unnamed")),
    ],
    "a query in the middle": [
        (parse("select 1") + bind() + execute() + query("select 2") + SYNC, 2),
        (parse("select 1/0") + bind() + execute() + query("select 2") + SYNC, 1),
    ],
    "flush": [
        (parse("select 1") + FLUSH, "1"),
        *((describe("S") + FLUSH, "T"), (bind() + FLUSH, "2"), (execute() + FLUSH, "C"), SYNC),
        (FLUSH + query("select 2"), 1),
    ],
    "flush after an error": [
        (parse("selec") + bind() + execute() + FLUSH, "E"),
        bind() + execute() + FLUSH + SYNC,
    ],
    "a portal in parts": [
        parse(CURSOR) + bind() + execute(3) + execute(3) + execute(3) + execute(3) + SYNC,
    ],
    "a portal over several cycles": [
        query("begin"),
        *(parse(CURSOR) + bind(portal="p") + execute(4, "p") + SYNC, execute(4, "p") + SYNC),
        *(describe("P", "p") + SYNC, execute(0, "p") + SYNC, close("P", "p") + SYNC),
        *(execute(0, "p") + SYNC, query("rollback")),
    ],
    "a portal that has ended": [
        parse(CURSOR) + bind(portal="p") + execute(4, "p") + SYNC,
        execute(4, "p") + SYNC,
    ],
    "the unnamed statement of an earlier cycle": [
        parse("select $1::int * 2") + SYNC,
        *(bind("1") + execute() + SYNC, bind("2") + execute() + SYNC, bind("x") + execute() + SYNC),
        *(describe("S") + bind("3") + execute() + SYNC, close("S") + SYNC),
    ],
    "the unnamed statement after a simple query": [
        parse("select 1") + SYNC,
        *(query("select 2"), bind() + SYNC),
    ],
    "the unnamed statement that failed": [
        parse("select 1") + SYNC,
        *(parse("selec") + SYNC, bind() + execute() + SYNC),
    ],
    "a long value": [run("select length($1)", "x" * 300_000)],
    "long queries": [run("select length('" + "x" * 300_000 + "')") for _ in range(3)],
    "a notice from a pipeline": [(run(NOTICE) + query(NOTICE), 2), SYNC],
    # functions (54.2.5)
    "a function call": [
        function_call(89),  # version()
        function_call(1397, b"-7"),  # abs(int4)
        function_call(1397),
        function_call(1),  # there is none
    ],
    # copy
    "copy out": [query("copy (select 1, 'x') to stdout"), run("copy (select 1, 'x') to stdout")],
    "copy out, empty": [query("copy (select 1 where false) to stdout")],
    "copy out, long": [
        query("copy (select repeat('x', 1000) from generate_series(1, 5000)) to stdout")
    ],
    "copy out that fails": [
        query("copy (select 1/(3 - i) from generate_series(1, 5) i) to stdout")
    ],
    "copy in": [
        (query(COPY_IN), "G"),
        *(ROW + ROW + COPY_DONE, query("select count(*) from wire_copy; truncate wire_copy")),
    ],
    "copy in without waiting": [query(COPY_IN) + ROW + COPY_DONE, query("truncate wire_copy")],
    "copy in, nothing": [(query(COPY_IN), "G"), COPY_DONE],
    "copy in, in pieces": [
        (query(COPY_IN), "G"),
        copy_data(b"1\to") + copy_data(b"ne\n2") + copy_data(b"\ttwo\n") + COPY_DONE,
        query("select * from wire_copy; truncate wire_copy"),
    ],
    "copy in, long": [
        (query(COPY_IN), "G"),
        copy_data(b"7\t" + b"x" * 500_000 + b"\n") * 2 + ROW * 20_000 + COPY_DONE,
        query("select count(*), sum(length(b)) from wire_copy; truncate wire_copy"),
    ],
    "copy in given up": [(query(COPY_IN), "G"), ROW + copy_fail("no more"), query("select 1")],
    "copy in that fails": [
        (query(COPY_IN), "G"),
        ROW + BAD_ROW + ROW * 3 + COPY_DONE,
        query("select 1"),
    ],
    "copy in that fails at once": [
        query("copy nowhere from stdin"),
        ROW * 10 + COPY_DONE + query("select 1"),
    ],
    "copy in that fails, given up": [
        (query(COPY_IN), "G"),
        BAD_ROW + copy_fail("x"),
        query("select 1"),
    ],
    "copy in within a transaction": [
        *(query("begin"), (query(COPY_IN), "G"), ROW + COPY_DONE, query("rollback")),
        *(query("begin"), (query(COPY_IN), "G"), BAD_ROW + COPY_DONE, query("rollback")),
    ],
    "copy in, twice in one": [
        (query(f"{COPY_IN}; {COPY_IN}; truncate wire_copy"), "G"),
        *((ROW + COPY_DONE, "G"), ROW + COPY_DONE, query("select count(*) from wire_copy")),
    ],
    "copy in, extended": [
        (parse(COPY_IN) + bind() + execute() + FLUSH, "G"),
        *(
            ROW + COPY_DONE + SYNC,
            run("select count(*) from wire_copy"),
            query("truncate wire_copy"),
        ),
    ],
    "copy in, extended, with an early sync": [  # as libpq does it; the server ignores the first
        (parse(COPY_IN) + bind() + describe("P") + execute() + SYNC, "G"),
        *(
            ROW + COPY_DONE + SYNC,
            run("select count(*) from wire_copy"),
            query("truncate wire_copy"),
        ),
    ],
    "copy in, extended, all at once": [
        parse(COPY_IN) + bind() + execute() + ROW + COPY_DONE + SYNC,
        parse(COPY_IN) + bind() + execute() + SYNC + ROW + COPY_DONE + SYNC,
        *(run("select count(*) from wire_copy"), query("truncate wire_copy")),
    ],
    "copy in, extended, that fails": [
        (parse(COPY_IN) + bind() + execute() + FLUSH, "G"),
        *(BAD_ROW + ROW * 5 + COPY_DONE + SYNC, run("select 1")),
    ],
    "copy in, extended, with an early sync, that fails": [
        (parse(COPY_IN) + bind() + execute() + SYNC, "G"),
        *(BAD_ROW + ROW * 5 + COPY_DONE + SYNC, run("select 1")),
    ],
    "copy in, extended, given up": [
        (parse(COPY_IN) + bind() + execute() + SYNC, "G"),
        *(ROW + copy_fail("x") + SYNC, run("select 1")),
    ],
    "copy data out of place": [
        ROW + COPY_DONE + query("select 1"),
        ROW * 3 + copy_fail("x") + run("select 1"),
    ],
    # broken bodies, to which PostgreSQL answers with an error and goes on
    "a query without its end": [b"Q\0\0\0\x08abcd", query("select 1")],
    "a query with more than its end": [b"Q\0\0\0\x0bselect\0", query("select 1")],
    "execute without its end": [b"E\0\0\0\4" + SYNC, run("select 1")],
    "close of something else": [b"C\0\0\0\x07Xa\0" + SYNC, run("select 1")],
    "describe of something else": [b"D\0\0\0\x07Xa\0" + SYNC, run("select 1")],
    "describe of nothing": [b"D\0\0\0\4" + SYNC, run("select 1")],
    "sync with a body": [b"S\0\0\0\5x", run("select 1")],
}
SMALL = {
    name: steps
    for name, steps in CONVERSATIONS.items()
    if sum(len(step if isinstance(step, bytes) else step[0]) for step in steps) < 5000
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversation_is_the_same(database, sidecar, name):
    both(database, sidecar, CONVERSATIONS[name], 0)


@pytest.mark.parametrize("name", SMALL)
def test_conversation_in_single_bytes_is_the_same(database, sidecar, name):
    both(database, sidecar, CONVERSATIONS[name], 1)


@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name not in SMALL])
def test_long_conversation_in_pieces_is_the_same(database, sidecar, name):
    both(database, sidecar, CONVERSATIONS[name], 10_007)


def test_query_amid_a_copy_ends_both(database, sidecar):
    """PostgreSQL cannot tell where it is any more and hangs up; the client is told the same."""
    answers = []
    steps = [(query(COPY_IN), "G"), (ROW + query("select 1"), "E")]
    for address in ((database.host, database.port), sidecar.address):
        user, name = (database.user, database.database)
        with Client.login(address, user, name) as client:
            answers.append((replay(client, steps), client.until_closed()))
    direct, pooled = answers
    assert pooled == direct
    sidecar.until_whole()


def test_statement_that_was_skipped_is_not_run(sidecar):
    """The server never saw it, an error before it made it skip. PostgreSQL would have the one before
    still; we do not know it any more, and say so."""
    with sidecar.login() as client:
        client.ask(parse("select 1") + SYNC)
        client.ask(execute(portal="nobody") + parse("select 2") + SYNC)
        answer = client.ask(bind() + execute() + SYNC)
    if sidecar.pool.resets_always:
        assert [m.columns for m in answer if m.kind == "D"] == [[b"1"]]
    else:
        assert error(answer)["C"] == "26000"


def test_terminate_ends_what_went_before_it(sidecar):
    with sidecar.login() as client:
        client.send(query("select 1") + TERMINATE + query("select 2"))
        assert "2" not in str(client.until_closed())
    sidecar.until_whole()


# -- drivers -----------------------------------------------------------------------------------


def dsns(database: EmbeddedPostgres, sidecar: Sidecar) -> list[str]:
    """Where to go directly, and through the sidecar."""
    return [database.dsn(), sidecar.dsn()]


PSQL = r"""
\set VERBOSITY verbose
select 1 as a, 'x' as b;
select 1/0;
select * from nowhere;
begin;
insert into wire_copy values (1, 'one') returning *;
select 1 \; select 2 \; select 3;
savepoint a;
select 1/0;
rollback to a;
rollback;
\copy wire_copy from stdin
1	one
2	two
\.
copy wire_copy from stdin;
x	y
\.
copy (select * from wire_copy order by a) to stdout;
truncate wire_copy;
select $1::int + $2::int \bind 1 2 \g
select i, repeat('x', i) from generate_series(1, 3) i \gdesc
\set FETCH_COUNT 7
select i from generate_series(1, 20) i;
\unset FETCH_COUNT
do $$ begin raise notice 'hear'; raise warning 'hear'; end $$;
set application_name to 'x';
show application_name;
\d wire_items
\dn
\encoding
\encoding latin1
select 'é';
"""


def test_psql_shows_the_same(database, sidecar):
    answers = []
    for dsn in dsns(database, sidecar):
        done = subprocess.run(
            [database.bin_dir / "psql", "-X", "-d", dsn],
            input=PSQL.encode(),
            capture_output=True,
            timeout=20,
            check=False,
        )
        answers.append((done.returncode, done.stdout, done.stderr))
    direct, pooled = answers
    assert pooled == direct
    assert direct[0] == 0
    sidecar.until_whole()


def psycopg_queries(connection: psycopg.Connection[Any]) -> Any:
    notices: list[str | None] = []
    connection.add_notice_handler(lambda diagnostic: notices.append(diagnostic.message_primary))
    found: list[Any] = [notices]
    values = (1, "x", None, b"\0\xff", 1.5, [1, 2])
    found += [connection.execute("select %s", [value]).fetchall() for value in values]
    found.append(connection.execute("select 1, 'a'", binary=True).fetchone())
    connection.execute(NOTICE)
    connection.commit()
    try:
        connection.execute("select 1/0")
    except psycopg.Error as error:
        found.append((error.sqlstate, str(error)))
    found.append(connection.info.transaction_status)
    connection.rollback()
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into wire_copy values (%s, %s) returning a",
            [(i, str(i)) for i in range(300)],
            returning=True,
        )
        found.append(sum(1 for _ in cursor.results()))
    connection.rollback()
    # becomes a prepared statement by itself
    found += [connection.execute("select %s::int", [i]).fetchone() for i in range(10)]
    connection.commit()
    return found


def psycopg_pipeline(connection: psycopg.Connection[Any]) -> Any:
    found: list[Any] = []
    connection.autocommit = True
    with connection.pipeline() as pipeline:
        cursors = [connection.execute("select %s::int", [i]) for i in range(200)]
        pipeline.sync()
        found.append([cursor.fetchone() for cursor in cursors])
    with pytest.raises(psycopg.errors.DivisionByZero), connection.pipeline():  # noqa: PT012  the error shows at the end
        connection.execute("insert into wire_copy values (1, 'lost')")
        connection.execute("select 1/0")
        connection.execute("select 1")
    found.append(connection.execute("select count(*) from wire_copy").fetchone())
    with connection.pipeline(), connection.transaction():
        for i in range(50):
            connection.execute("insert into wire_copy values (%s, 'x')", [i], prepare=True)
    found.append(connection.execute("delete from wire_copy").rowcount)
    return found


def psycopg_cursors(connection: psycopg.Connection[Any]) -> Any:
    found: list[Any] = []
    with connection.transaction(), connection.cursor("a") as a, connection.cursor("b") as b:
        a.itersize = b.itersize = 7
        a.execute("select i from generate_series(1, 50) i")
        b.execute("select i from generate_series(51, 100) i")
        found += [list(zip(a, b, strict=True))]
    with connection.transaction(), connection.cursor("c", scrollable=True) as c:
        c.execute("select i from generate_series(1, 50) i")
        c.scroll(10)
        found += [c.fetchmany(3), c.fetchone()]
        c.scroll(-5)
        found += [c.fetchall()]
    return found


def psycopg_copies(connection: psycopg.Connection[Any]) -> Any:
    found: list[Any] = []
    cursor = connection.cursor()
    with cursor.copy("copy wire_copy from stdin") as copy:
        for i in range(20_000):
            copy.write_row((i, "x" * 50))
    found.append(cursor.rowcount)
    with cursor.copy("copy wire_copy (a) from stdin (format binary)") as copy:
        copy.set_types(["int4"])
        for i in range(10):
            copy.write_row((i,))
    found.append(cursor.rowcount)
    with cursor.copy("copy (select * from wire_copy order by a, b) to stdout") as copy:
        found.append(sum(1 for _ in copy.rows()))
    with cursor.copy("copy wire_copy to stdout (format binary)") as copy:
        found.append(sum(len(data) for data in copy))
    connection.rollback()
    with (  # noqa: PT012  the error shows anywhere
        pytest.raises(psycopg.errors.InvalidTextRepresentation) as caught,
        cursor.copy("copy wire_copy from stdin") as copy,
    ):
        for _ in range(50_000):
            copy.write("not a number\tx\n")
    found.append(str(caught.value))
    connection.rollback()
    with (  # noqa: PT012  as above
        pytest.raises(psycopg.errors.QueryCanceled) as caught_fail,
        cursor.copy("copy wire_copy from stdin") as copy,
    ):
        copy.write("1\tx\n")
        raise psycopg.errors.QueryCanceled("given up")
    found.append(str(caught_fail.value))
    connection.rollback()
    found.append(connection.execute("select count(*) from wire_copy").fetchone())
    return found


PSYCOPG = [psycopg_queries, psycopg_pipeline, psycopg_cursors, psycopg_copies]


@pytest.mark.parametrize("use", PSYCOPG)
def test_psycopg_finds_the_same(database, sidecar, use):
    answers = []
    for dsn in dsns(database, sidecar):
        with psycopg.connect(dsn) as connection:
            answers.append(use(connection))
    direct, pooled = answers
    assert pooled == direct
    sidecar.until_whole()


async def test_psycopg_async_finds_the_same(database, sidecar):
    answers = []
    for dsn in dsns(database, sidecar):
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            found: list[Any] = []
            async with connection.pipeline():
                cursors = [await connection.execute("select %s::int", [i]) for i in range(50)]
                found += [await cursor.fetchone() for cursor in cursors]
            async with connection.transaction(), connection.cursor("c") as named:
                await named.execute("select generate_series(1, 300)")
                found += [row async for row in named]
            async with connection.cursor().copy("copy wire_items to stdout") as copy:
                found += [row async for row in copy.rows()]
            answers.append(found)
    direct, pooled = answers
    assert pooled == direct
    sidecar.until_whole()


async def asyncpg_uses(connection: asyncpg.Connection) -> Any:
    typed = "select $1::int, $2::text, $3::jsonb"
    found: list[Any] = [await connection.fetch(typed, i, "x", "{}") for i in range(10)]
    statement = await connection.prepare("select * from wire_items where id = $1")
    found += [[await statement.fetchrow(i) for i in range(5)], statement.get_attributes()]
    async with connection.transaction():
        found.append([row async for row in connection.cursor("select generate_series(1, 120)")])
        cursor = await connection.cursor("select generate_series(1, 50)")
        await cursor.forward(10)
        found.append(await cursor.fetch(5))
        try:
            async with connection.transaction():
                await connection.execute("select 1/0")
        except asyncpg.DivisionByZeroError as error:
            found.append(str(error))
        found.append(await connection.fetchval("select 'after a savepoint'"))
    await connection.executemany(
        "insert into wire_copy values ($1, 'x')", [(i,) for i in range(500)]
    )
    records = [(i, "y" * 100) for i in range(5000)]
    found.append(await connection.copy_records_to_table("wire_copy", records=records))
    found.append(await connection.fetchval("select count(*) from wire_copy"))
    out: list[bytes] = []

    async def take(data: bytes) -> None:
        out.append(bytes(data))

    await connection.copy_from_query("select * from wire_copy order by a, b", output=take)
    found.append(b"".join(out))
    with pytest.raises(asyncpg.PostgresError):
        await connection.copy_to_table("wire_copy", source=chunks_of_nonsense())
    await connection.execute("truncate wire_copy")
    long = "select length('" + "x" * 300_000 + "') + $1"
    found += [await connection.fetchval(long, i) for i in range(3)]
    found.append(len(await connection.fetchval("select repeat('x', 5000000)")))
    found.append(await connection.execute("select 1; select 2"))
    await connection.execute("set timezone to 'Asia/Tokyo'")
    found += [connection.get_settings().TimeZone, await connection.fetchval("show timezone")]
    await connection.reset()
    found += [connection.get_settings().TimeZone, await connection.fetchval("show timezone")]
    return found


async def chunks_of_nonsense() -> Any:
    for _ in range(200):
        yield b"nonsense\n" * 1000


@pytest.mark.parametrize("cached", [100, 0])
async def test_asyncpg_finds_the_same(database, sidecar, cached):
    answers = []
    for dsn in dsns(database, sidecar):
        connection = await asyncpg.connect(dsn, statement_cache_size=cached)
        answers.append(await asyncpg_uses(connection))
        await connection.close()
    direct, pooled = answers
    assert pooled == direct
    await asyncio.to_thread(sidecar.until_whole)


# -- at random ---------------------------------------------------------------------------------


def test_conversations_all_at_once_are_the_same(database, sidecar):
    """Nobody waits for an answer: several conversations in one go, cut anywhere."""

    @example(["a text in a failed transaction"] * 2, [])  # names that are taken
    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.sampled_from(sorted(SMALL)), min_size=1, max_size=6),
        st.lists(st.integers(1, 400), max_size=8),
    )
    def check(names: list[str], sizes: list[int]) -> None:
        steps = [step for name in names for step in CONVERSATIONS[name]]
        data = b"".join(step if isinstance(step, bytes) else step[0] for step in steps)
        ends = [1 if isinstance(step, bytes) else step[1] for step in steps]
        cycles = sum(end for end in ends if isinstance(end, int))
        address = (database.host, database.port)
        with Client.login(address, database.user, database.database) as direct:
            direct.send(data)
            expected = direct.until_ready(cycles)
        with sidecar.login() as client:
            client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for size in sizes:
                client.send(data[:size])
                data = data[size:]
            client.send(data)
            answer = client.until_ready(cycles)
            assert answer == expected, f"{kinds(answer)}, not {kinds(expected)}"
            assert client.value("select 'still here'") == "still here"

    check()
    sidecar.until_whole()
