"""``python -m bench``: measures, prints the tables, keeps every value as JSON.

Exit codes: 0 everything was measured (whatever the figures say), 1 something could not be, 2 wrong
arguments, 130 and 143 stopped by Ctrl-C or SIGTERM; nothing that was started is left then.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from bench import memory, recording, render, rig, scrape, throughput
from bench.options import Options, parse
from bench.progress import Progress
from bench.results import BenchFailed, Report, machine, now
from bench.rig import Rig

RESULTS: Final = Path(__file__).parent / "results"
_SET_UP: Final = 6.0  # s


@dataclass(frozen=True, slots=True)
class _Measure:
    expected: Callable[[Options], float]
    measure: Callable[[Rig, Options, Report], None]


_MEASURES: Final = {
    "throughput": _Measure(throughput.expected, throughput.measure),
    "recording": _Measure(recording.expected, recording.measure),
    "scrape": _Measure(scrape.expected, scrape.measure),
    "memory": _Measure(memory.expected, memory.measure),
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        if options.markdown is not None:
            print(render.markdown(Report.load(options.markdown)), end="")
            return 0
        return _bench(options)
    except BenchFailed as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbench: stopped", file=sys.stderr)
        return 130


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)  # so that everything we started is ended on the way out


def _bench(options: Options) -> int:
    expected = _SET_UP + sum(_MEASURES[name].expected(options) for name in options.measures)
    progress = Progress(sys.stderr, expected)
    report = Report(now(), options.command(), options.values(), machine())
    with rig.set_up(progress) as built:
        report.machine["PostgreSQL"] = built.postgres.psql("SHOW server_version")
        progress.done(_SET_UP)
        for name in options.measures:
            try:
                _MEASURES[name].measure(built, options, report)
            except BenchFailed as exc:
                if (failure := f"{name}: {exc}") not in report.failures:
                    report.failures.append(failure)
                progress.say(f"{name}: could not be measured, the reason is told at the end")
    progress.clear()
    return _finish(options, report)


def _finish(options: Options, report: Report) -> int:
    report.ended = now()
    path = options.json or RESULTS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    try:
        report.save(path)
    except OSError as exc:
        report.failures.append(f"{path}: {exc.strerror}")
    has_colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(render.terminal(report, has_colours))
    print(f"values: {path}")
    for failure in report.failures:
        print(f"bench: {failure}", file=sys.stderr)
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
