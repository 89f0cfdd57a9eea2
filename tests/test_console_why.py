"""The console's tables that explain: statements, errors, leaks, blame; with real clients and their load."""

import re
from collections.abc import Iterator

import pytest

from tests.sidecar_process import eventually
from tests.test_console import CONSOLE, Row, one, table
from tests.wire import Client, Sidecar, error, query

SECRET = "a-customers-secret"


@pytest.fixture
def sidecar(postgres) -> Iterator[Sidecar]:
    with Sidecar(
        postgres,
        console=CONSOLE,
        max_size=1,
        min_idle=0,
        acquire_timeout="20s",
        leak_threshold="0.3s",
    ) as it:
        yield it


@pytest.fixture
def admin(sidecar: Sidecar) -> Client:
    return sidecar.login("admin", "pgsidecar")


def shape(row: Row) -> str:
    """The query, with one sign for whatever stands for a literal."""
    return re.sub(r"\$\d+", "?", row["query"] or "")


def held(sidecar: Sidecar) -> Client:
    """A client that has the only connection, idle in its transaction, after a query with a literal."""
    holder = sidecar.login(application_name="billing")
    holder.ask(query("BEGIN"))
    holder.ask(query(f"SELECT '{SECRET}',\n 42"))
    return holder


def test_holders_and_waits_show_the_statement(sidecar, admin):
    """The one that runs, else the last one of the lease; normalised, in one line."""
    holder = held(sidecar)
    shown = one(admin, "SHOW HOLDERS")
    assert (shown["state"], shape(shown)) == ("idle in transaction", "SELECT ?, ?")
    assert len(shown["fingerprint"] or "") == 16
    waiter = sidecar.login()
    waiter.send(query("SELECT 1"))
    sidecar.until(lambda: sidecar.pool.state.waiters, "one waits")
    waits = one(admin, "SHOW WAITS")
    assert waits["behind_query"] == shown["query"]
    assert waits["behind_fingerprint"] == shown["fingerprint"]
    holder.ask(query("COMMIT"))
    waiter.until_ready()


def test_a_leak_is_shown_while_it_lasts(sidecar, admin):
    holder = held(sidecar)
    sidecar.until(lambda: sidecar.service.recorder.pool("main").leaks, "it is a leak")
    leak = one(admin, "SHOW LEAKS")
    assert (leak["application_name"], shape(leak)) == ("billing", "SELECT ?, ?")
    assert leak["server"] == one(admin, "SHOW SERVERS", state="active")["id"]
    holder.ask(query("COMMIT"))
    sidecar.until(lambda: not sidecar.service.recorder.pool("main").leaks, "it is over")
    assert table(admin, "SHOW LEAKS") == []


def test_errors_are_told_by_application_and_statement(sidecar, admin):
    """How often, when, and the last message, without what the client wrote."""
    client = sidecar.login(application_name="billing")
    for number in range(3):
        client.ask(query(f"SELECT '{SECRET}-{number}'::int"))
    client.ask(query("SELECT nonsense"))
    latest, first = table(admin, "SHOW ERRORS")
    assert (latest["sqlstate"], latest["count"]) == ("42703", "1")
    told = (first["database"], first["origin"], first["sqlstate"], first["application_name"])
    assert told == ("main", "server", "22P02", "billing")
    assert (first["count"], shape(first)) == ("3", "SELECT ?::int")
    assert (first["message"] or "").startswith("invalid input syntax for type integer")
    assert (first["first_time"] or "").endswith(" UTC")
    assert SECRET not in str([latest, first])


def test_blame_is_told_by_application(sidecar, admin):
    """Who holds the only connection is charged with all the waiting."""
    holder = held(sidecar)
    waiter = sidecar.login(application_name="web")
    waiter.send(query("SELECT 1"))
    blame = sidecar.service.recorder.pool("main").blame
    sidecar.until(lambda: blame.charged > 0.2, "it is charged")
    account = one(admin, "SHOW BLAME", application_name="billing")
    assert int(account["blamed_us"] or 0) >= 200_000
    holder.ask(query("COMMIT"))
    waiter.until_ready()
    accounts = table(admin, "SHOW BLAME")
    assert accounts[0]["application_name"] == "billing"
    assert float((accounts[0]["share"] or "").rstrip("%")) > 90


