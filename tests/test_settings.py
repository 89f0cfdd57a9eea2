"""A client's settings on connections that others have used: which ones, and the SQL that sets them."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.errors import ClientProtocolError
from sidecar.protocol.startup import StartupMessage
from sidecar.proxy.settings import Settings, SettingsTable, change, from_startup
from tests.wire import Client

REPORTED = {
    b"client_encoding": b"UTF8",
    b"DateStyle": b"ISO, MDY",
    b"TimeZone": b"UTC",
    b"application_name": b"",
    b"server_version": b"16.1",
}


def brought(**parameters: str) -> dict[bytes, bytes]:
    values = {name.encode(): value.encode() for name, value in parameters.items()}
    return from_startup(StartupMessage(0, {b"user": b"me", **values}, ()), REPORTED)


@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        ({}, {}),
        ({"database": "d", "replication": "off"}, {}),
        ({"TimeZone": "Asia/Tokyo"}, {b"timezone": b"Asia/Tokyo"}),
        ({"timezone": "UTC"}, {}),  # as it is anyway
        ({"datestyle": "ISO, MDY"}, {}),
        ({"DateStyle": "ISO, DMY"}, {b"datestyle": b"ISO, DMY"}),
        ({"client_encoding": "utf-8"}, {}),
        ({"client_encoding": "'utf8'"}, {}),
        ({"client_encoding": "latin1"}, {b"client_encoding": b"latin1"}),
        ({"search_path": "a, b"}, {b"search_path": b"a, b"}),
        ({"extra_float_digits": "3"}, {b"extra_float_digits": b"3"}),
        (
            {"options": "-c search_path=a --work-mem=1MB"},
            {b"search_path": b"a", b"work_mem": b"1MB"},
        ),
        ({"options": "-c TimeZone=UTC"}, {}),
        ({"options": "-c timezone=Asia/Tokyo", "TimeZone": "UTC"}, {}),  # the packet's own wins
    ],
)
def test_client_brings_what_is_not_there_already(parameters, found):
    assert brought(**parameters) == found


def test_options_that_are_no_settings_are_the_clients_error():
    with pytest.raises(ClientProtocolError):
        brought(options="-B 10")


@pytest.mark.parametrize(
    ("before", "after", "sql"),
    [
        ({}, {}, b""),
        # JDBC's DateStyle is "ISO": on its own it would keep the order, DMY, of the client before.
        (
            {b"datestyle": b"SQL, DMY"},
            {b"datestyle": b"ISO"},
            b"RESET datestyle;SET datestyle TO 'ISO'",
        ),
        ({b"a": b"1"}, {b"a": b"1"}, b""),
        ({}, {b"a": b"1"}, b"SET a TO '1'"),
        ({b"a": b"1"}, {b"a": b"2"}, b"SET a TO '2'"),
        ({b"a": b"1"}, {}, b"RESET a"),
        ({b"a": b"1"}, {b"b": b"2"}, b"RESET a;SET b TO '2'"),
        ({}, {b"a": b"it's"}, b"SET a TO 'it''s'"),
        ({}, {b"a": b"c:\\"}, b"SET a TO $t$c:\\$t$"),
        ({}, {b"a": b"\\$t$'$tt"}, b"SET a TO $ttt$\\$t$'$tt$ttt$"),
        ({}, {b"my.setting": b"x"}, b'SET "my"."setting" TO \'x\''),
        ({}, {b'a"; drop table t; --': b"x"}, b'SET "a""; drop table t; --" TO \'x\''),
        ({b"a b": b"1"}, {}, b'RESET "a b"'),
        (
            {},
            {b"search_path": b'a, "B"'},
            b"SELECT pg_catalog.set_config('search_path','a, \"B\"',false)",
        ),
    ],
)
def test_change_is_what_differs(before, after, sql):
    assert change(before, after) == sql


NAMES = st.sampled_from([b"application_name", b"a.b", b"a.c", b"a.d"])
VALUES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), max_size=12
) | st.sampled_from(["'", "\\", "\\'", "''", "$$", "a, b", "E'", "\\\\'; select 1; --"])
SETTINGS = st.dictionaries(NAMES, VALUES.map(str.encode), max_size=4)


@pytest.mark.parametrize("strings", ["on", "off"])
def test_any_value_arrives_as_it_is(postgres, strings):
    """The one SQL we write ourselves: whatever a client sends in its startup packet is a value in it,
    never more, whether ``standard_conforming_strings`` is on or off."""
    address = (postgres.host, postgres.port)
    options = {"standard_conforming_strings": strings, "backslash_quote": "on"}
    with Client.login(address, postgres.user, postgres.database, **options) as client:

        @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(SETTINGS, SETTINGS)
        def check(before: dict[bytes, bytes], after: dict[bytes, bytes]) -> None:
            client.rows("reset all")
            client.rows(f"set standard_conforming_strings = {strings}")
            for state in (change({}, before), change(before, after)):
                client.rows(state)
            for name in (b"a.b", b"a.c", b"a.d"):
                found = client.value(f"select current_setting('{name.decode()}', true)") or ""
                assert found == after.get(name, b"").decode()

        check()


def test_equal_settings_are_one_object():
    table = SettingsTable()
    a = table.intern({b"x": b"1", b"y": b"2"})
    assert table.intern({b"y": b"2", b"x": b"1"}) is a
    assert table.with_value(a, b"x", b"1") is a
    changed = table.with_value(a, b"x", b"2")
    assert changed is not a
    assert changed.values == {b"x": b"2", b"y": b"2"}
    assert a.values == {b"x": b"1", b"y": b"2"}


def test_settings_are_forgotten_with_their_last_client():
    table = SettingsTable()
    kept, passing = table.intern({b"x": b"1"}), table.intern({b"x": b"2"})
    del passing
    assert list(table._known.values()) == [kept]


def test_only_what_an_accepted_value_can_break_is_unproven():
    assert Settings({}).is_proven
    assert not Settings({b"a": b"b"}).is_proven


@pytest.mark.parametrize(
    ("values", "same"),
    [
        ({b"application_name": b"x"}, True),
        ({b"statement_timeout": b"1s"}, True),
        ({b"datestyle": b"German"}, False),
        ({b"search_path": b"a"}, False),
        ({b"standard_conforming_strings": b"off"}, False),
    ],
)
def test_dialect_is_what_a_text_is_read_by(values, same):
    assert (Settings(values).dialect == Settings({}).dialect) is same
