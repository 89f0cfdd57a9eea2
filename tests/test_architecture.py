"""The structure of the code, held by reading its syntax: who imports whom, and what stays pure.

The tables are the design. A new line in one of them is a decision, to be reviewed as one.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LONGEST = 500
"""Lines of a module. One that has more is split, by the reasons it has to change."""

ROOMS = {
    "errors": "",
    "work": "",
    "events": "work",
    "fingerprint": "grammar",
    "grammar": "",
    "logs": "",
    "config_text": "",
    "dsn": "target protocol",
    "target": "protocol",
    "sql": "work events",
    "config_values": "",
    "hba": "",
    "config": "config_values hba target dsn events errors",
    "config_changes": "config errors",
    "config_file": "config config_values config_text errors",
    "protocol": "errors",
    "pool": "work protocol config target events errors",
    "proxy": "work fingerprint pool protocol sql config config_values hba events errors",
    "observe": "work events",
    "facts": "config events",
    "api": "work observe facts config config_values events",
    "console": "work protocol facts config config_changes config_values events errors",
    "circumstances": "observe config config_values",
    "operate": "work console facts proxy pool observe config events errors",
    "service": "circumstances work operate console config_changes api observe proxy pool config events errors",
    "check": "work proxy pool protocol config events errors",
    "units": "",
    "ask": "config errors units",
    "demo": "units service observe config config_file events errors",
    "cli": "ask demo service check config config_file logs errors",
    "__main__": "cli",
}
"""The folders and modules of ``sidecar``, and what each may import. All may import the version."""

PURE = (
    *(
        "errors",
        "events",
        "work",
        "facts",
        "fingerprint",
        "grammar",
        "sql",
        "config_changes",
        "circumstances",
        "config_text",
        "config_values",
        "dsn",
        "target",
        "hba",
        "protocol.*",
    ),
    *(
        "pool.state",
        "pool.budget",
        "pool.leaks",
        "pool.chains",
        "proxy.scrub",
        "proxy.texts",
        "proxy.tags",
        "proxy.expect",
        "proxy.prepared",
        "proxy.settings",
    ),
    *("proxy.requests", "proxy.statements", "proxy.rewriter", "proxy.replies", "proxy.unleased"),
    *("proxy.pins", "proxy.policy", "proxy.carrier", "proxy.errands", "proxy.limits"),
    *(
        "observe.sketch",
        "observe.histogram",
        "observe.blame",
        "observe.failures",
        "observe.flight",
        "observe.keys",
        "observe.why",
        "observe.evidence",
        "observe.wording",
        "observe.verdict",
        "observe.causes",
        "observe.troubles",
        "observe.judge",
        "observe.watchman",
        "observe.statements",
        "observe.exported",
        "observe.exposition",
        "observe.catalogue",
        "observe.families",
        "api.negotiate",
        "api.page",
        "api.access",
        "api.parameters",
        "api.problems",
        "api.shapes",
    ),
    *("console.commands", "console.extended", "console.rows", "console.facts"),
    *("units", "ask.answers", "ask.board", "ask.panes", "ask.frame", "ask.keys"),
    *("console.tables", "console.beyond", "console.words", "console.insight", "console.why"),
)
"""Modules that do no I/O, know no clock and write no log: time is an argument of theirs."""

IMPURE = {
    *("asyncio", "concurrent", "datetime", "logging", "os", "select", "selectors", "signal"),
    *("socket", "ssl", "subprocess", "tempfile", "threading", "time", "urllib", "uvloop"),
}

LIBRARIES = {
    # what it answers, where it listens; who asks
    "aiohttp": "api.app api.server api.v1 ask.asker",
    "postgast": "grammar",
    "prometheus_client": "observe.metrics service",  # the service makes the registry
    "psycopg": "dsn demo.workload",  # connection strings; the demo's clients
    # its type for secrets
    "pydantic": "config config_values config_file dsn target proxy.login proxy.credentials"
    " proxy.authenticate",
    "pydantic_core": "config_file",
    "rich": "ask.frame",
    "scramp": "protocol.authentication",
    "uvloop": "cli",
    "yaml": "config_text api.contract",
}
"""Libraries of others, and the modules that know them: one each, where there is no reason."""

DISTRIBUTIONS = {"yaml": "PyYAML", "pydantic_core": "pydantic"}
"""Under which name a library is installed, where it is another one."""

HOT = {
    "sidecar.proxy.relay": "data_received server_data forward _attach end_lease write begin",
    "sidecar.proxy.unleased": "find",
    "sidecar.proxy.requests": "forward _inspect _run _add_query _parse",
    "sidecar.proxy.texts": "query parse",
    "sidecar.proxy.statements": "bind _use _use_unnamed _ensure",
    "sidecar.proxy.replies": "forward _inspect _complete _ready _query_done",
    "sidecar.pool.pool": "acquire release _hand_over",
    "sidecar.pool.state": "move take_idle next_waiter",
    "sidecar.observe.recorder": "acquired_at_once released query_done transaction_done",
}
"""What runs for every query or transaction."""


def _modules() -> dict[str, Path]:
    paths = sorted((ROOT / "sidecar").rglob("*.py"))
    return {_name(path.relative_to(ROOT)): path for path in paths}


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = _modules()
"""The files of the package by dotted name."""


@cache
def syntax(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@cache
def imports(module: str) -> frozenset[str]:
    """Every module imported anywhere in this one, ours as they are called in ``MODULES``."""
    return frozenset(_imports(syntax(module)))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def room(module: str) -> str:
    """The folder or the module right below ``sidecar``."""
    return module.split(".")[1] if "." in module else ""


def outside(module: str) -> set[str]:
    """The top names of what this module imports from elsewhere."""
    return {name.partition(".")[0] for name in imports(module)} - {"sidecar"}


def matching(patterns: tuple[str, ...]) -> list[str]:
    regex = "|".join(re.escape(f"sidecar.{each}").replace(r"\*", "[a-z_]+") for each in patterns)
    return [module for module in MODULES if re.fullmatch(regex, module)]


# -- directions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_the_allowed_way(module: str):
    """So that a change is felt upwards only, and the pool can be understood without the rest."""
    mine = room(module)
    allowed = {mine, "", *ROOMS.get(mine, "").split()}
    used = {room(name) for name in imports(module) if name in MODULES}
    assert used <= allowed, f"{module} imports {', '.join(sorted(used - allowed))}"


def test_every_room_has_a_line_in_the_table():
    assert {room(module) for module in MODULES} - {""} == ROOMS.keys()


def test_allowed_directions_have_no_circle():
    order = TopologicalSorter({name: allowed.split() for name, allowed in ROOMS.items()})
    order.prepare()  # raises CycleError


def test_modules_have_no_circle():
    order = TopologicalSorter(
        {module: imports(module) & MODULES.keys() - {"sidecar"} for module in MODULES}
    )
    order.prepare()


def test_query_path_does_not_know_who_observes_it():
    """It calls ``events.Observer``; recording can be replaced, or left out."""
    for name in ("pool", "proxy"):
        assert not {"observe", "api", "service", "demo"} & {*ROOMS[name].split()}


# -- purity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", matching(PURE))
def test_pure_modules_stay_pure(module: str):
    """They are tested by tables and by generated input, without sockets, waiting or mocks."""
    assert not outside(module) & IMPURE
    for node in ast.walk(syntax(module)):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print", "input")


def test_every_pure_module_exists():
    for pattern in PURE:
        assert matching((pattern,)), pattern


# -- libraries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_libraries_are_known_to_few_modules(module: str):
    """Their exceptions and changes are dealt with in one place."""
    for library in outside(module) - sys.stdlib_module_names:
        assert library in LIBRARIES, f"{library} is new here"
        assert module.removeprefix("sidecar.") in LIBRARIES[library].split()


def test_libraries_are_the_dependencies():
    """None is used that is not declared, none declared that is not used."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[^A-Za-z0-9-]", each)[0] for each in project["dependencies"]}
    used = {library for module in MODULES for library in outside(module) & LIBRARIES.keys()}
    assert {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in used} == declared


