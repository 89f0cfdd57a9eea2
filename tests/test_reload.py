"""RELOAD and SIGHUP: what of a new configuration takes effect at once, what needs a restart, and that
a wrong one changes nothing."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar import config_file
from sidecar.config_changes import changed, needs_restart, taken_over
from sidecar.errors import ConfigError
from tests.sidecar_process import SidecarProcess, configuration, eventually
from tests.test_console import CONSOLE, one, table
from tests.wire import Client, Message, error, kinds, query, startup

BASE = {"console": CONSOLE, "min_idle": 1, "max_size": 3}


class Reloaded:
    """A sidecar in its own process, whose file can be changed."""

    def __init__(self, process: SidecarProcess, file: Path, dsn: str) -> None:
        self.process = process
        self.dsn = dsn
        self._file = file
        self.admin = self.login("admin", "pgsidecar")

    def login(self, user: str = "app", database: str = "main", **parameters: str) -> Client:
        client = Client(("127.0.0.1", self.process.pg_port))
        try:
            client.log_in(user, database, **parameters)
        except BaseException:
            client.socket.close()
            raise
        return client

    def write(self, **options: object) -> None:
        """The file, with these options instead of those of ``BASE``."""
        self._file.write_text(configuration(self.dsn, **{**BASE, **options}))  # type: ignore[arg-type]  # passed on

    def write_pools(self, **pools: object) -> None:
        sections = json.loads(configuration(self.dsn, **BASE))  # type: ignore[arg-type]  # passed on
        sections["pools"] = {"main": sections["pools"]["main"]} | pools
        self._file.write_text(json.dumps({**sections, "pools": pools}))

    def break_file(self, text: str) -> None:
        self._file.write_text(text)

    def reload(self, **options: object) -> list[Message]:
        """The notices."""
        if options:
            self.write(**options)
        found = self.admin.ask(query("RELOAD"))
        assert kinds(found).endswith("CZ"), error(found)
        return [message for message in found if message.kind == "N"]

    def option(self, name: str) -> str | None:
        return one(self.admin, "SHOW CONFIG", key=name)["value"]


@pytest.fixture
def sidecar(make_process, postgres, tmp_path) -> Iterator[Reloaded]:
    process = make_process(postgres.dsn(), **BASE)
    it = Reloaded(process, tmp_path / "config.yaml", postgres.dsn())
    yield it
    it.admin.socket.close()


# -- what changes at once --------------------------------------------------------------------------


def test_timeouts_of_clients_change_at_once(sidecar):
    """Also for those who are logged in."""
    with sidecar.login() as busy, sidecar.login() as idle:
        assert busy.value("SELECT pg_sleep(0.4)") == ""
        sidecar.reload(query_timeout="200ms", client_idle_timeout="300ms")
        assert error(busy.ask(query("SELECT pg_sleep(5)")))["C"] == "57014"
        assert error(idle.until_closed())["C"] == "57P05"
        sidecar.reload(query_timeout="0", client_idle_timeout="0")


def test_limits_of_a_pool_change_at_once(sidecar):
    with sidecar.login() as client:
        before = client.value("SELECT pg_backend_pid()")
        (notice,) = sidecar.reload(max_size=7, acquire_timeout="3s", min_idle=2)
        assert notice.fields["M"] == (
            "changed: pools.main.max_size, pools.main.min_idle, pools.main.acquire_timeout"
        )
        assert one(sidecar.admin, "SHOW DATABASES", name="main")["pool_size"] == "7"
        assert one(sidecar.admin, "SHOW SERVERS", remote_pid=str(before))  # nobody is disturbed
        assert client.value("SELECT 1") == "1"
        eventually(
            lambda: one(sidecar.admin, "SHOW POOLS", database="main")["sv_idle"] == "2",
            "as many are kept warm",
        )


def test_a_smaller_pool_shrinks(sidecar):
    clients = [sidecar.login() for _ in range(3)]
    for client in clients:
        client.ask(query("BEGIN"))
    sidecar.reload(max_size=1)
    assert len(table(sidecar.admin, "SHOW HOLDERS")) == 3  # leases go on
    for client in clients:
        assert kinds(client.ask(query("COMMIT"))) == "CZ"
    eventually(lambda: len(table(sidecar.admin, "SHOW SERVERS")) == 1, "one is left")
    assert clients[0].value("SELECT 1") == "1"
    for client in clients:
        client.socket.close()


def test_users_and_passwords_change_for_new_logins(sidecar):
    with pytest.raises(AssertionError, match="may not use the console"):
        sidecar.login("new", "pgsidecar")
    sidecar.reload(console={"admin_users": "admin,new", "stats_users": ""})
    with sidecar.login("new", "pgsidecar") as new:
        assert len(table(new, "SHOW POOLS")) == 2
    with pytest.raises(AssertionError, match="may not use the console"):
        sidecar.login("stats", "pgsidecar")
    sidecar.reload(listen={"auth": "scram-sha-256"}, users={"app": {"password": "secret"}})
    with Client(("127.0.0.1", sidecar.process.pg_port)) as client:
        client.send(startup({"user": "app", "database": "main"}))
        assert client.receive().body.startswith(b"\0\0\0\x0a")  # SASL


def test_the_number_of_clients_changes(sidecar):
    sidecar.reload(listen={"max_clients": 2})
    with sidecar.login(), pytest.raises(AssertionError, match="too many clients"):
        sidecar.login()
    sidecar.reload(max_clients=1)
    with sidecar.login(), pytest.raises(AssertionError, match="53300"):
        sidecar.login()


def test_another_dsn_means_other_connections(sidecar, own_postgres):
    """Leases go on where they are; what is released is replaced."""
    other = own_postgres()
    with sidecar.login() as client:
        client.ask(query("BEGIN"))
        before = client.value("SELECT pg_backend_pid()")
        sidecar.dsn = other.dsn()
        sidecar.reload(max_size=3)
        assert client.value("SELECT pg_backend_pid()") == before
        sidecar.admin.send(query("WAIT_CLOSE"))
        client.ask(query("COMMIT"))
        assert kinds(sidecar.admin.until_ready()) == "CZ"
        assert client.value("SHOW port") == str(other.port)


def test_pools_come_and_go(sidecar, postgres):
    with pytest.raises(AssertionError, match="does not exist"):
        sidecar.login(database="second")
    main, second = {"dsn": postgres.dsn(), "min_idle": 0}, {"dsn": postgres.dsn(), "min_idle": 0}
    sidecar.write_pools(main=main, second=second)
    sidecar.reload()
    with sidecar.login(database="second") as client, sidecar.login() as stays:
        assert client.value("SELECT 1") == "1"
        metrics = sidecar.process.scrape()
        assert metrics.value("pgsidecar_pool_connections_max", pool="second") == 25
        client.ask(query("BEGIN"))
        sidecar.write_pools(main=main)
        sidecar.reload()
        assert client.value("SELECT 2") == "2"  # its transaction may finish
        client.send(query("COMMIT"))
        assert error(client.until_closed())["C"] == "57P01"
        assert stays.value("SELECT 1") == "1"
        with pytest.raises(AssertionError, match="does not exist"):
            sidecar.login(database="second")
        eventually(
            lambda: (
                {row["database"] for row in table(sidecar.admin, "SHOW POOLS")}
                == {"main", "pgsidecar"}
            ),
            "it is gone",
        )
        assert 'pool="second"' not in sidecar.process.scrape().text


def test_a_pool_with_another_mode_is_another_pool(sidecar):
    """A session keeps what it was promised until its lease is over; then its client has to come
    again."""
    with sidecar.login() as client:
        assert client.value("SELECT 1") == "1"
        sidecar.reload(mode="session")
        assert error(client.until_closed())["C"] == "57P01"
    with sidecar.login() as client:
        assert client.value("SELECT 1") == "1"
        assert one(sidecar.admin, "SHOW PINS")["reason"] == "session_mode"


def test_templates_change_too(sidecar, postgres):
    template = {"dsn": postgres.dsn(database=""), "min_idle": 0, "max_size": 2}
    sidecar.write_pools(**{"*": template})
    sidecar.reload()
    with sidecar.login(database="postgres") as client:
        assert client.value("SELECT current_database()") == "postgres"
        sidecar.write_pools(**{"*": {**template, "max_size": 5}})
        sidecar.reload()
        assert error(client.until_closed())["C"] == "57P01"
    with sidecar.login(database="postgres") as client:
        assert client.value("SELECT current_database()") == "postgres"
        assert one(sidecar.admin, "SHOW DATABASES", name="*")["pool_size"] == "5"


def test_the_level_of_the_log_changes(sidecar):
    sidecar.reload(log={"level": "debug"})
    with sidecar.login() as client:
        client.value("SELECT 1")
    sidecar.admin.ask(query("RECONNECT"))
    eventually(lambda: "DEBUG" in sidecar.process.log, "details are logged")


# -- signals ---------------------------------------------------------------------------------------


def test_sighup_reloads(sidecar):
    sidecar.write(max_size=9)
    sidecar.process.process.send_signal(signal.SIGHUP)
    eventually(lambda: sidecar.option("pools.main.max_size") == "9", "it is in force")
    assert "configuration reloaded" in sidecar.process.log


# -- what does not change --------------------------------------------------------------------------


def test_addresses_wait_for_a_restart(sidecar):
    notices = [each.fields["M"] for each in sidecar.reload(http={"access_log": "true"}, max_size=4)]
    assert notices == [
        "http.access_log changes with a restart only",
        "changed: pools.main.max_size",
    ]
    assert sidecar.option("http.access_log") == "false"


@pytest.mark.parametrize(
    "broken", ["pools: {", "pools: {}", "pools: {main: {dsn: 'postgresql://app:hunter2@/x y'}}", ""]
)
def test_a_wrong_file_changes_nothing_and_is_told(sidecar, broken):
    began = sidecar.process.scrape()
    sidecar.break_file(broken)
    found = error(sidecar.admin.ask(query("RELOAD")))
    assert found["C"] == "F0000"
    assert found["M"] == "the configuration cannot be used, nothing was changed"
    assert "config.yaml" in found["D"] or "pools" in found["D"]
    assert "hunter2" not in str(found) + sidecar.process.log
    assert "ERROR pgsidecar: configuration not reloaded" in sidecar.process.log
    with sidecar.login() as client:
        assert client.value("SELECT 1") == "1"
    name = "pgsidecar_config_last_reload_success_timestamp_seconds"
    metrics = sidecar.process.scrape()
    assert metrics.value(name) == began.value(name)
    assert metrics.value("pgsidecar_config_last_reload_successful") == 0
    sidecar.reload(max_size=4)
    metrics = sidecar.process.scrape()
    assert metrics.value(name) > began.value(name)
    assert metrics.value("pgsidecar_config_last_reload_successful") == 1


def test_a_missing_file_changes_nothing(sidecar, tmp_path):
    (tmp_path / "config.yaml").unlink()
    assert error(sidecar.admin.ask(query("RELOAD")))["C"] == "F0000"
    sidecar.process.process.send_signal(signal.SIGHUP)
    eventually(lambda: sidecar.process.log.count("not reloaded") == 2, "it is logged")
    sidecar.reload(max_size=4)


# -- what is different -----------------------------------------------------------------------------


def parsed(**options: object) -> object:
    return config_file.parse(configuration("postgresql://u@h/d", **options), {}, "test")  # type: ignore[arg-type]  # passed on


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"max_size": 9}, ["pools.main.max_size"]),
        ({"drain_timeout": "9s"}, ["drain_timeout"]),
        ({"users": {"a": {"password": "x"}}}, ["users.a"]),
        (
            {"listen": {"max_clients": 7}, "log": {"level": "debug"}},
            ["listen.max_clients", "log.level"],
        ),
    ],
)
def test_changed_options_are_named(options, expected):
    assert changed(parsed(), parsed(**options)) == expected


def test_a_changed_secret_is_noticed_and_not_told():
    before, after = (parsed(users={"a": {"password": p}}) for p in ("one", "two"))
    assert changed(before, after) == ["users.a.password"]


def test_what_needs_a_restart_stays():
    running = config_file.parse(configuration("postgresql://u@h/d"), {}, "test")
    new = config_file.parse(
        configuration(
            "postgresql://u@h/d",
            listen={"host": "::1", "max_clients": 9},
            http={"access_log": "true"},
            log={"format": "json", "level": "debug"},
        ),
        {},
        "test",
    )
    merged = taken_over(running, new)
    assert merged.listen.host == running.listen.host
    assert merged.listen.max_clients == 9
    assert merged.http == running.http
    assert (merged.log.format, merged.log.level) == ("text", "debug")
    assert all(needs_restart(option) for option in changed(merged, new))


def test_trust_is_not_taken_over_for_an_address_that_does_not_allow_it():
    """The new file is right as it stands, but clients still connect to the old address."""
    running = config_file.parse(
        configuration("postgresql://u@h/d", listen={"host": "0.0.0.0", "auth": "scram-sha-256"}),
        {},
        "test",
    )
    new = config_file.parse(configuration("postgresql://u@h/d"), {}, "test")
    with pytest.raises(ConfigError, match="in use until a restart"):
        taken_over(running, new)
