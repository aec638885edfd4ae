"""Streaming sums against closed forms and dense float64 mathematics."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistudio.metrics import FeatureSums, LossSums, ReconstructionSums, explained_variance_by_token

CHUNKS = st.lists(st.integers(0, 40), max_size=8).map(lambda cuts: sorted(cuts))


def _pieces(x: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    """`x` cut at the given rows; pieces may be empty."""
    bounds = [0, *cuts, len(x)]
    return [x[a:b] for a, b in pairwise(bounds)]


def _rows(seed: int, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = offset + torch.randn(40, 5, generator=generator)
    return x, x + 0.3 * torch.randn(40, 5, generator=generator)


def _dense_fvu(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    x, x_hat = x.double(), x_hat.double()
    return ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


def test_fvu_has_the_closed_form_of_a_shrunk_reconstruction():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])  # mean 0, Σ‖x‖² = 10
    assert ReconstructionSums.of(x, x).fvu == 0
    assert ReconstructionSums.of(x, 0.5 * x).fvu == 0.25
    assert ReconstructionSums.of(x, torch.zeros(4, 2)).fvu == 1


def test_predicting_the_data_set_mean_has_fvu_one():
    x, _ = _rows(0, offset=3.0)
    assert ReconstructionSums.of(x, x.double().mean(0).expand_as(x)).fvu == pytest.approx(1, abs=1e-14)


@given(cuts=CHUNKS, seed=st.integers(0, 5), offset=st.sampled_from([0.0, 7.0, -1000.0]))
def test_fvu_does_not_depend_on_how_rows_are_cut(cuts, seed, offset):
    x, x_hat = _rows(seed, offset)
    sums = ReconstructionSums.empty(5)
    for a, b in zip(_pieces(x, cuts), _pieces(x_hat, cuts), strict=True):
        sums += ReconstructionSums.of(a, b)
    assert sums.rows == 40
    assert sums.fvu == pytest.approx(_dense_fvu(x, x_hat), rel=1e-11)
    torch.testing.assert_close(sums.mean, x.double().mean(0), rtol=1e-12, atol=1e-12)


def test_fvu_survives_a_mean_a_hundred_million_times_the_spread():
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = 1e8 + noise
    sums = ReconstructionSums.of(x[:10], x[:10] + 0.5) + ReconstructionSums.of(x[10:], x[10:] + 0.5)
    shifted = x - 1e8
    expected = 64 * 3 * 0.25 / (shifted - shifted.mean(0)).square().sum().item()
    assert sums.fvu == pytest.approx(expected, rel=1e-6)
    naive = 64 * 3 * 0.25 / (x.square().sum() - 64 * x.mean(0).square().sum()).item()
    assert naive != pytest.approx(expected, rel=0.1)  # E‖x‖² − ‖E x‖² cancels even in float64


def test_the_mean_of_batch_fvus_is_another_number():
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0], [12.0], [13.0]])
    x_hat = x + torch.tensor([[1.0], [1.0], [0.0], [0.0], [0.0], [0.0]])
    first, second = ReconstructionSums.of(x[:2], x_hat[:2]), ReconstructionSums.of(x[2:], x_hat[2:])
    assert (first + second).fvu == pytest.approx(_dense_fvu(x, x_hat), rel=1e-14)
    assert (first.fvu + second.fvu) / 2 > 10 * (first + second).fvu


def test_bfloat16_rows_are_summed_in_float64():
    x = torch.ones(5000, 1, dtype=torch.bfloat16)
    x[0] = 0
    assert ReconstructionSums.of(x, torch.zeros_like(x)).error == 4999  # bfloat16 would stop at 256


def test_rows_that_do_not_vary_have_no_fvu():
    x = torch.full((7, 2), 0.1)
    for sums in (
        ReconstructionSums.of(x, x),
        ReconstructionSums.of(x[:3], x[:3]) + ReconstructionSums.of(x[3:], x[3:]),
    ):
        with pytest.raises(ValueError, match="do not vary"):
            _ = sums.fvu
    assert ReconstructionSums.of(x + torch.eye(7, 2) * 1e-8, x).varies


@given(cuts=CHUNKS, seed=st.integers(0, 5))
def test_feature_numbers_equal_the_dense_ones_however_rows_are_cut(cuts, seed):
    f = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)).sub(0.5).clamp(min=0)
    f[:, 3] = 0
    sums = FeatureSums.empty(6)
    for piece in _pieces(f, cuts):
        sums += FeatureSums.of(piece)
    assert sums.tokens == 40
    assert torch.equal(sums.count, (f > 0).sum(0))
    assert sums.l0 == pytest.approx((f > 0).sum(1).double().mean().item(), rel=1e-14)
    assert torch.equal(sums.max, f.max(0).values)
    assert torch.equal(sums.density, (f > 0).double().mean(0))
    for i in range(6):
        active = f[:, i][f[:, i] > 0].double()
        expected = active.mean().item() if len(active) else 0.0
        assert sums.mean_active[i].item() == pytest.approx(expected, rel=1e-12)


def test_l0_weighs_rows_not_batches():
    few, many = torch.ones(1, 4), torch.cat([torch.ones(9, 1), torch.zeros(9, 3)], 1)
    assert (FeatureSums.of(few) + FeatureSums.of(many)).l0 == pytest.approx((4 + 9) / 10)


@settings(max_examples=30)
@given(cuts=CHUNKS)
def test_mean_loss_weighs_predictions_however_rows_are_cut(cuts):
    generator = torch.Generator().manual_seed(2)
    losses = torch.rand(40, 7, generator=generator)
    counted = torch.rand(40, 7, generator=generator) > 0.4
    sums = LossSums.empty()
    for a, b in zip(_pieces(losses, cuts), _pieces(counted, cuts), strict=True):
        sums += LossSums.of(a, b)
    assert sums.predictions == int(counted.sum())
    assert sums.mean == pytest.approx(losses[counted].double().mean().item(), rel=1e-13)


def test_explained_variance_by_token_is_a_mean_of_ratios():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -3.0]])
    x_hat = x + torch.tensor([0.5, 0.0])
    mean = torch.tensor([0.0, -0.5])
    ratios = [0.25 / (row - mean).square().sum().item() for row in x]
    assert abs(explained_variance_by_token(x, x_hat) - (1 - sum(ratios) / 4)) < 1e-12
