"""Asks a sidecar's JSON API: where it is, with which token, and what went wrong in plain words.

Does not retry. Answers are bounded in size and time; redirects are not followed, since the token is
for one address. No error contains the token.
"""

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

import aiohttp

from sidecar.ask.answers import Entry, printable
from sidecar.config import HttpConfig
from sidecar.errors import SidecarError

TOKEN_VARIABLE: Final = "PGSIDECAR_TOKEN"
LARGEST: Final = 8 * 1024 * 1024
"""Bytes of an answer: 1,000 statements of 500 characters are a tenth of it."""

_CONNECTIONS: Final = 4
_NOT_OURS: Final = "what answers there is not a pgsidecar that has /api/v1"
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


class CannotAsk(SidecarError):
    """No answer, or none that can be used. Never crosses the wire."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status: Final = status


@dataclass(frozen=True, slots=True)
class Address:
    """Where a sidecar's HTTP service is, and the token for it."""

    url: str
    token: str = field(default="", repr=False)


def address_of(text: str, token: str = "") -> Address:
    """Of ``http://host:port``. Raises CannotAsk."""
    problem = f"{printable(text)[:100]!r} is not the address of a sidecar, as http://127.0.0.1:9632"
    try:
        url = urlsplit(text)
        is_one = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError as exc:  # a port that is none, an unfinished bracket
        raise CannotAsk(problem) from exc
    if not is_one:
        raise CannotAsk(problem)
    if "@" in url.netloc:
        raise CannotAsk(f"an address has no user or password; the token is in {TOKEN_VARIABLE}")
    if any(not 0x20 < ord(each) < 0x7F for each in token):
        raise CannotAsk("the token has characters that no header may have")
    return Address(f"{url.scheme}://{url.netloc}", token)


def configured(config: HttpConfig) -> str:
    """The address that a sidecar with this configuration listens on, from here."""
    host = _EVERYWHERE.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


class Asker:
    """An ``async with``: its connections are kept between questions."""

    def __init__(self, address: Address) -> None:
        self._address: Final = address
        self._session: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        return self._address.url

    async def __aenter__(self) -> Self:
        token = self._address.token
        self._session = aiohttp.ClientSession(
            base_url=self._address.url,
            connector=aiohttp.TCPConnector(limit=_CONNECTIONS),
            headers={"Accept": "application/json"}
            | ({"Authorization": f"Bearer {token}"} if token else {}),
            timeout=aiohttp.ClientTimeout(total=None),  # each question has its deadline
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def get(self, path: str, deadline: float, **parameters: str | int) -> Entry:
        """The object at this path. Raises CannotAsk."""
        try:
            async with asyncio.timeout_at(deadline):
                status, body = await self._get(path, parameters)
        except TimeoutError as exc:
            raise CannotAsk(f"{self.url} has not answered in time") from exc
        except aiohttp.ClientConnectorError as exc:
            why = os.strerror(exc.os_error.errno) if exc.os_error.errno else exc.os_error
            raise CannotAsk(
                f"nobody listens on {self.url} ({why}): does the sidecar run, and there?"
                " --url or --config tell another address"
            ) from exc
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            why = printable(str(exc).partition("\n")[0])[:100] or type(exc).__name__
            raise CannotAsk(f"{self.url}: {_NOT_OURS} ({why})") from exc
        return self._read(status, body)

    async def _get(self, path: str, parameters: Mapping[str, str | int]) -> tuple[int, bytes]:
        assert self._session is not None
        async with self._session.get(path, params=parameters, allow_redirects=False) as answer:
            parts, size = [], 0
            async for part in answer.content.iter_any():
                parts.append(part)
                size += len(part)
                if size > LARGEST:
                    raise CannotAsk(f"{self.url} answers with more than {LARGEST} bytes")
            return answer.status, b"".join(parts)

    def _read(self, status: int, body: bytes) -> Entry:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        entry = Entry(value)
        if status == 200 and entry:
            return entry
        detail = entry.text("detail")
        if status == 401:
            had_one = "is wrong" if self._address.token else "is needed"
            raise CannotAsk(
                f"{self.url}: a token {had_one}: put http.token into the variable"
                f" {TOKEN_VARIABLE}, or name the configuration with --config",
                status,
            )
        if not detail:
            raise CannotAsk(f"{self.url}: {_NOT_OURS} (status {status})", status)
        value = entry.text("value")
        raise CannotAsk(f"{self.url}: {detail}{f' ({value!r})' if value else ''}", status)
