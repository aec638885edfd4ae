"""Work in one other thread, in order and with a bound on what waits: `Ahead` makes items early, `Behind` works late.

A thread is enough: tokenisers, file writes, hashes and torch's kernels all let go of the interpreter. Both are blocks:
leaving one waits for its thread, so that nothing of it runs on after an error or Ctrl-C. `begun` is a single call,
which changes nothing and so may be left to itself.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """The items of `source` in their order, up to `depth` of them made before they are asked for.

    What `source` raises is raised in its place, after the items before it. Leaving the block, or `close`, stops the
    thread at the item it is making.
    """

    def __init__(self, source: Iterable[T], depth: int):
        assert depth >= 1, depth
        self._items: deque[T] = deque()
        self._made, self._free = threading.Semaphore(0), threading.Semaphore(depth)
        self._failure: BaseException | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._work, args=(iter(source),), name="ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        self._made.acquire()
        if self._items:
            item = self._items.popleft()
            self._free.release()
            return item
        self._made.release()  # the source has ended: the next call must find that out too
        if self._failure is not None:
            raise self._failure
        raise StopIteration

    def stop(self, wait_s: float = 0.0) -> None:
        """The thread ends with the item it is making, if any, which is waited for `wait_s` at most."""
        self._stop = True
        self._free.release()
        if threading.current_thread() is not self._thread:  # a garbage collection may run in any thread
            self._thread.join(wait_s)

    def close(self) -> None:
        """The thread has ended; items that nobody asked for are dropped."""
        self.stop()
        self._thread.join()
        self._items.clear()

    def __enter__(self) -> "Ahead[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self, source: Iterator[T]) -> None:
        try:
            while self._free.acquire() and not self._stop:
                self._items.append(next(source))
                self._made.release()
        except StopIteration:
            pass
        except BaseException as failure:  # handed to the thread that asks
            self._failure = failure
        self._made.release()


class Behind:
    """Calls that another thread makes one after the other, at most `depth` of them waiting: `behind(work)`.

    What a call raises is raised by the next `behind(...)`, or when the block is left; calls after it are not made.
    Leaving the block makes all calls that wait, also when an error leaves it, which then says what a call raised, too.
    """

    def __init__(self, depth: int):
        assert depth >= 1, depth
        self._calls: deque[Callable[[], None]] = deque()
        self._given, self._free = threading.Semaphore(0), threading.Semaphore(depth)
        self._failure: BaseException | None = None
        self._open, self._done = 0, 0  # each counted by one thread alone
        self._thread = threading.Thread(target=self._work, name="behind", daemon=True)
        self._thread.start()

    def __call__(self, work: Callable[[], None]) -> None:
        self._free.acquire()
        if self._failure is not None:
            raise self._failure
        self._calls.append(work)
        self._open += 1
        self._given.release()

    @property
    def idle(self) -> bool:
        """Whether all calls so far were made; asked by the thread that gives them."""
        return self._open == self._done and self._failure is None

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self._given.release()
        self._thread.join()
        if self._failure is None or self._failure is error:
            return
        if error is None:
            raise self._failure
        error.add_note(f"Meanwhile, in a thread: {type(self._failure).__name__}: {self._failure}")

    def _work(self) -> None:
        while self._given.acquire() and self._calls:
            work = self._calls.popleft()
            try:
                if self._failure is None:
                    work()
            except BaseException as failure:  # handed to the thread that gives work
                self._failure = failure
            del work  # what it holds is freed before the next is waited for
            self._done += 1
            self._free.release()


def begun(work: Callable[[], T]) -> Future[T]:
    """What `work` returns or raises, which a thread of its own finds out; it does not keep the process from ending."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as failure:  # raised where the result is asked for
            result.set_exception(failure)

    threading.Thread(target=run, name="begun", daemon=True).start()
    return result
