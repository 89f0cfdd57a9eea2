"""``pgsidecar top``: what a frame shows of a real sidecar, keys on a real terminal, and a sidecar that goes."""

import asyncio
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from math import isnan
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from sidecar.ask.answers import Entry
from sidecar.ask.asker import Asker, address_of
from sidecar.ask.board import Board, Look, Pane
from sidecar.ask.frame import render
from sidecar.ask.keys import read_keys
from sidecar.ask.screen import Screen
from sidecar.ask.top import look_at
from sidecar.units import age, count, rate
from tests.sidecar_process import PATIENCE, SidecarProcess, configuration, environment, eventually
from tests.wire import Client, Sidecar, query

COMMAND = (Path(sys.executable).with_name("pgsidecar"), "top", "--url")

# -- frames ----------------------------------------------------------------------------------------


def plain(board: Board, width: int = 160, height: int | None = None) -> list[str]:
    return render(board, width, height, has_color=False, is_utf8=True).splitlines()


@pytest.fixture
def sidecar(postgres) -> Iterator[Sidecar]:
    with Sidecar(
        postgres, max_size=2, min_idle=0, acquire_timeout="20s", leak_threshold="0.2s"
    ) as it:
        yield it


def url(sidecar: Sidecar) -> str:
    return "http://{}:{}".format(*sidecar.service.http_address)


def ask(sidecar: Sidecar, board: Board) -> None:
    """Two looks, as ``top`` does, on an event loop of their own."""

    async def looks() -> None:
        async with Asker(address_of(board.url)) as asker:
            for _ in range(2):
                board.take(await look_at(asker, board, asyncio.get_running_loop().time()))

    asyncio.run(looks())


def busy(sidecar: Sidecar) -> list[Client]:
    """A client that has forgotten to commit, one that runs something, one that waits, an error."""
    sidecar.login(application_name="batch").ask(query("SELECT nonsense"))
    clients = [sidecar.login(application_name=name) for name in ("billing", "report", "web")]
    billing, report, web = clients
    billing.ask(query("BEGIN"))
    billing.ask(query("SELECT 'a-customers-secret'"))
    report.send(query("SELECT pg_sleep(20)"))
    sidecar.until(lambda: len(sidecar.pool.state.active) == 2, "both have a connection")
    web.send(query("SELECT 1"))
    sidecar.until(lambda: sidecar.pool.state.waiters, "one waits")
    sidecar.until(lambda: sidecar.service.recorder.pool("main").leaks, "one is a leak")
    return clients


@pytest.mark.parametrize("width", [80, 160])
def test_a_frame_tells_who_waits_who_holds_and_what_ran(sidecar, width):
    """Of a real sidecar whose pool is full; readable on 80 columns."""
    billing, report, web = busy(sidecar)
    board = Board(url(sidecar))
    ask(sidecar, board)
    lines = plain(board, width)
    text = "\n".join(lines)
    assert all(cell_len(line) <= width for line in lines)
    (pool,) = [line for line in lines if line.startswith("main ") and "2/2" in line]
    assert "█" * (8 if width == 80 else 25) in pool
    assert pool.split()[-1] == "up"
    (waits,) = [line for line in lines if "2 of 2 connections in use" in line]
    assert "web" in waits
    (holds,) = [line for line in lines if "billing" in line and "idle in tx" in line]
    assert "[leak]: SELECT" in holds
    (runs,) = [line for line in lines if "report" in line and "running" in line]
    assert "pg_sleep" in runs
    assert "waiters: 1" in lines
    assert "holders: 2" in lines
    (failed,) = [line for line in lines if "nonsense" in line]
    assert " 1 " in failed
    assert "a-customers-secret" not in text
    report.cancel()
    billing.ask(query("COMMIT"))
    web.until_ready()


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_a_server_that_is_down_is_seen_on_any_terminal(width):
    board = Board("")
    board.take(
        Look(1.0, pools=[Entry({"name": "main", "is_up": False, "used": 3, "max_size": 25})])
    )
    head, pool = plain(board, width)[1:3]
    assert pool.startswith("main")
    assert pool.endswith("DOWN")
    assert "used" in head
    assert "3/25" in pool


