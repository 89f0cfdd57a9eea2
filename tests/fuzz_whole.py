"""What must hold after each fuzzed conversation, and how long to go on with them.

``PGSIDECAR_FUZZ=30 pytest tests/test_fuzz.py --timeout 0`` tries 30 times as many examples, other ones in
each run. Without it there are few, the same ones each time.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from hypothesis import HealthCheck, Phase, settings

from sidecar.proxy.prepared import PREFIX
from tests.wire import SYNC, Client, Sidecar, bind, error, execute, resident_memory

FACTOR = int(os.environ.get("PGSIDECAR_FUZZ", "0"))

MEMORY = 32 * 1024 * 1024  # bytes that the sidecar may grow by

_LEFT_BEHIND = (
    "select current_setting('timezone'), current_setting('datestyle'), current_setting('work_mem'),"
    " current_setting('search_path'), current_setting('fuzz.mine', true), current_user,"
    " current_setting('default_transaction_read_only'),"
    " (select count(*) from pg_listening_channels()),"
    " (select count(*) from pg_class where relnamespace = pg_my_temp_schema()),"
    " (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),"
    " (select count(*) from pg_cursors),"
    " (select count(*) from pg_prepared_statements where name !~ '^pgsidecar_')"
)
_NOTHING = ["UTC", "ISO, MDY", "4MB", '"$user", public', "", "postgres", "off", *("0",) * 5]


def examples(number: int, **options: object) -> settings:
    """For ``number`` examples, times the factor."""
    return settings(
        max_examples=number * (FACTOR or 1),
        derandomize=not FACTOR,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        **options,  # type: ignore[arg-type]  # passed on
    )


class _Loud(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self.records.append(record)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is logged as an error, and memory does not grow."""
    loud = _Loud()
    log = logging.getLogger("pgsidecar")
    log.addHandler(loud)
    before = resident_memory()
    try:
        yield
    finally:
        log.removeHandler(loud)
    assert not loud.records, [record.getMessage() for record in loud.records]
    assert resident_memory() - before < MEMORY


def check_newcomer(sidecar: Sidecar, database: str = "main") -> None:
    """A new client finds nothing of those who went before, and is served."""
    with sidecar.login(database=database, application_name="newcomer") as client:
        check_finds_nothing(client)
        assert client.value("show application_name") == "newcomer"
        for name in ("", "a"):
            assert error(client.ask(bind(name=name), execute(), SYNC))["C"] == "26000"
    sidecar._clients.clear()


def check_finds_nothing(client: Client) -> None:
    (found,) = client.rows(_LEFT_BEHIND)
    assert [value or "" for value in found] == _NOTHING


def check_books(sidecar: Sidecar) -> None:
    """What is prepared on the server's side is what our books say; once nobody is there."""
    pool = sidecar.pool
    sql = f"select pg_backend_pid(), (select string_agg(name, ',' order by name) from pg_prepared_statements where name ~ '^{PREFIX.decode()}')"
    with ExitStack() as stack:
        clients = [stack.enter_context(sidecar.login()) for _ in range(pool.config.max_size)]
        for client in clients:
            client.rows("begin")
        found = {pid: names or "" for client in clients for pid, names in client.rows(sql)}
        ours = sidecar.call(
            lambda: {
                str(server.pid): ",".join(sorted(s.name.decode() for s in server.prepared))
                for server in pool.state.active
            }
        )
        most = sidecar.call(lambda: max(len(server.prepared) for server in pool.state.active))
    sidecar._clients.clear()
    assert ours == found
    assert most <= pool.config.max_prepared_statements
