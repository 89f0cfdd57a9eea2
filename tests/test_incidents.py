"""The flight recorder, and incidents: bounded in number, rate and size; one for each cause; safe on disk."""

import json
import logging
import os
import re
import stat
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.demo.postgres import EmbeddedPostgres
from sidecar.events import CloseReason, ErrorOrigin, IncidentKind, PoolGauges
from sidecar.observe.capture import LARGEST, iso, written
from sidecar.observe.flight import SECONDS, TICKS, Flight
from sidecar.observe.incident_files import IncidentFiles
from sidecar.observe.incidents import APART, MOST, WITHIN, Incident, IncidentStore, file_name
from sidecar.observe.recorder import PoolRecorder, Recorder
from sidecar.observe.verdict import Kind, Verdict
from sidecar.work import Blocker, Failure, Holder, SlowQuery, Statement, Who
from tests.sidecar_process import MakeService, come_true

TICK = 0.1
YEAR_2027 = 1_800_000_000.0
INVOICE = Statement("00000000000000cc", "UPDATE invoices SET paid = $1", 2)
KIND = IncidentKind.EXHAUSTED


class Life:
    """A pool of 4, tick by tick."""

    def __init__(self, keep: int = 50) -> None:
        self.now = 1000.0
        self.store = IncidentStore(keep, lambda: self.now, None, lambda: YEAR_2027 + self.now)
        self.recorder = Recorder([("main", 5.0)], lambda: self.now, self.store)
        self.holders: list[Holder] = []
        self.waiting: list[float] = []  # since when
        self.is_up = True

    @property
    def pool(self) -> PoolRecorder:
        return self.recorder.pool("main")

    def leave_open(self, count: int, application: str = "billing-worker") -> None:
        self.holders = [
            Holder(
                "main", n, 4000 + n, Who(n, application, "app", "shop", f"10.0.0.7:{n}"), INVOICE,
                "idle in transaction", self.now, self.now, self.now, "",
            )
            for n in range(1, count + 1)
        ]  # fmt: skip

    def wait(self, count: int) -> None:
        self.waiting = [self.now] * count

    def gauges(self) -> PoolGauges:
        waited = [self.now - since for since in self.waiting]
        return PoolGauges(
            "main", len(self.holders), 0, 0, 4, len(waited), max(waited, default=0.0), sum(waited),
            self.is_up, lambda: list(self.holders), why_down="" if self.is_up else "refused",
        )  # fmt: skip

    def live(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK)):
            self.now += TICK
            self.recorder.tick(self.now)
            self.recorder.watch(self.now, [self.gauges()])


@pytest.fixture
def life() -> Life:
    made = Life()
    made.live(5)
    return made


# -- what begins one, and what ends it -------------------------------------------------------------


def test_pool_that_is_full_is_an_incident_once_someone_has_waited(life: Life):
    life.leave_open(4)
    life.live(20)
    assert life.store.all() == []  # full, and nobody waits
    life.wait(3)
    life.live(0.9)
    assert life.store.all() == []
    life.live(3)
    (incident,) = life.store.all()
    assert (incident.kind, incident.pool, incident.ended_at) == (KIND, "main", None)
    assert incident.verdict.kind is Kind.LEAK
    assert life.pool.why.incidents[KIND] == 1
    life.live(30)
    assert len(life.store) == 1  # while it lasts


def test_verdict_of_what_lasts_is_told_until_it_is_over(life: Life):
    """That of an incident that is not recorded, since there was one of late, too."""

    def told() -> list[Kind]:
        return [kind for kind, is_told in life.pool.why.verdicts().items() if is_told]

    assert told() == [Kind.HEALTHY]
    for _ in range(2):
        life.leave_open(4)
        life.wait(3)
        life.live(6)
        assert told() == [Kind.LEAK]
        life.waiting, life.holders = [], []
        life.live(6)
        assert told() == [Kind.HEALTHY]
    assert (len(life.store), life.store.suppressed[KIND]) == (1, 1)


