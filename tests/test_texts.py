"""The caches of texts: what is found by a part of a text is what all of it would have told."""

import random
import sys
from typing import Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar import sql
from sidecar.events import Operation
from sidecar.fingerprint import normalise
from sidecar.observe.silence import NullPoolRecorder
from sidecar.proxy import texts
from sidecar.proxy.texts import Texts
from sidecar.sql import classify
from sidecar.work import OTHER_STATEMENT, Statement


class Table(NullPoolRecorder):
    """Keeps all statements."""

    def __init__(self) -> None:
        self.known: Final[dict[str, Statement]] = {}

    def statement(self, fingerprint: str, text: str, operation: int) -> Statement:
        found = self.known.get(fingerprint)
        if found is None or found.is_retired:
            found = self.known[fingerprint] = Statement(fingerprint, text, operation)
        return found


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def known(table: Table) -> Texts:
    return Texts(table)


def of(known: Texts, text: str | bytes) -> Statement:
    known.tick()
    return known.query(text.encode() if isinstance(text, str) else text).statement


SAME = [
    ("select a from t where b = 1", "select a from t where b = 9"),
    ("select a from t where b = 1", "select a from t where b = 98765432109876543210"),
    ("select a from t where b = 1", "select a from t where b = 'x'"),
    ("select a1 from t where b = 1", "select a1 from t where b = 22"),
    ("select a1 from t where b = 'x1'", "select a1 from t where b = 'y''2'"),
    ("select \"a 1\" from t where b = 'x'", "select \"a 1\" from t where b = ''"),
    ("select 'C:\\'", "select 'D:\\'"),
    ("select e'\\'' from t", "select e'x' from t"),
    ("select 1 -- x\n from t", "select 1 -- y\n from t"),
    ("select $$x$$ from t", "select $$y$$ from t"),
    ("select 1 from t /* a */", "select 2 from t /* b */;"),
    ("select 'x' from t /* it's */", "select 'y' from t"),
    ("select '/*' from t", "select '*/' from t"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_texts_that_differ_in_literals_have_one_statement(known, one, other):
    assert of(known, one) is of(known, other)
    assert of(known, one) is of(known, one)
    assert known.parse(other.encode()).statement is of(known, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("select a1 from t where b = 1", "select a2 from t where b = 1"),
        ("select a1 from t where b = 'x'", "select a2 from t where b = 'x'"),
        ('select "a 1" from t', 'select "a 2" from t'),
        ("select a from t1, t2 where b = 10", "select a from t1, t3 where b = 10"),
        ("select a from t where b1 = 1 and b2 = 1", "select a from t where b1 = 1 and b3 = 1"),
        ("select 1 from t -- '", "select 1 from u -- '"),
        ("select a$1 from t", "select a$2 from t"),
        ("select \xe91 from t", "select \xe92 from t"),
        ("select x'1' from t1", "select x'1' from t2"),
    ],
)
def test_digits_of_names_count(known, one, other):
    assert of(known, one) is not of(known, other)
    assert of(known, one) is of(known, one)
    assert of(known, other) is of(known, other)


def test_statement_has_the_operation_of_its_text(known):
    assert of(known, "update t set a = 1").operation == Operation.UPDATE
    assert of(known, "with a as (select 1) delete from t").operation == Operation.DELETE


@pytest.mark.parametrize(
    "text",
    [
        "select set_config('a.b', 'x', false)",
        "select set_config('a.b', '1', false)",
        "select set_config('a.b', 'x', 'f')",
        "do 'begin listen x; end'",
        "begin; do 'begin set x = 1; end'; commit",
        "insert into t values ('x'); listen x",
        "set x to 'y'",
        "select 1; set x to 1",
        "select '/* '; listen x; select ' */",
        "select 1 -- /*\n; listen x /* y */",
        "select '/*'; listen x; /* */",
        "select 'a\\'; listen x; --'",
        "select $$ /* $$; listen x; select $$ */",
        'select "/*"; listen x; select "*/',
    ],
)
def test_effects_do_not_depend_on_what_was_seen_before(known, text):
    """The same skeleton, or the same beginning, without the effects comes first."""
    effects = classify(text.encode()).effects
    for before in (
        text.replace("listen x", "select"),
        text.replace("false", "true").replace("'f'", "'t'"),
        text.replace("begin listen x; end", "begin end").replace("set x = 1", ""),
        text[: text.rfind("/*")] if "/*" in text else "select 1",
        text[: text.rfind("/*") + 2] if "/*" in text else "select 1",
        text.replace("x", "y").replace("'", "''"),
    ):
        known.query(before.encode())
        known.parse(before.encode())
    assert effects
    for _ in range(2):
        assert known.query(text.encode()).effects == effects
        assert known.parse(text.encode()).effects == effects
        assert known.parse(text.encode(), True).effects == effects


# -- generated -------------------------------------------------------------------------------------

PIECES = [
    *(
        "select ",
        "insert into ",
        "begin",
        "commit",
        "set ",
        "listen ",
        "set_config(",
        "do ",
        "temp ",
    ),
    *("a1", "t", "t2", '"b 3"', "4", "55", "'x'", "'y''6'", "'", "''", '"', "\\", "/*", "*/", "--"),
    *(
        "/* c */",
        "\n",
        "$1",
        "$$",
        "$a1$",
        "$a2$",
        "e'",
        "(",
        ")",
        ",",
        ";",
        " ",
        "x",
        "\xe9",
        "'f'",
    ),
]


def query_of(known: Texts, text: bytes) -> tuple[str, int, int]:
    known.tick()
    query = known.query(text)
    assert known.query(text).statement is query.statement
    return query.statement.fingerprint, query.operation, query.effects


def directly(text: bytes) -> tuple[str, int, int]:
    query = classify(text)
    return normalise(text).fingerprint(), query.operation, query.effects


def variants(draw: st.DrawFn, pieces: list[str]) -> str:
    """The same text with other literals, perhaps, and perhaps with other names."""
    changes = {
        "4": ["5", "66"],
        "55": ["4", "123456"],
        "'x'": ["'z'", "''", "'listen x'", "';'", "'/*'", "'\"'", "'$$'"],
        "'y''6'": ["''''", "'7''8'"],
        "a1": ["a2"],
        "t2": ["t3"],
        "'f'": ["'t'"],
        "c": ["'"],
    }
    return "".join(draw(st.sampled_from([piece, *changes.get(piece, [])])) for piece in pieces)


@st.composite
def pairs(draw: st.DrawFn) -> list[bytes]:
    pieces = draw(st.lists(st.sampled_from(PIECES), max_size=14))
    return [variants(draw, pieces).encode() for _ in range(3)]


@settings(deadline=None, max_examples=400)
@given(pairs())
@example([b"select '", b"select ", b"select '/* x'; listen x; /* */"])
@example([b"select $a1$ ' $a1$", b"select $a1$ ' $a2$"])
def test_what_is_cached_is_what_the_text_says(pair):
    """Whatever came before it. Words in literals may make the direct look more suspicious."""
    known = Texts(Table())
    for text in [*pair, *pair]:
        fingerprint, operation, effects = query_of(known, text)
        direct = directly(text)
        assert fingerprint == direct[0] or b"/*" in text
        if b"'" not in text:
            assert (operation, effects) == direct[1:]
        assert effects & ~direct[2] == 0
        parsed = known.parse(text)
        assert (parsed.operation, parsed.effects) == direct[1:] or b"/*" in text


@settings(deadline=None, max_examples=300)
@given(pairs())
def test_effects_are_those_of_the_text_without_what_is_in_literals(pair):
    """What the server does cannot depend on it: so neither does what we think."""
    known = Texts(Table())
    for text in pair:
        effects = query_of(known, text)[2]
        direct = classify(text).effects
        if effects != direct:
            blank = text
            for inner in (b"listen x", b";", b"/*", b'"', b"$$"):
                blank = blank.replace(b"'%b'" % inner, b"''")
            assert effects == classify(blank).effects or effects == 0 == classify(blank).effects & (
                sql.LASTING | sql.SETTING
            )


# -- long texts --------------------------------------------------------------------------------------


def rows(number: int, seed: int) -> bytes:
    rng = random.Random(seed)
    texts = ("'x'", "'it''s; listen x'", "NULL", "''")
    return b", ".join(
        f"({rng.randrange(10**9)}, {rng.choice(texts)},{rng.choice(['-', ''])}{rng.random()}, true)".encode()
        for _ in range(number)
    )


def numbers(count: int, seed: int) -> bytes:
    return b", ".join(b"%d" % (seed + i) for i in range(count))


@pytest.mark.parametrize("table_name", [b"t", b"t_1", b'"t_1"', b'"a b"'])
def test_rows_to_insert_are_one_statement_however_many(known, table_name):
    text = b"insert into %b (a, b, c, d) values %b on conflict do nothing"
    found = {of(known, text % (table_name, rows(n, n))) for n in (1, 2, 20, 100, 101, 1000)}
    assert len(found) == 1
    assert of(known, text % (b"other", rows(100, 1))) not in found
    assert of(known, text % (b'"t_2"', rows(100, 1))) not in found


def test_lists_are_one_statement_however_long(known):
    text = b"select a from t_1 where b in (%b) and c = 'x'"
    found = {of(known, text % numbers(n, n)) for n in (1, 2, 20, 500, 501, 9000)}
    assert len(found) == 1
    assert of(known, text.replace(b"t_1", b"t_2") % numbers(500, 1)) not in found


@pytest.mark.parametrize(
    "text",
    [
        b"insert into t values %b; listen x",
        b"insert into t values %b returning set_config('a.b', 'x', false)",
        b"create temp table x as values %b",
        b"listen x; insert into t values %b",
        b"do 'begin listen x; end'; insert into t values %b",
    ],
)
def test_effects_of_long_texts_are_seen(known, text):
    known.query(b"insert into t values %b" % rows(300, 1))
    for number in (100, 200, 300):
        long = text % rows(number, number)
        assert known.query(long).effects == classify(long).effects != 0


def test_digits_of_quoted_names_count_in_long_texts(known):
    text = b'insert into t ("a %d") values %b'
    one, other = (of(known, text % (i, rows(100, 1))) for i in range(2))
    assert one is not other


# -- trace context ---------------------------------------------------------------------------------

TRACE, SPAN = "5bd66ef5095369c7b0d1f8f4bd33716a", "c532cb4098ac3dd2"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    "comment",
    [
        f"/*traceparent='{PARENT}'*/",
        f"/* traceparent='{PARENT}' */",
        f"/*action='%2Fp*d',controller='index',traceparent='{PARENT}',tracestate='a%3Db%2Cc%3Dd'*/",
        f"/*traceparent=%27{PARENT}%27*/",
        f"/*route='it\\'s',traceparent='{PARENT}'*/;",
    ],
)
@pytest.mark.parametrize(
    "text", ["select 1 ", "select 'x' from t1 ", "select E'\\n' ", "select 1 /* a */ "]
)
def test_traced_execution_has_its_trace(known, text, comment):
    statement = of(known, text)
    for _ in range(2):
        for query in (
            known.query((text + comment).encode()),
            known.parse((text + comment).encode()),
        ):
            assert query.statement.shared is statement
            assert query.statement.trace is not None
            assert (query.statement.trace.trace_id, query.statement.trace.span_id) == (TRACE, SPAN)
            assert query.statement.fingerprint == statement.fingerprint
    assert known.parse((text + comment).encode(), True).statement is statement


