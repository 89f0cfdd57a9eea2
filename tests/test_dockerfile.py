"""The Dockerfile, as far as it can be checked without building it: read, and its commands tried."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar import config_file
from sidecar.api.server import HttpServer
from sidecar.config import HttpConfig
from tests.metrics_page import Nobody, Page

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Instruction:
    word: str
    value: str
    stage: int


def read_dockerfile() -> list[Instruction]:
    """The instructions, each with the number of its stage; the last stage is the image."""
    text = (ROOT / "Dockerfile").read_text()
    text = "".join(line for line in text.splitlines(True) if not line.startswith("#"))
    text = re.sub(r"\\\n\s*", "", text)
    found: list[Instruction] = []
    stage = -1
    for line in filter(None, map(str.strip, text.splitlines())):
        word, value = line.split(maxsplit=1)
        stage += word == "FROM"
        found.append(Instruction(word, value, stage))
    return found


INSTRUCTIONS = read_dockerfile()
IMAGE = max(instruction.stage for instruction in INSTRUCTIONS)


def values(word: str) -> list[str]:
    """The values of all instructions of this kind in the image's own stage."""
    return [each.value for each in INSTRUCTIONS if (each.word, each.stage) == (word, IMAGE)]


def one(word: str) -> str:
    (value,) = values(word)
    return value


def environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for each in values("ENV") for pair in each.split())


def health_check() -> list[str]:
    """The command, run with this interpreter in place of the image's."""
    arguments: list[str] = json.loads(one("HEALTHCHECK").partition("CMD ")[2])
    assert arguments[0] == "python"
    return [sys.executable, *arguments[1:]]


def test_every_base_is_pinned():
    """By the exact version, to be read, and by digest, which cannot be moved."""
    bases = [each.value.split()[0] for each in INSTRUCTIONS if each.word == "FROM"]
    assert len(bases) == 2
    for base in bases:
        assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+@sha256:[0-9a-f]{64}", base)
    assert len(set(bases)) == 1, "an environment works with the interpreter it was made with only"


def test_image_runs_as_somebody_else_than_root():
    """With a number: Kubernetes' runAsNonRoot cannot look up a name."""
    user, group = map(int, one("USER").split(":"))
    assert user >= 1000
    assert group >= 1000
    words = [each.word for each in INSTRUCTIONS if each.stage == IMAGE]
    assert not {"RUN", "COPY"} & {*words[words.index("USER") :]}, "these would need root"


def test_command_gets_the_signals():
    """In exec form: a shell in between would keep SIGTERM to itself, and nothing would drain."""
    assert json.loads(one("ENTRYPOINT")) == ["pgsidecar"]
    assert json.loads(one("CMD")) == ["run", "--config", "/etc/pgsidecar/config.yaml"]
    assert one("STOPSIGNAL") == "SIGTERM"


def test_nothing_is_fetched_but_packages():
    assert not [each for each in INSTRUCTIONS if each.word == "ADD"]
    commands = " ".join(each.value for each in INSTRUCTIONS if each.word == "RUN")
    assert not re.search(r"\b(curl|wget|git)\b", commands)


def test_no_secret_is_baked_in():
    """Neither by ENV and ARG, which show in the image's history, nor by a value in the file."""
    given = " ".join(each.value for each in INSTRUCTIONS if each.word in ("ARG", "ENV", "LABEL"))
    assert not re.search(r"(?i)passw|secret|token|dsn|database_url|postgres(ql)?://", given)
    assert "postgresql://" not in "".join(
        line
        for line in (ROOT / "config.yaml").read_text().splitlines()
        if not line.strip().startswith("#")
    )


def test_everything_copied_is_there_and_sent_to_the_builder():
    sources = [
        source
        for each in INSTRUCTIONS
        if each.word == "COPY" and not each.value.startswith("--from=")
        for source in each.value.split()[:-1]
    ]
    assert sources
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in rules
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source.removeprefix('./')}" in rules


def test_environment_is_made_of_options():
    """The shipped file with the image's variables is a configuration that answers from outside."""
    environ = {**environment(), "DATABASE_URL": "postgresql://app:x@db/app"}
    read = config_file.load(ROOT / "config.yaml", environ)
    assert (read.http.host, str(read.http.port)) == ("0.0.0.0", environ["PGSIDECAR__HTTP__PORT"])
    assert read.listen.host == "127.0.0.1"
    assert one("EXPOSE").split() == [str(read.listen.port), str(read.http.port)]
    assert environ["PYTHONUNBUFFERED"] == "1"


@pytest.fixture
async def http_port() -> AsyncIterator[int]:
    """The port of the real HTTP service; its PostgreSQL is down."""
    page = Page()
    options = HttpConfig(port=0)
    server = HttpServer(
        options, page.metrics, lambda: ["PostgreSQL is down"], page.recorder, Nobody()
    )
    await server.start()
    yield server.address[1]
    await server.stop()


async def check_health(port: int) -> int | None:
    """The exit code of the health check for this port, asked behind a proxy that is not there."""
    proxy = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    process = await asyncio.create_subprocess_exec(
        *health_check(),
        env={**os.environ, **proxy, "PGSIDECAR__HTTP__PORT": str(port)},
        stderr=subprocess.DEVNULL,
    )
    async with asyncio.timeout(20):
        return await process.wait()


def test_health_check_asks_for_life_in_exec_form():
    """/readyz would have the container restarted while PostgreSQL is down."""
    assert "/livez" in one("HEALTHCHECK")
    assert "/readyz" not in one("HEALTHCHECK")
    assert re.search(r"--timeout=\d+s", one("HEALTHCHECK"))


async def test_health_check_finds_a_running_sidecar_healthy(http_port: int):
    assert await check_health(http_port) == 0


async def test_health_check_finds_a_silent_port_unhealthy(unused_tcp_port: int):
    assert await check_health(unused_tcp_port) == 1


@pytest.mark.parametrize("answer", [b"HTTP/1.1 503 Service Unavailable\r\n\r\n", b""])
async def test_health_check_finds_a_bad_answer_unhealthy(answer: bytes):
    """An error, and none at all: then it ends by itself, before Docker's timeout kills it."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer:
            writer.write(answer)
            writer.close()
        else:
            await reader.read()
            writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        assert await check_health(server.sockets[0].getsockname()[1]) == 1
