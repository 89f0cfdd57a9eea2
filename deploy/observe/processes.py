"""Prometheus and Alertmanager as child processes, with ports from the kernel and a folder for their files.

Owns: their configuration files, start and stop. Whoever enters one of the contexts leaves it with the
process gone. Does not own: the rules and routes, which are given as text.
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import yaml

HOST: Final = "127.0.0.1"
_STARTS: Final = 20.0  # seconds within which each is ready; it takes 0.2 on an idle machine
_STOPS: Final = 10.0


class CannotObserve(Exception):
    """A program is missing, or has ended by itself. The message is for the person at the terminal."""


def program(name: str, package: str) -> str:
    """The path of a program; ``CannotObserve`` names the Debian package that has it."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        raise CannotObserve(f"{name} is not installed: sudo apt-get install {package}")
    return path


def free_port(preferred: int = 0) -> int:
    """One that nothing listens on: neither of the two can tell which port the kernel chose for it."""
    for wanted in (preferred, 0):
        with socket.socket() as probe:
            # as a listener will: a port whose connections only linger is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, wanted))
            except OSError:
                continue
            port: int = probe.getsockname()[1]
            return port
    raise CannotObserve("the kernel has no free port")


class Server:
    """A running Prometheus or Alertmanager, by its URL."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log_path = log

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def get(self, path: str, **parameters: str) -> Any:
        """The JSON of an answer; None while there is none."""
        url = f"{self.url}{path}?{urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)
        except (urllib.error.URLError, TimeoutError):
            return None


class Prometheus(Server):
    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the API; None while it does not answer."""
        answer = self.get(f"/api/v1/{path}", **parameters)
        return None if answer is None else answer["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each result of an instant query."""
        found = self.ask("query", query=expression)
        if found is None:
            return []
        return [(each["metric"], float(each["value"][1])) for each in found["result"]]

    def value(self, expression: str) -> float | None:
        """Of an expression with one result; None if it has none."""
        found = self.query(expression)
        return found[0][1] if found else None

    def names(self) -> set[str]:
        return set(self.ask("label/__name__/values") or ())

    def alerts(self) -> list[dict[str, Any]] | None:
        """Pending and firing ones; None if it does not answer."""
        found = self.ask("alerts")
        return None if found is None else list(found["alerts"])


@contextmanager
def prometheus(
    folder: Path,
    targets: Sequence[str],
    *options: str,
    rules: str = "",
    alertmanager: str = "",
    every: str = "1s",
    port: int = 0,
) -> Iterator[Prometheus]:
    """Scrapes ``targets`` (host:port) as job pgsidecar. ``rules`` is the text of a rule file,
    ``alertmanager`` the URL of one, which is scraped, too; ``port`` is the one to have if it is free."""
    jobs = {"pgsidecar": list(targets)}
    if alertmanager:
        jobs["alertmanager"] = [alertmanager.removeprefix("http://")]
    config: dict[str, Any] = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": of}]} for job, of in jobs.items()
        ],
    }
    if rules:
        (folder / "rules.yml").write_text(rules)
        config["rule_files"] = ["rules.yml"]
    if alertmanager:
        to = {"targets": jobs["alertmanager"]}
        config["alerting"] = {"alertmanagers": [{"static_configs": [to]}]}
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    arguments = [f"--config.file={path}", f"--storage.tsdb.path={folder / 'prometheus'}"]
    name = program("prometheus", "prometheus")
    with _running(folder, name, port, *arguments, *options) as (url, log):
        yield Prometheus(url, log)


@contextmanager
def alertmanager(folder: Path, config: str, port: int = 0) -> Iterator[Server]:
    """``config`` is the text of its configuration. It is alone: no gossip, no port for it."""
    path = folder / "alertmanager.yml"
    path.write_text(config)
    name = shutil.which("alertmanager") or program(
        "prometheus-alertmanager", "prometheus-alertmanager"
    )
    arguments = [
        f"--config.file={path}",
        f"--storage.path={folder / 'alertmanager'}",
        "--cluster.listen-address=",
    ]
    with _running(folder, name, port, *arguments) as (url, log):
        yield Server(url, log)


@contextmanager
def _running(folder: Path, name: str, port: int, *arguments: str) -> Iterator[tuple[str, Path]]:
    """Its URL once it is ready, and its log."""
    log = folder / f"{Path(name).name}.log"
    address, process = _started(name, port, arguments, log)
    try:
        yield f"http://{address}", log
    finally:
        stop(process)


def _started(
    name: str, port: int, arguments: Sequence[str], log: Path
) -> tuple[str, subprocess.Popen[bytes]]:
    """Its address and the process, once it is ready. Somebody may take the port before it does: then it
    gets another one."""
    for tries_left in reversed(range(3)):
        address = f"{HOST}:{free_port(port)}"
        with log.open("wb") as said:
            process = subprocess.Popen(
                [name, f"--web.listen-address={address}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,  # a Ctrl-C is for us, who stop it in its turn
            )
        try:
            _wait_until_ready(f"http://{address}/-/ready", process, log)
            return address, process
        except CannotObserve as exc:
            stop(process)
            if not tries_left or "address already in use" not in str(exc):
                raise
        except BaseException:
            stop(process)
            raise
    raise AssertionError("the last try returns or raises")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, wait, and end it."""
    process.terminate()
    try:
        process.wait(_STOPS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _STARTS
    while True:
        if process.poll() is not None:
            text = log.read_text(errors="replace").strip()
            raise CannotObserve(f"{log.stem} ended by itself ({process.returncode})\n{text}")
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            pass
        if time.monotonic() > deadline:
            raise CannotObserve(f"{log.stem} is not ready after {_STARTS:g} s\n{log.read_text()}")
        time.sleep(0.05)
