"""Incidents: what went wrong, since when, why, and the recording of it.

Owns how many there are: at most ``keep`` in memory, one of a kind, pool and cause in 30 s, ten in ten minutes.
Writes one log line when one begins and one when it is over. Which ones begin is ``watchman``'s decision; the
files are ``incident_files``'.
"""

import logging
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from sidecar.events import IncidentKind
from sidecar.observe.capture import Json, iso
from sidecar.observe.verdict import Kind, Verdict

log = logging.getLogger("pgsidecar.incidents")

KEEP: Final = 50
APART: Final = 30.0
"""Seconds between two of one kind in one pool, with the same verdict: another one is news."""
MOST: Final = 10
WITHIN: Final = 600.0
"""So many, in so many seconds: a person reads no more, and a disk is not filled."""


@dataclass(frozen=True, slots=True)
class Incident:
    """``began_at`` and ``ended_at`` are unix times; the latter is None while it lasts."""

    id: str
    kind: IncidentKind
    pool: str
    began_at: float
    ended_at: float | None
    verdict: Verdict
    also: tuple[IncidentKind, ...] = ()
    """What else it brought about."""
    recording: Mapping[str, object] = field(default_factory=dict, repr=False)
    began: float = 0.0  # by the sidecar's clock, which nobody sets

    def summary(self) -> Json:
        """Without the recording."""
        ended = self.ended_at
        return {
            "id": self.id,
            "kind": self.kind.value,
            "also": [kind.value for kind in self.also],
            "pool": self.pool,
            "began_at": iso(self.began_at),
            "ended_at": None if ended is None else iso(ended),
            "duration_seconds": None if ended is None else round(ended - self.began_at, 3),
            "verdict": self.verdict.to_json(),
        }

    def to_json(self) -> Json:
        return {**self.summary(), **self.recording}


class IncidentStore:
    """``clock`` is the one that all instants are of, ``unix`` that of dates."""

    def __init__(
        self,
        keep: int,
        clock: Callable[[], float],
        directory: str | None = None,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self.keep = keep
        self.directory: Final = directory
        self.suppressed = dict.fromkeys(IncidentKind, 0)
        self.changed: Final[OrderedDict[str, Incident]] = OrderedDict()
        """By id, those to be written to files; only if there is a directory."""
        self._clock: Final = clock
        self._unix: Final = unix
        self._incidents: OrderedDict[str, Incident] = OrderedDict()  # oldest first
        self._last: dict[tuple[IncidentKind, str, Kind], float] = {}
        self._begun: deque[float] = deque(maxlen=MOST)

    def __len__(self) -> int:
        return len(self._incidents)

    def all(self) -> list[Incident]:
        """Newest first."""
        return list(reversed(self._incidents.values()))

    def get(self, id: str) -> Incident | None:
        return self._incidents.get(id)

    def unix(self, at: float) -> float:
        """An instant of the clock as unix time."""
        return self._unix() - (self._clock() - at)

    def iso(self, at: float) -> str:
        return iso(self.unix(at))

    def begin(
        self, kind: IncidentKind, began: float, verdict: Verdict, recording: Json
    ) -> Incident | None:
        """None if there are too many already."""
        now, pool = self._clock(), verdict.pool
        last = self._last.get((kind, pool, verdict.kind))
        is_soon = last is not None and now - last < APART
        is_much = len(self._begun) == MOST and now - self._begun[0] < WITHIN
        if is_soon or is_much:
            self.suppressed[kind] += 1
            log.info(
                "incident not recorded",
                extra={"pool": pool, "kind": kind.value, "headline": verdict.headline},
            )
            return None
        self._last[kind, pool, verdict.kind] = now
        self._begun.append(now)
        at = self.unix(began)
        incident = Incident(self._free_id(at, pool, kind), kind, pool, at, None, verdict)
        incident = replace(incident, recording=recording, began=began)
        self._keep(incident)
        log.warning(
            "incident",
            extra={
                "pool": pool,
                "kind": kind.value,
                "verdict": verdict.kind.value,
                "headline": verdict.headline,
                "incident": incident.id,
                "file": file_name(incident) if self.directory is not None else "",
            },
        )
        return incident

    def take_changed(self) -> list[Incident]:
        """Those to be written now."""
        taken = list(self.changed.values())
        self.changed.clear()
        return taken

    def update(self, incident: Incident) -> None:
        """What is known by now; nothing if it has made room for others."""
        if incident.id in self._incidents:
            self._keep(incident)

    def end(self, incident: Incident, ended: float) -> None:
        lasted = max(0.0, ended - incident.began)  # whatever became of the date in between
        done = replace(incident, ended_at=incident.began_at + lasted)
        self.update(done)
        log.warning(
            "incident over",
            extra={
                "pool": done.pool,
                "kind": done.kind.value,
                "verdict": done.verdict.kind.value,
                "headline": done.verdict.headline,
                "incident": done.id,
                "lasted": round(lasted, 3),
            },
        )

    def _keep(self, incident: Incident) -> None:
        self._incidents[incident.id] = incident
        while len(self._incidents) > self.keep:
            self._incidents.popitem(last=False)
        if self.directory is not None:
            self.changed[incident.id] = incident
            while len(self.changed) > self.keep:  # the disk is slow
                self.changed.popitem(last=False)

    def _free_id(self, at: float, pool: str, kind: IncidentKind) -> str:
        """Good for a file name and for a URL."""
        stamp = re.sub(r"[-:]", "", iso(at))
        name = re.sub(r"[^A-Za-z0-9_]", "_", pool)[:64]
        found = f"{stamp}-{name}-{kind.value}"
        number = 2
        while found in self._incidents:
            found = f"{stamp}-{name}-{kind.value}-{number}"
            number += 1
        return found


def file_name(incident: Incident) -> str:
    return incident.id + ".json"
