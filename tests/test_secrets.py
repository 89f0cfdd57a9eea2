"""No secret comes out where people look: log, metrics, console, API, incident files.

Secrets are planted as literals, bind values, passwords, COPY data, comments and settings, in statements that
work, fail, hang, leak, wait in vain and lose their server; then every output is searched for them. What is
searched for is in ``OUTPUTS``: whoever adds an output adds it there.
"""

import base64
import contextlib
import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import yaml
from psycopg.adapt import Buffer

from sidecar.console.commands import SHOWN
from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.fingerprint import normalise
from sidecar.proxy.scrub import message_of
from sidecar.work import Statement
from tests import wire
from tests.sidecar_process import SidecarProcess, configuration, eventually

SECRET = "s3cr3t-Zebra"
NUMBER = 481516234
"""No number is like it."""

TOKEN = f"{SECRET}-token-for-the-api"

TRACES = {
    "the text": "s3cr",  # PostgreSQL shows four characters of a value that to_date does not like
    "its end": "zebra",
    "its hexadecimal form": SECRET.encode().hex(),
    "its Base64 form": base64.b64encode(SECRET.encode()).decode().rstrip("="),
    "the number": str(NUMBER),
    "the number in hexadecimal": f"{NUMBER:x}",
}
"""What gives a secret away, in lower case or as it is."""

APPLICATION = "vault-keeper"  # which is told on purpose

WORKING = [
    "SELECT '{s}', {n}",
    "SELECT $${s}$$, $tag${s}$tag$, E'\\'{s}', U&'{s}', N'{s}', x'{h}', {n}.{n}e1",
    "SELECT 1 /* {s} {n} /* nested {s} */ */ -- {s}",
    "/* {s} */ SELECT 2",
    "CREATE ROLE vault_temporary LOGIN PASSWORD '{s}'",
    "ALTER ROLE vault_role PASSWORD '{s}'",
    "ALTER ROLE vault_role WITH ENCRYPTED PASSWORD $${s}$$ VALID UNTIL 'infinity'",
    "COMMENT ON TABLE vault IS '{s}'",
    "INSERT INTO vault (name) VALUES ('{s}'), ('{s} {n}')",
    "SELECT * FROM vault WHERE name IN ('{s}', '{s} {n}') AND id <> {n}",
    "SET vault.token = '{s}'",
    "SET LOCAL vault.token TO '{s}'",
    "SELECT set_config('vault.token', '{s}', false)",
    "NOTIFY vault, '{s}'",
    "PREPARE vaulted AS SELECT '{s}', $1::text",
    "EXECUTE vaulted('{s}')",
    "DEALLOCATE vaulted",
    "DO $$ BEGIN PERFORM '{s}', {n}; END $$",
    "DO $$ BEGIN RAISE WARNING '{s}' USING DETAIL = '{s}'; END $$",
    "BEGIN; DECLARE vaulting CURSOR FOR SELECT '{s}'; FETCH ALL FROM vaulting; COMMIT",
    "SELECT pg_sleep(0.4), '{s}', {n}",
    "VALUES ('{s}')",
]

