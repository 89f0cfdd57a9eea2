"""``python -m deploy.observe``: watch a page arrive, and go.

Shows, as it happens: what the pool looks like, what goes wrong (one application forgets to commit), which alert
is pending, which one fires, the page with its text, and that it is resolved.
"""

import argparse
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import psycopg

from deploy.observe.processes import CannotObserve
from deploy.observe.receiver import Page
from deploy.observe.stack import Stack, running
from deploy.observe.trouble import CULPRIT, forget

FACTOR: Final = 20.0
"""A rule's minute is 3 s."""
TROUBLE_BEGINS, TROUBLE_LASTS = 6.0, 12.0  # seconds; so that within a minute all is well again
FORGOTTEN: Final = 24  # transactions, of 25 connections: the others have to wait
PORTS: Final = (6432, 9632, 9090, 9093)

_LINE_EVERY: Final = 5.0  # seconds
_LOOK_EVERY: Final = 0.5
_FIGURES: Final = 20.0  # seconds until Prometheus has scraped the sidecar; it takes one or two
_POOL: Final = '{pool="main"}'
_COLOURS: Final = {"PAGE": "1;31", "MESSAGE": "33", "RESOLVED": "32", "firing": "31", "!": "1"}


class Terminal:
    """Lines with the time since the start, from several threads."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._has_colour = sys.stdout.isatty()
        self._width = min(shutil.get_terminal_size().columns, 110)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def restart(self) -> None:
        self._began = time.monotonic()

    def line(self, text: str, mark: str = "") -> None:
        if self._has_colour and mark in _COLOURS:
            text = f"\x1b[{_COLOURS[mark]}m{text}\x1b[0m"
        with self._lock:
            print(f"{self.elapsed:6.1f} s  {text}", flush=True)

    def page(self, page: Page) -> None:
        mark = {"pager": "PAGE", "chat": "MESSAGE"}[page.receiver]
        if page.status == "resolved":
            mark = "RESOLVED"
        self.line(f"{mark:<8} {page.alert}, to {page.receiver}", mark)
        if page.status == "firing":
            indent = " " * 19
            text = textwrap.fill(
                page.annotations["description"],
                self._width,
                initial_indent=indent,
                subsequent_indent=indent,
                break_on_hyphens=False,
                break_long_words=False,
            )
            with self._lock:
                print(text)
                print(f"{indent}Runbook: docs/runbooks/{page.alert}.md", flush=True)


class Watch:
    """Tells of each change of an alert, and every few seconds of the pool."""

    def __init__(self, stack: Stack, terminal: Terminal) -> None:
        self._stack = stack
        self._terminal = terminal
        self._states: dict[tuple[str, str], str] = {}
        self._next_line = 0.0

    def look(self) -> None:
        found = self._stack.prometheus.alerts()
        if found is None:
            raise CannotObserve(f"Prometheus has ended\n{self._stack.prometheus.log}")
        now = {_key(alert): str(alert["state"]) for alert in found}
        for name, pool in {**self._states, **now}:
            state = now.get((name, pool), "over")
            if self._states.get((name, pool)) != state:
                self._terminal.line(f"{state:<8} {name} {pool}".rstrip(), state)
        self._states = now
        if self._terminal.elapsed >= self._next_line:
            self._next_line = self._terminal.elapsed + _LINE_EVERY
            self._pool()

    def firing(self) -> list[str]:
        return sorted({name for (name, _), state in self._states.items() if state == "firing"})

    def _pool(self) -> None:
        ask = self._stack.prometheus.value
        used = ask('pgsidecar_pool_connections{pool="main",state="used"}')
        limit = ask(f"pgsidecar_pool_connections_max{_POOL}")
        waiting = ask(f"pgsidecar_pool_pending_requests{_POOL}")
        rate = ask(f"sum(rate(pgsidecar_query_duration_seconds_count{_POOL}[5s]))")
        if used is not None and limit and waiting is not None:
            bar = "#" * round(25 * used / limit)
            self._terminal.line(
                f"main     [{bar:<25}] {used:.0f} of {limit:.0f} used, {waiting:.0f} waiting,"
                f" {rate or 0:.0f} queries/s"
            )


def _key(alert: dict[str, Any]) -> tuple[str, str]:
    return alert["labels"]["alertname"], alert["labels"].get("pool", "")


@contextmanager
def _trouble(dsn: str, terminal: Terminal) -> Iterator[None]:
    """Transactions of one application that are begun and left open for a while, on a thread of their own:
    beginning them takes as long as the pool makes them wait."""
    over = threading.Event()

    def make() -> None:
        with ExitStack() as held:
            if over.wait(TROUBLE_BEGINS):
                return
            terminal.line(
                f"{CULPRIT} begins {FORGOTTEN} transactions and forgets to commit for"
                f" {TROUBLE_LASTS:.0f} s",
                "!",
            )
            ends = terminal.elapsed + TROUBLE_LASTS
            try:
                forget(dsn, FORGOTTEN, held)
            except psycopg.Error as exc:
                terminal.line(f"{CULPRIT}: {exc}".strip().partition("\n")[0], "!")
            over.wait(max(0.0, ends - terminal.elapsed))
        terminal.line(f"{CULPRIT} has been restarted: its connections are free", "!")

    thread = threading.Thread(target=make, name=CULPRIT, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and the end of the terminal set."""
    event = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: event.set())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def observe(seconds: float | None, factor: float) -> int:
    """Run until the time is over (None: until a signal). Returns the exit code."""
    terminal = Terminal()
    pages: list[Page] = []

    def told(page: Page) -> None:
        pages.append(page)
        terminal.page(page)

    print("starting PostgreSQL, the sidecar, a load, Alertmanager and Prometheus ...", flush=True)
    with (
        _stopping() as stopping,
        running(factor=factor, is_calm=True, told=told, ports=PORTS) as stack,
    ):
        _wait_for_figures(stack, stopping)
        print(_addresses(stack, factor), flush=True)
        terminal.restart()
        watch = Watch(stack, terminal)
        with _trouble(stack.dsn, terminal):
            while not stopping.is_set() and (seconds is None or terminal.elapsed < seconds):
                watch.look()
                stopping.wait(_LOOK_EVERY)
        print("stopping ...", flush=True)
        left = watch.firing()
    print(_summary(pages, left))
    return 0


