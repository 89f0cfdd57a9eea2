"""Statements that were prepared before their table changed: as on a connection of the client's own."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.wire import (
    SYNC,
    Sidecar,
    bind,
    describe,
    error,
    execute,
    kinds,
    parse,
    query,
)

STALE = ("0A000", "cached plan must not change result type")
TEXT = "select * from changed where $1 <> 'x'"


@pytest.fixture
def table(postgres) -> Iterator[EmbeddedPostgres]:
    postgres.psql(
        "drop table if exists changed; create table changed (a int); insert into changed values (1)"
    )
    yield postgres
    postgres.psql("drop table changed")


def on_another(sidecar: Sidecar, stack: ExitStack, backend: str | None) -> None:
    """A client that holds a transaction open on this backend, so that others get another one."""
    other = stack.enter_context(sidecar.login())
    for _ in range(50):
        other.rows("begin")
        if other.value("select pg_backend_pid()") == backend:
            return
        with sidecar.login() as third:  # has the one that is wanted, and gives it back last
            third.rows("begin")
            other.rows("rollback")
            third.rows("rollback")
    raise AssertionError("that backend is not to be had")


def use(name: str, value: str = "1") -> bytes:
    return bind(value, name=name) + execute() + SYNC


@pytest.mark.parametrize("change", ["add column b text", "alter a type text"])
@pytest.mark.parametrize("where", ["on the same connection", "on another connection"])
@pytest.mark.parametrize("described", [True, False])
def test_statement_fails_until_it_is_prepared_anew(table, change, where, described) -> None:
    """The client was told other columns: it must not get these. Then it prepares the same text."""
    with ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(table, max_size=2, min_idle=2))
        client = stack.enter_context(sidecar.login())
        begin = parse(TEXT, "s") + (describe("S", "s") if described else b"") + SYNC
        assert "E" not in kinds(client.ask(begin))
        assert "E" not in kinds(client.ask(use("s")))
        backend = client.value("select pg_backend_pid()")
        table.psql(f"alter table changed {change}")
        if where == "on another connection":
            on_another(sidecar, stack, backend)
        for _ in range(2):
            told = error(client.ask(use("s")))
            assert (told["C"], told["M"]) == STALE
        assert "E" not in kinds(client.ask(parse(TEXT, "t") + describe("S", "t") + SYNC))
        answer = client.ask(use("t"))
        assert kinds(answer) == "2DCZ"
        (row,) = [message.columns for message in answer if message.kind == "D"]
        assert len(row) == (2 if change.startswith("add") else 1)


@pytest.mark.parametrize(
    "change",
    [
        "alter table changed add column b text",
        "begin; alter table changed add column b text; commit",
        "drop table changed; create table changed (a int, b text)",
    ],
)
def test_who_prepares_after_the_change_does_not_notice(table, change) -> None:
    """Where the change came through the sidecar; others prepared the same text before."""
    with ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(table, max_size=1))
        before, client, later = (stack.enter_context(sidecar.login()) for _ in range(3))
        begin = parse(TEXT, "s") + describe("S", "s") + use("s")
        assert "E" not in kinds(before.ask(begin))
        client.rows(change)
        answer = later.ask(begin)
        assert kinds(answer).startswith("1tT2"), error(answer)
        assert error(before.ask(use("s")))["C"] == "0A000"
        in_it = client.ask(query("begin; alter table changed drop column b; select 1"))
        assert "E" not in kinds(in_it)
        assert "E" not in kinds(client.ask(begin))
        client.rows("rollback")


def test_in_a_transaction_it_fails_the_transaction(table) -> None:
    with ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(table, max_size=2, min_idle=2))
        client = stack.enter_context(sidecar.login())
        client.ask(parse(TEXT, "s") + describe("S", "s") + SYNC)
        backend = client.value("select pg_backend_pid()")
        on_another(sidecar, stack, backend)
        table.psql("alter table changed add column b text")
        client.rows("begin")
        answer = client.ask(use("s"))
        assert kinds(answer) == "EZ"
        assert (error(answer)["C"], answer[-1].body) == ("0A000", b"E")
        assert error(answer)["R"] == "RevalidateCachedQuery"  # by which drivers know it
        assert error(client.ask(query("select 1")))["C"] == "25P02"
        client.rows("rollback")
        assert client.value("select 1") == "1"


def test_what_is_pipelined_behind_it_is_skipped(table) -> None:
    with ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(table, max_size=2, min_idle=2))
        client = stack.enter_context(sidecar.login())
        client.ask(parse(TEXT, "s") + describe("S", "s") + SYNC)
        client.ask(parse("insert into changed values ($1)", "i") + describe("S", "i") + SYNC)
        backend = client.value("select pg_backend_pid()")
        on_another(sidecar, stack, backend)
        table.psql("alter table changed add column b text")
        insert = bind("7", name="i") + execute()
        client.send(insert + bind("1", name="s") + execute() + insert + SYNC + use("i", "8"))
        first, second = kinds(client.until_ready()), kinds(client.until_ready())
        assert first == "2CEZ"  # and rolled back with the rest
        assert second == "2CZ"
        assert table.psql("select string_agg(a::text, ',' order by a) from changed") == "1,8"


def test_statement_that_runs_another_has_that_ones_columns(table) -> None:
    """FETCH, by a name that is another cursor's each time: PostgreSQL does not mind."""
    with ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(table, max_size=2, min_idle=2))
        client = stack.enter_context(sidecar.login())
        client.rows("begin; declare c cursor for select 1 as a")
        assert "E" not in kinds(client.ask(parse("fetch all from c", "f") + SYNC))
        assert kinds(client.ask(bind(name="f") + execute() + SYNC)) == "2DCZ"
        backend = client.value("select pg_backend_pid()")
        client.rows("commit")
        on_another(sidecar, stack, backend)
        client.rows("begin; declare c cursor for select 'x' as b, 2 as c")
        assert kinds(client.ask(bind(name="f") + execute() + SYNC)) == "2DCZ"
        client.rows("commit")


