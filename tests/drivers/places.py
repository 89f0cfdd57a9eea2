"""Where a driver is tried: a server, and the same server through the sidecar.

Owns one PostgreSQL, one sidecar with a pool of each mode before it, and neighbours that use these
pools all the time. A database is called after the mode of its pool, so that a client is configured
alike on both ways. Drivers know nothing of this: an ``Address`` is all they get.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import psycopg
import psycopg2

from tests.copied_postgres import CopiedPostgres
from tests.sidecar_process import SidecarProcess, environment, eventually

MODES = ("transaction", "session")

SIZE = 4
"""Connections of the pool in transaction mode: fewer than the clients of most tests."""

USER = "app"
PASSWORD = "p@ss w/rd%:1"  # what must be quoted in a URL has to work, too

T = TypeVar("T")

_PATIENCE = 60.0  # seconds for a program


@dataclass(frozen=True, slots=True)
class Address:
    """What an application is configured with."""

    host: str
    port: int
    user: str
    password: str
    database: str

    @property
    def url(self) -> str:
        return self.url_of("postgresql")

    def url_of(self, scheme: str) -> str:
        password = quote(self.password, safe="")
        return f"{scheme}://{self.user}:{password}@{self.host}:{self.port}/{self.database}"

    @property
    def words(self) -> dict[str, Any]:
        """For the keyword arguments of a driver; the database is called differently by each."""
        return {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "password": self.password,
        }

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a program that uses libpq."""
        given = {
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": self.user,
            "PGPASSWORD": self.password,
            "PGDATABASE": self.database,
        }
        return environment() | given


