"""What an operator may write, what it means, and what is said about what cannot be."""

import base64
import json
import re
import traceback
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr, ValidationError

from sidecar import config_text
from sidecar.config import (
    Config,
    ConsoleConfig,
    HttpConfig,
    ListenConfig,
    LogConfig,
    PoolConfig,
    ServerTarget,
    UserConfig,
    redacted,
)
from sidecar.config_file import load, parse
from sidecar.config_values import name_matches
from sidecar.dsn import parse_dsn
from sidecar.errors import ConfigError, SidecarError
from sidecar.events import PoolMode
from sidecar.protocol.authentication import ScramKeys
from sidecar.target import Host, SessionAttrs, SslMode, TlsPolicy

SHIPPED = Path(__file__).parent.parent / "config.yaml"
DSN = "postgresql://app@db.example/app"
MINIMAL = f"pools: {{main: {{dsn: '{DSN}'}}}}\n"


def read(text: str, environ: Mapping[str, str] | None = None) -> Config:
    return parse(text, environ or {}, "config.yaml")


def pool(options: str, environ: Mapping[str, str] | None = None) -> PoolConfig:
    """The pool ``main`` with further options in YAML's flow style."""
    text = f"pools: {{main: {{dsn: '{DSN}', {options}}}}}"
    return read(text, environ).pools["main"]


def problems(text: str, environ: Mapping[str, str] | None = None) -> list[str]:
    """The lines of the error that reading ends with."""
    with pytest.raises(ConfigError) as caught:
        read(text, environ)
    return str(caught.value).splitlines()


def problem(text: str, environ: Mapping[str, str] | None = None) -> str:
    [line] = problems(text, environ)
    return line


def password_of(config: Config, user: str) -> str | None:
    password = config.users[user].password
    return None if password is None else password.get_secret_value()


# The shipped file


def uncommented(text: str) -> str:
    """The shipped file with every option switched on: "#key:" is an option, "# words" is not."""
    return re.sub(r"^( *)#(\w+:.*)$", r"\1\2", text, flags=re.MULTILINE)


def keys_of(model: type[BaseModel]) -> set[str]:
    return set(model.model_fields) - ({"name"} if model is PoolConfig else set())


def test_shipped_file_has_every_option():
    tree = yaml.safe_load(uncommented(SHIPPED.read_text()))
    assert set(tree) == keys_of(Config)
    for section, model in (
        ("listen", ListenConfig),
        ("http", HttpConfig),
        ("console", ConsoleConfig),
        ("log", LogConfig),
    ):
        assert set(tree[section]) == keys_of(model), section
    assert set(tree["users"]["app"]) == keys_of(UserConfig)
    assert set(tree["pools"]["main"]) == keys_of(PoolConfig)


def test_values_commented_out_in_the_shipped_file_are_the_defaults():
    """An operator takes them for the defaults."""
    environ = {"DATABASE_URL": DSN, "APP_PASSWORD": "x"}
    shown = read(uncommented(SHIPPED.read_text()), environ)
    assert shown.pools["main"] == PoolConfig(name="main", dsn=SecretStr(DSN))
    assert (shown.listen, shown.http, shown.log) == (ListenConfig(), HttpConfig(), LogConfig())
    assert shown.drain_timeout == read(MINIMAL).drain_timeout


def test_shipped_file_as_it_is_means_the_defaults():
    assert load(SHIPPED, {"DATABASE_URL": DSN}) == read(MINIMAL)


def test_shipped_file_has_a_direct_pool_once_its_variable_is_set():
    config = load(SHIPPED, {"DATABASE_URL": DSN, "DIRECT_URL": "postgresql://owner@db/app"})
    direct = config.pools["direct"]
    assert list(config.pools) == ["main", "direct"]
    assert (direct.mode, direct.max_size, direct.min_idle) == (PoolMode.SESSION, 3, 0)
    assert direct.target.user == "owner"


def test_shipped_file_without_its_variable_says_which_one_to_set():
    with pytest.raises(ConfigError) as caught:
        load(SHIPPED, {})
    assert str(caught.value) == (
        "pools.main.dsn: needs DATABASE_URL, not set in the environment;"
        " set it, or write ${DATABASE_URL:-default}"
    )


def test_defaults_are_those_the_mission_fixes():
    main = read(MINIMAL).pools["main"]
    assert (main.max_size, main.min_idle) == (25, 5)
    assert (main.connect_timeout, main.acquire_timeout) == (30.0, 30.0)
    assert (main.idle_timeout, main.max_lifetime, main.ping_interval) == (300.0, 300.0, 30.0)
    assert main.mode is PoolMode.TRANSACTION


@pytest.mark.parametrize(
    "model",
    [Config, ListenConfig, HttpConfig, UserConfig, PoolConfig, ConsoleConfig, LogConfig],
)
def test_every_option_has_a_description(model: type[BaseModel]):
    assert [key for key, info in model.model_fields.items() if not info.description] == []


# Values


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30.0),
        ("5m", 300.0),
        ("100ms", 0.1),
        ("0.1s", 0.1),
        ("2h", 7200.0),
        ("1d", 86400.0),
        ("1m30s", 90.0),
        ("1h0m5s250ms", 3605.25),
        ("' 30s '", 30.0),
    ],
)
def test_duration_means_seconds(text: str, seconds: float):
    assert pool(f"idle_timeout: {text}").idle_timeout == seconds


@settings(deadline=None)
@given(
    st.integers(0, 6),
    st.integers(0, 23),
    st.integers(0, 59),
    st.integers(0, 59),
    st.integers(1, 999),
)
def test_duration_is_the_sum_of_its_parts(d: int, h: int, m: int, s: int, ms: int):
    seconds = (((d * 24 + h) * 60 + m) * 60 + s) + ms / 1000
    assert pool(f"idle_timeout: {d}d{h}h{m}m{s}s{ms}ms").idle_timeout == pytest.approx(seconds)


def test_zero_needs_no_unit():
    assert read(MINIMAL + "drain_timeout: 0").drain_timeout == 0.0


