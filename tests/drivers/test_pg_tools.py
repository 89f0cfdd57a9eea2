"""pg_dump, pg_restore and pgbench, of the server's own version."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.drivers.places import MODES, Address, Place, same
from tests.drivers.test_psql import TABLES

DRIVER = "pg_dump, pg_restore, pgbench"
VERSION = "16 and 18"
TRIED = (
    "dumps as text, custom archive and by several jobs, restored by several jobs; pgbench `-i`, "
    "in all modes (`-M`), `-C`, pipelines"
)

CONTENTS = """
SELECT c.relname, c.relkind, pg_get_expr(c.relpartbound, c.oid), obj_description(c.oid)
FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = 'shop' ORDER BY 1;
SELECT md5(string_agg(c::text, '' ORDER BY id)) FROM shop.customers c;
SELECT md5(string_agg(o::text, '' ORDER BY id)) FROM shop.orders o;
SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace = 'shop'::regnamespace ORDER BY 1;
"""


@pytest.fixture
def tables(place: Place) -> None:
    place.run(place.direct, "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-", said=TABLES)


def contents(place: Place) -> str:
    return place.run(place.direct, "psql", "-XAt", "-f", "-", said=CONTENTS).stdout


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize(
    "options", [[], ["--inserts", "--serializable-deferrable"], ["--schema-only"]], ids=" ".join
)
def test_dump_is_the_same(place: Place, options: list[str]) -> None:
    def dump(at: Address) -> str:
        return place.run(at, "pg_dump", "--restrict-key=x", "-n", "shop", *options).stdout

    assert "CREATE TABLE shop.customers" in same(place, dump)


@pytest.mark.usefixtures("tables")
def test_dump_is_piped_into_restore(place: Place) -> None:
    """Into the database of the other pool."""
    (other,) = {*MODES} - {place.mode}
    there = replace(place, direct=replace(place.direct, database=other))
    place.run(there.direct, "psql", "-Xqc", "DROP SCHEMA IF EXISTS shop CASCADE")
    programs = place.bin_dir
    pipe = f"'{programs}/pg_dump' -Fc -n shop | '{programs}/pg_restore' -e -d {other}"
    place.run(place.through, "sh", "-c", pipe)
    assert contents(there) == contents(place)


@pytest.mark.usefixtures("tables")
def test_several_jobs_dump_and_restore(place: Place, tmp_path: Path) -> None:
    """They share a snapshot, so that each has a connection of its own, beside the first."""
    before = contents(place)
    folder = tmp_path / "archive"
    place.run(place.through, "pg_dump", "-Fd", "-j2", "-n", "shop", "-f", folder)
    place.run(place.direct, "psql", "-Xqc", "DROP SCHEMA shop CASCADE")
    place.run(place.through, "pg_restore", "--exit-on-error", "-j2", "-d", place.mode, folder)
    assert contents(place) == before


# -- pgbench ---------------------------------------------------------------------------------------

CLIENTS = 6


@pytest.fixture
def accounts(place: Place) -> None:
    """pgbench's own, through the sidecar: it creates, copies and vacuums."""
    place.run(place.through, "pgbench", "-i", "-q", "-s1", "-I", "dtpv")
    place.run(
        place.direct,
        "psql",
        "-Xqc",
        "INSERT INTO pgbench_branches VALUES (1, 0); INSERT INTO pgbench_tellers SELECT n, 1, 0 FROM generate_series(1, 10) n; INSERT INTO pgbench_accounts SELECT n, 1, 0 FROM generate_series(1, 100000) n",
    )


def bench(place: Place, *options: str | Path, each: int) -> None:
    """``-j`` as ``-c``: a thread of pgbench waits while it prepares a statement."""
    counts = ("-c", str(CLIENTS), "-j", str(CLIENTS), "-t", str(each))
    done = place.run(place.through, "pgbench", "-n", *counts, *options)
    assert (
        f"number of transactions actually processed: {CLIENTS * each}/{CLIENTS * each}"
        in done.stdout
    )
    assert re.search(r"number of failed transactions: 0 ", done.stdout)


@pytest.mark.usefixtures("accounts")
def test_pgbench_in_all_modes(place: Place) -> None:
    """Its bank balances, and has every transaction once."""
    for mode in ("simple", "extended", "prepared"):
        bench(place, "-M", mode, each=30)
        bench(place, "-M", mode, "-S", each=50)
    bench(place, "-C", each=5)
    look = """
    SELECT (SELECT sum(abalance) FROM pgbench_accounts) = sum(delta),
           (SELECT sum(tbalance) FROM pgbench_tellers) = sum(delta),
           (SELECT sum(bbalance) FROM pgbench_branches) = sum(delta), count(*)
    FROM pgbench_history"""
    found = place.run(place.direct, "psql", "-XAtc", look).stdout
    assert found == f"t|t|t|{CLIENTS * (3 * 30 + 5)}\n"


@pytest.mark.parametrize("mode", ["extended", "prepared"])
def test_pgbench_pipelines(place: Place, mode: str, tmp_path: Path) -> None:
    script = tmp_path / "pipeline.sql"
    script.write_text(
        "\\set n random(1, 100)\n\\startpipeline\nBEGIN;\nSELECT :n + 1;\nSELECT :n * 2;\nEND;\n"
        "SELECT 'alone';\n\\endpipeline\n"
    )
    bench(place, "-M", mode, "-f", script, each=30)
