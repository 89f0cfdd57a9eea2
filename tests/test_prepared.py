"""Prepared statements on connections that a client does not own.

A client must never see that: its names are its own, its statements are there on whichever connection it
gets, and an error takes with it what PostgreSQL would take.
"""

import asyncio
import random

import asyncpg
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.demo.postgres import EmbeddedPostgres
from tests.wire import (
    FLUSH,
    SYNC,
    Client,
    Message,
    Sidecar,
    bind,
    close,
    describe,
    error,
    execute,
    kinds,
    parse,
    query,
)


@pytest.fixture
def single(postgres):
    """All clients use one connection."""
    with Sidecar(postgres, max_size=1) as sidecar:
        yield sidecar


def use(name: str = "", *values: str) -> bytes:
    return bind(*values, name=name) + execute() + SYNC


def rows(messages: list[Message]) -> list[str | None]:
    """The first columns, where all went well."""
    assert "E" not in kinds(messages), error(messages)
    firsts = [message.columns[0] for message in messages if message.kind == "D"]
    return [None if first is None else first.decode() for first in firsts]


def prepared_on(client: Client) -> list[str | None]:
    """The statements of the connection that this client gets now."""
    return [
        row[0] for row in client.rows("select statement from pg_prepared_statements order by 1")
    ]


def assert_books_right(sidecar: Sidecar) -> None:
    """What we believe a connection has is what it has."""
    sidecar.until_whole(clients=None)
    (server,) = sidecar.pool.state.idle
    with sidecar.login() as client:
        names = {row[0] for row in client.rows("select name from pg_prepared_statements")}
    assert names == {statement.name.decode() for statement in server.prepared}


# -- names -------------------------------------------------------------------------------------


def test_statement_is_there_on_every_connection(postgres):
    with Sidecar(postgres, max_size=3) as sidecar, sidecar.login() as client:
        client.ask(parse("select pg_backend_pid()", "s") + SYNC)
        holders = [sidecar.login() for _ in range(3)]
        for holder in holders:
            holder.rows("begin")
        for holder in holders:
            backend = holder.value("select pg_backend_pid()")
            holder.rows("commit")
            assert rows(client.ask(use("s"))) == [backend]
            holder.rows("begin")


def test_equal_names_are_different_statements(single):
    with single.login() as a, single.login() as b:
        a.ask(parse("select 'a'", "s") + SYNC)
        b.ask(parse("select 'b'", "s") + SYNC)
        assert [rows(c.ask(use("s"))) for c in (a, b, a, b)] == [["a"], ["b"], ["a"], ["b"]]


def test_equal_statements_are_prepared_once(single):
    clients = [single.login() for _ in range(5)]
    for number, client in enumerate(clients):
        client.ask(parse("select 42", f"name {number}") + SYNC)
    assert prepared_on(clients[0]) == ["select 42"]
    assert [rows(c.ask(use(f"name {i}"))) for i, c in enumerate(clients)] == [["42"]] * 5


def test_name_is_taken_until_it_is_closed(postgres, single):
    steps = [
        parse("select 1", "s") + SYNC,
        *(parse("select 2", "s") + SYNC, use("s")),
        *(close("S", "s") + SYNC, use("s")),
        *(parse("select 3", "s") + SYNC, use("s")),
        close("S", "s") + parse("select 4", "s") + use("s"),
        parse("select 5", "t") + parse("select 6", "t") + use("t"),
        use("t"),
    ]
    address = (postgres.host, postgres.port)
    with (
        Client.login(address, postgres.user, postgres.database) as direct,
        single.login() as client,
    ):
        for step in steps:
            expected, answer = direct.ask(step), client.ask(step)
            assert kinds(answer) == kinds(expected), step
            if "E" in kinds(expected):
                assert error(answer)["C"] == error(expected)["C"]
            else:
                assert rows(answer) == rows(expected)
    assert_books_right(single)


