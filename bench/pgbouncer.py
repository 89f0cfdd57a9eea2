"""Finds a PgBouncer to compare with, and builds one where the installed one is too old.

Before 1.21 PgBouncer has no prepared statements in transaction mode, and Debian 12 has 1.18. Then the
source of a newer one is fetched by apt, with its signatures checked, from the mirror that apt uses
already, and compiled against the installed libevent: half a minute, once, kept in the user's
cache folder. Nothing is installed and no account but ours is needed.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.progress import Progress
from bench.results import BenchFailed

Version = tuple[int, ...]

PREPARED_SINCE: Final[Version] = (1, 21)

_SUITES: Final = (
    "sid",
    "trixie",
)  # Debian's; the newest version that can be fetched and built wins
_KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_STEP_TIMEOUT: Final = 240  # s
_LIBEVENT: Final = "libevent-2.1.so.7"  # what the package libevent-2.1-7 installs


@dataclass(frozen=True, slots=True)
class Program:
    path: Path
    version: Version
    origin: str

    def describe(self) -> str:
        return f"{'.'.join(map(str, self.version))} ({self.origin})"

    @property
    def has_prepared(self) -> bool:
        """Whether it keeps prepared statements in transaction mode."""
        return self.version >= PREPARED_SINCE


def find(given: Path | None, progress: Progress) -> Program:
    """The given one; else the installed one if it is new enough, one built earlier, or one built
    now; else the installed one. Raises BenchFailed if there is none at all.
    """
    if given is not None:
        return _inspect(given, "given")
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    found = shutil.which("pgbouncer", path=path)
    installed = _inspect(Path(found), "installed") if found else None
    if installed is not None and installed.has_prepared:
        return installed
    try:
        return _built_earlier() or _build(progress)
    except (OSError, subprocess.SubprocessError, BenchFailed) as exc:
        if installed is None:
            raise BenchFailed(f"no PgBouncer is installed, and none could be built: {exc}") from exc
        progress.say(f"no newer PgBouncer could be built, using {installed.describe()}: {exc}")
        return installed


def _inspect(path: Path, origin: str) -> Program:
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as exc:
        raise BenchFailed(f"{path} does not run: {exc}") from exc
    version = re.match(r"PgBouncer (\d+(?:\.\d+)*)", said)
    if version is None:
        raise BenchFailed(f"{path} is no PgBouncer: it says {said[:80]!r}")
    return Program(path, tuple(map(int, version[1].split("."))), origin)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pgsidecar" / "pgbouncer"


def _built_earlier() -> Program | None:
    programs = []
    for path in _cache().glob("*/pgbouncer"):
        try:
            programs.append(_inspect(path, "built from Debian's source"))
        except BenchFailed:
            continue  # built for libraries that are gone
    return max(programs, key=lambda program: program.version, default=None)


def _build(progress: Progress) -> Program:
    progress.step("fetching and compiling a newer PgBouncer, once")
    folder = _cache() / "build"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        apt = _Apt(folder)
        headers = _libevent_headers(apt, folder)
        failures = []
        for version in apt.versions("pgbouncer"):
            try:
                built = _compile(apt, version, headers)
            except BenchFailed as exc:
                failures.append(str(exc))
                continue
            keep = _cache() / version.partition("-")[0]
            keep.mkdir(exist_ok=True)
            shutil.copy2(built, keep / "pgbouncer")
            return _inspect(keep / "pgbouncer", "built from Debian's source")
        raise BenchFailed("; ".join(failures) or "apt knows no source of it")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Apt:
    """apt with lists of its own: the configured mirror, our suites, nothing on the system changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        wanted = ["--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages", "Origin: Debian"]
        known = _run(["apt-get", "indextargets", *wanted], folder).split("\n")[0].split()
        if len(known) != 2:
            raise BenchFailed("apt has no Debian mirror configured, or no package lists yet")
        uri, own = known
        option = f"[signed-by={_KEYRING}] " if _KEYRING.exists() else ""
        lines = [f"deb {option}{uri} {own} main"]
        lines += [f"deb-src {option}{uri} {suite} main" for suite in _SUITES]
        (folder / "sources.list").write_text("\n".join(lines) + "\n")
        for needed in ("lists/partial", "cache/archives/partial"):
            (folder / needed).mkdir(parents=True)
        self._call("apt-get", "-qq", "update")

    def versions(self, package: str) -> list[str]:
        """Versions of the source, newest first."""
        text = self._call("apt-cache", "showsrc", package)
        versions = set(re.findall(r"^Version: (.+)$", text, re.MULTILINE))
        return sorted(versions, key=_upstream, reverse=True)

    def source(self, package: str, version: str) -> Path:
        """Download the source and return upstream's archive."""
        options = ["-qq", "--only-source", "--download-only"]
        self._call("apt-get", *options, "source", f"{package}={version}")
        upstream = version.partition("-")[0]
        return self._downloaded(f"{package}_{upstream}.orig.tar.?z*")

    def download(self, package: str) -> Path:
        self._call("apt-get", "-qq", "download", package)
        return self._downloaded(f"{package}_*.deb")

    def _downloaded(self, pattern: str) -> Path:
        for path in self.folder.glob(pattern):
            return path
        raise BenchFailed(f"apt left no {pattern}")

    def _call(self, program: str, *arguments: str) -> str:
        folder = self.folder
        settings = {
            "Dir::Etc::SourceList": folder / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State::Lists": folder / "lists",
            "Dir::Cache": folder / "cache",
            "APT::Sandbox::User": "root",  # the folder need not be open to apt's own account
            "Acquire::http::Timeout": 15,
            "Acquire::Retries": 1,
        }
        options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        return _run([program, *options, *arguments], folder)


def _upstream(version: str) -> Version:
    return tuple(map(int, re.findall(r"\d+", version.partition("-")[0])))


def _libevent_headers(apt: _Apt, folder: Path) -> list[str]:
    """The compiler's options for libevent's headers: unpacked beside us, not installed."""
    target = folder / "libevent"
    _run(["dpkg-deb", "-x", str(apt.download("libevent-dev")), str(target)], folder)
    return [f"-I{path.parent.parent}" for path in target.rglob("event2/event-config.h")] + [
        f"-I{target / 'usr/include'}"
    ]


def _compile(apt: _Apt, version: str, headers: Sequence[str]) -> Path:
    """TLS and c-ares are left out: nothing here uses them."""
    archive = apt.source("pgbouncer", version)
    source = apt.folder / f"source-{version}"
    source.mkdir()
    _run(["tar", "-xf", str(archive), "--strip-components=1"], source)
    libevent = [f"LIBEVENT_CFLAGS={' '.join(headers)}", f"LIBEVENT_LIBS=-l:{_LIBEVENT}"]
    _run(["./configure", "--without-openssl", "--without-cares", *libevent], source)
    _run(["make", f"-j{os.cpu_count() or 1}", "pgbouncer"], source)
    return source / "pgbouncer"


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_STEP_TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        words = [command[0], *(word for word in command[1:] if word in ("update", "source"))]
        raise BenchFailed(f"{' '.join(words)}: {said[-1] if said else done.returncode}")
    return done.stdout