@pytest.mark.parametrize("text", ["30", "0.5"])
def test_bare_number_is_no_duration(text: str):
    """30 would be milliseconds to one reader and minutes to another."""
    assert problem(MINIMAL + f"drain_timeout: {text}") == (
        f"drain_timeout: '{text}' has no unit, write {text}s or {text}m; allowed: 0 to 1h"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-5s", "is negative; allowed: 0 to 1h"),
        ("2h", "is out of range; allowed: 0 to 1h"),
        ("soon", "is not a duration; allowed: 0 to 1h, written like 100ms, 30s"),
        ("''", "is not a duration"),
        ("1s1m", "is not a duration"),
        ("1m1m", "is not a duration"),
        ("5 parsecs", "is not a duration"),
        ("٣s", "is not a duration"),
        ("nan", "is not a duration"),
        ("[1s]", "is not a duration"),
    ],
)
def test_bad_duration_is_refused_with_what_is_allowed(text: str, words: str):
    line = problem(MINIMAL + f"drain_timeout: {text}")
    assert line.startswith("drain_timeout: ")
    assert words in line


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("max_size: abc", "max_size: 'abc' is not a whole number; allowed: 1 to 1000"),
        ("max_size: 2.5", "max_size: '2.5' is not a whole number; allowed: 1 to 1000"),
        ("max_size: true", "max_size: 'true' is not a whole number; allowed: 1 to 1000"),
        ("max_size: ", "max_size: '' is not a whole number; allowed: 1 to 1000"),
        ("max_size: [1]", "max_size: a list is not a whole number; allowed: 1 to 1000"),
        ("max_size: {a: 1}", "max_size: a mapping is not a whole number; allowed: 1 to 1000"),
        ("max_size: 0", "max_size: '0' is out of range; allowed: 1 to 1000"),
        ("max_size: 1001", "max_size: '1001' is out of range; allowed: 1 to 1000"),
        ("max_waiting: -1", "max_waiting: '-1' is out of range; allowed: 0 to 100000"),
        (
            "mode: query",
            "mode: 'query' is unknown; allowed: 'session', 'transaction' or 'statement'",
        ),
        (
            "mode: [session]",
            "mode: a list is unknown; allowed: 'session', 'transaction' or 'statement'",
        ),
    ],
)
def test_bad_value_is_told_with_path_value_and_what_is_allowed(options: str, line: str):
    with pytest.raises(ConfigError) as caught:
        pool(options)
    assert str(caught.value) == f"pools.main.{line}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("log: {level: loud}", "log.level: 'loud' is unknown; allowed: 'debug', 'info', "),
        ("log: {format: xml}", "log.format: 'xml' is unknown; allowed: 'text' or 'json'"),
        ("http: {access_log: maybe}", "http.access_log: 'maybe' is neither true nor false"),
        ("http: {host: ''}", "http.host: '' is empty; allowed: an address or a name"),
        ("listen: {host: [a]}", "listen.host: a list is not text; allowed: text"),
        ("listen: {auth: md5}", "listen.auth: 'md5' is unknown; allowed: 'scram-sha-256' or 'tr"),
        ("listen: {unix_socket_dir: tmp}", "listen.unix_socket_dir: 'tmp' is not usable; allowed"),
        (
            f"listen: {{unix_socket_dir: /{'x' * 92}}}",
            f"listen.unix_socket_dir: '/{'x' * 92}' is not usable; allowed: an absolute path of",
        ),
        ("users: {app: {password: ''}}", "users.app: a mapping without a secret; allowed: one of"),
        ("users: {app: }", "users.app: a mapping without a secret; allowed: one of password, "),
        ("listen: 6432", "listen: is not a mapping; allowed: host, port, "),
        ("users: [app]", "users: is not a mapping; allowed: names, each with its options"),
        ('drain_timeout: "1s\\0"', "drain_timeout: contains a zero byte"),
        ('drain_timeout: "\\ud800"', "drain_timeout: is not UTF-8 text"),
    ],
)
def test_bad_option_outside_of_pools_is_told_likewise(text: str, line: str):
    assert problem(MINIMAL + text).startswith(line)


@pytest.mark.parametrize("word", ["true", "yes", "on", "True"])
def test_flag_is_read_as_yaml_reads_it(word: str):
    assert read(MINIMAL + f"http: {{access_log: {word}}}").http.access_log is True


@pytest.mark.parametrize("nothing", ["", "''", "null", "~", "${SOCKET_DIR:-}"])
def test_socket_dir_can_be_nothing(nothing: str):
    text = f"listen:\n  unix_socket_dir: {nothing}\n"
    assert read(MINIMAL + text).listen.unix_socket_dir is None


@pytest.mark.parametrize("password", ["1234", "0123", "true", "null", "1e3", "2024-01-01", "1:30"])
def test_password_that_looks_like_something_else_stays_as_written(password: str):
    config = read(MINIMAL + f"users: {{app: {{password: {password}}}}}")
    assert password_of(config, "app") == password


def test_section_whose_options_are_all_commented_out_has_the_defaults():
    assert read(MINIMAL + "listen:\nusers:\nlog:\n") == read(MINIMAL)


def test_configuration_cannot_be_changed():
    config = read(MINIMAL)
    with pytest.raises(ValidationError):
        config.drain_timeout = 1.0


# Combinations


def test_min_idle_above_max_size_is_refused_with_both_values():
    with pytest.raises(ConfigError) as caught:
        pool("min_idle: 8, max_size: 6")
    assert str(caught.value) == (
        "pools.main.min_idle: '8' is more than max_size 6; allowed: 0 to 6"
    )


def test_min_idle_above_the_default_max_size_is_refused():
    with pytest.raises(ConfigError, match="min_idle: '26' is more than max_size 25"):
        pool("min_idle: 26")


@pytest.mark.parametrize(("max_size", "min_idle"), [(1, 1), (3, 3), (5, 5), (6, 5)])
def test_small_max_size_lowers_a_min_idle_that_was_not_given(max_size: int, min_idle: int):
    assert pool(f"max_size: {max_size}").min_idle == min_idle
    assert pool("", {"PGSIDECAR__POOLS__MAIN__MAX_SIZE": str(max_size)}).min_idle == min_idle


def test_override_of_max_size_below_a_given_min_idle_is_named():
    """Where the value that made it impossible comes from is not in the file."""
    with pytest.raises(ConfigError) as caught:
        pool("min_idle: 5", {"PGSIDECAR__POOLS__MAIN__MAX_SIZE": "3"})
    assert str(caught.value).endswith(
        "min_idle: '5' is more than max_size 3; allowed: 0 to 3"
        " (set by PGSIDECAR__POOLS__MAIN__MAX_SIZE)"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LocalHost"])
def test_trust_is_accepted_on_loopback(host: str):
    config = read(MINIMAL + f"listen: {{auth: trust, host: '{host}'}}")
    assert config.listen.auth == "trust"


def test_trust_is_accepted_on_a_unix_socket_alone():
    config = read(MINIMAL + "listen: {auth: trust, host: '', unix_socket_dir: /run/pg}")
    assert config.listen.auth == "trust"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "db.example", "localhost.example"])