def test_names_of_ours_lead_nobody_to_a_statement(single):
    with single.login() as client, single.login() as stranger:
        client.ask(parse("select 'secret'", "s") + SYNC)
        (server,) = single.pool.state.idle
        ((statement, _),) = server.prepared.items()
        name = statement.name.decode()
        for data in (use(name), describe("S", name) + SYNC):
            assert error(stranger.ask(data))["C"] == "26000"
        stranger.ask(close("S", name) + SYNC)
        assert rows(client.ask(use("s"))) == ["secret"]
    assert_books_right(single)


def test_statement_that_somebody_deallocates_by_our_name_comes_back(single):
    with single.login() as client, single.login() as stranger:
        client.ask(parse("select 'mine'", "s") + SYNC)
        (server,) = single.pool.state.idle
        ((statement, _),) = server.prepared.items()
        assert "E" not in kinds(stranger.ask(query(f"deallocate {statement.name.decode()}")))
        assert rows(client.ask(use("s"))) == ["mine"]
    assert_books_right(single)


@pytest.mark.parametrize("command", ["deallocate all", "DISCARD ALL"])
@pytest.mark.parametrize("is_extended", [False, True])
def test_deallocate_all_is_of_the_clients_own(single, command, is_extended):
    with single.login() as client, single.login() as other:
        for each in (client, other):
            each.ask(parse("select 'here'", "s") + SYNC)
        client.ask(parse(command) + use() if is_extended else query(command))
        assert error(client.ask(use("s")))["C"] == "26000"
        assert rows(other.ask(use("s"))) == ["here"]
        client.ask(parse("select 'again'", "s") + SYNC)
        assert rows(client.ask(use("s"))) == ["again"]
    assert_books_right(single)


def test_deallocate_all_amid_a_pipeline_leaves_the_books_right(single):
    with single.login() as client, single.login() as other:
        other.ask(parse("select 1", "s") + SYNC)
        pipeline = parse("deallocate all") + bind() + execute() + parse("select 1", "t") + SYNC
        assert "E" not in kinds(client.ask(pipeline))
        assert rows(other.ask(use("s"))) == ["1"]
        assert rows(other.ask(parse("select 1", "u") + use("u"))) == ["1"]
    assert_books_right(single)


def test_long_statement_is_refused_by_name_only(single):
    """It would have to be kept, to prepare it again elsewhere."""
    text = "select length('" + "x" * 1_100_000 + "')"
    with single.login() as client:
        assert rows(client.ask(parse(text) + use())) == ["1100000"]
        client.send(parse(text, "s") + SYNC)
        fields = error(client.until_closed())
    assert (fields["S"], fields["C"]) == ("FATAL", "54000")
    single.until_whole()


@pytest.mark.parametrize("kind", ["C", "D"])
def test_message_that_is_too_long_for_its_kind_is_refused_by_its_header(single, kind):
    """Of a long Close only the name was looked at and replaced: what came behind it in the same
    message went to the server as messages of its own. PostgreSQL takes none over 10,000 bytes."""
    with single.login() as client:
        client.send(kind.encode() + (60_000).to_bytes(4, "big") + b"Ss\0")
        fields = error(client.until_closed())
    assert (fields["S"], fields["C"]) == ("FATAL", "08P01")
    single.until_whole()


# -- what a text means -------------------------------------------------------------------------


def test_statements_of_clients_with_other_settings_are_not_shared(single):
    """Constants are made of a text when it is parsed: by the settings of who sent it."""
    text = "select '01/02/2020'::date::text, '2020-01-01 12:00'::timestamptz at time zone 'UTC'"
    expected = {}
    for style in ("ISO, DMY", "ISO, MDY"):
        for zone in ("UTC", "Asia/Tokyo"):
            with single.login(DateStyle=style, TimeZone=zone) as client:
                expected[style, zone] = client.rows(text)
    assert len({str(values) for values in expected.values()}) == 4
    clients = {key: single.login(DateStyle=key[0], TimeZone=key[1]) for key in expected}
    for client in clients.values():
        client.ask(parse(text, "s") + SYNC)
    for key, client in clients.items():
        answer = client.ask(use("s"))
        (row,) = [message.columns for message in answer if message.kind == "D"]
        assert [[value.decode() for value in row if value]] == expected[key]


