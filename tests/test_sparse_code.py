"""The list of entries: it is the matrix, in either order, and screening in bfloat16 misses and adds nothing."""

import math
import os

import pytest
import torch

from mistudio.sae.code import FeatureCode, SparseCode, select

pytest.importorskip("numba")
from mistudio.train.compiled import Screen

BANDWIDTH = 0.02


def gaussian(B, D, F, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=generator) / D**0.5, torch.randn(F, D, generator=generator) / D**0.5


def thresholds(x, W, bias, part):
    """For every feature the z above which `part` of the rows lie."""
    z = (x.double() @ W.double().T + bias.double()).T
    return z.quantile(1 - part, dim=1).float()


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("values", "rows", "feature_ptr"))


# --- two orders of one matrix


def test_the_code_holds_the_entries_near_and_above_the_threshold():
    x, W = gaussian(50, 16, 40)
    bias, theta = 0.1 * torch.randn(40), 0.3 * torch.rand(40)
    z = x @ W.T + bias
    dense = torch.where((z > theta) | ((z - theta).abs() < BANDWIDTH / 2), z, 0)
    code = select(x, W.T, bias, theta, BANDWIDTH)
    torch.testing.assert_close(code.by_row().to_dense(), dense)
    active = select(x, W.T, bias, theta)
    torch.testing.assert_close(active.by_row().to_dense(), torch.where(z > theta, z, 0))
    assert len(active.values) < len(code.values) < z.numel()


def test_both_orders_hold_the_same_entries_sorted():
    x, W = gaussian(30, 8, 20)
    code = select(x, W.T, torch.zeros(20), torch.full((20,), 0.3))
    rows = code.by_row()
    assert same(rows.by_feature(), code)
    for b in range(30):
        features = rows.indices[rows.row_ptr[b] : rows.row_ptr[b + 1]]
        assert (features.diff() > 0).all()
    for j in range(20):
        assert (code.rows[code.feature_ptr[j] : code.feature_ptr[j + 1]].diff() > 0).all()


def test_an_empty_code_has_its_shape():
    x, W = gaussian(3, 8, 5)
    code = select(x, W.T, torch.zeros(5), torch.full((5,), 9.0))
    assert (code.n_rows, code.n_features, len(code.values)) == (3, 5, 0)
    assert torch.equal(code.by_row().to_dense(), torch.zeros(3, 5))
    assert same(Screen(W).select(x, torch.zeros(5), None, torch.full((5,), 9.0), 0.0), code)


def test_blocks_of_columns_do_not_show(monkeypatch):
    x, W = gaussian(30, 8, 20)
    whole = select(x, W.T, torch.zeros(20), torch.full((20,), 0.3))
    monkeypatch.setattr("mistudio.sae.code.BLOCK_ENTRIES", 90)
    blocks = select(x, W.T, torch.zeros(20), torch.full((20,), 0.3))
    assert torch.equal(blocks.rows, whole.rows)
    torch.testing.assert_close(blocks.values, whole.values)


def test_a_value_that_is_no_number_is_an_entry():
    x, W = gaussian(4, 8, 5)
    W[2, 3] = math.nan
    theta = torch.full((5,), 9.0)
    for code in (select(x, W.T, torch.zeros(5), theta, 0.1), Screen(W).select(x, torch.zeros(5), None, theta, 0.1)):
        assert isinstance(code, FeatureCode)
        assert isinstance(code.by_row(), SparseCode)
        assert code.rows.tolist() == [0, 1, 2, 3]
        assert code.indices().tolist() == [2, 2, 2, 2]
        assert code.values.isnan().all()


# --- screening


def heavy_tails(B, D, F):
    x, W = gaussian(B, D, F, 1)
    return x * (1 / torch.rand(x.shape).clamp(min=1e-4)), W * torch.logspace(-3, 3, D)


def rounding_all_one_way(B, D, F):
    """Every number loses almost half a unit of bfloat16, all products with the same sign: the worst case."""
    x = torch.full((B, D), 1 + 2.0**-8 - 2.0**-16) * torch.logspace(-2, 2, B)[:, None]
    return x, torch.full((F, D), 1 + 2.0**-8 - 2.0**-16) * torch.logspace(-1, 1, F)[:, None]


def rounding_up(B, D, F):
    x, W = rounding_all_one_way(B, D, F)
    return x * (1 + 2.0**-8) / (1 + 2.0**-8 - 2.0**-16) + 2.0**-14, -W


def cancellation(B, D, F):
    """Huge parts that cancel exactly and leave a small z."""
    x, W = gaussian(B, D, F, 2)
    x[:, 1], W[:, 1] = -x[:, 0], W[:, 0]
    x[:, :2] *= 1e3
    return x, W


def uneven_rows(B, D, F):
    """Rows and columns of very different size, some of them 0 or almost 0."""
    x, W = gaussian(B, D, F, 3)
    x, W = x * torch.logspace(-30, 3, B)[:, None], W * torch.logspace(-6, 3, F)[:, None]
    x[5], W[7], x[6] = 0, 0, 1e-40
    return x, W


