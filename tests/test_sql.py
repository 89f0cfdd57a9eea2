"""What a query does, told from its text: the operation, what it leaves behind, what it resets."""

import random
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar import sql
from sidecar.events import Operation
from sidecar.sql import classify, deallocated

SET, LISTEN, TEMP, LOAD = sql.SETTING, sql.LISTEN, sql.TEMP_TABLE, sql.LOAD
LOCK, CURSOR, PREPARE, UNNAMED = sql.ADVISORY_LOCK, sql.CURSOR, sql.PREPARE, sql.UNNAMED
LEAVING = sql.LASTING | sql.SETTING | sql.RESET


@pytest.mark.parametrize(
    ("text", "operation"),
    [
        ("select 1", Operation.SELECT),
        ("SELECT\n1", Operation.SELECT),
        ("  (  (select 1)", Operation.SELECT),
        ("-- a comment\nselect 1", Operation.SELECT),
        ("/* insert into t */ select 1", Operation.SELECT),
        ("/* a */ -- b\n /* c\n */ ; select 1", Operation.SELECT),
        ("table t", Operation.SELECT),
        ("values (1)", Operation.SELECT),
        ("with a as (select 1) select * from a", Operation.SELECT),
        ("with a as (select 1), b as (select 2) insert into t select * from a", Operation.INSERT),
        ("WITH a AS (INSERT INTO t VALUES (1) RETURNING *) SELECT * FROM a", Operation.SELECT),
        ("with a as (select 1)\n\tdelete from t using a", Operation.DELETE),
        ("with a as (select 1) update t set x = 1", Operation.UPDATE),
        ("insert into t values (1)", Operation.INSERT),
        ("insert\tinto t values (1)", Operation.INSERT),
        ("update t set x = 1", Operation.UPDATE),
        ("delete from t", Operation.DELETE),
        ("copy t from stdin", Operation.COPY),
        ("begin", Operation.TRANSACTION),
        ("START TRANSACTION ISOLATION LEVEL SERIALIZABLE", Operation.TRANSACTION),
        ("commit;", Operation.TRANSACTION),
        ("end", Operation.TRANSACTION),
        ("rollback to savepoint a", Operation.TRANSACTION),
        ("abort", Operation.TRANSACTION),
        ("savepoint a", Operation.TRANSACTION),
        ("release a", Operation.TRANSACTION),
        ("begin; insert into t values (1); commit", Operation.TRANSACTION),
        ("create table t (a int)", Operation.UTILITY),
        ("explain select 1", Operation.UTILITY),
        ("show all", Operation.UTILITY),
        ("set x = 1", Operation.UTILITY),
        ("vacuum", Operation.UTILITY),
        ("merge into t using u on true when matched then delete", Operation.UTILITY),
        ("", Operation.OTHER),
        (";", Operation.OTHER),
        ("  \n\t", Operation.OTHER),
        ("-- nothing", Operation.OTHER),
        ("/* no end", Operation.OTHER),
        ("1", Operation.OTHER),
        ("selectx", Operation.OTHER),
        ("gibberish", Operation.OTHER),
    ],
)
def test_operation_is_that_of_the_first_statement(text, operation):
    assert Operation(classify(text.encode()).operation) is operation