FAILING = [
    "SELECT '{s}'::int",
    "SELECT '{n}'::int2",
    "SELECT {n}::int2",
    "SELECT '{s}'::numeric, '{s}'::bool",
    "SELECT '{s}'::mood",
    "SELECT '{{\"{s}\": {s}'::json",
    "SELECT '{{\"{s}\": {s}'::jsonb -> '{s}'",
    "SELECT '{s}'::date",
    "SELECT '2024-13-45 {s}'::timestamptz",
    "SELECT '{s}'::interval, '{s}'::time",
    "SELECT '{s}'::uuid",
    "SELECT '{s}'::inet",
    "SELECT '{s}'::point",
    "SELECT '{s}'::int4range",
    "SELECT '{{{s}'::text[]",
    "SELECT '{s} & '::tsquery",
    "SELECT '\\x{s}'::bytea",
    "SELECT '{s}'::regclass",
    "SELECT 'a.b.c.{s}'::regclass",
    "SELECT '{s}'::regtype",
    "SELECT '{s}'::regrole",
    "SELECT ('{{\"a\": 1}}'::jsonb) @@ '$.a == {s} ]'::jsonpath",
    "SELECT to_date('{s}', 'YYYY-MM-DD')",
    "SELECT to_timestamp('2024 {s}', 'YYYY Mon')",
    "SELECT to_number('{s}', 'x{s}')",
    "SELECT date_part('{s}', now())",
    "SELECT encode('x', '{s}')",
    "SELECT decode('{s}', 'hex')",
    "SELECT decode('{s}', 'base64')",
    "SELECT convert_from('x', '{s}')",
    "SELECT '{s}' ~ '{s}['",
    "SELECT format('%q{s}', 1)",
    "SELECT current_setting('{s}')",
    "SELECT nextval('{s}')",
    "SELECT now() AT TIME ZONE '{s}'",
    "SELECT pg_read_file('/{s}')",
    "SELECT lo_get({n})",
    "SELECT chr({n}), repeat('{s}', {n})",
    "SELECT 1/0, '{s}'",
    "SELECT power({n}, {n})",
    "SELECT '{s}",
    'SELECT "{s}',
    "SELECT $$ {s}",
    "SELECT /* {s}",
    "SELECT '{s}' '{s}'",
    "SELECT 1 '{s}'",
    "SELECT 1 {n}",
    "SELECT {n}abc",
    "SELECT 'a' \"b\" '{s}' \"c\"",
    "SELEC '{s}'",
    "SELECT E'{s}\\u00zz'",
    "SELECT U&'{s}\\zzzz'",
    "SELECT vault('{s}', {n})",
    "SELECT '{s}' + 1",
    "SELECT id || '{s}' - 1 FROM vault WHERE name = {n}",
    "SET ROLE '{s}'",
    "SET SESSION AUTHORIZATION '{s}'",
    "SET TimeZone = '{s}'",
    "SET work_mem = '{s}'",
    "SET work_mem = {n}99",
    "SET search_path = '{s}', '{s}' '{s}'",
    "ALTER ROLE nobody PASSWORD '{s}'",
    "CREATE USER MAPPING FOR vault_role SERVER vault_server OPTIONS (password '{s}')",
    "CREATE ROLE vault_role PASSWORD '{s}'",
    "ALTER ROLE vault_role PASSWORD '{s}' '{s}'",
    "INSERT INTO vault (name) VALUES ('{s}')",
    "INSERT INTO vault (name, n) VALUES ('{s} checked', -{n})",
    "INSERT INTO vault (name) VALUES ('{s} is far longer than the forty characters that it may have')",
    "INSERT INTO vault (id, name) VALUES (NULL, '{s} null')",
    "INSERT INTO vaulted VALUES ({n})",
    "COPY vault FROM '/{s}'",
    "COPY vault TO PROGRAM 'false {s}'",
    "DO $$ BEGIN RAISE EXCEPTION '{s} %', {n}; END $$",
    "DO $$ BEGIN RAISE EXCEPTION USING MESSAGE = '{s}', ERRCODE = '23505', CONSTRAINT = '{s}',"
    " TABLE = '{s}', DETAIL = '{s}', HINT = '{s}'; END $$",
    "DO $$ BEGIN RAISE '{s}' USING ERRCODE = 'ZV001'; END $$",
    "DO $$ BEGIN RAISE division_by_zero USING MESSAGE = '{s}'; END $$",
    "DO $$ BEGIN ASSERT false, '{s}'; END $$",
    "DO $$ BEGIN EXECUTE 'SELECT \"{s}\"'; END $$",
    "DO $$ BEGIN EXECUTE 'SELECT ''{s}''::int'; END $$",
    "DO $$ DECLARE n int; BEGIN n := '{s}'; END $$",
    "DO $$ BEGIN {s} END $$",
    "EXECUTE vaulted('{s}')",
    "SELECT pg_terminate_backend(pg_backend_pid()), '{s}'",
]