@pytest.mark.parametrize(
    "text",
    [
        f"select 1 /*traceparent='{PARENT}'*/ from t",
        f"select 1 /*traceparent='{PARENT}'*/ /* other */",
        f"select '/*traceparent=''{PARENT}''*/'",
        f"select 1 /*traceparent='{PARENT.upper()}'*/",
        f"select 1 /*traceparent='00-{'0' * 32}-{SPAN}-01'*/",
        f"select 1 /*traceparent='00-{TRACE}-{'0' * 16}-01'*/",
        f"select 1 /*traceparent='ff-{TRACE}-{SPAN}-01'*/",
        f"select 1 /*traceparent='00-{TRACE}x-{SPAN}-01'*/",
        "select 1 /*traceparent=*/",
        "select 1 /**/",
        "select 1 /*/",
        "*/",
        "/**/;",
    ],
)
def test_what_is_no_trace_context_is_a_comment(known, text):
    assert known.query(text.encode()).statement.shared is None
    assert known.parse(text.encode()).statement.shared is None


def test_effects_are_those_of_a_traced_text(known):
    text = f"listen x /*traceparent='{PARENT}'*/".encode()
    for query in (known.query(text), known.parse(text), known.query(text), known.parse(text)):
        assert query.effects & sql.LISTEN
        assert query.statement.trace is not None


