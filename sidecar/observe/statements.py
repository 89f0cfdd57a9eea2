"""The statements of one pool: which ones are kept, and their figures.

Pure. Bounded: the least useful make room.
"""

from typing import Final

from sidecar.work import Statement

LIMIT: Final = 500


class StatementTable:
    """The statements of one pool by fingerprint."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.evicted = 0
        self._known: dict[str, Statement] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, fingerprint: str, text: str, operation: int) -> Statement:
        found = self._known.get(fingerprint)
        if found is None:
            found = self._known[fingerprint] = Statement(fingerprint, text, operation)
            if len(self._known) > self.limit:
                self._known.pop(next(iter(self._known))).is_retired = True
                self.evicted += 1
        return found
