"""What is kept of an error message: names and PostgreSQL's own words, and nothing of a client's data."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar.events import Operation
from sidecar.fingerprint import normalise
from sidecar.protocol import messages as m
from sidecar.proxy.scrub import LONGEST, OF_A_FUNCTION, message_of
from sidecar.work import Statement

QUERY = "SELECT id, name FROM shop.users WHERE name = 'x' AND \"My Column\" > 5 AND x::mood = y"


def statement(text: str = QUERY) -> Statement:
    form = normalise(text.encode())
    return Statement(form.fingerprint(), form.text(), int(Operation.SELECT))


def body(message: str, sqlstate: str = "42601", **fields: str) -> bytes:
    """An ErrorResponse's; fields by their letter."""
    given = {
        "S": "ERROR",
        "V": "ERROR",
        "C": sqlstate,
        "M": message,
        "F": "x.c",
        "R": "y",
        **fields,
    }
    return b"".join(k.encode() + v.encode() + b"\0" for k, v in given.items()) + b"\0"


def kept(message: str, sqlstate: str = "42601", **fields: str) -> str:
    return message_of(body(message, sqlstate, **fields), statement())


@pytest.mark.parametrize(
    ("message", "sqlstate"),
    [
        ('column "name" does not exist', "42703"),
        ('relation "shop.users" does not exist', "42P01"),
        ('column "My Column" does not exist', "42703"),
        ('syntax error at or near "WHERE"', "42601"),
        ('syntax error at or near "="', "42601"),
        ("syntax error at end of input", "42601"),
        ("operator does not exist: integer = mood", "42883"),
        ("function lower(integer, int4range) does not exist", "42883"),
        ("permission denied for table users", "42501"),
        ("canceling statement due to lock timeout", "55P03"),
        ("deadlock detected", "40P01"),
        ("division by zero", "22012"),
        ("Spalte \u201ename\u201c existiert nicht", "42703"),
        ("la colonne \u00ab name \u00bb n'existe pas", "42703"),
    ],
)
def test_names_of_the_statement_are_kept(message: str, sqlstate: str) -> None:
    assert kept(message, sqlstate) == message


def test_names_that_the_server_gives_are_kept() -> None:
    """A constraint is in no statement; that it is a name, fields of the error say."""
    unique = 'duplicate key value violates unique constraint "users_pkey"'
    assert kept(unique, "23505", s="shop", t="users", n="users_pkey") == unique
    check = 'new row for relation "users" violates check constraint "users_age_check"'
    assert kept(check, "23514", t="users", n="users_age_check") == check
    null = 'null value in column "age" of relation "users" violates not-null constraint'
    assert kept(null, "23502", t="users", c="age") == null


@pytest.mark.parametrize(
    ("message", "sqlstate", "said"),
    [
        ('invalid input syntax for type integer: "s3cret"', "22P02", "invalid input syntax for type integer: ?"),
        ('invalid input syntax for type integer: "users" s3cret "id"', "22P02", "invalid input syntax for type integer: ?"),
        ('value "4711" is out of range for type integer', "22003", 'value "?" is out of range for type integer'),
        ('value "id" s3cret "id" is out of range', "22003", 'value "?" is out of range'),
        ('syntax error at or near "s3cret"', "42601", 'syntax error at or near "?"'),
        ("unterminated quoted string at or near \"'a \"id\" s3cret\"", "42601", 'unterminated quoted string at or near "?"'),
        ('zero-length delimited identifier at or near """"', "42601", 'zero-length delimited identifier at or near "?"'),
        ('relation "s3cret" does not exist', "42P01", 'relation "?" does not exist'),
        ('relation "user" does not exist', "42P01", 'relation "?" does not exist'),
        ('role "s3cret" of "other" does not exist', "42704", 'role "?" does not exist'),
        ("improper relation name (too many dotted names): a.s3cret.c.d", "42601", "improper relation name (too many dotted names): ?"),
        ("invalid byte sequence for encoding \"UTF8\": 0x73 0x33", "22021", 'invalid byte sequence for encoding "?": ?'),
        ("large object 4711 does not exist", "42704", "large object ? does not exist"),
        ("4711 is outside the valid range for parameter \"id\" (1 .. 10)", "22023", '? is outside the valid range for parameter "?" (? .. ?)'),
        ("invalid escape \\x733363726574 here", "22025", "invalid escape ? here"),
        ("ung\u00fcltige Eingabe: \u201es3cret\u201c", "22P02", "ung\u00fcltige Eingabe: ?"),
        ("valeur \u00ab s3cret \u00bb invalide", "22P02", "valeur \u00ab?\u00bb invalide"),
        ("\u65e0\u6548\u7684\u8f93\u5165\uff1as3cret", "22P02", "\u65e0\u6548\u7684\u8f93\u5165\uff1a ?"),
        ("Invalid 's3cret' here", "22023", "Invalid '?' here"),
        ("could not open file \"/tmp/s3cret\" for reading: No such file or directory", "58P01", 'could not open file "?" for reading: No such file or directory'),
    ],
)  # fmt: skip
def test_values_are_not_kept(message: str, sqlstate: str, said: str) -> None:
    assert kept(message, sqlstate) == said


