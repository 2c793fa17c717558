"""Prefetching: a thread computes the next items of an iterator while the caller uses the current one."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Yields the items of an iterator in order, computed in a thread at most `depth` items ahead of their use.

    An exception of the iterator is raised where its item would have come. `waited` is the time in seconds for which the
    caller waited because no item was ready. A thread is enough, and needs no copy of the data: reading files,
    tokenizing and packing hold Python's lock for a few milliseconds per item, and a GPU step leaves it free mostly.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items, self._ready = items, queue.Queue[tuple[str, Any]](depth)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._produce, daemon=True, name="phoque-prefetch")
        self.waited = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while True:
            start = time.monotonic()
            kind, item = self._ready.get()
            self.waited += time.monotonic() - start
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item

    def _produce(self) -> None:
        try:
            for item in self._items:
                self._put(("item", item))
                if self._ending.is_set():
                    break
            else:
                self._put(("end", None))
        except BaseException as error:  # raised again in the caller's thread
            self._put(("error", error))
        finally:
            if close := getattr(self._items, "close", None):  # a generator may hold open files
                close()

    def _put(self, entry: tuple[str, Any]) -> None:
        while not self._ending.is_set():
            try:
                return self._ready.put(entry, timeout=0.1)
            except queue.Full:
                continue
