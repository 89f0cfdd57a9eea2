"""Why all connections are in use: the verdicts on who holds them. None: it is something else.

Pure.
"""

from collections import Counter
from typing import Final

from sidecar.observe.blame import label_of
from sidecar.observe.evidence import Evidence, Name, Share, name_of
from sidecar.observe.flight import STALE, application_of
from sidecar.observe.verdict import HUNG, MOST, SLOW, SURELY_SLOW, Kind, Verdict, is_contended
from sidecar.observe.wording import (
    application,
    command,
    counted,
    host_of,
    lasting,
    milliseconds,
    number,
    option,
    percent,
    queue,
    sentence,
    statement,
    waiting,
    waits,
)
from sidecar.work import NO_ANSWER, Blocker

_MUCH: Final = 0.2
"""Share of the connections in use from which on something is told besides the cause."""


def lock_chain(e: Evidence) -> Verdict | None:
    roots: dict[int, Blocker] = {}
    victims: dict[int, set[int]] = {}
    for server, root in e.blocked:
        roots[root.backend_pid] = root
        victims.setdefault(root.backend_pid, set()).add(server)
    for slow in e.slow:
        if slow.blockers and slow.holder.server not in {server for server, _ in e.blocked}:
            found = next((each for each in slow.blockers if not each.waits_for), slow.blockers[-1])
            roots.setdefault(found.backend_pid, found)
            victims.setdefault(found.backend_pid, set()).add(slow.holder.server)
    if not roots:
        return None
    pid = max(victims, key=lambda each: len(victims[each]))
    root, count = roots[pid], len(victims[pid])
    has_place = root.is_ours and root.holder is not None
    if is_contended(e):
        if count + has_place < MOST * max(e.used, 1):
            return None
    elif not e.slow:
        return None  # locks of some milliseconds are everybody's daily bread
    culprit, name, doing = label_of(root.application), None, _state_of(root) or "at work"
    evidence = [
        f"{counted(count, 'connection')} of {e.used} in use wait{'s' * (count == 1)} for locks, all"
        f" behind backend {pid}.",
    ]
    steps = []
    if root.holder is not None:
        holder = root.holder
        culprit, name = application_of(holder.who), name_of(holder.statement)
        doing = f"{holder.state} for {lasting(max(0.0, e.now - holder.since))}"
        last = "it runs" if holder.state == "running" else "its last statement was"
        if name is not None:
            evidence.append(f"{application(culprit)} has been {doing}; {last} {statement(name)}.")
        if holder.transaction_since:
            age = lasting(max(0.0, e.now - holder.transaction_since))
            evidence.append(f"Its transaction has been open for {age}.")
        steps.append(f"End it: {_end(e, holder.who.client)} (rolls its transaction back).")
    else:
        where = "not a connection of this pool"
        evidence.append(
            f"Backend {pid} is {application(culprit)}, {where}: {_state_of(root) or 'state unknown'}."
        )
        steps.append(f"End it on the server: SELECT pg_terminate_backend({pid}).")
    evidence.append(waits(e))
    waiter = next((share for share in e.shares if share.state == "running"), None)
    if waiter is not None and waiter.statement is not None and waiter.statement != name:
        evidence.append(f"What waits for the lock, above all: {statement(waiter.statement)}.")
    steps.append(
        f"Keep transactions of {application(culprit)} short: commit before it does anything else."
    )
    timeout = f"idle_in_transaction_timeout (now {option(e.settings.idle_in_transaction_timeout)})"
    if not root.is_ours:
        timeout = "idle_in_transaction_session_timeout in PostgreSQL"
    steps.append(
        f"{timeout} ends transactions that are left open; lock_timeout in PostgreSQL ends the wait."
    )
    is_are = "waits" if count == 1 else "wait"
    return Verdict(
        Kind.LOCK_CHAIN,
        e.pool,
        f"{counted(count, 'connection')} of pool {e.pool} {is_are} for a lock that"
        f" {application(culprit)} holds ({doing}, backend {pid}): {queue(e)}.",
        culprit,
        name,
        tuple(evidence),
        tuple(steps),
    )


