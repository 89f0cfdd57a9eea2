"""What each path of the API answers: from checked parameters to the bytes of a JSON object.

Reads what there is at the moment of the request and keeps nothing. What may be long is gathered, and
put into words, in slices: between two the event loop is free.
"""

import asyncio
import json
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from time import perf_counter
from typing import Final, NamedTuple, Protocol, TypeVar
from urllib.parse import urlencode

from sidecar.api import shapes
from sidecar.api.contract import contract
from sidecar.api.parameters import PAGE, Parameters
from sidecar.api.problems import not_found
from sidecar.api.shapes import Json, Moment
from sidecar.config import Config, redacted
from sidecar.events import ClientSnapshot, ServerSnapshot
from sidecar.facts import PoolFacts
from sidecar.observe.capture import iso
from sidecar.observe.recorder import PoolRecorder, Recorder
from sidecar.observe.sketch import QUANTILES, SLOT, WINDOWS
from sidecar.observe.statements import SORTS
from sidecar.work import Blocker, Holder, Statement

T = TypeVar("T")

SLICE: Final = 0.0005
"""Seconds that the event loop may be held at a time; a slice ends with the item that passes it."""

_WINDOW: Final = "5m"
_WINDOW_SECONDS: Final = WINDOWS[_WINDOW] * SLOT


class View(Protocol):
    """The sidecar, as the API sees it."""

    @property
    def config(self) -> Config: ...

    def pools(self) -> list[PoolFacts]:
        """One for each entry of the configuration."""

    def clients(self) -> Iterator[ClientSnapshot]:
        """Oldest first. The caller may pause between two; so for ``servers``."""

    def servers(self) -> Iterator[ServerSnapshot]: ...

    def holders(self) -> Iterator[Holder]:
        """All leases, pool by pool; the same."""


class Endpoint(NamedTuple):
    """One path, and the parameters that its query may have."""

    path: str
    parameters: tuple[str, ...]
    answer: Callable[[Parameters, Mapping[str, str]], Awaitable[bytes]]


