"""The next batches, made ready in a second thread while the device is busy with this one."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Iterates over `make(0), make(1), ...`, one item in advance, as a context manager.

    On a CPU the thread computes on one core, the other cores are the caller's. An error in `make` is raised
    where its item is taken.
    """

    def __init__(self, make: Callable[[int], Item], numbers: range) -> None:
        self._make, self._numbers = make, numbers
        self._pool = ThreadPoolExecutor(1, "batches", initializer=_on_one_core)

    def __enter__(self) -> Iterator[Item]:
        return self._items()

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _items(self) -> Iterator[Item]:
        following: Future[Item] | None = None
        for number in self._numbers:
            current = following or self._pool.submit(self._make, number)
            following = self._pool.submit(self._make, number + 1) if number + 1 in self._numbers else None
            yield current.result()


def _on_one_core() -> None:
    """For threads of torch that begin from here on; those of other threads stay as many as they are."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
