"""The list of entries: it is the matrix, in either order, and screening misses and adds nothing."""

import functools
import math
import os

import pytest
import torch

from mistudio.sae.code import FeatureCode, SparseCode, select

pytest.importorskip("numba")
from mistudio.train import products, screen_kernels, search, vnni
from mistudio.train import screen as screening
from mistudio.train.screen import Query, Screen, select_many

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


def far_from_zero(B, D, F):
    """Rows that have much in common, as activations do."""
    x, W = gaussian(B, D, F, 5)
    return x + 3 * gaussian(1, D, F, 6)[0] * D**0.5, W


def planted(B, D, F):
    """Sums of decoder rows, read by their transposes: what a trained encoder sees."""
    W = torch.nn.functional.normalize(gaussian(1, D, F, 4)[1], dim=1)
    x = torch.stack([W[torch.randint(F, (12,))].sum(0) for _ in range(B)])
    return x / x.square().sum(1).mean().sqrt(), W


def one_large_number(peak):
    def family(B, D, F):
        """Each row has one large number, and all others are nearly half a step of integers up to `peak`, all losses
        with one sign: the worst case of int8 (127) and int16."""
        x, W = torch.full((B, D), 0.499), torch.full((F, D), 0.499)
        x[:, 0] = W[:, 1] = peak
        return x * torch.logspace(-2, 0, B)[:, None], W * torch.logspace(-1, 1, F)[:, None] * (torch.rand(F, 1) - 0.5)

    family.__name__ = f"one_large_number_{peak}"
    return family


FAMILIES = [gaussian, heavy_tails, rounding_all_one_way, rounding_up, cancellation, uneven_rows, far_from_zero, planted,
            one_large_number(127), one_large_number(32_512)]  # fmt: skip
ROUNDED = ["int8", "int8 in tiles", "bfloat16"]


@pytest.fixture
def dtype(request, monkeypatch):
    """What is rounded to; int8 is multiplied by torch's product, or in tiles where the processor can do that."""
    name, _, tiles = request.param.partition(" in ")
    if tiles and not vnni.is_there():
        pytest.skip("needs AVX-512 VNNI, and no AMX")
    monkeypatch.setattr(vnni, "is_there", lambda: bool(tiles))
    return getattr(torch, name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ROUNDED, indirect=True)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("part", [0.5, 0.02])
def test_screening_misses_and_adds_nothing(family, part, dtype):
    torch.manual_seed(0)
    x, W = family(200, 96, 150)
    bias = torch.randn(150) * x.norm(dim=1).median() * W.norm(dim=1) / 10
    theta = thresholds(x, W, bias, part)
    assert compare(x, W, bias, theta, dtype) == (0, 0, 0)


def compare(x, W, bias, theta, dtype):
    """(missed, added, values that differ in any bit) beside computing every z."""
    screened = Screen(W, dtype).select(x, bias, None, theta, BANDWIDTH)
    everything = Screen(W, torch.float32)
    everything.widened = math.inf
    whole = everything.select(x, bias, None, theta, BANDWIDTH)
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


@pytest.fixture
def looked_at(monkeypatch):
    """Candidates of every call of the kernels."""
    counts = []

    def recorded(kernel, *args):
        found = kernel(*args)
        counts.append(len(found[0]))
        return found

    for module in (screen_kernels, vnni):
        monkeypatch.setattr(module, "candidates", functools.partial(recorded, module.candidates))
    return counts


@pytest.mark.parametrize(("dtype", "most"), [*zip(ROUNDED, (3.0, 3.0, 1.3), strict=True)], indirect=["dtype"])
def test_the_margin_is_tight_enough_to_be_useful(looked_at, dtype, most):
    x, W = planted(512, 256, 1000)
    kept = len(Screen(W, dtype).select(x, torch.zeros(1000), None, torch.full((1000,), 0.25), 0.001).values)
    assert 0 < kept <= sum(looked_at) < most * kept


def test_what_rows_have_in_common_does_not_widen_the_margin(looked_at):
    x, W = planted(512, 256, 1000)
    for offset in (torch.zeros(256), torch.randn(256, generator=torch.Generator().manual_seed(0))):
        theta = 0.25 + W @ offset
        Screen(W, torch.int8).select(x + offset, torch.zeros(1000), None, theta, 0.001)
    blocks = len(looked_at) // 2
    assert sum(looked_at[blocks:]) < 1.1 * sum(looked_at[:blocks])