def test_schema_of_the_client_is_where_its_statements_look(postgres, single):
    postgres.psql("""
        drop schema if exists tenant_a cascade; drop schema if exists tenant_b cascade;
        create schema tenant_a; create table tenant_a.things as select 1 as number;
        create schema tenant_b; create table tenant_b.things as select 'x' as word, now() as at;
    """)
    with single.login(search_path="tenant_a") as a, single.login(search_path="tenant_b") as b:
        for client in (a, b):
            client.ask(parse("select * from things", "s") + SYNC)
        assert [rows(c.ask(use("s"))) for c in (a, b, a)] == [["1"], ["x"], ["1"]]


def test_application_name_makes_no_statement_its_own(single):
    for name in ("a", "b"):
        single.login(application_name=name).ask(parse("select 1", "s") + SYNC)
    with single.login() as client:
        assert prepared_on(client) == ["select 1"]


# -- limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_connections_keep_a_bounded_number_of_statements(postgres, limit):
    rng = random.Random(limit)
    with Sidecar(postgres, max_size=1, max_prepared_statements=limit) as sidecar:
        clients = [sidecar.login() for _ in range(4)]
        for number, client in enumerate(clients):
            for i in range(3):
                client.ask(parse(f"select {number * 10 + i}", f"s{i}") + SYNC)
        for _ in range(100):
            number, i = rng.randrange(4), rng.randrange(3)
            assert rows(clients[number].ask(use(f"s{i}"))) == [f"{number * 10 + i}"]
        assert len(prepared_on(clients[0])) == limit
        pipeline = b"".join(bind(name=f"s{i % 3}") + execute() for i in range(9)) + SYNC
        assert rows(clients[0].ask(pipeline)) == ["0", "1", "2"] * 3
        assert_books_right(sidecar)


def test_statement_that_is_not_used_makes_room(postgres):
    with Sidecar(postgres, max_size=1, max_prepared_statements=2) as sidecar:
        with sidecar.login() as client:
            for text in ("select 1", "select 2"):
                client.ask(parse(text, text) + SYNC)
            client.ask(use("select 1"))
            client.ask(parse("select 3", "select 3") + SYNC)
            assert prepared_on(client) == ["select 1", "select 3"]
        assert_books_right(sidecar)


# -- errors ------------------------------------------------------------------------------------

FAILING = parse("select 1/0") + bind() + execute()


@pytest.mark.parametrize("limit", [1, 2, 10])
@pytest.mark.parametrize(
    "behind",
    [
        parse("select 1", "a") + parse("select 2", "b") + parse("select 3", "c"),
        close("S", "old") + parse("select 'new'", "old"),
        close("S", "old") + close("S", "old"),
        bind(name="old") + parse("select 1", "a") + close("S", "a") + parse("select 2", "a"),
        parse("select 1", "a") + parse("selec", "b") + parse("select 2", "c"),
    ],
)
def test_what_an_error_made_the_server_skip_never_was(postgres, limit, behind):
    """Undone in the wrong order, statements came back that no connection had, for all clients."""
    address = (postgres.host, postgres.port)
    with (
        Client.login(address, postgres.user, postgres.database) as direct,
        Sidecar(postgres, max_size=1, max_prepared_statements=limit) as sidecar,
        sidecar.login() as client,
        sidecar.login() as other,
    ):
        steps = [
            parse("select 'old'", "old") + SYNC,
            FAILING + behind + SYNC,
            *(use(name) for name in ("old", "a", "b", "c")),
        ]
        for step in steps:
            assert kinds(client.ask(step)) == kinds(direct.ask(step))
        assert_books_right(sidecar)
        for i in (1, 2, 3, 1, 2, 3):
            name = f"{other.pid} {i} {random.random()}"
            assert rows(other.ask(parse(f"select {i}", name) + use(name))) == [str(i)]
        assert_books_right(sidecar)


