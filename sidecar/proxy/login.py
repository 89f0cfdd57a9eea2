"""What a login has proved: who the client is, and the secrets that go with it.

A value, made by ``authenticate`` and handed to whoever opens server connections for this client.
"""

from dataclasses import dataclass, field

from pydantic import SecretStr

from sidecar.protocol.authentication import ScramKeys


@dataclass(frozen=True, slots=True)
class Login:
    """Prints without its secrets."""

    user: str
    database: str
    """As the client asked for it; its own name where it asked for none."""
    keys: ScramKeys | None = field(default=None, repr=False)
    """What the client's SCRAM proof gave away: enough to log in as this user to a server that has
    the same verifier. None without SCRAM."""
    password: SecretStr | None = field(default=None, repr=False)
    """The user's own, from the configuration, or said by the client (method ``password``)."""
