"""What an administrator may do to a pool: replace its connections, pause it, let it go on.

A pause needs nothing on the hot path: as every connection is closed on its release and none is
opened, there is none to be had, and whoever asks for one waits.
"""

from sidecar.pool.pool import Pool
from sidecar.pool.server import KILLED, REPLACED


def replace_all(pool: Pool, now: float) -> None:
    """Close every connection, as soon as it is released; new ones are opened as needed."""
    _end_all(pool, REPLACED, now)


def pause(pool: Pool, now: float) -> None:
    """The same, and open none."""
    pool.opener.is_paused = True
    _end_all(pool, REPLACED, now)


def kill(pool: Pool, now: float) -> None:
    """A pause, with another reason to close them. Its clients are somebody else's matter."""
    pool.opener.is_paused = True
    _end_all(pool, KILLED, now)


def resume(pool: Pool, now: float) -> None:
    pool.opener.is_paused = False
    pool.opener.grow(now)


def _end_all(pool: Pool, age_limit: float, now: float) -> None:
    for servers in pool.state.by_state:
        for server in servers:
            server.age_limit = age_limit
    pool.sweep(now)  # the idle ones
