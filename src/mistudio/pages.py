"""Memory in large pages, where Linux has them.

With pages of 4 KiB, fresh memory comes from the system page by page, each set to zero, and who gathers rows at random
has the address of nearly every page looked up: together up to a tenth of a sparse training step.
"""

import ctypes
import sys
from collections.abc import Iterable
from typing import Final

import numpy as np
import torch
from torch import Tensor

_LARGE: Final = 1 << 21
_ALIGNED: Final = 64
_ADVICE: Final = (14, 25)
"""MADV_HUGEPAGE, for what is not in memory yet, and MADV_COLLAPSE, for what is (Linux 6.1)."""


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`torch.empty` on the CPU, by NumPy, which asks for large pages.

    It begins with a cache line, as torch's memory does: the bits of products may depend on it.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = np.empty(size + _ALIGNED, np.uint8)
    first = -memory.ctypes.data % _ALIGNED
    return torch.from_numpy(memory[first : first + size]).view(dtype).view(shape)


def in_large_pages(tensors: Iterable[Tensor]) -> None:
    """Asks for large pages where these tensors of the CPU lie; whether there are any is up to the system."""
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    for tensor in tensors:
        first = -(-tensor.data_ptr() // _LARGE) * _LARGE
        last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // _LARGE * _LARGE
        for advice in _ADVICE if tensor.device.type == "cpu" and first < last else ():
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