def test_trust_is_refused_on_any_other_host_with_the_reason(host: str):
    line = problem(MINIMAL + f"listen: {{auth: trust, host: '{host}'}}")
    assert line.startswith(f"listen.auth: 'trust' would let everyone who can reach host '{host}'")
    assert "allowed: scram-sha-256, or a host on loopback" in line


def test_listening_nowhere_is_refused():
    assert problem(MINIMAL + "listen: {host: ''}") == (
        "listen: a mapping without host and without unix_socket_dir; allowed: one or both"
    )


# Keys and structure


def test_unknown_key_is_told_with_the_closest_and_all_valid_ones():
    line = problem(MINIMAL + "log: {levle: info}")
    assert line == "log.levle: unknown key, did you mean level?; allowed: level, format"


def test_unknown_top_level_key_is_told():
    line = problem(MINIMAL + "pool: {}")
    assert line == (
        "pool: unknown key, did you mean pools?;"
        " allowed: listen, http, console, statements, incidents, log, users, pools, drain_timeout"
    )


def test_key_with_a_line_break_does_not_break_the_line():
    assert problem(MINIMAL + 'log: {"le\\nvel": info}').startswith("log.***: unknown key")


def test_name_of_a_pool_is_its_key_only():
    line = problem(f"pools: {{main: {{dsn: '{DSN}', name: other}}}}")
    assert line.startswith("pools.main.name: unknown key; allowed: dsn, mode, ")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("my pool", "pools.my pool: 'my pool' is not a pool's name; allowed: 1 to 63 of A-Z"),
        ("''", "pools.: '' is not a pool's name"),
        ("pgsidecar", "pools.pgsidecar: 'pgsidecar' is the name of the console; allowed: any "),
        ("x" * 64, "is not a pool's name"),
    ],
)
def test_pool_name_that_cannot_be_is_refused(name: str, line: str):
    assert line in problem(f"pools: {{{name}: {{dsn: '{DSN}'}}}}")


def test_user_name_longer_than_postgresql_has_is_refused():
    line = problem(MINIMAL + f"users: {{{'ü' * 32}: {{password: x}}}}")
    assert "is not a user's name; allowed: 1 to 63 bytes" in line


@pytest.mark.parametrize("text", ["", "# nothing\n", "log: {}"])
def test_missing_pools_are_told(text: str):
    assert problem(text) == "pools: is missing; allowed: The pools by name, at least one."


def test_missing_dsn_is_told():
    assert problem("pools: {main: {max_size: 3}}").startswith("pools.main.dsn: is missing; allowed")


def test_pool_with_an_empty_dsn_is_left_out():
    text = f"pools: {{main: {{dsn: '{DSN}'}}, direct: {{dsn: '${{DIRECT_URL:-}}'}}}}"
    assert list(read(text).pools) == ["main"]


def test_options_of_a_pool_that_is_left_out_are_checked_all_the_same():
    """Else a mistake shows only in the environment where its dsn is set."""
    line = problem(f"pools: {{main: {{dsn: '{DSN}'}}, direct: {{dsn: '', max_size: none}}}}")
    assert line.startswith("pools.direct.max_size: 'none' is not a whole number")


def test_no_pool_left_is_refused():
    assert problem("pools: {main: {dsn: ''}, direct: {dsn: ' '}}") == (
        "pools: a mapping without a pool (left out, as their dsn is empty: main, direct);"
        " allowed: at least one with a dsn"
    )
    assert problem("pools: {}") == (
        "pools: a mapping without a pool; allowed: at least one with a dsn"
    )


def test_all_problems_are_told_at_once():
    lines = problems(
        """\
pools:
  main:
    dsn: ${NOT_SET}
    max_size: abc
    max_size: 3
    mode: foo
listen: {port: 99999, hots: x}
""",
        {"PGSIDECAR__LOG__LEVLE": "info"},
    )
    starts = [
        "config.yaml, line 5, column 5: max_size is given twice, first in line 4",
        "PGSIDECAR__LOG__LEVLE: names no option, did you mean level?",
        "pools.main.dsn: needs NOT_SET",
        "listen.port: '99999' is out of range",
        "listen.hots: unknown key, did you mean host?",
        "pools.main.mode: 'foo' is unknown",
        "pools.main.max_size: 'abc' is not a whole number",
    ]
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("listen:\n  port: 1\n host: x\n", "line 3, column 2: expected <block end>, but found"),
        ("listen: {port: 1\n", "line 2, column 1: expected ',' or '}', but got '<stream end>'"),
        ("a: b: c\n", "line 1, column 5: mapping values are not allowed here"),
        ("\tlisten: {}\n", "line 1, column 1: found character '\\t' that cannot start any token"),
        ("a: *nobody\n", "line 1, column 4: found undefined alias ***"),
        ("a: &a {b: *a}\n", "line 1, column 4: found unconstructable recursive node"),
        ("? [a]\n: b\n", "line 1, column 3: a key must be a word"),
        ("a: x\n---\nb: y\n", "line 2, column 1: but found another document"),
        ("a:\n  b: x\x07", "line 2, column 7: special characters are not allowed"),
        ("a: " + "[" * 5000, "line 1, column 1: nested too deeply"),
    ],
)
def test_text_that_is_not_yaml_is_told_with_line_and_column(text: str, line: str):
    assert problem(text).startswith(f"config.yaml, {line}")


def test_text_that_is_not_a_mapping_is_refused():
    assert problem("just words").startswith("config.yaml: is not a mapping; allowed: listen, ")


def test_aliased_pools_are_overridden_one_at_a_time():
    """Both have the same node in YAML; the override must not reach the second through the first."""
    text = f"pools:\n  main: &it {{dsn: '{DSN}'}}\n  other: *it\n"
    config = read(text, {"PGSIDECAR__POOLS__MAIN__MAX_SIZE": "7"})
    assert [p.max_size for p in config.pools.values()] == [7, 25]


def test_file_that_is_missing_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load(tmp_path / "nowhere.yaml", {})


def test_directory_in_place_of_the_file_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path, {})


def test_file_that_is_not_utf8_is_told(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"log: \xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text, see byte 6"):
        load(path, {})


