"""Candidates found in tiles are those of the whole product."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba")
import llvmlite.binding
import numba

from mistudio.train import screen_kernels, vnni

needs_vnni = pytest.mark.skipif(not vnni.is_there(), reason="needs AVX-512 VNNI, and no AMX")


def both(x, W, rows, features):
    """What is found in tiles, and in the product."""
    product = (W.int() @ x.T.int()).numpy()
    in_tiles = vnni.candidates(W.numpy(), vnni.packed(x), rows, features)
    return in_tiles, screen_kernels.candidates(product, rows, features)


@needs_vnni
@given(st.integers(1, 150), st.integers(1, 12), st.integers(1, 40), st.floats(0, 1), st.integers(0, 9))
def test_tiles_hold_the_candidates_of_the_product_in_its_order(B, quarters, n, part, seed):
    rng = np.random.default_rng(seed)
    x, W = (torch.from_numpy(rng.integers(-127, 128, (m, 4 * quarters), np.int8)) for m in (B, n))
    rows = tuple(2.0 ** rng.integers(-3, 3, (3, B)).astype(np.float32))  # powers of two: no sum is rounded
    unit, near, far = 2.0 ** rng.integers(-3, 3, (3, n)).astype(np.float32)
    cut = np.full(n, np.quantile((W.int() @ x.T.int()).numpy(), 1 - part), np.float32)
    for ours, theirs in zip(*both(x, W, rows, (unit, cut, near, far)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@needs_vnni
def test_the_largest_sums_arrive():
    D = vnni.WIDEST
    signs = torch.tensor([[127, 127], [-127, 127], [-127, -127]], dtype=torch.int8).repeat(1, D // 2)
    ones = np.ones(3, np.float32)
    (_, guesses, counts, _), _ = both(signs, signs, (ones, ones, ones), (ones, ones * -np.inf, ones, ones))
    assert counts.tolist() == [3, 3, 3]
    np.testing.assert_array_equal(guesses.reshape(3, 3), (signs.double() @ signs.double().T).float())


@needs_vnni
@pytest.mark.parametrize("which", range(3))
def test_what_is_no_number_is_a_candidate(which):
    """A row that was not finite lost infinitely much, and a feature's 0 times that is no number."""
    x = W = torch.zeros(70, 8, dtype=torch.int8)
    ones = np.ones(70, np.float32)
    rows = [ones.copy() for _ in range(3)]
    rows[which][[3, 66]] = np.inf
    features = ones, ones * 9, ones * 0, ones * 0
    ours, theirs = both(x, W, tuple(rows), features)
    assert ours[0].tolist() == theirs[0].tolist() == [3, 66] * 70


@pytest.mark.parametrize(
    ("features", "expected"),
    [({"avx512vnni": True}, True), ({"avx512vnni": True, "amx-int8": True}, False), ({"avx2": True}, False)],
)
def test_tiles_are_for_processors_that_have_no_faster_way(monkeypatch, features, expected):
    for name, value in (("CPU_NAME", None), ("CPU_FEATURES", None), ("ENABLE_AVX", True)):
        monkeypatch.setattr(numba.config, name, value)
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: features)
    assert vnni.is_there.__wrapped__() is expected


def unknown():
    raise RuntimeError("LLVM does not know this processor")


def test_tiles_are_not_for_processors_that_llvm_does_not_know(monkeypatch):
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", unknown)
    assert not vnni.is_there.__wrapped__()


@pytest.mark.parametrize(("name", "value"), [("CPU_NAME", "generic"), ("CPU_FEATURES", "+avx2"), ("ENABLE_AVX", False)])
def test_tiles_are_not_for_code_that_numba_compiles_for_another_processor(monkeypatch, name, value):
    monkeypatch.setattr(numba.config, name, value)
    assert not vnni.is_there.__wrapped__()


def test_widths_that_do_not_fit_are_multiplied_as_before(monkeypatch):
    monkeypatch.setattr(vnni, "is_there", lambda: True)
    widths = (0, 4, 6, 2304, vnni.WIDEST, vnni.WIDEST + 4)
    assert [vnni.multiplies(D) for D in widths] == [False, True, False, True, True, False]
