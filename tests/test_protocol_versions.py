"""Protocol 3.0 and 3.2: what is agreed upon, and cancel keys. PostgreSQL 18 is asked what is right."""

from collections.abc import Iterator

import psycopg
import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from tests.wire import Client, Sidecar, kinds, startup


@pytest.fixture(scope="module")
def postgres18() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(18) as server:
        yield server


@pytest.fixture(scope="module")
def sidecar(postgres18) -> Iterator[Sidecar]:
    with Sidecar(postgres18) as running:
        yield running


OPTIONS = [{}, {"_pq_.some": "on"}, {"_pq_.a": "", "_pq_.b": "x"}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("minor", [0, 1, 2, 3, 4, 9999, 0xFFFF])
def test_version_is_negotiated_as_by_postgresql(postgres18, sidecar, minor, options):
    """9999 is what libpq asks for to see whether negotiation works ("grease", 54.1.4)."""
    told = []
    for address, database in [
        ((postgres18.host, postgres18.port), postgres18.database),
        (sidecar.address, "main"),
    ]:
        with Client(address) as client:
            parameters = {"user": postgres18.user, "database": database, **options}
            client.send(startup(parameters, 3 << 16 | minor))
            messages = client.until_ready()
            assert client.value("select 1") == "1"
        negotiated = [message for message in messages if message.kind == "v"]
        order = kinds(messages).replace("S", "")
        told.append((negotiated, order, len(client.secret)))
    assert told[0] == told[1]


@pytest.mark.parametrize("version", ["3.0", "3.2", "latest"])
def test_libpq_gets_the_version_it_wants(sidecar, version):
    with psycopg.connect(sidecar.dsn(max_protocol_version=version)) as connection:
        assert connection.execute("select 1").fetchone() == (1,)
        assert connection.pgconn.full_protocol_version == (30000 if version == "3.0" else 30002)


def test_cancel_keys_are_long_and_never_the_same(sidecar):
    secrets = set()
    for minor in (0, 2) * 20:
        with sidecar.connect() as client:
            client.send(startup({"user": "app", "database": "main"}, 3 << 16 | minor))
            client.until_ready()
            secrets.add(client.secret)
    assert sorted(map(len, secrets)) == [4] * 20 + [32] * 20
    for size in (4, 32):
        # no byte of them is a constant
        columns = zip(*(secret for secret in secrets if len(secret) == size), strict=True)
        assert all(len(set(column)) > 1 for column in columns)
