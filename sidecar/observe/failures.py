"""What fails in one pool: by origin, SQLSTATE, application and statement, how often, and the last message.

Pure. Bounded: who was not seen for longest makes room. Messages come without literals (``proxy.scrub``).
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from sidecar.observe.blame import label_of
from sidecar.work import Failure, Statement

LIMIT: Final = 200


@dataclass(slots=True)
class FailureEntry:
    """Failures that have all of this in common. Instants are those of the sidecar's clock."""

    origin: str
    sqlstate: str
    application: str
    statement: Statement | None  # None: it is not known
    first_at: float
    last_at: float
    message: str  # the last one, without literals
    count: int = 1


class FailureTable:
    """The failures of one pool."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit: Final = limit
        self.evicted = 0
        self._known: OrderedDict[tuple[str, str, str, str], FailureEntry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def note(self, failure: Failure, now: float) -> None:
        statement = failure.statement
        fingerprint = "" if statement is None else statement.fingerprint
        application = label_of(failure.application)
        key = (str(failure.origin), failure.sqlstate, application, fingerprint)
        entry = self._known.get(key)
        if entry is None:
            self._known[key] = FailureEntry(
                origin=str(failure.origin),
                sqlstate=failure.sqlstate,
                application=application,
                statement=statement,
                first_at=now,
                last_at=now,
                message=failure.message,
            )
            if len(self._known) > self.limit:
                self._known.popitem(last=False)
                self.evicted += 1
            return
        entry.count += 1
        entry.last_at = now
        entry.message = failure.message
        entry.statement = statement  # it may have left the table, and come back
        self._known.move_to_end(key)

    def entries(self) -> list[FailureEntry]:
        """Those seen last come first."""
        return list(reversed(self._known.values()))
