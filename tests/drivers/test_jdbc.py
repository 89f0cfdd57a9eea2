"""The JDBC driver of Debian's libpostgresql-jdbc-java: ``jdbc/Checks.java``."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.drivers.places import Place, same_report

JAR = Path("/usr/share/java/postgresql.jar")


def _version() -> str:
    with zipfile.ZipFile(JAR) as jar:
        lines = jar.read("META-INF/MANIFEST.MF").decode().splitlines()
    (version,) = (
        v for k, _, v in (line.partition(": ") for line in lines) if k == "Implementation-Version"
    )
    return version


DRIVER = "JDBC (pgjdbc)"
VERSION = _version()
TRIED = (
    "prepared statements, batches (also rewritten), fetch size, transactions, savepoints, autosave, COPY, "
    "large objects, LISTEN/NOTIFY, metadata, query timeout, cancel, settings, reconnect"
)


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program."""
    folder = tmp_path_factory.mktemp("classes")
    source = Path(__file__).parent / "jdbc" / "Checks.java"
    done = subprocess.run(
        ["javac", "-encoding", "UTF-8", "-cp", JAR, "-d", folder, source],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_same_as_direct(place: Place, classes: Path) -> None:
    options = (
        "-XX:TieredStopAtLevel=1",
        "-XX:+UseSerialGC",
        "-Xshare:auto",
        "-Dfile.encoding=UTF-8",
    )
    same_report(place, "java", *options, "-cp", f"{classes}:{JAR}", "Checks")
