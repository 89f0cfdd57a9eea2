"""``pgsidecar why``: what it says of a healthy and of an ill sidecar, and of what is no sidecar at all."""

import asyncio
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sidecar.ask.answers import Entry
from sidecar.ask.asker import LARGEST, Asker, CannotAsk, address_of, configured
from sidecar.ask.why import lines, run_why
from sidecar.config import HttpConfig
from tests.conftest import MakePostgres
from tests.sidecar_process import (
    PATIENCE,
    MakeService,
    ServiceHere,
    configuration,
    environment,
)

TOKEN = "a-token-that-is-long-enough"


def pgsidecar_why(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("pgsidecar"), "why", *arguments],
        capture_output=True,
        text=True,
        env=environment() | variables,
        timeout=PATIENCE * 2,
        check=False,
    )


def url(sidecar: ServiceHere) -> str:
    return f"http://127.0.0.1:{sidecar.http_port}"


async def why(
    address: str, token: str = "", pool: str = "", as_json: bool = False
) -> tuple[int, str]:
    out = io.StringIO()
    async with Asker(address_of(address, token)) as asker:
        return await run_why(asker, pool, as_json, out), out.getvalue()


# -- what it says ----------------------------------------------------------------------------------


def verdict(kind: str = "leak", evidence: int = 5, steps: int = 3) -> Entry:
    return Entry(
        {
            "kind": kind,
            "headline": f"a {kind}",
            "evidence": [f"figure {n}" for n in range(evidence)],
            "next_steps": [f"step {n}" for n in range(steps)],
        }
    )


HEALTHY = Entry({"kind": "healthy", "headline": "all is well"})


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ([("main", HEALTHY), ("direct", HEALTHY)], ["healthy: main, direct"]),
        (
            [("main", verdict())],
            [
                "main: a leak",
                *(f"  figure {n}" for n in range(5)),
                *(f"  next: step {n}" for n in range(3)),
            ],
        ),
        (
            [("direct", HEALTHY), ("main", verdict(evidence=9, steps=9))],
            [
                "main: a leak",
                *(f"  figure {n}" for n in range(6)),
                *("  next: step 0", "  next: step 1"),
                "healthy: direct",
            ],
        ),
        (
            [("main", verdict("lock_chain")), ("direct", verdict("database_down"))],
            [
                *("main: a lock_chain", "  figure 0", "  figure 1"),
                *("  next: step 0", "  next: step 1"),
                *("direct: a database_down", "  figure 0", "  figure 1"),
                *("  next: step 0", "  next: step 1"),
            ],
        ),
        ([("main", Entry({"kind": "pool_too_small"}))], ["main: pool too small"]),
        (
            [("main", Entry({"kind": "leak", "headline": "Pool main is full: a leak."}))],
            ["Pool main is full: a leak."],
        ),
    ],
)
def test_ten_lines_what_is_wrong_first(found, shown):
    assert lines(found) == shown
    assert len(lines(found)) <= 10


def test_many_pools_get_two_lines_each():
    told = lines([(f"pool{n}", verdict()) for n in range(7)])
    assert told[:2] == ["pool0: a leak", "  figure 0"]
    assert len(told) == 14


async def test_a_healthy_sidecar_is_one_line_and_0(postgres, make_service: MakeService):
    sidecar = await make_service(postgres.dsn())
    await sidecar.until_pinged()
    assert await why(url(sidecar)) == (0, "healthy: main\n")
    code, text = await why(url(sidecar), as_json=True)
    assert code == 0
    assert json.loads(text)["items"][0]["pool"] == "main"


async def test_a_database_that_is_down_is_said_and_1(
    own_postgres: MakePostgres, make_service: MakeService
):
    server = own_postgres()
    sidecar = await make_service(server.dsn(), connect_timeout="1s", ping_interval="0.2s")
    await sidecar.until_pinged()
    await asyncio.to_thread(server.stop)
    await sidecar.until(lambda now: not now.is_up)
    deadline = time.monotonic() + PATIENCE
    while (answer := await why(url(sidecar)))[0] == 0:
        assert time.monotonic() < deadline, answer
        await asyncio.sleep(0.1)
    assert answer[0] == 1
    found = answer[1].splitlines()
    assert found[0].startswith("Pool main cannot reach PostgreSQL at 127.0.0.1:")
    assert 3 <= len(found) <= 10
    assert any(line.startswith("  next: ") for line in found)
    code, text = await why(url(sidecar), pool="main", as_json=True)
    assert code == 1
    assert json.loads(text)["items"][0]["verdict"]["kind"] == "database_down"


# -- whom it asks ----------------------------------------------------------------------------------