def test_statement_that_fails_elsewhere_fails_there_only(postgres, single):
    """Another client's connection lost the table meanwhile: an error, and the books are right."""
    postgres.psql("drop table if exists passing; create table passing (a int)")
    with single.login() as client, single.login() as other:
        client.ask(parse("select * from passing", "s") + SYNC)
        other.rows("discard all")
        postgres.psql("drop table passing")
        assert error(client.ask(use("s")))["C"] == "42P01"
        postgres.psql("create table passing (a int)")
        assert rows(client.ask(use("s"))) == []
    assert_books_right(single)


def test_flush_brings_answers_before_the_sync(single):
    with single.login() as client:
        client.ask(parse("select 1", "s") + SYNC)
        client.ask(close("S", "s") + SYNC)
        client.send(parse("select 1", "s") + FLUSH)  # the connection has it: we answer ourselves
        assert kinds(client.until("1")) == "1"
        client.send(describe("S", "s") + FLUSH)
        assert kinds(client.until("T")) == "tT"
        client.send(bind(name="s") + execute() + FLUSH)
        assert kinds(client.until("C")) == "2DC"
        assert kinds(client.ask(SYNC)) == "Z"
    assert_books_right(single)


@pytest.mark.parametrize("is_failed", [False, True])
@pytest.mark.parametrize("is_seen", [False, True])
def test_client_that_goes_between_parse_and_sync_leaves_nothing(single, is_failed, is_seen):
    with single.login() as client:
        client.send((FAILING if is_failed else b"") + parse("select 1", "s") + FLUSH)
        if is_seen:
            client.until("E" if is_failed else "1")
        client.abort()
    assert_books_right(single)
    with single.login() as client:
        assert error(client.ask(use("s")))["C"] == "26000"
        assert rows(client.ask(parse("select 2", "s") + use("s"))) == ["2"]
    assert_books_right(single)


# -- the unnamed statement ---------------------------------------------------------------------


def test_unnamed_statement_goes_with_its_client(postgres):
    with Sidecar(postgres, max_size=2) as sidecar, sidecar.login() as a, sidecar.login() as b:
        a.ask(parse("select 'a' || $1::text") + SYNC)
        b.ask(parse("select 'b' || $1::text") + SYNC)
        for value in "1", "2":
            assert rows(a.ask(use("", value))) == [f"a{value}"]
            assert rows(b.ask(use("", value))) == [f"b{value}"]
        with sidecar.login() as holder:
            holder.rows("begin")
            assert rows(a.ask(use("", "3"))) == ["a3"]
            assert rows(b.ask(describe("S") + use("", "3"))) == ["b3"]


@pytest.mark.parametrize(
    "data", [use(), describe("S") + SYNC, bind() + describe("P") + execute() + SYNC]
)
def test_unnamed_statement_of_another_client_is_not_found(single, data):
    with single.login() as client, single.login() as stranger:
        client.ask(parse("select 'secret'") + bind() + execute() + SYNC)
        answer = stranger.ask(data)
        assert kinds(answer) == "EZ"
        assert error(answer)["C"] == "26000"
        assert rows(stranger.ask(parse("select 'mine'") + use())) == ["mine"]
        assert rows(client.ask(use())) == ["secret"]


@pytest.mark.parametrize(
    "ending", [query("select 1"), close("S") + SYNC, parse("selec") + SYNC, query("")]
)
def test_unnamed_statement_ends_as_in_postgresql(single, ending):
    with single.login() as client:
        client.ask(parse("select 'old'") + SYNC)
        client.ask(ending)
        assert error(client.ask(use()))["C"] == "26000"


