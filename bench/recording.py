"""What recording costs: the same sidecar with its recorder, and with one that records nothing.

Two processes, loaded in turn, the first one of each pair changing: the difference looked for is a
few per cent, so pairs count, and many of them.
"""

from typing import Final

from bench import pgbench, poolers
from bench.options import Options
from bench.pgbench import Load, Target
from bench.results import RECORDING, SILENT, Report
from bench.rig import Rig
from bench.throughput import OVERHEAD

MODES: Final = ("simple", "extended")
CLIENTS: Final = 8
_ROUNDS: Final = 3  # times the rounds of the throughput's comparison


def expected(options: Options) -> float:
    """Seconds it will take."""
    return 2 * len(MODES) * (_ROUNDS * options.rounds + 1) * (options.seconds + OVERHEAD)


def measure(rig: Rig, options: Options, report: Report) -> None:
    runner = ("bench.runner",)
    with (
        poolers.sidecar(rig, runner) as recording,
        poolers.sidecar(rig, runner, ["--silent"]) as silent,
    ):
        targets = [
            Target(RECORDING, recording.port, recording.pid),
            Target(SILENT, silent.port, silent.pid),
        ]
        for mode in MODES:
            _compare(rig, targets, Load(mode, CLIENTS, options.seconds), options, report)


def _compare(rig: Rig, targets: list[Target], load: Load, options: Options, report: Report) -> None:
    report.note_command(load.command())
    rounds = _ROUNDS * options.rounds
    for round in range(-1, rounds):  # -1 warms up
        for target in targets if round % 2 else reversed(targets):
            rig.progress.step(
                f"cost of recording, {load.mode}, round {max(1, round + 1)} of {rounds}"
            )
            run = pgbench.run(rig, target, load, round)
            rig.progress.done(options.seconds + OVERHEAD)
            if round >= 0:
                report.recording.append(run)
