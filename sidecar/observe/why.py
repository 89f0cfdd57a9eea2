"""What one pool's recorder knows of why: the flight recorder, the verdict, and the incidents that begin.

Pure. The ``PoolRecorder`` tells it what happens; this puts the parts together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from sidecar.events import IncidentKind, PoolGauges
from sidecar.observe.capture import Json, Wall, capture
from sidecar.observe.evidence import Evidence, Settings, gather
from sidecar.observe.failures import FailureEntry
from sidecar.observe.flight import Flight
from sidecar.observe.incidents import IncidentStore
from sidecar.observe.judge import judge
from sidecar.observe.verdict import Kind, Verdict
from sidecar.observe.watchman import Watchman
from sidecar.work import Blocker, Holder, Statement


class Why:
    """``blocked``, ``failures`` and ``statements`` are asked when they are needed: the root of what
    each connection waits for, what has failed lately, and the statements with most time."""

    def __init__(
        self,
        name: str,
        now: float,
        store: IncidentStore,
        leaks: Mapping[int, Holder],
        blocked: Callable[[], Mapping[int, Blocker]],
        failures: Callable[[], Sequence[FailureEntry]],
        statements: Callable[[], Sequence[Statement]],
    ) -> None:
        self.flight: Final = Flight(now, leaks)
        self.incidents: Final = dict.fromkeys(IncidentKind, 0)
        self.settings = Settings()
        self._name: Final = name
        self._blocked: Final = blocked
        self._failures: Final = failures
        self._statements: Final = statements
        self._watchman: Final = Watchman(
            self.flight, store, self.evidence, self._record, self.incidents
        )

    def watch(
        self, now: float, gauges: PoolGauges, counts: Callable[[], tuple[int, int]], slow: float
    ) -> None:
        """Each tick. ``counts``: transactions and queries so far; ``slow``: from when on a query is."""
        if self.flight.watch(now, gauges):
            self.flight.turn(now, *counts())
        self._watchman.watch(now, slow)

    def close(self, now: float) -> None:
        """Nobody watches any more."""
        self._watchman.close(now)

    def verdicts(self) -> dict[Kind, bool]:
        """Whether an incident with this verdict lasts now; healthy if none does. Costs nothing, unlike
        ``verdict``."""
        found = self._watchman.verdicts() or {Kind.HEALTHY}
        return {kind: kind in found for kind in Kind}

    def evidence(self, now: float, since: float = 0.0) -> Evidence:
        """The figures of the last seconds; the window begins no later than ``since``."""
        return gather(self._name, self.flight, now, self.settings, self._blocked(), since)

    def verdict(self, now: float) -> Verdict:
        return judge(self.evidence(now))

    def _record(self, evidence: Evidence, now: float, wall: Wall) -> Json:
        return capture(self.flight, evidence, self._statements(), self._failures(), wall, now)
