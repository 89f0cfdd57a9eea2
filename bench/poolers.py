"""Starts what is measured, each in a process of its own, and ends it again.

Both poolers listen on a port of loopback that the kernel chose, let everybody in (``trust``), and
have the same pool size; everything else is at its default.
"""

import contextlib
import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.pgbouncer import Program
from bench.results import BenchFailed
from bench.rig import DATABASE, HOST, POOL_SIZE, USER, Rig
from sidecar.demo.install import Account, server_account

SESSION_DATABASE: Final = "main_session"  # PgBouncer's, the same pool in session mode

_READY_TIMEOUT: Final = 30.0  # s
_STOP_TIMEOUT: Final = 15.0  # s, then it is killed
_POLL: Final = 0.02  # s
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_LIBC: Final = ctypes.CDLL(None)

PGBOUNCER_CONFIG: Final = """\
[databases]
{database} = host={host} port={server_port} dbname={database} user={user}
{session_database} = host={host} port={server_port} dbname={database} user={user} pool_mode=session

[pgbouncer]
listen_addr = {host}
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 1000
log_connections = 0
log_disconnections = 0
"""

SIDECAR_CONFIG: Final = """\
listen: {{host: {host}, port: 0, auth: trust, max_clients: {max_clients}}}
http: {{host: {host}, port: 0}}
log: {{format: json}}
drain_timeout: 1s
pools:
"""
_POOL: Final = '  {name}: {{dsn: "{dsn}", mode: transaction, max_size: {pool_size}}}\n'


@dataclass(frozen=True, slots=True)
class PgBouncer:
    pid: int
    port: int
    config: str


@dataclass(frozen=True, slots=True)
class Sidecar:
    pid: int
    port: int
    http_port: int
    config: str


@contextmanager
def pgbouncer(rig: Rig, program: Program) -> Iterator[PgBouncer]:
    account = server_account()  # it refuses to run as root, as PostgreSQL does
    path = program.path
    if account is not None:  # ours may lie where the account may not go
        path = Path(shutil.copy(program.path, rig.folder / "pgbouncer"))
    port = _free_port()
    config = PGBOUNCER_CONFIG.format(
        host=HOST,
        server_port=rig.postgres.port,
        port=port,
        user=USER,
        database=DATABASE,
        session_database=SESSION_DATABASE,
        pool_size=POOL_SIZE,
    )
    if program.has_prepared:
        config += "max_prepared_statements = 200\n"  # the default since 1.24
    file = rig.folder / "pgbouncer.ini"
    file.write_text(config)
    log = rig.folder / "pgbouncer.log"
    with _process([str(path), str(file)], log, account) as process:
        _await(process, log, lambda: _accepts(port))
        yield PgBouncer(process.pid, port, config)


@contextmanager
def sidecar(
    rig: Rig,
    program: Sequence[str] = ("sidecar", "run"),
    options: Sequence[str] = (),
    pools: Sequence[str] = (DATABASE,),
    max_clients: int = 1000,
) -> Iterator[Sidecar]:
    """``program`` is the module and its command; ``bench.runner`` takes the same configuration."""
    config = SIDECAR_CONFIG.format(host=HOST, max_clients=max_clients)
    dsn = rig.postgres.dsn(user=USER, database=DATABASE)
    config += "".join(_POOL.format(name=name, dsn=dsn, pool_size=POOL_SIZE) for name in pools)
    number = len(list(rig.folder.glob("sidecar-*.yaml")))
    file, log = rig.folder / f"sidecar-{number}.yaml", rig.folder / f"sidecar-{number}.log"
    file.write_text(config)
    command = [sys.executable, "-m", *program, "--config", str(file), *options]
    with _process(command, log, None) as process:
        _await(process, log, lambda: _announced(log) is not None)
        ports = _announced(log)
        assert ports is not None
        _await(process, log, lambda: _is_ready(ports[1]))
        yield Sidecar(process.pid, *ports, config)


@contextmanager
def _process(
    command: Sequence[str], log: Path, account: Account | None
) -> Iterator[subprocess.Popen[bytes]]:
    kept = {key: text for key, text in os.environ.items() if not key.startswith("PGSIDECAR__")}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=kept,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=() if account else None,
            start_new_session=True,  # a Ctrl-C is for us, who end it in the finally below
            preexec_fn=_end_with_parent,
        )
    try:
        yield process
    except BenchFailed as exc:
        if process.poll() is not None:  # that is why
            raise _ended(process, log) from exc
        raise
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """Runs in the child: it is killed when we are, and cannot clean up any more."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _await(process: subprocess.Popen[bytes], log: Path, is_fulfilled: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT
    while not is_fulfilled():
        if process.poll() is not None:
            raise _ended(process, log)
        if time.monotonic() > deadline:
            raise BenchFailed(
                f"{_name(process)} is not ready after {_READY_TIMEOUT:.0f} s{_tail(log)}"
            )
        time.sleep(_POLL)


def _ended(process: subprocess.Popen[bytes], log: Path) -> BenchFailed:
    return BenchFailed(f"{_name(process)} ended by itself ({process.returncode}){_tail(log)}")


def _name(process: subprocess.Popen[bytes]) -> str:
    assert isinstance(process.args, list)
    first, *others = map(str, process.args)
    return " ".join(others[1:3]) if first == sys.executable else Path(first).name


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-10:]
    return "".join(f"\n  {line}" for line in lines)


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False


def _announced(log: Path) -> tuple[int, int] | None:
    """The ports, once the sidecar says in its log which ones it got."""
    for line in log.read_text(errors="replace").splitlines():
        if '"ready for clients"' in line:
            event = json.loads(line)
            ports = [int(event[name].rpartition(":")[2]) for name in ("postgresql", "http")]
            return ports[0], ports[1]
    return None


def _is_ready(http_port: int) -> bool:
    """Whether it reached PostgreSQL."""
    connection = http.client.HTTPConnection(HOST, http_port, timeout=1)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _free_port() -> int:
    """Free a moment ago; the kernel hands out another one to whoever asks next."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