# -- bounds ----------------------------------------------------------------------------------------


def test_statement_that_left_the_table_is_looked_up_anew(known, table):
    for text in (b"select 1", b"select a1", b"select E'\\n'", b"set x to 1"):
        for find in (known.query, known.parse):
            before = find(text).statement
            before.is_retired = True
            after = find(text).statement
            assert after is not before
            assert (after.fingerprint, after.text) == (before.fingerprint, before.text)
            assert find(text).statement is after


def test_too_many_new_statements_wait_for_their_turn(known, table):
    found = [known.query(b"select a from t_%d" % i).statement for i in range(300)]
    told = [each for each in found if each.fingerprint != OTHER_STATEMENT]
    assert len(told) == 200
    assert found[-1].operation == Operation.SELECT
    known.tick()
    again = [known.query(b"select a from t_%d" % i).statement for i in range(300)]
    assert len([each for each in again if each.fingerprint != OTHER_STATEMENT]) == 250
    assert again[:200] == told


def test_long_statements_count_as_several(known):
    columns = ", ".join(f"column_{i}" for i in range(500))
    found = [known.query(f"select {columns} from t_{i}".encode()) for i in range(20)]
    told = [each for each in found if each.statement.fingerprint != OTHER_STATEMENT]
    assert 5 <= len(told) <= 15


