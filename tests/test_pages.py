"""Memory in large pages: an allocation like any other, and advice that changes no number."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistudio.pages import empty, in_large_pages


@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int64]),
)
def test_memory_begins_with_a_cache_line_whatever_lies_in_it(shape, dtype):
    made = empty(shape, dtype)
    assert (made.shape, made.dtype, made.is_contiguous()) == (torch.Size(shape), dtype, True)
    assert made.numel() == 0 or made.data_ptr() % 64 == 0
    assert torch.equal(made.fill_(1), torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("numbers", [0, 10, 3_000_000])
def test_advice_changes_no_number_and_the_memory_can_be_written_to(numbers):
    made = torch.from_numpy(np.arange(numbers, dtype=np.float32))
    untouched = torch.zeros(numbers)
    in_large_pages([made, untouched])
    assert torch.equal(made, torch.arange(numbers, dtype=torch.float32))
    assert not untouched.any()
    untouched += made
    assert torch.equal(untouched, made)
