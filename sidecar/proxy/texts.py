"""What each query's text means, and which statement it is: for the texts of one pool.

Owns the caches. In simple mode literals are part of the text, so what is kept is kept by what they do
not change: the *skeleton* of a text has no strings and 0 for each digit, which takes a third of a
microsecond to find. In the extended protocol texts come back as they are. A comment at the end is
taken off first: it is another one each time where it has a trace context (sqlcommenter).

A key is shared only where what it leaves out cannot matter, whoever wrote it: see ``fingerprint.Form``
and ``fingerprint.spans_of``. All else is looked at each time, or kept by the whole text.
"""

import re
from hashlib import blake2b
from typing import Final

from sidecar import fingerprint
from sidecar.events import Operation, PoolObserver
from sidecar.fingerprint import Form, normalise, spans_of, squeeze
from sidecar.sql import Query, classify
from sidecar.work import OTHER_STATEMENT, Statement, Trace

_CACHED_TEXT: Final = 4096
"""Bytes; longer keys are kept by their hash, or not at all."""

_LONG: Final = 1024
"""Bytes of a text without its strings; longer ones may be rows to insert, each time another number."""

_LONGEST: Final = 64 * 1024
_GLANCE: Final = 2 * 1024
"""Bytes. Of a text that is longer than the longest only so much is looked at: 0.3 ms."""

_SHAPES: Final = 1024 * 1024
_PARSED: Final = 1024 * 1024
_FORMS: Final = 512 * 1024
"""Bytes of a generation; a cache has two of them."""

_ENTRY: Final = 700
"""Bytes that an entry takes beside its key and the text of its statement."""

_BURST: Final = 200
_REFILL: Final = 50  # each 100 ms
_DEAR: Final = 256  # bytes of a form that cost as much as a new one does at least

_FUNCTION_CALL: Final = fingerprint.fingerprint("<FunctionCall>")
"""A message of its own, without a text (54.2.5)."""

_ZEROS: Final = bytes(0x30 if 0x30 <= byte <= 0x39 else byte for byte in range(256))
_SLASH: Final = 0x2F
_QUOTE: Final = 0x27
_BACKSLASH: Final = 0x5C
_TRANSACTION: Final = int(Operation.TRANSACTION)
_OTHER: Final = int(Operation.OTHER)

_traceparent = re.compile(
    rb"traceparent\s*=\s*(?:\\?'|%27)?(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}"
).search


class Known:
    """What is known of all texts with one key."""

    __slots__ = ("is_plain", "query", "size", "spans")

    def __init__(
        self, query: Query, is_plain: bool, spans: tuple[tuple[int, int], ...], size: int
    ) -> None:
        self.query = query
        self.is_plain: Final = is_plain
        """The query says all, whatever the key leaves out."""
        self.spans: Final = spans
        """Of the key: where digits belong to names, which tell these texts apart."""
        self.size: Final = size


class Cache:
    """Two generations: what has been used in the last one moves to the next, all else goes."""

    __slots__ = ("_limit", "_old", "_used", "young")

    def __init__(self, limit: int) -> None:
        """``limit``: bytes of a generation."""
        self._limit: Final = limit
        self._used = 0
        self._old: dict[bytes, Known] = {}
        self.young: dict[bytes, Known] = {}

    def __len__(self) -> int:
        return len(self.young) + len(self._old)

    def get(self, key: bytes) -> Known | None:
        known = self.young.get(key)
        if known is None:
            known = self._old.get(key)
            if known is not None:
                self.put(key, known)
        return known

    def put(self, key: bytes, known: Known) -> None:
        self._used += len(key) + known.size
        if self._used > self._limit:
            self._old = self.young
            self.young = {}
            self._used = len(key) + known.size
        self.young[key] = known


