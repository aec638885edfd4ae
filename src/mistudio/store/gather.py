"""Rows of a bucket into a batch: taken in the order asked for, as float32, divided by C.

`definition` says it in NumPy. Batches of `WORTH_BYTES` and more are made by compiled loops that read and write each
number once, on several threads, where numba is installed; their bits are the same, for any number of threads.
"""

import functools
import logging
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import Final

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from mistudio.pages import empty
from mistudio.store import order
from mistudio.store.dtypes import ROW_SCALE, ROWS, decode

WORTH_BYTES: Final = 1 << 20
"""Smaller batches are not worth loading numba for."""
MOST_THREADS: Final = 4
"""More do not read memory faster, on the machines we know."""
log = logging.getLogger(__name__)


def definition(
    stored: dict[str, np.ndarray],
    dtype: str,
    chosen: Int64[np.ndarray, " B"],
    scale: np.float32,
    out: Float32[np.ndarray, "B D"],
) -> None:
    """out[i] = row chosen[i] / scale, the division in float32."""
    if dtype == "float32":
        np.take(stored[ROWS], chosen, axis=0, out=out, mode="clip")  # "raise" would buffer the copy
    else:
        decode({tensor: rows[chosen] for tensor, rows in stored.items()}, dtype, out)
    np.divide(out, scale, out=out)


def gather(
    stored: dict[str, np.ndarray],
    dtype: str,
    chosen: Int64[np.ndarray, " B"],
    scale: np.float32,
    out: Float32[np.ndarray, "B D"],
    threads: int,
) -> None:
    """As `definition`; every index in `chosen` is a row of the bucket."""
    kernels = compiled() if out.nbytes >= WORTH_BYTES else None
    if kernels is None or dtype == "float16":
        definition(stored, dtype, chosen, scale, out)
        return
    lines = out.shape[1] % kernels.LINE == 0 and out.ctypes.data % kernels.LINE_BYTES == 0
    if dtype == "int8":
        kernel = kernels.int8_lines if lines else kernels.int8
        kernel = functools.partial(kernel, stored[ROWS], stored[ROW_SCALE], chosen, scale, out)
    elif lines:
        kernel = functools.partial(kernels.lines, stored[ROWS], chosen, scale, out)
    elif dtype == "bfloat16":
        kernel = functools.partial(kernels.bfloat16, stored[ROWS], chosen, scale, out.view(np.uint32), out)
    else:
        kernel = functools.partial(kernels.float32, stored[ROWS], chosen, scale, out)
    if threads == 1:
        kernel(0, len(chosen))
        return
    ends = np.linspace(0, len(chosen), threads + 1).astype(np.int64).tolist()
    list(_pool(threads).map(kernel, ends[:-1], ends[1:]))


def row_order(seed: int, epoch: int, bucket: int, size: int) -> Int64[np.ndarray, " B"]:
    """`order.row_order`, sorted by a compiled loop where that is worth it."""
    loaded = compiled.cache_info().currsize > 0
    kernels = compiled() if loaded or size * 64 >= WORTH_BYTES else None
    if kernels is None:
        return order.row_order(seed, epoch, bucket, size)
    found: Int64[np.ndarray, " B"] = kernels.sorted_places(order.row_draws(seed, epoch, bucket, size))
    return found


def row_order_ahead(seed: int, epoch: int, bucket: int, size: int, threads: int) -> Future[np.ndarray]:
    """`row_order`, worked out in one of `threads` threads while others go on."""
    return _pool(threads).submit(row_order, seed, epoch, bucket, size)


def default_threads() -> int:
    """As many as torch uses, but not more than `MOST_THREADS`."""
    return min(torch.get_num_threads(), MOST_THREADS)


class Batches:
    """Memory for batches [B, D], used again when nobody holds the tensor, or a part of it, any more.

    Fresh memory costs a quarter of the time of filling it: the system gives it page by page, each set to zero.
    """

    def __init__(self, rows: int, width: int, most: int):
        self._shape, self._most = (rows, width), most
        self._made: list[np.ndarray] = []
        self._idle = 0  # references to an array that only this list holds

    def take(self) -> Float32[Tensor, "B D"]:
        """A batch with anything in it."""
        for number in range(len(self._made)):
            if sys.getrefcount(self._made[number]) == self._idle:
                return torch.from_numpy(self._made[number])
        if len(self._made) == self._most:
            return torch.empty(self._shape)
        self._made.append(empty(self._shape, torch.float32).numpy())
        self._idle = sys.getrefcount(self._made[-1])
        return torch.from_numpy(self._made[-1])


@functools.cache
def compiled() -> ModuleType | None:
    """The compiled loops; None where numba is not installed, which is said once."""
    try:
        from mistudio.store import gather_kernels
    except ImportError:
        log.warning("numba is not installed, so feeds read at a part of their speed. Install it: pip install numba")
        return None
    return gather_kernels


def _pool(threads: int) -> ThreadPoolExecutor:
    return _pool_of(os.getpid(), threads)  # a forked process has none of its parent's threads


@functools.cache
def _pool_of(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="gather")
