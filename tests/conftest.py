"""Fixtures with a real PostgreSQL, and a real sidecar before it.

What they logged during a failed test is in the report. ``PGSIDECAR_TEST_POSTGRES`` chooses the version
of PostgreSQL, 16 (default) or 18. Without the binaries the tests that need them fail: nothing is
skipped. Tests run on uvloop, as the sidecar does where there is one.
"""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest
import uvloop

from sidecar.demo.postgres import EmbeddedPostgres
from tests.copied_postgres import CopiedPostgres, use_shared_memory
from tests.debian_postgres import TlsPostgres
from tests.listener_files import ListenerFiles, make_files
from tests.sidecar_process import (
    MakeProcess,
    MakeService,
    ServiceHere,
    SidecarProcess,
    configuration,
)

MakePostgres = Callable[..., EmbeddedPostgres]

_VERSIONS = ("16", "18")
_VARIABLE = "PGSIDECAR_TEST_POSTGRES"
_LOG_LIMIT = 20_000  # characters of one server's log in a report

_log_begins = pytest.StashKey[dict[EmbeddedPostgres, int]]()
_servers: list[EmbeddedPostgres] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "both_loops: run on uvloop and on asyncio's own loop, too")
    if os.environ.get(_VARIABLE, "16") not in _VERSIONS:
        raise pytest.UsageError(f"{_VARIABLE} must be one of {', '.join(_VERSIONS)}")
    use_shared_memory()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Half as many processes again as cores: more than half of a test's time is waiting."""
    return (len(os.sched_getaffinity(0)) * 3 + 1) // 2


def pytest_collection_finish() -> None:
    """What is there now, stays: a collection during a test, ours or Python's, need not look at it.

    They are hundreds of thousands, and some tests have them collected by hand.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop}
    if item.get_closest_marker("both_loops") is not None:
        loops["asyncio"] = asyncio.new_event_loop
    return loops


@pytest.fixture(scope="session")
def postgres_version() -> int:
    return int(os.environ.get(_VARIABLE, "16"))


@pytest.fixture(scope="session")
def postgres(postgres_version: int) -> Iterator[EmbeddedPostgres]:
    """One server for all tests of this worker: use own names in it, do not stop it."""
    with CopiedPostgres(postgres_version, settings={"max_connections": "200"}) as server:
        _servers.append(server)
        yield server
        _servers.remove(server)


@pytest.fixture(scope="session")
def tls_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsPostgres]:
    """Debian's PostgreSQL with TLS, one for all tests of this worker: leave it as you found it."""
    with TlsPostgres(tmp_path_factory.mktemp("tls")) as server:
        _servers.append(server)
        yield server
        _servers.remove(server)


@pytest.fixture
def own_postgres(postgres_version: int) -> Iterator[MakePostgres]:
    """Makes servers that this test may kill, stall and configure.

    Takes the arguments of ``EmbeddedPostgres``; they run when returned and are gone after the test.
    """
    made: list[EmbeddedPostgres] = []

    def make(version: int = postgres_version, **options: object) -> EmbeddedPostgres:
        server = CopiedPostgres(version, **options)  # type: ignore[arg-type]  # passed on
        made.append(server)
        server.start()
        _servers.append(server)
        return server

    yield make
    for server in made:
        if server in _servers:
            _servers.remove(server)
        server.stop()


@pytest.fixture
async def make_service() -> AsyncIterator[MakeService]:
    """Starts sidecars on this event loop; when they stop, nothing may be left in their pools."""
    async with AsyncExitStack() as stack:

        async def make(dsn: str, **options: object) -> ServiceHere:
            service = await ServiceHere.start(configuration(dsn, **options))  # type: ignore[arg-type]  # passed on
            stack.push_async_callback(service.stop)
            return service

        yield make


@pytest.fixture
def make_process(tmp_path: Path) -> Iterator[MakeProcess]:
    """Starts sidecars in processes of their own, killed after the test."""
    with ExitStack() as stack:

        def make(dsn: str, **options: object) -> SidecarProcess:
            process = SidecarProcess.start(configuration(dsn, **options), tmp_path)  # type: ignore[arg-type]  # passed on
            stack.callback(process.close)
            return process

        yield make


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> ListenerFiles:
    """Certificates for sidecars that speak TLS to clients."""
    return make_files(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def no_errors_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a client does, it is no error of ours. A test that makes one clears the log."""
    yield
    logged = [r for r in caplog.records if r.levelname in ("ERROR", "CRITICAL") or r.exc_info]
    assert not logged, [record.getMessage() for record in logged]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    item.stash[_log_begins] = {
        server: server.log_path.stat().st_size for server in _servers if server.is_started
    }
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach what the servers logged since the test began, as PgBouncer's tests do."""
    report = yield
    if report.failed:
        begins = item.stash.get(_log_begins, {})
        for server in _servers:
            if not server.is_started:
                continue  # the test stopped it, its log is gone
            with server.log_path.open(errors="replace") as file:
                file.seek(begins.get(server, 0))
                text = file.read()[-_LOG_LIMIT:]
            if text:
                report.sections.append((f"PostgreSQL's log (port {server.port})", text))
    return report