# -- drivers -----------------------------------------------------------------------------------


async def test_many_asyncpg_clients_share_two_connections(postgres):
    with Sidecar(postgres, max_size=2, max_prepared_statements=5) as sidecar:

        async def work(number: int) -> None:
            connection = await asyncpg.connect(sidecar.dsn())
            own = await connection.prepare(f"select $1::int + {number}")
            shared = await connection.prepare("select $1::text")
            for i in range(15):
                assert await own.fetchval(i) == number + i
                assert await shared.fetchval(str(number)) == str(number)
                assert await connection.fetchval("select $1::int * 2", i) == 2 * i
            await connection.close()

        await asyncio.gather(*(work(number) for number in range(20)))
        await asyncio.to_thread(sidecar.until_whole)


def test_psycopg_closes_what_it_has_too_much_of(postgres):
    with Sidecar(postgres, max_size=2) as sidecar:
        with psycopg.connect(sidecar.dsn(), autocommit=True) as connection:
            connection.prepare_threshold = 0
            connection.prepared_max = 2
            for _ in range(3):
                for i in range(6):
                    (found,) = connection.execute(f"select {i} + %s", [1]).fetchone() or (None,)
                    assert found == i + 1
            connection.execute("deallocate all")
            assert connection.execute("select 1").fetchone() == (1,)
        sidecar.until_whole()


# -- at random ---------------------------------------------------------------------------------

NAMES = ["", "a", "b", "c"]
TEXTS = ["select 1", "select 2", "select 3", "select $1::int", "selec", "select 1/0", ""]
MESSAGES = st.one_of(
    st.builds(parse, st.sampled_from(TEXTS), st.sampled_from(NAMES)),
    st.builds(lambda name: bind(name=name) + execute(), st.sampled_from(NAMES)),
    st.builds(lambda name: bind("7", name=name) + execute(), st.sampled_from(NAMES)),
    st.builds(lambda name: describe("S", name), st.sampled_from(NAMES)),
    st.builds(lambda name: close("S", name), st.sampled_from(NAMES)),
    st.just(FLUSH),
)
SOME = st.lists(MESSAGES, min_size=1, max_size=5)
CYCLES: st.SearchStrategy[tuple[list[bytes], bytes]] = st.one_of(
    st.tuples(SOME, st.just(SYNC)),
    st.tuples(SOME, SOME.map(lambda found: b"".join(found) + SYNC)),
    st.tuples(st.lists(MESSAGES, min_size=1, max_size=1), st.just(SYNC)),
    st.tuples(
        st.just([]),
        st.one_of(
            SOME.map(lambda found: b"".join(found) + SYNC),
            st.sampled_from([query("deallocate all"), query("select 1"), query("select 1/0")]),
        ),
    ),
)
"""Messages with a Flush behind them, and what ends the cycle."""


ENDS = {"P": "1E", "B": "2E", "D": "TnE", "C": "3E", "E": "CIsE", "H": ""}
"""What the answer to each message ends with."""


def flushed(client: Client, found: list[bytes]) -> list[Message]:
    """The answers to these messages and a Flush; after an error there are no more."""
    client.send(*found, FLUSH)
    answers: list[Message] = []
    for message in found:
        if message != FLUSH and kinds(answers)[-1:] != "E":
            answers += client.until(ENDS[chr(message[0])])
    return answers


def gist(messages: list[Message]) -> list[object]:
    """What must be the same; an error's text may name a statement."""
    return [
        (message.kind, message.fields["C"] if message.kind == "E" else message.body)
        for message in messages
    ]