BOUND = [
    "SELECT %s::text",
    "SELECT %s::int",
    "SELECT %s::date",
    "SELECT %s::mood",
    "SELECT %s::jsonb",
    "SELECT %s::regclass",
    "SELECT 1/(length(%s::text) - 12)",
    "INSERT INTO vault (name) VALUES (%s)",
    "SELECT pg_sleep(0.4), %s::text",
    "SELECT set_config('vault.token', %s, false)",
    "SELECT raise(%s)",
]


def written(statement: str) -> str:
    return statement.format(s=SECRET, n=NUMBER, h=SECRET.encode().hex())


# -- planting --------------------------------------------------------------------------------------


class Bytes(psycopg.adapt.Dumper):
    """Any text in the binary format."""

    format = psycopg.pq.Format.BINARY
    oid = 25

    def dump(self, obj: str) -> Buffer:
        return obj.encode()


Connection = psycopg.Connection[tuple[object, ...]]


@contextlib.contextmanager
def connect(sidecar: SidecarProcess, **parameters: str) -> Iterator[Connection]:
    """Closed as it is, with whatever is under way."""
    dsn = sidecar.dsn(application_name=APPLICATION, **parameters)
    with contextlib.closing(psycopg.connect(dsn, autocommit=True)) as conn:
        yield conn


def plant_literals(sidecar: SidecarProcess) -> None:
    """In the simple and in the extended protocol, in named statements, and within a transaction."""
    for statement in map(written, [*WORKING, *FAILING]):
        for way in ("simple", "extended", "prepared", "transaction"):
            if way == "extended" and "; " in statement and "DO" not in statement:
                continue
            with connect(sidecar) as conn, contextlib.suppress(psycopg.Error):
                if way == "transaction":
                    conn.execute("BEGIN")
                run(conn, statement, way)


def run(conn: Connection, statement: str, way: str) -> None:
    if way in ("simple", "transaction"):
        conn.pgconn.exec_(statement.encode())
    elif way == "extended":
        conn.pgconn.exec_params(statement.encode(), [])
    else:
        conn.pgconn.prepare(b"vaulting", statement.encode())
        conn.pgconn.exec_prepared(b"vaulting", [])


def plant_bind_values(sidecar: SidecarProcess) -> None:
    for statement in BOUND:
        for is_binary in (False, True):
            with connect(sidecar) as conn, contextlib.suppress(psycopg.Error):
                if is_binary:
                    conn.adapters.register_dumper(str, Bytes)
                conn.execute(statement, [SECRET], prepare=True)
    with connect(sidecar) as conn, contextlib.suppress(psycopg.Error):
        conn.execute("SELECT %b::int4, %b::int2", [NUMBER, NUMBER])
    number = struct.pack("!i", NUMBER)
    with connect(sidecar) as conn:
        conn.pgconn.exec_params(b"SELECT $1::int2", [number], [23], [1])
        conn.pgconn.exec_params(b"SELECT $1::mood", [number], None, [1])


def plant_copied_data(sidecar: SidecarProcess) -> None:
    for line in (
        f"{SECRET}\n",
        f"1\t{SECRET}\n",
        f"1\t{SECRET}\t{NUMBER}\t{SECRET}\n",
        f"{NUMBER}\\",
    ):
        with copying(sidecar, "COPY vault (id, name) FROM STDIN") as copy:
            copy.write(line)
    with copying(sidecar, written("COPY (SELECT '{s}'::text, {n}) TO STDOUT")) as copy:
        while copy.read():
            pass
    with copying(sidecar, "COPY vault FROM STDIN") as copy:
        copy.write(SECRET)
        raise psycopg.Error(SECRET)  # the driver sends it along with CopyFail


@contextlib.contextmanager
def copying(sidecar: SidecarProcess, statement: str) -> Iterator[psycopg.Copy]:
    with (
        connect(sidecar) as conn,
        contextlib.suppress(psycopg.Error),
        conn.cursor().copy(statement.encode()) as copy,
    ):
        yield copy


