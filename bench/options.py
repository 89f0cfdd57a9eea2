"""The command line of the benchmark, and what it means."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

MODES: Final = ("simple", "extended", "prepared")
CLIENTS: Final = (1, 8, 50, 200)
MEASURES: Final = ("throughput", "recording", "scrape", "memory")

MAX_CLIENTS: Final = 300
"""More than this would not fit into PostgreSQL's ``max_connections`` when they connect directly."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured, and for how long. ``seconds`` is the length of one pgbench run."""

    quick: bool = False
    seconds: int = 3
    rounds: int = 5
    modes: tuple[str, ...] = MODES
    clients: tuple[int, ...] = CLIENTS
    only: str | None = None
    json: Path | None = None
    markdown: Path | None = None
    pgbouncer: Path | None = None

    @property
    def measures(self) -> tuple[str, ...]:
        return MEASURES if self.only is None else (self.only,)

    def command(self) -> str:
        """The command line that gives the same measurement, without names of files."""
        words = ["python -m bench"]
        words += ["--quick"] if self.quick else []
        words += [f"--seconds {self.seconds} --rounds {self.rounds}"]
        words += [f"--modes {','.join(self.modes)}"] if self.modes != MODES else []
        given = ",".join(map(str, self.clients))
        words += [f"--clients {given}"] if self.clients != CLIENTS else []
        words += [f"--only {self.only}"] if self.only else []
        return " ".join(words)

    def values(self) -> dict[str, object]:
        files = ("json", "markdown", "pgbouncer")
        return {name: value for name, value in asdict(self).items() if name not in files}


QUICK: Final = Options(quick=True, seconds=1, rounds=2)
FULL: Final = Options()


def parse(arguments: Sequence[str] | None) -> Options:
    given = _parser().parse_args(arguments)
    preset = QUICK if given.quick else FULL
    return Options(
        quick=given.quick,
        seconds=preset.seconds if given.seconds is None else given.seconds,
        rounds=preset.rounds if given.rounds is None else given.rounds,
        modes=given.modes,
        clients=given.clients,
        only=given.only,
        json=given.json,
        markdown=given.markdown,
        pgbouncer=given.pgbouncer,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="What the sidecar costs, next to PgBouncer and to no pooler at all.",
        epilog="Nothing else should run on the machine meanwhile. docs/benchmarks.md tells more.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a first impression in about three minutes")
    add(
        "--seconds",
        type=_seconds,
        metavar="S",
        help=f"length of one pgbench run ({FULL.seconds}; quick {QUICK.seconds})",
    )
    add(
        "--rounds",
        type=_rounds,
        metavar="N",
        help=f"runs of each kind; their median counts ({FULL.rounds}; quick {QUICK.rounds})",
    )
    add("--modes", type=_modes, default=MODES, metavar="M,..", help=f"of {','.join(MODES)}")
    add(
        "--clients",
        type=_clients,
        default=CLIENTS,
        metavar="N,..",
        help=f"clients at a time ({','.join(map(str, CLIENTS))})",
    )
    add("--only", choices=MEASURES, help="one of the measures")
    add("--json", type=Path, metavar="FILE", help="where the values go (bench/results/)")
    add("--pgbouncer", type=Path, metavar="PROGRAM", help="this PgBouncer and no other")
    add("--markdown", type=Path, metavar="FILE.json", help="measure nothing, print its tables")
    return parser


def _seconds(text: str) -> int:
    seconds = int(text)  # pgbench takes no fractions
    if not 1 <= seconds <= 600:
        raise argparse.ArgumentTypeError(f"{text} is not within 1 to 600")
    return seconds


def _rounds(text: str) -> int:
    rounds = int(text)
    if not 1 <= rounds <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not within 1 to 100")
    return rounds


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    if unknown := set(modes) - set(MODES):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(MODES)}")
    return modes


def _clients(text: str) -> tuple[int, ...]:
    clients = tuple(map(int, text.split(",")))
    if not all(1 <= number <= MAX_CLIENTS for number in clients):
        raise argparse.ArgumentTypeError(f"{text}: each must be within 1 to {MAX_CLIENTS}")
    return clients
