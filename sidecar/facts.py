"""What people are told of a pool, at the console and by the API: its state, totals, and why one waits.

Pure. ``operate`` makes the facts; snapshots come from ``events``.
"""

from dataclasses import dataclass
from enum import StrEnum

from sidecar.config import PoolConfig
from sidecar.events import PoolSnapshot


class WaitCause(StrEnum):
    """Why a client waits for a connection."""

    PAUSED = "paused"
    SERVER_DOWN = "server_down"  # there is none, and none can be opened
    ALL_USED = "all_used"  # all that there may be are leased
    OPENING = "opening"  # one is being opened, checked, reset or closed


@dataclass(frozen=True, slots=True)
class Totals:
    """What happened since the start. Times in seconds."""

    assignments: int = 0
    transactions: int = 0
    queries: int = 0
    received: int = 0  # bytes from clients
    sent: int = 0  # bytes to clients
    transaction_time: float = 0.0
    query_time: float = 0.0
    wait_time: float = 0.0
    client_parses: int = 0  # prepared statements with a name
    server_parses: int = 0  # of them, those that a server connection did not have

    def since(self, before: "Totals") -> "Totals":
        return Totals(
            self.assignments - before.assignments,
            self.transactions - before.transactions,
            self.queries - before.queries,
            self.received - before.received,
            self.sent - before.sent,
            self.transaction_time - before.transaction_time,
            self.query_time - before.query_time,
            self.wait_time - before.wait_time,
            self.client_parses - before.client_parses,
            self.server_parses - before.server_parses,
        )


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """One pool at one instant."""

    snapshot: PoolSnapshot
    config: PoolConfig
    totals: Totals
    is_paused: bool
    is_disabled: bool
    why_down: str  # why the last attempt to connect failed; empty if it did not

    def why_wait(self) -> tuple[WaitCause, str]:
        """Why whoever waits now does so, in one word and in a sentence."""
        pool = self.snapshot
        if self.is_paused:
            return WaitCause.PAUSED, "the pool is paused"
        if pool.used + pool.idle == 0 and self.why_down:
            return WaitCause.SERVER_DOWN, f"the server cannot be reached: {self.why_down}"
        reason = f"{pool.used} of {pool.max_size} connections in use"
        if pool.used >= pool.max_size:
            return WaitCause.ALL_USED, reason
        if pool.connecting:
            reason += f", {pool.connecting} being opened, checked or closed"
        if self.why_down:
            reason += f"; another cannot be opened: {self.why_down}"
            return WaitCause.SERVER_DOWN, reason
        return WaitCause.OPENING, reason
