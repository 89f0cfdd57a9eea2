"""The configuration as text: YAML, ``${VAR}`` and overriding variables in, a tree of text out.

Owns which YAML is accepted, how variables expand and how ``PGSIDECAR__...`` variables find the
value they replace; of the options it knows the names only (``Layout``). Pure.

Every scalar stays text (``yaml.BaseLoader``), and each option converts its own. So a value from the
file, from ``${VAR}`` and from an override is treated alike, a password that looks like a number
stays what it is, and no value can bring in YAML.
"""

import difflib
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import yaml

OVERRIDE_PREFIX = "PGSIDECAR__"

Node: TypeAlias = "str | list[Node] | dict[str, Node]"
Path: TypeAlias = tuple[str, ...]
"""The keys from the top to an option."""


class YamlProblem(ValueError):
    """The text is not YAML; the message starts with line and column."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The names of all options."""

    top: list[str]
    """Options outside of any section."""
    sections: dict[str, list[str]]
    """Options by section."""
    named: dict[str, list[str]]
    """Options of each entry, by section whose entries have free names."""

    def keys(self, path: Path) -> list[str]:
        """The keys allowed at ``path``; none where names are free or no mapping belongs."""
        match path:
            case ():
                return [*self.sections, *self.named, *self.top]
            case (section,):
                return self.sections.get(section, [])
            case (section, _):
                return self.named.get(section, [])
            case _:
                return []


_QUOTED = re.compile(r"'(?:(.|\\.|<[a-z ]+>)|[^']*)'")
"""What PyYAML quotes; group 1 if it is only a character or the name of a token."""


def read(text: str) -> tuple[Node, list[str]]:
    """The tree of one YAML document, and a problem for each key that is given twice.

    Raises ``YamlProblem``; what it quotes from the text is at most a character, as the rest may
    be a secret.
    """
    try:
        loader = _Loader(text)
        tree: Node | None = loader.get_single_data()
    except yaml.MarkedYAMLError as exc:
        where = _position(exc.problem_mark) if exc.problem_mark else "at the end"
        words = _QUOTED.sub(lambda found: found[0] if found[1] else "***", exc.problem or "")
        raise YamlProblem(f"{where}: {words}") from None
    except yaml.reader.ReaderError as exc:
        before = text[: exc.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise YamlProblem(f"line {line}, column {column}: {exc.reason}") from None
    except RecursionError:
        raise YamlProblem("line 1, column 1: nested too deeply") from None
    return ({} if tree is None else tree), loader.duplicates


def expand(tree: Node, environ: Mapping[str, str]) -> tuple[Node, dict[Path, str]]:
    """The tree with its variables expanded, and the problem of each value that cannot be."""
    problems: dict[Path, str] = {}

    def walk(node: Node, path: Path) -> Node:
        match node:
            case dict():
                return {key: walk(value, (*path, key)) for key, value in node.items()}
            case list():
                return [walk(value, (*path, str(index))) for index, value in enumerate(node)]
            case str():
                try:
                    return check(_expanded(node, environ))
                except ValueError as exc:
                    problems[path] = str(exc)
                    return node

    return walk(tree, ()), problems


def override(
    tree: dict[str, Node], environ: Mapping[str, str], layout: Layout
) -> tuple[dict[Path, str], list[str]]:
    """Put the values of overriding variables into the tree.

    Returns which variable set which path, or made it, and the problems. The values are taken as
    they are: ``$`` means nothing in them.
    """
    _fill_empty_sections(tree, layout)
    origins: dict[Path, str] = {}
    problems: list[str] = []
    for variable in sorted(environ):
        if not variable.upper().startswith(OVERRIDE_PREFIX):
            continue
        try:
            path = _meant_by(variable, tree, layout)
            if path in origins:
                raise ValueError(
                    f"sets {dotted(path)}, as {origins[path]} does; allowed: one of them"
                )
            value = check(environ[variable])
        except ValueError as exc:
            problems.append(f"{variable}: {exc}")
            continue
        node: Node = tree
        for depth, key in enumerate(path[:-1], start=1):
            if isinstance(node, dict):  # where it is not, the options' own check will say so
                if key not in node:
                    origins[path[:depth]] = variable
                node = node.setdefault(key, {})
        if isinstance(node, dict):
            node[path[-1]] = value
        origins[path] = variable
    return origins, problems


def check(text: str) -> str:
    """The text, if PostgreSQL's protocol and the system can take it; else ``ValueError``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8 text") from None
    if "\0" in text:
        raise ValueError("contains a zero byte")
    return text


def shown(key: str) -> str:
    """A key for a message; hidden if it may hold a value whose blank after ``:`` was forgotten."""
    is_plain = len(key) <= 63 and key.isprintable() and not re.search("[:/=]", key)
    return key if is_plain else "***"


def dotted(path: Path) -> str:
    return ".".join(map(shown, path))


def instead_of(key: str, keys: list[str]) -> str:
    """The rest of a sentence on a wrong key: the closest right one, and all of them."""
    close = difflib.get_close_matches(key, keys, 1)
    hint = f", did you mean {close[0]}?" if close else ""
    return f"{hint}; allowed: {', '.join(keys)}"


class _Loader(yaml.BaseLoader):
    """Scalars as text; a key given twice is noted instead of the last one winning silently."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        lines: dict[str, int] = {}
        mapping: dict[Hashable, object] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem="a key must be a word", problem_mark=key.start_mark
                )
            if key.value in lines:
                self.duplicates.append(
                    f"{_position(key.start_mark)}: {shown(key.value)} is given twice,"
                    f" first in line {lines[key.value]}"
                )
            else:
                lines[key.value] = key.start_mark.line + 1
                mapping[key.value] = self.construct_object(value, deep=True)
        return mapping