def test_file_with_a_byte_order_mark_is_read(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL, encoding="utf-8-sig")
    assert load(path, {}) == read(MINIMAL)


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:{}[]$-#&*!|>'\" \n\t${}\\0é\x00\x85"), max_size=40))
def test_any_text_ends_in_a_configuration_or_a_config_error(text: str):
    for whole in (text, MINIMAL + text, MINIMAL + "log: " + text):
        try:
            read(whole)
        except ConfigError as exc:
            reason = str(exc)
        else:
            reason = "none"
        assert reason


# Variables in the file


@pytest.mark.parametrize(
    ("written", "environ", "meant"),
    [
        ("${A}", {"A": "x"}, "x"),
        ("a${A}c${B}", {"A": "x", "B": "y"}, "axcy"),
        ("${A}", {"A": ""}, ""),
        ("${A:-d}", {}, "d"),
        ("${A:-d}", {"A": ""}, "d"),
        ("${A:-d}", {"A": "x"}, "x"),
        ("${A:-}", {}, ""),
        ("${A:-${B}}", {"B": "y"}, "y"),
        ("${A:-${B:-c}d}e", {}, "cde"),
        ("${A:-${NOT_SET}}", {"A": "x"}, "x"),
        ("${A:-$${B}}", {}, "${B}"),
        ("$$", {}, "$"),
        ("$${A}", {"A": "x"}, "${A}"),
        ("$$$${A}", {"A": "x"}, "$${A}"),
        ("$A}", {"A": "x"}, "$A}"),
        ("cost$", {}, "cost$"),
        ("${A}", {"A": "${B}$$"}, "${B}$$"),
    ],
)
def test_variables_expand(written: str, environ: dict[str, str], meant: str):
    assert config_text.expand({"key": written}, environ) == ({"key": meant}, {})


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("${A}", "needs A, not set in the environment; set it, or write ${A:-default}"),
        ("${A}${B}${A}", "needs A, B, not set"),
        ("${A:-${B}}", "needs B, not set"),
        ("${A", "has a ${ that is neither ${NAME} nor ${NAME:-default}"),
        ("${}", "has a ${ that is neither"),
        ("${1}", "has a ${ that is neither"),
        ("${A-b}", "has a ${ that is neither"),
        ("${A:-b", "has a ${ without its }"),
    ],
)
def test_variable_that_cannot_expand_is_told_with_its_path(written: str, words: str):
    line = problem(MINIMAL + f"users: {{app: {{password: '{written}'}}}}")
    assert line.startswith(f"users.app.password: {words}")


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_text_with_doubled_dollars_means_itself(text: str):
    assert config_text.expand(text.replace("$", "$$"), {}) == (text, {})


def test_expanded_number_is_a_number():
    assert pool("max_size: '${N:-25}'").max_size == 25
    assert pool("max_size: '${N:-25}'", {"N": "7"}).max_size == 7


def test_expanded_password_stays_text():
    config = read(MINIMAL + "users: {app: {password: '${PW}'}}", {"PW": "1234"})
    assert password_of(config, "app") == "1234"


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_value_of_a_variable_cannot_bring_in_yaml(value: str):
    config = read(MINIMAL + "users:\n  app:\n    password: ${PW}\n", {"PW": value})
    assert password_of(config, "app") == value
    assert list(config.users) == ["app"]


# Overrides


@pytest.mark.parametrize(
    "variable",
    [
        "PGSIDECAR__POOLS__MAIN__MAX_SIZE",
        "pgsidecar__pools__main__max_size",
        "PGSIDECAR__pools__Main__MAX_size",
    ],
)
def test_override_is_found_in_any_case(variable: str):
    assert pool("max_size: 3", {variable: "10"}).max_size == 10


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("read-only", "READ_ONLY"),
        ("a.b", "A_B"),
        ("a__b", "A__B"),
        ("Main", "MAIN"),
        ("a-b", "A-B"),
    ],
)
def test_override_finds_a_pool_whose_name_a_variable_cannot_have(name: str, part: str):
    text = f"pools: {{{name}: {{dsn: '{DSN}'}}}}"
    config = read(text, {f"PGSIDECAR__POOLS__{part}__MAX_SIZE": "7"})
    assert {pool.name: pool.max_size for pool in config.pools.values()} == {name: 7}


def test_override_reaches_every_section():
    config = read(
        MINIMAL + "listen:\n",
        {
            "PGSIDECAR__LISTEN__PORT": "5432",
            "PGSIDECAR__HTTP__ACCESS_LOG": "on",
            "PGSIDECAR__LOG__LEVEL": "debug",
            "PGSIDECAR__DRAIN_TIMEOUT": "1m",
            "PGSIDECAR__USERS__BOB__PASSWORD": "builder",
        },
    )
    assert (config.listen.port, config.http.access_log, config.log.level) == (5432, True, "debug")
    assert config.drain_timeout == 60.0
    assert password_of(config, "bob") == "builder"


def test_overrides_alone_can_make_a_pool():
    config = read(
        "", {"PGSIDECAR__POOLS__MAIN__DSN": DSN, "PGSIDECAR__POOLS__MAIN__MODE": "session"}
    )
    assert config.pools["main"].mode is PoolMode.SESSION


def test_override_makes_up_for_a_variable_that_is_not_set():
    config = read("pools: {main: {dsn: '${NOT_SET}'}}", {"PGSIDECAR__POOLS__MAIN__DSN": DSN})
    assert config.pools["main"].target.user == "app"


def test_override_with_an_empty_dsn_leaves_a_pool_out():
    text = f"pools: {{main: {{dsn: '{DSN}'}}, other: {{dsn: '{DSN}'}}}}"
    assert list(read(text, {"PGSIDECAR__POOLS__OTHER__DSN": ""}).pools) == ["main"]


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_value_of_an_override_is_taken_as_it_is(value: str):
    """A password may contain a dollar sign; nothing tells its owner to double it."""
    config = read(MINIMAL, {"PGSIDECAR__USERS__APP__PASSWORD": value})
    assert password_of(config, "app") == value


def test_variables_without_the_prefix_are_ignored():
    assert read(MINIMAL, {"PGSIDECAR_PORT": "1", "PGSIDECAR": "2", "PORT": "3"}) == read(MINIMAL)


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("PGSIDECAR__LISTEN__PRT", "names no option, did you mean port?; allowed: host, port"),
        ("PGSIDECAR__POOLS__MAIN__NAME", "names no option; allowed: dsn, mode"),
        ("PGSIDECAR__POOLS__MAIN", "names no option; allowed after PGSIDECAR__: DRAIN_TIMEOUT, "),
        ("PGSIDECAR__POOLS", "names no option; allowed after PGSIDECAR__: "),
        ("PGSIDECAR__LISTEN__PORT__X", "names no option; allowed after PGSIDECAR__: "),
        ("PGSIDECAR__", "names no option; allowed after PGSIDECAR__: "),
        ("PGSIDECAR__PORT", "names no option; allowed after PGSIDECAR__: "),
    ],
)
def test_override_of_nothing_is_told_by_its_variable(variable: str, words: str):
    assert problem(MINIMAL, {variable: "1"}).startswith(f"{variable}: {words}")


