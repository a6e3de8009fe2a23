"""The next batches, made ready in a second thread while the GPU is busy with this one."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Iterates over `make(0), make(1), ...` as a context manager, if `active` one item in advance.

    On a CPU it gains nothing: the second thread takes from the first what it does for it (measured on two
    cores, a tenth slower). An error in `make` is raised where its item is taken.
    """

    def __init__(self, make: Callable[[int], Item], numbers: range, *, active: bool) -> None:
        self._make, self._numbers = make, numbers
        self._pool = ThreadPoolExecutor(1, "batches") if active else None

    def __enter__(self) -> Iterator[Item]:
        return map(self._make, self._numbers) if self._pool is None else self._in_advance(self._pool)

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _in_advance(self, pool: ThreadPoolExecutor) -> Iterator[Item]:
        following: Future[Item] | None = None
        for number in self._numbers:
            current = following or pool.submit(self._make, number)
            following = pool.submit(self._make, number + 1) if number + 1 in self._numbers else None
            yield current.result()