def _wait_for_figures(stack: Stack, stopping: threading.Event) -> None:
    deadline = time.monotonic() + _FIGURES
    watched = stack.prometheus
    while watched.value("min(pgsidecar_up)") != 1 or watched.alerts():  # PgSidecarAbsent, until now
        if stopping.wait(0.1):
            return
        if time.monotonic() > deadline:
            raise CannotObserve(f"no figures of the sidecar in Prometheus after {_FIGURES:g} s")


def _addresses(stack: Stack, factor: float) -> str:
    return f"""
  Prometheus    {stack.prometheus.url}/alerts
  Alertmanager  {stack.alertmanager.url}
  the sidecar   pgsidecar top --url {stack.sidecar}
                psql {stack.dsn.replace("/main", "/pgsidecar")} -c 'SHOW WHY'

Durations in rules and routes are divided by {factor:g}: a minute is {60 / factor:g} s. Thresholds are as shipped.
"""


def _summary(pages: list[Page], left: list[str]) -> str:
    def count(receiver: str, status: str) -> int:
        return sum((page.receiver, page.status) == (receiver, status) for page in pages)

    still = f"; still firing: {', '.join(left)}" if left else ""
    return (
        f"Pages: {count('pager', 'firing')}, resolved: {count('pager', 'resolved')}."
        f" Messages: {count('chat', 'firing')}, resolved: {count('chat', 'resolved')}{still}."
    )


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.observe",
        description="Watch a page arrive: PostgreSQL, sidecar, load, Prometheus and Alertmanager with the"
        " project's rules, and an application that forgets to commit.",
    )
    parser.add_argument("--seconds", type=_above_zero, metavar="N", help="stop after N seconds")
    parser.add_argument(
        "--factor",
        type=_above_zero,
        default=FACTOR,
        metavar="F",
        help=f"divide the durations of rules and routes by F ({FACTOR:g}; 1: as in production)",
    )
    options = parser.parse_args()
    try:
        return observe(options.seconds, options.factor)
    except CannotObserve as exc:
        print(exc, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
