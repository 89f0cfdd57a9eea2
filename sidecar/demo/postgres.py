"""A private PostgreSQL for the demo and the tests: started, crashed, stalled and removed at will.

Owns: one data directory in a private folder, its postmaster and the promise that neither outlives
us. Does not own: where the binaries come from (``install``). Synchronous, because tests and the
demo start it before there is anything else to do. Nothing is synced to disk: the data is thrown away.

No loop here, but one process beside each server: a guard (``sh`` reading a pipe from us) that
stops the server and removes the folder when we die without a chance to do so (SIGKILL). A pipe, not
PR_SET_PDEATHSIG: that one is sent when the *thread* that started the server ends.
"""

import atexit
import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self
from urllib.parse import quote, urlencode

from sidecar.demo.install import (
    EmbeddedPostgresError,
    client_bin,
    server_account,
    server_bin,
    temporary_root,
)

__all__ = ["Auth", "EmbeddedPostgres", "EmbeddedPostgresError"]

Auth = Literal["trust", "scram-sha-256", "md5", "password"]

_HOST = "127.0.0.1"
_START_TIMEOUT = 30.0  # seconds until it accepts connections
_STOP_TIMEOUT = 10.0  # seconds for a fast shutdown, then it is killed
_POLL = 0.005  # seconds between two looks at a process or its pid file
_PORT_TRIES = 5
_HAS_PROC = Path("/proc/self/stat").exists()  # Linux
_LOG_TAIL = 20  # lines of the server's log shown in an error

