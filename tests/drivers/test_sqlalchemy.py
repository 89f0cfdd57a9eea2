"""SQLAlchemy's ORM and core over four drivers, with the pools and options it has by itself."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from tests.drivers.places import SIZE, Address, Place, same

DRIVER = "SQLAlchemy"
VERSION = sa.__version__
TRIED = (
    "ORM and core over psycopg, psycopg2, pg8000 and asyncpg: its pools with pre-ping, transactions, savepoints, "
    "bulk inserts, upserts, streamed results, reflection, errors"
)

each_driver = pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000"])


class Base(orm.DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(sa.String(50), unique=True)
    extra: orm.Mapped[dict[str, Any] | None] = orm.mapped_column(postgresql.JSONB)
    tags: orm.Mapped[list[str] | None] = orm.mapped_column(postgresql.ARRAY(sa.Text))
    books: orm.Mapped[list["Book"]] = orm.relationship(back_populates="author", order_by="Book.id")


class Book(Base):
    __tablename__ = "book"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    title: orm.Mapped[str]
    author_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("author.id"))
    author: orm.Mapped[Author] = orm.relationship(back_populates="books")


def work(engine: sa.Engine) -> list[object]:
    """What an application does in its first minute."""
    seen: list[object] = []
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with orm.Session(engine) as session, session.begin():
        for n in range(5):
            books = [Book(title=f"ü {n} {k}") for k in range(3)]
            session.add(
                Author(
                    name=f"author {n}", extra={"n": n, "ü": None}, tags=["a", "b,c"], books=books
                )
            )
    with orm.Session(engine) as session:
        loaded = session.scalars(
            sa.select(Author).options(orm.selectinload(Author.books)).order_by(Author.id)
        )
        seen += [(a.id, a.name, a.extra, a.tags, [b.title for b in a.books]) for a in loaded]
        with pytest.raises(sa.exc.IntegrityError), session.begin_nested():
            session.add(Author(name="author 1"))
        session.add(Author(name="after the savepoint"))
        session.commit()
        session.execute(sa.update(Book).where(Book.id < 4).values(title=sa.func.upper(Book.title)))
        session.rollback()
        session.bulk_insert_mappings(
            Book.__mapper__, [{"title": f"bulk {n}", "author_id": 1} for n in range(700)]
        )
        session.commit()
        added = session.execute(
            sa.insert(Book).returning(Book.id, sort_by_parameter_order=True),
            [{"title": "r", "author_id": 2}] * 5,
        )
        seen.append([tuple(row) for row in added])
        session.commit()
    with engine.connect() as conn:
        upsert = insert(Author).values(id=1, name="author 1, again")
        upsert = upsert.on_conflict_do_update(
            index_elements=[Author.id], set_={"name": upsert.excluded.name}
        )
        seen.append(conn.execute(upsert.returning(Author.name)).scalar_one())
        conn.commit()
        streamed = conn.execution_options(stream_results=True, max_row_buffer=50)
        seen.append(
            [
                tuple(row)
                for row in streamed.execute(sa.select(Book.id, Book.title).order_by(Book.id))
            ]
        )
        conn.rollback()
        conn.execution_options(isolation_level="SERIALIZABLE")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        seen.append(
            conn.execute(
                sa.text("SELECT count(*) FROM book WHERE title LIKE :t"), {"t": "bulk%"}
            ).scalar()
        )
        with pytest.raises(sa.exc.ProgrammingError):
            conn.execute(sa.text("SELECT * FROM nowhere"))
    inspector = sa.inspect(engine)
    seen.append([str(column["type"]) for column in inspector.get_columns("author")])
    seen.append(
        [
            (key["constrained_columns"], key["referred_table"])
            for key in inspector.get_foreign_keys("book")
        ]
    )
    seen.append(inspector.get_unique_constraints("author"))
    return seen


@each_driver
def test_same_as_direct(place: Place, driver: str) -> None:
    def check(at: Address) -> object:
        engine = sa.create_engine(at.url_of(f"postgresql+{driver}"), pool_pre_ping=True)
        try:
            return work(engine)
        finally:
            engine.dispose()

    same(place, check)


def test_same_as_direct_with_asyncpg(place: Place) -> None:
    """The same, from asyncio; then sessions at the same time, more than there are connections."""

    async def run(at: Address) -> object:
        engine = create_async_engine(
            at.url_of("postgresql+asyncpg"), pool_size=2 * SIZE, pool_pre_ping=True
        )

        async def one(n: int) -> int:
            found = 0
            for turn in range(5):
                async with AsyncSession(engine) as session, session.begin():
                    query = sa.select(sa.func.count(Book.id)).where(Book.author_id == n % 5 + 1)
                    found += (await session.scalar(query)) or 0
                    found += (await session.scalar(sa.select(sa.literal(n) + turn))) or 0
            return found

        try:
            async with engine.connect() as conn:
                seen = await conn.run_sync(lambda inner: _work_in(inner))
            return seen, await asyncio.gather(*(one(n) for n in range(2 * SIZE)))
        finally:
            await engine.dispose()

    def check(at: Address) -> object:
        return asyncio.run(run(at))

    same(place, check)


def _work_in(conn: sa.Connection) -> list[object]:
    """On one connection, as ``run_sync`` gives it."""
    Base.metadata.drop_all(conn)
    Base.metadata.create_all(conn)
    conn.commit()
    with orm.Session(conn) as session:
        session.add(
            Author(
                name="ü",
                extra={"a": [1]},
                tags=["x"],
                books=[Book(title=f"{n}") for n in range(300)],
            )
        )
        session.commit()
        loaded = session.scalars(sa.select(Author).options(orm.selectinload(Author.books)))
        seen: list[object] = [
            (a.id, a.name, a.extra, a.tags, [b.title for b in a.books]) for a in loaded
        ]
        with pytest.raises(sa.exc.IntegrityError), session.begin_nested():
            session.add(Author(name="ü"))
        session.commit()
    streamed = conn.execution_options(stream_results=True).execute(
        sa.select(Book.title).order_by(Book.id)
    )
    seen.append([tuple(row) for row in streamed])
    conn.rollback()
    return seen


def _pids(engine: sa.Engine) -> Callable[[], int]:
    def pid() -> int:
        with engine.begin() as conn:
            return int(conn.execute(sa.text("SELECT pg_backend_pid() + :n"), {"n": 0}).scalar_one())

    return pid


@each_driver
def test_transactions_run_wherever_there_is_a_connection(place: Place, driver: str) -> None:
    engine = sa.create_engine(place.through.url_of(f"postgresql+{driver}"), pool_size=1)
    pid = _pids(engine)
    pids: list[int] = []
    pids.extend(pid() for _ in place.turns(pids))
    engine.dispose()