def plant_settings(sidecar: SidecarProcess) -> None:
    """In the startup packet: values that are refused, and one that is taken."""
    for options in (f"-c work_mem={SECRET}", f"-c TimeZone={SECRET}", f"-c vault.token={SECRET}"):
        with contextlib.suppress(psycopg.Error), connect(sidecar, options=options) as conn:
            conn.execute("SELECT 1")


def plant_waits(sidecar: SidecarProcess, server: EmbeddedPostgres) -> None:
    """A leak with a lock, those who wait for it, and those who wait for a connection in vain."""
    with contextlib.ExitStack() as stack:
        leak = stack.enter_context(connect(sidecar))
        leak.execute(f"BEGIN; UPDATE vault SET n = {NUMBER} WHERE name = '{SECRET}'")
        waiting = [stack.enter_context(connect(sidecar)) for _ in range(3)]
        for number, conn in enumerate(waiting):
            conn.pgconn.send_query(
                f"UPDATE vault SET n = {number} WHERE name = '{SECRET}'".encode()
            )
        late = stack.enter_context(connect(sidecar))
        with contextlib.suppress(psycopg.Error):
            late.execute(written("SELECT '{s}', {n}"))
        metrics = sidecar.scrape()
        assert metrics.used == 4
        eventually(
            lambda: sidecar.scrape().total("pgsidecar_slow_queries_total", pool="main") >= 3,
            "slow queries are seen",
        )
        time.sleep(0.5)  # for whoever asks the server what they wait for
        server.psql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'vault_pool'"
        )
        for conn in waiting:
            with contextlib.suppress(psycopg.Error):
                conn.pgconn.get_result()


def plant_broken_messages(sidecar: SidecarProcess) -> None:
    """A client that breaks the protocol, with secrets around."""
    for data in (
        wire.query(written("SELECT '{s}'"))[:-5],
        b"?" + wire.query(SECRET)[1:],
        wire.parse(written("SELECT '{s}', {n}"), SECRET) + b"\0\0\0\0\0" + SECRET.encode(),
        wire.bind(SECRET, name="nothing", portal=SECRET) + wire.execute(portal=SECRET) + wire.SYNC,
    ):
        with connect(sidecar) as conn, socket.socket(fileno=os.dup(conn.fileno())) as sock:
            sock.setblocking(True)
            sock.sendall(data)
            select.select([sock], [], [], 0.2)


# -- looking ---------------------------------------------------------------------------------------


def look_at_log(sidecar: SidecarProcess, _: Path) -> Iterator[tuple[str, str]]:
    yield "log", sidecar.log


def look_at_metrics(sidecar: SidecarProcess, _: Path) -> Iterator[tuple[str, str]]:
    for kind in ("text/plain", "application/openmetrics-text"):
        yield kind, ask(sidecar, "/metrics", Accept=kind)


def look_at_console(sidecar: SidecarProcess, _: Path) -> Iterator[tuple[str, str]]:
    with psycopg.connect(
        sidecar.dsn(user="watcher", database="pgsidecar"), autocommit=True
    ) as conn:
        told: list[str] = []
        conn.add_notice_handler(lambda notice: told.append(str(notice.message_detail)))
        for what in SHOWN:
            result = conn.pgconn.exec_(f"SHOW {what}".encode())
            for row in range(result.ntuples):
                told += [str(result.get_value(row, column)) for column in range(result.nfields)]
            yield f"SHOW {what}", "\n".join(told) + result.error_message.decode()
            told.clear()


def look_at_api(sidecar: SidecarProcess, _: Path) -> Iterator[tuple[str, str]]:
    """Whatever its contract names; for each pool, statement and incident, those that a list names."""
    contract = Path(__file__).parent.parent / "sidecar/api/openapi.yaml"
    known = {
        "{pool}": ["main"],
        "{fingerprint}": re.findall(
            r'"fingerprint": ?"([0-9a-f]{16})"', ask(sidecar, "/api/v1/statements?limit=1000")
        ),
        "{id}": re.findall(r'"id": ?"([^"]+)"', ask(sidecar, "/api/v1/incidents")),
    }
    for path, operations in yaml.safe_load(contract.read_text())["paths"].items():
        parameters = [each.get("$ref", "") for each in operations["get"].get("parameters", ())]
        page = "?limit=1000" if "#/components/parameters/limit" in parameters else ""
        variable = re.search(r"\{\w+\}", path)
        for value in [""] if variable is None else known[variable[0]]:
            url = path if variable is None else path.replace(variable[0], value)
            yield url, ask(sidecar, url + page)


