"""What verdicts and incidents say of the configuration: the limits in force, and how to steer.

Pure. No secret and no connection string goes there.
"""

from typing import Final

from sidecar.config import Config, redacted
from sidecar.config_values import CONSOLE_DATABASE
from sidecar.observe.evidence import Settings

_UNSAID: Final = ("dsn", "auth_dsn", "auth_query")


def settings_of(config: Config, address: tuple[str, int]) -> dict[str, Settings]:
    """By pool. ``address`` is where clients connect."""
    console = _console(config, address)
    pools = redacted(config)["pools"]
    assert isinstance(pools, dict)
    return {
        name: Settings(
            mode=pool.mode.value,
            server=pool.target.describe(),
            acquire_timeout=pool.acquire_timeout,
            query_timeout=pool.query_timeout,
            idle_in_transaction_timeout=pool.idle_in_transaction_timeout,
            slow_query_threshold=pool.slow_query_threshold,
            leak_threshold=pool.leak_threshold,
            leak_action=pool.leak_action,
            max_clients=pool.max_clients,
            console=console,
            has_admin=bool(config.console.admin_users),
            options={k: v for k, v in pools[name].items() if k not in _UNSAID},
        )
        for name, pool in config.pools.items()
    }


def _console(config: Config, address: tuple[str, int]) -> str:
    """The command to the console, as someone on this host would type it."""
    listen, admins = config.listen, config.console.admin_users
    host, port = address
    if not listen.host:
        host = listen.unix_socket_dir or host
    elif listen.host in ("0.0.0.0", "::", "*"):
        host = "localhost"
    user = admins[0] if admins else "ADMIN"
    return f"psql -h {host} -p {port} -U {user} {CONSOLE_DATABASE}"