@pytest.mark.parametrize("dtype", [*ROUNDED, "float32"], indirect=True)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_has_the_entries_of_the_definition(dtype, bad):
    x, W = gaussian(40, 24, 60)
    x[7, 3] = bad
    theta = torch.full((60,), 0.3)
    expected = select(x, W.T, torch.zeros(60), theta, BANDWIDTH)
    found = Screen(W, dtype).select(x, torch.zeros(60), None, theta, BANDWIDTH)
    assert (expected.rows == 7).sum() > 10
    assert torch.equal(found.rows, expected.rows)
    torch.testing.assert_close(found.values, expected.values, equal_nan=True)


@pytest.mark.filterwarnings("error")
def test_a_product_outside_its_bound_is_noticed_and_that_dtype_is_not_used_again(monkeypatch):
    x, W = gaussian(64, 32, 300)
    bias, theta = torch.zeros(300), thresholds(x, W, torch.zeros(300), 0.05)
    right = Screen(W, torch.bfloat16).select(x, bias, None, theta, BANDWIDTH)
    screen, multiply = Screen(W, torch.int8), products.multiply
    screen.dtypes = [torch.int8, torch.bfloat16, torch.float32]

    def badly(a, b, out):
        return (multiply(a, b) * 1.3).to(multiply(a, b).dtype)

    monkeypatch.setattr(products, "multiply", badly)
    monkeypatch.setattr(vnni, "is_there", lambda: False)
    with pytest.warns(UserWarning, match="less accurate than float32 sums") as said:
        assert same(screen.select(x, bias, None, theta, BANDWIDTH), right)
    assert [str(w.message).split("; ")[1][:31] for w in said] == [
        "screening goes on in bfloat16, ",
        "screening goes on in float32, w",
        "every entry is computed by itse",
    ]
    assert same(screen.select(x, bias, None, theta, BANDWIDTH), right)


def test_weights_may_change_between_batches():
    x, W = gaussian(20, 32, 300)
    screen, theta = Screen(W, torch.int8), torch.full((300,), 0.2)
    screen.select(x, torch.zeros(300), None, theta, BANDWIDTH)
    touched = torch.rand(300) < 0.3
    W[touched] *= -1.7
    screen.refresh(touched)
    again = screen.select(x, torch.zeros(300), None, theta, BANDWIDTH)
    assert same(again, Screen(W.clone(), torch.bfloat16).select(x, torch.zeros(300), None, theta, BANDWIDTH))


def test_where_int8_is_too_coarse_the_next_dtype_goes_on_and_int8_is_tried_again(monkeypatch):
    """Each row has one number that is far larger than the others."""
    monkeypatch.setattr(screening, "BLOCK_ENTRIES", 128 * 64)
    used, multiply = [], products.multiply
    monkeypatch.setattr(products, "multiply", lambda a, b, out: used.append(a.dtype) or multiply(a, b))
    monkeypatch.setattr(vnni, "is_there", lambda: False)
    x, W = gaussian(64, 128, 384)
    x[::2, 0], x[1::2, 0] = 16, -16  # which bfloat16 holds exactly
    W[:, 0] = 0
    bias, theta = torch.zeros(384), torch.full((384,), 0.25)
    expected = Screen(W, torch.bfloat16).select(x, bias, None, theta, BANDWIDTH)
    screen = Screen(W, torch.int8)
    screen.dtypes = [torch.int8, torch.bfloat16, torch.float32]
    used.clear()
    for _ in range(screening.REST + 1):
        assert same(screen.select(x, bias, None, theta, BANDWIDTH), expected)
    blocks = 3 * (screening.REST + 1)
    again = 3 * screening.REST
    assert [i for i in range(blocks) if used[i] == torch.int8] == [0, again]
    assert set(used) == {torch.int8, torch.bfloat16}


@pytest.mark.parametrize("dtype", [*ROUNDED, "float32"], indirect=True)
def test_columns_taken_in_tiles_and_candidates_decided_upon_early_find_the_same_entries(monkeypatch, dtype):
    x, W = planted(300, 100, 250)
    bias, theta = 0.1 * torch.randn(250), torch.full((250,), 0.25)
    whole = Screen(W, dtype).select(x, bias, None, theta, BANDWIDTH)
    monkeypatch.setattr(screening, "BLOCK_ENTRIES", 300 * 130)
    for pending in (0, 1 << 20):
        monkeypatch.setattr(search, "PENDING", pending)
        assert same(Screen(W, dtype).select(x, bias, None, theta, BANDWIDTH), whole)
    monkeypatch.setattr(search, "CACHED", 0)
    for tile in (32, 40):  # tiles of one width, and a narrower last one
        monkeypatch.setattr(search, "TILE", tile)
        tiled = Screen(W, dtype).select(x, bias, None, theta, BANDWIDTH)
        assert torch.equal(tiled.rows, whole.rows)
        torch.testing.assert_close(tiled.values, whole.values)
        assert compare(x, W, bias, theta, dtype) == (0, 0, 0)