def look_at_why(sidecar: SidecarProcess, _: Path) -> Iterator[tuple[str, str]]:
    """The command, as it tells the verdict."""
    url = f"http://127.0.0.1:{sidecar.http_port}"
    for how in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "sidecar", "why", "--url", url, "--token", TOKEN, *how],
            capture_output=True,
            text=True,
            timeout=20,
        )
        yield " ".join(["why", *how]), done.stdout + done.stderr


def look_at_incidents(_: SidecarProcess, folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.iterdir()):
        yield f"incident {path.name}", path.read_text()


OUTPUTS: list[Callable[[SidecarProcess, Path], Iterator[tuple[str, str]]]] = [
    look_at_log,
    look_at_metrics,
    look_at_console,
    look_at_api,
    look_at_why,
    look_at_incidents,
]


def ask(sidecar: SidecarProcess, path: str, **headers: str) -> str:
    """What comes within a second: some answers have no end."""
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines.append(f"Authorization: Bearer {TOKEN}")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    received = b""
    with socket.create_connection(("127.0.0.1", sidecar.http_port), timeout=10) as sock:
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        deadline = time.monotonic() + (1 if path.endswith("/events") else 10)
        while (left := deadline - time.monotonic()) > 0:
            if select.select([sock], [], [], left)[0]:
                if not (data := sock.recv(65536)):
                    break
                received += data
    return received.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def outputs(
    postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """What everything says, after all secrets have been planted."""
    folder = tmp_path_factory.mktemp("secrets")
    incidents = folder / "incidents"
    incidents.mkdir()
    prepare(postgres)
    text = configuration(
        postgres.dsn(user="vault_pool", dbname="vault").replace(
            "vault_pool@", f"vault_pool:{SECRET}@"
        ),
        log={"level": "debug", "format": "json"},
        http={"access_log": True, "token": TOKEN},
        users={"app": {"password": SECRET}, "watcher": {"password": SECRET}},
        console={"stats_users": ["watcher"]},
        incidents={"directory": str(incidents)},
        max_size=4,
        slow_query_threshold="200ms",
        leak_threshold="300ms",
        acquire_timeout="700ms",
    )
    sidecar = SidecarProcess.start(text, folder)
    try:
        plant_literals(sidecar)
        plant_bind_values(sidecar)
        plant_copied_data(sidecar)
        plant_settings(sidecar)
        plant_broken_messages(sidecar)
        plant_waits(sidecar, postgres)
        time.sleep(0.3)  # what is written between two looks is written
        yield {name: said for look in OUTPUTS for name, said in look(sidecar, incidents)}
    finally:
        sidecar.close()
        clean_up(postgres)


def prepare(server: EmbeddedPostgres) -> None:
    clean_up(server)
    server.psql("CREATE ROLE vault_pool LOGIN SUPERUSER")
    server.psql("CREATE ROLE vault_role")
    server.psql("CREATE DATABASE vault OWNER vault_pool")
    with psycopg.connect(server.dsn(user="vault_pool", dbname="vault"), autocommit=True) as conn:
        conn.execute("CREATE TYPE mood AS ENUM ('fine')")
        conn.execute(
            "CREATE TABLE vault (id serial PRIMARY KEY, name varchar(40) UNIQUE, n int CHECK (n > -1))"
        )
        conn.execute("CREATE TABLE vaulted (id int REFERENCES vault)")
        conn.execute(
            "CREATE FUNCTION raise(what text) RETURNS void LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'this is %', what; END $$"
        )


def clean_up(server: EmbeddedPostgres) -> None:
    server.psql("DROP DATABASE IF EXISTS vault WITH (FORCE)")
    server.psql("DROP ROLE IF EXISTS vault_pool, vault_role, vault_temporary")


@pytest.mark.parametrize("trace", TRACES)
def test_no_secret_comes_out(outputs: dict[str, str], trace: str) -> None:
    found = {
        name: [
            text[max(0, at - 150) : at + 60] for at in places(text.lower(), TRACES[trace].lower())
        ][:3]
        for name, text in outputs.items()
    }
    given_away = {name: excerpts for name, excerpts in found.items() if excerpts}
    assert not given_away, json.dumps(given_away, indent=1)


def places(text: str, word: str) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(word), text)]