def test_bad_value_of_an_override_is_told_with_its_variable():
    assert problem(MINIMAL, {"PGSIDECAR__POOLS__MAIN__MAX_SIZE": "many"}) == (
        "pools.main.max_size: 'many' is not a whole number; allowed: 1 to 1000"
        " (set by PGSIDECAR__POOLS__MAIN__MAX_SIZE)"
    )


def test_override_that_misspells_a_pool_is_told_with_its_variable():
    """It makes a pool, which then has no dsn: without the variable, nobody finds out why."""
    line = problem(MINIMAL, {"PGSIDECAR__POOLS__MIAN__MAX_SIZE": "3"})
    assert line.startswith("pools.mian.dsn: is missing")
    assert line.endswith("(set by PGSIDECAR__POOLS__MIAN__MAX_SIZE)")


def test_two_overrides_of_one_option_are_refused():
    lines = problems(MINIMAL, {"PGSIDECAR__LISTEN__PORT": "1", "PGSIDECAR__LISTEN__port": "2"})
    assert lines == [
        "PGSIDECAR__LISTEN__port: sets listen.port, as PGSIDECAR__LISTEN__PORT does;"
        " allowed: one of them"
    ]


def test_override_that_may_mean_two_pools_is_refused():
    text = f"pools: {{a-b: {{dsn: '{DSN}'}}, a.b: {{dsn: '{DSN}'}}}}"
    line = problem(text, {"PGSIDECAR__POOLS__A_B__MAX_SIZE": "3"})
    assert line.startswith("PGSIDECAR__POOLS__A_B__MAX_SIZE: may mean a-b or a.b")


def test_override_below_what_is_not_a_section_leaves_the_problem_to_the_section():
    environ = {"PGSIDECAR__LISTEN__PORT": "1", "PGSIDECAR__POOLS__MAIN__MAX_SIZE": "3"}
    lines = problems("listen: 3\npools: [1]", environ)
    assert [line.split(";")[0] for line in lines] == [
        "listen: is not a mapping",
        "pools: is not a mapping",
    ]


# Connection strings


def server(
    host: str,
    port: int,
    database: str,
    user: str,
    password: SecretStr | None = None,
    parameters: dict[str, str] | None = None,
) -> ServerTarget:
    """A target with one host and nothing special."""
    return ServerTarget((Host(host, port),), database, user, password, parameters or {})


def tls(dsn: str) -> TlsPolicy:
    return parse_dsn(f"user=u {dsn}").tls


@pytest.mark.parametrize(
    ("dsn", "target"),
    [
        ("postgresql://u@h/d", server("h", 5432, "d", "u")),
        ("postgres://u@h:5433", server("h", 5433, "u", "u")),
        ("postgresql://u:p%40%2F%3A@h/d", server("h", 5432, "d", "u", SecretStr("p@/:"))),
        ("postgresql://u@/d", server("localhost", 5432, "d", "u")),
        ("postgresql://u@[::1]:6000/d", server("::1", 6000, "d", "u")),
        ("postgresql://u@%2Frun%2Fpg/d", server("/run/pg", 5432, "d", "u")),
        ("postgresql:///d?host=/run/pg&user=u", server("/run/pg", 5432, "d", "u")),
        ("user=u", server("localhost", 5432, "u", "u")),
        ("  user=u host=h\n", server("h", 5432, "u", "u")),
        ("host=h hostaddr=10.0.0.1 user=u", ServerTarget((Host("h", 5432, "10.0.0.1"),), "u", "u")),
        (r"user=u password='it\'s = so'", server("localhost", 5432, "u", "u", SecretStr("it's = so"))),
        ("user=u password='' dbname=''", server("localhost", 5432, "u", "u")),
        ("user=u sslmode=prefer gssencmode=disable channel_binding=prefer", server("localhost", 5432, "u", "u")),
        ("user=u target_session_attrs=any", server("localhost", 5432, "u", "u")),
        (
            "postgresql://u@h/d?application_name=a&client_encoding=UTF8&options=-c%20work_mem%3D1MB",
            server(
                "h", 5432, "d", "u", None,
                {"application_name": "a", "client_encoding": "UTF8", "options": "-c work_mem=1MB"},
            ),
        ),
        (
            "user=u fallback_application_name=f",
            server("localhost", 5432, "u", "u", None, {"application_name": "f"}),
        ),
        (
            "user=u fallback_application_name=f application_name=a",
            server("localhost", 5432, "u", "u", None, {"application_name": "a"}),
        ),
    ],
)  # fmt: skip
def test_connection_string_means_what_libpq_takes_it_for(dsn: str, target: ServerTarget):
    assert parse_dsn(dsn) == target


