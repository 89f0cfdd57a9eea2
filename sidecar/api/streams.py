"""Events to those who listen to ``/api/v1/events``: what has happened since the last look, ten times a second.

Runs no task: the service calls ``tick`` every 100 ms, and each listener's request takes what is in its
queue. Where nobody listens nothing is looked at. Who does not keep up is sent away.
"""

import asyncio
import json
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from typing import Final

from sidecar.api import shapes
from sidecar.api.answers import Answers
from sidecar.api.shapes import Json, Moment
from sidecar.observe.recorder import PoolRecorder, Recorder
from sidecar.work import Holder, SlowQuery

MOST: Final = 10
"""Listeners at a time."""
QUEUED: Final = 64
"""Events that one may have waiting; with one a second, a minute's."""
PERIOD: Final = 1.0
"""Seconds between two ``gauges``."""
_TICKS: Final = 5
"""In which they are made."""
HEARTBEAT: Final = 10.0
"""Seconds without an event, after which there is a comment, so that a dead connection is noticed."""

_COMMENT: Final = b": still here\n\n"
GREETING: Final = b"retry: 3000\n\n"


class Listener:
    """One who listens, to one pool or to all."""

    def __init__(self, pool: str | None, is_gone: Callable[[], bool]) -> None:
        self.pool: Final = pool
        self.is_gone: Final = is_gone
        self.is_over = False  # nothing more comes; too slow, or the sidecar stops
        self._queue: deque[bytes] = deque()
        self._has_news = asyncio.Event()

    def put(self, event: bytes) -> None:
        if len(self._queue) >= QUEUED:
            self.end()
        else:
            self._queue.append(event)
            self._has_news.set()

    def end(self) -> None:
        self.is_over = True
        self._queue.clear()
        self._has_news.set()

    async def next(self) -> bytes:
        """What is to be sent now; empty when it is over."""
        if not self._queue and not self.is_over:
            self._has_news.clear()
            try:
                async with asyncio.timeout(HEARTBEAT):
                    await self._has_news.wait()
            except TimeoutError:
                return _COMMENT
        found = b"".join(self._queue)
        self._queue.clear()
        return found


class Streams:
    def __init__(self, answers: Answers, recorder: Recorder) -> None:
        self._answers: Final = answers
        self._recorder: Final = recorder
        self._listeners: set[Listener] = set()
        self.is_closed = False
        self._due = 0.0  # the next gauges
        self._items: Iterator[Json] | None = None  # of them, while they are made
        self._made: list[Json] = []
        self._slow: dict[str, SlowQuery] = {}  # the last one that was told, by pool
        self._leaks: dict[tuple[str, int], Holder] = {}
        self._incidents: dict[str, Json] = {}  # as they were told

    def __len__(self) -> int:
        return len(self._listeners)

    def join(self, pool: str | None, is_gone: Callable[[], bool]) -> Listener | None:
        """None where there are as many as may be, or the sidecar stops. ``is_gone``: whether the
        connection is over."""
        if self.is_closed or len(self._listeners) >= MOST:
            return None
        if not self._listeners:
            self._begin()
        listener = Listener(pool, is_gone)
        self._listeners.add(listener)
        return listener

    def leave(self, listener: Listener) -> None:
        self._listeners.discard(listener)

    def close(self) -> None:
        """End all, and take no more."""
        self.is_closed = True
        for listener in self._listeners:
            listener.end()

    def tick(self) -> None:
        for listener in self._listeners:
            if listener.is_gone():
                listener.end()
        if not self._listeners:
            return
        moment = self._answers.moment()
        for pool, name, told in self._news(moment):
            self._tell(pool, _event(name, told))
        self._tell_gauges(moment)

    def _begin(self) -> None:
        """What there is already is no news."""
        self._due = 0.0
        self._items = None
        self._slow = {
            name: pool.slow_queries[-1][1]
            for name, pool in self._recorder.pools.items()
            if pool.slow_queries
        }
        self._leaks = dict(self._current_leaks())
        self._incidents = {each.id: each.summary() for each in self._recorder.incidents.all()}

    def _tell(self, pool: str, event: bytes) -> None:
        for listener in self._listeners:
            if listener.pool in (None, pool):
                listener.put(event)

    def _tell_gauges(self, moment: Moment) -> None:
        """Once a second; of many pools a few with each tick, so that it takes no longer."""
        if self._items is None:
            if moment.now < self._due:
                return
            self._due = moment.now + PERIOD
            self._items = self._answers.pool_items(moment)
            self._made = []
        few = max(1, len(self._recorder.pools) // _TICKS)
        made = list(islice(self._items, few))
        self._made += made
        if len(self._made) < len(self._recorder.pools) and made:
            return
        self._items = None
        at = moment.text(moment.now)
        for only in {listener.pool for listener in self._listeners}:
            mine = [item for item in self._made if only in (None, item["name"])]
            event = _event("gauges", {"at": at, "items": mine})
            for listener in self._listeners:
                if listener.pool == only:
                    listener.put(event)

    # -- what has happened -------------------------------------------------------------------------

    def _news(self, moment: Moment) -> Iterator[tuple[str, str, Json]]:
        """The pool, the kind of event, and what is told."""
        yield from self._new_incidents()
        for pool in self._recorder.pools.values():
            for seen_at, slow in self._new_slow_queries(pool):
                yield pool.name, "slow_query", shapes.slow_query(seen_at, slow, moment)
        yield from self._changed_leaks(moment)

    def _new_slow_queries(self, pool: PoolRecorder) -> Iterator[tuple[float, SlowQuery]]:
        """Oldest first. Told apart as objects: they come when the server has answered, in any order."""
        known = self._slow.get(pool.name)
        fresh = list(takewhile(lambda each: each[1] is not known, reversed(pool.slow_queries)))
        if fresh:
            self._slow[pool.name] = fresh[0][1]
        yield from reversed(fresh)

    def _new_incidents(self) -> Iterator[tuple[str, str, Json]]:
        found = self._recorder.incidents.all()
        told = {each.id: each.summary() for each in found}
        for each in reversed(found):  # oldest first
            if self._incidents.get(each.id) != told[each.id]:
                yield each.pool, "incident", told[each.id]
        self._incidents = told

    def _changed_leaks(self, moment: Moment) -> Iterator[tuple[str, str, Json]]:
        before, self._leaks = self._leaks, dict(self._current_leaks())
        for key in before.keys() - self._leaks.keys():
            yield key[0], "leak_ended", shapes.holder(before[key], moment, is_leak=False, root=None)
        for key in self._leaks.keys() - before.keys():
            leak = self._leaks[key]
            root = self._recorder.pool(key[0]).blocked.get(leak.server)
            yield key[0], "leak_began", shapes.holder(leak, moment, is_leak=True, root=root)

    def _current_leaks(self) -> Iterator[tuple[tuple[str, int], Holder]]:
        pools: list[PoolRecorder] = list(self._recorder.pools.values())
        for pool in pools:
            for server, holder in pool.leaks.items():
                yield (pool.name, server), holder


def _event(name: str, told: Json) -> bytes:
    data = json.dumps(told, ensure_ascii=False).encode("utf-8", "replace")
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