def size_of(cache: texts.Cache) -> int:
    """Bytes of keys and entries, as far as they are its own."""
    size = 0
    seen: set[int] = set()
    for generation in (cache.young, cache._old):
        size += sys.getsizeof(generation)
        for key, known in generation.items():
            parts = (key, known, known.query, known.query.statement, known.query.statement.text)
            for part in (*parts, known.spans):
                if id(part) not in seen:
                    seen.add(id(part))
                    size += sys.getsizeof(part)
    return size


def test_a_million_texts_take_no_more_memory_than_some(known, table):
    """What docs/architecture.md says: 2 MiB for skeletons, 4 for texts, 1 for forms."""
    for i in range(1_000_000):
        if i % 100 == 0:
            known.tick()
            table.known.clear()
        match i % 100:
            case 0:
                known.query(b"select a from table_%d where b = %d" % (i, i))
            case 1:
                known.query(b"select a from table_%d where b = %d and c in ('%d', 'x')" % (i, i, i))
            case 2:
                known.parse(b"select %d from t_%d" % (i, i))
            case 3:
                known.query(b"select E'\\n' + %d" % i)
            case _:
                known.query(b"select a, 'text %d' from t1, t_%d where b = %d" % (i, i % 9, i * i))
    for cache, most in (
        (known._shapes, 2.0),
        (known._parsed, 2.0),
        (known._odd, 2.0),
        (known._forms, 1.0),
    ):
        assert 0.1 < size_of(cache) / 2**20 < most
    for cache in (known._shapes, known._parsed, known._odd):
        assert len(cache) > 500


def test_long_texts_are_not_kept(known):
    for i in range(100):
        known.query(b"select '%d', E'\\n'" % i + b"x" * 100_000)
        known.parse(b"select %d, " % i + b"x" * 100_000)
        known.query(b"select " + b"x" * 100_000 + b", %d" % i)
    assert sum(size_of(cache) for cache in (known._shapes, known._parsed, known._odd)) < 1_000_000
