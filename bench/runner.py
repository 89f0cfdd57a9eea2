"""A sidecar to be measured from inside: ``python -m bench.runner --config FILE``.

The same as ``pgsidecar run``, and with ``--silent`` nothing in the query path is recorded, with
``--probe FILE`` a probe measures the event loop's stalls and writes them there at the end.

One loop, with ``--probe``: the probe runs in every turn of the event loop, which then never sleeps. A
timer would not do: libuv's have a resolution of 1 ms, half of what is to be proven. A stall is the time
between two turns; whatever holds the loop, or Python's global lock, or the core, is in it.
"""

import argparse
import asyncio
import gc
import json
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from bench.results import BenchFailed
from sidecar import logs
from sidecar.config_file import load
from sidecar.observe.silence import NullRecorder
from sidecar.service import Service

SHORTEST: Final = 0.00005  # s; shorter stalls are not kept
MOST: Final = 1_000_000  # stalls kept


class Probe:
    """Keeps the begin and end (``time.monotonic``, the same in every process) of each stall."""

    def __init__(self) -> None:
        self.stalls: list[tuple[float, float]] = []
        self._loop = asyncio.get_running_loop()
        self._last = time.monotonic()
        self._handle = self._loop.call_soon(self._turn)

    def stop(self) -> None:
        self._handle.cancel()

    def _turn(self) -> None:
        now = time.monotonic()
        if now - self._last > SHORTEST and len(self.stalls) < MOST:
            self.stalls.append((self._last, now))
        self._last = now
        self._handle = self._loop.call_soon(self._turn)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.runner", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--silent", action="store_true")
    parser.add_argument("--probe", type=Path)
    options = parser.parse_args()
    _runner()(_run(options))
    return 0


def _runner() -> Callable[[Coroutine[Any, Any, None]], None]:
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


async def _run(options: argparse.Namespace) -> None:
    config = load(options.config, os.environ)
    logs.set_up(config.log.level, config.log.format)
    service = Service(config, NullRecorder() if options.silent else None)
    await service.start()
    gc.collect()  # as ``pgsidecar run`` does
    gc.freeze()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    probe = Probe() if options.probe else None
    await stopping.wait()
    if probe is not None:
        probe.stop()
        options.probe.write_text(json.dumps(probe.stalls))
    await service.stop()


def read_stalls(path: Path) -> list[tuple[float, float]]:
    """What a probe wrote, in the order of time."""
    try:
        return [(began, ended) for began, ended in json.loads(path.read_text())]
    except (OSError, ValueError) as exc:
        raise BenchFailed(f"the probe in the sidecar left no figures: {exc}") from exc


if __name__ == "__main__":
    raise SystemExit(main())