@pytest.mark.parametrize(
    ("dsn", "words"),
    [
        ("postgresql://h/d", "it names no user"),
        ("user=u host=a port=1,2", "it has 1 hosts, 1 addresses and 2 ports"),
        ("user=u host=a,b hostaddr=10.0.0.1", "it has 2 hosts, 1 addresses and 2 ports"),
        ("user=u host=" + ",".join("x" * 101), "it names 101 hosts; allowed: at most 100"),
        ("user=u hostaddr=db.example", "its hostaddr is not an IP address"),
        ("user=u host=a,b port=1,x", "its port is not a number from 1 to 65535"),
        ("user=u port=abc", "its port is not a number from 1 to 65535"),
        ("user=u port=65536", "its port is not a number from 1 to 65535"),
        ("user=u port=0", "its port is not a number from 1 to 65535"),
        (
            "user=u sslmode=requir",
            "allowed for sslmode: disable, allow, prefer, require, verify-ca, verify-full",
        ),
        ("user=u sslmode=verify-full", "sslmode verify-full needs sslrootcert, a file or system"),
        ("user=u sslmode=verify-ca", "sslmode verify-ca needs sslrootcert"),
        (
            "user=u sslmode=require sslrootcert=system",
            "sslrootcert=system is for sslmode verify-full",
        ),
        (
            "user=u sslrootcert=system sslsni=0",
            "sslsni=0 is not available with sslmode verify-full",
        ),
        ("user=u sslnegotiation=direct", "sslnegotiation=direct is for sslmode require"),
        ("user=u sslcert=/c", "sslcert and sslkey belong together"),
        ("user=u sslkey=/k", "sslcert and sslkey belong together"),
        (
            "user=u ssl_min_protocol_version=TLSv1.1",
            "allowed for ssl_min_protocol_version: TLSv1.2",
        ),
        (
            "user=u ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2",
            "ssl_min_protocol_version is more than ssl_max_protocol_version",
        ),
        ("user=u channel_binding=yes", "allowed for channel_binding: disable, prefer, require"),
        ("user=u require_auth=scram", "allowed for require_auth: password, md5"),
        ("user=u require_auth=md5,!password", "allowed for require_auth: password, md5"),
        ("user=u scram_client_key=AAAA", "are not both 32 bytes in base64"),
        ("user=u scram_client_key=AAAA scram_server_key=!", "are not both 32 bytes in base64"),
        ("user=u target_session_attrs=master", "allowed for target_session_attrs: any, read-write"),
        ("user=u load_balance_hosts=yes", "allowed for load_balance_hosts: disable, random"),
        ("user=u keepalives_idle=x", "keepalives_idle is not a whole number"),
        ("user=u gssencmode=require", "allowed for gssencmode: disable, prefer"),
        ("user=u sslkeylogfile=/x", "sslkeylogfile is not available in this version, leave it out"),
        ("service=x user=u", "service is not available in this version, leave it out"),
        ("user=u passfile=/x", "passfile is not available in this version, leave it out"),
        ("user=u connect_timeout=3", "connect_timeout belongs to the pool's options"),
        ("user=u ssl_mode=prefer", "invalid connection option ***, did you mean sslmode?"),
        ("postgresql://u@h/d?pgbouncer=true", "invalid URI query parameter: ***"),
        ("nonsense", "is not a connection string"),
        ("mysql://u@h/d", "is not a connection string"),
        ("postgresql://u:%zz@h/d", "is not a connection string"),
        ("postgresql://u:%ff@h/d", "is not a connection string"),
    ],
)
def test_connection_string_that_cannot_be_used_is_told_why(dsn: str, words: str):
    line = problem(f"pools: {{main: {{dsn: '{dsn}'}}}}")
    assert line.startswith("pools.main.dsn: *** ")
    assert words in line


def test_all_problems_of_a_connection_string_are_told():
    line = problem("pools: {main: {dsn: 'host=a port=1,2 sslmode=verify-ca'}}")
    assert line == (
        "pools.main.dsn: *** cannot be used: it has 1 hosts, 1 addresses and 2 ports; allowed: as many"
        " of each, or one port for all; sslmode verify-ca needs sslrootcert, a file or system;"
        " it names no user"
    )


@pytest.mark.parametrize(
    ("dsn", "hosts"),
    [
        ("host=a,b", [("a", 5432, ""), ("b", 5432, "")]),
        ("host=a,b port=1", [("a", 1, ""), ("b", 1, "")]),
        ("host=a,b port=1,2", [("a", 1, ""), ("b", 2, "")]),
        ("host=a,,/run port=1,,2", [("a", 1, ""), ("localhost", 5432, ""), ("/run", 2, "")]),
        ("host=a,b hostaddr=10.0.0.1,", [("a", 5432, "10.0.0.1"), ("b", 5432, "")]),
        ("hostaddr=10.0.0.1,::1", [("10.0.0.1", 5432, "10.0.0.1"), ("::1", 5432, "::1")]),
    ],
)
def test_several_hosts_are_read_by_position(dsn: str, hosts: list[tuple[str, int, str]]):
    assert parse_dsn(f"user=u {dsn}").hosts == tuple(Host(*each) for each in hosts)


def test_several_hosts_of_a_url_are_read():
    target = parse_dsn("postgresql://u@a:1,[::1]:2,c/d?target_session_attrs=read-write")
    assert target.hosts == (Host("a", 1), Host("::1", 2), Host("c", 5432))
    assert target.session_attrs is SessionAttrs.READ_WRITE
    assert parse_dsn("user=u load_balance_hosts=random").is_balanced


def test_options_of_tls_are_read():
    files = "sslrootcert=/r sslcert=/c sslkey=/k sslpassword=p sslcrl=/l"
    assert tls(f"sslmode=verify-full {files} sslnegotiation=direct") == TlsPolicy(
        SslMode.VERIFY_FULL, "/r", "/c", "/k", SecretStr("p"), "/l", is_direct=True
    )
    assert tls("ssl_min_protocol_version=tlsv1.3 ssl_max_protocol_version=TLSv1.3") == TlsPolicy(
        oldest="TLSv1.3", newest="TLSv1.3"
    )
    assert tls("sslsni=0") == TlsPolicy(names_server=False)
    assert tls("sslcert=/c sslkey=/k sslcertmode=disable") == TlsPolicy()


def test_certificates_of_the_system_are_for_full_checks():
    """As in libpq: anybody can have one that a public CA has signed, for a name of its own."""
    assert tls("sslrootcert=system").mode is SslMode.VERIFY_FULL


@pytest.mark.parametrize(
    ("mode", "attempts"),
    [
        ("", (True, False)),
        ("sslmode=disable", (False,)),
        ("sslmode=allow", (False, True)),
        ("sslmode=prefer", (True, False)),
        ("sslmode=require", (True,)),
        ("sslmode=verify-ca sslrootcert=/r", (True,)),
        ("sslmode=verify-full sslrootcert=/r", (True,)),
    ],
)
def test_sslmode_says_what_is_tried_in_which_order(mode: str, attempts: tuple[bool, ...]):
    assert tls(mode).attempts == attempts


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("scram-sha-256", frozenset({"scram-sha-256"})),
        ("md5, password", frozenset({"md5", "password"})),
        ("!password,!md5,!gss,!sspi,!oauth", frozenset({"scram-sha-256", "none"})),
    ],
)
def test_allowed_methods_are_read(text: str, methods: frozenset[str]):
    assert parse_dsn(f"user=u require_auth='{text}'").methods == methods
    assert parse_dsn("user=u").methods is None


def test_keys_for_scram_are_read_and_not_shown():
    key = base64.b64encode(bytes(range(32))).decode()
    target = parse_dsn(f"user=u scram_client_key={key} scram_server_key={key}")
    assert target.scram_keys == ScramKeys(bytes(range(32)), bytes(range(32)))
    assert repr(bytes(range(5, 9)))[2:-1] not in repr(target)