LEAVES_BEHIND = [
    ("set work_mem = '1MB'", SET),
    ("set work_mem to default", SET),
    ("set session work_mem = 1", SET),
    ('set "work_mem" = 1', SET),
    ('set"work_mem"=1', SET),
    ("set search_path = a, b", SET),
    ("set my.variable = 'x'", SET),
    ("set role reader", sql.ROLE),
    ("set session role reader", sql.ROLE),
    ("set session authorization reader", sql.ROLE),
    ("set session characteristics as transaction read only", SET),
    ("set schema 'a'", SET),
    ("set xml option document", SET),
    ("load 'auto_explain'", LOAD),
    ("select set_config('work_mem', '1MB', false)", SET),
    ("select pg_catalog.set_config('work_mem', $1, $2)", SET),
    ("select set_config($1, $2, false)", SET | UNNAMED),
    ("select set_config('a.b', 'x', false), set_config(lower('A.C'), 'y', false)", SET | UNNAMED),
    ("reset work_mem", sql.RESET),
    ("select set_config('a.b', 'x', true), set_config('a.c', 'y', false)", SET),
    ("select set_config ( 'a.b' , 'x' , FALSE )", SET),
    ("insert into t select set_config('a.b', 'x', false)", SET),
    ("listen channel", LISTEN),
    ('listen "Channel"', LISTEN),
    ('listen"channel"', LISTEN),
    ("create temp table t (a int)", TEMP),
    ("create temporary table if not exists t (a int) on commit drop", TEMP),
    ("create local temp table t (a int)", TEMP),
    ("create global temporary table t (a int)", TEMP),
    ("create temp view v as select 1", TEMP),
    ("create or replace temp view v as select 1", TEMP),
    ("create temporary recursive view v (n) as select 1", TEMP),
    ("create temp sequence s", TEMP),
    ("create table pg_temp.t (a int)", TEMP),
    ('create table "pg_temp".t (a int)', TEMP),
    ("create table pg_temp_3.t (a int)", TEMP),
    ("create function pg_temp.f() returns int language sql as 'select 1'", TEMP),
    ("select 1 as a into temp t", TEMP),
    ("select 1 as a into temporary table t", TEMP),
    ("select 1 as a into local temp t", TEMP),
    ("with x as (select 1) select * into temp t from x", TEMP),
    ("explain analyze create temp table t as select 1", TEMP),
    ("explain (analyze, costs off) create temporary table t as select 1", TEMP),
    ("select pg_advisory_lock(1)", LOCK),
    ("select pg_try_advisory_lock (1, 2)", LOCK),
    ("select pg_advisory_lock_shared($1)", LOCK),
    ("select pg_try_advisory_lock_shared(1)", LOCK),
    ("select * from t where pg_catalog.pg_try_advisory_lock(t.id)", LOCK),
    ("declare c cursor with hold for select 1", CURSOR),
    ("declare c binary insensitive no scroll cursor with\nhold for select 1", CURSOR),
    ("prepare s as select 1", PREPARE),
    ("prepare s (int) as select $1", PREPARE),
    ('prepare"s"as select 1', PREPARE),
    ("prepare transactions as select 1", PREPARE),
    ("do $$ begin create temp table t (a int); end $$", TEMP),
    ("do $body$ begin perform set_config('a.b', 'x', false); end $body$", SET),
    ("do language plpgsql 'begin set work_mem = 1; end'", SET),
    ("do $$ begin if true then set work_mem = 1; end if; end $$", SET),
    ("do $$ begin perform pg_advisory_lock(1); end $$", LOCK),
]


@pytest.mark.parametrize(("text", "effects"), LEAVES_BEHIND)
def test_what_may_outlive_the_transaction_is_suspected(text, effects):
    assert classify(text.encode()).effects & LEAVING == effects


