"""A server for tests whose data directory is a copy of one that initdb has made before.

initdb is a second of work, a copy a tenth of it. Each test process has one data directory of a kind.
Copies, no links: servers write in place. And in memory, where there is room: the many small files of
a data directory are what a disk is slowest at.
"""

import atexit
import functools
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sidecar.demo.install import server_account, temporary_root
from sidecar.demo.postgres import Auth, EmbeddedPostgres

_USER = "postgres"
_PASSWORD = secrets.token_urlsafe(12)  # of all servers whose tests name none

_SHARED_MEMORY = Path("/dev/shm")
_ROOM = 4 << 30  # bytes that are free in it; tests take a few hundred MB


class CopiedPostgres(EmbeddedPostgres):
    """With a user or a password of its own, it has a data directory of its own, too."""

    def __init__(
        self,
        version: int = 18,
        settings: Mapping[str, str] | None = None,
        auth: Auth = "trust",
        user: str = _USER,
        password: str | None = None,
        database: str = "postgres",
    ) -> None:
        self._template: str | None = None
        if user == _USER and password is None:
            self._template = f"{version}-{auth}"
            password = None if auth == "trust" else _PASSWORD
        super().__init__(version, settings, auth, user, password, database)

    def make_data(self) -> None:
        template = None if self._template is None else _templates() / self._template
        if template is not None and template.exists():
            _copy(template, self.data_dir)
        else:
            super().make_data()
            if template is not None:
                _copy(self.data_dir, template)


@functools.cache
def _templates() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pgsidecar-data-", dir=temporary_root()))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all; the server's account owns it."""
    account = server_account()
    fresh = target.with_name(f"{target.name}.new")
    shutil.copytree(source, fresh)
    if account is not None:
        for folder, _, names in os.walk(fresh):
            os.chown(folder, account.uid, account.gid)
            for name in names:
                os.chown(os.path.join(folder, name), account.uid, account.gid)
    fresh.rename(target)


def use_shared_memory() -> None:
    """Have the folders of servers in memory, here and in child processes, unless TMPDIR says where.

    Programs must be allowed to run there: those of PostgreSQL may have to be copied.
    """
    if "TMPDIR" in os.environ or not os.access(_SHARED_MEMORY, os.W_OK | os.X_OK):
        return
    found = os.statvfs(_SHARED_MEMORY)
    if found.f_flag & os.ST_NOEXEC or found.f_bavail * found.f_frsize < _ROOM:
        return
    # what tests leave for a look at it stays on disk: pytest keeps the folders of three runs
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = tempfile.tempdir = str(_SHARED_MEMORY)
