"""The demo as a user runs it: one command, real traffic through it, and nothing left afterwards."""

import os
import pty
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

COMMAND = [sys.executable, "-m", "sidecar", "demo"]
ANY_PORT = ["--port", "0", "--http-port", "0"]
MARK = "DEMO_TEST_MARK"
STARTS_WITHIN = 25.0  # seconds
STOPS_WITHIN = 8.0  # seconds: workload 2, drain 2, PostgreSQL, and a slow machine


class Demo:
    """A running demo: its process, and what it printed so far."""

    def __init__(self, process: subprocess.Popen[bytes], output: int) -> None:
        self.process = process
        self.text = ""
        self._output = output

    def read_until(self, pattern: str, within: float) -> re.Match[str]:
        deadline = time.monotonic() + within
        while not (found := re.search(pattern, self.text)):
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern!r} within {within:.0f} s in:\n{self.text}"
            assert self._read(left), f"ended without {pattern!r}:\n{self.text}"
        return found

    def wait(self, within: float) -> int:
        """Read to the end; the exit code."""
        deadline = time.monotonic() + within
        while self._read(max(0.0, deadline - time.monotonic())):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def close(self) -> None:
        if self._output >= 0:
            os.close(self._output)
            self._output = -1

    def _read(self, within: float) -> bool:
        """Read what comes first; False at the end or when nothing came."""
        if not select.select([self._output], [], [], within)[0]:
            return False
        try:
            data = os.read(self._output, 65536)
        except OSError:  # a pseudo-terminal reports its end so
            return False
        self.text += data.decode()
        return bool(data)


@contextmanager
def demo(*options: str, on_terminal: bool = False) -> Iterator[Demo]:
    """Run the demo in a session of its own, and fail if a process of it is left."""
    mark = secrets.token_hex()
    ours, theirs = pty.openpty() if on_terminal else os.pipe()
    environ = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm", MARK: mark}
    process = subprocess.Popen(
        [*COMMAND, *options],
        stdin=theirs if on_terminal else subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env=environ,
        start_new_session=True,
    )
    os.close(theirs)
    running = Demo(process, ours)
    try:
        yield running
    finally:
        process.kill()
        process.wait()
        running.close()
    deadline = time.monotonic() + STOPS_WITHIN
    while left := processes_of(mark):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


def processes_of(mark: str) -> dict[int, str]:
    """Processes that a demo started, by the mark in their environment; zombies have none."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
        except OSError:
            continue
    return found


def postgres_url(running: Demo) -> str:
    return running.read_until(r"psql (postgresql://\S+/main)\s", STARTS_WITHIN)[1]


def metrics_url(running: Demo) -> str:
    return running.read_until(r"curl (http://\S+/metrics)\s", STARTS_WITHIN)[1]


def value_of(metrics: str, series: str) -> float:
    line = re.search(rf"^{re.escape(series)} (\S+)$", metrics, re.MULTILINE)
    assert line, f"no {series}"
    return float(line[1])


def test_runs_for_some_seconds_with_true_figures() -> None:
    """The whole of it: a client of ours and a scrape meanwhile, exit code 0, nothing left."""
    with demo("--seconds", "8", *ANY_PORT) as running:
        url = postgres_url(running)
        with psycopg.connect(url, autocommit=True) as conn:
            assert conn.execute("SELECT current_user::text").fetchone() == ("app",)
        running.read_until(r" [1-9]\d* queries/s", STARTS_WITHIN)
        with urllib.request.urlopen(metrics_url(running), timeout=5) as response:
            metrics = response.read().decode()
        assert value_of(metrics, 'pgsidecar_up{pool="main"}') == 1
        assert value_of(metrics, 'pgsidecar_pool_connections_max{pool="main"}') == 25
        assert (
            value_of(metrics, 'pgsidecar_pool_acquires_total{pool="main",outcome="immediate"}') > 0
        )
        assert running.wait(8 + STOPS_WITHIN) == 0
    lines = [line for line in running.text.splitlines() if "queries/s" in line and " main:" in line]
    rates = [int(re.findall(r"(\d+) queries/s", line)[0]) for line in lines]
    assert len(rates) >= 3
    assert max(rates) > 50
    assert re.search(r"main: \d+/25 used, .* P50 \d\S* ms", running.text)
    assert "\x1b" not in running.text
    # what fails is what the workload provokes: unique violation (23505), division by zero (22012)
    assert set(re.findall(r"SQLSTATE (\w+)", running.text)) <= {"22", "23"}
    assert "Traceback" not in running.text
    assert "ERROR" not in running.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_everything(number: signal.Signals) -> None:
    with demo(*ANY_PORT) as running:
        running.read_until("queries/s", STARTS_WITHIN)
        running.process.send_signal(number)
        assert running.wait(STOPS_WITHIN) == 0
    assert "stopping" in running.text


def test_second_signal_leaves_at_once() -> None:
    """Whoever presses Ctrl-C twice will not wait; still nothing is left behind."""
    with demo(*ANY_PORT) as running:
        running.read_until("queries/s", STARTS_WITHIN)
        running.process.send_signal(signal.SIGINT)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(STOPS_WITHIN) in (0, 130)


def test_killed_demo_leaves_nothing() -> None:
    """SIGKILL: the guard stops PostgreSQL, the workload sees that its parent is gone."""
    with demo(*ANY_PORT) as running:
        running.read_until("queries/s", STARTS_WITHIN)
        running.process.kill()


def test_terminal_is_redrawn_and_given_back() -> None:
    """Ctrl-C as a terminal sends it: to the whole process group."""
    with demo(*ANY_PORT, on_terminal=True) as running:
        running.read_until(r"\x1b\[\d+F", STARTS_WITHIN)
        running.read_until(r"\d+ queries/s {2}P50 \d", STARTS_WITHIN)
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.wait(STOPS_WITHIN) == 0
    assert running.text.index("\x1b[?25l") < running.text.index("\x1b[?25h")
    assert re.search("[█▒]", running.text)


def test_taken_port_that_was_asked_for_is_an_error() -> None:
    """Not another one: who names a port has a reason."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with demo("--port", str(port)) as running:
            assert running.wait(STARTS_WITHIN) == 2
    assert f"--port {port}" in running.text
    assert "Traceback" not in running.text


def test_taken_default_port_is_replaced() -> None:
    """A sidecar that runs here already must not keep the demo from starting."""
    with occupied(6432), demo("--seconds", "1", "--http-port", "0") as running:
        assert ":6432/" not in postgres_url(running)
        assert running.wait(STARTS_WITHIN) == 0
    assert "port 6432: Address already in use" in running.text


def test_closed_pipe_ends_the_demo() -> None:
    """``pgsidecar demo | head``: no traceback, nothing left."""
    with demo(*ANY_PORT) as running:
        running.read_until("queries/s", STARTS_WITHIN)
        running.close()
        assert running.process.wait(STOPS_WITHIN) == 0


@contextmanager
def occupied(port: int) -> Iterator[None]:
    """The port is taken: by us, or by somebody else already."""
    with socket.socket() as blocker:
        blocker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            blocker.bind(("127.0.0.1", port))
        except OSError:
            yield
            return
        blocker.listen()
        yield
