"""The exception tree.

Every class carries the SQLSTATE a client is told (PostgreSQL manual, appendix A) and whether a
retry is safe: ``retryable`` means that nothing was sent to the server.
"""


class SidecarError(Exception):
    """Base of everything this project raises on purpose.

    ``detail`` and ``hint`` become the fields of the same name of an ErrorResponse. ``logged`` is the
    message for everybody but the client, where it may have some of the client's data in it.
    """

    sqlstate = "XX000"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        detail: str = "",
        hint: str = "",
        sqlstate: str | None = None,
        logged: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.logged = logged or message
        self.detail = detail
        self.hint = hint
        if sqlstate is not None:
            self.sqlstate = sqlstate


class ConfigError(SidecarError):
    """The configuration cannot be used. Never crosses the wire; the command exits with 2."""

    sqlstate = "F0000"


class ProtocolError(SidecarError):
    """One side broke the wire protocol (abstract)."""


class ClientProtocolError(ProtocolError):
    """The client broke the protocol: tell it, close it."""

    sqlstate = "08P01"


class ServerProtocolError(ProtocolError):
    """The server broke the protocol: close the server connection, tell the client."""

    sqlstate = "08006"


class AuthenticationFailed(SidecarError):
    """A login was refused: 28P01 (wrong password) or 28000 (not allowed)."""

    sqlstate = "28P01"


class PoolError(SidecarError):
    """The pool could not hand out a connection (abstract); nothing was sent."""

    retryable = True


class AcquireTimeout(PoolError):
    """A client waited longer than ``acquire_timeout``."""

    sqlstate = "53300"


class PoolSaturated(PoolError):
    """The queue of waiting clients is full."""

    sqlstate = "53300"


class PoolClosed(PoolError):
    """The pool is draining or closed."""

    sqlstate = "57P03"


class ServerUnavailable(SidecarError):
    """A server connection could not be opened."""

    sqlstate = "08001"
    retryable = True


class TlsFailed(ServerUnavailable):
    """There is no TLS with the server, though it has to be, or not as it has to be."""


class WrongRole(ServerUnavailable):
    """The server lets us in, but is not what ``target_session_attrs`` asks for."""


class ServerConnectionLost(SidecarError):
    """A server connection ended while a client used it."""

    sqlstate = "08006"


class ServerError(SidecarError):
    """The server refused with an ErrorResponse of its own; ``sqlstate`` is the server's."""
