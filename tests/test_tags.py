"""How many rows a command tag tells."""

import pytest

from sidecar.proxy.tags import COMMON, rows_of


@pytest.mark.parametrize(
    ("tag", "rows"),
    [
        (b"SELECT 1\0", 1),
        (b"SELECT 4711\0", 4711),
        (b"INSERT 0 5\0", 5),
        (b"INSERT 16384 1\0", 1),
        (b"UPDATE 0\0", 0),
        (b"COPY 3\0", 3),
        (b"BEGIN\0", 0),
        (b"CREATE TABLE\0", 0),
        (b"SELECT \0", 0),
        (b"\0", 0),
    ],
)
def test_rows_of_a_tag(tag, rows):
    assert rows_of(tag) == rows


def test_what_is_known_by_heart_is_what_would_be_read():
    assert {tag: rows_of(tag) for tag in COMMON} == COMMON
    assert {len(tag.split()) for tag in COMMON} == {2, 3}
