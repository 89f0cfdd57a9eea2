"""Statements and failures for tests of what counts them."""

from sidecar.events import ErrorOrigin
from sidecar.work import Failure, Statement


def statement(operation: int, fingerprint: str = "0123456789abcdef") -> Statement:
    return Statement(fingerprint, "SELECT ?", int(operation))


def failure(
    origin: ErrorOrigin,
    sqlstate: str,
    message: str = "",
    application: str = "",
    of: Statement | None = None,
) -> Failure:
    return Failure(origin, sqlstate, message, application, of)
