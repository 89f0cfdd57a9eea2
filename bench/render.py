"""Writes the tables: for a terminal, or as Markdown for docs/benchmarks.md."""

from typing import Final

from bench.results import Report
from bench.tables import Grade, Table, tables

_COLOURS: Final = {Grade.GOAL: "32", Grade.STEP: "33", Grade.MISSED: "31"}
_GAP: Final = "  "


def terminal(report: Report, has_colours: bool) -> str:
    blocks = [_aligned(table, has_colours) for table in tables(report)]
    facts = "\n".join(f"{name}: {value}" for name, value in _facts(report))
    blocks.append(facts)
    return "\n\n".join(blocks)


def markdown(report: Report) -> str:
    blocks = ["\n".join(f"- {name}: {value}" for name, value in _facts(report))]
    for table in tables(report):
        left = table.text_columns
        rules = [":--" if column < left else "--:" for column in range(len(table.header))]
        lines = [_piped(table.header), _piped(rules)]
        lines += [_piped([cell.text for cell in row]) for row in table.rows]
        notes = "\n\n".join(_sentence(note) for note in table.notes)
        blocks.append(f"### {table.title}\n\n{notes}\n\n" + "\n".join(lines))
    if report.commands:
        blocks.append("### Commands\n\n```\n" + "\n".join(report.commands) + "\n```")
    return "\n\n".join(blocks) + "\n"


def _facts(report: Report) -> list[tuple[str, str]]:
    options = report.options
    return [
        ("measured", f"{report.began} to {report.ended}"),
        ("command", f"`{report.command}`"),
        ("runs", f"{options['seconds']} s each, rounds: {options['rounds']}"),
        *report.machine.items(),
    ]


def _aligned(table: Table, has_colours: bool) -> str:
    texts = [table.header, *([cell.text for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = [_bold(table.title, has_colours)]
    lines += [f"  {note}" for note in table.notes]
    lines.append(_line(table, widths, table.header))
    lines.append(_GAP.join("-" * width for width in widths))
    for row in table.rows:
        colours = [cell.grade and _COLOURS[cell.grade] for cell in row] if has_colours else None
        lines.append(_line(table, widths, [cell.text for cell in row], colours))
    return "\n".join(lines)


def _line(
    table: Table, widths: list[int], texts: list[str], colours: list[str | None] | None = None
) -> str:
    cells = []
    last = len(texts) - 1
    for column, (text, width) in enumerate(zip(texts, widths, strict=True)):
        is_left = column < table.text_columns or column == last
        cell = text.ljust(width) if is_left else text.rjust(width)
        colour = colours[column] if colours else None
        cells.append(f"\x1b[{colour}m{cell}\x1b[0m" if colour else cell)
    return _GAP.join(cells).rstrip()


def _bold(text: str, has_colours: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if has_colours else text


def _piped(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}."
