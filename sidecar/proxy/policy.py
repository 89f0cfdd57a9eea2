"""What a pool's policies refuse, and what the client is told then.

Pure. The statement itself is replaced by one that the server must refuse (``rewriter``), so that a
transaction fails as it does after any error; the text of the error is ours (``replies``).
"""

from typing import Final

from sidecar.config import PoolConfig
from sidecar.events import PinPolicy, PoolMode
from sidecar.protocol import messages as m
from sidecar.proxy.pins import reason_of
from sidecar.sql import LASTING, TEMP_TABLE, UNKNOWN, Query, begins_block

_SQLSTATE: Final = "0A000"  # feature_not_supported

NO_BLOCKS: Final = m.error_response(
    "ERROR",
    _SQLSTATE,
    "transaction blocks are not allowed in statement mode",
    hint="Use a pool in transaction mode, or send the whole block as one query.",
)


STALE_PLAN: Final = m.error_response(
    "ERROR",
    _SQLSTATE,
    "cached plan must not change result type",
    routine="RevalidateCachedQuery",
)
"""PostgreSQL's words (plancache.c). By its routine asyncpg and pgjdbc know that they may try again."""


class Policy:
    """What the statements of one client may not do."""

    __slots__ = ("_refused", "refuses_blocks")

    def __init__(self, config: PoolConfig) -> None:
        is_refusing = config.pin is PinPolicy.REFUSE and config.mode is not PoolMode.SESSION
        self._refused: Final = LASTING if is_refusing else 0  # effects, see ``sql``
        self.refuses_blocks: Final = config.mode is PoolMode.STATEMENT

    def refusal(self, query: Query, text: bytes) -> bytes:
        """The ErrorResponse for it; empty: it is allowed. To be asked if the query has effects, or
        if this ``refuses_blocks``."""
        if self.refuses_blocks and begins_block(query, text):
            return NO_BLOCKS
        effects = query.effects & self._refused
        if not effects or query.effects == UNKNOWN:
            return b""
        if effects == TEMP_TABLE and b"on commit drop" in text.lower():
            return b""
        return no_pin(effects)


def no_pin(effects: int) -> bytes:
    reason = reason_of(effects)
    assert reason is not None
    return m.error_response(
        "ERROR",
        _SQLSTATE,
        f"this statement would keep the server connection ({reason.value}), which the connection"
        " pool refuses (pin: refuse)",
        detail="LISTEN, temporary objects, session-level advisory locks, cursors WITH HOLD, PREPARE, "
        "SET ROLE and LOAD need a connection that stays with its client.",
        hint="Use a pool in session mode, or a form that ends with the transaction: ON COMMIT DROP, "
        "pg_advisory_xact_lock, SET LOCAL.",
    )
