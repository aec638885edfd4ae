"""Feeds: no row twice, none missed over ranks and sites; batches made ahead change nothing; the shuffle is uniform."""

import gc
import json
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistudio.errors import StoreError
from mistudio.store import FeedOptions, Position, Store
from mistudio.store.order import bucket_order, buckets_of_rows, row_order
from mistudio.store.shard import Shard
from test_store import A, B, make


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make(tmp_path_factory.mktemp("feed") / "s", rows=100, bucket_rows=30)


def taken(feed, batches: int) -> torch.Tensor:
    return torch.cat([next(feed) for _ in range(batches)])


@given(
    batch_rows=st.integers(1, 60),
    world=st.integers(1, 5),
    steps=st.integers(1, 8),
    seed=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_ranks_together_get_the_batches_of_one_trainer(store, batch_rows, world, steps, seed, offset):
    start = Position(1, offset)
    single = store.feed(A, world * batch_rows, seed=seed, start=start)
    feeds = [
        store.feed(A, batch_rows, seed=seed, start=start, how=FeedOptions(prefetch=rank % 3, rank=rank, world=world))
        for rank in range(world)
    ]
    for _ in range(steps):
        assert torch.equal(torch.cat([next(feed) for feed in feeds]), next(single))
        assert {feed.position for feed in feeds} == {single.position}


def test_a_run_can_go_on_with_another_number_of_ranks(store):
    single = store.feed(A, 12, seed=3)
    taken(single, 2)
    pair = [store.feed(A, 6, seed=3, how=FeedOptions(rank=rank, world=2)) for rank in range(2)]
    for feed in pair:
        taken(feed, 2)
    triple = [store.feed(A, 4, seed=3, how=FeedOptions(rank=rank, world=3)) for rank in range(3)]
    for feed in triple:
        feed.restore(json.loads(json.dumps(pair[0].state())))
    assert torch.equal(torch.cat([next(feed) for feed in triple]), next(single))


@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_batches_made_ahead_are_those_made_when_asked(store, prefetch):
    ahead = store.feed(A, 17, seed=5, how=FeedOptions(prefetch=prefetch))
    plain = store.feed(A, 17, seed=5, how=FeedOptions(prefetch=0))
    for _ in range(20):
        assert ahead.state() == plain.state()
        assert torch.equal(next(ahead), next(plain))
    state = ahead.state()
    taken(ahead, 3)
    ahead.restore(state)
    assert torch.equal(next(ahead), next(plain))


def test_sites_in_step_are_rows_of_the_same_tokens(store):
    joint = store.joint_feed([A, B], 33, seed=4)
    a, b = store.feed(A, 33, seed=4), store.feed(B, 33, seed=4)
    for _ in range(7):
        x, y = next(joint)
        assert torch.equal(x, next(a))
        assert torch.equal(y, next(b))
    other = store.joint_feed([A, B], 33, seed=4)
    other.restore(json.loads(json.dumps(joint.state())))
    assert torch.equal(next(other)[1], next(joint)[1])
    with pytest.raises(StoreError, match="sites"):
        other.restore(store.joint_feed([B, A], 33, seed=4).state())
    with pytest.raises(StoreError, match="at least one site"):
        store.joint_feed([], 33, seed=4)


def test_an_error_while_a_batch_is_made_ahead_is_raised_where_it_is_asked_for(tmp_path):
    store = make(tmp_path / "s", rows=60, bucket_rows=20)
    last = int(bucket_order(1, 0, 3)[-1])
    path = store.path / A / f"{last:05d}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    feed = store.feed(A, 5, seed=1)
    next(feed)
    with pytest.raises(StoreError, match=f"{last:05d}.safetensors: checksum"):
        taken(feed, 12)


def test_the_threads_of_a_feed_end_with_it(store):
    before = set(threading.enumerate())
    feed = store.feed(A, 5, seed=1)
    next(feed)
    threads = set(threading.enumerate()) - before
    assert "ahead" in {thread.name for thread in threads}
    del feed
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 2, "world": 2}, "rank = 2 of world = 2"), ({"rank": -1}, "rank"), ({"prefetch": -1}, "prefetch")],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(StoreError, match=message):
        FeedOptions(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_pinned_memory_without_a_gpu_is_refused():
    with pytest.raises(StoreError, match="needs a CUDA GPU"):
        FeedOptions(pinned=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches_are_pinned(store):
    assert next(store.feed(A, 5, seed=1, how=FeedOptions(pinned=True))).is_pinned()


# ---- checks ahead


def test_every_shard_is_read_for_its_checksum_once_and_not_again_in_later_epochs(tmp_path, monkeypatch):
    store = make(tmp_path / "s", rows=100, bucket_rows=30)
    hashed, original = [], Shard.hash
    monkeypatch.setattr(Shard, "hash", lambda shard, *how: hashed.append(shard.path) or original(shard, *how))
    taken(store.feed(A, 10, seed=1), 35)
    assert sorted(hashed) == sorted((store.path / A).glob("*.safetensors"))


def test_a_damaged_bucket_that_was_checked_ahead_is_named_when_it_is_reached_and_can_be_mended(tmp_path):
    store = make(tmp_path / "s", rows=100, bucket_rows=30)
    second = int(bucket_order(1, 0, 4)[1])
    path = store.path / A / f"{second:05d}.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    feed = store.feed(A, 1, seed=1, how=FeedOptions(prefetch=0))
    first = int(bucket_order(1, 0, 4)[0])
    taken(feed, store.manifest.bucket_sizes[first])
    with pytest.raises(StoreError, match=path.name):
        next(feed)
    path.write_bytes(sound)
    assert len(taken(store.feed(A, 10, seed=1), 10)) == 100


# ---- is it a uniform shuffle?


ROWS, BUCKETS, SEEDS = 4000, 8, 60


def epoch_orders() -> list[np.ndarray]:
    """For each seed: at which place of an epoch each row comes, rows numbered as in the text."""
    found = []
    for seed in range(SEEDS):
        buckets = buckets_of_rows(seed, 0, ROWS, BUCKETS)
        rows_of = [np.flatnonzero(buckets == bucket) for bucket in range(BUCKETS)]
        visited = [rows_of[k][row_order(seed, 1, int(k), len(rows_of[k]))] for k in bucket_order(seed, 1, BUCKETS)]
        found.append(np.argsort(np.concatenate(visited)))
    return found


@pytest.fixture(scope="module")
def places() -> np.ndarray:
    return np.stack(epoch_orders())  # [seeds, rows]


def z_score(values: np.ndarray, mean: float, variance: float) -> float:
    """How many standard errors the mean of one value a seed is from `mean`."""
    return float((values.mean() - mean) / np.sqrt(variance / len(values)))


def test_the_orders_under_test_are_those_of_a_feed(tmp_path):
    store = make(tmp_path / "s", rows=200, bucket_rows=40, seed=5)
    numbers = (next(store.feed(A, 200, seed=5)) * store.scale(A))[:, 0].round().int().numpy()
    buckets = buckets_of_rows(5, 0, 200, 5)
    rows_of = [np.flatnonzero(buckets == bucket) for bucket in range(5)]
    visited = [rows_of[k][row_order(5, 0, int(k), len(rows_of[k]))] for k in bucket_order(5, 0, 5)]
    assert np.array_equal(numbers, np.concatenate(visited))


@pytest.mark.parametrize("gap", [1, 2, 50])
def test_rows_near_each_other_in_the_text_are_as_far_apart_as_in_a_perfect_shuffle(places, gap):
    """The mean distance |p_i - p_j| of two places of a random permutation of n is (n + 1) / 3."""
    distances = np.abs(places[:, gap:] - places[:, :-gap]).mean(1)
    assert abs(distances.mean() / ((ROWS + 1) / 3) - 1) < 0.005
    assert abs(z_score(distances, (ROWS + 1) / 3, distances.var(ddof=1))) < 4


@pytest.mark.parametrize("batch", [8, 64])
def test_neighbours_in_the_text_are_in_one_batch_as_often_as_chance_has_it(places, batch):
    together = (places[:, 1:] // batch == places[:, :-1] // batch).sum(1)
    chance = (ROWS - 1) * (batch - 1) / (ROWS - 1)
    assert abs(z_score(together, chance, together.var(ddof=1))) < 4
    assert 0.7 < together.var(ddof=1) / chance < 1.5  # close to a Poisson count


def test_batches_are_not_correlated_with_those_that_follow(places):
    """The mean place in the text of one batch says nothing of the next one's."""
    texts = np.argsort(places, axis=1)
    means = texts.reshape(SEEDS, -1, 40).mean(2)
    centred = means - means.mean(1, keepdims=True)
    batches = means.shape[1]
    for lag in (1, 2, 5):
        correlation = (centred[:, lag:] * centred[:, :-lag]).sum(1) / (centred**2).sum(1)
        expected = -(batches - lag) / batches / (batches - 1)  # of an exchangeable sequence around its own mean
        assert abs(z_score(correlation, expected, 1 / batches)) < 4
    # without replacement, the variance of a batch's mean is (n² - 1)/12 / 40 · (n - 40)/(n - 1)
    expected_variance = (ROWS**2 - 1) / 12 / 40 * (ROWS - 40) / (ROWS - 1)
    assert abs(means.var(axis=1, ddof=1).mean() / expected_variance - 1) < 0.1


def test_every_row_is_as_likely_at_every_place(places):
    """The chi-square of rows in 16 parts of the text against 16 parts of the epoch, over all seeds."""
    parts = 16
    table = np.zeros((parts, parts))
    rows = np.arange(ROWS) * parts // ROWS
    for place in places:
        np.add.at(table, (rows, place * parts // ROWS), 1)
    expected = SEEDS * ROWS / parts**2
    chi_square = ((table - expected) ** 2 / expected).sum()
    freedom = (parts - 1) ** 2
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)