def _position(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


_TOKEN = re.compile(r"\$\$|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(:-|\}))?|\}")


def _expanded(text: str, environ: Mapping[str, str]) -> str:
    """``${VAR}``, ``${VAR:-default}`` (for unset or empty, as in a shell) and ``$$`` replaced."""
    parts: list[str] = []
    enclosing: list[tuple[list[str], str, int]] = []  # while a default is read: what is around it
    unset: list[str] = []
    done = 0
    for token in _TOKEN.finditer(text):
        parts.append(text[done : token.start()])
        done = token.end()
        name = token[1]
        if token[0] == "$$":
            parts.append("$")
        elif token[0] == "}" and enclosing:
            default = "".join(parts)
            parts, value, unset_before = enclosing.pop()
            if value:
                del unset[unset_before:]  # of a default that is not needed
            parts.append(value or default)
        elif token[0] == "}":
            parts.append("}")
        elif name is None:
            raise ValueError(
                "has a ${ that is neither ${NAME} nor ${NAME:-default}; $${ is a plain ${"
            )
        elif token[2] == ":-":
            enclosing.append((parts, environ.get(name, ""), len(unset)))
            parts = []
        elif name in environ:
            parts.append(environ[name])
        else:
            unset.append(name)
    if enclosing:
        raise ValueError("has a ${ without its }")
    if unset:
        raise ValueError(
            f"needs {', '.join(dict.fromkeys(unset))}, not set in the environment;"
            f" set it, or write ${{{unset[0]}:-default}}"
        )
    return "".join(parts) + text[done:]


def _fill_empty_sections(tree: dict[str, Node], layout: Layout) -> None:
    """A section whose lines are all commented out is empty text to YAML: make it a mapping."""
    for section in (*layout.sections, *layout.named):
        if tree.get(section) == "":
            tree[section] = {}
        entries = tree.get(section)
        if section in layout.named and isinstance(entries, dict):
            entries.update({name: {} for name, entry in entries.items() if entry == ""})


def _meant_by(variable: str, tree: dict[str, Node], layout: Layout) -> Path:
    """The option a variable overrides; ``ValueError`` if there is none."""
    match variable[len(OVERRIDE_PREFIX) :].lower().split("__"):
        case [option] if option in layout.top:
            return (option,)
        case [section, option] if section in layout.sections:
            parent: Path = (section,)
        case [section, *name, option] if section in layout.named and name:
            parent = (section, _entry("__".join(name), tree.get(section)))
        case _:
            ways = [*layout.top, *(f"{section}__<option>" for section in layout.sections)]
            ways += [f"{section}__<name>__<option>" for section in layout.named]
            allowed = ", ".join(ways).upper()
            raise ValueError(f"names no option; allowed after {OVERRIDE_PREFIX}: {allowed}")
    if option not in layout.keys(parent):
        raise ValueError(f"names no option{instead_of(option, layout.keys(parent))}")
    return (*parent, option)


def _entry(word: str, entries: "Node | None") -> str:
    """The entry that a part of a variable's name means: one of the file, else a new one."""
    names = [
        name
        for name in (entries if isinstance(entries, dict) else ())
        if re.sub("[-.*]", "_", name.lower()) == re.sub("[-.*]", "_", word)
    ]
    if len(names) > 1:
        raise ValueError(f"may mean {' or '.join(map(shown, names))}; allowed: one that is clear")
    return names[0] if names else word
