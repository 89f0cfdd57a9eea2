"""``pgsidecar top``: asks a sidecar every second, and shows what it answers.

Loop: asks each ``interval``, and at once when a key needs other answers. Keys and a changed size of the
terminal are callbacks, which redraw at once what is known. Exit codes: 0 it was told to stop, 2 the sidecar could not be
asked to begin with.
"""

import asyncio
import signal
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from sidecar.ask import why
from sidecar.ask.answers import Entry
from sidecar.ask.asker import Asker, CannotAsk
from sidecar.ask.board import Board, Look, Pane
from sidecar.ask.frame import render
from sidecar.ask.keys import read_keys
from sidecar.ask.screen import Screen

DEADLINE: Final = 3.0
"""Seconds for all answers of one look."""
POOLS: Final = 20
"""Pools whose details are asked for: more do not fit on a screen."""

_PATHS: Final = {
    Pane.WAITERS: "/api/v1/waits",
    Pane.HOLDERS: "/api/v1/holders",
    Pane.STATEMENTS: "/api/v1/statements",
    Pane.INCIDENTS: "/api/v1/incidents",
}


@dataclass(frozen=True, slots=True)
class TopOptions:
    interval: float = 1.0
    is_once: bool = False


async def run_top(asker: Asker, options: TopOptions, screen: Screen) -> int:
    """Returns the exit code; raises CannotAsk if the first look fails."""
    board = Board(asker.url)
    loop = asyncio.get_running_loop()
    board.take(await look_at(asker, board, loop.time()))
    if options.is_once:  # rates are differences: one more look
        await asyncio.sleep(options.interval)
        board.take(await look_at(asker, board, loop.time()))
        _draw(board, screen)
        return 0
    await _Top(asker, options, screen, board).run()
    return 0


async def look_at(asker: Asker, board: Board, now: float) -> Look:
    """All that the board shows. Raises CannotAsk."""
    deadline = now + DEADLINE
    mine: dict[str, str | int] = {"pool": board.pool} if board.pool else {}
    found: dict[str, Entry] = {}

    async def ask(key: str, path: str, **parameters: str | int) -> None:
        found[key] = await asker.get(path, deadline, **parameters)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(ask("pools", "/api/v1/pools", limit=POOLS))
            group.create_task(ask("why", "/api/v1/why", limit=POOLS))
            for pane, path in _PATHS.items():
                sort = {"sort": board.sort} if pane is Pane.STATEMENTS else {}
                group.create_task(ask(pane.name, path, limit=board.rows(pane), **mine, **sort))
        pools = found["pools"].entries("items")
        names = [pool.text("name") for pool in pools][:POOLS]
        async with asyncio.TaskGroup() as group:
            details = {name: group.create_task(_detail(asker, name, deadline)) for name in names}
    except ExceptionGroup as failed:
        raise _first(failed) from None
    return Look(
        at=asyncio.get_running_loop().time(),
        pools=pools[:POOLS],
        details={name: task.result() for name, task in details.items()},
        verdicts=why.verdicts(found["why"]),
        lists={pane: found[pane.name] for pane in _PATHS},
    )


async def _detail(asker: Asker, name: str, deadline: float) -> Entry:
    try:
        return await asker.get(f"/api/v1/pools/{quote(name, safe='')}", deadline)
    except CannotAsk as exc:
        if exc.status == 404:  # a reload has taken it away in between
            return Entry()
        raise


def _first(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    """The cause rather than the group it came in."""
    first = failed.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


class _Top:
    def __init__(self, asker: Asker, options: TopOptions, screen: Screen, board: Board) -> None:
        self._asker: Final = asker
        self._options: Final = options
        self._screen: Final = screen
        self._board: Final = board
        self._loop: Final = asyncio.get_running_loop()
        self._stopping: Final = asyncio.Event()
        self._wanted: Final = asyncio.Event()  # other answers than there are

    async def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._loop.add_signal_handler(number, self._stopping.set)
        with self._screen:
            keys = self._screen.keys
            if keys is not None:
                self._loop.add_reader(keys, self._typed)
            try:
                self._draw()
                self._loop.add_signal_handler(signal.SIGWINCH, self._draw)
                async with asyncio.TaskGroup() as group:
                    asking = group.create_task(self._ask())
                    await self._stopping.wait()
                    asking.cancel()
            finally:
                if keys is not None:
                    self._loop.remove_reader(keys)

    async def _ask(self) -> None:
        due = self._loop.time()
        while True:
            due = max(due + self._options.interval, self._loop.time())
            await self._pause(due)
            board = self._board
            asked = (board.pool, board.sort)
            try:
                look = await look_at(self._asker, board, self._loop.time())
                if asked == (board.pool, board.sort):  # else it is not what is wanted by now
                    board.take(look)
            except CannotAsk as exc:
                if exc.status == 404 and board.pool:  # a reload has taken the pool away
                    board.pool = ""
                board.miss(exc.message, self._loop.time())
            self._draw()

    async def _pause(self, until: float) -> None:
        """Until then, or until other answers are needed."""
        try:
            async with asyncio.timeout_at(until):
                await self._wanted.wait()
        except TimeoutError:
            pass
        self._wanted.clear()

    def _typed(self) -> None:
        data = self._screen.read()
        if data is None:  # nobody is there any more
            assert self._screen.keys is not None
            self._loop.remove_reader(self._screen.keys)
            self._stopping.set()
            return
        for key in read_keys(data):
            if self._board.press(key):
                self._wanted.set()
        if self._board.is_over:
            self._stopping.set()
        else:
            self._draw()

    def _draw(self) -> None:
        try:
            _draw(self._board, self._screen)
        except OSError:  # nobody reads it any more
            self._stopping.set()


def _draw(board: Board, screen: Screen) -> None:
    width, height = screen.size()
    screen.show(render(board, width, height, has_color=screen.has_color, is_utf8=screen.is_utf8))