def test_a_verdict_is_readable_on_80_columns():
    """In the overview the headline on two lines and a figure; alone, all of it."""
    verdict = {
        "kind": "slow_statement",
        "headline": "Pool main is full of one slow statement of nightly-burst, SELECT pg_sleep($1)"
        " (07681e575f3d174e): 20 clients wait.",
        "evidence": ["It has 65 % of the connections' time in the last 2.7 s, up to 23 connections at"
        " once, above all for nightly-burst."],
        "next_steps": ["Find out why it is slow."],
    }  # fmt: skip
    board = Board("")
    board.take(Look(1.0, verdicts=[("main", Entry(verdict))]))
    assert plain(board, 80, 24)[2:6] == [
        "Pool main is full of one slow statement of nightly-burst, SELECT pg_sleep($1)",
        "  (07681e575f3d174e): 20 clients wait.",
        "  It has 65 % of the connections' time in the last 2.7 s, up to 23 connections …",
        "waiters: nobody waits",
    ]
    board.press("1")
    assert plain(board, 80, 24)[4:8] == [
        "  It has 65 % of the connections' time in the last 2.7 s, up to 23 connections",
        "    at once, above all for nightly-burst.",
        "  next: Find out why it is slow.",
        "",
    ]


def test_rates_are_differences():
    """So there are none in the first frame, and none when another sidecar answers."""

    def look(at: float, queries: int) -> Look:
        detail = Entry({"totals": {"queries_total": queries}})
        return Look(at, pools=[Entry({"name": "main"})], details={"main": detail})

    board = Board("")
    board.take(look(10.0, 1000))
    assert isnan(board.rate("main", "queries_total"))
    board.take(look(12.0, 1500))
    assert board.rate("main", "queries_total") == 250.0
    assert isnan(board.rate("main", "errors_total"))
    board.take(look(13.0, 7))
    assert isnan(board.rate("main", "queries_total"))


def test_a_quiet_sidecar_fits_on_a_small_terminal(sidecar):
    board = Board(url(sidecar))
    ask(sidecar, board)
    lines = plain(board, 80, 24)
    assert len(lines) == 24
    assert lines[0] == f"pgsidecar top  {url(sidecar)}"
    assert "waiters: nobody waits" in lines
    assert "holders: no connection is in use" in lines
    assert lines[-1].startswith("q quit")


def test_lists_are_of_the_chosen_pool_and_order(sidecar):
    board = Board(url(sidecar))
    ask(sidecar, board)
    assert board.press("p")
    assert board.press("s")
    ask(sidecar, board)
    assert (board.pool, board.sort) == ("main", "calls")
    board.press("4")
    lines = plain(board, 80, 24)
    assert any(line.startswith("statements of main") for line in lines)
    assert lines[-1].startswith("q quit  p pool: main  s sort: calls")


FIELDS = sorted(
    {
        *("name", "pool", "kind", "headline", "evidence", "next_steps", "used", "idle", "max_size"),
        *("connecting", "waiting", "oldest_wait_seconds", "saturation", "is_up", "leaked", "who"),
        *("application", "statement", "text", "blocked_by", "held_seconds", "state", "latency"),
        *("p99_seconds", "totals", "queries_total", "errors_total", "seconds_total", "verdict"),
        *("calls_total", "mean_seconds", "began_at", "ended_at", "reason", "longest_query_seconds"),
    }
)
TEXTS = st.sampled_from(
    ["", "main", "\x1b[2J", "\x9b31m", "\u202ex", "漢字" * 20, "a\nb", "\ud800"]
)
NUMBERS = st.sampled_from([0, 1, -1, 10**400, 0.5, 1e308, float("nan"), float("inf"), -1e-9])
VALUES = st.none() | st.booleans() | TEXTS | NUMBERS
OBJECTS = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=15)
NESTED = st.dictionaries(
    st.sampled_from(FIELDS), VALUES | OBJECTS | st.lists(VALUES, max_size=2), max_size=15
)
PAGES = st.fixed_dictionaries({"items": st.lists(NESTED | VALUES, max_size=3), "total": VALUES})
KEYS = st.lists(st.sampled_from([*"012345ps?", "up", "down", "tab"]), max_size=4)


@st.composite
def looks(draw: st.DrawFn) -> Look:
    pools = draw(st.lists(NESTED.map(Entry), max_size=3))
    names = [pool.text("name") for pool in pools]
    return Look(
        draw(st.sampled_from([1.0, 2.0])),
        pools=pools,
        details={name: Entry(draw(NESTED)) for name in names},
        verdicts=[(name, Entry(draw(NESTED))) for name in names],
        lists={pane: Entry(draw(PAGES)) for pane in (Pane.WAITERS, Pane.HOLDERS)}
        | {pane: Entry(draw(PAGES)) for pane in (Pane.STATEMENTS, Pane.INCIDENTS)},
    )


