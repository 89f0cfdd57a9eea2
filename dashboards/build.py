"""Writes the dashboards: ``python -m dashboards.build``; with ``--check`` it only compares."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dashboards import objectives, overview, pool, statements
from dashboards.board import render

FOLDER: Final = Path(__file__).parent
_MODULES: Final = (overview, pool, statements, objectives)


def boards() -> dict[str, str]:
    """The text of each file, by the uid of its dashboard."""
    return {
        module.UID: render(module.UID, module.TITLE, module.ABOUT, module.sections())
        for module in _MODULES
    }


def main(arguments: Sequence[str], folder: Path = FOLDER) -> int:
    if [*arguments] not in ([], ["--check"]):
        sys.stderr.write("usage: python -m dashboards.build [--check]\n")
        return 2
    status = 0
    for uid, text in boards().items():
        file = folder / f"{uid}.json"
        if file.is_file() and file.read_text() == text:
            continue
        if arguments:
            sys.stdout.write(f"{file.name} differs: run python -m dashboards.build\n")
            status = 1
        else:
            file.write_text(text)
            sys.stdout.write(f"{file.name} written\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
