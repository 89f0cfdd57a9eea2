"""Schemathesis asks a running sidecar whatever the contract allows, and what it does not, and looks at each answer.

Not asked are the events, a stream without end: test_api_access.py has them.
"""

import asyncio
import re
import subprocess
import sys
from contextlib import AsyncExitStack
from importlib.resources import files
from pathlib import Path

import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.api_client import Api, Clients
from tests.contract import contract
from tests.sidecar_process import MakeProcess, environment

TOKEN = "for-schemathesis"
EXAMPLES = 2
"""Made up for each path, besides those that its rules for parameters lead to: some 10 s in all."""
SEED = 1


@pytest.mark.timeout(120)
async def test_every_answer_is_one_of_the_contract(
    make_process: MakeProcess, postgres: EmbeddedPostgres, tmp_path: Path
):
    """All its checks: status, type, headers and body of each answer; wrong values refused and right ones
    not; other methods; no answer without the token."""
    sidecar = make_process(
        postgres.dsn(), max_size=2, leak_threshold="100ms", http={"token": TOKEN}
    )
    async with AsyncExitStack() as stack, Api.of(sidecar, TOKEN) as api:
        clients = Clients(sidecar, stack)
        for _ in range(2):
            await clients.holding("report")
        waiter = await clients.connect("web")
        waiting = asyncio.create_task(waiter.execute("select 1"))  # until the sidecar is killed
        await api.until("/waits", 1)
        await api.until("/leaks", 2)
        done = await asyncio.to_thread(_ask, sidecar.http_port, tmp_path)
        waiting.cancel()
        await asyncio.wait([waiting])
    assert done.returncode == 0, done.stdout
    asked = re.search(r"Selected: (\d+)/(\d+)\n +Tested: (\d+)", done.stdout)
    assert asked, done.stdout
    paths = len(contract()["paths"])
    assert asked.groups() == (str(paths - 1), str(paths), str(paths - 1))
    assert "ERROR" not in sidecar.log


def _ask(port: int, folder: Path) -> subprocess.CompletedProcess[str]:
    file = files("sidecar.api").joinpath(
        "openapi.yaml"
    )  # of the path it is loaded from, it would not ask
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", str(file)),
        *("--url", f"http://127.0.0.1:{port}"),
        *("--header", f"Authorization: Bearer {TOKEN}"),
        *("--exclude-path", "/api/v1/events"),
        *("--phases", "examples,coverage,fuzzing"),
        *(
            "--workers",
            "4",
            "--max-examples",
            str(EXAMPLES),
            "--seed",
            str(SEED),
            "--generation-database",
            "none",
        ),
        *("--continue-on-failure", "--no-color"),
    ]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=100
    )