@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 50), (20, 5)])
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(first=looks(), second=looks(), keys=KEYS, has_color=st.booleans())
def test_no_answer_breaks_the_frame(width, height, first, second, keys, has_color):
    """Whatever is in it: the lines fit, and nothing in them moves the cursor."""
    board = Board("http://127.0.0.1:9632")
    board.take(first)
    board.take(second)
    for key in keys:
        board.press(key)
    frame = render(board, width, height, has_color=has_color, is_utf8=True)
    if has_color:
        frame = re.sub(r"\x1b\[[0-9;]*m", "", frame)
    lines = frame.split("\n")
    assert len(lines) <= height + 1
    for line in lines:
        assert line.isprintable()
        assert cell_len(line) <= width


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["q"]),
        (b"P", ["p"]),
        (b"\x1b[A\x1b[B\x1bOC\x1b[D", ["up", "down", "right", "left"]),
        (b"\t\x1b[Z\x1b", ["tab", "backtab", "escape"]),
        (b"\x1b[1;5A", ["up"]),
        (b"\x1b[3~\xc3\xa4\x00", []),
        (b"", []),
    ],
)
def test_keys_are_told_apart(data, keys):
    assert read_keys(data) == keys


def test_keys_turn_and_scroll():
    board = Board("")
    items = [{"pool": "main", "reason": f"reason {n}"} for n in range(5)]
    board.take(Look(1.0, lists={Pane.WAITERS: Entry({"items": items, "total": 5})}))
    board.press("left")
    assert board.pane is Pane.INCIDENTS
    for key in ("tab", "tab", "tab", *["down"] * 9):
        board.press(key)
    assert (board.pane, board.skipped) == (Pane.WAITERS, 4)
    assert "reason 3" not in "\n".join(plain(board, 80, 24))
    board.press("?")
    assert "Any key ends this help." in plain(board, 80, 24)
    board.press("x")
    assert "reason 4" in "\n".join(plain(board, 80, 24))
    board.press("escape")
    assert (board.pane, board.skipped) == (Pane.ALL, 0)
    board.press("q")
    assert board.is_over


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (age(0.0123), "12 ms"),
        (age(119.0), "119.0 s"),
        (age(121.0), "2 min"),
        (age(7300.0), "2.0 h"),
        (age(9999 * 86400.0), "9999.0 d"),
        (age(float("inf")), "-"),
        (count(9999), "9999"),
        (count(45_123), "45.1k"),
        (count(3.2e6), "3.2M"),
        (count(float("nan")), "-"),
        (rate(0.0), "0"),
        (rate(0.34), "0.3"),
        (rate(9.96), "10"),
    ],
)
def test_figures_have_units_and_fit(shown, expected):
    assert shown == expected
    assert len(shown) <= 8


# -- the command -----------------------------------------------------------------------------------


class Terminal:
    """``pgsidecar top`` on a terminal of its own; the terminal outlives it."""

    def __init__(self, address: str, size: tuple[int, int] = (80, 24), **variables: str) -> None:
        self._main, self._terminal = pty.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(self._terminal)
        self.shown = b""
        self._is_there = True
        self.process = subprocess.Popen(
            [*COMMAND, address, "--interval", "0.2"],
            stdin=self._terminal,
            stdout=self._terminal,
            stderr=self._terminal,
            env=environment() | {"TERM": "xterm", **variables},
            start_new_session=True,
        )

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    @property
    def modes(self) -> list[object]:
        return termios.tcgetattr(self._terminal)

    def read(self) -> str:
        """All that was written so far."""
        os.set_blocking(self._main, False)
        try:
            while data := os.read(self._main, 65536):
                self.shown += data
        except BlockingIOError:
            pass
        return self.shown.decode()

    def frame(self) -> list[str]:
        """The last whole frame."""
        frames = self.read().split("\x1b[H")[1:-1]
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frames[-1]) if frames else ""
        return text.split("\r\n")

    def until(self, word: str) -> list[str]:
        """The first frame with this word."""

        def look() -> list[str] | None:
            assert self.process.poll() is None, self.read()
            frame = self.frame()
            return frame if any(word in line for line in frame) else None

        return eventually(look, f"{word!r} is shown")

    def ended(self) -> int:
        """Its exit code; the terminal is as it was."""
        code = eventually(lambda: self._code(), "top ends")
        text = self.read()
        assert self.modes == self.before
        assert text.count("\x1b[?1049h") == text.count("\x1b[?1049l")
        assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
        return code[0]

    def _code(self) -> tuple[int] | None:
        self.read()  # else it may wait for room
        code = self.process.poll()
        return None if code is None else (code,)

    def hang_up(self) -> None:
        for descriptor in (self._main, self._terminal):
            os.close(descriptor)
        self._is_there = False

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self._is_there:
            self.hang_up()


@pytest.fixture
def terminal(sidecar) -> Iterator[Terminal]:
    it = Terminal(url(sidecar))
    yield it
    it.close()


