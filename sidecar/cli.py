"""The ``pgsidecar`` command: arguments, logging, signals, exit codes.

Exit codes: 0 all is well, 1 it failed, 2 the configuration or the arguments cannot be used. Of ``why``: 0
nothing is wrong, 1 something is, 2 the sidecar cannot be asked.
"""

import argparse
import asyncio
import gc
import io
import os
import resource
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidecar import __version__, logs
from sidecar.config import Config, HttpConfig
from sidecar.config_file import load
from sidecar.errors import ConfigError, SidecarError

if TYPE_CHECKING:
    from sidecar.ask.asker import Address

_EXAMPLES = """\
examples:
  DATABASE_URL=postgresql://app:secret@db:5432/app pgsidecar run --config config.yaml
  pgsidecar check --config config.yaml      try the configuration and every pool's server
  pgsidecar why                             what is wrong right now, and what to do about it
  pgsidecar top --config config.yaml        who waits, who holds the pool, which statements run
  pgsidecar demo --seconds 60               PostgreSQL, sidecar and a lively load, here and now

Clients connect with any PostgreSQL driver: host and port of the sidecar, database = name of a pool.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _loop_runner()(options.run(options))
    except ConfigError as exc:
        print(f"pgsidecar: the configuration cannot be used\n{exc}", file=sys.stderr)
        return 2
    except SidecarError as exc:
        print(f"pgsidecar: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _loop_runner() -> Callable[[Coroutine[Any, Any, int]], int]:
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgsidecar",
        description="A PostgreSQL connection pool that says who holds it, who waits and why.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pgsidecar {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="run the sidecar until SIGTERM or Ctrl-C; SIGHUP reloads the file"
    )
    _add_config(run)
    run.set_defaults(run=_run)

    check = commands.add_parser(
        "check", help="validate the configuration and try to connect each pool; 0 if all is well"
    )
    _add_config(check)
    check.set_defaults(run=_check)

    why = commands.add_parser(
        "why",
        help="what is wrong with the pools of a running sidecar, and what to do about it",
        description="Ask a running sidecar what is wrong with its pools right now.",
        epilog="exit codes: 0 nothing is wrong, 1 something is, 2 the sidecar cannot be asked",
    )
    _add_address(why)
    why.add_argument("--pool", default="", metavar="NAME", help="of this pool only")
    why.add_argument("--json", action="store_true", help="the answer of /api/v1/why")
    why.set_defaults(run=_why)

    top = commands.add_parser(
        "top",
        help="a live view of a running sidecar: pools, waiters, holders, statements, incidents",
        description="Watch a running sidecar. The key ? lists the others; q quits.",
        epilog="exit codes: 0 told to stop, 2 the sidecar cannot be asked",
    )
    _add_address(top)
    top.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="N", help="seconds between looks (1)"
    )
    top.add_argument("--once", action="store_true", help="print one frame as text, and end")
    top.set_defaults(run=_top)

    demo = commands.add_parser(
        "demo", help="embedded PostgreSQL, the sidecar and a lively load, with a live view"
    )
    demo.add_argument("--seconds", type=_seconds, metavar="N", help="stop after N seconds")
    demo.add_argument(
        "--port", type=_port, metavar="PORT", help="for PostgreSQL clients (6432; 0: any free one)"
    )
    demo.add_argument(
        "--http-port", type=_port, metavar="PORT", help="for /metrics (9632; 0: any free one)"
    )
    demo.set_defaults(run=_demo)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="FILE",
        help="the YAML file; PGSIDECAR__SECTION__OPTION variables override it",
    )


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", metavar="URL", help="its HTTP service (http://127.0.0.1:9632, or as in --config)"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="its configuration, for address and token"
    )
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        help="its http.token; others on this host see arguments, but not the variable PGSIDECAR_TOKEN",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: allowed are 0 to 65535")
    return port


async def _run(options: argparse.Namespace) -> int:
    from sidecar.service import Service

    config = load(options.config, os.environ)
    logs.set_up(config.log.level, config.log.format)
    _raise_file_limit(config)
    service = Service(config, source=lambda: load(options.config, os.environ))
    await service.start()
    # What is there by now stays: a collection that walks it all stalls every client for 5 ms or more.
    gc.collect()
    gc.freeze()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, service.reload_soon)
    stopped = asyncio.create_task(stop.wait())
    ended = asyncio.create_task(service.wait())
    await asyncio.wait((stopped, ended), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    await service.stop()
    await ended
    return 0


def _raise_file_limit(config: Config) -> None:
    """A client is an open file; the usual soft limit of 1,024 is less than ``max_clients``."""
    pools = sum(pool.max_size for pool in config.pools.values())
    wanted = config.listen.max_clients + config.http.max_connections + 2 * pools + 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        import logging

        logging.getLogger("pgsidecar").warning(
            "fewer open files are allowed than clients",
            extra={"allowed": allowed, "wanted": wanted, "limit": "ulimit -n"},
        )


async def _check(options: argparse.Namespace) -> int:
    from sidecar.check import check, check_tls, report

    config = load(options.config, os.environ)
    findings = await check(config)
    tls = await asyncio.to_thread(check_tls, config.listen)
    print(report(config, findings, tls))
    return 0 if tls.is_ok and all(finding.is_ok for finding in findings) else 1


async def _why(options: argparse.Namespace) -> int:
    from sidecar.ask.asker import Asker, CannotAsk
    from sidecar.ask.why import run_why

    _write_anything()
    try:
        async with Asker(_address(options)) as asker:
            return await run_why(asker, options.pool, options.json, sys.stdout)
    except CannotAsk as exc:
        print(f"pgsidecar: {exc}", file=sys.stderr)
        return 2


async def _top(options: argparse.Namespace) -> int:
    from sidecar.ask.asker import Asker, CannotAsk
    from sidecar.ask.screen import Screen, discard_output
    from sidecar.ask.top import TopOptions, run_top

    _write_anything()
    screen = Screen(sys.stdout, sys.stdin, is_live=not options.once)
    try:
        async with Asker(_address(options)) as asker:
            return await run_top(asker, TopOptions(options.interval, options.once), screen)
    except CannotAsk as exc:
        print(f"pgsidecar: {exc}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # --once | head
        return 0
    finally:
        if screen.is_lost:
            discard_output()


def _write_anything() -> None:
    """An application may have a name that this terminal cannot write."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _address(options: argparse.Namespace) -> "Address":
    """Of the sidecar to ask, from the arguments, the environment and the configuration."""
    from sidecar.ask.asker import TOKEN_VARIABLE, address_of, configured

    http = HttpConfig() if options.config is None else load(options.config, os.environ).http
    if options.url is None and http.port == 0:
        raise ConfigError("http.port is 0, which is any free port: --url tells the real one")
    token = options.token or os.environ.get(TOKEN_VARIABLE, "")
    if not token and http.token is not None:
        token = http.token.get_secret_value()
    return address_of(options.url or configured(http), token)


async def _demo(options: argparse.Namespace) -> int:
    try:
        from sidecar.demo.run import run_demo
    except ImportError as exc:
        raise SidecarError(f"the demo needs more: pip install 'pgsidecar[demo]' ({exc})") from exc
    logs.set_up("error", "text")
    return await run_demo(options.seconds, options.port, options.http_port, sys.stdout)