def _end(e: Evidence, client: int) -> str:
    """How to, also where nobody may at the console: the server's own way needs no preparation."""
    pid = next((each.backend_pid for each in e.holders if each.who.client == client), 0)
    if e.settings.has_admin or not pid:
        return command(e.settings, f"KILL_CLIENT {client}")
    return f"SELECT pg_terminate_backend({pid}) on the server"


def _state_of(root: Blocker) -> str:
    return f"{root.state} for {lasting(root.age)}" if root.state and root.age else root.state


def leak(e: Evidence) -> Verdict | None:
    idle = [holder for holder in e.holders if holder.state != "running"]
    left = [h for h in idle if h.state == "idle in transaction" and e.now - h.since >= STALE]
    servers = {holder.server for holder in e.leaks}
    left += [h for h in idle if h.server in servers and h not in left]
    is_full = is_contended(e)
    if not left or (is_full and len(left) < MOST * e.used) or not (is_full or servers):
        return None
    counts = Counter(application_of(holder.who) for holder in left)
    culprit = counts.most_common(1)[0][0]
    mine = [holder for holder in left if application_of(holder.who) == culprit]
    count, worst = len(mine), min(mine, key=lambda holder: holder.since)
    oldest, client = max(0.0, e.now - worst.since), worst.who.client
    names = Counter(name_of(holder.statement) for holder in mine)
    name = names.most_common(1)[0][0]
    states = {holder.state for holder in mine}
    held = sum(s.seconds for s in e.shares if s.application == culprit and s.state in states)
    share_of = held / e.connection_seconds if e.connection_seconds else 0.0
    evidence = [
        f"{application(culprit)} holds {counted(count, 'connection')} of {e.max_size} in open"
        f" transactions in which nothing runs, the oldest for {lasting(oldest)}."
    ]
    if share_of:
        evidence.append(
            f"That is {percent(share_of)} of the connections' time in the last"
            f" {lasting(e.seconds)}."
        )
    if name is not None:
        evidence.append(f"The last statement of most of them: {statement(name)}.")
    evidence.append(waits(e))
    what = f"{application(culprit)} left {counted(count, 'transaction')} open (oldest"
    what += f" {lasting(oldest)})"
    headline = (
        f"Pool {e.pool} is full because {what}: {queue(e)}."
        if is_full
        else f"In pool {e.pool} {what}: {queue(e)}."
    )
    return Verdict(
        Kind.LEAK,
        e.pool,
        headline,
        culprit,
        name,
        tuple(evidence),
        (
            f"See who holds what: {command(e.settings, 'SHOW HOLDERS')}.",
            f"End the oldest: {_end(e, client)} (rolls its transaction back).",
            f"In {application(culprit)}, find the path that runs this statement and neither commits"
            " nor rolls back, or waits for something else in between.",
            "idle_in_transaction_timeout (now"
            f" {option(e.settings.idle_in_transaction_timeout)}) would end such transactions.",
        ),
    )


def is_surely_slow(e: Evidence) -> bool:
    top = _slowest(e)
    return (
        top is not None
        and top.seconds >= MOST * e.connection_seconds
        and top.aged >= SURELY_SLOW * top.seconds
    )


def _slowest(e: Evidence) -> Share | None:
    """The statement that most of the time runs; the application is the one that has most of it."""
    found: dict[Name, list[Share]] = {}
    for share in e.shares:
        if share.state == "running" and share.statement is not None:
            found.setdefault(share.statement, []).append(share)
    if not found:
        return None
    shares = max(found.values(), key=lambda each: sum(share.seconds for share in each))
    first = shares[0]
    worst = max(shares, key=lambda share: share.oldest)
    return Share(
        first.application,
        first.statement,
        first.state,
        sum(share.seconds for share in shares),
        0.0,
        sum(share.aged for share in shares),
        sum(share.fresh for share in shares),
        sum(share.most for share in shares),
        worst.oldest,
        worst.client,
    )


