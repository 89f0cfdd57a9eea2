"""Which texts are one statement, and that a statement's text never has a literal in it."""

import random
import re
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar import grammar
from sidecar.fingerprint import LONGEST, normalise

steady = settings(deadline=None, max_examples=50)


def fingerprint(text: str | bytes) -> str:
    return normalise(text.encode() if isinstance(text, str) else text).fingerprint()


def shown(text: str | bytes) -> str:
    return normalise(text.encode() if isinstance(text, str) else text).text()


ONE = [
    ("select 1", "SELECT   2 ;"),
    ("select a from t where b = 1", "select a from t where b=-2.5e3"),
    ("select a from t where b = 1", "/* x */ select a -- y\n from t where b = 'x''y'"),
    ("select a from t where b = 1", "select a from t where b = $1"),
    ("select a from t where b = 1", "select a from t where b = $tag$ ' $tag$"),
    ("select a from t where b = 1", "select a from t where b = e'\\'' "),
    ("select a from t where b = 1", "select a from t where b = U&'d\\0061t'"),
    ("select a from t where b = 1", "select a from t where b = x'1F'"),
    ("select a from t where b = 1", "select a from t where b = 0x1F"),
    ("select a from t where b = 1", "select a from t where b = 1_000"),
    ("select a from t where b = 1", 'select "a" from "t" where "b" = 1'),
    ("select a from t where b in (1)", "select a from t where b in ( 1, -2,3 , 4)"),
    ("select a from t where b in ('x')", "select a from t where b in ($1, $2, 'z')"),
    ("select a from t where b in (1)", f"select a from t where b in ({', '.join('9' * 900)})"),
    ("insert into t (a, b) values (1, 'x')", "insert into t(a,b) values (1,'x'),(2,'y'), (-3,'')"),
    ("insert into t values (now(), 1)", "insert into t values (now(), 1), (now(), 2)"),
    ("select a::text from t", "select cast(a as text) from t"),
    ("select a from t where b <> 1", "select a from t where b != 1"),
    ("set application_name to 'x'", "SET application_name = y"),
    ("set application_name to 'x'", 'SET application_name = "y"'),
    ("do $$ begin x end $$", "do 'begin y end'"),
    # not PostgreSQL's language
    ("selec a from t where b = 1", "SELEC a FROM t WHERE b = 'x' -- y"),
    ("selec a from t where b in (1)", "selec a from t where b in (1, 2)"),
    ("selec values (1, 2)", "selec values (1, 2), (3, 4)"),
    ("select \xe9 from", "SELECT \xe9   from"),
]


@pytest.mark.parametrize(("one", "other"), ONE)
def test_spellings_are_one_statement(one, other):
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("select a from t1", "select a from t2"),
        ("select a1 from t", "select a2 from t"),
        ('select "a 1" from t', 'select "a 2" from t'),
        ("select a from t where b = 1", "select a from t where c = 1"),
        ("select a from t where b = 1", "select a from t where b > 1"),
        ("select a from t where b = 1", "select a from t where b = 1 or b = 2"),
        ("select a from t", "select b from t"),
        ("select f1() from t", "select f2() from t"),
        ("begin", "commit"),
        ("insert into t values (1)", "insert into u values (1)"),
        ("set a to 1", "set b to 1"),
        ("selec a from t1", "selec a from t2"),
        ("selec f(1)", "selec f1()"),
        ('selec "A"', 'selec "a"'),
        ("selec a from t", "selec a from t where"),
    ],
)
def test_other_texts_are_other_statements(one, other):
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  SELECT a\n\tFROM t  WHERE b=1 ; ", "SELECT a FROM t WHERE b=$1"),
        ("select $2, 'x', $1, 3", "select $2, $3, $1, $4"),
        ("select a::int, -1 from t -- x", "select a::int, $1 from t"),
        ("select a from t where b in (1, -2, 3)", "select a from t where b in ($1 /*, ... */)"),
        ("insert into t values (1,'a'), (2,'b')", "insert into t values ($1,$2) /*, ... */"),
        ("alter role r password 'x'", "alter role r password $1"),
        ("alter role r set x = a, 'b'", "alter role r set x = $1, $2"),
        ("set local x to default", "set local x to default"),
        ("select a ->> 'b' ? 'c'", "select a ->> $1 ? $2"),
        ("begin; select 1; commit;", "begin; select $1; commit"),
        ("select 'C:\\' || 'x'", "select $1 ..."),
        ("select 'x", "select $1"),
        ('select "x', "select ..."),
        ("", ""),
    ],
)
def test_what_is_shown(text, normal):
    """As pg_stat_statements does it: it can be given to EXPLAIN (GENERIC_PLAN)."""
    assert shown(text) == normal


def test_what_is_shown_is_the_same_statement():
    """So that it can be pasted."""
    for one, _ in ONE:
        if normalise(one.encode()).is_whole and grammar.fingerprint(shown(one)):
            assert grammar.fingerprint(shown(one)) == fingerprint(one)


