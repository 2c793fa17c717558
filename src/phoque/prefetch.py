"""A sequence made in a thread of its own, some items ahead of their use."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Gives the items of an iterator in their order, and raises what it raises where it did.

    Tokenising and packing hold Python's lock for a few milliseconds a row, and a training step leaves it for most of
    its time: a thread is enough, and needs no copy of the data. `waited` are the seconds that no item was ready.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items, self._made = items, queue.Queue[tuple[str, Any]](depth)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._make, daemon=True, name="phoque-data")
        self.waited = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while True:
            begun = time.monotonic()
            kind, found = self._made.get()
            self.waited += time.monotonic() - begun
            if kind == "error":
                raise found
            if kind == "end":
                return
            yield found

    def _make(self) -> None:
        try:
            for item in self._items:
                self._put(("item", item))
                if self._ending.is_set():
                    return
            self._put(("end", None))
        except BaseException as error:
            self._put(("error", error))

    def _put(self, made: tuple[str, Any]) -> None:
        while not self._ending.is_set():
            try:
                return self._made.put(made, timeout=0.1)
            except queue.Full:
                continue
