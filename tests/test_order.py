"""Orders: pure, uniform, and reachable at any place without what comes before."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistudio.errors import ConfigError
from mistudio.store import order

seeds = st.integers(0, 2**64 - 1)
BUCKETS = [7, 3, 9, 8, 3, 9, 2, 0, 3, 9, 1, 2]
ORDER = [4, 0, 7, 6, 5, 3, 1, 2]
ROWS = [2, 1, 4, 5, 3, 7, 6, 0]


@given(seed=seeds, cuts=st.lists(st.integers(0, 500), max_size=8), buckets=st.integers(1, 20))
def test_the_bucket_of_a_row_does_not_depend_on_how_rows_are_portioned(seed, cuts, buckets):
    whole = order.buckets_of_rows(seed, 0, 500, buckets)
    edges = [0, *sorted(cuts), 500]
    parts = [order.buckets_of_rows(seed, a, b - a, buckets) for a, b in pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert whole.min() >= 0
    assert whole.max() < buckets


def test_buckets_are_drawn_uniformly_and_independently():
    draws = order.buckets_of_rows(3, 0, 60_000, 6)
    counts = np.bincount(draws, minlength=6)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 20.5  # chi-squared, 5 degrees of freedom, p = 0.001
    pairs = np.bincount(draws[:-1:2] * 6 + draws[1::2], minlength=36)
    assert ((pairs - 30_000 / 36) ** 2 / (30_000 / 36)).sum() < 66.6  # 35 degrees of freedom, p = 0.001


def test_every_permutation_of_four_rows_over_two_buckets_comes_equally_often():
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(4_800):
        bucket = order.buckets_of_rows(seed, 0, 4, 2)
        members = [np.flatnonzero(bucket == k) for k in range(2)]
        visited = order.bucket_order(seed, 0, 2)
        rows = [members[k][order.row_order(seed, 0, int(k), len(members[k]))] for k in visited]
        key = tuple(np.concatenate(rows).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 49.7  # 23 degrees of freedom, p = 0.001


@given(seed=seeds, epoch=st.integers(0, 2**40), bucket=st.integers(0, 10**6), size=st.integers(0, 300))
def test_a_row_order_is_a_permutation_and_is_repeatable(seed, epoch, bucket, size):
    first = order.row_order(seed, epoch, bucket, size)
    assert sorted(first.tolist()) == list(range(size))
    assert np.array_equal(first, order.row_order(seed, epoch, bucket, size))


def test_seed_epoch_and_bucket_each_change_the_order():
    orders = [order.row_order(*place, 50).tolist() for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({tuple(o) for o in orders}) == 4


@given(seed=seeds, epoch=st.integers(0, 9), sizes=st.lists(st.integers(0, 6), min_size=1, max_size=8))
@settings(max_examples=80)
def test_locate_walks_through_each_bucket_in_turn(seed, epoch, sizes):
    array = np.array(sizes, dtype=np.int64)
    walked = [order.locate(array, seed, epoch, offset) for offset in range(sum(sizes))]
    visited = order.bucket_order(seed, epoch, len(sizes))
    assert walked == [(int(bucket), done) for bucket in visited for done in range(sizes[bucket])]


def test_the_orders_of_this_version_stay_the_orders_of_later_ones():
    assert order.buckets_of_rows(7, 5, 12, 10).tolist() == BUCKETS
    assert order.bucket_order(7, 1, 8).tolist() == ORDER
    assert order.row_order(7, 1, 3, 8).tolist() == ROWS


def test_bucket_count_rounds_up():
    assert [order.bucket_count(rows, 10) for rows in (1, 10, 11, 100)] == [1, 1, 2, 10]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_does_not_fit_is_refused(seed):
    with pytest.raises(ConfigError, match="2\\^64"):
        order.row_order(seed, 0, 0, 5)
