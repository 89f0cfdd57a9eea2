"""Reading the configuration: a file and the environment in, a validated ``Config`` out.

Text becomes a tree (``config_text``), overrides change it, the models check it (``config``), and
what is wrong gets words. Reads one file and nothing else: the environment is a parameter. No error
message contains a password or a part of a connection string.
"""

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sidecar import config_text
from sidecar.config import (
    Config,
    ConsoleConfig,
    HttpConfig,
    IncidentsConfig,
    ListenConfig,
    LogConfig,
    PoolConfig,
    Section,
    StatementsConfig,
    UserConfig,
    options,
)
from sidecar.config_text import Layout, Node, dotted, instead_of, shown
from sidecar.config_values import Conflict
from sidecar.errors import ConfigError

_SECRETS = ("dsn", "auth_dsn", "password", "verifier", "token")
_TEXTS = ("hba",)  # too long to be shown; what is wrong in them names the line
_REQUIRED: dict[str, type[Section]] = {"pools": Config, "dsn": PoolConfig}


_LAYOUT = Layout(
    top=["drain_timeout"],
    sections={
        "listen": options(ListenConfig),
        "http": options(HttpConfig),
        "console": options(ConsoleConfig),
        "statements": options(StatementsConfig),
        "incidents": options(IncidentsConfig),
        "log": options(LogConfig),
    },
    named={"users": options(UserConfig), "pools": options(PoolConfig)},
)


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """Read the file and its overrides. ``ConfigError`` lists all that is wrong, a line each."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text, see byte {exc.start + 1}") from None
    return parse(text, environ, str(path))


def parse(text: str, environ: Mapping[str, str], source: str) -> Config:
    """Like ``load``, with the file's text; ``source`` names the file in errors."""
    try:
        raw, duplicates = config_text.read(text)
    except config_text.YamlProblem as exc:
        raise ConfigError(f"{source}, {exc}") from None
    tree, broken = config_text.expand(raw, environ)
    if not isinstance(tree, dict):
        allowed = ", ".join(_LAYOUT.keys(()))
        raise ConfigError(f"{source}: is not a mapping; allowed: {allowed}")
    origins, problems = config_text.override(tree, environ, _LAYOUT)
    # What an override replaced need not have been sound.
    broken = {path: problem for path, problem in broken.items() if path not in origins}
    problems = [f"{source}, {duplicate}" for duplicate in duplicates] + problems
    problems += [f"{dotted(path)}: {problem}" for path, problem in broken.items()]
    _name_pools(tree, problems)
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as exc:
        for error in exc.errors():
            path = tuple(str(part) for part in error["loc"] if part != "[key]")
            if path not in broken:
                problems.append(_worded(path, error, origins))
    # Outside of the except block: pydantic's error holds the values, and must not be the context.
    if config is None or problems:
        raise ConfigError("\n".join(problems))
    return config


def _name_pools(tree: dict[str, Node], problems: list[str]) -> None:
    pools = tree.get("pools")
    for name, pool in pools.items() if isinstance(pools, dict) else ():
        if isinstance(pool, dict):
            if "name" in pool:
                problems.append(_unknown_key(("pools", name, "name")))
            pool["name"] = name


def _worded(
    path: config_text.Path, error: ErrorDetails, origins: dict[config_text.Path, str]
) -> str:
    """A line on one of pydantic's errors: path, value unless it may be secret, what is allowed."""
    cause = error.get("ctx", {}).get("error")
    variable = origins.get(path)
    value = error["input"]
    kinds: dict[type, str] = {list: "a list", dict: "a mapping"}
    given = kinds.get(type(value), repr(value))
    if path[-1] in _SECRETS:
        given = "***"
    elif error["loc"][-1] == "[key]":
        given = repr(shown(path[-1]))
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(path)
        case "missing":
            variable = origins.get(path[:-1])
            meaning = _REQUIRED[path[-1]].model_fields[path[-1]].description
            problem = f"is missing; allowed: {meaning}"
        case "model_type" | "dict_type":
            # The value is not shown: "main: postgresql://..." is how a secret gets here.
            allowed = ", ".join(_LAYOUT.keys(path)) or "names, each with its options"
            problem = f"is not a mapping; allowed: {allowed}"
        case "literal_error" | "enum":
            problem = f"{given} is unknown; allowed: {error['ctx']['expected']}"
        case "value_error" if path[-1] in _TEXTS:
            problem = str(cause)
        case "value_error":
            problem = f"{given} {cause}"
            if isinstance(cause, Conflict):
                variable = variable or origins.get((*path[:-1], cause.other))
        case _:
            problem = f"{given} is not text; allowed: text"
    return f"{dotted(path)}: {problem}" + (f" (set by {variable})" if variable else "")


def _unknown_key(path: config_text.Path) -> str:
    return f"{dotted(path)}: unknown key{instead_of(path[-1], _LAYOUT.keys(path[:-1]))}"