# -- size and shape --------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module: str):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= LONGEST


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_own(module: str):
    tree = syntax(module)
    assert not tree.body or ast.get_docstring(tree)


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_named_after_what_they_hide(module: str):
    assert module.rpartition(".")[2] not in (
        "util",
        "utils",
        "helpers",
        "common",
        "manager",
        "base",
    )


@pytest.mark.parametrize("module", MODULES)
def test_wait_for_is_not_used(module: str):
    """``asyncio.wait_for`` of Python 3.11 can lose a cancellation; ``timeout_at`` does not."""
    for node in ast.walk(syntax(module)):
        assert not (isinstance(node, ast.Attribute) and node.attr == "wait_for")


# -- the hot path ----------------------------------------------------------------------------------


def functions(module: str) -> dict[str, list[ast.AST]]:
    """The functions and methods of a module by name."""
    found: dict[str, list[ast.AST]] = {}
    for node in ast.walk(syntax(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.setdefault(node.name, []).append(node)
    return found


HOT_FUNCTIONS = [(module, name) for module, names in HOT.items() for name in names.split()]


@pytest.mark.parametrize(("module", "name"), HOT_FUNCTIONS)
def test_hot_functions_only_do_their_work(module: str, name: str):
    """No await, no task, no log, no text put together: but to raise an error."""
    found = functions(module)
    assert name in found, f"{module} has no {name} any more: mend the list"
    for function in found[name]:
        assert isinstance(function, ast.FunctionDef), "a plain function"
        for node in _but_errors(function):
            assert not isinstance(node, ast.Await | ast.JoinedStr | ast.Lambda | ast.GeneratorExp)
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("create_task", "call_later", "call_soon", "format")
                assert not (isinstance(node.value, ast.Name) and node.value.id == "log")


def _but_errors(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below this one, without those of ``raise`` statements."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.Raise):
            yield child
            yield from _but_errors(child)
