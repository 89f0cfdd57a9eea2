"""Runs pgbench, as a client that many know and whose every message is known."""

import asyncio
from asyncio.subprocess import DEVNULL, PIPE
from dataclasses import dataclass
from pathlib import Path

from sidecar.demo.postgres import EmbeddedPostgres
from tests.sidecar_process import Sidecar, environment

MODES = ("simple", "extended", "prepared")


@dataclass(frozen=True, slots=True)
class Finished:
    code: int
    said: str
    complained: str


def fill(server: EmbeddedPostgres, rows: int = 1000) -> None:
    """The tables of pgbench's own scripts, small: ``-i`` makes 100,000 rows."""
    server.psql(
        f"""
        CREATE TABLE IF NOT EXISTS pgbench_branches (bid int PRIMARY KEY, bbalance int);
        CREATE TABLE IF NOT EXISTS pgbench_accounts (aid int PRIMARY KEY, bid int, abalance int);
        INSERT INTO pgbench_branches VALUES (1, 0) ON CONFLICT DO NOTHING;
        INSERT INTO pgbench_accounts SELECT n, 1, 0 FROM generate_series(1, {rows}) n
        ON CONFLICT DO NOTHING;
        """
    )


async def pgbench(
    server: EmbeddedPostgres,
    sidecar: Sidecar,
    mode: str,
    *options: str | Path,
    clients: int,
    threads: int,
) -> Finished:
    """Run it through the sidecar (``-n``: without VACUUM before).

    ``-j``: a thread of pgbench blocks while it prepares a statement, so that a client in a
    transaction must not share it where there are more clients than connections.
    """
    process = await asyncio.create_subprocess_exec(
        server.bin_dir / "pgbench",
        *("-h", "127.0.0.1", "-p", str(sidecar.pg_port), "-U", "app"),
        *("-n", "-M", mode, "-c", str(clients), "-j", str(threads)),
        *options,
        "main",
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        env=environment(),
    )
    try:
        said, complained = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return Finished(process.returncode, said.decode(), complained.decode())
