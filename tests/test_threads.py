"""The threads of the sparse step: what they share, and what they leave to others."""

import os
import signal
import threading

import pytest
import torch

from mistudio.train import threads as threads_of_steps
from mistudio.train.threads import UNIT, column_sums, in_ranges, in_rows, leading, number, on_threads, shared


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_threads_that_work_have_torch_for_themselves_alone_and_others_have_all_of_it():
    torch.set_num_threads(2)
    try:
        inside, later = {}, []
        on_threads(lambda i: inside.update({i: torch.get_num_threads()}))
        another = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        another.start()
        another.join()
        assert (inside, torch.get_num_threads(), later) == ({0: 1, 1: 1}, 2, [2])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("n", [0, 1, 128, 129, 5000])
def test_ranges_make_up_the_whole_and_begin_at_units(n):
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            ranges = in_ranges(lambda lo, hi: (lo, hi), n)
        finally:
            torch.set_num_threads(1)
        assert [i for lo, hi in ranges for i in range(lo, hi)] == list(range(n))
        assert all(lo % UNIT == 0 for lo, _ in ranges)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_works_on_threads_of_its_own(monkeypatch):
    """It has none of its parent's, and waiting for those would never end."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    ranges = in_ranges(lambda lo, hi: (lo, hi), 10_000)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(in_ranges(lambda lo, hi: (lo, hi), 10_000) != ranges)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_leading_thread_has_torch_for_itself_alone_and_shares_work_among_all(two_threads):
    def work(a, *, b):
        inside = {}
        on_threads(lambda i: inside.update({i: torch.get_num_threads()}))
        return a + b, torch.get_num_threads(), number(), inside, threading.current_thread().name

    *found, name = leading(work, 1, b=2)
    assert found == [3, 1, 2, {0: 1, 1: 1}]
    assert name.startswith("mistudio leader")
    assert torch.get_num_threads() == number() == 2


def test_who_leads_already_goes_on_leading(two_threads):
    def work():
        return leading(threading.current_thread), threading.current_thread()

    inner, outer = leading(work)
    assert inner is outer is not threading.current_thread()


def test_one_thread_leads_itself():
    assert leading(threading.current_thread) is threading.current_thread()


@pytest.mark.parametrize("threads", [1, 2])
def test_who_leads_takes_no_gradients(threads):
    torch.set_num_threads(threads)
    try:
        assert leading(torch.is_grad_enabled) is False
        assert torch.is_grad_enabled()
    finally:
        torch.set_num_threads(1)


def test_what_is_raised_while_leading_is_raised_here(two_threads):
    def fail():
        raise ValueError("found")

    with pytest.raises(ValueError, match="found"):
        leading(fail)
    assert leading(number) == 2


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_after_ctrl_c_nothing_of_it_runs_on(two_threads):
    ended, main = [], threading.get_ident()

    def work():
        signal.pthread_kill(main, signal.SIGINT)
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)  # the other thread has heard of it by now
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        leading(work)
    assert ended


@pytest.mark.parametrize("fails", [0, 1])
def test_all_threads_have_ended_when_one_of_them_failed(two_threads, fails):
    ended = []

    def work(i):
        if i == fails:
            raise ValueError(f"in {i}")
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)
        ended.append(i)

    with pytest.raises(ValueError, match=f"in {fails}"):
        on_threads(work)
    assert ended == [1 - fails]


@pytest.mark.parametrize("shape", [(1, 1), (300, 700), (1000, 129), (5, 4000)])
def test_large_sums_and_rows_are_shared_without_a_trace(monkeypatch, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = [x.sum(0), x.square().sum(1)]
    monkeypatch.setattr(threads_of_steps, "LARGE", 1)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            sums, squares = column_sums(x), in_rows(lambda lo, hi: x[lo:hi].square().sum(1), x)
        finally:
            torch.set_num_threads(1)
        assert torch.equal(sums, expected[0])
        assert torch.equal(torch.cat(squares), expected[1])


@pytest.mark.parametrize("n", [1, 2, 50])
def test_items_are_shared_in_order(two_threads, n):
    assert shared(lambda item: item * item, list(range(n))) == [i * i for i in range(n)]