def test_incident_is_over_some_time_after_its_cause(life: Life):
    life.leave_open(4)
    life.wait(3)
    life.live(10)
    life.waiting, life.holders = [], []
    life.live(2)
    assert life.store.all()[0].ended_at is None  # it may flicker
    life.live(2)
    (incident,) = life.store.all()
    assert incident.ended_at is not None
    assert incident.ended_at - incident.began_at == pytest.approx(10, abs=0.3)
    assert life.pool.verdict(life.now).kind is Kind.HEALTHY


def test_verdict_does_not_waver_while_waits_are_about_as_long_as_matters(life: Life):
    """8 of 10 last a bit less than 0.1 s."""
    told = set()
    for second in range(30):
        for tick in range(10):
            life.leave_open(4)
            life.waiting = [life.now - (0.02 if tick or second % 4 else 0.11)]
            life.live(0.1)
            told.add(life.pool.verdict(life.now).kind)
        if second == 4:
            told.clear()
    assert told == {Kind.POOL_TOO_SMALL}


def test_connections_just_lost_are_counted_at_once(life: Life):
    """Else what clients wait for would be the pool's size until the second is over."""
    life.live(0.2)
    life.leave_open(4)
    life.wait(3)
    life.live(2)
    life.pool.connection_closed(CloseReason.SERVER_CLOSED)
    life.is_up, life.holders = False, []
    life.live(0.1)
    assert life.pool.verdict(life.now).kind is Kind.DATABASE_DOWN


def test_short_one_is_judged_by_what_it_was(life: Life):
    """It is over before the patience is."""
    life.leave_open(4)
    life.wait(3)
    life.live(1.3)
    life.waiting, life.holders = [], []
    life.live(6)
    (incident,) = life.store.all()
    assert incident.verdict.kind is Kind.LEAK
    assert incident.ended_at is not None


def test_one_cause_is_one_incident(life: Life):
    """The leak that exhausts the pool becomes one by its age, too."""
    life.leave_open(4)
    life.wait(3)
    life.live(6)
    for holder in life.holders:
        life.pool.leak_began(holder)
    life.live(6)
    (incident,) = life.store.all()
    assert (incident.kind, incident.also) == (KIND, (IncidentKind.LEAK,))
    life.waiting = []
    life.live(6)
    assert life.store.all()[0].ended_at is None  # the leak goes on
    for holder in life.holders:
        life.pool.leak_ended(holder)
    life.live(6)
    assert life.store.all()[0].ended_at is not None


def test_incident_is_of_the_kind_that_was_seen_first(life: Life):
    """However long each waits for its evidence: a query becomes slow while the pool is full already."""
    root = Who(99, "stock-taking", "app", "shop", "10.0.0.7:99")
    held = Holder(
        "main", 4, 4004, root, INVOICE, "idle in transaction", life.now, life.now, life.now, ""
    )
    blocker = Blocker(4004, (), "idle in transaction", "", "stock-taking", "app", True, held)
    life.leave_open(4)
    victims = [replace(each, state="running") for each in life.holders[:3]]
    life.holders = [*victims, held]
    life.wait(3)
    life.live(2)  # noticed after 1 s, told after 3
    life.pool.blocked.update((each.server, blocker) for each in victims)
    life.pool.slow_query_seen(SlowQuery(victims[0], 2.0, None, "Lock:transactionid", (blocker,)))
    life.live(0.7)
    (incident,) = life.store.all()
    assert (incident.kind, incident.also) == (KIND, (IncidentKind.SLOW_QUERY,))
    assert incident.verdict.kind is Kind.LOCK_CHAIN


def test_leak_without_anyone_waiting(life: Life):
    life.leave_open(1)
    life.live(3)
    life.pool.leak_began(life.holders[0])
    life.live(3)
    (incident,) = life.store.all()
    assert (incident.kind, incident.verdict.kind) == (IncidentKind.LEAK, Kind.LEAK)


def test_slow_query_with_what_it_waits_for(life: Life):
    life.leave_open(1, "stock-taking")
    root = Blocker(
        4001, (), "idle in transaction", "", "stock-taking", "app", True, life.holders[0]
    )
    slow = replace(life.holders[0], server=2, state="running", who=Who(9, "web", "app", "x", "y:1"))
    life.holders.append(slow)
    life.live(6)
    life.pool.slow_query_seen(SlowQuery(slow, 6.0, None, "Lock:transactionid", (root,)))
    life.live(3)
    (incident,) = life.store.all()
    assert (incident.kind, incident.verdict.kind) == (IncidentKind.SLOW_QUERY, Kind.LOCK_CHAIN)
    assert incident.verdict.application == "stock-taking"
    slow_queries = json.loads(written(incident.to_json()))["slow_queries"]
    assert slow_queries[0]["blockers"][0]["application"] == "stock-taking"
    life.holders.remove(slow)
    life.live(5)
    assert life.store.all()[0].ended_at is not None


