"""COPY that goes wrong, is given up or is large: what is said about it is in ``test_wire``, what it
must not leave behind is here."""

import threading

import pytest

from tests.sidecar_process import PATIENCE
from tests.wire import (
    COPY_DONE,
    FLUSH,
    SYNC,
    TERMINATE,
    Client,
    Sidecar,
    bind,
    copy_data,
    copy_fail,
    error,
    execute,
    kinds,
    parse,
    query,
)

COPY_IN = "copy copied from stdin"
SIMPLE = query(COPY_IN)
EXTENDED = parse(COPY_IN) + bind() + execute() + FLUSH
ROW = copy_data(b"1\tx\n")


@pytest.fixture(params=["transaction", "session"])
def sidecar(postgres, request):
    """One connection, which must be fit for the next client."""
    postgres.psql("drop table if exists copied; create table copied (a int, b text)")
    with Sidecar(postgres, max_size=1, mode=request.param) as running:
        yield running


def check_nothing_copied(sidecar: Sidecar) -> None:
    sidecar.until_whole()
    with sidecar.login() as client:
        assert client.value("select count(*) from copied") == "0"
        client.send(SIMPLE)
        client.until("G")
        assert kinds(client.ask(ROW, COPY_DONE)) == "CZ"
        assert client.rows("select * from copied") == [["1", "x"]]


PARTS = {
    "nothing": b"",
    "a row": ROW,
    "three bytes of a row": ROW + ROW[:3],
    "half of a long row": ROW + copy_data(b"x" * 100_000)[:70_000],
}


@pytest.mark.parametrize("begin", [SIMPLE, EXTENDED], ids=["simple", "extended"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("leave", ["close", "abort"])
def test_client_that_goes_amid_a_copy_has_copied_nothing(sidecar, begin, part, leave):
    with sidecar.login() as client:
        client.send(begin)
        client.until("G")
        client.send(PARTS[part])
        if leave == "abort":
            client.abort()
    check_nothing_copied(sidecar)


@pytest.mark.parametrize("begin", [SIMPLE, EXTENDED], ids=["simple", "extended"])
def test_terminate_amid_a_copy_copies_nothing(sidecar, begin):
    with sidecar.login() as client:
        client.send(begin)
        client.until("G")
        client.send(ROW, TERMINATE)
        client.until_closed()
    check_nothing_copied(sidecar)


@pytest.mark.parametrize("leave", ["close", "abort"])
def test_client_that_goes_amid_what_it_copies_out_harms_nobody(sidecar, leave):
    with sidecar.login() as client:
        client.send(
            query("copy (select repeat('x', 1000) from generate_series(1, 50000)) to stdout")
        )
        client.until("d")
        if leave == "abort":
            client.abort()
    check_nothing_copied(sidecar)


@pytest.mark.parametrize("size", [256, 1024, 4096, 5000])
@pytest.mark.parametrize("begin", [SIMPLE, EXTENDED], ids=["simple", "extended"])
def test_copy_that_fails_early_is_taken_to_its_end(sidecar, begin, size):
    """The server says no at the first row, while the client goes on and the way is full of data.

    When the lease ended with that answer, nobody told the client that the way was free again.
    """
    bad = copy_data(b"x" * (size - 6) + b"\n")
    end = COPY_DONE + (SYNC if begin is EXTENDED else b"")
    with sidecar.login() as client:
        for _ in range(8):
            client.send(begin)
            client.until("G")
            feeder = threading.Thread(target=client.send, args=(bad * (8_000_000 // size), end))
            feeder.start()
            answer = client.until_ready()
            feeder.join(PATIENCE)
            assert not feeder.is_alive()
            assert error(answer)["C"] == "22P02"
            assert client.value("select 1") == "1"
    check_nothing_copied(sidecar)


def test_connection_serves_the_next_client_right_after_a_failed_copy(postgres):
    """What is left of the copy goes to the server that ignores it, not to nobody."""
    postgres.psql("drop table if exists copied; create table copied (a int, b text)")
    with Sidecar(postgres, max_size=1) as sidecar, sidecar.login() as a, sidecar.login() as b:
        for _ in range(20):
            a.send(SIMPLE)
            a.until("G")
            b.send(query("select 'b'"))
            a.send(copy_data(b"x\n") * 1000, COPY_DONE)
            assert error(a.until_ready())["C"] == "22P02"
            assert kinds(b.until_ready()) == "TDCZ"
            assert a.value("select 'a'") == "a"
        sidecar.until_whole(clients=2)


def test_endless_copies_leave_others_their_turn(postgres):
    """One in and one out, as fast as they go, until the third client has had its turns."""
    postgres.psql("drop table if exists copied; create table copied (a int, b text)")
    rows = copy_data(b"1\t" + b"x" * 1000 + b"\n") * 100
    with Sidecar(postgres, max_size=3) as sidecar:
        served = threading.Event()
        ended: list[str] = []

        def copy_in() -> None:
            with sidecar.login() as client:
                client.send(SIMPLE)
                client.until("G")
                while not served.is_set():
                    client.send(rows)
                ended.append(kinds(client.ask(COPY_DONE)))

        def copy_out() -> None:
            with sidecar.login() as client:
                text = "select generate_series(1, 1000000000), repeat('x', 1000)"
                client.send(query(f"copy ({text}) to stdout"))
                while not served.is_set():
                    client.until("d")
                client.cancel()
                ended.append(kinds(client.until_ready())[-2:])

        threads = [threading.Thread(target=work, daemon=True) for work in (copy_in, copy_out)]
        with sidecar.login() as client:
            for thread in threads:
                thread.start()
            for _ in range(50):
                assert client.value("select 'still here'") == "still here"
            served.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(ended) == ["CZ", "EZ"]
        sidecar.until_whole()


@pytest.mark.parametrize(
    ("ending", "sqlstate"), [(copy_fail("changed my mind"), "57014"), (copy_data(b"x\n"), "22P02")]
)
def test_failed_copy_fails_its_transaction(sidecar, ending, sqlstate):
    with sidecar.login() as client:
        client.rows("begin; insert into copied values (1)")
        client.send(SIMPLE)
        client.until("G")
        answer = client.ask(ROW, ending, b"" if sqlstate == "57014" else COPY_DONE)
        assert error(answer)["C"] == sqlstate
        assert answer[-1].body == b"E"
        assert error(client.ask(query("select 1")))["C"] == "25P02"
        client.rows("rollback")
    check_nothing_copied(sidecar)


def test_copy_messages_of_one_client_never_reach_the_copy_of_another(postgres):
    """``a`` sends rows without a copy; ``b`` copies on the one connection there is."""
    postgres.psql("drop table if exists copied; create table copied (a int, b text)")
    with Sidecar(postgres, max_size=1) as sidecar:
        stray: Client = sidecar.login()
        with sidecar.login() as client:
            client.send(SIMPLE)
            client.until("G")
            stray.send(copy_data(b"666\tstray\n") * 10, COPY_DONE, query("select 1"))
            client.send(ROW * 3)
            assert kinds(client.ask(COPY_DONE)) == "CZ"
            assert kinds(stray.until_ready()) == "TDCZ"
            assert client.value("select count(*) from copied where a = 666") == "0"
        stray.socket.close()
        sidecar.until_whole()
