"""Decides when an incident begins, what its verdict is, and when it is over. One for each pool.

Pure, but for what the store does. A trigger is something that can be seen at a tick: a client has waited for a
second, a lease has become a leak. It then waits for the evidence: the server has to be asked about locks, and
a share of time needs some time. While it lasts it is judged again and again; what it is judged to be
most often counts, but for causes that leave no doubt.

One cause is one incident, whatever it brings about: a leak that exhausts the pool is not two.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from sidecar.events import IncidentKind
from sidecar.observe.capture import Json, Wall
from sidecar.observe.evidence import Evidence
from sidecar.observe.flight import Flight
from sidecar.observe.incidents import Incident, IncidentStore
from sidecar.observe.judge import judge
from sidecar.observe.verdict import (
    BURST,
    DOWN,
    STORM,
    Kind,
    Verdict,
    is_burst,
    is_storm,
)

EXHAUSTED: Final = 1.0
"""Seconds that a client has waited for one of connections that are all in use."""
OVER: Final = 3.0
"""Seconds without a sign of it after which it is over: what flickers is one."""
_AGAIN: Final = 0.5
"""Seconds between two looks before it begins, and _LATER between two while it lasts."""
_LATER: Final = 2.0
_FEW: Final = 0.2
"""Share of the looks from which on a cause that leaves no doubt counts."""

_PATIENCE: Final = {
    IncidentKind.EXHAUSTED: 2.0,  # for what the server says about locks
    IncidentKind.LEAK: 0.3,
    IncidentKind.SLOW_QUERY: 0.3,  # the server has been asked
    IncidentKind.DATABASE_DOWN: 0.5,
    IncidentKind.CONNECTION_STORM: 1.0,
    IncidentKind.ERROR_BURST: 1.0,
}
"""Seconds from the trigger to the verdict."""

_MOST_CAUSES: Final = 50

_CERTAIN: Final = (Kind.DATABASE_DOWN, Kind.LOCK_CHAIN, Kind.LEAK)


class _Case:
    """One cause: what is thought of it, and the incident that it has become."""

    def __init__(self, incident: Incident | None) -> None:
        self.incident = incident  # None: there were too many
        self._votes: dict[tuple[Kind, str, str], tuple[int, Verdict]] = {}  # the latest of each
        self.looked = 0.0

    def vote(self, verdict: Verdict) -> None:
        if verdict.kind is Kind.HEALTHY:
            return
        cause = _cause(verdict)
        count = self._votes[cause][0] + 1 if cause in self._votes else 1
        self._votes[cause] = (count, verdict)
        if len(self._votes) > _MOST_CAUSES:
            del self._votes[min(self._votes, key=lambda each: self._votes[each][0])]

    def verdict(self) -> Verdict | None:
        if not self._votes:
            return None
        looks = sum(count for count, _ in self._votes.values())
        for kind in _CERTAIN:
            votes = [each for cause, each in self._votes.items() if cause[0] is kind]
            if votes and sum(count for count, _ in votes) >= _FEW * looks:
                return max(votes, key=_count)[1]
        return max(self._votes.values(), key=_count)[1]


class _Trigger:
    """One thing that may happen: not, seen, and with a case of its own or of another."""

    def __init__(self, kind: IncidentKind) -> None:
        self.kind: Final = kind
        self.began = 0.0
        self.noticed = 0.0
        self.last = 0.0  # seen
        self.draft: _Case | None = None  # seen, not decided
        self.case: _Case | None = None

    @property
    def is_idle(self) -> bool:
        return self.draft is None and self.case is None


class Watchman:
    """``evidence`` for a window that begins no later than its second argument; ``record`` is the
    recording of that moment; ``counts`` are the incidents so far."""

    def __init__(
        self,
        flight: Flight,
        store: IncidentStore,
        evidence: Callable[[float, float], Evidence],
        record: Callable[[Evidence, float, Wall], Json],
        counts: dict[IncidentKind, int],
    ) -> None:
        self._flight: Final = flight
        self._store: Final = store
        self._evidence: Final = evidence
        self._record: Final = record
        self._counts: Final = counts
        self._triggers: Final = {kind: _Trigger(kind) for kind in IncidentKind}
        self._timeouts = 0
        self._slow_seen = 0
        self._second = 0.0  # the last one that was looked at

    def watch(self, now: float, slow_threshold: float) -> None:
        """After the flight recorder's tick."""
        for kind in self._seen(now, slow_threshold):
            trigger = self._triggers[kind]
            if trigger.is_idle:
                trigger.began = now - self._lasted(kind)
                trigger.noticed = now
                trigger.draft = _Case(None)
            trigger.last = now
        for trigger in self._triggers.values():
            if not trigger.is_idle:
                self._follow(trigger, now)

    def verdicts(self) -> set[Kind]:
        """What is wrong by the incidents that last now, those included that are too many to be recorded."""
        found = set()
        for trigger in self._triggers.values():
            verdict = None if trigger.case is None else trigger.case.verdict()
            if verdict is not None:
                found.add(verdict.kind)
        return found

    def close(self, now: float) -> None:
        """The sidecar stops: what lasts until now has ended for us."""
        for trigger in self._triggers.values():
            if trigger.case is not None:
                trigger.last = now
                self._leave(trigger, now)

    # -- triggers ------------------------------------------------------------------------------

    def _seen(self, now: float, slow_threshold: float) -> list[IncidentKind]:
        flight, gauges = self._flight, self._flight.gauges
        assert gauges is not None
        seen = []
        if not gauges.is_paused:
            is_full = gauges.used + gauges.connecting >= gauges.max_size
            has_timed_out = flight.timeouts != self._timeouts
            if gauges.is_up and (has_timed_out or (is_full and gauges.oldest_wait >= EXHAUSTED)):
                seen.append(IncidentKind.EXHAUSTED)
            if flight.down_since and (now - flight.down_since >= DOWN or flight.has_lost_some(now)):
                seen.append(IncidentKind.DATABASE_DOWN)
        self._timeouts = flight.timeouts
        if flight.leaks:
            seen.append(IncidentKind.LEAK)
        if flight.slow_seen != self._slow_seen:
            self._slow_seen = flight.slow_seen
            seen.append(IncidentKind.SLOW_QUERY)
        elif (
            flight.longest_running >= slow_threshold
            and not self._triggers[IncidentKind.SLOW_QUERY].is_idle
        ):
            seen.append(IncidentKind.SLOW_QUERY)
        if flight.seconds and flight.seconds[-1].at != self._second:
            self._second = flight.seconds[-1].at
            seen += self._seen_of_rates(now)
        return seen

    def _seen_of_rates(self, now: float) -> list[IncidentKind]:
        last = self._flight.seconds[-1]
        is_busy = last.arrivals >= STORM or last.rejected >= STORM
        if not is_busy and last.failures - last.own_failures < BURST:
            return []
        evidence = self._evidence(now, 0.0)
        seen = []
        if is_storm(evidence):
            seen.append(IncidentKind.CONNECTION_STORM)
        if is_burst(evidence):
            seen.append(IncidentKind.ERROR_BURST)
        return seen

    def _lasted(self, kind: IncidentKind) -> float:
        """For how long it has been so when it is seen."""
        flight, gauges = self._flight, self._flight.gauges
        assert gauges is not None
        if kind is IncidentKind.EXHAUSTED:
            return max(gauges.oldest_wait, 0.0)
        if kind is IncidentKind.DATABASE_DOWN and flight.down_since:
            return flight.at - flight.down_since
        if kind is IncidentKind.SLOW_QUERY and flight.slow:
            return flight.slow[-1][1].age
        return 0.0

    # -- incidents -----------------------------------------------------------------------------

    def _follow(self, trigger: _Trigger, now: float) -> None:
        case = trigger.draft or trigger.case
        assert case is not None
        pause = _AGAIN if trigger.draft is not None else _LATER
        if now - case.looked >= pause and (trigger.last == now or trigger.draft is not None):
            case.looked = now
            evidence = self._evidence(now, trigger.began)
            if trigger.last == now or case.verdict() is None:  # else it is what it was
                case.vote(judge(evidence, trigger.kind))
            is_waiting = now < trigger.noticed + _PATIENCE[trigger.kind]
            if trigger.draft is not None and not is_waiting:
                self._decide(trigger, case, evidence, now)
            elif trigger.case is not None:
                self._revise(case, evidence, now)
        if now - trigger.last > OVER:
            self._leave(trigger, now)

    def _decide(self, trigger: _Trigger, draft: _Case, evidence: Evidence, now: float) -> None:
        verdict = draft.verdict()
        if verdict is None:
            return  # nothing is wrong, so far
        first = self._noticed_before(trigger, verdict)
        if first is not None and first.draft is not None:
            self._decide(first, first.draft, evidence, now)
        trigger.draft = None
        for other in self._triggers.values():
            if other.case is not None and other.case.incident is not None:
                known = other.case.incident.verdict
                if (known.kind, known.application) == (verdict.kind, verdict.application):
                    self._join(trigger, other.case)
                    return
        trigger.case = draft
        draft.incident = self._store.begin(
            trigger.kind, trigger.began, verdict, self._record(evidence, now, self._store.iso)
        )
        if draft.incident is not None:
            self._counts[trigger.kind] += 1

    def _noticed_before(self, trigger: _Trigger, verdict: Verdict) -> _Trigger | None:
        """The first of those that wait with the same cause: the incident is to be of its kind."""
        found = None
        for other in self._triggers.values():
            known = None if other.draft is None else other.draft.verdict()
            if known is None or other.noticed >= trigger.noticed:
                continue
            if (known.kind, known.application) != (verdict.kind, verdict.application):
                continue
            if found is None or other.noticed < found.noticed:
                found = other
        return found

    def _join(self, trigger: _Trigger, case: _Case) -> None:
        trigger.case = case
        incident = case.incident
        assert incident is not None
        if trigger.kind not in (incident.kind, *incident.also):
            case.incident = replace(incident, also=(*incident.also, trigger.kind))
            self._store.update(case.incident)

    def _revise(self, case: _Case, evidence: Evidence, now: float) -> None:
        verdict, incident = case.verdict(), case.incident
        if verdict is None or incident is None:
            return
        if _cause(verdict) != _cause(incident.verdict):
            incident = replace(incident, recording=self._record(evidence, now, self._store.iso))
            case.incident = replace(incident, verdict=verdict)
            self._store.update(case.incident)
        elif verdict is not incident.verdict:
            case.incident = replace(incident, verdict=verdict)
            self._store.update(case.incident)

    def _leave(self, trigger: _Trigger, now: float) -> None:
        case, trigger.draft, trigger.case = trigger.case, None, None
        if case is None or case.incident is None:
            return
        if any(other.case is case for other in self._triggers.values()):
            return
        evidence = self._evidence(now, trigger.began)
        incident = case.incident
        after = self._record(evidence, now, self._store.iso)
        ways = {key: after[key] for key in ("timeline", "seconds")}
        incident = replace(incident, recording={**incident.recording, **ways})
        self._store.end(incident, trigger.last)


def _cause(verdict: Verdict) -> tuple[Kind, str, str]:
    statement = verdict.statement
    return verdict.kind, verdict.application, "" if statement is None else statement.fingerprint


def _count(vote: tuple[int, Verdict]) -> int:
    return vote[0]