def test_database_that_is_gone(life: Life):
    life.is_up = False
    life.live(3)
    (incident,) = life.store.all()
    assert (incident.kind, incident.verdict.kind) == (
        IncidentKind.DATABASE_DOWN,
        Kind.DATABASE_DOWN,
    )
    assert "refused" in incident.verdict.headline


def test_start_is_no_incident():
    """The first connection takes a moment."""
    life = Life()
    life.is_up = False
    life.live(0.8)
    life.is_up = True
    life.live(5)
    assert life.store.all() == []


def test_errors_that_come_in_crowds(life: Life):
    for _ in range(60):
        for _ in range(3):
            life.pool.query_failed(
                Failure(str(ErrorOrigin.SERVER), "23505", "duplicate key", "importer", INVOICE)
            )
        life.live(TICK)
    (incident,) = life.store.all()
    assert (incident.kind, incident.verdict.application) == (IncidentKind.ERROR_BURST, "importer")
    life.live(15)
    assert life.store.all()[0].ended_at is not None


# -- bounds ----------------------------------------------------------------------------------------


def verdict(pool: str = "main") -> Verdict:
    return Verdict(Kind.LEAK, pool, "It leaks.")


class Shelf:
    """A store with a clock of its own."""

    def __init__(self, keep: int = 50, directory: str | None = None) -> None:
        self.now = 1000.0
        self.store = IncidentStore(keep, lambda: self.now, directory, lambda: YEAR_2027 + self.now)

    def begin(self, kind: IncidentKind = KIND, pool: str = "main") -> Incident | None:
        return self.store.begin(kind, self.now, verdict(pool), {})


def test_one_of_a_kind_and_pool_within_30_s():
    shelf = Shelf()
    assert shelf.begin()
    shelf.now += APART - 1
    assert shelf.begin() is None
    assert shelf.begin(pool="direct")
    assert shelf.begin(IncidentKind.LEAK)
    other = replace(verdict("main"), kind=Kind.LOCK_CHAIN)
    assert shelf.store.begin(KIND, shelf.now, other, {})  # pool full once more, for another reason
    shelf.now += 1
    assert shelf.begin()
    assert shelf.store.suppressed[KIND] == 1


def test_clock_that_is_set_meanwhile_changes_no_duration():
    date = [YEAR_2027]
    store = IncidentStore(9, lambda: 1000.0, None, lambda: date[0])
    for jump in (-3600.0, 3600.0):
        begun = store.begin(KIND, 1000.0, verdict(f"main{jump}"), {})
        assert begun is not None
        date[0] += jump
        store.end(begun, 1012.5)
        assert store.all()[0].summary()["duration_seconds"] == 12.5


def test_ten_within_ten_minutes():
    shelf = Shelf()
    for _ in range(MOST):
        assert shelf.begin()
        shelf.now += APART
    assert shelf.begin() is None
    shelf.now = 1000.0 + WITHIN
    assert shelf.begin()
    assert shelf.begin(IncidentKind.LEAK) is None
    assert shelf.store.suppressed[IncidentKind.LEAK] == 1


def test_oldest_make_room():
    shelf = Shelf(keep=3)
    made = []
    for _ in range(5):
        made.append(shelf.begin())
        shelf.now += 1000
    assert [each.id for each in shelf.store.all()] == [each.id for each in made[:1:-1] if each]
    assert made[0] is not None
    assert shelf.store.get(made[0].id) is None
    shelf.store.end(made[0], shelf.now)  # it ends later than it is kept
    assert len(shelf.store) == 3


def test_two_of_the_same_instant_have_ids_of_their_own():
    shelf = Shelf()
    one, two = shelf.begin(pool="a b"), shelf.begin(pool="a/b")
    assert one is not None
    assert two is not None
    assert one.id != two.id
    assert re.fullmatch(r"[\w.-]+", two.id)


