"""Limits on clients: each runs out in time, says what PostgreSQL says, is counted, and leaks nothing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.config import PoolConfig, UserConfig
from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.pool.state import PoolState
from sidecar.proxy import limits, sweeper
from sidecar.proxy.limits import Limits, Wheel, limits_of
from tests import wire
from tests.conftest import MakePostgres
from tests.sidecar_process import Metrics, eventually
from tests.sidecar_process import Sidecar as Addresses
from tests.test_cancel import SlowCancels, postgres_on
from tests.wire import Client, Sidecar, error, query

LIMIT = 0.4  # s
LATE = 0.3
"""Seconds: two sweeps, and a machine that has other things to do."""

TEXTS = {
    "57014": "canceling statement due to statement timeout",
    "25P03": "terminating connection due to idle-in-transaction timeout",
    "25P04": "terminating connection due to transaction timeout",
    "57P05": "terminating connection due to idle-session timeout",
}
"""PostgreSQL's own words."""

OPTIONS = {
    "57014": "query_timeout",
    "25P03": "idle_in_transaction_timeout",
    "25P04": "transaction_timeout",
    "57P05": "client_idle_timeout",
}
"""What the hint names: the server has limits with the same words."""


@pytest.fixture(params=["transaction", "session"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def whose(mode: str) -> str:
    """Whose limit it is: each once, for these tests take their time. ``limits_of`` decides for all."""
    return "pool" if mode == "transaction" else "user"


@contextmanager
def sidecar_with(
    postgres: EmbeddedPostgres, whose: str = "pool", *, mode: str = "transaction", **given: str
) -> Iterator[Sidecar]:
    """These limits for user ``app``: from the pool, or its own while the pool's are far."""
    main: dict[str, Any] = {"mode": mode, "max_size": 2, "min_idle": 1}
    app: dict[str, object] = {"password": "x"}
    if whose == "pool":
        main |= given
    else:
        main |= dict.fromkeys(given, "1h")
        app |= given
    with Sidecar(postgres, users={"app": app}, **main) as sidecar:
        yield sidecar
        for client in sidecar._clients:
            client.socket.close()
        sidecar.until_whole()


def scrape(sidecar: Sidecar) -> Metrics:
    return Addresses(sidecar.port, sidecar.service.http_address[1]).scrape()


def timeouts(sidecar: Sidecar) -> dict[str, float]:
    """By kind, those that happened."""
    found = scrape(sidecar).above_zero("pgsidecar_timeouts_total", "kind")
    return {kind: count for (kind,), count in found.items()}


def closed(sidecar: Sidecar) -> dict[str, float]:
    """Server connections, by reason."""
    found = scrape(sidecar).above_zero("pgsidecar_connections_closed_total", "reason")
    return {reason: count for (reason,), count in found.items()}


@contextmanager
def taking(least: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert least - 0.05 <= took < least + LATE  # it began shortly before, or on another thread


def check_told(fields: dict[str, str], sqlstate: str, severity: str = "FATAL") -> None:
    assert (fields["C"], fields["V"], fields["M"]) == (sqlstate, severity, TEXTS[sqlstate])
    assert fields["H"] == f"The limit is the connection pool's {OPTIONS[sqlstate]}."


def last_words(client: Client) -> dict[str, str]:
    """What a client is told before its connection ends."""
    return error(client.until_closed())


def backend(client: Client) -> str | None:
    return client.value("SELECT pg_backend_pid()")


# -- queries ---------------------------------------------------------------------------------------

SLEEPS = (
    query("SELECT pg_sleep(20)"),
    wire.run("SELECT pg_sleep(20)"),
    query("SELECT 1; SELECT pg_sleep(20); SELECT 2"),
)


def test_query_is_cancelled(postgres: EmbeddedPostgres, mode: str, whose: str) -> None:
    """The session goes on, on the same server connection."""
    with sidecar_with(postgres, whose, mode=mode, query_timeout="400ms") as sidecar:
        client = sidecar.login()
        pid = backend(client)
        for sleep in SLEEPS:
            with taking(LIMIT):
                check_told(error(client.ask(sleep)), "57014", "ERROR")
            assert backend(client) == pid
        assert timeouts(sidecar) == {"query": len(SLEEPS)}
        assert closed(sidecar) == {}


def test_query_in_a_transaction_is_cancelled(postgres: EmbeddedPostgres) -> None:
    with sidecar_with(postgres, query_timeout="400ms") as sidecar:
        client = sidecar.login()
        client.ask(query("BEGIN"))
        for count in (1, 2):
            check_told(error(client.ask(SLEEPS[0])), "57014", "ERROR")
            client.ask(query("ROLLBACK"), query("BEGIN"))
            client.until_ready()
            assert timeouts(sidecar) == {"query": count}


def test_user_may_have_no_limit(postgres: EmbeddedPostgres) -> None:
    """0 is one's own limit, too: none."""
    users = {"app": {"password": "x", "query_timeout": "0"}}
    with Sidecar(postgres, users=users, query_timeout="200ms") as sidecar:
        assert sidecar.login().value("SELECT pg_sleep(0.6)") == ""
        check_told(
            error(sidecar.login("another").ask(query("SELECT pg_sleep(0.6)"))), "57014", "ERROR"
        )


def test_silence_during_copy_is_query_time(postgres: EmbeddedPostgres, mode: str) -> None:
    with sidecar_with(postgres, mode=mode, query_timeout="400ms") as sidecar:
        client = sidecar.login()
        client.ask(query("CREATE TEMP TABLE silent (n int)"))
        client.send(query("COPY silent FROM stdin"))
        client.until("G")
        with taking(LIMIT):
            client.send(wire.copy_data(b"1\n"))
            check_told(error(client.until_ready()), "57014", "ERROR")
        client.send(wire.copy_data(b"2\n"), wire.COPY_DONE)
        assert client.value("SELECT count(*) FROM silent") == "0"
        assert timeouts(sidecar) == {"query": 1}


def test_query_that_cannot_be_cancelled_is_closed(
    own_postgres: MakePostgres, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A server that is silent holds its client no longer than that; it is counted once."""
    monkeypatch.setattr(limits, "GRACE", 0.5)
    server = own_postgres()
    with sidecar_with(server, mode=mode, query_timeout="400ms") as sidecar:
        client = sidecar.login()
        client.value("SELECT 1")
        server.pause()
        try:
            with taking(LIMIT + 0.5):
                client.send(query("SELECT 1"))
                fields = last_words(client)
            check_told(fields, "57014")
            assert fields["D"] == (
                "The server was asked to, and has not for 5 s: the connection is closed."
            )
            assert timeouts(sidecar) == {"query": 1}
        finally:
            server.resume()
        eventually(lambda: closed(sidecar) == {"query_timeout": 1}, "the connection is closed")
        assert sidecar.login().value("SELECT 1") == "1"


def test_server_that_does_not_answer_parse_is_noticed(
    own_postgres: MakePostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs yet, but the client waits."""
    monkeypatch.setattr(limits, "GRACE", 0.3)
    server = own_postgres()
    with sidecar_with(server, query_timeout="400ms") as sidecar:
        client = sidecar.login()
        client.ask(query("BEGIN"))
        server.pause()
        try:
            client.send(wire.parse("SELECT 1"), wire.describe("S"), wire.SYNC)
            check_told(last_words(client), "57014")
        finally:
            server.resume()
        assert timeouts(sidecar) == {"query": 1}


def test_client_that_does_not_read_its_rows_is_closed(
    postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The backend cannot hear a cancel request while it cannot write. Afterwards nobody is there."""
    monkeypatch.setattr(limits, "GRACE", 0.3)
    monkeypatch.setattr(sweeper, "LAST_WORDS", 0.3)
    # time enough to begin the row: before that, the server would listen
    with sidecar_with(postgres, mode=mode, query_timeout="1500ms") as sidecar:
        client = sidecar.login()
        client.send(query("SELECT repeat(repeat('x', 100000), 200)"))
        sidecar.until_whole()
        assert timeouts(sidecar) == {"query": 1}
        assert closed(sidecar) == {"query_timeout": 1}


def test_next_query_is_not_hit_instead(postgres: EmbeddedPostgres) -> None:
    """A query may end while its cancel request is under way: until that has arrived, the server does
    not see what its client asks next in the same transaction."""
    with (
        SlowCancels(postgres) as way,
        sidecar_with(postgres_on(way, postgres), query_timeout="600ms") as sidecar,
    ):
        client = sidecar.login()
        client.ask(query("BEGIN"))
        assert wire.kinds(client.ask(query("SELECT pg_sleep(0.75)"))) == "TDCZ"
        assert way.held.is_set()
        client.send(query("SELECT pg_sleep(0.3)"))
        time.sleep(0.1)  # nothing to wait for: it must not have begun
        way.go.set()
        assert wire.kinds(client.until_ready()) == "TDCZ"


# -- transactions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN; SELECT 1/0"], ids=["open", "failed"])
def test_silence_in_a_transaction_ends_it(
    postgres: EmbeddedPostgres, mode: str, whose: str, begin: str
) -> None:
    """It is rolled back; the server connection is as good as before."""
    postgres.psql("CREATE TABLE IF NOT EXISTS silence (n int)")
    given = {"idle_in_transaction_timeout": "400ms"}
    with sidecar_with(postgres, whose, mode=mode, **given) as sidecar:
        client = sidecar.login()
        pid = backend(client)
        client.ask(query("BEGIN; INSERT INTO silence VALUES (1)"), query("COMMIT; " + begin))
        client.until_ready()
        client.ask(query("INSERT INTO silence VALUES (2)"))
        with taking(LIMIT):
            check_told(last_words(client), "25P03")
        sidecar.until_whole()
        other = sidecar.login()
        assert backend(other) == pid
        assert other.value("SELECT count(*) FROM silence WHERE n = 2") == "0"
        assert timeouts(sidecar) == {"idle_in_transaction": 1}
        assert closed(sidecar) == {}


def test_silence_before_sync_ends_the_transaction(postgres: EmbeddedPostgres, mode: str) -> None:
    """The server has answered all, the client has not said what is next. The server knows of no
    timeout there; its connection is closed."""
    with sidecar_with(postgres, mode=mode, idle_in_transaction_timeout="400ms") as sidecar:
        client = sidecar.login()
        client.send(wire.parse("SELECT 1"), wire.bind(), wire.execute(), wire.FLUSH)
        client.until("C")
        with taking(LIMIT):
            check_told(last_words(client), "25P03")
        sidecar.until_whole()
        assert timeouts(sidecar) == {"idle_in_transaction": 1}
        assert closed(sidecar) == {"idle_in_transaction_timeout": 1}


def test_transaction_that_lasts_too_long_is_ended(
    postgres: EmbeddedPostgres, mode: str, whose: str
) -> None:
    """Between two queries: rolled back, and the server connection kept."""
    with sidecar_with(postgres, whose, mode=mode, transaction_timeout="400ms") as sidecar:
        client = sidecar.login()
        pid = backend(client)
        with taking(LIMIT):
            client.send(query("BEGIN"))
            client.until_ready()
            for _ in range(3):
                client.ask(query("SELECT pg_sleep(0.08)"))
            check_told(last_words(client), "25P04")
        sidecar.until_whole()
        assert backend(sidecar.login()) == pid
        assert timeouts(sidecar) == {"transaction": 1}
        assert closed(sidecar) == {}


def test_transaction_is_ended_in_its_query(postgres: EmbeddedPostgres, mode: str) -> None:
    """A single statement is a transaction, too. What still runs is cancelled."""
    with sidecar_with(postgres, mode=mode, transaction_timeout="400ms") as sidecar:
        client = sidecar.login(application_name="too long")
        with taking(LIMIT):
            client.send(query("SELECT pg_sleep(20)"))
            check_told(last_words(client), "25P04")
        sidecar.until_whole()
        assert timeouts(sidecar) == {"transaction": 1}
        assert closed(sidecar) == {"transaction_timeout": 1}
        running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(20)%'"
        running += " AND state = 'active' AND application_name = 'too long'"
        eventually(lambda: int(postgres.psql(running)) == 0, "nothing runs any more")


# -- idle clients ----------------------------------------------------------------------------------


def test_idle_client_is_closed(postgres: EmbeddedPostgres, mode: str, whose: str) -> None:
    with sidecar_with(postgres, whose, mode=mode, client_idle_timeout="400ms") as sidecar:
        with taking(LIMIT):
            silent = sidecar.login()
            check_told(last_words(silent), "57P05")
        client = sidecar.login()
        pid = backend(client)
        with taking(LIMIT):
            check_told(last_words(client), "57P05")
        sidecar.until_whole()
        assert backend(sidecar.login()) == pid
        assert timeouts(sidecar) == {"client_idle": 2}
        metrics = scrape(sidecar)
        assert metrics.errors == {}  # nothing of the client's has failed
        assert closed(sidecar) == {}


def test_idle_pinned_client_is_closed(postgres: EmbeddedPostgres, mode: str) -> None:
    """Its lease ends, and what it has left on the connection is removed."""
    with sidecar_with(postgres, mode=mode, client_idle_timeout="400ms") as sidecar:
        client = sidecar.login()
        pid = backend(client)
        client.ask(query("LISTEN idle"))
        with taking(LIMIT):
            check_told(last_words(client), "57P05")
        sidecar.until_whole()
        other = sidecar.login()
        assert backend(other) == pid
        assert other.rows("SELECT pg_listening_channels()") == []
        assert timeouts(sidecar) == {"client_idle": 1}


@pytest.mark.parametrize("ends", ["served", "refused"])
def test_waiting_client_is_not_idle(postgres: EmbeddedPostgres, ends: str) -> None:
    """Its time begins when it has been answered. In session mode, clients wait in login."""
    with Sidecar(
        postgres, max_size=1, client_idle_timeout="400ms", acquire_timeout="1s"
    ) as sidecar:
        holder, waiter = sidecar.login(), sidecar.login()
        holder.ask(query("BEGIN"))
        waiter.send(query("SELECT 1"))
        holder.value("SELECT pg_sleep(0.7)")
        if ends == "served":
            holder.socket.close()
        else:
            sidecar.until(lambda: not sidecar.pool.state.waiters, "the waiter is refused")
        assert wire.kinds(waiter.until_ready()) == ("TDCZ" if ends == "served" else "EZ")
        with taking(LIMIT):
            check_told(last_words(waiter), "57P05")


# -- nobody else -----------------------------------------------------------------------------------


def test_active_client_is_left_alone(postgres: EmbeddedPostgres, mode: str) -> None:
    """All limits at once, and a client that stays below each of them for much longer than any."""
    given = ("query", "transaction", "idle_in_transaction", "client_idle")
    with sidecar_with(postgres, mode=mode, **{f"{n}_timeout": "600ms" for n in given}) as sidecar:
        client = sidecar.login()
        for _ in range(4):
            client.ask(query("BEGIN"))
            client.value("SELECT pg_sleep(0.15)")
            time.sleep(0.15)
            client.ask(query("COMMIT"))
            time.sleep(0.15)
        client.value("SELECT 1")
        assert timeouts(sidecar) == {}


def test_cursor_read_with_flush_is_left_alone(postgres: EmbeddedPostgres, mode: str) -> None:
    """One cycle that lasts long, but in which neither side is silent for long."""
    given = {"query_timeout": "400ms", "idle_in_transaction_timeout": "400ms"}
    with sidecar_with(postgres, mode=mode, **given) as sidecar:
        client = sidecar.login()
        client.send(wire.parse("SELECT generate_series(1, 100)"), wire.bind())
        for _ in range(8):
            client.send(wire.execute(1), wire.FLUSH)
            client.until("s")
            time.sleep(0.15)
        client.ask(wire.SYNC)
        assert timeouts(sidecar) == {}


def test_prepared_and_kept_is_left_alone(postgres: EmbeddedPostgres) -> None:
    """asyncpg's ``prepare`` sends Flush, and may come back in an hour: no transaction, no query."""
    given = {"query_timeout": "300ms", "idle_in_transaction_timeout": "300ms"}
    with sidecar_with(postgres, mode="session", **given) as sidecar:
        client = sidecar.login()
        client.send(wire.parse("SELECT 1", "mine"), wire.describe("S", "mine"), wire.FLUSH)
        client.until("T")
        time.sleep(0.8)
        assert wire.kinds(client.ask(wire.bind(name="mine"), wire.execute(), wire.SYNC)) == "2DCZ"
        assert timeouts(sidecar) == {}


# -- waiting ---------------------------------------------------------------------------------------


def test_each_user_waits_as_long_as_it_may(postgres: EmbeddedPostgres) -> None:
    """Who came later may have to go first."""
    users = {"hurried": {"password": "x", "acquire_timeout": "400ms"}}
    with Sidecar(postgres, users=users, max_size=1, acquire_timeout="1h") as sidecar:
        holder, patient, hurried = sidecar.login(), sidecar.login(), sidecar.login("hurried")
        holder.ask(query("BEGIN"))
        patient.send(query("SELECT 'patient'"))
        sidecar.until(lambda: len(sidecar.pool.state.waiters) == 1, "one waits")
        with taking(LIMIT):
            assert error(hurried.ask(query("SELECT 1")))["C"] == "53300"
        assert timeouts(sidecar) == {"acquire": 1}
        holder.ask(query("COMMIT"))
        answer = patient.until_ready()
        assert [m.columns for m in answer if m.kind == "D"] == [[b"patient"]]
        sidecar.until_whole(clients=None)


class Waiter:
    def __init__(self, since: float, patience: float) -> None:
        self.waiting_since = since
        self.deadline = since + patience


def test_5000_waiters_are_swept_in_no_time():
    """With one who has little patience behind 5,000 who have much, and all of them overdue."""
    state: PoolState[Any, Waiter] = PoolState(1, 0, 0)
    for number in range(5000):
        state.enqueue(Waiter(number / 1000, 3600.0))
    state.enqueue(last := Waiter(6.0, 0.3))
    took = []
    for _ in range(5):
        began = time.perf_counter()
        assert state.overdue(6.2, 50) == []
        took.append(time.perf_counter() - began)
    assert min(took) < 0.002
    assert state.overdue(6.3, 50) == [last]
    assert len(state.overdue(9999.0, 50)) == 50


# -- decisions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["acquire", "query", "transaction", "idle_in_transaction"])
def test_limits_of_a_user_come_before_the_pools(option: str) -> None:
    name = f"{option}_timeout"
    pool = PoolConfig.model_validate({"name": "main", "dsn": "postgresql://app@x/y", name: "7s"})
    assert getattr(limits_of(pool, None), option) == 7
    for own, expected in (("", 7), ("3s", 3), ("9s", 9)):
        user = UserConfig.model_validate({"password": "x", name: own})
        assert getattr(limits_of(pool, user), option) == expected


def test_limits_are_none_unless_given() -> None:
    pool = PoolConfig.model_validate({"name": "main", "dsn": "postgresql://app@x/y"})
    assert limits_of(pool, None) == Limits(30.0, 0.0, 0.0, 0.0, 0.0)
    assert not limits_of(pool, None).concern_leases


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 20), st.booleans()), max_size=30),
    st.floats(0, 1e6),
)
def test_wheel_shows_each_when_it_is_due(
    steps: list[tuple[str, float, bool]], begin: float
) -> None:
    """Never early, never more than a step late, and only when it was put there last."""
    wheel: Wheel[str] = Wheel(0.1, begin)
    known: dict[str, float] = {}
    now = begin
    for name, delay, is_removed in steps:
        if is_removed:
            wheel.remove(name)
            known.pop(name, None)
        else:
            wheel.put(name, now + delay)
            known[name] = now + delay
        now += delay / 3
        due = wheel.due(now)
        for each in due:
            assert known.pop(each) <= now + 1e-6
        assert all(at > now - 0.1 - 1e-6 for at in known.values())
        assert len(wheel) == len(known)
    assert sorted(wheel.due(now + 100)) == sorted(known)
    assert not wheel._slots