class Answers:
    def __init__(self, view: View, recorder: Recorder) -> None:
        self._view: Final = view
        self._recorder: Final = recorder

    def endpoints(self) -> list[Endpoint]:
        """All paths but that of the events."""
        paged = ("pool", *PAGE)
        by_client = ("pool", "application", *PAGE)
        return [
            Endpoint("/api/v1/pools", PAGE, self._pools),
            Endpoint("/api/v1/pools/{pool}", (), self._pool),
            Endpoint("/api/v1/clients", ("state", *by_client), self._clients),
            Endpoint("/api/v1/servers", paged, self._servers),
            Endpoint("/api/v1/waits", by_client, self._waits),
            Endpoint("/api/v1/holders", by_client, self._holders),
            Endpoint("/api/v1/pins", paged, self._pins),
            Endpoint("/api/v1/leaks", paged, self._leaks),
            Endpoint("/api/v1/statements", ("sort", *paged), self._statements),
            Endpoint("/api/v1/statements/{fingerprint}", ("pool",), self._statement),
            Endpoint("/api/v1/errors", paged, self._errors),
            Endpoint("/api/v1/blame", ("by", *paged), self._blame),
            Endpoint("/api/v1/slow", paged, self._slow),
            Endpoint("/api/v1/incidents", paged, self._incidents),
            Endpoint("/api/v1/incidents/{id}", (), self._incident),
            Endpoint("/api/v1/why", paged, self._why),
            Endpoint("/api/v1/config", (), self._config),
            Endpoint("/api/v1/openapi.json", (), self._contract),
        ]

    def moment(self) -> Moment:
        now = self._recorder.clock()
        return Moment(now, _texts(time.time() - now))

    def known_pool(self, parameters: Parameters) -> str | None:
        """The pool that is asked for, if one is; there is such a pool."""
        name = parameters.text("pool")
        if name is not None and name not in self._recorder.pools:
            raise not_found("pool", "pool", name, self._names())
        return name

    def pool_items(self, moment: Moment) -> Iterator[Json]:
        """The pools as a list has them, each made when it is asked for: 1 ms, most of it the verdict."""
        return (self._pool_item(facts, moment) for facts in self._view.pools())

    # -- pools -----------------------------------------------------------------------------------

    async def _pools(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        moment = self.moment()
        return await _page(
            "/api/v1/pools",
            parameters,
            moment,
            self._view.pools(),
            lambda facts: self._pool_item(facts, moment),
        )

    async def _pool(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        moment = self.moment()
        for facts in self._view.pools():
            if facts.snapshot.name == path["pool"]:
                return _encode(self._pool_item(facts, moment) | self._detail(facts, moment))
        raise not_found("pool", "pool", path["pool"], self._names())

    def _pool_item(self, facts: PoolFacts, moment: Moment) -> Json:
        recorder = self._recorder.pool(facts.snapshot.name)
        ping = facts.snapshot.last_ping
        return shapes.pool(
            facts,
            len(recorder.leaks),
            recorder.verdict(moment.now).kind.value,
            moment,
            iso(ping) if ping else None,
        )

    def _detail(self, facts: PoolFacts, moment: Moment) -> Json:
        recorder = self._recorder.pool(facts.snapshot.name)
        quantiles = recorder.latency.quantiles(_WINDOW, moment.now, QUANTILES)
        return shapes.pool_detail(
            facts,
            recorder.leaks_began,
            sum(recorder.errors.values()),
            shapes.latency(_WINDOW_SECONDS, quantiles),
            moment.text(moment.now),
        )

    def _names(self) -> str:
        return f"one of {', '.join(list(self._recorder.pools)[:20])}"

    # -- who is there ------------------------------------------------------------------------------

    async def _clients(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        only = self.known_pool(parameters)
        state = parameters.one_of("state", ("idle", "waiting", "active"), "")
        application = parameters.text("application")
        found = [
            client
            async for client in in_slices(self._view.clients())
            if only in (None, client.pool)
            and state in ("", shapes.client_state(client))
            and application in (None, client.application)
        ]
        moment = self.moment()
        return await _page(
            "/api/v1/clients",
            parameters,
            moment,
            found,
            lambda client: shapes.client(client, moment),
        )

    async def _servers(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        only = self.known_pool(parameters)
        leases = {holder.server: holder for holder in await self._leases(only)}
        found = [
            server
            async for server in in_slices(self._view.servers())
            if only in (None, server.pool)
        ]
        moment = self.moment()
        return await _page(
            "/api/v1/servers",
            parameters,
            moment,
            found,
            lambda server: shapes.server(server, leases.get(server.id), moment),
        )

    async def _waits(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        only = self.known_pool(parameters)
        application = parameters.text("application")
        waiting: dict[str, list[ClientSnapshot]] = {}
        async for client in in_slices(self._view.clients()):
            if client.waiting_since and only in (None, client.pool):
                waiting.setdefault(client.pool, []).append(client)
        leases = await self._leases(only)
        moment = self.moment()
        found: list[_Wait] = []
        for facts in self._view.pools():
            name = facts.snapshot.name
            queue = sorted(waiting.get(name, ()), key=lambda each: each.waiting_since)
            if queue:
                mine = [holder for holder in leases if holder.pool == name]
                first = [shapes.behind(holder, moment) for holder in mine[: shapes.NAMED]]
                async for ahead, client in in_slices(enumerate(queue)):
                    if application in (None, client.application):
                        found.append(_Wait(client, ahead, facts, first, len(mine)))
        return await _page(
            "/api/v1/waits", parameters, moment, found, lambda each: shapes.wait(*each, moment)
        )

    async def _holders(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        application = parameters.text("application")
        found = [
            holder
            for holder in await self._leases(self.known_pool(parameters))
            if application in (None, holder.who.application)
        ]
        moment = self.moment()
        return await _page(
            "/api/v1/holders",
            parameters,
            moment,
            found,
            lambda holder: self._holder(holder, moment),
        )

    async def _pins(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        leases = await self._leases(self.known_pool(parameters))
        found = sorted((each for each in leases if each.pin), key=shapes.pinned_at)
        moment = self.moment()
        return await _page(
            "/api/v1/pins", parameters, moment, found, lambda each: shapes.pin(each, moment)
        )

    async def _leaks(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        """As they are now; the recorder has them as they began."""
        leases = await self._leases(self.known_pool(parameters))
        found = [holder for holder in leases if self._is_leak(holder)]
        pools = self._view.config.pools
        moment = self.moment()

        def leak(holder: Holder) -> Json:
            threshold = pools[holder.pool].leak_threshold
            return self._holder(holder, moment) | {"threshold_seconds": threshold}

        return await _page("/api/v1/leaks", parameters, moment, found, leak)

    async def _leases(self, only: str | None) -> list[Holder]:
        """Oldest first; pins of session mode included."""
        pools = self._view.config.pools
        found = [
            shapes.with_pin(holder, pools[holder.pool].mode)
            async for holder in in_slices(self._view.holders())
            if only in (None, holder.pool) and holder.pool in pools
        ]
        return sorted(found, key=lambda holder: holder.leased_at)

    def _holder(self, holder: Holder, moment: Moment) -> Json:
        root: Blocker | None = None
        if holder.pool in self._recorder.pools:
            root = self._recorder.pool(holder.pool).blocked.get(holder.server)
        return shapes.holder(holder, moment, is_leak=self._is_leak(holder), root=root)

    def _is_leak(self, holder: Holder) -> bool:
        recorder = self._recorder.pools.get(holder.pool)
        leak = None if recorder is None else recorder.leaks.get(holder.server)
        return leak is not None and leak.leased_at == holder.leased_at

    # -- what explains -----------------------------------------------------------------------------

    async def _statements(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        sort = parameters.one_of("sort", SORTS, "seconds")
        found: list[tuple[PoolRecorder, Statement]] = []
        for recorder in self._recorders(parameters):
            table = recorder.statements
            found += ((recorder, each) for each in table.ranked(sort, table.limit))
            await asyncio.sleep(0)
        moment = self.moment()
        return await _page(
            "/api/v1/statements",
            parameters,
            moment,
            found,
            lambda each: self._statement_item(*each, moment),
        )

    async def _statement(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        fingerprint = path["fingerprint"]
        found = [
            (recorder, statement)
            for recorder in self._recorders(parameters)
            if (statement := recorder.statements.get(fingerprint)) is not None
        ]
        if not found:
            raise not_found("statement", "fingerprint", fingerprint)
        moment = self.moment()
        items = [self._statement_item(*each, moment) async for each in in_slices(found)]
        first = items[0]
        told = {
            "at": moment.text(moment.now),
            "fingerprint": fingerprint,
            "operation": first["operation"],
            "text": found[0][1].text,
            "pools": items,
        }
        return _encode(told)

    def _statement_item(self, recorder: PoolRecorder, each: Statement, moment: Moment) -> Json:
        quantiles = recorder.statements.quantiles(each, moment.now)
        return shapes.statement(recorder.name, each, shapes.latency(_WINDOW_SECONDS, quantiles))

    async def _errors(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        found = [
            (recorder.name, entry)
            for recorder in self._recorders(parameters)
            for entry in recorder.failures.entries()
        ]
        found.sort(key=lambda each: -each[1].last_at)
        moment = self.moment()
        return await _page(
            "/api/v1/errors",
            parameters,
            moment,
            found,
            lambda each: shapes.failure(*each, moment),
        )

    async def _blame(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        by = parameters.one_of("by", ("application", "statement"), "application")
        found: list[tuple[float, Json]] = []
        pools: list[Json] = []
        for recorder in self._recorders(parameters):
            blame = recorder.blame
            pools.append(shapes.waiting(recorder.name, blame.waited, blame.charged))
            accounts: list[tuple[str | None, Statement | None, float]]
            if by == "application":
                accounts = [(name, None, length) for name, length in blame.by_application().items()]
            else:
                table = recorder.statements
                statements = table.ranked("blamed", table.limit)
                accounts = [(None, each, each.blamed) for each in statements]
            found += (
                (length, shapes.account(recorder.name, name, statement, length, blame.waited))
                for name, statement, length in accounts
                if length > 0.0
            )
            await asyncio.sleep(0)
        found.sort(key=lambda each: -each[0])
        return await _page(
            "/api/v1/blame",
            parameters,
            self.moment(),
            found,
            lambda each: each[1],
            {"pools": pools},
        )

    async def _slow(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        found = [each for recorder in self._recorders(parameters) for each in recorder.slow_queries]
        found.sort(key=lambda each: -each[0])
        moment = self.moment()
        return await _page(
            "/api/v1/slow",
            parameters,
            moment,
            found,
            lambda each: shapes.slow_query(*each, moment),
        )

    async def _incidents(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        only = self.known_pool(parameters)
        found = [each for each in self._recorder.incidents.all() if only in (None, each.pool)]
        return await _page(
            "/api/v1/incidents",
            parameters,
            self.moment(),
            found,
            lambda incident: incident.summary(),
        )

    async def _incident(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        incident = self._recorder.incidents.get(path["id"])
        if incident is None:
            raise not_found("incident", "id", path["id"])
        return await asyncio.to_thread(_encode, incident.to_json())

    async def _why(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        moment = self.moment()
        return await _page(
            "/api/v1/why",
            parameters,
            moment,
            self._recorders(parameters),
            lambda pool: {"pool": pool.name, "verdict": pool.verdict(moment.now).to_json()},
        )

    def _recorders(self, parameters: Parameters) -> list[PoolRecorder]:
        only = self.known_pool(parameters)
        return [pool for name, pool in self._recorder.pools.items() if only in (None, name)]

    # -- the sidecar -------------------------------------------------------------------------------

    async def _config(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        config = self._view.config
        return await asyncio.to_thread(lambda: _encode(redacted(config)))

    async def _contract(self, parameters: Parameters, path: Mapping[str, str]) -> bytes:
        return await asyncio.to_thread(contract)


class _Wait(NamedTuple):
    """What a wait is told from."""

    client: ClientSnapshot
    ahead: int
    pool: PoolFacts
    leases: list[Json]
    total: int


async def in_slices(items: Iterable[T]) -> AsyncIterator[T]:
    """One after the other; whoever else wants to run does so now and then."""
    began = perf_counter()
    for item in items:
        yield item
        if perf_counter() - began > SLICE:
            await asyncio.sleep(0)
            began = perf_counter()


async def _page(
    path: str,
    parameters: Parameters,
    moment: Moment,
    found: Sequence[T],
    shape: Callable[[T], Json],
    more: Json | None = None,
) -> bytes:
    """The items that were asked for, each put into words on its own: json holds the loop as long as it
    runs."""
    limit, offset = parameters.limit, parameters.offset
    parts = [_encode(shape(each)) async for each in in_slices(found[offset : offset + limit])]
    following = parameters.next_page(len(found))
    frame: Json = {
        "at": moment.text(moment.now),
        "total": len(found),
        "limit": limit,
        "offset": offset,
        "next": following and f"{path}?{urlencode(following, errors='replace')}",
        **(more or {}),
    }
    return b'{"items": [' + b", ".join(parts) + b"], " + _encode(frame)[1:]


def _encode(told: object) -> bytes:
    # names come from clients: half of a surrogate pair is not to break the answer
    return json.dumps(told, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _texts(offset: float) -> Callable[[float], str]:
    return lambda instant: iso(instant + offset)
