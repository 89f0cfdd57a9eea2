"""What went wrong with a request, as problem details (RFC 9457).

Pure. The contract is in ``openapi.yaml``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

CONTENT_TYPE: Final = "application/problem+json"

_SHOWN: Final = 100
"""Most characters of a value that are sent back."""


@dataclass(frozen=True, slots=True)
class Problem:
    status: int
    detail: str
    parameter: str = ""  # the one that is meant, if any
    value: str = ""  # what it was
    allowed: str = ""  # what it may be
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        told: dict[str, object] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }
        if self.parameter:
            told |= {"parameter": self.parameter, "value": self.value[:_SHOWN]}
        if self.allowed:
            told["allowed"] = self.allowed
        return json.dumps(told, ensure_ascii=False).encode("utf-8", "replace")


class Refused(Exception):
    """A request that is answered with a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem: Final = problem


def bad_parameter(name: str, value: str, allowed: str) -> Refused:
    return Refused(Problem(400, f"{name[:_SHOWN]} is not {allowed}", name[:_SHOWN], value, allowed))


def not_found(what: str, parameter: str, value: str, allowed: str = "") -> Refused:
    return Refused(Problem(404, f"there is no such {what}", parameter, value, allowed))