@dataclass(frozen=True, slots=True)
class Place:
    """One pool, and the way around it."""

    version: int
    mode: str
    direct: Address
    through: Address
    bin_dir: Path

    @property
    def is_shared(self) -> bool:
        """Whether a client may get another server connection with each transaction."""
        return self.mode == "transaction"

    @property
    def backends(self) -> int:
        """How many backends a client's transactions come to run on, if it goes on for a while."""
        return 3 if self.is_shared else 1

    def turns(self, pids: Collection[int]) -> Iterator[int]:
        """Numbers for transactions until these have run on that many backends, to be put in ``pids``."""
        for turn in range(1000):
            if turn >= 50 and len(set(pids)) >= self.backends:
                break
            yield turn
        seen = len(set(pids))
        assert seen >= self.backends if self.is_shared else seen == 1, f"{seen} backends"

    def run(
        self, at: Address, *command: str | Path, said: str = "", code: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of PostgreSQL's, or another one, to its end."""
        first, *rest = command
        program = self.bin_dir / first
        done = subprocess.run(
            [program if program.exists() else first, *rest],
            input=said,
            capture_output=True,
            encoding="utf-8",
            env=at.variables | {"LC_ALL": "C.UTF-8", "PGCLIENTENCODING": "UTF8"},
            timeout=_PATIENCE,
            check=False,
        )
        assert code in (None, done.returncode), f"{command}: {done.stdout}\n{done.stderr}"
        return done


class Stage:
    """One version's server and sidecar, with a pool of each mode, and their neighbours."""

    def __init__(self, version: int, folder: Path) -> None:
        self.version = version
        self._folder = folder
        self._server = CopiedPostgres(
            version,
            auth="scram-sha-256",
            settings={"max_connections": "100", "max_prepared_transactions": "10"},
        )

    def __enter__(self) -> Self:
        self._server.start()
        try:
            self._server.psql(
                f"CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'; "
                + "; ".join(f"CREATE DATABASE {mode} OWNER {USER}" for mode in MODES)
            )
            self._sidecar = SidecarProcess.start(self._configuration(), self._folder)
        except BaseException:
            self._server.stop()
            raise
        self._neighbours = _neighbours([self._through(mode) for mode in MODES], self._folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._neighbours.kill()
        self._neighbours.wait()
        self._sidecar.close()
        self._server.stop()

    def place(self, mode: str) -> Place:
        return Place(
            self.version, mode, self._direct(mode), self._through(mode), self._server.bin_dir
        )

    def check_neighbours(self) -> None:
        """They are as much clients as the driver under test, and see if something is wrong."""
        if self._neighbours.poll() is not None:
            raise AssertionError((self._folder / "neighbours.log").read_text())

    @property
    def log(self) -> str:
        return self._sidecar.log

    def _direct(self, mode: str) -> Address:
        return Address(self._server.host, self._server.port, USER, PASSWORD, mode)

    def _through(self, mode: str) -> Address:
        return Address("127.0.0.1", self._sidecar.pg_port, USER, PASSWORD, mode)

    def _configuration(self) -> str:
        """Defaults but for addresses, sizes, and a timeout that a test can wait for."""
        pools = {
            mode: {
                "dsn": self._server.dsn(user=USER, password=PASSWORD, database=mode),
                "mode": mode,
                "max_size": SIZE if mode == "transaction" else 30,
                "min_idle": 2,
                "acquire_timeout": "10s",
            }
            for mode in MODES
        }
        sections = {"listen": {"port": 0}, "http": {"port": 0}, "pools": pools}
        return json.dumps(sections).replace("$", "$$")


def _neighbours(addresses: list[Address], folder: Path) -> subprocess.Popen[bytes]:
    """They end by themselves when their input does: with us, however we end."""
    with (folder / "neighbours.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.drivers.neighbours", *(a.url for a in addresses)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment(),
            cwd=Path(__file__).parent.parent.parent,
        )


def same(place: Place, check: Callable[[Address], T]) -> T:
    """What the check finds through the sidecar, which is what it finds without."""
    expected = check(place.direct)
    found = check(place.through)
    assert found == expected
    return found


def diagnosis(exc: psycopg.Error | psycopg2.Error) -> tuple[str | None, ...]:
    """How the server has refused something, as libpq tells it."""
    told = exc.diag
    return (
        *(type(exc).__name__, told.sqlstate, told.severity, told.message_primary),
        *(told.message_detail, told.message_hint, told.statement_position, told.constraint_name),
    )


def wait_for_query(place: Place, text: str) -> None:
    """Until some backend of the server works on a query that contains this."""
    with psycopg.connect(place.direct.url, autocommit=True) as conn:

        def is_running() -> bool:
            found = conn.execute(
                "SELECT FROM pg_stat_activity WHERE state = 'active' AND query LIKE %s"
                " AND pid <> pg_backend_pid() AND datname = current_database()",
                [f"%{text}%"],
            )
            return found.rowcount > 0

        eventually(is_running, f"a backend works on {text}")


NODE = Path(__file__).parent / "node"
"""The programs for Node.js, with the drivers that ``make test`` installs beside them."""


def node_version(package: str) -> str:
    """The version of a package that ``package-lock.json`` names."""
    locked = json.loads((NODE / "package-lock.json").read_text())["packages"]
    return str(locked[f"node_modules/{package}"]["version"])


def same_report(place: Place, *command: str | Path) -> None:
    """Run a program that does its checks on both ways, and compare what it found.

    Its last argument is JSON with both addresses and the backends a client is to see. It prints
    ``{"direct": {check: found}, "through": {check: found}}``; a failed check is ``{"failed": why}``.
    """
    ways = {"direct": asdict(place.direct), "through": asdict(place.through)}
    for way, at in (("direct", place.direct), ("through", place.through)):
        ways[way]["url"] = at.url
    done = subprocess.run(
        [*command, json.dumps(ways | {"backends": place.backends})],
        capture_output=True,
        encoding="utf-8",
        env=environment(),
        timeout=_PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    found = json.loads(done.stdout)
    failed = {
        f"{check} {way}": result["failed"]
        for way in ways
        for check, result in found[way].items()
        if isinstance(result, dict) and "failed" in result
    }
    assert not failed, "\n".join(f"{check}: {why}" for check, why in failed.items())
    assert found["through"], "no checks"
    for check, expected in found["direct"].items():
        assert found["through"][check] == expected, check
