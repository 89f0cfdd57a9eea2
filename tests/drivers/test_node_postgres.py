"""node-postgres (``pg``), with its pool, pg-cursor and pg-copy-streams: ``node/pg.mjs``."""

from tests.drivers.places import NODE, Place, node_version, same_report

DRIVER = "node-postgres"
VERSION = node_version("pg")
TRIED = (
    "named statements, pool, transactions, savepoints, pg-cursor, pg-copy-streams, LISTEN/NOTIFY, notices, "
    "cancel, settings, reconnect"
)


def test_same_as_direct(place: Place) -> None:
    same_report(place, "node", NODE / "pg.mjs")