NASTY = "\x01" * 63  # six bytes each in JSON


def crowd(count: int) -> list[Holder]:
    return [
        Holder(
            "main", n, n, Who(n, NASTY, NASTY, NASTY, NASTY), Statement(f"{n:016x}", "\x01" * 9000, 0),
            "running", 1.0, 1.0, 1.0, "set",
        )
        for n in range(count)
    ]  # fmt: skip


def test_incident_is_bounded_whatever_was_going_on():
    """A thousand connections, each with another endless statement of another application."""
    life = Life()
    life.holders = crowd(1000)
    life.wait(5)
    blockers = tuple(
        Blocker(n, (1,), NASTY, NASTY, NASTY, NASTY, True, life.holders[n]) for n in range(99)
    )
    for holder in life.holders:
        life.pool.leak_began(holder)
        life.pool.slow_query_seen(SlowQuery(holder, 6.0, None, NASTY, blockers))
        life.pool.query_failed(
            Failure("server", "23505", "\x01" * 9000, str(holder.server), holder.statement)
        )
        life.pool.client_came(holder.who)
    life.live(8)
    (incident, *_) = life.store.all()
    text = written(incident.to_json())
    assert 1000 < len(text) <= LARGEST
    told = json.loads(text)
    assert told["left_out"]
    assert told["verdict"]["headline"]
    assert told["holders_total"] == 1000


def test_ring_is_bounded():
    """Full of seconds with the most that one can have."""
    holders = crowd(20)
    quiet = Life().gauges()
    gauges = replace(quiet, used=20, pending=1, holders=lambda: holders)
    tracemalloc.start()
    try:
        flight = Flight(0.0, {})
        for tick in range(TICKS + SECONDS):
            second = tick - TICKS  # of the last ones, each has the most there can be
            now = tick * TICK if second < 0 else TICKS * TICK + second
            if flight.watch(now, gauges if second >= 0 else quiet):
                flight.turn(now, tick, tick)
            for n in range(9 if second >= 0 else 0):
                flight.came(Who(tick, f"{NASTY[9:]}{tick}.{n}", "u", "d", "h:1"))
                flight.failed(Failure("server", "23505", f"m{tick}.{n}", f"a{tick}.{n}", INVOICE))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(flight.seconds) == SECONDS
    assert sum(1 for _ in flight.ticks(0.0)) == TICKS
    assert used < 1.5 * 2**20


def test_ring_gives_back_what_was():
    flight = Flight(0.0, {})
    life = Life()
    for tick in range(TICKS + 500):
        gauges = replace(life.gauges(), used=tick % 7, pending=tick % 3, is_up=tick % 2 == 0)
        flight.watch(tick * TICK, gauges)
    ticks = list(flight.ticks(0.0))
    newest, oldest = ticks[0], ticks[-1]
    assert (newest.used, newest.pending, newest.is_up) == (3499 % 7, 3499 % 3, False)
    assert (oldest.used, oldest.pending, oldest.is_up) == (500 % 7, 500 % 3, True)
    assert newest.at - oldest.at == pytest.approx((TICKS - 1) * TICK)


# -- files -----------------------------------------------------------------------------------------


def incident(number: int, headline: str = "It leaks.") -> Incident:
    at = YEAR_2027 + number
    id = f"{re.sub('[-:]', '', iso(at))}-main-leak"
    made = Verdict(Kind.LEAK, "main", headline)
    return Incident(id, IncidentKind.LEAK, "main", at, None, made)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_are_for_their_owner_only(tmp_path: Path):
    files = IncidentFiles(str(tmp_path / "var" / "incidents"), 5)
    one = incident(1)
    files.save([one])
    path = tmp_path / "var" / "incidents" / file_name(one)
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    told = json.loads(path.read_text())
    assert told["id"] == one.id
    assert told["began_at"] == "2027-01-15T08:00:01.000Z"
    assert told["ended_at"] is None
    assert path.name == "20270115T080001.000Z-main-leak.json"


