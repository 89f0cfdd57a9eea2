"""psql: scripts and at a terminal, with its backslash commands, \\copy, \\watch and Ctrl-C."""

import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Self

import pytest

from tests.drivers.places import Address, Place, same, wait_for_query
from tests.sidecar_process import PATIENCE

DRIVER = "psql"
VERSION = "16 and 18"
TRIED = (
    r"scripts, `\d` and its kin, `\copy`, `\watch`, `\gset`, `\gexec`, `\gdesc`, `\bind`, `\crosstabview`, "
    "`FETCH_COUNT`, `ON_ERROR_ROLLBACK`, `-1`, Ctrl-C"
)

TABLES = """
DROP SCHEMA IF EXISTS shop CASCADE;
CREATE SCHEMA shop;
SET search_path = shop;
CREATE TYPE mood AS ENUM ('good', 'bad');
CREATE TABLE customers (id int PRIMARY KEY, name text NOT NULL UNIQUE, mood mood DEFAULT 'good');
CREATE TABLE orders (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  customer int REFERENCES customers ON DELETE CASCADE,
  total numeric(10, 2) CHECK (total >= 0),
  placed timestamptz
) PARTITION BY RANGE (id);
CREATE TABLE orders_1 PARTITION OF orders FOR VALUES FROM (1) TO (1000);
CREATE VIEW best AS SELECT name, sum(total) FROM customers JOIN orders ON customer = customers.id GROUP BY 1;
CREATE FUNCTION double(n int) RETURNS int LANGUAGE sql AS 'SELECT n * 2';
COMMENT ON TABLE customers IS 'who buys';
INSERT INTO customers SELECT n, 'ü ' || n FROM generate_series(1, 50) n;
INSERT INTO orders (customer, total, placed) SELECT n, n * 1.5, '2024-01-01Z'::timestamptz + n * interval '1 day' FROM generate_series(1, 50) n;
"""

SCRIPTS = {
    "describes": r"""
\d shop.*
\d+ shop.customers
\dt+ shop.*
\dv shop.*
\df shop.*
\dT+ shop.*
\dn
\du
\dconfig work_mem
\sf shop.double
\sv shop.best
\z shop.customers
\dp shop.orders
""",
    "queries": r"""
SET search_path = shop, public;
\set who 'ü 7'
SELECT * FROM customers WHERE name = :'who';
SELECT 1 AS a, 'two' AS b \gset found_
\echo :found_a :found_b :ROW_COUNT
SELECT id, name FROM customers WHERE id < 4 \gx
SELECT * FROM orders WHERE id = 1 \gdesc
SELECT format('SELECT %s AS n', n) FROM generate_series(1, 5) n \gexec
SELECT mood, id % 3 AS third, count(*) FROM customers GROUP BY 1, 2 \crosstabview mood third count
SELECT $1::int + $2::int \bind 1 2 \g
SELECT now() - now(); SELECT 2 \; SELECT 3;
\if true
SELECT 'in if';
\endif
\pset null NULL
SELECT NULL::text, E'a\nb', repeat('ü', 100);
\x on
TABLE best ORDER BY 1 LIMIT 3;
\encoding LATIN1
SELECT 'u';
""",
    "errors": r"""
\set VERBOSITY verbose
SELEC 1;
SELECT 1/0;
INSERT INTO shop.customers VALUES (1, 'doubled');
\errverbose
SELECT nothing \gdesc
\echo :SQLSTATE :LAST_ERROR_MESSAGE
BEGIN;
SELECT 1/0;
SELECT 1;
COMMIT;
\set ON_ERROR_ROLLBACK on
BEGIN;
CREATE TABLE shop.kept (id int);
SELECT 1/0;
INSERT INTO shop.kept VALUES (1);
COMMIT;
TABLE shop.kept;
DROP TABLE shop.kept;
""",
    "transactions": r"""
\set AUTOCOMMIT off
DELETE FROM shop.customers;
SELECT count(*) FROM shop.customers;
ROLLBACK;
SELECT count(*) FROM shop.customers;
SAVEPOINT a;
UPDATE shop.customers SET name = name || '!' WHERE id = 1;
ROLLBACK TO a;
SELECT name FROM shop.customers WHERE id = 1;
COMMIT;
SET TIME ZONE 'Asia/Tokyo';
COMMIT;
SELECT placed FROM shop.orders WHERE id = 1;
\set FETCH_COUNT 7
SELECT id, placed FROM shop.orders ORDER BY id;
""",
    "watches": r"""
SELECT 'watched' \watch interval=0.05 count=3
""",
    "copies": r"""
CREATE TEMP TABLE copied (id int, note text);
\copy copied FROM STDIN
1	one
2	ü
\.
COPY copied FROM STDIN WITH (FORMAT csv);
3,"three, with a comma"
\.
\copy copied FROM program 'seq 10 12 | sed s/$/,x/' csv
\copy (SELECT * FROM copied ORDER BY id) TO STDOUT
COPY copied TO STDOUT (FORMAT csv, HEADER);
COPY copied FROM STDIN;
not a number	x
\.
SELECT count(*) FROM copied;
""",
}


def psql(place: Place, at: Address, script: str, *options: str) -> tuple[str, str]:
    done = place.run(at, "psql", "-X", "-a", "-P", "pager=off", *options, "-f", "-", said=script)
    return re.sub(r"^.* \(every ", "(every ", done.stdout, flags=re.MULTILINE), done.stderr


