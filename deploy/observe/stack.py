"""Everything from the database to the pager on this machine, started together and stopped together.

Owns the order: PostgreSQL, the sidecar, its load, Alertmanager with a receiver, Prometheus; stopped the other way
round, whatever happens. Each is a process of its own but for the receiver. Needs the demo's extra for
PostgreSQL, and Debian's prometheus and prometheus-alertmanager.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.observe.processes import (
    HOST,
    CannotObserve,
    Prometheus,
    Server,
    alertmanager,
    free_port,
    prometheus,
    stop,
)
from deploy.observe.quick import quick_routes, quick_rules
from deploy.observe.receiver import Page, Receiver
from sidecar.demo.postgres import EmbeddedPostgres

ROOT: Final = Path(__file__).parent.parent.parent
RECEIVERS: Final = ("pager", "chat")
USER, PASSWORD, DATABASE = "app", "demo", "shop"  # on loopback, and gone in the end
_STARTS: Final = 20.0  # seconds
_READY: Final = re.compile(rf"ready for clients postgresql={HOST}:(\d+) http={HOST}:(\d+)")


@dataclass(frozen=True, slots=True)
class Stack:
    """What runs, by its addresses."""

    sidecar: str  # URL of its HTTP service
    dsn: str  # of pool main
    prometheus: Prometheus
    alertmanager: Server
    receiver: Receiver


@contextmanager
def running(
    *,
    factor: float,
    is_calm: bool = False,
    told: Callable[[Page], None] | None = None,
    every: str = "1s",
    ports: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Iterator[Stack]:
    """The whole stack, under the demo's load. Raises ``CannotObserve`` if a part does not start.

    ``factor`` divides the durations of rules and routes; ``is_calm`` leaves out the burst that exhausts
    the pool; ``told`` is called for each page; ``every`` is how often Prometheus scrapes and evaluates;
    ``ports`` are those to have if they are free: for PostgreSQL clients, the sidecar's HTTP service,
    Prometheus, Alertmanager.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgsidecar-observe-")))
        server = stack.enter_context(EmbeddedPostgres(18, auth="scram-sha-256"))
        server.psql(f"CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'")
        server.psql(f"CREATE DATABASE {DATABASE} OWNER {USER}")
        direct = server.dsn(user=USER, password=PASSWORD, database=DATABASE)
        pg, http = stack.enter_context(_sidecar(folder, direct, ports[0], ports[1]))
        dsn = f"postgresql://{USER}:{PASSWORD}@{HOST}:{pg}/main"
        stack.enter_context(_load(folder, dsn, direct, is_calm))
        receiver = stack.enter_context(Receiver(told).running())
        routes = quick_routes(
            (ROOT / "alerts/alertmanager.example.yml").read_text(),
            factor,
            {name: receiver.url(name) for name in RECEIVERS},
        )
        pager = stack.enter_context(alertmanager(folder, routes, ports[3]))
        rules = quick_rules((ROOT / "alerts/pgsidecar.rules.yml").read_text(), factor)
        watching = stack.enter_context(
            prometheus(
                folder,
                [f"{HOST}:{http}"],
                "--enable-feature=exemplar-storage",
                rules=rules,
                alertmanager=pager.url,
                every=every,
                port=ports[2],
            )
        )
        yield Stack(f"http://{HOST}:{http}", dsn, watching, pager, receiver)


@contextmanager
def _sidecar(folder: Path, dsn: str, pg: int, http: int) -> Iterator[tuple[int, int]]:
    """``pgsidecar run``; yields its ports."""
    path, log = folder / "config.yaml", folder / "sidecar.log"
    path.write_text(f"""
listen: {{host: {HOST}, port: {free_port(pg) if pg else 0}}}
http: {{host: {HOST}, port: {free_port(http) if http else 0}}}
users:
  {USER}: {{password: {PASSWORD}}}
console: {{admin_users: {USER}}}
pools:
  main: {{dsn: "{dsn}", mode: transaction, max_size: 25, min_idle: 5, ping_interval: 5s}}
  direct: {{dsn: "{dsn}", mode: session, max_size: 3, min_idle: 0, ping_interval: 5s}}
drain_timeout: 1s
""")
    with _process(log, "-m", "sidecar", "run", "--config", str(path)) as process:
        deadline = time.monotonic() + _STARTS
        while (ready := _READY.search(log.read_text())) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise CannotObserve(f"the sidecar does not start\n{log.read_text()}")
            time.sleep(0.05)
        yield int(ready[1]), int(ready[2])


@contextmanager
def _load(folder: Path, dsn: str, schema_dsn: str, is_calm: bool) -> Iterator[None]:
    arguments = ["-m", "sidecar.demo.workload", "--dsn", dsn, "--schema-dsn", schema_dsn]
    with _process(folder / "load.log", *arguments, *["--calm"] * is_calm):
        yield


@contextmanager
def _process(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,  # a Ctrl-C is for us, who stop it in its turn
        )
    try:
        yield process
    finally:
        stop(process)
