"""One writer's thread for all: in order, with shared commits, and each with its own error."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokenworks.gateway.ledger import Books


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    found = Books(tmp_path / "books.sqlite")
    found.wait(lambda c: c.execute("CREATE TABLE t (n INTEGER PRIMARY KEY)"))
    yield found
    found.close()


def put(number: int) -> Callable[[sqlite3.Connection], object]:
    return lambda connection: connection.execute("INSERT INTO t VALUES (?)", (number,))


def numbers(connection: sqlite3.Connection) -> list[int]:
    return [n for (n,) in connection.execute("SELECT n FROM t ORDER BY n")]


def test_works_are_done_in_order_and_can_be_read(books: Books) -> None:
    async def run() -> list[int]:
        for number in range(3000):
            books.write(put(number))
        assert await books.ask(numbers) == list(range(3000))
        return books.read(numbers)

    assert asyncio.run(run()) == list(range(3000))
    assert not books.trouble


def test_a_work_that_fails_undoes_itself_only(books: Books) -> None:
    def half(connection: sqlite3.Connection) -> None:
        put(2)(connection)
        raise ValueError("no")

    async def run() -> None:
        asked = [books.ask(work) for work in (put(1), half, put(3), put(3), put(4))]
        found = await asyncio.gather(*asked, return_exceptions=True)
        kinds = [type(one) for one in found if isinstance(one, Exception)]
        assert kinds == [ValueError, sqlite3.IntegrityError]

    asyncio.run(run())
    assert books.read(numbers) == [1, 3, 4]


def test_trouble_is_told_until_it_is_over(books: Books) -> None:
    books.write(lambda connection: connection.execute("nonsense"))
    with pytest.raises(sqlite3.OperationalError):
        books.wait(lambda connection: connection.execute("nonsense"))
    assert "syntax error" in books.trouble
    books.wait(numbers)
    assert not books.trouble


def test_who_has_gone_is_not_served(books: Books) -> None:
    async def run() -> None:
        books.write(lambda _: time.sleep(0.2))
        asked = asyncio.create_task(books.ask(put(1)))
        await asyncio.sleep(0)
        asked.cancel()
        await books.ask(put(2))

    asyncio.run(run())
    assert books.read(numbers) == [2]


def test_the_reader_does_not_write(books: Books) -> None:
    with pytest.raises(sqlite3.OperationalError):
        books.read(put(1))


def test_the_end_does_what_is_queued(tmp_path: Path, books: Books) -> None:
    heard: list[object] = []
    books.repeat(3600, numbers, lambda found, _: heard.append(found))
    books.wait(numbers)
    for number in range(100):
        books.write(put(number))
    books.close()
    assert heard[-1] == list(range(100))
    with sqlite3.connect(tmp_path / "books.sqlite") as connection:
        assert numbers(connection) == list(range(100))