class Texts:
    """The texts of one pool."""

    __slots__ = (
        "_forms",
        "_observer",
        "_odd",
        "_parsed",
        "_shapes",
        "_to_spend",
        "function_call",
    )

    def __init__(self, observer: PoolObserver) -> None:
        self._observer: Final = observer
        self.function_call: Final = observer.statement(_FUNCTION_CALL, "<FunctionCall>", _OTHER)
        self._shapes: Final = Cache(_SHAPES)  # by skeleton
        self._parsed: Final = Cache(_PARSED)  # by text
        self._odd: Final = Cache(_PARSED)  # by text; only for exactly this one
        self._forms: Final = Cache(_FORMS)  # by the hash of the normal form
        self._to_spend = _BURST

    def tick(self) -> None:
        """Every 100 ms: so many new statements may be looked at closely, and no more."""
        self._to_spend = min(_BURST, self._to_spend + _REFILL)

    # -- simple mode ---------------------------------------------------------------------------

    def query(self, text: bytes) -> Query:
        """Of a Query message."""
        # A byte is found by its number in 0.02 us; two take 0.3 us in a text of 300 bytes.
        if _SLASH in text and text.partition(b"/*")[1]:
            return self._commented(text)
        code = text
        if _QUOTE in text:
            pieces = text.split(b"'")
            if not len(pieces) & 1 or _BACKSLASH in text:
                return self._look_up(text, text)
            code = b"'".join(pieces[::2])
        known = self._shapes.young.get(code.translate(_ZEROS))
        if known is not None and known.is_plain:
            query = known.query
            if not query.statement.is_retired:
                return query
        found = self._by_shape(text, code)
        return self._look_up(text, text) if found is None else found

    def _commented(self, text: bytes) -> Query:
        start = _last_comment(text)
        head = text if start < 0 else text[:start]
        found: Query | None = None
        pieces = head.split(b"'")
        if len(pieces) & 1 and (len(pieces) == 1 or b"\\" not in head):
            found = self._by_shape(head, b"'".join(pieces[::2]))
        if found is None:
            found = self._look_up(text, head)
        return found if start < 0 else _traced(found, text[start:])

    def _by_shape(self, text: bytes, code: bytes) -> Query | None:
        """None: its skeleton does not tell. Only of a text behind which a comment may begin."""
        if len(code) > _LONG:
            return self._by_gist(text, code)
        key = code.translate(_ZEROS)
        known = self._shapes.get(key)
        if known is None:
            # numbers of another length make another key, but not another text
            short = b"\1" + key.replace(b"000", b"0").replace(b"00", b"0").replace(b"00", b"0")
            known = self._shapes.get(short)
            if known is None:
                form = normalise(text)
                spans = spans_of(text) if form.is_clean else None
                if spans is None:
                    return None
                if spans:
                    known = Known(_NOTHING, False, spans, _ENTRY)
                else:
                    known = self._learn(text, code, form)
                    if known is None:
                        return self._other(text)
                    self._shapes.put(short, known)
            self._shapes.put(key, known)
        if known.spans:
            names = [code[start:end] for start, end in known.spans]
            key += b"\0" + b"\0".join(names)
            known = self._shapes.get(key)
            if known is None:
                known = self._learn(text, code, normalise(text))
                if known is None:
                    return self._other(text)
                self._shapes.put(key, known)
        return self._said(known, text)

    def _by_gist(self, text: bytes, code: bytes) -> Query | None:
        """Of a long text: thousands of rows to insert are the same as ten."""
        if len(code) <= _CACHED_TEXT:
            known = self._shapes.get(code.translate(_ZEROS))
            if known is not None and not known.spans:
                return self._said(known, text)
        short = squeeze(code) if len(code) <= _LONGEST else None
        if short is None or len(short) > _CACHED_TEXT:
            return None
        gist = b"\2" + short
        known = self._shapes.get(gist)
        if known is None:
            # what it was made of is one statement with it, and as clean
            example = short.replace(b"'", b"''")
            form = normalise(example)
            spans = spans_of(example) if form.is_clean else None
            if spans is None:
                return None
            known = self._learn(text, code, form)
            if known is None:
                return self._other(text)
            self._shapes.put(gist, known)
            if not spans and len(short) * 2 > len(code):  # it may come back as it is
                self._shapes.put(code.translate(_ZEROS), known)
        return self._said(known, text)

    def _learn(self, text: bytes, code: bytes, form: Form) -> Known | None:
        """What is known of all texts with this skeleton and these names."""
        blank = code.replace(b"'", b"''")
        query = classify(blank)
        is_plain = (
            query.operation <= _TRANSACTION
            and not query.effects
            and not query.resets
            and blank.find(b";", 0, -1) < 0
            and b"set_config" not in blank.lower()
        )
        if not is_plain:
            query = classify(text)
        statement = self._statement(form, query.operation)
        if statement is None:
            return None
        size = _ENTRY + len(statement.text)
        return Known(query.as_statement(statement), is_plain, (), size)

    def _said(self, known: Known, text: bytes) -> Query:
        statement = known.query.statement
        if statement.is_retired:
            statement = self._again(statement)
            known.query = known.query.as_statement(statement)
        return known.query if known.is_plain else classify(text).as_statement(statement)

    # -- the extended protocol -----------------------------------------------------------------

    def parse(self, text: bytes, is_named: bool = False) -> Query:
        """Of a Parse message. One of a named statement has no trace context: it is for many."""
        known = self._parsed.young.get(text)
        if known is not None and not known.query.statement.is_retired:
            return known.query
        start = _last_comment(text)
        head = text if start < 0 else text[:start]
        found = self._by_text(head)
        if found is None:
            found = self._look_up(text, head)
        return found if start < 0 or is_named else _traced(found, text[start:])

    def _by_text(self, text: bytes) -> Query | None:
        """None: it cannot be kept. Only of a text behind which a comment may begin."""
        known = self._parsed.get(text)
        if known is None:
            if len(text) > _CACHED_TEXT:
                return None
            form = normalise(text)
            if not form.is_clean:
                return None
            query = classify(text)
            statement = self._statement(form, query.operation)
            if statement is None:
                return self._other(text)
            known = Known(query.as_statement(statement), True, (), _ENTRY + len(statement.text))
            self._parsed.put(text, known)
        return self._said(known, text)

    # -- both ----------------------------------------------------------------------------------

    def _look_up(self, text: bytes, head: bytes) -> Query:
        """The long way: of a text that is the same only if all of it is."""
        key = text
        if len(text) > _CACHED_TEXT:
            key = b"%d " % len(text) + blake2b(text, digest_size=16).digest()
        known = self._odd.get(key)
        if known is None:
            longest = fingerprint.LONGEST if len(text) <= _LONGEST else _GLANCE
            form = normalise(head, longest)
            if len(head) < len(text) and not form.is_clean:
                form = normalise(text, longest)
            query = classify(text)
            statement = self._statement(form, query.operation)
            if statement is None:
                return self._other(text)
            known = Known(query.as_statement(statement), True, (), _ENTRY + len(statement.text))
            self._odd.put(key, known)
        return self._said(known, text)

    def _statement(self, form: Form, operation: int) -> Statement | None:
        """None: too many new ones have come lately."""
        digest = blake2b(form.key, digest_size=16).digest()
        known = self._forms.get(digest)
        if known is None:
            cost = 1 + len(form.key) // _DEAR
            if cost > self._to_spend:
                return None
            self._to_spend -= cost
            found = self._observer.statement(form.fingerprint(), form.text(), operation)
            query = Query(operation, 0, statement=found)
            self._forms.put(digest, Known(query, True, (), _ENTRY + len(found.text)))
            return found
        found = known.query.statement
        if found.is_retired:
            found = self._again(found)
            known.query = known.query.as_statement(found)
        return found

    def _again(self, statement: Statement) -> Statement:
        """It had to leave the table, and is back."""
        return self._observer.statement(statement.fingerprint, statement.text, statement.operation)

    def _other(self, text: bytes) -> Query:
        """It is not kept, so that its turn comes later."""
        query = classify(text)
        return query.as_statement(self._observer.statement(OTHER_STATEMENT, "", query.operation))


_NOTHING: Final = Query(_OTHER, 0)


def _last_comment(text: bytes) -> int:
    """Where the comment at the end of a text begins, if nothing comes after it; else -1."""
    end = len(text)
    if text.endswith(b";"):
        end -= 1
    if not text.endswith(b"*/", 0, end):
        return -1
    start = text.rfind(b"/*", 0, end)
    return start if start >= 0 and text.find(b"*/", start + 2, end) == end - 2 else -1


def _traced(query: Query, comment: bytes) -> Query:
    """The same, of this one execution, if the comment has a trace context."""
    found = _traceparent(comment)
    if found is None:
        return query
    shared = query.statement
    trace = Trace(found[1].decode(), found[2].decode())
    return query.as_statement(
        Statement(shared.fingerprint, shared.text, shared.operation, shared, trace)
    )
