"""What a new configuration changes in a running sidecar, and what has to wait for a restart.

Pure. Options are named by their dotted paths; no value is quoted.
"""

from typing import Final

from sidecar.config import Config, ListenConfig, Section
from sidecar.errors import ConfigError

_FIXED_LISTEN: Final = ("host", "port", "unix_socket_dir")
_NEEDS_RESTART: Final = (
    *(f"listen.{name}" for name in _FIXED_LISTEN),
    "http.",
    "statements.",
    "incidents.",
    "log.format",
)


def needs_restart(option: str) -> bool:
    """Whether only a restart changes it: sockets are opened once, so is the log, and tables
    have their size."""
    return option.startswith(_NEEDS_RESTART)


def changed(old: object, new: object, path: str = "") -> list[str]:
    """The options that differ; an entry of ``users`` or ``pools`` that only one has, as a whole."""
    if isinstance(old, Section) and isinstance(new, Section):
        names = type(old).model_fields
        return _each({k: getattr(old, k) for k in names}, {k: getattr(new, k) for k in names}, path)
    if isinstance(old, dict) and isinstance(new, dict):
        return _each(old, new, path)
    return [] if old == new else [path]


def _each(old: dict[str, object], new: dict[str, object], path: str) -> list[str]:
    found: list[str] = []
    for name in {**old, **new}:
        where = f"{path}.{name}" if path else name
        if name in old and name in new:
            found += changed(old[name], new[name], where)
        else:
            found.append(where)
    return found


def taken_over(running: Config, new: Config) -> Config:
    """The new configuration, with what needs a restart as it is now.

    Raises ConfigError where the two do not go together: ``auth: trust``, say, which is allowed with
    the new ``host`` but not with the one that clients still connect to.
    """
    listen = new.listen.model_dump()
    for name in _FIXED_LISTEN:
        listen[name] = getattr(running.listen, name)
    try:
        merged = ListenConfig.model_validate(listen)
    except ValueError as exc:  # pydantic's is one
        raise ConfigError(
            "listen: does not go with the address that is in use until a restart"
            f" (host {running.listen.host!r})"
        ) from exc
    log = new.log.model_copy(update={"format": running.log.format})
    fixed = {"http": running.http, "statements": running.statements, "incidents": running.incidents}
    return new.model_copy(update={"listen": merged, "log": log, **fixed})
