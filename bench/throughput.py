"""Throughput, latency and CPU time per transaction: direct, through PgBouncer, through the sidecar.

Every round runs each query mode with each number of clients against all three, one right after the
other, and in another order each round: what changes on the machine meanwhile hits all of them alike.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from bench import pgbench, poolers
from bench.options import Options
from bench.pgbench import Load, Target
from bench.pgbouncer import find
from bench.results import DIRECT, PGBOUNCER, SIDECAR, BenchFailed, Report
from bench.rig import POOL_SIZE, Rig

OVERHEAD: Final = 0.6  # s a run takes longer than its time: start, logins, reading its log
_WARM_UP: Final = Load("extended", 50, 1)  # makes each pooler open its whole pool
_FAILURES: Final = 3  # then it makes no sense to go on


def expected(options: Options) -> float:
    """Seconds it will take."""
    each_round = sum(load.length + OVERHEAD for load in _loads(options))
    return 3 * (options.rounds * each_round + _WARM_UP.length + OVERHEAD)


def measure(rig: Rig, options: Options, report: Report) -> None:
    program = find(options.pgbouncer, rig.progress)
    rig.progress.say(f"PgBouncer {program.describe()}")
    report.machine["PgBouncer"] = program.describe()
    report.prepared_by_session = not program.has_prepared
    with poolers.pgbouncer(rig, program) as pgbouncer, poolers.sidecar(rig) as sidecar:
        report.configs |= {PGBOUNCER: pgbouncer.config, SIDECAR: sidecar.config}
        targets = [
            Target(DIRECT, rig.postgres.port),
            Target(PGBOUNCER, pgbouncer.port, pgbouncer.pid),
            Target(SIDECAR, sidecar.port, sidecar.pid),
        ]
        _warm_up(rig, targets)
        for round in range(options.rounds):
            for load in _loads(options):
                _compare(rig, options, report, _rotated(targets, round), load, round)


def _loads(options: Options) -> Iterator[Load]:
    for mode in options.modes:
        for clients in options.clients:
            yield Load(mode, clients, options.seconds)


def _rotated(targets: Sequence[Target], round: int) -> list[Target]:
    first = round % len(targets)
    return [*targets[first:], *targets[:first]]


def _warm_up(rig: Rig, targets: Sequence[Target]) -> None:
    for target in targets:
        rig.progress.step(f"{target.name}: warming up")
        pgbench.run(rig, target, _WARM_UP)
        rig.progress.done(_WARM_UP.length + OVERHEAD)


def _compare(
    rig: Rig,
    options: Options,
    report: Report,
    targets: Sequence[Target],
    load: Load,
    round: int,
) -> None:
    for target in targets:
        rig.progress.step(
            f"round {round + 1} of {options.rounds}: "
            f"{load.mode}, {load.clients} clients, {target.name}"
        )
        _run(rig, report, target, load, round)
        rig.progress.done(load.length + OVERHEAD)


def _run(rig: Rig, report: Report, target: Target, load: Load, round: int) -> None:
    """One run. Its failure is noted, and the others go on, unless there are many of them."""
    if report.prepared_by_session and load.mode == "prepared" and target.name == PGBOUNCER:
        if load.clients > POOL_SIZE:
            return  # in session mode they would wait for each other's end
        target = Target(target.name, target.port, target.pid, poolers.SESSION_DATABASE)
    try:
        report.throughput.append(pgbench.run(rig, target, load, round))
        report.note_command(load.command())
    except BenchFailed as exc:
        report.failures.append(f"throughput: {exc}")
        rig.progress.say(f"failed: {load.command()} on {target.name}")
        if len(report.failures) >= _FAILURES:
            raise