def slow_statement(e: Evidence) -> Verdict | None:
    top = _slowest(e)
    is_full = is_contended(e)
    if is_full:
        if top is None or top.seconds < MOST * e.connection_seconds or not top.seconds:
            return None
        if top.aged < SLOW * top.seconds:
            return None
        culprit, name, oldest, client = top.application, top.statement, top.oldest, top.client
    elif e.slow:
        holder = e.slow[0].holder
        culprit, name, client = (
            application_of(holder.who),
            name_of(holder.statement),
            holder.who.client,
        )
        oldest = max(e.slow[0].age, e.now - holder.since)
    else:
        return None
    assert name is None or name.text is not None
    what = "a query" if name is None else statement(name)
    evidence = []
    if top is not None and name == top.statement and e.connection_seconds:
        evidence.append(
            f"It has {percent(top.seconds / e.connection_seconds)} of the connections' time in the"
            f" last {lasting(e.seconds)}, up to {counted(top.most, 'connection')} at once, above"
            f" all for {application(culprit)}."
        )
    evidence.append(f"The oldest one that runs has run for {lasting(oldest)}.")
    event = next((slow.wait_event for slow in e.slow if slow.wait_event), "")
    if event:
        evidence.append(f"The server says that it waits for {event}.")
    evidence.append(waits(e))
    headline = (
        f"Pool {e.pool} is full of one slow statement of {application(culprit)}, {what}:"
        f" {queue(e)}."
        if is_full
        else f"A query of {application(culprit)} in pool {e.pool} has run for {lasting(oldest)}:"
        f" {what}."
    )
    return Verdict(
        Kind.SLOW_STATEMENT,
        e.pool,
        headline,
        culprit,
        name,
        tuple(evidence),
        (
            "Find out why it is slow: EXPLAIN (ANALYZE, BUFFERS) of it, its indexes, ANALYZE of its"
            " tables.",
            f"End the oldest: {_end(e, client)}.",
            f"query_timeout (now {option(e.settings.query_timeout)}) would end it; a user may have"
            " one of their own.",
        ),
    )


def hung(e: Evidence) -> Verdict | None:
    """The server accepts queries and answers none: no statement is to blame."""
    running = sum(share.seconds for share in e.shares if share.state == "running")
    if min(e.waiting_for, e.silent_for) < HUNG or running < 0.9 * e.connection_seconds:
        return None
    cannot_ask = next((slow.cause for slow in e.slow if slow.cause == NO_ANSWER), "")
    if not cannot_ask and any(not slow.cause for slow in e.slow):
        return None  # it has told us what a query waits for
    top = _slowest(e)
    if not running or (top is not None and top.seconds > MOST * running and not cannot_ask):
        return None
    evidence = [
        f"{e.used} of {e.max_size} connections run a query; none has ended in"
        f" {lasting(e.silent_for)}.",
        f"{sentence(waiting(e.pending))}.",
    ]
    if cannot_ask:
        evidence.append(f"The server could not be asked what they wait for: {cannot_ask}.")
    return Verdict(
        Kind.DATABASE_DOWN,
        e.pool,
        f"PostgreSQL at {e.settings.server} does not answer: pool {e.pool} is full of queries that"
        f" do not end, {queue(e)}.",
        evidence=tuple(evidence),
        next_steps=(
            "See whether the server's host, disk and network work: "
            f"pg_isready -d '{host_of(e.settings.server)}'.",
            f"query_timeout ends queries that take too long (now"
            f" {option(e.settings.query_timeout)}).",
        ),
    )


