"""The report as tables: medians, ratios, and how they stand to what was aimed at.

A ratio is the median of the rounds' own ratios, each of two runs made right after one another. It
need not be the quotient of the medians beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Final

from bench.options import MODES
from bench.pgbench import percentile
from bench.recording import CLIENTS as RECORDING_CLIENTS
from bench.recording import MODES as RECORDING_MODES
from bench.results import DIRECT, PGBOUNCER, RECORDING, SIDECAR, SILENT, Report, Run
from bench.rig import POOL_SIZE

THROUGHPUT_STEP: Final = {"simple": 0.6, "extended": 0.7, "prepared": 0.7}
THROUGHPUT_GOAL: Final = 1.0  # of PgBouncer's, at least
CPU_STEP: Final = 1.4
CPU_GOAL: Final = 1.0  # of PgBouncer's, at most
RECORDING_GOAL: Final = 0.03  # of the throughput, at most
STALL_GOAL: Final = 0.002  # s
CLIENT_GOAL: Final = 10 * 1024  # bytes an idle client
MEMORY_GOAL: Final = 120 * 2**20  # bytes with 5,000 clients
MEMORY_CLIENTS: Final = 5000

_NAMES: Final = {DIRECT: "direct", PGBOUNCER: "PgBouncer", SIDECAR: "sidecar"}


class Grade(Enum):
    """How a figure stands to its target."""

    GOAL = "goal"
    STEP = "first step"
    MISSED = "missed"


@dataclass(frozen=True, slots=True)
class Cell:
    text: str
    grade: Grade | None = None


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[Cell]]
    notes: list[str]
    text_columns: int = 1  # aligned left


Metric = Callable[[Run], float | None]


@dataclass(frozen=True, slots=True)
class _Case:
    """All runs of one mode with one number of clients."""

    mode: str
    clients: int
    runs: list[Run]
    mark: str = ""  # refers to a note

    def values(self, target: str, metric: Metric) -> dict[int, float]:
        """By round."""
        found = {run.round: metric(run) for run in self.runs if run.target == target}
        return {round: value for round, value in found.items() if value is not None}

    def ratios(self, over: str, under: str, metric: Metric) -> list[float]:
        """Of the rounds that have both."""
        uppers, lowers = self.values(over, metric), self.values(under, metric)
        return [uppers[round] / lowers[round] for round in uppers if lowers.get(round)]

    def label(self) -> list[Cell]:
        return [Cell(self.mode + self.mark), Cell(str(self.clients))]

    def middle(self, target: str, metric: Metric, form: str, scale: float = 1.0) -> Cell:
        values = self.values(target, metric).values()
        return Cell(format(median(values) * scale, form)) if values else _NONE


_NONE: Final = Cell("n/a")
_BY_SESSION: Final = (
    "prepared*: this PgBouncer has no prepared statements in transaction mode and ran in "
    f"SESSION mode, which serves no more than {POOL_SIZE} clients (n/a above)"
)


def tables(report: Report) -> list[Table]:
    """Those for which something was measured."""
    found = []
    if cases := list(_cases(report)):
        found += [_throughput(cases), _latency(cases), _cpu(cases)]
        if any(case.mark for case in cases):
            for table in found:
                table.notes.append(_BY_SESSION)
    if report.recording:
        found.append(_recording(report.recording))
    if report.scrapes is not None:
        found.append(_scrapes(report))
    if len(report.memory) > 1:
        found.append(_memory(report))
    return found


def _cases(report: Report) -> Iterator[_Case]:
    for mode in MODES:
        runs = [run for run in report.throughput if run.mode == mode]
        mark = "*" if report.prepared_by_session and mode == "prepared" else ""
        for clients in sorted({run.clients for run in runs}):
            yield _Case(mode, clients, [run for run in runs if run.clients == clients], mark)


def _throughput(cases: Sequence[_Case]) -> Table:
    rows = []
    for case in cases:
        ratios = case.ratios(SIDECAR, PGBOUNCER, _tps)
        grade = _at_least(ratios, THROUGHPUT_GOAL, THROUGHPUT_STEP[case.mode])
        rates = [case.middle(name, _tps, ",.0f") for name in _NAMES]
        rows.append([*case.label(), *rates, *_ratio_cells(ratios, grade)])
    notes = [
        f"transactions a second; target of the ratio: {THROUGHPUT_GOAL:.1f}x, first step "
        + ", ".join(f"{step:.1f}x {mode}" for mode, step in THROUGHPUT_STEP.items())
    ]
    header = ["mode", "clients", *_NAMES.values(), "ratio", "lowest-highest", "target"]
    return Table("Throughput", header, rows, notes)


def _latency(cases: Sequence[_Case]) -> Table:
    rows = []
    for case in cases:
        cells = case.label()
        for metric in (_p50, _p99):
            cells += [case.middle(name, metric, ".3f", 1e3) for name in _NAMES]
            cells.append(_ratio(case.ratios(SIDECAR, PGBOUNCER, metric)))
        rows.append(cells)
    names = list(_NAMES.values())
    header = ["mode", "clients", *_prefixed("P50", names), "ratio"]
    header += [*_prefixed("P99", names), "ratio"]
    return Table("Latency", header, rows, ["milliseconds, of every single transaction"])


def _cpu(cases: Sequence[_Case]) -> Table:
    rows = []
    for case in cases:
        ratios = case.ratios(SIDECAR, PGBOUNCER, _cpu_time)
        grade = _at_most(ratios, CPU_GOAL, CPU_STEP)
        cells = case.label()
        for name in (PGBOUNCER, SIDECAR):
            cells += [case.middle(name, metric, ".1f", 1e6) for metric in (_cpu_time, _user)]
        rows.append([*cells, *_ratio_cells(ratios, grade)])
    header = ["mode", "clients", "PgBouncer", "user", "sidecar", "user"]
    note = "microseconds of the pooler's process; user: without the kernel's part; "
    note += f"target of the ratio: {CPU_GOAL:.1f}x, first step {CPU_STEP:.1f}x"
    header += ["ratio", "lowest-highest", "target"]
    return Table("Pooler CPU per transaction", header, rows, [note])


def _recording(runs: list[Run]) -> Table:
    rows: list[list[Cell]] = []
    pairs = 0
    for mode in RECORDING_MODES:
        of_mode = [run for run in runs if run.mode == mode]
        case = _Case(mode, RECORDING_CLIENTS, of_mode)
        losses = [1 - ratio for ratio in case.ratios(RECORDING, SILENT, _tps)]
        extra = [ratio - 1 for ratio in case.ratios(RECORDING, SILENT, _cpu_time)]
        pairs = len(losses)
        grade = _at_most(losses, RECORDING_GOAL, RECORDING_GOAL)
        tps = [case.middle(name, _tps, ",.0f") for name in (RECORDING, SILENT)]
        cpu = [case.middle(name, _cpu_time, ".1f", 1e6) for name in (RECORDING, SILENT)]
        rows += [
            [Cell(f"{mode}: per second"), *tps, *_percent_cells(losses), _target(grade)],
            [Cell(f"{mode}: CPU, us"), *cpu, *_percent_cells(extra), Cell("")],
        ]
    notes = [
        f"transactions per second, CPU per transaction, {RECORDING_CLIENTS} clients,"
        f" {pairs} pairs of runs each; target: at most {RECORDING_GOAL:.0%} of the throughput"
    ]
    header = ["", "recording", "off", "cost", "middle half", "target"]
    return Table("Cost of recording", header, rows, notes)


def _scrapes(report: Report) -> Table:
    scrapes = report.scrapes
    assert scrapes is not None
    during, idle = _spread(scrapes.stalls), _spread(scrapes.idle_stalls)
    added = [with_ - without for with_, without in zip(during, idle, strict=True)]
    # the worst of them: a hiccup of the machine in a pause must not hide what scrapes do
    verdict = _target(Grade.GOAL if max(added) <= STALL_GOAL else Grade.MISSED)
    if verdict.grade is Grade.GOAL and idle[1] > STALL_GOAL:
        verdict = Cell("unclear: the machine stalls as long by itself")
    rows = [
        [Cell("longest stall during a scrape"), *_ms(during), Cell("")],
        [Cell("during a pause as long"), *_ms(idle), Cell("")],
        [Cell("caused by the scrape"), *_ms(added), verdict],
        [Cell("rendering the page"), *_ms(_spread(scrapes.renders)), Cell("")],
        [Cell("request to answer"), *_ms(_spread(scrapes.answers)), Cell("")],
    ]
    notes = [
        f"milliseconds, {len(scrapes.stalls)} scrapes of {scrapes.lines:,} lines (OpenMetrics, "
        f"gzip, {scrapes.page_bytes / 1024:.0f} KiB), two pools; "
        f"target: at most {STALL_GOAL * 1e3:.0f} ms"
    ]
    header = ["", "median", "P99", "longest", "target"]
    return Table("Event loop and scrapes", header, rows, notes)


def _memory(report: Report) -> Table:
    before = report.memory[0]
    rows = [[Cell(f"{before.clients:,}"), Cell(f"{_mib(before.resident):.1f}"), Cell(""), Cell("")]]
    for memory in report.memory[1:]:
        each = (memory.resident - before.resident) / (memory.clients - before.clients)
        is_met = each <= CLIENT_GOAL
        if memory.clients >= MEMORY_CLIENTS:
            is_met = is_met and memory.resident <= MEMORY_GOAL
        rows.append(
            [
                Cell(f"{memory.clients:,}"),
                Cell(f"{_mib(memory.resident):.1f}"),
                Cell(f"{each / 1024:.2f}"),
                _target(Grade.GOAL if is_met else Grade.MISSED),
            ]
        )
        before = memory
    notes = [
        "resident memory, and its growth by each further client since the row above; "
        f"target: at most {CLIENT_GOAL // 1024} KiB a client, and "
        f"{_mib(MEMORY_GOAL):.0f} MiB with {MEMORY_CLIENTS:,}"
    ]
    header = ["idle clients", "MiB", "KiB a client", "target"]
    return Table("Memory of idle clients", header, rows, notes, text_columns=0)


# -- figures and cells -----------------------------------------------------------------------------


def _tps(run: Run) -> float | None:
    return run.throughput


def _p50(run: Run) -> float | None:
    return run.p50


def _p99(run: Run) -> float | None:
    return run.p99


def _cpu_time(run: Run) -> float | None:
    return run.cpu


def _user(run: Run) -> float | None:
    return run.user


def _at_least(values: Sequence[float], goal: float, step: float) -> Grade | None:
    """The grade of their median, as it is shown: with two digits."""
    if not values:
        return None
    middle = round(median(values), 2)
    if middle >= goal:
        return Grade.GOAL
    return Grade.STEP if middle >= step else Grade.MISSED


def _at_most(values: Sequence[float], goal: float, step: float) -> Grade | None:
    return _at_least([-value for value in values], -goal, -step)


def _target(grade: Grade | None) -> Cell:
    return Cell("" if grade is None else grade.value, grade)


def _ratio(ratios: Sequence[float]) -> Cell:
    return Cell(f"{median(ratios):.2f}x") if ratios else _NONE


def _ratio_cells(ratios: Sequence[float], grade: Grade | None) -> list[Cell]:
    span = Cell(f"{min(ratios):.2f}-{max(ratios):.2f}") if ratios else _NONE
    return [_ratio(ratios), span, _target(grade)]


def _percent_cells(shares: Sequence[float]) -> list[Cell]:
    """The median, and the range of the half around it."""
    if not shares:
        return [_NONE, _NONE]
    ordered = sorted(shares)
    quarter = len(ordered) // 4
    low, high = ordered[quarter], ordered[-1 - quarter]
    return [Cell(f"{median(ordered):+.1%}"), Cell(f"{low:+.1%} to {high:+.1%}")]


def _spread(values: Sequence[float]) -> list[float]:
    """Median, P99, longest."""
    return [median(values), percentile(sorted(values), 0.99), max(values)]


def _ms(seconds: Sequence[float]) -> list[Cell]:
    return [Cell(f"{value * 1e3:.2f}") for value in seconds]


def _mib(size: int) -> float:
    return size / 2**20


def _prefixed(prefix: str, names: Sequence[str]) -> list[str]:
    return [f"{prefix} {names[0]}", *names[1:]]
