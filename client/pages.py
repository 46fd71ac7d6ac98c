"""The rows of a list of the API, which arrive page by page."""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import pandas

T = TypeVar("T")


class Pages(Iterator[T]):
    """The rows of a list. Iterate over them, or take them page by page, as a list, or as a pandas frame.

    A page is requested when its first row is needed. Each row is given once: after ten rows, `to_list` has the others.
    """

    def __init__(self, pages: Iterator[list[T]]) -> None:
        self._pages = pages
        self._page: Iterator[T] = iter(())

    def __next__(self) -> T:
        while True:
            for row in self._page:
                return row
            self._page = iter(next(self._pages))

    def pages(self) -> Iterator[list[T]]:
        """Iterate over the pages, each a list of rows. One request for each."""
        rest = list(self._page)
        if rest:
            yield rest
        yield from self._pages

    def to_list(self) -> list[T]:
        """Return the rows as a list."""
        return list(self)

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the rows as a frame; nested values have a column each, such as ``progress.loss``.

        Times are UTC timestamps. Units are those of the API: bytes, seconds.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(self.to_list())


class AsyncPages(AsyncIterator[T], Generic[T]):
    """The rows of a list, as `Pages`: ``async for row in rows``, ``await rows.to_list()``."""

    def __init__(self, pages: AsyncIterator[list[T]]) -> None:
        self._pages = pages
        self._page: Iterator[T] = iter(())

    async def __anext__(self) -> T:
        while True:
            for row in self._page:
                return row
            self._page = iter(await anext(self._pages))

    async def pages(self) -> AsyncIterator[list[T]]:
        """Iterate over the pages, each a list of rows. One request for each."""
        rest = list(self._page)
        if rest:
            yield rest
        async for page in self._pages:
            yield page

    async def to_list(self) -> list[T]:
        """Return the rows as a list."""
        return [row async for row in self]

    async def to_pandas(self) -> "pandas.DataFrame":
        """Return the rows as a frame, as `Pages.to_pandas`.

        Raises:
            ImportError: pandas is not installed.
        """
        return frame(await self.to_list())


def frame(rows: Sequence[Any]) -> "pandas.DataFrame":
    """Return rows as a frame. Raises ImportError if pandas is not installed."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("a frame needs pandas: pip install pandas") from error
    table = pandas.json_normalize([dict(row) for row in rows])
    times = [name for name in table.columns if name == "at" or name.endswith("_at")]
    for name in times:
        table[name] = pandas.to_datetime(table[name], utc=True, format="ISO8601")
    return table