def test_options_of_the_socket_are_read():
    target = parse_dsn("user=u keepalives=1 keepalives_idle=60 tcp_user_timeout=5000")
    assert target.socket_options == {
        "keepalives": 1,
        "keepalives_idle": 60,
        "tcp_user_timeout": 5000,
    }


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://u:p@h:5433/d", "h:5433"),
        ("postgresql://u:p@[::1]/d", "[::1]:5432"),
        ("host=/run/pg user=u", "/run/pg/.s.PGSQL.5432"),
        ("host=a,b port=1,2 user=u", "a:1,b:2"),
        ("host=a,b,c,d,e user=u", "a:5432,b:5432,c:5432,+2"),
    ],
)
def test_server_is_described_by_its_address(dsn: str, shown: str):
    assert parse_dsn(dsn).describe() == shown


def test_environment_of_libpq_is_not_read(monkeypatch: pytest.MonkeyPatch):
    """The environment is a parameter: PGHOST set for psql must not redirect a pool."""
    for name, value in {"PGHOST": "other", "PGUSER": "other", "PGSERVICE": "none"}.items():
        monkeypatch.setenv(name, value)
    assert parse_dsn("user=u") == server("localhost", 5432, "u", "u")
    with pytest.raises(ValueError, match="it names no user"):
        parse_dsn("host=h")
    with pytest.raises(ValueError, match="did you mean sslmode"):
        parse_dsn("ssl_mode=x")


# Secrets

SECRET = "S3cr3t"


@pytest.mark.parametrize(
    "text",
    [
        f"pools: {{main: {{dsn: 'postgresql://u:{SECRET}@h/d', max_size: x}}}}",
        f"pools: {{main: {{dsn: 'postgresql://u:{SECRET}@a,b/d?sslmode=x'}}}}",
        f"pools: {{main: {{dsn: 'postgresql://u:my {SECRET}@h/d'}}}}",
        f"pools: {{main: {{dsn: 'postgresql://u:%{SECRET}@h/d'}}}}",
        f"pools: {{main: {{dsn: 'postgresql://u:p@{SECRET}@h:x/d?y'}}}}",
        f"pools: {{main: {{dsn: 'postgresql://u:p@{SECRET}?{SECRET}=1@h/d'}}}}",
        f"pools: {{main: {{dsn: 'postgresql://u@h/d?{SECRET}=1'}}}}",
        f"pools: {{main: {{dsn: 'postgresql://u@h:{SECRET}/d'}}}}",
        f"pools: {{main: {{dsn: 'user=u password=my {SECRET}'}}}}",
        f"pools: {{main: {{dsn: 'user=u password=my {SECRET}=1'}}}}",
        f"pools: {{main: {{dsn: 'user=u password=\"my {SECRET}\"'}}}}",
        f'pools: {{main: {{dsn: "user=u password=\'{SECRET}"}}}}',
        f"pools: {{main: {{dsn: '{SECRET}'}}}}",
        f"pools: {{main: {{dsn: ['{SECRET}']}}}}",
        f"pools: {{main: {{dsn: {{password: '{SECRET}'}}}}}}",
        f"pools: {{main: 'postgresql://u:{SECRET}@h/d'}}",
        f"pools: 'postgresql://u:{SECRET}@h/d'",
        f"pools: ['postgresql://u:{SECRET}@h/d']",
        f"pools: {{'postgresql://u:{SECRET}@h/d': }}",
        f"pools:\n  main:\n    dsn:postgresql://u:{SECRET}@h/d",
        f"pools:\n  main:\n    dsn:postgresql://u:{SECRET}@h/d\n    max_size: 3",
        f"users: {{app: {SECRET}}}",
        f"users: {{app: [{SECRET}]}}",
        f"users: {{app: {{passwd: {SECRET}}}}}",
        f"users: {{app: {{password:{SECRET}}}}}",
        f"users: {{app: {{password={SECRET}}}}}",
        f"users: {{app: {{password: [{SECRET}]}}}}",
        f"users: {{app: {{password: *{SECRET}}}}}",
        f"users: {{app: {{password: !{SECRET}}}}}",
        f"users: {{app: {{password: !{SECRET}!x}}}}",
        f"users: {{app: {{password: '${{{SECRET}'}}}}",
        f"users: {{app: {{password: '${{A:-{SECRET}'}}}}",
        f"users: {{app: {{password: '{SECRET}${{NOT_SET}}'}}}}",
        f"users: {{app: {{password: {SECRET}, password: {SECRET}}}}}",
        f"users:\n  app:\n    password: {SECRET}: x\n",
        f"users:\n  app:\n    password: @{SECRET}\n",
        f"users:\n  app:\n    password: %{SECRET}\n",
        f"users:\n  app:\n    password: '{SECRET}\n",
        f"users:\n  app:\n    password: '{SECRET}' x\n",
        f'users:\n  app:\n    password: "{SECRET}\\q"\n',
        f'users:\n  app:\n    password: "{SECRET}\\0"\n',
        f"{SECRET}",
        f"[{SECRET}]",
    ],
)
def test_no_error_contains_a_secret(text: str):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert SECRET not in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PGSIDECAR__POOLS__MAIN__DSN", f"postgresql://u:{SECRET}@a,b/d?sslmode=x"),
        ("PGSIDECAR__POOLS__MAIN__DSN", f"{SECRET}\udcff"),
        ("PGSIDECAR__POOLS__MAIN", f"postgresql://u:{SECRET}@h/d"),
        ("PGSIDECAR__USERS__APP", SECRET),
        ("PGSIDECAR__USERS__APP__PASSWD", SECRET),
    ],
)
def test_no_error_contains_a_secret_of_an_override(variable: str, value: str):
    with pytest.raises(ConfigError) as caught:
        read(MINIMAL, {variable: value})
    assert SECRET not in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@settings(deadline=None)
@given(st.text(max_size=12), st.text(max_size=12), st.sampled_from(["'%s'", '"%s"', "%s"]))
def test_no_connection_string_shows_in_an_error(before: str, after: str, quotes: str):
    dsn = f"postgresql://u:{before}{SECRET}{after}@h:{SECRET}/d"
    words = f"user=u password={quotes % (before + SECRET + after)} {SECRET}"
    for text in (dsn, words):
        try:
            printed = repr(parse_dsn(text).password)
        except ValueError as exc:
            printed = "".join(traceback.format_exception(exc))
        assert SECRET not in printed


