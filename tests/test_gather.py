"""Reading a bucket: the compiled loops give the definition's bits, and memory is used again only when it is free."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistudio.store import FeedOptions, gather, order
from mistudio.store.dtypes import ROW_DTYPES, encode
from mistudio.store.gather import Batches, definition, row_order
from test_store import A, make

pytest.importorskip("numba")


@pytest.fixture
def always_compiled(monkeypatch):
    monkeypatch.setattr(gather, "WORTH_BYTES", 0)


def bucket(dtype: str, rows: int = 300, width: int = 37) -> dict[str, np.ndarray]:
    values = (
        torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 4, rows)[:, None]
    )
    values[7], values[8, 3], values[9, 4] = 0, -0.0, 1e-41
    return encode(values, dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("scale", [3.3, 1e-3, 123456.7])
@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("width", [16, 37, 48])  # multiples of 16 are written a cache line at a time
def test_compiled_loops_give_the_bits_of_the_definition(always_compiled, width, dtype, scale, threads):
    stored, c = bucket(dtype, width=width), np.float32(scale)
    chosen = np.random.default_rng(0).permutation(300)[:101]
    expected, found = (torch.empty(101, width).numpy() for _ in range(2))  # torch aligns them
    definition(stored, dtype, chosen, c, expected)
    gather.gather(stored, dtype, chosen, c, found, threads)
    assert np.array_equal(expected.view(np.uint32), found.view(np.uint32))


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_a_batch_that_does_not_begin_with_a_cache_line_gets_the_same_bits(always_compiled, dtype):
    stored, c, chosen = bucket(dtype, width=48), np.float32(3.3), np.arange(300)[::-3].copy()
    expected = np.empty((100, 48), dtype=np.float32)
    definition(stored, dtype, chosen, c, expected)
    around = torch.zeros(100 * 48 + 32).numpy()
    found = around[1:-31].reshape(100, 48)
    gather.gather(stored, dtype, chosen, c, found, 1)
    assert np.array_equal(expected.view(np.uint32), found.view(np.uint32))
    assert not around[0]
    assert not around[-31:].any()


@given(st.integers(0, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=30)
def test_the_compiled_order_is_the_order(size, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "WORTH_BYTES", 0)
        assert np.array_equal(row_order(seed, 2, 5, size), order.row_order(seed, 2, 5, size))


@pytest.mark.parametrize("spread", [1, 5, 2**40, 2**64 - 1])
def test_the_compiled_sort_is_stable_whatever_it_sorts(spread):
    draws = np.random.default_rng(3).integers(0, spread, size=2000, dtype=np.uint64)
    found = gather.compiled().sorted_places(draws)
    assert np.array_equal(found, np.argsort(draws, kind="stable"))


@pytest.mark.parametrize("dtype", ROW_DTYPES)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_feed_gives_the_same_bits_compiled_or_not_for_any_number_of_threads(tmp_path, monkeypatch, dtype, prefetch):
    store = make(tmp_path / "s", row_dtype=dtype)

    def batches(threads: int | None) -> torch.Tensor:
        feed = store.feed(A, 33, seed=5, how=FeedOptions(threads=threads, prefetch=prefetch))
        return torch.cat([next(feed) for _ in range(20)])

    plain = batches(None)
    monkeypatch.setattr(gather, "WORTH_BYTES", 0)
    assert all(torch.equal(batches(threads), plain) for threads in (None, 1, 2))


def test_without_numba_a_feed_reads_as_defined_and_says_so_once(tmp_path, monkeypatch, caplog, always_compiled):
    store = make(tmp_path / "s")
    expected = next(store.feed(A, 50, seed=1))
    monkeypatch.setitem(sys.modules, "mistudio.store.gather_kernels", None)
    monkeypatch.delattr("mistudio.store.gather_kernels")
    gather.compiled.cache_clear()
    assert torch.equal(next(store.feed(A, 50, seed=1)), expected)
    next(store.feed(A, 50, seed=2))
    assert [line for line in caplog.messages if "numba" in line] == [
        "numba is not installed, so feeds read at a part of their speed. Install it: pip install numba"
    ]
    gather.compiled.cache_clear()


# ---- memory that is used again


def test_memory_is_used_again_when_nothing_of_a_batch_is_held_any_more():
    memory = Batches(4, 3, 2)
    first = memory.take()
    place = first.data_ptr()
    del first
    assert memory.take().data_ptr() == place


@pytest.mark.parametrize(
    "part", [lambda t: t[1:], lambda t: t.numpy(), lambda t: t.T, lambda t: t.numpy()[1], lambda t: t.untyped_storage()]
)
def test_memory_is_not_used_again_while_a_part_of_a_batch_is_held(part):
    memory = Batches(4, 3, 5)
    first = memory.take()
    place, held = first.data_ptr(), part(first)
    del first
    others = [memory.take() for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    del held, others
    again = [memory.take() for _ in range(4)]
    assert place in [other.data_ptr() for other in again]


def test_batches_that_are_kept_never_change(tmp_path):
    store = make(tmp_path / "s")
    feed = store.feed(A, 30, seed=3)
    kept = [next(feed) for _ in range(25)]
    copies = [batch.clone() for batch in kept]
    for _ in range(30):
        next(feed)
    assert all(torch.equal(batch, copy) for batch, copy in zip(kept, copies, strict=True))
    assert len({batch.data_ptr() for batch in kept}) == len(kept)


def test_a_feed_uses_few_places_in_memory_where_batches_are_dropped(tmp_path):
    feed = make(tmp_path / "s").feed(A, 30, seed=3)
    places = {next(feed).data_ptr() for _ in range(40)}
    assert len(places) <= 5
    assert all(place % 64 == 0 for place in places)
