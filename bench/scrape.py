"""How long a scrape of /metrics holds up the event loop, with 50 statements in each of two pools.

A probe inside the sidecar (``runner``) keeps every stall with its instants. From outside, scrapes as
Prometheus makes them alternate with pauses of the same length, and each of both is looked up in the
probe's list: the machine's own hiccups show in both.
"""

import bisect
import gzip
import http.client
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import pgbench, poolers
from bench.options import Options
from bench.pgbench import Load, Target
from bench.results import SIDECAR, BenchFailed, Report, Scrapes
from bench.rig import DATABASE, HOST, Rig
from bench.runner import read_stalls

POOLS: Final = (DATABASE, "second")

_HEADERS: Final = {
    "Accept": "application/openmetrics-text;version=1.0.0",
    "Accept-Encoding": "gzip",
}
STATEMENTS: Final = 50
"""Of each pool; as many have series of their own."""

_REST: Final = 0.03  # s between a scrape and a pause
_WARM_UP: Final = 5  # scrapes
_RENDER: Final = re.compile(r"^pgsidecar_metrics_render_seconds ([\d.e+-]+)$", re.MULTILINE)

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Page:
    text: str
    size: int  # as sent


def expected(options: Options) -> float:
    """Seconds it will take."""
    return 5 + _count(options) * (2 * _REST + 0.03)


def measure(rig: Rig, options: Options, report: Report) -> None:
    file = rig.folder / "stalls.json"
    scrapes: list[Interval] = []
    pauses: list[Interval] = []
    renders: list[float] = []
    rig.progress.step("stalls caused by a scrape")
    program = ("bench.runner",)
    with poolers.sidecar(rig, program, ["--probe", str(file)], POOLS) as sidecar:
        load = Load("simple", 8, 1, _script(rig.folder))
        for pool in POOLS:
            pgbench.run(rig, Target(SIDECAR, sidecar.port, database=pool), load)
        connection = http.client.HTTPConnection(HOST, sidecar.http_port, timeout=10)
        page = _scrape(connection)
        for number in range(-_WARM_UP, _count(options)):
            time.sleep(_REST)
            began = time.monotonic()
            page = _scrape(connection)
            ended = time.monotonic()
            time.sleep(_REST + ended - began)
            if number >= 0:
                scrapes.append((began, ended))
                pauses.append((ended + _REST, ended + _REST + ended - began))
                renders.append(_render_time(page.text))
            rig.progress.tick()
        connection.close()
        shown = page.text.count("\npgsidecar_statement_info{")
        if shown != STATEMENTS * len(POOLS):
            raise BenchFailed(f"the page has {shown} statements, not {STATEMENTS} for each pool")
    stalls = read_stalls(file)
    report.scrapes = Scrapes(
        stalls=[_longest(stalls, interval) for interval in scrapes],
        idle_stalls=[_longest(stalls, interval) for interval in pauses],
        renders=renders[1:],  # a page tells how long the one before took
        answers=[ended - began for began, ended in scrapes],
        page_bytes=page.size,
        lines=page.text.count("\n"),
    )
    rig.progress.done(expected(options))


def _script(folder: Path) -> Path:
    """A transaction of as many statements, all cheap: each is an addition longer than the one before."""
    path = folder / "statements.sql"
    lines = [
        f"SELECT abalance{' + 1' * number} FROM pgbench_accounts WHERE aid = 1;"
        for number in range(STATEMENTS)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def _count(options: Options) -> int:
    return 60 if options.quick else 300


def _scrape(connection: http.client.HTTPConnection) -> _Page:
    try:
        connection.request("GET", "/metrics", headers=_HEADERS)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as exc:
        raise BenchFailed(f"/metrics does not answer: {exc!r}") from exc
    if answer.status != 200 or answer.getheader("Content-Encoding") != "gzip":
        raise BenchFailed(f"/metrics answers {answer.status}, not a page in gzip")
    return _Page(gzip.decompress(body).decode(), len(body))


def _render_time(text: str) -> float:
    found = _RENDER.search(text)
    if found is None:
        raise BenchFailed("the page has no pgsidecar_metrics_render_seconds")
    return float(found[1])


def _longest(stalls: Sequence[Interval], within: Interval) -> float:
    """The longest of the stalls that lie in the interval, even partly. 0: none was kept."""
    first = bisect.bisect_left(stalls, within[0], key=lambda stall: stall[1])
    longest = 0.0
    for began, ended in stalls[first:]:
        if began > within[1]:
            break
        longest = max(longest, ended - began)
    return longest
