"""postgres.js, whose queries are all prepared statements: ``node/postgres.mjs``."""

from tests.drivers.places import NODE, Place, node_version, same_report

DRIVER = "postgres.js"
VERSION = node_version("postgres")
TRIED = (
    "prepared statements, pipelining, its pool, transactions, savepoints, cursors, COPY, LISTEN/NOTIFY, "
    "cancel, settings, reconnect"
)


def test_same_as_direct(place: Place) -> None:
    same_report(place, "node", NODE / "postgres.mjs")
