"""Django's ORM over psycopg 3 and psycopg2: persistent connections, iterators, as its settings are."""

import datetime
import threading
from collections.abc import Callable, Iterator
from typing import Any

import django
import pytest
from django.conf import settings

from tests.drivers.places import SIZE, Address, Place, same

DRIVER = "Django"
VERSION = django.get_version()
TRIED = (
    "the ORM: schema editor, transactions, savepoints, select_for_update, bulk_create, iterators with "
    "server-side cursors, JSON and array fields, aggregation, introspection, errors, persistent connections"
)

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.dummy"}},
    USE_TZ=True,
    TIME_ZONE="Europe/Zurich",  # not the server's: Django sets it on each connection
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()

from django.contrib.postgres.fields import ArrayField  # noqa: E402  # needs the settings
from django.db import IntegrityError, connections, models, transaction  # noqa: E402


class Author(models.Model):
    name = models.CharField(max_length=50, unique=True)
    born = models.DateTimeField()
    extra = models.JSONField(null=True)
    tags = ArrayField(models.CharField(max_length=20), default=list)

    class Meta:
        app_label = "drivers"


class Book(models.Model):
    title = models.CharField(max_length=100)
    price = models.DecimalField(max_digits=8, decimal_places=2, default="1.50")
    author = models.ForeignKey(Author, on_delete=models.CASCADE, related_name="books")

    class Meta:
        app_label = "drivers"


BORN = datetime.datetime(2024, 2, 29, 23, 59, 59, 999999, datetime.UTC)


@pytest.fixture
def use() -> Iterator[Callable[[Address], str]]:
    """Makes a database of Django's of an address, and returns its alias."""
    made: list[str] = []

    def configure(at: Address) -> str:
        alias = f"at {at.port}"
        connections.databases[alias] = database = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": at.database,
            "USER": at.user,
            "PASSWORD": at.password,
            "HOST": at.host,
            "PORT": str(at.port),
            "CONN_MAX_AGE": None,
            "CONN_HEALTH_CHECKS": True,
        }
        for key, value in connections.databases["default"].items():
            database.setdefault(key, value)
        made.append(alias)
        return alias

    yield configure
    for alias in made:
        connections[alias].close()
        del connections[alias]
        del connections.databases[alias]


def work(alias: str) -> list[object]:
    seen: list[object] = []
    connection = connections[alias]
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS drivers_book, drivers_author")
    with connection.schema_editor() as editor:
        editor.create_model(Author)
        editor.create_model(Book)
    authors, books = Author.objects.using(alias), Book.objects.using(alias)
    for n in range(5):
        author = authors.create(name=f"ü {n}", born=BORN, extra={"n": [n, None]}, tags=["a", "b,c"])
        books.bulk_create([Book(title=f"{n} {k}", author=author) for k in range(50)])
    with pytest.raises(IntegrityError), transaction.atomic(using=alias):
        authors.create(name="ü 0", born=BORN)
    with transaction.atomic(using=alias):
        author = authors.select_for_update().get(name="ü 1")
        with pytest.raises(IntegrityError), transaction.atomic(using=alias):
            authors.create(name="ü 0", born=BORN)
        author.name = "renamed"
        author.save(using=alias)
        transaction.on_commit(lambda: seen.append("committed"), using=alias)
    with pytest.raises(ZeroDivisionError), transaction.atomic(using=alias):
        books.all().delete()
        raise ZeroDivisionError
    seen += authors.order_by("id").values_list("id", "name", "born", "extra", "tags")
    seen += authors.filter(extra__n__0=3, tags__contains=["a"]).values_list("name")
    seen.append(
        books.filter(author__name="renamed").aggregate(models.Count("id"), models.Sum("price"))
    )
    # in autocommit mode: a cursor WITH HOLD
    seen += [book.title for book in books.order_by("id").iterator(chunk_size=20)]
    with transaction.atomic(using=alias):
        seen += [book.title for book in books.order_by("-id").iterator(chunk_size=20)]
    seen += [
        a.name for a in authors.prefetch_related("books").order_by("id") if len(a.books.all()) == 50
    ]
    seen.append(books.filter(title__startswith="4").update(price="9.99"))
    seen.append(books.filter(title__startswith="3").delete()[0])
    with connection.cursor() as cursor:
        seen += [
            column.name
            for column in connection.introspection.get_table_description(cursor, "drivers_author")
        ]
        cursor.execute("SHOW timezone")
        seen.append(cursor.fetchone())
        cursor.callproc("upper", ["ü"])
        seen.append(cursor.fetchone())
    return seen


def test_same_as_direct(place: Place, use: Callable[[Address], str]) -> None:
    found = same(place, lambda at: work(use(at)))
    assert "committed" in found


def test_more_threads_than_connections(place: Place, use: Callable[[Address], str]) -> None:
    """Each thread has a connection and keeps it open, as a worker of a web server does."""
    alias = use(place.through)
    barrier = threading.Barrier(2 * SIZE)
    found: list[Any] = []

    def serve(number: int) -> None:
        try:
            for n in range(5):
                with connections[alias].cursor() as cursor:
                    cursor.execute("SELECT %s + %s", [number, n])
                    found.append(cursor.fetchone() == (number + n,))
                barrier.wait(20)  # all are connected and idle
        finally:
            connections[alias].close()

    threads = [threading.Thread(target=serve, args=[n]) for n in range(2 * SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 10 * SIZE