@pytest.mark.parametrize(
    "fields",
    [
        {"C": "P0001", "R": "exec_stmt_raise", "F": "pl_exec.c"},
        {"C": "23505", "R": "exec_stmt_raise", "F": "pl_exec.c", "n": "s3cret"},
        {"C": "P0004", "R": "exec_stmt_assert", "F": "pl_exec.c"},
        {"C": "U0001", "R": "whatever", "F": "elog.c"},
        {"C": "XX000", "R": "PLy_elog_impl", "F": "plpy_elog.c"},
        {"C": "22023", "R": "PLy_output", "F": "plpy_plpymodule.c"},
        {"C": "42601", "R": "pgfdw_report_error", "F": "connection.c"},
        {"C": "XX000", "R": "my_function", "F": "my_extension.c"},
        {"C": "", "R": "", "F": ""},
    ],
)
def test_words_of_functions_are_not_kept(fields: dict[str, str]) -> None:
    """They can be anything: what is raised, and what another server or language says."""
    assert kept("this s3cret is not for you", **fields) == OF_A_FUNCTION


def test_internal_errors_of_the_server_are_kept() -> None:
    assert kept("tuple concurrently updated", "XX000", F="heapam.c") == "tuple concurrently updated"


def test_messages_are_of_one_line_and_bounded() -> None:
    said = kept("a\nb\x1b[31m " + "word " * 500)
    assert said.startswith("a b [? word word")
    assert len(said) == LONGEST
    assert said.isprintable()


@pytest.mark.parametrize(
    "message", ['at or near "s3cret"', """at or near "'a "id" s3cret s3cret\""""]
)
def test_a_message_cut_off_is_no_reason_to_tell_more(message: str) -> None:
    whole = body(message)
    for end in range(len(whole)):
        assert "s3" not in message_of(whole[:end], statement())
    assert "s3" not in kept(message[:-1] + "x" * 2000)


TEMPLATES = [
    ('invalid input syntax for type integer: "{}"', "22P02"),
    ('value "{}" is out of range for type bigint', "22003"),
    ('invalid input value for enum mood: "{}"', "22P02"),
    ('date/time field value out of range: "{}"', "22008"),
    ('time zone "{}" not recognized', "22023"),
    ("syntax error at or near \"'{}'\"", "42601"),
    ("unterminated quoted string at or near \"'{}\"", "42601"),
    ('malformed array literal: "{}"', "22P02"),
    ('invalid value for parameter "TimeZone": "{}"', "22023"),
    ('unrecognized token: "{}" of "users"', "22P02"),
]  # fmt: skip


@given(st.sampled_from(TEMPLATES), st.text(max_size=60))
@example(TEMPLATES[1], 'id" zebra "id')
@example(TEMPLATES[1], "id' zebra 'id")
@example(TEMPLATES[9], 'id" of "users" zebra')
@example(TEMPLATES[5], 'id" zebra')
def test_no_word_of_a_value_is_kept(template: tuple[str, str], value: str) -> None:
    """Whatever quotation marks and colons are in it."""
    value = value.replace("\0", "")
    pattern, sqlstate = template
    said = set(re.findall(r"\w+", kept(pattern.format(value), sqlstate)))
    own = set(re.findall(r"\w+", pattern.format("") + " " + QUERY))
    assert said <= own


def test_many_quotations_take_no_time() -> None:
    """A hostile client may make the server say this often."""
    long = Statement("f", "a " * 100_000, 0)
    message = '"a" ' * 10_000
    assert len(message_of(body(message), long)) <= LONGEST


@given(st.binary(max_size=300))
def test_any_bytes_have_a_message(data: bytes) -> None:
    assert len(message_of(data, statement())) <= LONGEST


def test_our_own_error_is_kept() -> None:
    ours = m.error_response(
        "ERROR", "0A000", "transaction blocks are not allowed in statement mode"
    )
    assert message_of(ours[5:], None) == "transaction blocks are not allowed in statement mode"
