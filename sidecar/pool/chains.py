"""Who waits for whom on the server: the question, its answer as values, and the chain in words.

Pure. The question is one query, whatever the number of backends. ``pg_blocking_pids`` takes the lock
manager's locks for a moment, so it is asked of those only that wait for a lock, and of a bounded
number. Query texts are not asked for: they have literals.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from sidecar.work import Blocker, Holder, Statement

MOST_ASKED: Final = 100
"""Backends that one look asks about."""
MOST_ROWS: Final = 200
_DEEPEST: Final = 8
"""Steps from a backend that is asked about."""
_BROADEST: Final = 16
"""Blockers of one backend. In a long queue for one lock each waits for all before it; who has the
lock is the first of them."""

_WAITS: Final = "(a.wait_event_type IN ('Lock', 'IPC') OR a.state IS NULL)"
"""May wait for a lock: itself, by a parallel worker, or we are not told (other roles' backends)."""

QUERY: Final = f"""
WITH RECURSIVE activity AS (
  SELECT pid, wait_event_type, wait_event, state, application_name, usename, backend_type,
    client_addr, client_port, state_change, query = '<insufficient privilege>' AS is_hidden
  FROM pg_catalog.pg_stat_activity
), step(pids, seen, depth) AS (
  SELECT $1::pg_catalog.int4[], $1::pg_catalog.int4[], 0
  UNION ALL
  SELECT found.pids, s.seen || found.pids, s.depth + 1
  FROM step s CROSS JOIN LATERAL (
    SELECT pg_catalog.array_agg(DISTINCT b.pid)
    FROM activity a
    CROSS JOIN LATERAL pg_catalog.unnest((pg_catalog.pg_blocking_pids(a.pid))[1:{_BROADEST}]) b(pid)
    WHERE a.pid = ANY (s.pids) AND {_WAITS} AND b.pid <> ALL (s.seen)
  ) found(pids)
  WHERE found.pids IS NOT NULL AND s.depth < {_DEEPEST}
    AND pg_catalog.cardinality(s.seen) < {MOST_ROWS}
)
SELECT found.pid, a.pid IS NOT NULL, a.is_hidden, a.wait_event_type, a.wait_event, a.state,
  CASE WHEN a.backend_type <> 'client backend' THEN a.backend_type ELSE a.application_name END,
  a.usename,
  CASE a.client_port WHEN -1 THEN 'unix'
    ELSE pg_catalog.host(a.client_addr) || ':' || a.client_port END,
  EXTRACT(epoch FROM pg_catalog.clock_timestamp() - a.state_change),
  CASE WHEN {_WAITS} THEN (pg_catalog.pg_blocking_pids(a.pid))[1:{_BROADEST}] END
FROM (
  SELECT u.pid FROM step s CROSS JOIN LATERAL pg_catalog.unnest(s.pids) u(pid)
  ORDER BY s.depth LIMIT {MOST_ROWS}
) found LEFT JOIN activity a ON a.pid = found.pid
"""
"""``$1`` are the backends to ask about. Blockers of blockers are found step by step, each backend
once, so a circle (a deadlock that the server has not noticed yet) ends, too."""

_COLUMNS: Final = 11
_NAMED: Final = 8
"""Most backends of a chain that a log line names."""
_TEXT: Final = 200  # characters of a statement in a log line

Lease = Callable[[int], tuple[bool, Holder | None]]
"""Of a backend: whether it is one of our connections, and who has that."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What the server says of one. ``state`` and ``wait_event`` are empty where it does not tell."""

    pid: int
    is_there: bool
    is_hidden: bool  # for want of privileges
    wait_event: str
    state: str
    application: str  # of the server's own processes: what they are
    user: str
    address: str
    age: float  # seconds in this state
    blocked_by: tuple[int, ...]


def value(pids: Iterable[int]) -> str:
    """``$1`` of the query."""
    return "{" + ",".join(map(str, pids)) + "}"


def backends(rows: Iterable[Sequence[bytes | None]]) -> dict[int, Backend]:
    """The answer, by pid. Raises ValueError if it is none."""
    return {each.pid: each for each in map(_backend, rows)}


def _backend(row: Sequence[bytes | None]) -> Backend:
    if len(row) != _COLUMNS:
        raise ValueError(f"{len(row)} columns")
    pid, there, hidden, kind, event, state, application, user, address, age, by = (
        "" if each is None else each.decode("utf-8", "replace") for each in row
    )
    return Backend(
        pid=int(pid),
        is_there=there == "t",
        is_hidden=hidden == "t",
        wait_event=f"{kind}:{event}" if event else "",
        state=state,
        application=application,
        user=user,
        address=address,
        age=max(0.0, float(age or 0.0)),
        # a worker's blocker is told as its leader's, so one may be there twice
        blocked_by=tuple(dict.fromkeys(map(int, re.findall(r"\d+", by)))),
    )


def blockers(pid: int, known: dict[int, Backend], lease: Lease) -> tuple[Blocker, ...]:
    """All backends that this one waits for, directly or through others, nearest first."""
    found: dict[int, Blocker] = {}
    ahead = list(known[pid].blocked_by) if pid in known else []
    while ahead:
        further: list[int] = []
        for each in ahead:
            if each != pid and each not in found:
                found[each] = _blocker(each, known.get(each), lease)
                further += found[each].waits_for
        ahead = further
    return tuple(found.values())


def _blocker(pid: int, backend: Backend | None, lease: Lease) -> Blocker:
    if pid == 0:
        return Blocker(0, (), "prepared transaction", "", "", "", is_ours=False, holder=None)
    is_ours, holder = lease(pid)
    if backend is None:  # it has come since, or is one too many
        return Blocker(pid, (), "", "", "", "", is_ours=is_ours, holder=holder)
    return Blocker(
        backend_pid=pid,
        waits_for=backend.blocked_by,
        state=backend.state,
        wait_event=backend.wait_event,
        application=backend.application,
        user=backend.user,
        is_ours=is_ours,
        holder=holder,
        address=backend.address,
        age=backend.age,
    )


def root(chain: Sequence[Blocker]) -> Blocker:
    """The nearest that waits for nobody. In a circle, or where the chain is cut off: the last."""
    return next((each for each in chain if not each.waits_for), chain[-1])


# -- words -------------------------------------------------------------------------------------


def describe(chain: Sequence[Blocker], pool: str, now: float) -> str:
    """The chain for a log line, nearest first; ``pool`` is that of who waits."""
    named = [_describe(each, pool, now) for each in chain[:_NAMED]]
    if len(chain) > _NAMED:
        named.append(f"{len(chain) - _NAMED} more")
    return " <- ".join(named)


def _describe(blocker: Blocker, pool: str, now: float) -> str:
    pid = blocker.backend_pid
    if pid == 0:
        return "a prepared transaction (pg_prepared_xacts)"
    holder = blocker.holder
    if holder is None:
        name = f"pid {pid} application={_quoted(blocker.application)} user={blocker.user}"
        if blocker.is_ours:
            return f"{name}, of this sidecar, its client is gone"
        where = f" {blocker.address}" if blocker.address else ""
        state = f"{blocker.state} for {blocker.age:.1f} s" if blocker.state else "state not told"
        return f"{name}{where}, not of this sidecar, {state}"
    who = holder.who
    name = f"pid {pid} application={_quoted(who.application)} user={who.user} {who.address}"
    if holder.pool != pool:
        name += f" pool={holder.pool}"
    state = f"{holder.state} for {now - holder.since:.1f} s"
    if holder.statement is None:
        return f"{name} {state}"
    last = "statement" if holder.state == "running" else "last statement"
    return f"{name} {state}, {last} {_statement(holder.statement)}"


def _statement(statement: Statement) -> str:
    return f"{statement.fingerprint}: {cut(statement.text)}"


def cut(text: str) -> str:
    """The beginning of a statement."""
    return text if len(text) <= _TEXT else text[: _TEXT - 3] + "..."


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