def test_no_repr_and_no_printout_contains_a_secret():
    config = read(
        f"pools: {{main: {{dsn: 'postgresql://u:{SECRET}@h/d'}}}}\n"
        f"users: {{app: {{password: {SECRET}}}}}"
    )
    target = config.pools["main"].target
    assert target.password == SecretStr(SECRET)
    printed = [config, config.pools, target, redacted(config), config.model_dump_json()]
    for thing in printed:
        assert SECRET not in f"{thing!r} {thing}"


def test_model_built_in_code_keeps_secrets_out_of_its_error():
    with pytest.raises(ValidationError) as caught:
        PoolConfig(name="main", dsn=SecretStr(f"user=u password={SECRET} x"))
    assert SECRET not in "".join(traceback.format_exception(caught.value))


# Printing


def test_printout_shows_secrets_as_stars_and_where_pools_lead():
    config = read("pools: {main: {dsn: 'postgresql://u:p@h/d'}}\nusers: {app: {password: x}}")
    shown = json.loads(json.dumps(redacted(config)))
    assert shown["users"]["app"] == {"password": "***", "max_clients": 0}
    main = shown["pools"]["main"]
    assert (main["dsn"], main["mode"], main["idle_timeout"]) == ("***", "transaction", "300s")
    assert (main["server"], main["database"], main["user"]) == ("h:5432", "d", "u")
    assert "name" not in main


@settings(deadline=None)
@given(
    st.integers(1, 1000), st.integers(1, 7 * 86_400_000), st.sampled_from(PoolMode), st.booleans()
)
def test_printout_can_be_read_again(max_size: int, idle_ms: int, mode: PoolMode, access_log: bool):
    """Except for the secrets, which overrides give here."""
    main = PoolConfig(
        name="main", dsn=SecretStr(DSN), mode=mode, max_size=max_size, idle_timeout=idle_ms / 1000
    )
    config = Config(pools={"main": main}, http=HttpConfig(access_log=access_log))
    text = yaml.safe_dump(redacted(config))
    text = re.sub("^ +(server|database|user): .*\n", "", text, flags=re.MULTILINE)
    assert read(text, {"PGSIDECAR__POOLS__MAIN__DSN": DSN}) == config


# Which pool a client means

POOLS = """\
pools:
  main: {dsn: 'postgresql://u@h/app'}
  direct: {dsn: 'postgresql://u@h/app', mode: session}
  stats: {dsn: 'postgresql://u@h/warehouse'}
  app2: {dsn: 'postgresql://u@h/main'}
"""


@pytest.mark.parametrize(
    ("database", "name"),
    [("main", "main"), ("direct", "direct"), ("stats", "stats"), ("warehouse", "stats")],
)
def test_pool_is_found_by_its_name_before_its_database(database: str, name: str):
    assert read(POOLS).pool_for(database).name == name


@pytest.mark.parametrize("database", ["other", "", "Main", "pgsidecar"])
def test_database_without_a_pool_does_not_exist(database: str):
    with pytest.raises(SidecarError) as caught:
        read(POOLS).pool_for(database)
    assert caught.value.sqlstate == "3D000"
    assert caught.value.message == f'database "{database}" does not exist'
    assert caught.value.hint == "The pools are: app2, direct, main, stats."


def test_database_of_several_pools_is_ambiguous():
    with pytest.raises(SidecarError) as caught:
        read(POOLS).pool_for("app")
    assert caught.value.sqlstate == "3D000"
    assert caught.value.message == 'database "app" is served by several pools: direct, main'
    assert "dbname=<pool>" in caught.value.hint


# Templates

TEMPLATES = """\
pools:
  main: {dsn: 'postgresql://u@h/app'}
  tenant_*: {dsn: 'postgresql://h:5433'}
  tenant_eu_*: {dsn: 'postgresql://app@h/'}
  '*_eu_*': {dsn: 'host=h dbname=one'}
  '*': {dsn: 'postgresql://app:secret@h/all', max_size: 3}
"""


@pytest.mark.parametrize(
    ("database", "name"),
    [
        ("main", "main"),
        ("app", "main"),
        ("tenant_1", "tenant_*"),
        ("tenant_", "tenant_*"),
        ("tenant_eu_1", "tenant_eu_*"),
        ("x_eu_1", "*_eu_*"),
        ("tenant", "*"),
        ("Tenant_1", "*"),
        ("*", "*"),
        ("anything at all", "*"),
    ],
)
def test_most_specific_template_is_meant_after_pools(database: str, name: str):
    assert read(TEMPLATES).pool_for(database).name == name


def test_database_that_no_pattern_matches_does_not_exist():
    text = TEMPLATES.replace("'*':", "'other*':")
    with pytest.raises(SidecarError, match='database "nowhere" does not exist') as caught:
        read(text).pool_for("nowhere")
    assert "tenant_*" in caught.value.hint


def test_several_pools_of_a_database_are_not_a_template_s_matter():
    """Who adds a template does not want it to take what an error was before."""
    with pytest.raises(SidecarError, match="served by several pools: direct, main"):
        read(POOLS + "  '*': {dsn: 'postgresql://h'}\n").pool_for("app")


def test_template_may_leave_database_and_user_to_the_client():
    pools = read(TEMPLATES).pools
    found = {name: (pool.target.database, pool.target.user) for name, pool in pools.items()}
    assert found == {
        "main": ("app", "u"),
        "tenant_*": ("", ""),
        "tenant_eu_*": ("", "app"),
        "*_eu_*": ("one", ""),
        "*": ("all", "app"),
    }
    assert [pool.min_idle for pool in pools.values()] == [5, 0, 0, 0, 0]
    assert [pool.is_template for pool in pools.values()] == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("dsn: 'postgresql://:pw@h'", "pools.t*.dsn: *** cannot be used: it has a password and no"),
        ("dsn: 'postgresql://h', min_idle: 26", "pools.t*.min_idle: '26' is more than max_size 25"),
        ("dsn: 'postgresql://h', auth_query: SELECT 1", "with auth_dsn, too"),
        ("dsn: 'postgresql://u@h', auth_query: SELECT 1", "with auth_dsn, too"),
    ],
)
def test_template_that_cannot_work_is_refused(options: str, problem: str):
    with pytest.raises(ConfigError) as caught:
        read("pools:\n  t*: {" + options + "}\n")
    assert problem in str(caught.value)


@given(
    st.text("ab*", min_size=1, max_size=8).filter(lambda pattern: "*" in pattern),
    st.text("ab", max_size=8),
)
def test_star_stands_for_any_text(pattern: str, name: str):
    regex = ".*".join(map(re.escape, pattern.split("*")))
    assert name_matches(pattern, name) == bool(re.fullmatch(regex, name))