@pytest.fixture
def tables(place: Place) -> None:
    place.run(place.direct, "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-", said=TABLES)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.usefixtures("tables")
def test_script_says_what_it_says_directly(place: Place, name: str) -> None:
    said, _ = same(place, lambda at: psql(place, at, SCRIPTS[name]))
    assert said


@pytest.mark.usefixtures("tables")
def test_copy_between_files_and_tables(place: Place, tmp_path: Path) -> None:
    def copied(at: Address) -> tuple[str, bytes]:
        file = tmp_path / f"{at.port}.csv"
        script = f"""
        \\copy (SELECT n, 'ü' || n FROM generate_series(1, 20000) n) TO '{file}' csv header
        CREATE TABLE IF NOT EXISTS shop.copied (id int, note text);
        TRUNCATE shop.copied;
        \\copy shop.copied FROM '{file}' csv header
        SELECT count(*), sum(id), max(note) FROM shop.copied;
        """
        said, _ = psql(place, at, script, "-A", "-t")
        return said.split()[-1], file.read_bytes()

    assert same(place, copied)[0].startswith("20000|200010000|")


@pytest.mark.usefixtures("tables")
def test_one_transaction_for_a_script(place: Place) -> None:
    """With ``-1`` the first error undoes all of it."""

    def undone(at: Address) -> tuple[str, int, str]:
        script = "INSERT INTO shop.customers VALUES (1000, 'x'); SELECT 1/0;"
        done = place.run(
            at, "psql", "-X1", "-v", "ON_ERROR_STOP=1", "-f", "-", said=script, code=None
        )
        found = place.run(
            at, "psql", "-XAtc", "SELECT count(*) FROM shop.customers WHERE id = 1000"
        )
        return done.stderr, done.returncode, found.stdout

    assert same(place, undone)[1:] == (3, "0\n")


@pytest.mark.parametrize("pipeline", [r"\startpipeline", None])
def test_statements_of_psql(place: Place, pipeline: str | None) -> None:
    r"""``\parse`` and pipelines are new in 18: of the server of 16, they are asked with 16's psql."""
    if place.version == 16:
        script = r"SELECT $1::text \bind 'ü' \g"
    elif pipeline is None:
        script = (
            "SELECT $1::int * 2 \\parse doubled\n"
            + "\\bind_named doubled 21 \\g\n" * 5
            + "\\close_prepared doubled\n"
        )
    else:
        script = "\\startpipeline\n" + "SELECT $1::int \\bind 7 \\sendpipeline\n" * 5
        script += "\\syncpipeline\nSELECT 1/0 \\bind \\sendpipeline\nSELECT 2 \\bind \\sendpipeline\n\\endpipeline\nSELECT 3;\n"
    said, _ = same(place, lambda at: psql(place, at, script))
    assert said.count("row)")


# -- at a terminal ---------------------------------------------------------------------------------


class Terminal:
    """An interactive psql; what is typed goes through the terminal, so Ctrl-C is a signal."""

    def __init__(self, place: Place, at: Address) -> None:
        self._master, slave = pty.openpty()
        self._process = subprocess.Popen(
            [place.bin_dir / "psql", "-X", "-n", "-P", "pager=off"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=at.variables | {"TERM": "dumb", "PSQL_HISTORY": "/dev/null"},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)

    def __enter__(self) -> Self:
        self.expect("=> $")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._master)  # hangs up
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, pattern: str) -> str:
        """What it says until this matches."""
        said = ""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, said):
            assert select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[
                0
            ], said
            said += os.read(self._master, 65536).decode(errors="replace")
        return said


def _take_terminal() -> None:
    """In the child: standard input is its controlling terminal."""
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.default_int_handler)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_ctrl_c_cancels_the_query(place: Place) -> None:
    with Terminal(place, place.through) as psql:
        for _ in range(2):
            psql.type("SELECT pg_sleep(37);\n")
            wait_for_query(place, "pg_sleep(37)")
            psql.type("\x03")
            psql.expect("canceling statement due to user request[^>]*=> $")
        psql.type("BEGIN;\n")
        psql.expect(r"=\*> $")
        psql.type("SELECT 6 * 7;\n")
        psql.expect(r"42\s[^>]*=\*> $")


def test_ctrl_c_ends_watch(place: Place) -> None:
    with Terminal(place, place.through) as psql:
        psql.type("SELECT 'seen' || 1 \\watch 0.05\n")
        for _ in range(3):
            psql.expect("seen1")
        psql.type("\x03")
        psql.expect("=> $")
        psql.type("SELECT 6 * 7;\n")
        psql.expect("42")


def test_interrupt_amid_copy(place: Place) -> None:
    """A COPY that is cancelled leaves the session usable."""
    with Terminal(place, place.through) as psql:
        psql.type("CREATE TEMP TABLE t (a int);\n")
        psql.expect("CREATE TABLE")
        psql.type("COPY t FROM STDIN;\n")
        psql.expect(">> $")
        psql.type("1\n")
        psql.expect(">> $")
        psql.type("\x03")
        while "Cancel request sent" in psql.expect("=> $|Cancel request sent"):
            # It had printed the prompt, but did not read yet: then psql asks the server, which
            # does not look up from a COPY before the next row. A person presses again.
            psql.type("\x03")
        psql.type("SELECT count(*) + 41 AS n FROM t;\n")
        psql.expect("41")
