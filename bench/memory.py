"""Memory of the sidecar with many idle clients: logged in, nothing asked yet."""

import resource
import socket
import struct
import time
from pathlib import Path
from typing import Final

from bench import poolers
from bench.options import Options
from bench.results import BenchFailed, Memory, Report
from bench.rig import DATABASE, HOST, USER, Rig

_COUNTS: Final = (1000, 5000)
_QUICK_COUNTS: Final = (1000,)
_AT_ONCE: Final = 50  # logins at a time; the listener's backlog holds them
_SETTLE: Final = 1.0  # s
_TIMEOUT: Final = 20.0  # s for a login
_VERSION_3: Final = 196608  # protocol 3.0
_READY: Final = b"Z\x00\x00\x00\x05I"  # ReadyForQuery, idle


def expected(options: Options) -> float:
    """Seconds it will take."""
    return 3 + max(_counts(options)) / 1000


def measure(rig: Rig, options: Options, report: Report) -> None:
    counts = _counts(options)
    _raise_file_limit(max(counts) + 200)
    clients: list[socket.socket] = []
    rig.progress.step("memory of idle clients")
    try:
        with poolers.sidecar(rig, max_clients=max(counts) + 100) as sidecar:
            for count in (0, *counts):
                while len(clients) < count:
                    clients += _log_in(sidecar.port, min(_AT_ONCE, count - len(clients)))
                    rig.progress.tick()
                time.sleep(_SETTLE)
                report.memory.append(Memory(count, _resident(sidecar.pid)))
    except OSError as exc:
        raise BenchFailed(f"idle clients: number {len(clients)} failed: {exc}") from exc
    finally:
        for client in clients:
            client.close()
    rig.progress.done(expected(options))


def _counts(options: Options) -> tuple[int, ...]:
    return _QUICK_COUNTS if options.quick else _COUNTS


def _raise_file_limit(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BenchFailed(f"idle clients: {needed} open files needed, ulimit -Hn allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _log_in(port: int, count: int) -> list[socket.socket]:
    """Plain sockets that log in and then keep silent: a driver would cost more than what it measures."""
    text = f"user\0{USER}\0database\0{DATABASE}\0application_name\0bench\0\0".encode()
    packet = struct.pack("!II", len(text) + 8, _VERSION_3) + text
    clients: list[socket.socket] = []
    try:
        for _ in range(count):
            clients.append(socket.create_connection((HOST, port), timeout=_TIMEOUT))
            clients[-1].sendall(packet)
        for client in clients:
            _await_ready(client)
    except BaseException:
        for client in clients:
            client.close()
        raise
    return clients


def _await_ready(client: socket.socket) -> None:
    got = b""
    while not got.endswith(_READY):
        more = client.recv(4096)
        if not more:
            raise BenchFailed(f"idle clients: a login was refused: {got!r}")
        got += more


def _resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise BenchFailed(f"process {pid} has no VmRSS")
