"""``/api/v1`` over HTTP: who may ask, what a path answers, what went wrong, and the stream of events."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import hdrs, web

from sidecar.api.access import refusal
from sidecar.api.answers import Answers, Endpoint, View
from sidecar.api.parameters import Parameters
from sidecar.api.problems import CONTENT_TYPE, Problem, Refused
from sidecar.api.streams import GREETING, Streams
from sidecar.observe.recorder import Recorder

PREFIX: Final = "/api"
EVENTS: Final = "/api/v1/events"

SEND_TIMEOUT: Final = 10.0
"""Seconds a listener may take to read what is sent at once; then its connection is cut."""
REFUSAL_DELAY: Final = 0.2
"""Seconds before a wrong token is answered, so that tokens cannot be tried fast."""

_HEADERS: Final = {
    hdrs.CACHE_CONTROL: "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}

log = logging.getLogger(__name__)


class ApiV1:
    def __init__(self, view: View, recorder: Recorder, token: str) -> None:
        self._token: Final = token
        self.refused: Final = 401 if token else 403  # who may not ask
        self._answers: Final = Answers(view, recorder)
        self.streams: Final = Streams(self._answers, recorder)

    def add_to(self, app: web.Application, recorder: Recorder) -> None:
        """Serve all paths, and count them from 0."""
        for endpoint in self._answers.endpoints():
            app.router.add_get(endpoint.path, _handler(endpoint))
        app.router.add_get(EVENTS, self._events)
        for path in (*(endpoint.path for endpoint in self._answers.endpoints()), EVENTS):
            for code in (400, self.refused):
                recorder.expect_http(path, hdrs.METH_GET, code)
        for path in ("/api/v1/pools/{pool}", "/api/v1/statements/{fingerprint}"):
            recorder.expect_http(path, hdrs.METH_GET, 404)
        recorder.expect_http("/api/v1/incidents/{id}", hdrs.METH_GET, 404)
        recorder.expect_http(EVENTS, hdrs.METH_GET, 503)

    def is_meant(self, request: web.Request) -> bool:
        """Whether it is a request to the API, also to a path that there is not."""
        path = request.path
        return path == PREFIX or path.startswith(PREFIX + "/")

    async def answer(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """The handler's response, or the problem that there is."""
        try:
            await self._admit(request)
            return await handler(request)
        except Refused as exc:
            return _problem(exc.problem)
        except web.HTTPMethodNotAllowed as exc:
            allowed = exc.headers[hdrs.ALLOW]
            detail = f"{request.method[:20]} is not allowed here; allowed: {allowed}"
            return _problem(Problem(405, detail, headers={hdrs.ALLOW: allowed}))
        except web.HTTPNotFound:
            return _problem(
                Problem(404, "there is no such path; /api/v1/openapi.json has them all")
            )
        except web.HTTPException as exc:
            return _problem(Problem(exc.status, exc.reason))
        except Exception:
            log.exception("HTTP request failed", extra={"method": request.method})
            return _problem(Problem(500, "internal error; the log has more"))

    async def _admit(self, request: web.Request) -> None:
        peer = request.transport and request.transport.get_extra_info("peername")
        host = str(peer[0]) if isinstance(peer, tuple) else ""
        problem = refusal(self._token, host, lambda name: request.headers.getall(name, []))
        if problem is not None:
            await asyncio.sleep(REFUSAL_DELAY)
            raise Refused(problem)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        pool = self._answers.known_pool(Parameters(request.query.items(), ("pool",)))
        headers = {hdrs.CONTENT_TYPE: "text/event-stream", **_HEADERS}
        if request.method == hdrs.METH_HEAD:
            return web.Response(headers=headers)
        listener = self.streams.join(pool, lambda: _is_gone(request))
        if listener is None:
            why = "the sidecar is draining" if self.streams.is_closed else "too many streams"
            raise Refused(Problem(503, why, headers={hdrs.RETRY_AFTER: "5"}))
        response = web.StreamResponse(headers=headers)
        try:
            async with asyncio.timeout(SEND_TIMEOUT):
                await response.prepare(request)
                await response.write(GREETING)
            while event := await listener.next():
                async with asyncio.timeout(SEND_TIMEOUT):
                    await response.write(event)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            pass  # the listener left
        finally:
            self.streams.leave(listener)
        return response


def _is_gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _handler(endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        parameters = Parameters(request.query.items(), endpoint.parameters)
        body = await endpoint.answer(parameters, request.match_info)
        return web.Response(body=body, content_type="application/json", headers=_HEADERS)

    return handle


def _problem(problem: Problem) -> web.Response:
    return web.Response(
        body=problem.body(),
        status=problem.status,
        content_type=CONTENT_TYPE,
        headers={**_HEADERS, **problem.headers},
    )
