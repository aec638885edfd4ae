"""Products of rounded numbers, and which number types this machine multiplies fastest."""

import functools
import time

import torch
from torch import Tensor


@functools.cache
def fast_dtypes(D: int) -> tuple[torch.dtype, ...]:
    """Those of int8, bfloat16 and float32 that this machine multiplies clearly faster than the next, fastest first
    (measured in some ms). Results do not depend on it, so that a measurement may decide."""
    whole = [torch.int8] if _int8_is_exact(D) else []
    seconds = _seconds([torch.float32, torch.bfloat16, *whole], D)
    kept = [torch.float32]
    for dtype in list(seconds)[1:]:
        if seconds[dtype] < 0.8 * seconds[kept[0]]:
            kept.insert(0, dtype)
    return tuple(kept)


def _seconds(dtypes: list[torch.dtype], D: int) -> dict[torch.dtype, float]:
    """The least CPU time of some products in each, on one thread and by turns, so that other work on the machine does
    not decide."""
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            for dtype in dtypes:
                a, b = (torch.ones(512, D, dtype=dtype) for _ in range(2))
                start = time.thread_time()
                multiply(a, b)
                times[dtype].append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return {dtype: min(several[1:]) for dtype, several in times.items()}


def _int8_is_exact(D: int) -> bool:
    """Whether the largest products arrive: instructions that add pairs of them in 16 bits would cut them off."""
    signs = torch.tensor([[127, 127], [-127, 127], [-127, -127]], dtype=torch.int8).repeat(11, -(-D // 2))[:, :D]
    return torch.equal(multiply(signs, signs), (signs.double() @ signs.double().T).int())


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a·bᵀ: in the dtype of both, or int32 of int8."""
    return torch._int_mm(a, b.T, out=out) if a.dtype == torch.int8 else torch.mm(a, b.T, out=out)