@pytest.mark.parametrize("limit", [1, 3])
def test_whatever_clients_prepare_is_as_if_each_were_alone(postgres: EmbeddedPostgres, limit):
    address = (postgres.host, postgres.port)
    with Sidecar(postgres, max_size=2, max_prepared_statements=limit) as sidecar:

        @settings(max_examples=60, deadline=None)
        @given(st.lists(st.tuples(st.integers(0, 2), CYCLES), max_size=25))
        def check(steps: list[tuple[int, tuple[list[bytes], bytes]]]) -> None:
            alone = [Client.login(address, postgres.user, postgres.database) for _ in range(3)]
            together = [sidecar.login() for _ in range(3)]
            try:
                for number, (begin, end) in steps:
                    expected = flushed(alone[number], begin) if begin else []
                    answer = flushed(together[number], begin) if begin else []
                    assert gist(answer) == gist(expected)
                    expected += alone[number].ask(end)
                    answer += together[number].ask(end)
                    assert gist(answer) == gist(expected)
                    if "E" in kinds(expected):
                        # where a Parse was skipped, PostgreSQL has the unnamed statement of before
                        for client in (alone[number], together[number]):
                            client.ask(close("S") + SYNC)
            finally:
                for client in alone + together:
                    client.socket.close()

        check()
        sidecar.until_whole()


DATE = "select '1/2/2020'::date::text"
LOOK = bind(name="s") + execute() + SYNC


@pytest.mark.parametrize(
    "odd",
    [
        [
            query("begin; set local datestyle = 'ISO, DMY'"),
            parse(DATE, "s") + LOOK,
            query("commit"),
        ],
        [
            query("begin"),
            query("set datestyle = 'ISO, DMY'"),
            parse(DATE, "s") + LOOK,
            query("commit"),
        ],
        [query("set datestyle = 'ISO, DMY'"), parse(DATE, "s") + LOOK],
        [query("set datestyle = 'ISO, DMY'") + parse(DATE, "s") + LOOK],
        [query("select set_config('datestyle', 'ISO, DMY', false)") + parse(DATE, "s") + LOOK],
        # prepared, then another style, then evicted, then parsed again
        [
            parse(DATE, "s") + LOOK,
            query("set datestyle = 'ISO, DMY'"),
            parse("select 1", "t") + SYNC,
            LOOK,
        ],
        [
            *(parse(DATE, "s") + LOOK, query("begin; set local datestyle = 'ISO, DMY'")),
            *(parse("select 1", "t") + SYNC, LOOK, query("commit")),
        ],
    ],
    ids=range(7),
)
def test_a_text_that_was_parsed_by_other_settings_is_not_shared(postgres, odd):
    """'1/2/2020' is the second of January for most, and the first of February for some."""
    with Sidecar(postgres, max_size=1, max_prepared_statements=1) as sidecar:
        with sidecar.login() as client, sidecar.login() as other:
            for message in odd:
                assert "E" not in kinds(client.ask(message))
            assert "E" not in kinds(other.ask(parse(DATE, "s") + SYNC))
            answer = other.ask(LOOK)
            (row,) = [message.columns for message in answer if message.kind == "D"]
            assert row == [b"2020-01-02"]
            assert other.rows(DATE) == [["2020-01-02"]]
        sidecar.until_whole()


@pytest.mark.parametrize("name", ["mine", r"\1 ü", "pgsidecar_1"])
def test_name_that_is_taken_is_told_as_the_client_spells_it(postgres, name):
    """All else of the error is the server's own."""
    steps = [parse(text, name) + SYNC for text in ("select 1", "select 2", "select pgsidecar_1")]
    address = (postgres.host, postgres.port)
    with (
        Client.login(address, postgres.user, postgres.database) as direct,
        Sidecar(postgres, max_size=1) as sidecar,
    ):
        with sidecar.login() as client:
            told = [client.ask(step) for step in steps]
            assert told == [direct.ask(step) for step in steps]
            assert error(told[1])["M"] == f'prepared statement "{name}" already exists'
        sidecar.until_whole()