def besides(e: Evidence) -> list[str]:
    """What is not the cause, but has a good part of the connections, too."""
    found = []
    left = Counter(
        application_of(holder.who)
        for holder in e.holders
        if holder.state == "idle in transaction" and e.now - holder.since >= STALE
    )
    for name, count in left.most_common(1):
        if count >= _MUCH * e.used:
            found.append(f"Besides, {application(name)} left {counted(count, 'transaction')} open.")
    behind = Counter(root.backend_pid for _, root in e.blocked)
    for pid, count in behind.most_common(1):
        if count >= _MUCH * e.used:
            waits_for = f"wait{'s' * (count == 1)} for a lock behind backend {pid}"
            found.append(f"Besides, {counted(count, 'connection')} {waits_for}.")
    return found


def pool_too_small(e: Evidence) -> Verdict:
    evidence, steps = [waits(e)], []
    if e.full:
        evidence.append(
            f"All connections were in use for {percent(e.full)} of the last {lasting(e.seconds)}."
        )
    if e.transactions:
        lease = e.connection_seconds / e.seconds / e.transactions
        before = e.transactions_before
        usual = "" if before is None else f" ({number(before)} before)"
        evidence.append(
            f"{number(e.transactions)} transactions per second{usual}, each has a connection for"
            f" {milliseconds(lease)}."
        )
    by_application: dict[str, float] = {}
    idle = kept = 0.0
    for share in e.shares:
        by_application[share.application] = (
            by_application.get(share.application, 0.0) + share.seconds
        )
        idle += share.seconds if share.state != "running" else 0.0
        kept += share.seconds if share.state == "idle" else 0.0
    top = sorted(by_application.items(), key=lambda each: -each[1])[:3]
    if top and e.connection_seconds:
        parts = [f"{application(n)} {percent(s / e.connection_seconds)}" for n, s in top]
        evidence.append(f"By application: {', '.join(parts)}.")
        if idle >= 0.2 * e.connection_seconds:
            evidence.insert(
                1,
                f"{percent(idle / e.connection_seconds)} of the time the connections are held and"
                " run nothing.",
            )
    is_kept_small = bool(e.why_down) and e.used < e.max_size
    if is_kept_small:
        evidence.append(f"Another connection cannot be opened: {e.why_down}.")
        headline = (
            f"Pool {e.pool} has {e.used} of {e.max_size} connections and gets no more"
            f" ({e.why_down}): {queue(e)}."
        )
        steps += [
            f"Give the server room for max_size ({e.max_size}) connections (its max_connections,"
            " the limits of role and database), or lower max_size."
        ]
    else:
        headline = f"Pool {e.pool} is too small for what is asked of it: "
        if idle >= MOST * e.connection_seconds > 0:
            headline += f"clients keep its {e.max_size} connections, mostly without a query, "
            if e.settings.mode != "session":
                steps.append(
                    f"See what keeps them: {command(e.settings, 'SHOW PINS')}."
                    if kept > idle / 2
                    else "Have the applications do other work before or after their transactions."
                )
        elif e.max_size == 1:
            headline += "its only connection is busy, "
        else:
            headline += f"all {e.max_size} connections are busy, "
        headline += f"{queue(e)}."
        if e.settings.mode == "session":
            steps.append(
                "mode is session: in mode transaction, clients that idle need no connection."
            )
        steps += [
            f"If the server has CPU to spare, raise max_size (now {e.max_size}) and RELOAD:"
            f" {command(e.settings, 'RELOAD')}.",
            "If it has none, more connections make it slower: have fewer clients at once, or less"
            " work in each transaction.",
        ]
    steps.append(f"See who holds what: {command(e.settings, 'SHOW HOLDERS')}.")
    # who has just come may wait for its first connection yet
    involved = {*by_application, *(each.application for each in e.arrived)}
    culprit = top[0][0] if len(by_application) == len(involved) == 1 else ""
    return Verdict(
        Kind.POOL_TOO_SMALL, e.pool, headline, culprit, None, tuple(evidence), tuple(steps)
    )
