"""What a client without a lease needs, and what is ignored of a cycle that was refused."""

from hypothesis import given
from hypothesis import strategies as st

from sidecar.proxy.unleased import GOODBYE, IGNORED_SYNC, NEED, NOTHING, Unleased
from tests.wire import COPY_DONE, FLUSH, SYNC, TERMINATE, copy_data, query, run

EXTENDED = run("SELECT 1")
SIMPLE = query("SELECT 1")


def found(unleased: Unleased, data: bytes, pos: int = 0) -> tuple[int, int]:
    pos = unleased.find(data, pos)
    return unleased.found, pos


def test_first_message_that_needs_a_server_is_found():
    """What a failed copy has left needs none."""
    rest = FLUSH + copy_data(b"x" * 100) + COPY_DONE
    assert found(Unleased(), rest) == (NOTHING, len(rest))
    for needy in (SIMPLE, EXTENDED, SYNC):
        assert found(Unleased(), rest + needy) == (NEED, len(rest))
    assert found(Unleased(), rest + TERMINATE) == (GOODBYE, len(rest))


def test_who_still_writes_needs_no_server_yet():
    assert found(Unleased(), SIMPLE[:-1]) == (NOTHING, 0)
    long = query("SELECT 1 -- " + "x" * 100_000)
    assert found(Unleased(), long[:10_000]) == (NOTHING, 0)
    assert found(Unleased(), long[:50_000]) == (NEED, 0)


def test_refused_query_is_ignored_up_to_its_end():
    unleased = Unleased()
    assert unleased.ignore_cycle(SIMPLE, 0)
    assert found(unleased, SIMPLE + SIMPLE) == (NEED, len(SIMPLE))


@given(st.data())
def test_refused_cycle_is_ignored_up_to_sync_in_any_pieces(data: st.DataObject):
    """The queries behind it are not: they are the next cycle."""
    stream = EXTENDED + SIMPLE
    unleased = Unleased()
    assert not unleased.ignore_cycle(stream, 0)
    rest, sent, ends = b"", 0, 0
    while sent < len(stream):
        size = data.draw(st.integers(1, len(stream) - sent))
        rest += stream[sent : sent + size]
        sent += size
        what, pos = found(unleased, rest)
        while what == IGNORED_SYNC:
            ends += 1
            what, pos = found(unleased, rest, pos)
        rest = rest[pos:]
    assert ends == 1
    assert (unleased.found, rest) == (NEED, SIMPLE)