def test_later_state_replaces_the_file(tmp_path: Path):
    files = IncidentFiles(str(tmp_path), 5)
    files.save([incident(1)])
    files.save([replace(incident(1), ended_at=1_800_000_009.0)])
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["duration_seconds"] == 8.0


def test_only_our_oldest_files_are_removed(tmp_path: Path):
    """Whatever else is there stays, however similar."""
    strange = ["notes.txt", "20270115T080001.000Z-main-leak.txt", "x-main-leak.json", ".json"]
    for name in strange:
        (tmp_path / name).write_text("mine")
    (tmp_path / "20270115T080001.000Z-main-other.json").write_text("mine")
    files = IncidentFiles(str(tmp_path), 3)
    for number in range(6):
        files.save([incident(number)])
    left = sorted(path.name for path in tmp_path.glob("*-main-leak.json") if path.name[0] == "2")
    assert left == [file_name(incident(number)) for number in (3, 4, 5)]
    assert all((tmp_path / name).read_text() == "mine" for name in strange)
    assert (tmp_path / "20270115T080001.000Z-main-other.json").exists()


def test_what_a_dead_process_left_is_removed(tmp_path: Path):
    old = tmp_path / (file_name(incident(1)) + ".part")
    new = tmp_path / (file_name(incident(2)) + ".part")
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    IncidentFiles(str(tmp_path), 3).save([])
    assert not old.exists()
    assert new.exists()  # another one may be writing it


def test_link_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Whoever else can write there cannot have us write elsewhere."""
    target = tmp_path / "target"
    target.write_text("mine")
    folder = tmp_path / "incidents"
    folder.mkdir()
    (folder / (file_name(incident(1)) + ".part")).symlink_to(target)
    IncidentFiles(str(folder), 3).save([incident(1)])
    assert target.read_text() == "mine"


@pytest.mark.parametrize("make", [
    lambda path: path.write_text(""),  # a file where the directory should be
    lambda path: path.symlink_to("/proc"),  # where nobody can create a file
    lambda path: path.symlink_to("/dev/full"),
])  # fmt: skip
def test_disk_that_takes_nothing_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], object]
):
    path = tmp_path / "incidents"
    make(path)
    files = IncidentFiles(str(path), 3)
    with caplog.at_level(logging.INFO, "pgsidecar.incidents"):
        files.save([incident(1)])
        files.save([incident(2)])
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "memory only" in caplog.text
        path.unlink()
        files.save([incident(3)])
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert (path / file_name(incident(3))).exists()


async def test_sidecar_writes_and_logs_them(
    make_service: MakeService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that is not there from the beginning; the file says so when the sidecar has stopped."""
    folder = tmp_path / "incidents"
    with caplog.at_level(logging.INFO, "pgsidecar.incidents"):
        sidecar = await make_service(
            "postgresql://app:s3cr3t-Zebra@127.0.0.1:1/shop", incidents={"directory": str(folder)}
        )
        path = await come_true(
            lambda: next(iter(folder.glob("*-database_down.json")), None), "a file"
        )
        assert json.loads(path.read_text())["ended_at"] is None
        (record,) = (each for each in caplog.records if each.getMessage() == "incident")
        assert record.levelname == "WARNING"
        assert record.__dict__["file"] == path.name
        assert "cannot reach PostgreSQL at 127.0.0.1:1" in record.__dict__["headline"]
        counted = await sidecar.value(
            "pgsidecar_incidents_total", pool="main", kind="database_down"
        )
        assert counted == 1
        await sidecar.stop()
    told = json.loads(path.read_text())
    assert told["ended_at"] is not None
    assert told["config"]["max_size"] == 25
    assert "s3cr3t-Zebra" not in path.read_text() + caplog.text
    ours = [each.getMessage() for each in caplog.records if each.name == "pgsidecar.incidents"]
    assert ours == ["incident", "incident over"]


async def test_directory_that_cannot_be_written_is_told_at_the_start(
    postgres: EmbeddedPostgres,
    make_service: MakeService,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not in the night of the first incident."""
    (tmp_path / "incidents").write_text("")
    with caplog.at_level(logging.INFO, "pgsidecar.incidents"):
        await make_service(postgres.dsn(), incidents={"directory": str(tmp_path / "incidents")})
        await come_true(lambda: "incidents are not written" in caplog.text, "a warning")
