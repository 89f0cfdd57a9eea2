"""Who may use the API: who has the token; where there is none, programs on this host.

Pure. Without a token, neither another host nor a page in a browser on this one gets in: its name
would lead here only by DNS rebinding, and then it is in ``Host``.
"""

import re
from collections.abc import Callable, Sequence
from hmac import compare_digest
from typing import Final

from sidecar.api.problems import Problem
from sidecar.config_values import is_loopback

_OPTION: Final = "set the option http.token and send it as a bearer token"
_FORWARDED: Final = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "Via")
"""What a proxy adds: the peer is not the one that asks, then."""

Headers = Callable[[str], Sequence[str]]
"""The values of a header by its name."""


def refusal(token: str, peer: str, headers: Headers) -> Problem | None:
    """Why this request is not answered; ``token`` is empty where there is none, ``peer`` an address."""
    if token:
        return None if _has(token, headers("Authorization")) else _unauthorized(headers)
    if not is_loopback(_unmapped(peer)):
        return _forbidden("without a token only clients on loopback are answered")
    if any(headers(name) for name in _FORWARDED):
        return _forbidden("without a token a request through a proxy is not answered")
    hosts = headers("Host")
    if len(hosts) != 1 or not is_loopback(_name(hosts[0])):
        return _forbidden("without a token the Host header must be a name of loopback")
    return None


def _has(token: str, given: Sequence[str]) -> bool:
    scheme, _, value = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    # compared in any case, so that the time tells nothing
    is_same = compare_digest(value.strip().encode("utf-8", "replace"), token.encode())
    return is_same and scheme.lower() == "bearer"


def _unauthorized(headers: Headers) -> Problem:
    had_one = bool(headers("Authorization"))
    challenge = 'Bearer realm="pgsidecar"' + (', error="invalid_token"' if had_one else "")
    detail = "the token is wrong" if had_one else "this needs the token, as Authorization: Bearer"
    return Problem(401, detail, headers={"WWW-Authenticate": challenge})


def _forbidden(why: str) -> Problem:
    return Problem(403, f"{why}; to be answered, {_OPTION}")


def _name(host: str) -> str:
    """Without port and brackets."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::[0-9]*)?", host.strip())
    return "" if found is None else (found[1] or found[2]).lower()


def _unmapped(address: str) -> str:
    """An IPv4 client of a listener for both is ``::ffff:127.0.0.1``."""
    return address.removeprefix("::ffff:")