# --- several SAEs


@pytest.mark.parametrize("dtype", [*ROUNDED, "float32"], indirect=True)
@pytest.mark.parametrize("block", [130 * 50, 1 << 20])
@pytest.mark.parametrize("threads", [1, 2])
def test_screens_that_share_a_batch_find_what_each_finds_alone(monkeypatch, dtype, block, threads):
    monkeypatch.setattr(screening, "BLOCK_ENTRIES", block)
    x = gaussian(50, 32, 1)[0]
    widths, centre = (300, 20, 200, 500), 0.1 * torch.randn(32)
    saes = [gaussian(1, 32, F, seed=F)[1] for F in widths]
    queries = [
        Query(0.1 * torch.randn(F), centre if F < 250 else None, 0.1 + 0.4 * torch.rand(F), bandwidth)
        for F, bandwidth in zip(widths, (0.0, 0.1, 0.02, 0.3), strict=True)
    ]
    alone = [
        Screen(W, dtype).select(x, q.b_enc, q.b_dec, q.threshold, q.bandwidth)
        for W, q in zip(saes, queries, strict=True)
    ]
    torch.set_num_threads(threads)
    try:
        together = select_many([Screen(W, dtype) for W in saes], x, queries)
    finally:
        torch.set_num_threads(1)
    assert all(len(code.values) for code in alone)
    assert [same(*pair) for pair in zip(together, alone, strict=True)] == [True] * 4


def test_screens_of_different_dtypes_share_a_batch():
    x = gaussian(50, 32, 1)[0]
    saes = [gaussian(1, 32, 90, seed=seed)[1] for seed in range(4)]
    queries = [Query(torch.zeros(90), None, torch.full((90,), 0.3), 0.1)] * 4
    dtypes = (torch.int8, torch.bfloat16, torch.int8, torch.float32)
    together = select_many([Screen(*each) for each in zip(saes, dtypes, strict=True)], x, queries)
    alone = [Screen(W, torch.float32).select(x, torch.zeros(90), None, queries[0].threshold, 0.1) for W in saes]
    assert [same(*pair) for pair in zip(together, alone, strict=True)] == [True] * 4


# --- the choice of a dtype


def test_dtypes_are_tried_from_fast_to_accurate(monkeypatch):
    for seconds, expected in (
        ({torch.float32: 6, torch.bfloat16: 2, torch.int8: 1}, ["int8", "bfloat16", "float32"]),
        ({torch.float32: 6, torch.bfloat16: 2, torch.int8: 1.9}, ["bfloat16", "float32"]),
        ({torch.float32: 6, torch.bfloat16: 60, torch.int8: 1}, ["int8", "float32"]),
        ({torch.float32: 6, torch.bfloat16: 60, torch.int8: 9}, ["float32"]),
    ):
        monkeypatch.setattr(products, "_seconds", lambda dtypes, D, seconds=seconds: seconds)
        products.fast_dtypes.cache_clear()
        assert [str(d).removeprefix("torch.") for d in products.fast_dtypes(16)] == expected
    products.fast_dtypes.cache_clear()


def test_int8_is_not_used_where_its_sums_are_cut_off(monkeypatch):
    def saturating(a, b):
        """One factor gets rid of its sign, and pairs of products are added in int16, as on processors without VNNI."""
        pairs = ((a[:, None].int() + 128) * b[None].int()).unflatten(2, (-1, 2)).sum(3)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(2) - 128 * b.int().sum(1)

    assert products._int8_is_exact(64)
    assert products._int8_is_exact(7)
    monkeypatch.setattr(products, "multiply", saturating)
    assert not products._int8_is_exact(64)


@pytest.mark.skipif("MISTUDIO_SLOW" not in os.environ, reason="a billion entries take minutes; set MISTUDIO_SLOW=1")
@pytest.mark.parametrize("dtype", ROUNDED, indirect=True)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_nothing_is_missed_among_a_billion_entries(family, dtype):
    B, F = 4096, 8192
    for seed in range(-(-(10**9) // (B * F * len(FAMILIES)))):
        torch.manual_seed(seed)
        x, W = family(B, 96, F)
        bias = torch.randn(F) * x.norm(dim=1).median() * W.norm(dim=1) / 10
        theta = thresholds(x, W, bias, 0.005)
        assert compare(x, W, bias, theta, dtype) == (0, 0, 0)
