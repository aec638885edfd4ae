"""Work in another thread keeps its order, its bounds and its errors."""

import threading
from itertools import count, islice

import pytest

from mistudio.store.background import Ahead, Behind


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_items_made_ahead_come_in_order_and_end(depth):
    with Ahead(range(50), depth) as items:
        assert list(items) == list(range(50))
        assert next(items, None) is None


def test_no_more_items_are_made_ahead_than_asked():
    made, third = [], threading.Event()

    def source():
        for number in count():
            made.append(number)
            if number == 2:
                third.set()
            yield number

    with Ahead(source(), 3) as items:
        assert third.wait(10)
        assert len(made) == 3
        assert list(islice(items, 4)) == [0, 1, 2, 3]
    assert len(made) <= 7


def test_an_error_of_the_source_comes_in_its_place_and_again():
    def source():
        yield 1
        raise ValueError("torn page")

    with Ahead(source(), 5) as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(ValueError, match="torn page"):
                next(items)


def test_calls_are_made_in_order_and_all_before_the_block_is_left():
    done = []
    with Behind(2) as behind:
        for number in range(20):
            behind(lambda number=number: done.append(number))
    assert done == list(range(20))


def given(calls, then=None) -> None:
    """Makes the calls behind, and raises `then` inside the block."""
    with Behind(1) as behind:
        for call in calls:
            behind(call)
        if then is not None:
            raise then


def test_calls_that_wait_are_made_also_when_an_error_leaves_the_block():
    done = []
    with pytest.raises(KeyError):
        given([lambda: done.append(1)], then=KeyError())
    assert done == [1]


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_failed_call_stops_the_others_and_is_raised(after):
    done = []

    def fail():
        raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        given([fail] + [lambda: done.append(1)] * after)
    assert done == []


def test_an_error_that_leaves_the_block_says_what_failed_in_the_thread_too():
    def fail():
        raise ValueError("no room")

    with pytest.raises(KeyError) as caught:
        given([fail], then=KeyError())
    assert caught.value.__notes__ == ["Meanwhile, in a thread: ValueError: no room"]


def test_threads_end_with_their_blocks():
    before = set(threading.enumerate())
    with Ahead(count(), 2) as items, Behind(2) as behind:
        behind(lambda: None)
        next(items)
    assert set(threading.enumerate()) <= before
