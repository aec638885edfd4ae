"""The loops of reading a bucket, compiled by numba. Imported only where numba is installed; `gather` says what they do.

They release the interpreter's lock, write rows lo ... hi-1 of the batch, and reorder or approximate no operation.
Compiled code is cached beside this file, where Python caches its own.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

compiled: Callable[..., Any] = functools.partial(njit, nogil=True, cache=True, error_model="numpy")


@compiled()
def float32(rows, chosen, scale, out, lo, hi):
    """out = rows[chosen] / scale."""
    for i in range(lo, hi):
        row = rows[chosen[i]]
        for d in range(row.size):
            out[i, d] = row[d] / scale


@compiled()
def bfloat16(rows, chosen, scale, bits, out, lo, hi):
    """The same of bfloat16 rows, given as their bits; `bits` is `out` seen as uint32."""
    for i in range(lo, hi):
        row = rows[chosen[i]]
        for d in range(row.size):
            bits[i, d] = np.uint32(row[d]) << np.uint32(16)
        for d in range(row.size):
            out[i, d] = out[i, d] / scale


@compiled()
def int8(rows, row_scale, chosen, scale, out, lo, hi):
    """The same of rows q * row_scale, rounded to float32 before the division."""
    for i in range(lo, hi):
        row, s = rows[chosen[i]], row_scale[chosen[i], 0]
        for d in range(row.size):
            out[i, d] = np.float32(row[d]) * s
        for d in range(row.size):
            out[i, d] = out[i, d] / scale


@compiled()
def sorted_places(draws):
    """np.argsort(draws, kind="stable") of uint64 numbers that are spread evenly; O(size) then, and right in any case.

    A counting sort by the highest bits leaves about one number a place; an insertion sort puts right what is left.
    """
    size = draws.size
    bits = 1
    while (1 << bits) < size:
        bits += 1
    shift = np.uint64(64 - bits)
    ends = np.zeros((1 << bits) + 1, dtype=np.int64)
    for i in range(size):
        ends[np.int64(draws[i] >> shift) + 1] += 1
    for k in range(1, ends.size):
        ends[k] += ends[k - 1]
    keys, places = np.empty(size, dtype=np.uint64), np.empty(size, dtype=np.int64)
    for i in range(size):
        first = np.int64(draws[i] >> shift)
        keys[ends[first]], places[ends[first]] = draws[i], i
        ends[first] += 1
    for i in range(1, size):
        key, place, j = keys[i], places[i], i
        while j > 0 and keys[j - 1] > key:
            keys[j], places[j] = keys[j - 1], places[j - 1]
            j -= 1
        keys[j], places[j] = key, place
    return places