LEAVES_NOTHING = [
    "select 1",
    "set local work_mem = '1MB'",
    "set transaction isolation level serializable",
    "set constraints all deferred",
    "set application_name = 'x'",  # what is reported goes with the client
    "set session application_name to 'x'",
    "set \"timezone\" = 'UTC'",
    "set time zone 'UTC'",
    "set names 'latin1'",
    "set datestyle to german",
    "prepare transaction 'x'",
    "commit prepared 'x'",
    "declare c cursor for select 1",
    "declare c cursor without hold for select 1",
    "select temperature from weather",
    "select 'create temp table t'",
    "select attempt, template from templates",
    "insert into temp values (1)",
    "insert  into\n temp (a) values (1)",
    "merge into temp using u on true when matched then delete",
    "select * from temp",
    "create table temperatures (a int)",
    "create table t as select * from temporary_things",
    "create index on temp (a)",
    "drop table temp",
    "update t set x = 1",
    "update t set x = 'set work_mem = 1'",
    "insert into t values ('; set work_mem = 1')",
    "insert into t values ('it''s; set work_mem = 1; --')",
    "insert into t values (U&'; listen x; ')",
    "select $$; listen x; $$; select 1",
    "select $tag$; listen x; $$ $tag$; select 1",
    'select 1 as "; listen x; "; select 2',
    'select 1 as "a""; listen x; "; select 2',
    "-- ; listen x\nselect 1; select 2",
    "/* ; listen x; */ select 1; select 2",
    "/* /* nested */ ; listen x; */ select 1; select 2",
    "select 1; /* no end ; listen x",
    "select date'; listen x; '; select 2",
    "select pg_advisory_xact_lock(1)",
    "select pg_try_advisory_xact_lock(1)",
    "select pg_advisory_unlock_all()",
    "select 'pg_advisory_lock(1)'",
    "select set_config('a.b', 'x', true)",
    "select set_config('a.b', $1, true)",
    "select set_config('a.b', 'x', 't'::boolean)",
    "select set_config('a.b', f(1, false), is_local => true)",
    "select set_config('a.b', 'x', true), set_config('a.c', 'y', true)",
    "select my_set_config('a', 'b', false)",
    "unlisten *",
    "notify x",
    "begin; set local work_mem = 1; commit",
    "fetch 1 from c",
    "load_data()",
    "do $$ begin update t set x = 1; insert into temp values (1); end $$",
    "do $$ begin set local work_mem = 1; perform set_config('a.b', 'x', true); end $$",
    "grant create, temp on database d to u",
    "comment on table t is 'create temp table'",
    "explain select 1",
    "deallocate s",
    "discard all",
]


@pytest.mark.parametrize("text", LEAVES_NOTHING)
def test_what_ends_with_the_transaction_is_not_suspected(text):
    assert classify(text.encode()).effects & LEAVING == 0


@pytest.mark.parametrize("text", [text for text, _ in LEAVES_BEHIND])
@pytest.mark.parametrize(
    "around",
    [
        "select 1; {}",
        "{}; select 1",
        "begin; {}; commit",
        "insert into t values ('C:\\'); {}",
        "/* application: 'x */ {}",
        "-- it's\n{}",
        "select $$'$$; {}",
        "select date'2020-01-01', \"'\"; {}",
        "select a$1$ from t; {}",
    ],
)
def test_what_stands_around_a_statement_hides_nothing(text, around):
    assert classify(around.format(text).encode()).effects & LEAVING


@pytest.mark.parametrize(
    "text",
    [
        "insert into t values (e'it\\'s; set work_mem = 1; --')",
        "select 'a\\'; select ' listen x'",
        "/* /* /* */ */ ' */ ; listen x; select ''",
        "select 1$a$ ' $a$; listen x; '",
    ],
)
def test_what_a_server_may_read_otherwise_is_suspected_of_everything(text):
    """A backslash before a quote means this or that, see standard_conforming_strings."""
    assert classify(text.encode()).effects == sql.UNKNOWN


def test_what_is_seen_is_told_apart_from_what_may_be_hidden():
    """So that a statement which stays is refused where it has to be, also with an odd text beside it."""
    text = b"create temp table t as select e'it\\'s'"
    assert classify(text).effects == sql.UNKNOWN | sql.SEEN


steady = settings(deadline=None)  # on a busy machine any example may take long
SPACES = [" ", "\n", "\t\r\n ", "/* c */", " -- set\n", "/* ' */", "\f\v", "/* a /* b */ */"]