def test_statement_whose_columns_stay_goes_on(table) -> None:
    """Another connection, another index: nothing that the client was told has changed."""
    with ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(table, max_size=2, min_idle=2))
        client = stack.enter_context(sidecar.login())
        client.ask(parse(TEXT, "s") + describe("S", "s") + SYNC)
        backend = client.value("select pg_backend_pid()")
        on_another(sidecar, stack, backend)
        table.psql("create index on changed (a)")
        assert kinds(client.ask(use("s"))) == "2DCZ"
        assert kinds(client.ask(describe("S", "s") + use("s"))) == "tT2DCZ"
        sent = parse("select 1 where $1 = 'x'", "n") + use("n", "x") + use("n", "y") + use("s")
        assert kinds(client.ask(sent)) == "12DCZ"
        assert kinds(client.until_ready(2)) == "2CZ2DCZ"


def test_many_clients_on_many_connections_while_tables_change(table) -> None:
    """Whatever a client gets, it is what it was told, or the error."""
    with ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(table, max_size=3, min_idle=3))
        clients = [stack.enter_context(sidecar.login()) for _ in range(6)]
        for round_ in range(12):
            width = round_ % 2 + 1
            for number, client in enumerate(clients):
                name = f"s{round_}"
                messages = client.ask(parse(TEXT, name) + describe("S", name) + SYNC)
                if kinds(messages) == "1EZ":  # the first to meet a plan that is out of date
                    name += "again"
                    messages = client.ask(parse(TEXT, name) + describe("S", name) + SYNC)
                assert kinds(messages) == "1tTZ", (round_, number)
                answer = client.ask(use(name))
                assert kinds(answer) == "2DCZ"
                assert len(next(m for m in answer if m.kind == "D").columns) == width
            table.psql(
                "alter table changed add column b text"
                if width == 1
                else "alter table changed drop column b"
            )
            for client in clients:
                answer = client.ask(use(f"s{round_}"))
                assert kinds(answer) == "EZ", kinds(answer)
