"""The files of incidents: written in a thread, at most so many, and no other file is ever touched.

The directory is for our own (mode 0700), its files too (0600). Each is written beside and renamed, so that nobody reads half
a file. A disk that is full or read-only costs one warning; incidents stay in memory.
"""

import errno
import logging
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from sidecar.events import IncidentKind
from sidecar.observe.capture import written
from sidecar.observe.incidents import Incident, file_name

log = logging.getLogger("pgsidecar.incidents")

_KINDS: Final = "|".join(IncidentKind)
_OURS: Final = re.compile(
    rf"\d{{8}}T\d{{6}}\.\d{{3}}Z-[A-Za-z0-9_]{{1,64}}-(?:{_KINDS})(?:-\d+)?\.json(?P<part>\.part)?"
)
_ABANDONED: Final = 60.0
"""Seconds after which a file that was not renamed belongs to a process that died."""


class IncidentFiles:
    """Everything here blocks; one thread at a time."""

    def __init__(self, directory: str, keep: int) -> None:
        self.directory: Final = Path(directory)
        self.keep: Final = keep
        self._is_broken = False

    def save(self, incidents: Iterable[Incident]) -> None:
        """Write them, and remove the oldest ones beyond ``keep``. Never raises OSError. Without any: see
        whether they could be written."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(self.directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "it is read-only, or somebody else's")
            for incident in incidents:
                self._write(incident)
            self._rotate()
        except OSError as exc:
            if not self._is_broken:
                self._is_broken = True
                log.warning(
                    "incidents are not written: they are kept in memory only",
                    extra={"directory": str(self.directory), "cause": exc.strerror or str(exc)},
                )
            return
        if self._is_broken:
            self._is_broken = False
            log.info("incidents are written again", extra={"directory": str(self.directory)})

    def _write(self, incident: Incident) -> None:
        path = self.directory / file_name(incident)
        part = path.with_name(path.name + ".part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        try:
            with open(os.open(part, flags, 0o600), "wb") as file:
                file.write(written(incident.to_json()))
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def _rotate(self) -> None:
        found: list[str] = []
        for name in os.listdir(self.directory):
            ours = _OURS.fullmatch(name)
            if ours is None:
                continue
            if not ours["part"]:
                found.append(name)
            elif time.time() - (self.directory / name).stat().st_mtime > _ABANDONED:
                (self.directory / name).unlink(missing_ok=True)
        found.sort(key=lambda name: name[:20])  # by time
        for name in found[: max(0, len(found) - self.keep)]:
            (self.directory / name).unlink(missing_ok=True)
