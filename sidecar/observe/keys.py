"""Which values of the enums are counted together: label values, each of which has a count from the
start, and those that mean one thing.

Pure.
"""

from itertools import product
from typing import Final

from sidecar.events import (
    CONNECTION_ERRORS,
    AcquireOutcome,
    ClientOutcome,
    CloseReason,
    ErrorOrigin,
    Listener,
    Phase,
)

# The classes of errcodes.txt in PostgreSQL 18's sources. A function can raise any other.
SQLSTATE_CLASSES: Final[tuple[str, ...]] = (
    *("00", "01", "02", "03", "08", "09", "0A", "0B", "0F", "0L", "0P", "0Z", "10"),
    *("20", "21", "22", "23", "24", "25", "26", "27", "28", "2B", "2D", "2F"),
    *("34", "38", "39", "3B", "3D", "3F", "40", "42", "44"),
    *("53", "54", "55", "57", "58", "72", "F0", "HV", "P0", "XX"),
)
OTHER: Final = "other"

ERROR_KEYS: Final = tuple(product(ErrorOrigin, (*SQLSTATE_CLASSES, OTHER)))
CONNECTION_ERROR_KEYS: Final = tuple(
    (phase, reason) for phase, reasons in CONNECTION_ERRORS.items() for reason in reasons
)
CLIENT_KEYS: Final = tuple(product(Listener, ClientOutcome))

FAILED_ACQUIRES: Final = (
    AcquireOutcome.TIMEOUT,
    AcquireOutcome.REJECTED,
    AcquireOutcome.CANCELLED,
)
LOSSES: Final = (CloseReason.SERVER_CLOSED, CloseReason.PING_FAILED, CloseReason.PING_TIMEOUT)
OPENING: Final = (Phase.CONNECT, Phase.TLS, Phase.AUTH)