def test_no_message_that_is_kept_has_a_secret(postgres: EmbeddedPostgres) -> None:
    """Of PostgreSQL's own errors; while some of what they say is kept."""
    prepare(postgres)
    kept: dict[str, str] = {}
    for statement in map(written, FAILING):
        dsn = postgres.dsn(user="vault_pool", dbname="vault")
        with contextlib.closing(psycopg.connect(dsn, autocommit=True)) as conn:
            conn.execute("INSERT INTO vault (name) VALUES (%s) ON CONFLICT DO NOTHING", [SECRET])
            result = conn.pgconn.exec_(statement.encode())
            assert result.status == psycopg.pq.ExecStatus.FATAL_ERROR, statement
        form = normalise(statement.encode())
        known = Statement(form.fingerprint(), form.text(), 0)
        kept[statement] = message_of(body_of(result), known)
    clean_up(postgres)
    for statement, message in kept.items():
        assert not any(trace.lower() in message.lower() for trace in TRACES.values()), statement
    assert kept[written("SELECT '{s}'::int")] == "invalid input syntax for type integer: ?"
    assert kept[written("SELECT vault('{s}', {n})")].startswith("function vault(unknown, integer)")
    unique = 'duplicate key value violates unique constraint "vault_name_key"'
    assert kept[written("INSERT INTO vault (name) VALUES ('{s}')")] == unique


FIELDS = {
    "S": "SEVERITY",
    "C": "SQLSTATE",
    "M": "MESSAGE_PRIMARY",
    "s": "SCHEMA_NAME",
    "t": "TABLE_NAME",
    "c": "COLUMN_NAME",
    "d": "DATATYPE_NAME",
    "n": "CONSTRAINT_NAME",
    "F": "SOURCE_FILE",
    "R": "SOURCE_FUNCTION",
}


def body_of(result: psycopg.pq.abc.PGresult) -> bytes:
    """The ErrorResponse that this came from."""
    parts = [
        letter.encode() + value + b"\0"
        for letter, name in FIELDS.items()
        if (value := result.error_field(psycopg.pq.DiagnosticField[name]))
    ]
    return b"".join(parts) + b"\0"


def test_there_was_something_to_find(outputs: dict[str, str]) -> None:
    """Each output is there, and tells of what was planted, so that the search means something."""
    events = {json.loads(line)["event"] for line in outputs["log"].splitlines()}
    assert {
        "leak",
        "client refused",
        "client connection closed",
        "server connection closed",
    } <= events
    metrics = outputs["text/plain"]
    assert re.search(
        r'query_errors_total\{pool="main",origin="server",sqlstate_class="22"\} [1-9]', metrics
    )
    assert re.search(
        r'query_errors_total\{pool="main",origin="sidecar",sqlstate_class="53"\} [1-9]', metrics
    )
    assert f'blamed_wait_seconds_total{{pool="main",application="{APPLICATION}"}}' in metrics
    assert "# EOF" in outputs["application/openmetrics-text"]
    assert APPLICATION in outputs["SHOW CLIENTS"] + outputs["SHOW HOLDERS"] + outputs["log"]
    assert "INSERT INTO vault" in outputs["/api/v1/statements"]
    assert "invalid input syntax for type" in outputs["SHOW ERRORS"]
    assert "invalid input syntax for type" in outputs["/api/v1/errors"]
    assert "UPDATE vault" in outputs["/api/v1/slow"]
    assert outputs["/api/v1/config"].startswith("HTTP/1.1 200")
    assert any("leak" in output for output in outputs if output.startswith("incident "))
    assert "why" in outputs