def test_statements_are_ranked_by_time(sidecar, admin):
    """Two spellings are one statement; figures in microseconds."""
    client = sidecar.login()
    for text in ("SELECT 1 AS x", "select  2 AS x -- and a comment", "SELECT pg_sleep(0.05)"):
        client.ask(query(text))
    client.ask(query("SELECT nonsense"))
    rows = table(admin, "SHOW STATEMENTS")
    first, *rest = rows
    assert "pg_sleep" in (first["query"] or "")
    assert 50_000 <= int(first["total_us"] or 0) == int(first["max_us"] or 0)
    for name in ("mean_us", "p50_us", "p90_us", "p99_us"):
        assert int(first[name] or 0) == pytest.approx(int(first["total_us"] or 0), rel=0.02)
    assert (first["calls"], first["rows"], first["errors"]) == ("1", "1", "0")
    (twice,) = [row for row in rest if row["calls"] == "2"]
    assert (twice["rows"], twice["errors"], twice["database"]) == ("2", "0", "main")
    (failed,) = [row for row in rest if row["errors"] == "1"]
    assert "nonsense" in (failed["query"] or "")
    assert len({row["fingerprint"] for row in rows}) == len(rows)


def test_why_tells_the_leak_and_the_incident_is_kept(sidecar, admin):
    """Headline, figures, what to do: while it lasts. The incident stays."""
    assert {row["verdict"] for row in table(admin, "SHOW WHY")} == {"healthy"}
    assert table(admin, "SHOW INCIDENTS") == []
    holder = held(sidecar)
    waiter = sidecar.login(application_name="web")
    waiter.send(query("SELECT 1"))
    why = eventually(
        lambda: [row for row in table(admin, "SHOW WHY") if row["verdict"] == "leak"], "a verdict"
    )
    assert why[0]["part"] == "headline"
    assert {row["part"] for row in why} == {"headline", "evidence", "next"}
    assert "billing" in (why[0]["text"] or "")
    assert SECRET not in str(why)
    found = eventually(lambda: table(admin, "SHOW INCIDENTS"), "an incident")
    assert (found[-1]["database"], found[-1]["ended"]) == ("main", "")
    assert (found[-1]["began"] or "").endswith(" UTC")
    holder.ask(query("COMMIT"))
    waiter.until_ready()
    assert {row["id"] for row in found} <= {row["id"] for row in table(admin, "SHOW INCIDENTS")}


def test_slow_queries_are_shown_with_the_one_they_wait_for(postgres):
    postgres.psql("CREATE TABLE IF NOT EXISTS console_why (id int)")
    with Sidecar(postgres, console=CONSOLE, min_idle=0, slow_query_threshold="0.2s") as sidecar:
        admin = sidecar.login("admin", "pgsidecar")
        holder = sidecar.login(application_name="billing")
        holder.ask(query("BEGIN"))
        holder.ask(query("LOCK TABLE console_why"))
        waiter = sidecar.login(application_name="web")
        waiter.send(query("INSERT INTO console_why VALUES (42)"))
        (slow,) = eventually(lambda: table(admin, "SHOW SLOW"), "it is slow")
        assert (slow["application_name"], slow["blocker_application"]) == ("web", "billing")
        assert (slow["wait_event"] or "").startswith("Lock:")
        assert (
            slow["blocked_by"]
            == one(admin, "SHOW HOLDERS", application_name="billing")["remote_pid"]
        )
        assert (slow["query"] or "").startswith("INSERT INTO console_why VALUES")
        assert (slow["blocker_query"] or "").startswith("LOCK TABLE console_why")
        assert int(slow["age_us"] or 0) >= 200_000
        assert "42" not in (slow["query"] or "")
        holder.ask(query("ROLLBACK"))
        waiter.until_ready()


def test_words_almost_right_are_known(admin):
    for almost, meant in (
        ("LEAK", "LEAKS"),
        ("ERROR", "ERRORS"),
        ("BLAMES", "BLAME"),
        ("STATEMENT", "STATEMENTS"),
        ("INCIDENT", "INCIDENTS"),
    ):
        assert f"Did you mean SHOW {meant}?" in error(admin.ask(query(f"SHOW {almost}")))["H"]