# -- no literal ------------------------------------------------------------------------------------

SECRET = "hunter2"  # as a word
NUMBER = "4711471147"

PLANTED = [
    *(
        f"'{SECRET}'",
        f"'x''{SECRET}'",
        f"E'{SECRET}'",
        f"e'a\\'{SECRET}\\\\'",
        f"U&'{SECRET}\\0041'",
    ),
    *(f"N'{SECRET}'", f"B'{NUMBER}'", f"X'{NUMBER}'", f"$${SECRET}$$", f"$a$ '{SECRET} $b$ $a$"),
    *(f"$${SECRET}", f"'{SECRET}", f"E'{SECRET}\\'", f"'a'\n'{SECRET}'", f"E'a'\n'b\\'{SECRET}'"),
    *(f"'a\\' {SECRET}'", f"'a\\', '{SECRET}'", f"'a\\\\\\', '{SECRET}'", f"'\\', {NUMBER}"),
    *(NUMBER, f"-{NUMBER}", f"{NUMBER}e5", f"{NUMBER}.{NUMBER}", f".{NUMBER}", f"1e-{NUMBER}"),
    *(f"0x{NUMBER}", f"1_000_{NUMBER}", f"${NUMBER}", f"1{SECRET}", f"1.e+{NUMBER}"),
    *(f"/* {SECRET} */ 1", f"-- {SECRET}\n 1", f"/* /* {SECRET} */ '{SECRET} */ 1", f"/* {SECRET}"),
    *(f"/* /* /* {SECRET} */ */ */ '{SECRET}'", f"(1, '{SECRET}', 3)", f"'a' || '{SECRET}'"),
]
AROUND = [
    *("select {}", "select a, {} from t where b = {}", "select a from t where b in (1, {}, 'x')"),
    *("insert into t values (1, {}), (2, {})", "update t set a = {} where b = 'x'", "do {}"),
    *("set x to {}", "set local x = {}", "alter role r password {}", "copy t from {} with ({})"),
    *("create user mapping for u server s options (password {})", "call p({})", "execute p({})"),
    *("notify a, {}", "comment on table t is {}", "selec {} fro", 'select "a\'b" from t where {}'),
    *("alter system set x to 1, {}", "create function f() returns int as {} language sql"),
    *(
        "prepare p as select {}",
        "explain select {}",
        "begin; select {}; commit",
        "{}",
        "select {};;",
    ),
]


@pytest.mark.parametrize("around", AROUND)
def test_no_literal_is_shown(around):
    for planted in PLANTED:
        text = shown(around.replace("{}", planted, 1).replace("{}", "1"))
        assert SECRET not in text, planted
        assert NUMBER not in text, planted


@pytest.mark.parametrize(
    "around", ["set x to {}", "set session x = a, {}", "alter user u set x = {}"]
)
@pytest.mark.parametrize("value", [SECRET, f'"{SECRET}"', f"{SECRET}.x"])
def test_values_of_settings_need_no_quotes_to_be_literals(around, value):
    assert SECRET not in shown(around.format(value))


def literal(draw: st.DrawFn, body: str) -> str:
    """A literal with this in it, as a server reads it that has standard_conforming_strings on."""
    kind = draw(st.sampled_from(["plain", "escaped", "unicode", "dollar", "tag", "bits"]))
    if kind == "plain":
        return "'" + body.replace("'", "''") + "'"
    if kind == "escaped":
        return (
            "E'"
            + body.replace("\\", "\\\\").replace("'", draw(st.sampled_from(["''", "\\'"])))
            + "'"
        )
    if kind == "unicode":
        return "U&'" + body.replace("'", "''") + "'"
    if kind == "bits":
        return "X'" + body.replace("'", "''") + "'"
    tag = "$$" if kind == "dollar" else "$t1$"
    return tag + body.replace("$", "") + tag


@st.composite
def planted(draw: st.DrawFn) -> bytes:
    """SQL-ish text of any bytes with the secret in its literals and comments, in any encoding."""
    pieces = []
    odd = st.text(st.sampled_from("'\"\\$*/-é;\n\0 a1(,)"), max_size=6)
    code = st.sampled_from(
        [
            "select ",
            "a1",
            " from t",
            " = ",
            "(",
            ")",
            ",",
            "::int",
            ' "b" ',
            "in (",
            "values (",
            "; ",
            " -",
        ]
    )
    for _ in range(draw(st.integers(1, 8))):
        pieces.append(draw(code))
        if draw(st.booleans()):
            pieces.append(" " + literal(draw, draw(odd) + SECRET + draw(odd)))
        if draw(st.integers(0, 4)) == 0:
            inner = (draw(odd) + SECRET + draw(odd)).replace("/", "").replace("*", "")
            pieces.append(f" /*{inner}*/ ")
    return "".join(pieces).encode(draw(st.sampled_from(["utf-8", "latin-1"])))