_SETTINGS = {
    "listen_addresses": _HOST,
    "max_connections": "100",
    "fsync": "off",  # safe against kill(), not against a power cut; synchronous_commit stays on:
    # without it a crash loses commits that were acknowledged, which tests must never see
    "full_page_writes": "off",
    "shared_buffers": "64MB",
    "dynamic_shared_memory_type": "mmap",  # lies in the data directory: a crash leaves nothing
    "log_line_prefix": "%m [%p] %q%u@%d/%a ",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

# Waits for the end of the pipe, then stops the postmaster at once (SIGQUIT; SIGCONT for one that
# is paused) and removes the folder. $1 is the folder; its pid file names the postmaster.
_GUARD = """
trap '' INT TERM HUP
while read -r _; do :; done
pid=$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null)
if [ -n "$pid" ]; then
  kill -QUIT "$pid" 2>/dev/null; kill -CONT "$pid" 2>/dev/null
  n=0
  while kill -0 "$pid" 2>/dev/null && [ "$n" -lt 100 ]; do sleep 0.1; n=$((n + 1)); done
fi
rm -rf -- "$1"
"""


class EmbeddedPostgres:
    """One private server. ``start()`` it or use it as a context manager.

    ``settings`` are lines of postgresql.conf. ``auth`` holds for TCP and Unix socket alike; for
    any but ``trust`` a password is made up unless given. Before ``start()`` there is no ``port``.
    ``bin_dir`` names the programs of another installation, in place of the embedded one's.
    """

    def __init__(
        self,
        version: int = 18,
        settings: Mapping[str, str] | None = None,
        auth: Auth = "trust",
        user: str = "postgres",
        password: str | None = None,
        database: str = "postgres",
        bin_dir: Path | None = None,
    ) -> None:
        self.version = version
        self.host = _HOST
        self.port = 0
        self.user = user
        self.password = password
        if password is None and auth != "trust":
            self.password = secrets.token_urlsafe(12)
        self.database = database
        self.bin_dir = client_bin(version) if bin_dir is None else bin_dir
        self._is_embedded = bin_dir is None
        self._auth = auth
        self._settings = dict(settings or {})
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    # where it is

    @property
    def socket_dir(self) -> Path:
        """The folder of the Unix socket: the private folder itself."""
        if self._folder is None:
            raise EmbeddedPostgresError("the embedded PostgreSQL is not started")
        return self._folder

    @property
    def data_dir(self) -> Path:
        return self.socket_dir / "data"

    @property
    def log_path(self) -> Path:
        return self.socket_dir / "postgresql.log"

    @property
    def is_started(self) -> bool:
        """Whether it has a folder: from ``start()`` to ``stop()``, also while killed."""
        return self._folder is not None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        if self._process is None:
            raise EmbeddedPostgresError("the embedded PostgreSQL is not running")
        return self._process.pid

    def dsn(self, **overrides: str | int) -> str:
        """A connection URL. ``host, port, user, password, database`` replace the parts of the
        same name (``host`` may be the socket's folder), anything else becomes a parameter.
        """
        given = {key: str(value) for key, value in overrides.items()}
        user = given.pop("user", self.user)
        password = given.pop("password", self.password or "")
        host = given.pop("host", self.host)
        port = given.pop("port", str(self.port))
        database = given.pop("database", given.pop("dbname", self.database))
        login = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
        query = f"?{urlencode(given, quote_via=quote)}" if given else ""
        return (
            f"postgresql://{login}@{quote(host, safe='')}:{port}/{quote(database, safe='')}{query}"
        )

    def psql(self, sql: str) -> str:
        """Run SQL (each statement its own transaction) and return the rows, columns split by |."""
        done = subprocess.run(
            [
                self.bin_dir / "psql",
                "-XqAtv",
                "ON_ERROR_STOP=1",
                "-d",
                self.dsn(password=""),
                "-f-",
            ],
            input=sql,
            capture_output=True,
            encoding="utf-8",
            env=_environment() | {"PGPASSWORD": self.password or "", "PGCLIENTENCODING": "UTF8"},
            timeout=60,
            check=False,
        )
        if done.returncode != 0:
            raise EmbeddedPostgresError(f"psql: {done.stderr.strip()}")
        return done.stdout.removesuffix("\n")

    # its life

    def start(self) -> Self:
        """Create the data directory, start the server and return when it accepts connections."""
        if self._folder is not None:
            raise EmbeddedPostgresError("the embedded PostgreSQL is started already")
        self._server_bin()  # a copy of it removes itself at exit: after the server, then
        atexit.register(self.stop)
        try:
            self._create()
            for left in reversed(range(_PORT_TRIES)):
                self.port = _free_port()
                try:
                    self._launch()
                    break
                except _PortTaken:
                    if not left:
                        raise
            if self.database != "postgres":
                self._create_database()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the server (fast shutdown: clients are cut off) and remove its folder."""
        if os.getpid() != self._owner:
            return  # a forked child inherited atexit's list, not the server
        self._shut_down()
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()  # it removes the folder too, which does no harm
            self._guard.wait()
            self._guard = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        atexit.unregister(self.stop)

    def kill(self) -> None:
        """SIGKILL the postmaster and its children, as a crash would; data and port remain."""
        process = self._process
        if process is None:
            return
        # stopped first, so that it forks no child between the look at its children and its end
        _send(process.pid, signal.SIGSTOP)
        children = _children(process.pid)
        for pid in (process.pid, *children):
            _send(pid, signal.SIGKILL)
        process.wait()
        for pid in children:
            _wait_gone(pid)
        self._process = None
        _remove_shared_memory(self.data_dir)

    def restart(self) -> None:
        """Start again on the same port and data, after ``kill()`` or out of normal running."""
        self._shut_down()
        self._launch()

    def pause(self) -> None:
        """SIGSTOP the postmaster and all its children: the server takes bytes, answers nothing."""
        _send(self.pid, signal.SIGSTOP)  # first, so that it forks no child after the look at them
        for pid in _children(self.pid):
            _send(pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Undo ``pause()``."""
        for pid in (*_children(self.pid), self.pid):
            _send(pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # steps

    def _create(self) -> None:
        """Make the folder, its guard, and the data directory in it."""
        account = server_account()
        self._folder = Path(tempfile.mkdtemp(prefix="pgsidecar-", dir=temporary_root()))
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "guard", self._folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        if account is not None:
            os.chown(self._folder, account.uid, account.gid)
        self.make_data()
        with (self.data_dir / "postgresql.conf").open("a") as file:
            for name, value in (_SETTINGS | self._settings).items():
                file.write(f"{name} = {_quoted(value)}\n")
            file.write(f"unix_socket_directories = {_quoted(str(self._folder))}\n")

    def make_data(self) -> None:
        """Run initdb. A subclass may have the like of what that makes from somewhere else."""
        with self._password_file() as options, tempfile.TemporaryFile() as said:
            done = self._spawn("initdb", self._initdb_options() + options, said).wait()
            said.seek(0)
            if done != 0:
                raise EmbeddedPostgresError(f"initdb failed\n{said.read().decode().strip()}")

    def _initdb_options(self) -> list[str]:
        options = ["-D", str(self.data_dir), "-U", self.user, "-A", self._auth]
        options += ["--no-sync", "--no-instructions", "--encoding=UTF8", "--locale=C"]
        if self._auth == "md5":
            options += ["--set=password_encryption=md5"]
        return options

    @contextlib.contextmanager
    def _password_file(self) -> Iterator[list[str]]:
        """The option that tells initdb the password, which must not be an argument (``ps``)."""
        if self.password is None:
            yield []
            return
        path = self.socket_dir / "password"
        path.write_text(self.password)
        account = server_account()
        if account is not None:
            os.chown(path, account.uid, account.gid)
        path.chmod(0o600)
        try:
            yield [f"--pwfile={path}"]
        finally:
            path.unlink()

    def _create_database(self) -> None:
        wanted, self.database = self.database, "postgres"
        try:
            self.psql(f'CREATE DATABASE "{wanted.replace(chr(34), chr(34) * 2)}"')
        finally:
            self.database = wanted

    def _launch(self) -> None:
        """Start the postmaster on ``self.port`` and wait until it accepts connections."""
        with self.log_path.open("ab") as log:
            begin = log.tell()
            options = ["-D", str(self.data_dir), "-p", str(self.port)]
            self._process = self._spawn("postgres", options, log)
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._is_ready():
            if self._process.poll() is not None:
                self._process = None
                tail = self._log_tail(begin)
                taken = "could not bind" in tail or "in use" in tail
                raise (_PortTaken if taken else EmbeddedPostgresError)(
                    f"PostgreSQL {self.version} did not start on port {self.port}\n{tail}"
                )
            if time.monotonic() > deadline:
                raise EmbeddedPostgresError(
                    f"PostgreSQL {self.version} is not ready after {_START_TIMEOUT:.0f} s"
                    f"\n{self._log_tail(begin)}"
                )
            time.sleep(_POLL)

    def _is_ready(self) -> bool:
        """The postmaster says so in the eighth line of its pid file; the first must be its own."""
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _shut_down(self) -> None:
        """End the postmaster: fast, or by force if that takes too long."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            self.resume()
            _send(process.pid, signal.SIGINT)
            try:
                process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None

    def _spawn(self, program: str, options: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        account = server_account()
        return subprocess.Popen(
            [self._server_bin() / program, *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=self.socket_dir,  # PostgreSQL insists on a working directory it can read
            env=_environment(),
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=() if account else None,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
        )

    def _server_bin(self) -> Path:
        return server_bin(self.version) if self._is_embedded else self.bin_dir

    def _log_tail(self, begin: int) -> str:
        text = self.log_path.read_bytes()[begin:].decode(errors="replace")
        return "\n".join(text.splitlines()[-_LOG_TAIL:])


class _PortTaken(EmbeddedPostgresError):
    """Somebody took the port between our choice and the server's start."""


def _free_port() -> int:
    """A port the kernel finds free. Linux gives ``bind`` odd ports and outgoing connections even
    ones while it can, so that a client does not take the port during a ``restart()``.
    """
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _environment() -> dict[str, str]:
    """Ours without libpq's variables. TZ spares initdb a search of all time zones."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it ended by itself


def _children(parent: int) -> list[int]:
    """Process ids of the children. Backends lead process groups of their own: no ``killpg``."""
    if _HAS_PROC:
        pairs = [_stat(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid, ppid, state in pairs if ppid == parent and state != "Z"]
    table = subprocess.run(["ps", "-Ao", "pid=,ppid="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in table.stdout.splitlines()]
    return [int(pid) for pid, ppid in rows if int(ppid) == parent]


def _stat(pid: int) -> tuple[int, int, str]:
    """Process id, parent and state of a process; parent -1 and state X if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return pid, -1, "X"
    state, ppid = text.rpartition(")")[2].split()[:2]
    return pid, int(ppid), state


def _wait_gone(pid: int) -> None:
    """Wait until a process we sent SIGKILL is gone, or a zombie that its new parent left."""
    deadline = time.monotonic() + _STOP_TIMEOUT
    while time.monotonic() < deadline:
        if _HAS_PROC and _stat(pid)[2] in "XZ":
            return
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(_POLL)
    raise EmbeddedPostgresError(f"process {pid} survived SIGKILL for {_STOP_TIMEOUT:.0f} s")


def _remove_shared_memory(data_dir: Path) -> None:
    """Remove the segment of a killed postmaster (the 7th line of its pid file: key and id).

    A restarted one would do so, but not every killed one is restarted.
    """
    try:
        lines = (data_dir / "postmaster.pid").read_text().splitlines()
        segment = int(lines[6].split()[1])
    except (FileNotFoundError, IndexError, ValueError):
        return
    ctypes.CDLL(None).shmctl(segment, 0, None)  # 0 is IPC_RMID; a failure means it is gone
