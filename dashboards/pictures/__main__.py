"""The command: ``python -m dashboards.pictures``, which ``make pictures`` runs."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from dashboards import queries
from dashboards.pictures import ask
from dashboards.pictures.ask import View
from dashboards.pictures.prometheus import PictureError, Prometheus
from dashboards.pictures.stage import stage

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "docs" / "images"

OF_ONE_POOL, POOL = "pgsidecar-pool", "main"  # the board that is meant for one, and which it shows

_BEFORE = 15.0  # seconds that the load has run when a picture begins


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whatever was started is to be stopped
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pictures-")))
            url = options.prometheus
            if url is None:
                seconds = options.minutes * 60 + _BEFORE
                _say(f"watching the demo's load for {seconds:.0f} s and more ...")
                url = stack.enter_context(stage(seconds))
            make(url, options.minutes, options.out, folder)
    except PictureError as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


def make(url: str, minutes: float, out: Path, folder: Path) -> None:
    """Asks all that the pictures show at once, so that they show the same time."""
    prometheus = Prometheus(url)
    end = time.time()
    view = View(end - minutes * 60, end, prometheus.scrape_interval())
    of_pool = replace(view, variables={**view.variables, "pool": POOL})
    for path in queries.files():
        picture = ask.picture(
            queries.load(path), prometheus, of_pool if path.stem == OF_ONE_POOL else view
        )
        for remark in picture.remarks():
            _say(f"{path.stem}: {remark}")
        (folder / path.name).write_text(json.dumps(picture.description()))
    _draw(folder)
    out.mkdir(parents=True, exist_ok=True)
    for drawn in sorted(folder.glob("*.png")):
        shutil.copy(drawn, out / drawn.name)
        _say(f"{out / drawn.name}: {drawn.stat().st_size // 1024} KB")


def _draw(asked: Path) -> None:
    node, chromium = shutil.which("node"), shutil.which("chromium")
    if node is None or chromium is None or not (HERE / "node_modules").is_dir():
        raise PictureError("node, chromium or the npm packages are missing: make pictures")
    command = [node, str(HERE / "draw.mjs"), "--chromium", chromium, str(asked)]
    if subprocess.run(command).returncode:
        raise PictureError("the drawing failed")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dashboards.pictures",
        description="Draw the dashboards' main panels from a Prometheus' figures.",
    )
    parser.add_argument(
        "--prometheus", metavar="URL", help="ask this one; default: start one, with a load"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how much to show (%(default)s)")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder for the pictures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
