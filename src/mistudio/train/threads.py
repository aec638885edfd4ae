"""The threads that a sparse step runs on.

After each of torch's operations the threads of OpenMP wait busily for some milliseconds, and take the processor from
the ones that go on with the step: on two cores two threads were slower than one. So a thread in which torch uses no
others leads the step, and shares loops and large operations with several of its kind.
"""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

UNIT = 128
"""Features whose part of a sum over features is taken together. Fixed, so that the sum does not depend on threads."""
LARGE = 1 << 21
"""Numbers that are worth sharing: one thread is done with fewer in about the time that it takes to ask others."""


class _Team(NamedTuple):
    leader: ThreadPoolExecutor
    helpers: ThreadPoolExecutor


class _Here(threading.local):
    leads = 0
    """How many threads there are, where this thread leads them."""


_here = _Here()


def number() -> int:
    """Threads that work is shared among: as many as torch uses where the step was begun."""
    return _here.leads or torch.get_num_threads()


def leading(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """work(*args, **kwargs), without gradients, in the thread that leads; here where there is one thread only, or this
    is it. It has ended when this returns or raises."""
    if number() == 1 or _here.leads:
        return torch.no_grad()(work)(*args, **kwargs)
    doing = _team(number()).leader.submit(work, *args, **kwargs)
    try:
        return doing.result()
    finally:
        wait([doing])  # also after Ctrl-C


def on_threads(work: Callable[[int], None]) -> None:
    """work(0), work(1), …: at once on `number()` threads, each of which has torch for itself alone. All have ended when
    this returns or raises."""
    if not _here.leads:
        return leading(on_threads, work) if number() > 1 else work(0)
    helpers = [_team(number()).helpers.submit(work, i) for i in range(1, number())]
    try:
        work(0)
    finally:
        failures = [helper.exception() for helper in helpers]
    for failure in failures:
        if failure is not None:
            raise failure


def shared(work: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """work(item) of each, in order; by `number()` threads, which take the next item when they are done with one."""
    if number() == 1 or len(items) == 1:
        return [work(item) for item in items]
    left, found = deque(range(len(items))), dict[int, T]()

    def some(_: int) -> None:
        while left:
            try:
                i = left.popleft()
            except IndexError:  # another thread took the last one
                return
            found[i] = work(items[i])

    on_threads(some)
    return [found[i] for i in range(len(items))]


def in_ranges(kernel: Callable[[int, int], T], n: int) -> list[T]:
    """kernel(lo, hi) of ranges that make up [0, n), in order, `shared`. They begin at multiples of UNIT, and there are
    several for each thread."""
    threads = number()
    length = n if threads == 1 else UNIT * -(-n // (16 * threads * UNIT))
    return shared(lambda lo: kernel(lo, min(lo + length, n)), range(0, n, length) if n else [0])


def in_rows(work: Callable[[int, int], T], x: Tensor) -> list[T]:
    """`in_ranges` over the rows of x; all of them at once where they are few, or not in the CPU's memory."""
    pays = x.device.type == "cpu" and x.numel() >= LARGE
    return in_ranges(work, len(x)) if pays else [work(0, len(x))]


def column_sums(x: Tensor) -> Tensor:
    """x.sum(0) of a matrix, to the bit."""
    if x.device.type != "cpu" or x.numel() < LARGE:
        return x.sum(0)
    return torch.cat(in_ranges(lambda lo, hi: x[:, lo:hi].sum(0), x.shape[1]))


def _team(threads: int) -> _Team:
    return _team_of(os.getpid(), threads)  # a forked process has none of its parent's threads


@functools.cache
def _team_of(process: int, threads: int) -> _Team:
    everyone = threading.Barrier(threads)

    def begin(leads: int) -> None:
        torch.get_num_threads()  # the first time, this takes over the process's number
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        _here.leads = leads
        everyone.wait()

    team = _Team(ThreadPoolExecutor(1, "mistudio leader"), ThreadPoolExecutor(threads - 1, "mistudio helper"))
    begun = [team.leader.submit(begin, threads)] + [team.helpers.submit(begin, 0) for _ in range(threads - 1)]
    for one in begun:
        one.result()
    torch.set_num_threads(threads)  # for threads to come: they take over the last number that was set
    return team