def planted(B, D, F):
    """Sums of decoder rows, read by their transposes: what a trained encoder sees."""
    W = torch.nn.functional.normalize(gaussian(1, D, F, 4)[1], dim=1)
    x = torch.stack([W[torch.randint(F, (12,))].sum(0) for _ in range(B)])
    return x / x.square().sum(1).mean().sqrt(), W


FAMILIES = [gaussian, heavy_tails, rounding_all_one_way, rounding_up, cancellation, uneven_rows, planted]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", [0.5, 0.02])
def test_screening_in_bfloat16_misses_and_adds_nothing(family, part):
    torch.manual_seed(0)
    x, W = family(200, 96, 150)
    bias = torch.randn(150) * x.norm(dim=1).median() * W.norm(dim=1) / 10
    theta = thresholds(x, W, bias, part)
    misses, adds, differences = compare(x, W, bias, theta, BANDWIDTH)
    assert (misses, adds, differences) == (0, 0, 0)


def compare(x, W, bias, theta, bandwidth):
    """(missed, added, values that differ in any bit) beside screening with a margin so wide that all are computed."""
    screened = Screen(W, torch.bfloat16).select(x, bias, None, theta, bandwidth)
    everything = Screen(W, torch.bfloat16)
    everything.error.fill_(1e30)
    whole = everything.select(x, bias, None, theta, bandwidth)
    place = [code.indices().long() * len(x) + code.rows.long() for code in (screened, whole)]
    common = torch.isin(place[1], place[0])
    misses, adds = int((~common).sum()), int((~torch.isin(place[0], place[1])).sum())
    differences = 0 if misses or adds else int((screened.values != whole.values).sum())
    return misses, adds, differences


@pytest.mark.parametrize("family", [gaussian, planted])
def test_the_screened_code_is_the_float64_encoder_but_for_rounding_at_the_edge(family):
    x, W = family(300, 128, 400)
    bias, b_dec = 0.1 * torch.randn(400), 0.1 * torch.randn(128)
    theta = thresholds(x, W, bias, 0.01)
    code = Screen(W).select(x, bias, b_dec, theta, BANDWIDTH)
    z = (x.double() - b_dec.double()) @ W.double().T + bias.double()
    found = torch.zeros_like(z, dtype=torch.bool)
    found[code.rows.long(), code.indices().long()] = True
    low = theta.double() - BANDWIDTH / 2
    wrong = found != (z > low)
    assert not (wrong & ((z - low).abs() > 1e-6)).any()
    torch.testing.assert_close(code.values.double(), z.T[found.T], atol=1e-6, rtol=1e-6)


def test_the_margin_is_tight_enough_to_be_useful():
    x, W = planted(512, 256, 1000)
    screen, theta = Screen(W, torch.bfloat16), torch.full((1000,), 0.25)
    _, norms, cut, slope = screen._margins(x, torch.zeros(1000), theta, 0.001)
    likely = ((screen.rounded @ x.bfloat16().T).float() + slope[:, None] * norms >= cut[:, None]).sum()
    kept = len(screen.select(x, torch.zeros(1000), None, theta, 0.001).values)
    assert 0 < kept <= likely < 1.3 * kept


@pytest.mark.filterwarnings("error")
def test_a_product_outside_its_bound_is_noticed_and_screening_goes_on_in_float32():
    x, W = gaussian(64, 32, 300)
    bias, theta = torch.zeros(300), thresholds(x, W, torch.zeros(300), 0.05)
    right = Screen(W, torch.bfloat16).select(x, bias, None, theta, BANDWIDTH)
    screen = Screen(W, torch.bfloat16)
    screen.rounded *= 1.05  # as if the machine multiplied badly
    with pytest.warns(UserWarning, match="screening goes on in float32"):
        assert same(screen.select(x, bias, None, theta, BANDWIDTH), right)
    assert screen.dtype == torch.float32
    assert same(screen.select(x, bias, None, theta, BANDWIDTH), right)
    screen.rounded = 1.001 * W  # now in float32 too
    with pytest.warns(UserWarning, match="every entry is computed by itself"):
        assert same(screen.select(x, bias, None, theta, BANDWIDTH), right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_refreshing_the_touched_rows_is_enough(dtype):
    W = gaussian(1, 32, 300)[1]
    screen = Screen(W, dtype)
    touched = torch.rand(300) < 0.3
    W[touched] *= -1.7
    screen.refresh(touched)
    fresh = Screen(W, dtype)
    assert all(torch.equal(getattr(screen, n), getattr(fresh, n)) for n in ("rounded", "norm", "error"))
    assert torch.equal(fresh.rounded, W.to(dtype))


@pytest.mark.skipif("MISTUDIO_SLOW" not in os.environ, reason="a billion entries take minutes; set MISTUDIO_SLOW=1")
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_missed_among_a_billion_entries(family):
    B, F = 4096, 8192
    for seed in range(-(-(10**9) // (B * F * len(FAMILIES)))):
        torch.manual_seed(seed)
        x, W = family(B, 96, F)
        bias = torch.randn(F) * x.norm(dim=1).median() * W.norm(dim=1) / 10
        theta = thresholds(x, W, bias, 0.005)
        assert compare(x, W, bias, theta, BANDWIDTH) == (0, 0, 0)