@settings(deadline=None, max_examples=250)
@given(planted())
def test_no_literal_is_shown_whatever_stands_around(text):
    assert SECRET not in shown(text)


def escaped(body: str) -> str:
    return body.replace("\\", "\\\\").replace("'", "\\'")


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text(st.sampled_from("'\\ax$ "), max_size=5), min_size=1, max_size=5))
@example(["\\", "'"])
def test_no_literal_is_shown_where_backslashes_escape(bodies):
    """By a server with standard_conforming_strings off: it reads '\\'' as one quote."""
    literals = [f"'{escaped(each + SECRET)}'" for each in bodies]
    assert SECRET not in shown("select " + ", ".join(literals))


@pytest.mark.parametrize("encoding", ["sjis", "big5", "gbk", "gb18030", "johab"])
def test_no_literal_is_shown_where_a_backslash_is_half_a_character(encoding):
    """Client encodings in which the second byte of a character may be ASCII."""
    rng = random.Random(1)
    double: list[bytes] = []
    while len(double) < 300:
        char = chr(rng.randrange(0x3000, 0xD7A0))
        coded = char.encode(encoding, "ignore")
        if len(coded) == 2 and coded[1] in b"\\[]^{|}~@`" + bytes(range(0x41, 0x7B)):
            double.append(coded)
    for two in double:
        for text in (
            b"select E'%b', '%b'" % (two, SECRET.encode()),
            b"select E'%b\\'%b'" % (two, SECRET.encode()),
            b"select '%b', '%b'" % (two, SECRET.encode()),
            b"select a%b$$ , '$$%b'" % (two, SECRET.encode()),
            b"select a%bE'\\', '%b'" % (two, SECRET.encode()),
        ):
            assert SECRET not in shown(text), text


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_have_a_form(text):
    form = normalise(text)
    assert re.fullmatch("[0-9a-f]{16}", form.fingerprint())
    form.text().encode()


# -- literals and identifiers, generated ------------------------------------------------------------


def query(names: list[str], values: list[str]) -> str:
    a, b, c, d = names
    v = [*values]
    return (
        f"SELECT {a}, count({b}) FROM {c} JOIN {d} USING ({a}) WHERE {b} = {v[0]} AND {c}.{a} IN ({v[1]}, {v[2]})"
        f" AND lower({d}.{b}) LIKE {v[3]} GROUP BY {a} HAVING count({b}) > {v[4]}"
    )


names = st.lists(
    st.from_regex(r"\A[b-d][a-z]{2}_[0-9]{1,2}\Z").map(str.lower),
    min_size=4,
    max_size=4,
    unique=True,
)
value = st.one_of(
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.text(st.characters(codec="utf-8", exclude_characters="\0\\")).map(
        lambda text: "'" + text.replace("'", "''") + "'"
    ),
)
values = st.lists(value, min_size=5, max_size=5)


@steady
@given(names, values, values)
def test_literals_do_not_matter(names, some, others):
    assert fingerprint(query(names, some)) == fingerprint(query(names, others))


@steady
@given(names, values, st.integers(0, 3))
def test_names_do(names, values, which):
    others = [*names]
    others[which] += "x"
    assert fingerprint(query(names, values)) != fingerprint(query(others, values))


# -- texts that hurt -------------------------------------------------------------------------------

DEEP = [
    *("select " + "(" * 100_000 + "1" + ")" * 100_000, "select 1" + "+1" * 100_000),
    *("select " + "not " * 100_000 + "true", "select 1" + " union select 1" * 100_000),
    *("select " + "f(" * 100_000, "select " + "case when " * 100_000, "/*" * 100_000 + " x"),
    *("select " + "- " * 100_000, "[" * 100_000, "'" * 100_001, '"' * 100_001, "$a$" * 100_001),
    *("select x from t where a in (" + "1, " * 100_000 + "1)", "select " + "row(" * 3999),
    *("select 1" + "+1" * 3900, "select " + "not " * 1999 + "true", "select 1" + " ~ 1" * 1900),
]


def test_no_text_brings_the_parser_down():
    """It is C, and recurs: in a process of its own with a stack of 2 MiB, where a crash would show."""
    program = (
        "from tests.test_fingerprint import DEEP, fingerprint\n"
        "for text in DEEP:\n"
        "    assert len(fingerprint(text)) == 16\n"
        "print('alive')\n"
    )
    limited = ["sh", "-c", 'ulimit -s 2048; exec "$0" "$@"', sys.executable, "-c", program]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=25)
    assert done.stdout == "alive\n", done.stderr


def test_what_follows_a_long_beginning_does_not_count():
    long = b"select a from t where b = 1 and " + b"c = 1 and " * 1000
    assert len(long) > LONGEST
    assert fingerprint(long + b"x = 1") == fingerprint(long + b"y = 1")
    assert shown(long).endswith(" ...")
    assert len(shown(long)) < 3000