def test_the_command_tells_by_its_exit_code(postgres, make_process, tmp_path):
    """Address and token from the configuration; else from arguments and the environment."""
    sidecar = make_process(postgres.dsn(), http={"token": TOKEN})
    text = configuration(postgres.dsn(), http={"token": TOKEN, "port": sidecar.http_port})
    path = tmp_path / "with_port.yaml"
    path.write_text(text)
    done = pgsidecar_why("--config", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "healthy: main\n", "")
    address = f"http://127.0.0.1:{sidecar.http_port}"
    assert pgsidecar_why("--url", address, PGSIDECAR_TOKEN=TOKEN).returncode == 0
    assert pgsidecar_why("--url", address, "--token", TOKEN).returncode == 0
    for token, what in (("", "is needed"), ("wrong", "is wrong")):
        done = pgsidecar_why("--url", address, PGSIDECAR_TOKEN=token)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"a token {what}" in done.stderr
        assert "PGSIDECAR_TOKEN" in done.stderr
    done = pgsidecar_why("--url", address, "--pool", "nonsense", PGSIDECAR_TOKEN=TOKEN)
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_help_tells_the_exit_codes():
    done = pgsidecar_why("--help")
    assert "exit codes: 0 nothing is wrong, 1 something is, 2 the sidecar" in done.stdout
    assert "PGSIDECAR_TOKEN" in done.stdout


def test_a_port_of_the_kernel_s_choice_is_not_known(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(configuration("postgresql://app@127.0.0.1/app"))
    done = pgsidecar_why("--config", path)
    assert done.returncode == 2
    assert "--url tells the real one" in done.stderr


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:9632"),
        ("0.0.0.0", "http://127.0.0.1:9632"),
        ("::", "http://[::1]:9632"),
        ("::1", "http://[::1]:9632"),
    ],
)
def test_the_configuration_s_address_is_the_one_to_ask(host, address):
    assert configured(HttpConfig(host=host)) == address


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1:9632", "ftp://host", "http://", "http://h:99999", "http://[::1", "\x1b[2J", ""],
)
def test_what_is_no_address_is_said(text):
    with pytest.raises(CannotAsk, match="is not the address of a sidecar") as found:
        address_of(text)
    assert found.value.message.isprintable()


def test_a_password_in_the_address_is_not_repeated():
    with pytest.raises(CannotAsk) as found:
        address_of("http://me:hunter2@host:1")
    assert "hunter2" not in str(found.value)
    assert TOKEN not in repr(address_of("http://host:1", TOKEN))
    with pytest.raises(CannotAsk, match="the token has characters"):
        address_of("http://host:1", "a\r\nb")


# -- what is no sidecar ----------------------------------------------------------------------------


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a program that does this with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        answer(connection)
                    except OSError:
                        pass  # it has seen enough

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def http(status: str, body: bytes, *headers: str) -> Callable[[socket.socket], None]:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""])

    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(head.encode() + body)

    return answer


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (http("200 OK", b"<html>hello</html>"), "is not a pgsidecar"),
        (http("200 OK", b"[" * 100_000), "is not a pgsidecar"),
        (http("200 OK", b"[1]"), "is not a pgsidecar"),
        (http("200 OK", b'{"items": 5}'), "no verdicts"),
        (http("200 OK", b'{"items": [{"pool": "x", "verdict": []}]}'), "no verdicts"),
        (http("404 Not Found", b"nothing here"), r"is not a pgsidecar .*\(status 404\)"),
        (http("302 Found", b"", "Location: http://127.0.0.1:1/"), "is not a pgsidecar"),
        (http("403 Forbidden", b'{"detail": "without a token"}'), "without a"),
        (http("500 Oops", b'{"detail": "it \\u001b[2J broke"}'), "it \N{REPLACEMENT CHARACTER}"),
        (lambda connection: connection.sendall(b"EXX\0not http\r\n\r\n"), "is not a pgsidecar"),
        (lambda connection: None, "is not a pgsidecar"),
        (http("200 OK", b"x" * (LARGEST + 1)), "more than"),
    ],
)
async def test_what_answers_may_be_anything(answer, told):
    with server(answer) as address, pytest.raises(CannotAsk, match=told) as found:
        await why(address)
    assert found.value.message.isprintable()
    assert len(found.value.message) < 500


async def test_silence_has_a_deadline():
    released = threading.Event()

    def wait(connection: socket.socket) -> None:
        released.wait(PATIENCE)

    with server(wait) as address:
        async with Asker(address_of(address)) as asker:
            now = asyncio.get_running_loop().time()
            with pytest.raises(CannotAsk, match="has not answered in time"):
                await asker.get("/api/v1/why", now + 0.2)
        released.set()


async def test_nobody_there_is_said():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(CannotAsk, match=r"nobody listens on .* does the sidecar run"):
        await why(f"http://127.0.0.1:{port}")


async def test_a_name_that_is_none_is_said():
    with pytest.raises(CannotAsk, match=r"http://nowhere\.invalid"):
        await why("http://nowhere.invalid:9632")
