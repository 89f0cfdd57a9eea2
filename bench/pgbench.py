"""One run of pgbench against one target: throughput, true percentiles, the pooler's CPU time.

The latencies come from pgbench's own record of every transaction, which is read and removed. The
CPU time comes from ``/proc``, read every 50 ms beside the run: used are the first value after the
start-up (logins, first plans) and the last before the end, and the transactions that ended between
them, so logins do not count as cost of transactions.
"""

import math
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.results import BenchFailed, Run
from bench.rig import DATABASE, HOST, USER, Rig, environment

_LOOK_EVERY: Final = 0.05  # s
_START_UP: Final = 0.3  # s after the first transaction
_LOGINS: Final = 100  # in a second, even where each starts a backend on a busy machine
_GRACE: Final = 60.0  # s beyond its time until pgbench counts as stuck
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect to. ``pid`` is the pooler's, None without one."""

    name: str
    port: int
    pid: int | None = None
    database: str = DATABASE


@dataclass(frozen=True, slots=True)
class Load:
    mode: str
    clients: int
    seconds: int
    script: Path | None = None  # pgbench's own ("-S") if none

    @property
    def length(self) -> int:
        """Seconds for pgbench, which counts the time to connect as part of them."""
        return self.seconds + self.clients // _LOGINS

    def options(self) -> list[str]:
        threads = min(self.clients, 2, len(os.sched_getaffinity(0)))
        counts = ["-c", str(self.clients), "-j", str(threads)]
        what = ["-S"] if self.script is None else ["-f", str(self.script)]
        return [*what, "-n", "-M", self.mode, *counts, "-T", str(self.length)]

    def command(self) -> str:
        """As a person would type it."""
        return f"pgbench {' '.join(self.options())} --log"


@dataclass(frozen=True, slots=True)
class _Sample:
    """CPU seconds of a process so far. ``at`` is wall-clock time, as in pgbench's log."""

    at: float
    user: float
    system: float


def run(rig: Rig, target: Target, load: Load, round: int = 0) -> Run:
    """Run pgbench and wait for its end. Raises BenchFailed unless every transaction went well."""
    folder = rig.folder / "pgbench"
    folder.mkdir(exist_ok=True)
    prefix = folder / "transactions"
    where = ["-h", HOST, "-p", str(target.port), "-U", USER]
    command = rig.pgbench(*load.options(), *where, "--log", f"--log-prefix={prefix}")
    try:
        output, samples = _watch(rig, [*command, target.database], target, load)
        latencies, ends = _read_log(folder)
    finally:
        for path in folder.iterdir():
            path.unlink()
    said = re.search(r"actually processed: (\d+)[\s\S]*tps = ([\d.]+) \(without", output)
    if said is None or not latencies or int(said[1]) != len(latencies):
        raise BenchFailed(
            f"{load.command()} on {target.name}: {len(latencies)} transactions in its log, it says\n"
            f"{output.strip()}"
        )
    user, system = _cpu_per_transaction(samples, ends)
    return Run(
        target=target.name,
        mode=load.mode,
        clients=load.clients,
        round=round,
        transactions=len(latencies),
        throughput=float(said[2]),
        p50=percentile(latencies, 0.50),
        p99=percentile(latencies, 0.99),
        user=user,
        system=system,
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all values do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _watch(
    rig: Rig, command: Sequence[str], target: Target, load: Load
) -> tuple[str, list[_Sample]]:
    """What pgbench said, and the pooler's CPU time meanwhile."""
    samples: list[_Sample] = []
    said = rig.folder / "pgbench" / "output"
    with said.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment(),
            start_new_session=True,  # a Ctrl-C is for us, who end it in the finally below
        )
        deadline = time.monotonic() + load.length + _GRACE
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if target.pid is not None:
                    samples.append(_cpu(target.pid))
                rig.progress.tick()
                time.sleep(_LOOK_EVERY)
        finally:
            is_stuck = process.poll() is None
            if is_stuck:
                process.kill()
                process.wait()
    output = said.read_text(errors="replace")
    if is_stuck or process.returncode != 0:
        tail = "\n".join(output.strip().splitlines()[-8:])
        how = "did not end" if is_stuck else f"ended with {process.returncode}"
        raise BenchFailed(f"{load.command()} on {target.name} {how}\n{tail}")
    return output, samples


def _read_log(folder: Path) -> tuple[list[float], list[float]]:
    """Latencies and instants of all ends, each in ascending order.

    A line is: client, its transaction's number, microseconds, script, end (seconds, microseconds).
    """
    latencies: list[float] = []
    ends: list[float] = []
    for path in folder.glob("transactions.*"):
        with path.open() as file:
            for line in file:
                words = line.split()
                if words[2] == "failed":
                    raise BenchFailed("pgbench: a transaction failed")
                latencies.append(int(words[2]) / 1e6)
                ends.append(int(words[4]) + int(words[5]) / 1e6)
    latencies.sort()
    ends.sort()
    return latencies, ends


def _cpu(pid: int) -> _Sample:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise BenchFailed(f"the pooler (process {pid}) ended by itself") from exc
    return _Sample(time.time(), int(fields[11]) / _TICKS, int(fields[12]) / _TICKS)


def _cpu_per_transaction(
    samples: Sequence[_Sample], ends: Sequence[float]
) -> tuple[float | None, float | None]:
    """User and system time, seconds."""
    within = [sample for sample in samples if ends[0] + _START_UP <= sample.at <= ends[-1]]
    if len(within) < 2:
        return None, None
    first, last = within[0], within[-1]
    count = sum(first.at < end <= last.at for end in ends)
    if not count:
        return None, None
    return (last.user - first.user) / count, (last.system - first.system) / count