def test_keys_work_on_a_terminal_and_it_is_given_back(sidecar, terminal):
    frame = terminal.until("nobody waits")
    assert len(frame) == 24
    assert terminal.modes != terminal.before
    terminal.press("?")
    terminal.until("Any key ends this help.")
    terminal.press("x")
    terminal.press("4")
    terminal.until("statements")
    terminal.press("s")
    terminal.until("s sort: calls")
    terminal.press("p")
    terminal.until("p pool: main")
    terminal.resize(160, 40)
    terminal.process.send_signal(signal.SIGWINCH)
    frame = terminal.until("in flight")  # a column of wide terminals
    assert len(frame) == 40
    terminal.press("q")
    assert terminal.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_and_the_terminal_is_given_back(terminal, number):
    terminal.until("main")
    terminal.process.send_signal(number)
    assert terminal.ended() == 0


def test_a_terminal_that_goes_ends_it(sidecar):
    """As when its window is closed, and nobody sends a signal."""
    terminal = Terminal(url(sidecar))
    try:
        terminal.until("main")
        terminal.hang_up()
        assert terminal.process.wait(PATIENCE) == 0
    finally:
        terminal.close()


def test_a_failure_gives_the_terminal_back():
    main, side = pty.openpty()
    before = termios.tcgetattr(side)

    def fail(screen: Screen) -> None:
        with screen:
            assert screen.keys == side
            assert termios.tcgetattr(side) != before
            raise ZeroDivisionError

    with open(side, "w", closefd=False) as out, open(side, closefd=False) as keyboard:
        screen = Screen(out, keyboard, environ={"TERM": "xterm"})
        with pytest.raises(ZeroDivisionError):
            fail(screen)
    assert termios.tcgetattr(side) == before
    said = b""
    while not said.endswith(b"\x1b[?25h\x1b[?1049l"):  # the kernel hands it on in its own time
        readable, _, _ = select.select([main], [], [], PATIENCE)
        assert readable, said
        said += os.read(main, 1000)
    os.close(main)
    os.close(side)


def test_no_color_is_honoured(sidecar):
    terminal = Terminal(url(sidecar), NO_COLOR="1")
    try:
        terminal.until("main")
        terminal.press("q")
        assert terminal.ended() == 0
        assert not re.search(r"\x1b\[[0-9;]*m", terminal.read())
    finally:
        terminal.close()


def test_what_was_known_stays_when_the_sidecar_goes(postgres, tmp_path):
    """And goes on when there is one again."""
    sidecar = SidecarProcess.start(configuration(postgres.dsn()), tmp_path)
    address = f"http://127.0.0.1:{sidecar.http_port}"
    terminal = Terminal(address)
    try:
        terminal.until("up")
        sidecar.terminate()
        assert sidecar.wait() == 0
        frame = terminal.until("no answer since")
        assert any(line.startswith("main ") for line in frame)
        again = SidecarProcess.start(
            configuration(postgres.dsn(), http={"port": sidecar.http_port}), tmp_path
        )
        try:
            eventually(lambda: "no answer" not in "".join(terminal.frame()), "it answers again")
            terminal.press("q")
            assert terminal.ended() == 0
        finally:
            again.close()
    finally:
        terminal.close()
        sidecar.close()


@pytest.mark.parametrize("columns", ["80", "160"])
def test_once_prints_one_plain_frame(sidecar, columns):
    """For pipes and tickets."""
    done = subprocess.run(
        [*COMMAND, url(sidecar), "--once", "--interval", "0.1"],
        capture_output=True,
        text=True,
        env=environment() | {"COLUMNS": columns, "TERM": "xterm"},
        timeout=PATIENCE,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert lines[0] == f"pgsidecar top  {url(sidecar)}"
    assert sum(line.startswith("pgsidecar top") for line in lines) == 1
    assert ("in flight" in lines[1]) == (columns == "160")
    assert all(len(line) <= int(columns) for line in lines)


def test_nobody_to_ask_ends_with_2():
    done = subprocess.run(
        [*COMMAND, "http://127.0.0.1:1"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pgsidecar: nobody listens on http://127.0.0.1:1 ")
    assert done.stdout == ""


def test_a_reader_that_goes_is_no_failure(sidecar):
    """``pgsidecar top | head -1``"""
    process = subprocess.Popen(
        [*COMMAND, url(sidecar), "--interval", "0.1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.readline().startswith("pgsidecar top")
        process.stdout.close()
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_what_cannot_be_written_is_replaced():
    """A terminal of another encoding than the application's name."""
    board = Board("http://127.0.0.1:9632")
    board.take(Look(1.0, pools=[Entry({"name": "main", "max_size": 4, "used": 1})]))
    frame = render(board, 80, None, has_color=False, is_utf8=False)
    assert frame.isascii()
    assert "##......" in frame
