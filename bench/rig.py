"""What all measures stand on: PostgreSQL with pgbench's tables, a private folder, the progress."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.progress import Progress
from bench.results import BenchFailed
from sidecar.demo.install import EmbeddedPostgresError, temporary_root
from sidecar.demo.postgres import EmbeddedPostgres

VERSION: Final = 16
DATABASE: Final = "main"  # also the sidecar's pool and PgBouncer's database
USER: Final = "postgres"
HOST: Final = "127.0.0.1"
SCALE: Final = 10  # one million accounts, 150 MB: all of it in shared buffers
POOL_SIZE: Final = 25

_SETTINGS: Final = {
    "max_connections": "450",
    "shared_buffers": "256MB",
    "autovacuum": "off",  # nothing is written; it would only disturb
}


@dataclass(frozen=True, slots=True)
class Rig:
    postgres: EmbeddedPostgres
    folder: Path  # readable for every account
    progress: Progress

    def pgbench(self, *arguments: str) -> list[str]:
        return [str(self.postgres.bin_dir / "pgbench"), *arguments]


@contextmanager
def set_up(progress: Progress) -> Iterator[Rig]:
    folder = Path(tempfile.mkdtemp(prefix="pgsidecar-bench-", dir=temporary_root()))
    folder.chmod(0o755)
    progress.step(f"PostgreSQL {VERSION}, {SCALE * 100_000:,} accounts")
    try:
        with EmbeddedPostgres(VERSION, _SETTINGS, user=USER, database=DATABASE) as postgres:
            rig = Rig(postgres, folder, progress)
            _fill(rig)
            yield rig
    except EmbeddedPostgresError as exc:
        raise BenchFailed(str(exc)) from exc
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment() -> Mapping[str, str]:
    """Ours without libpq's variables, which would lead pgbench elsewhere."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PG")}


def _fill(rig: Rig) -> None:
    where = ["-h", HOST, "-p", str(rig.postgres.port), "-U", USER]
    done = subprocess.run(
        rig.pgbench("-i", "-q", "-s", str(SCALE), *where, DATABASE),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode != 0:
        raise BenchFailed(f"pgbench -i failed\n{done.stderr.strip()}")
