"""What each query's text means, and which statement it is: for the texts of one pool.

Owns the caches. In simple mode literals are part of the text, so what is kept is kept by what they do
not change; in the extended protocol texts come back as they are.
"""

from collections import OrderedDict
from typing import Final

from sidecar.events import Operation, PoolObserver
from sidecar.fingerprint import fingerprint, normalise
from sidecar.sql import Query, classify

_CACHED_TEXT: Final = 4096  # bytes; longer texts are looked at each time
_CACHED_TEXTS: Final = 2048


_FUNCTION_CALL: Final = fingerprint("<FunctionCall>")
"""A message of its own, without a text (54.2.5)."""


class Texts:
    """The texts of one pool."""

    def __init__(self, observer: PoolObserver) -> None:
        self._observer: Final = observer
        self.function_call: Final = observer.statement(
            _FUNCTION_CALL, "<FunctionCall>", int(Operation.OTHER)
        )
        self._known: OrderedDict[bytes, Query] = OrderedDict()

    def query(self, text: bytes) -> Query:
        """Of a Query message."""
        return self.parse(text)

    def parse(self, text: bytes) -> Query:
        """Of a Parse message."""
        found = self._known.get(text)
        if found is None:
            found = self._identified(text)
            if len(text) <= _CACHED_TEXT:
                self._known[text] = found
                if len(self._known) > _CACHED_TEXTS:
                    self._known.popitem(last=False)
        return found

    def _identified(self, text: bytes) -> Query:
        query = classify(text)
        normal = normalise(text)
        statement = self._observer.statement(fingerprint(normal), normal, query.operation)
        return query.as_statement(statement)