@steady
@given(
    st.sampled_from(LEAVES_BEHIND).filter(lambda known: "'" not in known[0]),
    st.randoms(use_true_random=False),
)
def test_spelling_changes_nothing(known, rng: random.Random):
    """Case, white space and comments between words are a matter of taste."""
    text, effects = known
    words = re.split(r"( )", text)
    odd = "".join(rng.choice(SPACES) if word == " " else word for word in words)
    odd = "".join(rng.choice((c.upper(), c.lower())) for c in rng.choice(SPACES) + odd)
    if "$" not in text:  # the tags of dollar quotes are not a matter of taste
        assert classify(odd.encode()).effects & LEAVING == effects, odd


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("reset all", {b"all"}),
        ("RESET\nALL;", {b"all"}),
        ("select pg_advisory_unlock_all();\nclose all;\nunlisten *;\nreset all;", {b"all"}),
        ("reset search_path", {b"search_path"}),
        ("reset search_path; select 1; reset work_mem", {b"search_path", b"work_mem"}),
        ("set work_mem = 1; reset search_path", {b"search_path"}),
        ('reset "TimeZone"', {b"timezone"}),
        ("reset time zone", {b"timezone"}),
        ("/* c */ reset all", {b"all"}),
        ("select 'reset all'", set()),
        ("resettle", set()),
        ("select reset from t", set()),
    ],
)
def test_what_is_reset_is_told(text, names):
    assert classify(text.encode()).resets == names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("set my.variable = 'x'", {b"my.variable"}),
        ('set "My"."Variable" to 1', {b"my.variable"}),
        ("select set_config('app.user', $1, false)", {b"app.user"}),
        (
            "select set_config ( 'App.User' , $1, false), set_config('b.c', '', false)",
            {b"app.user", b"b.c"},
        ),
        ("set work_mem = 1", set()),
        ("set local my.variable = 'x'", set()),
        ("select 'set my.variable = 1'", set()),
    ],
)
def test_settings_that_no_server_lists_are_told_by_name(text, names):
    assert classify(text.encode()).names == names


UNDOES = [
    *("unlisten *", "drop table t", "close c", "close all", "deallocate s", "deallocate all"),
    *("discard all", "discard temp", "reset all", "reset role", "set role none"),
    *("select pg_advisory_unlock(1)", "select pg_advisory_unlock_all()", "set work_mem to default"),
    "select pg_advisory_unlock_shared(1, 2)",
    "begin; drop table t; commit",
]


@pytest.mark.parametrize("text", UNDOES)
def test_what_may_undo_an_effect_is_told(text):
    assert classify(text.encode()).effects & sql.UNDO


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("deallocate s", b"s"),
        ("DEALLOCATE PREPARE S_1;", b"s_1"),
        (' /* c */ deallocate "S 1" ', b"S 1"),
        ('deallocate "a""b"', b'a"b'),
        ("deallocate all", None),
        ("deallocate prepare all", None),
        ("deallocate s; deallocate t", None),
        ("select 1; deallocate s", None),
    ],
)
def test_which_statement_is_deallocated_is_told(text, name):
    is_one = bool(classify(text.encode()).effects & sql.DEALLOCATE)
    assert is_one is (name is not None)
    if name is not None:
        assert deallocated(text.encode()) == name


PIECES = [
    *(
        "/*",
        "*/",
        "--",
        "\n",
        "'",
        "''",
        "e'",
        '"',
        '""',
        "$$",
        "$a$",
        "$1",
        "\\",
        ";",
        "(",
        ")",
        ",",
    ),
    *(
        " ",
        "set ",
        "reset ",
        "listen ",
        "prepare ",
        "declare ",
        "create ",
        "temp ",
        "into ",
        "with ",
    ),
    *(
        "hold ",
        "do ",
        "begin ",
        "set_config(",
        "pg_advisory_lock(",
        "true)",
        "é",
        "select ",
        "x",
        "1",
    ),
]


@steady
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=200))
@example("\0")
def test_no_text_is_too_odd(text):
    query = classify(text.encode())
    assert Operation(query.operation) in Operation
    assert 0 <= query.effects < 16384


@steady
@given(st.binary(max_size=100))
def test_text_in_any_encoding_is_looked_at(data):
    classify(data)
    classify(b"explain " + data)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["", "select temp ", "explain ", "do ", "with "]),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join),
)
@example("", " ")
@example("", "/**/")
@example("", "(;")
@example("explain ", "/* ")
@example("select temp ", ";")
@example("select ", "set_config(")
@example("do ", ";set_config(")
def test_no_text_stalls_the_others(begin, unit):
    """A client chooses the text: no pattern may take a time that grows faster than the text."""
    text = (begin + unit * (60_000 // len(unit))).encode()[:60_000] + b"1"
    started = time.process_time()
    classify(text)
    assert time.process_time() - started < 2.0  # some take 0.1 s; what backtracks takes for ever
