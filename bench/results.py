"""What was measured: every raw value, where and when; kept as JSON."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Final, Self

import sidecar.proxy.relay

FORMAT: Final = 1

DIRECT, PGBOUNCER, SIDECAR = "direct", "pgbouncer", "sidecar"
RECORDING, SILENT = "recording", "silent"


class BenchFailed(Exception):
    """Something could not be measured; the message says what and why."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of pgbench. Times are seconds, CPU is the pooler's, seconds per transaction."""

    target: str
    mode: str
    clients: int
    round: int
    transactions: int
    throughput: float  # transactions a second, without the time to connect
    p50: float
    p99: float
    user: float | None = None  # None: there is no pooler
    system: float | None = None

    @property
    def cpu(self) -> float | None:
        return None if self.user is None or self.system is None else self.user + self.system


@dataclass(frozen=True, slots=True)
class Scrapes:
    """The longest stall of the event loop during each scrape, and each equal time without one."""

    stalls: list[float]
    idle_stalls: list[float]
    renders: list[float]  # pgsidecar_metrics_render_seconds
    answers: list[float]  # request to last byte
    page_bytes: int
    lines: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of the sidecar with that many idle clients, bytes."""

    clients: int
    resident: int


@dataclass(slots=True)
class Report:
    began: str
    command: str
    options: dict[str, object]
    machine: dict[str, str]
    ended: str = ""
    commands: list[str] = field(default_factory=list)
    configs: dict[str, str] = field(default_factory=dict)
    prepared_by_session: bool = False  # PgBouncer's prepared mode ran in session mode
    throughput: list[Run] = field(default_factory=list)
    recording: list[Run] = field(default_factory=list)
    scrapes: Scrapes | None = None
    memory: list[Memory] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def note_command(self, command: str) -> None:
        if command not in self.commands:
            self.commands.append(command)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        try:
            values = json.loads(path.read_text())
            if values.pop("format") != FORMAT:
                raise BenchFailed(f"{path}: written by another version of the benchmark")
            for name in ("throughput", "recording"):
                values[name] = [Run(**run) for run in values[name]]
            values["memory"] = [Memory(**memory) for memory in values["memory"]]
            if values["scrapes"] is not None:
                values["scrapes"] = Scrapes(**values["scrapes"])
            return cls(**values)
        except OSError as exc:
            raise BenchFailed(f"{path}: {exc.strerror}") from exc
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise BenchFailed(f"{path}: not a result of the benchmark ({exc!r})") from exc


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def machine() -> dict[str, str]:
    """What the figures depend on."""
    is_compiled = not str(sidecar.proxy.relay.__file__).endswith(".py")
    return {
        "CPU": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load average at the start": f"{os.getloadavg()[0]:.2f}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "uvloop": _version("uvloop"),
        "sidecar": f"{sidecar.__version__}, {'compiled' if is_compiled else 'interpreted'}",
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown CPU"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
