"""What an administrator may do to a pool: replace its connections, pause it, let it go on.

A pause needs nothing on the hot path: as every connection is closed on its release and none is
opened, there is none to be had, and whoever asks for one waits.
"""

from sidecar.config import PoolConfig
from sidecar.events import PoolMode, ResetPolicy
from sidecar.pool.pool import Pool
from sidecar.pool.server import KILLED, REPLACED
from sidecar.pool.state import ConnectionState


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


def reconfigure(pool: Pool, config: PoolConfig, now: float) -> None:
    """Take over all options but the mode, which clients have been promised at their login."""
    assert config.mode is pool.config.mode
    is_elsewhere = config.target != pool.config.target
    pool.config = pool.opener.config = config
    pool.resets_always = config.mode is PoolMode.SESSION or config.reset is ResetPolicy.ALWAYS
    state = pool.state
    state.max_size, state.min_idle = config.max_size, config.min_idle
    state.max_waiting = config.max_waiting
    if is_elsewhere:
        pool.target = config.target
        pool.opener.parameters = {}  # another server has its own
        replace_all(pool, now)
    else:
        _shrink(pool, now)
    pool.opener.grow(now)


def _shrink(pool: Pool, now: float) -> None:
    """Close what is more than ``max_size``: idle ones, longest unused first; then others, as soon as
    they are released."""
    state = pool.state
    closing = len(state.by_state[ConnectionState.CLOSING])
    excess = max(0, state.size - closing - state.max_size)
    others = (ConnectionState.CONNECTING, ConnectionState.CHECKING, ConnectionState.ACTIVE)
    candidates = [*state.idle, *(each for s in others for each in state.by_state[s])]
    for server in candidates[:excess]:
        server.age_limit = REPLACED
    pool.sweep(now)


def _end_all(pool: Pool, age_limit: float, now: float) -> None:
    for servers in pool.state.by_state:
        for server in servers:
            server.age_limit = age_limit
    pool.sweep(now)  # the idle ones
