"""Which row comes when, as pure functions of (seed, epoch, sizes): nothing about an order is ever stored.

A row is scattered to a bucket by an independent uniform draw when it is written; a reader permutes the buckets and
the rows of each bucket anew in every epoch. Given the bucket sizes every partition of the rows is equally likely, so
the order of one epoch is uniform over all permutations, although no more than one bucket is ever at hand. (Epochs
share the partition, so two epochs are not independent of each other.)

All randomness is Philox4x64, a counter-based generator: the key is (seed, purpose), the counter says which epoch,
bucket or row, so that any place can be reached without drawing what comes before it. Only the raw 64-bit stream is
used, which NumPy promises to keep; its `permutation` and `integers` may change between versions, and with them the
order of a resumed run.
"""

from typing import Final

import numpy as np
from jaxtyping import Bool, Int64, UInt64
from numpy.random import Philox

from mistudio.errors import ConfigError

_SCATTER: Final = 1
_BUCKETS: Final = 2
_ROWS: Final = 3
_DOCUMENTS: Final = 4


def bucket_count(rows: int, bucket_rows: int) -> int:
    """How many buckets `rows` rows need when each holds `bucket_rows` on average: ceil, at least 1."""
    return max(1, -(-rows // bucket_rows))


def buckets_of_rows(seed: int, start: int, count: int, n_buckets: int) -> Int64[np.ndarray, " B"]:
    """The bucket of each of the rows start ... start+count-1, a function of (seed, row) alone; O(count).

    A row takes one 64-bit draw u; its bucket is floor(u_high32 * K / 2^32), uniform to within K / 2^32.
    """
    if n_buckets == 1:
        return np.zeros(count, dtype=np.int64)
    skip = start % 4  # one step of the counter gives four draws
    draws = _draws(seed, _SCATTER, (start // 4, 0, 0, 0), count + skip)[skip:]
    return (((draws >> np.uint64(32)) * np.uint64(n_buckets)) >> np.uint64(32)).astype(np.int64)


def bucket_order(seed: int, epoch: int, n_buckets: int) -> Int64[np.ndarray, " K"]:
    """The order in which an epoch visits the buckets."""
    return _permutation(_draws(seed, _BUCKETS, (0, 0, epoch, 0), n_buckets))


def row_order(seed: int, epoch: int, bucket: int, size: int) -> Int64[np.ndarray, " B"]:
    """The order in which an epoch visits the rows of one bucket; O(size log size), about 0.1 s for 10^6 rows."""
    return _permutation(row_draws(seed, epoch, bucket, size))


def row_draws(seed: int, epoch: int, bucket: int, size: int) -> UInt64[np.ndarray, " B"]:
    """The numbers whose order `row_order` is."""
    return _draws(seed, _ROWS, (0, 0, epoch, bucket), size)


def locate(sizes: Int64[np.ndarray, " K"], seed: int, epoch: int, offset: int) -> tuple[int, int]:
    """(bucket, number of its rows that are already read) at `offset` rows into an epoch; O(K log K)."""
    order = bucket_order(seed, epoch, len(sizes))
    ends = np.cumsum(sizes[order])
    place = int(np.searchsorted(ends, offset, side="right"))  # "right" steps over empty buckets
    bucket = int(order[place])
    return bucket, offset - int(ends[place] - sizes[bucket])


def chosen_documents(seed: int, documents: int, fraction: float) -> Bool[np.ndarray, " N"]:
    """Whether each of the documents 0 ... documents-1 is among those chosen, each with probability `fraction`."""
    return (_draws(seed, _DOCUMENTS, (0, 0, 0, 0), documents) >> np.uint64(11)) * 2.0**-53 < fraction


def check_seed(seed: int) -> None:
    """Nothing. ConfigError: the seed does not fit the generator's 64-bit key."""
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed = {seed}, but a seed is a whole number from 0 to 2^64 - 1.")


def _draws(seed: int, purpose: int, counter: tuple[int, int, int, int], count: int) -> UInt64[np.ndarray, " B"]:
    check_seed(seed)
    key = np.array([seed, purpose], dtype=np.uint64)
    return Philox(key=key, counter=np.array(counter, dtype=np.uint64)).random_raw(count)


def _permutation(draws: UInt64[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
    return np.argsort(draws, kind="stable").astype(
        np.int64, copy=False
    )  # stable: the same on every machine, ties included
