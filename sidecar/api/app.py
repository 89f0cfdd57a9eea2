"""The routes of the HTTP service, and the report of each request to the observer.

Nothing here waits for PostgreSQL, so metrics and health answer while it is down. Where it listens
and how many may connect is ``server``'s business, what is below ``/api`` that of ``v1``.
"""

import asyncio
import gzip
import logging
import time
from collections.abc import Awaitable, Callable

from aiohttp import hdrs, web

from sidecar.api.negotiate import accepts_gzip, choose_format
from sidecar.api.page import index_page
from sidecar.api.v1 import ApiV1
from sidecar.observe.exposition import Format
from sidecar.observe.metrics import MetricsText
from sidecar.observe.recorder import Recorder

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SEND_TIMEOUT = 10.0
"""Seconds a client may take to read its answer, before its connection is cut."""

SLICE = 0.0003
"""Seconds of writing the metrics after which others have their turn. A page with many statements takes
2 ms, most of it since what it reads is in no cache."""

OTHER = "other"
"""The route of an unknown path, and the method of anything but GET and HEAD."""

log = logging.getLogger(__name__)


def build_app(
    metrics: MetricsText, readiness: Callable[[], list[str]], recorder: Recorder, v1: ApiV1
) -> web.Application:
    """The application; ``readiness`` gives the reasons not to send traffic here, none if ready."""
    api = _Api(metrics, readiness, recorder, v1)
    app = web.Application(middlewares=[api.report])
    app.router.add_get("/", api.index)
    app.router.add_get("/metrics", api.metrics)
    app.router.add_get("/livez", api.livez)
    app.router.add_get("/readyz", api.readyz)
    v1.add_to(app, recorder)
    for resource in app.router.resources():
        recorder.expect_http(resource.canonical, hdrs.METH_GET, 200)
    recorder.expect_http("/readyz", hdrs.METH_GET, 503)
    recorder.expect_http(OTHER, hdrs.METH_GET, 404)
    recorder.expect_http(OTHER, hdrs.METH_GET, v1.refused)
    recorder.expect_http(OTHER, OTHER, 405)
    return app


class _Api:
    def __init__(
        self,
        metrics: MetricsText,
        readiness: Callable[[], list[str]],
        recorder: Recorder,
        v1: ApiV1,
    ) -> None:
        self._metrics = metrics
        self._readiness = readiness
        self._recorder = recorder
        self._v1 = v1

    async def index(self, request: web.Request) -> web.Response:
        return web.Response(
            text=index_page(self._metrics.pools(), self._verdict),
            content_type="text/html",
            headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"},
        )

    def _verdict(self, pool: str) -> str:
        recorder = self._recorder
        found = recorder.pools.get(pool)
        return "" if found is None else found.verdict(recorder.clock()).kind.value

    async def metrics(self, request: web.Request) -> web.Response:
        format = choose_format(_header(request, hdrs.ACCEPT))
        compress = accepts_gzip(_header(request, hdrs.ACCEPT_ENCODING))
        text = await self._own_text(format)
        body = await asyncio.to_thread(self._finish, text, format, compress)
        headers = {
            hdrs.CONTENT_TYPE: format.value,
            hdrs.VARY: f"{hdrs.ACCEPT}, {hdrs.ACCEPT_ENCODING}",
        }
        if compress:
            headers[hdrs.CONTENT_ENCODING] = "gzip"
        return web.Response(body=body, headers=headers)

    async def _own_text(self, format: Format) -> str:
        """In slices: a query that comes meanwhile waits for one of them, not for the whole page."""
        parts = []
        began = time.perf_counter()
        for part in self._metrics.own_parts(format):
            parts.append(part)
            if time.perf_counter() - began >= SLICE:
                await asyncio.sleep(0)
                began = time.perf_counter()
        return "".join(parts)

    async def livez(self, request: web.Request) -> web.Response:
        """This process runs its event loop. Restarting it would not help a PostgreSQL that is down."""
        return web.Response(text="ok\n")

    async def readyz(self, request: web.Request) -> web.Response:
        reasons = self._readiness()
        if not reasons:
            return web.Response(text="ok\n")
        return web.Response(text="".join(f"{reason}\n" for reason in reasons), status=503)

    def _finish(self, text: str, format: Format, compress: bool) -> bytes:
        """What may take milliseconds, and needs no state of the event loop; runs in a thread."""
        body = (text + self._metrics.process_text(format)).encode()
        return gzip.compress(body, mtime=0) if compress else body

    @web.middleware
    async def report(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer, send the answer here to have a deadline for it, and tell the observer."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        if self._v1.is_meant(request):
            response = await self._v1.answer(request, handler)
        else:
            response = await _answer(request, handler)
        try:
            async with asyncio.timeout_at(loop.time() + SEND_TIMEOUT):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            pass  # the client left; aiohttp sees it, too, and closes
        finally:
            resource = request.match_info.route.resource
            route = OTHER if resource is None else resource.canonical
            method = request.method if request.method in (hdrs.METH_GET, hdrs.METH_HEAD) else OTHER
            self._recorder.http_request(route, method, response.status, loop.time() - began)
        return response


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The handler's response, or a short text about what went wrong."""
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as exc:
        allowed = {hdrs.ALLOW: exc.headers[hdrs.ALLOW]}
        return web.Response(text=f"{exc.reason}\n", status=exc.status, headers=allowed)
    except web.HTTPException as exc:
        return web.Response(text=f"{exc.reason}\n", status=exc.status)
    except Exception:
        log.exception("HTTP request failed", extra={"method": request.method})
        return web.Response(text="internal error\n", status=500)


def _header(request: web.Request, name: str) -> str:
    return ",".join(request.headers.getall(name, []))
