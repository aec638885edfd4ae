"""The sparse step's operations: compiled = defined = dense in float64, for planes, windows, and widths that differ."""

import math

import pytest
import torch

from mistudio.sae.code import FeatureCode, pointers
from mistudio.train import definition
from mistudio.train.definition import Work
from mistudio.train.optimizer import Adam, normalise_rows_, remove_parallel_

pytest.importorskip("numba")
from mistudio.train import compiled

B, F = 26, 150
BANDWIDTH = 0.5
LR, BETA2, EPS = 0.01, 0.9, 1e-3
ENGINES = [definition, compiled]


class Case:
    """Entries z [K·B, F] in three bands (active, in the window, neither), weights, and everything a step is given."""

    def __init__(self, D=9, E=9, planes=1, dtype=torch.float64, part=0.2, bonus=0.0, centred=False, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        rows = planes * B
        self.z = normal(rows, F)
        self.kept = torch.rand(rows, F, generator=generator) < part
        self.kept[:, 3] = True  # a feature in every row
        self.kept[:, 4:7] = False  # features in none
        self.threshold = normal(F).abs() / 2
        self.threshold[8] = math.inf  # entries, none of them active
        self.x, self.residual = normal(B, D), normal(rows, E)
        self.price = normal(B).abs()
        self.parameters = {"W_enc": normal(F, D).T, "W_dec": normal(F, E), "b_dec": normal(E)}
        normalise_rows_(self.parameters["W_dec"])
        self.scale, self.bonus, self.centred, self.dtype = 0.3, bonus, centred, dtype

    def code(self):
        """The kept entries, feature after feature."""
        features, rows = self.kept.T.nonzero().unbind(1)
        counts = self.kept.sum(0)
        return FeatureCode(self.z.T[features, rows].to(self.dtype), rows.int(), pointers(counts), len(self.z))

    def given(self):
        """The tensors in the case's dtype; W_enc features first in memory."""
        parameters = {name: p.to(self.dtype).clone() for name, p in self.parameters.items()}
        vectors = [t.to(self.dtype) for t in (self.threshold, self.price)]
        return self.x.to(self.dtype), self.residual.to(self.dtype), parameters, *vectors

    def adam(self, parameters):
        """Away from its start: rows have waited for different numbers of steps."""
        adam = Adam({name: parameters[name] for name in ("W_enc", "W_dec")}, BETA2, EPS)
        adam.steps, adam.row_steps = 4, torch.arange(F) % 5
        for v in adam.second.values():
            v.fill_(0.01)
        adam.second["W_enc"] = adam.second["W_enc"].T.contiguous().T
        return adam

    def visit(self, engine):
        """(results, parameters, adam) of a visit."""
        x, residual, parameters, threshold, price = self.given()
        adam = self.adam(parameters)
        numbers = (BANDWIDTH, self.centred, self.scale, self.bonus)
        out = engine.visit(Work(self.code(), x, residual, parameters, threshold, price, *numbers), adam, LR)
        return out, parameters, adam

    def row_gradients(self, engine):
        """(sums, d_b_dec, features, g_enc, g_dec)."""
        x, residual, parameters, threshold, price = self.given()
        numbers = (BANDWIDTH, self.centred, self.scale, self.bonus)
        return engine.row_gradients(Work(self.code(), x, residual, parameters, threshold, price, *numbers))

    def dense(self):
        """(sums, d_b_dec, g_enc [F, D], g_dec [F, E]) by matrices [K·B, F] in float64."""
        W_enc, W_dec = self.parameters["W_enc"].T, self.parameters["W_dec"]
        planes = len(self.z) // B
        d_f = self.scale * self.residual @ W_dec.T + self.bonus
        active = self.kept & (self.z > self.threshold)
        window = self.kept & ((self.z - self.threshold).abs() < BANDWIDTH / 2)
        price = self.price.repeat(planes)[:, None]
        columns = (active * d_f, window * d_f, window * price, active * 1.0, window * 1.0)
        sums = torch.stack([column.sum(0) for column in columns], 1)
        g_dec = self.scale * (active * self.z).T @ self.residual
        g_enc = (active * d_f).T @ self.x.repeat(planes, 1)
        if not self.centred:
            return sums, torch.zeros_like(self.x[0]), g_enc, g_dec
        return sums, sums[:, 0] @ W_enc, g_enc - sums[:, :1] * self.parameters["b_dec"], g_dec


def close(ours, theirs, dtype):
    """Within rounding of the dtype."""
    bound = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(ours.double(), theirs.double(), **bound)


CASES = [
    {},
    {"planes": 3},
    {"D": 9, "E": 14},
    {"D": 14, "E": 5, "planes": 3, "bonus": 0.2},
    {"bonus": 0.2},
    {"centred": True},
    {"centred": True, "planes": 3, "bonus": 0.1},
    {"part": 0.0},
    {"D": 70, "E": 70, "part": 0.9},
]


@pytest.fixture(params=CASES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "plain")
def shape(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("engine", ENGINES)
def test_row_gradients_are_those_of_dense_matrices(engine, dtype, shape):
    case = Case(dtype=dtype, **shape)
    sums, d_b_dec, features, g_enc, g_dec = case.row_gradients(engine)
    expected = case.dense()
    assert features.tolist() == expected[0][:, 3].nonzero().flatten().tolist()
    close(sums, expected[0], dtype)
    close(d_b_dec, expected[1], dtype)
    close(g_enc, expected[2][features], dtype)
    close(g_dec, expected[3][features], dtype)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_cases_hold_what_they_are_there_for(engine):
    sums = Case().row_gradients(engine)[0]
    assert sums[3, 3] > B / 4  # often active
    assert sums[4:7].abs().max() == 0
    assert sums[8, 3] == 0
    assert ((sums[:, 4] > 0) & (sums[:, 3] == 0)).any()  # in the window only


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_visit_is_the_dense_step_of_touched_rows(engine, dtype, shape):
    case = Case(dtype=dtype, **shape)
    (sums, d_b_dec, touched), parameters, adam = case.visit(engine)
    expected, d_b_dec_64, g_enc, g_dec = case.dense()
    close(sums, expected, dtype)
    close(d_b_dec, d_b_dec_64, dtype)
    assert torch.equal(touched, expected[:, 3] > 0)
    assert torch.equal(adam.row_steps, torch.where(touched, 5, torch.arange(F) % 5))
    remove_parallel_(g_dec, case.parameters["W_dec"])
    for name, g in (("W_enc", g_enc), ("W_dec", g_dec)):
        p, v = adam.rows(name)
        before = case.parameters[name].T if name == "W_enc" else case.parameters[name]
        second = 0.01 * BETA2 ** (5 - torch.arange(F) % 5).double()[:, None] + (1 - BETA2) * g**2
        after = before - LR * g / (second.sqrt() / math.sqrt(1 - BETA2**5) + EPS)
        if name == "W_dec":
            normalise_rows_(after)
        close(p, torch.where(touched[:, None], after, before), dtype)
        close(v, torch.where(touched[:, None], second, 0.01), dtype)
    assert torch.equal(parameters["W_dec"][~touched], case.given()[2]["W_dec"][~touched])


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_and_their_application_are_the_visit(engine, shape):
    case = Case(**shape)
    (sums, d_b_dec, touched), parameters, adam = case.visit(engine)
    ours, d_ours, features, g_enc, g_dec = case.row_gradients(engine)
    apart = case.given()[2]
    later = case.adam(apart)
    engine.apply_rows(features, g_enc, g_dec, apart, later, LR)
    assert torch.equal(features, touched.nonzero().squeeze(1))
    assert torch.equal(later.row_steps, adam.row_steps)
    pairs = [(ours, sums), (d_ours, d_b_dec), *((later.second[n], adam.second[n]) for n in adam.second)]
    for one, other in pairs + [(apart[n], parameters[n]) for n in parameters]:
        close(one, other, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", [0.0, 0.2, 1.0])
def test_a_reconstruction_adds_the_active_decoder_rows(engine, dtype, part):
    case = Case(dtype=dtype, part=part, D=9, E=33)
    start = case.residual.to(dtype)
    residual, squares, row_l0 = engine.reconstruct(
        case.code(), start.clone(), case.parameters["W_dec"].to(dtype), case.threshold.to(dtype)
    )
    active = case.kept & (case.z > case.threshold)
    expected = case.residual + (active * case.z) @ case.parameters["W_dec"]
    close(residual, expected, dtype)
    close(squares / 33, expected.square().sum(1) / 33, dtype)
    assert torch.equal(row_l0, active.sum(1).to(dtype))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_code_touches_nothing(engine):
    case = Case()
    case.kept[:] = False
    (sums, d_b_dec, touched), parameters, adam = case.visit(engine)
    assert (sums.abs().max(), d_b_dec.abs().max(), touched.any()) == (0, 0, False)
    assert all(torch.equal(parameters[name], case.parameters[name]) for name in parameters)
    _, _, features, g_enc, g_dec = case.row_gradients(engine)
    assert (features.shape, g_enc.shape, g_dec.shape) == ((0,), (0, 9), (0, 9))
    engine.apply_rows(features, g_enc, g_dec, parameters, adam, LR)
    assert all(torch.equal(parameters[name], case.parameters[name]) for name in parameters)
    start = case.residual.clone()
    residual, squares, row_l0 = engine.reconstruct(case.code(), start, parameters["W_dec"], case.threshold)
    assert torch.equal(residual, case.residual)
    assert row_l0.max() == 0
    close(squares, case.residual.square().sum(1), torch.float64)


def test_a_threshold_of_minus_infinity_keeps_every_entry():
    """What architectures give that choose their entries by another rule."""
    case = Case()
    case.threshold.fill_(-math.inf)
    for engine in ENGINES:
        sums = case.row_gradients(engine)[0]
        assert torch.equal(sums[:, 3], case.kept.sum(0).double())
        assert sums[:, 1:3].abs().max() == sums[:, 4].max() == 0


@pytest.mark.parametrize("planes", [1, 3])
def test_the_number_of_threads_does_not_show_in_any_bit(planes):
    case = Case(planes=planes, dtype=torch.float32, centred=True)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            (sums, d_b_dec, _), parameters, adam = case.visit(compiled)
            _, _, _, g_enc, g_dec = case.row_gradients(compiled)
            given = (case.residual.float(), parameters["W_dec"], case.threshold.float())
            residual, squares, _ = compiled.reconstruct(case.code(), *given)
        finally:
            torch.set_num_threads(1)
        found.append([sums, d_b_dec, *parameters.values(), *adam.second.values(), g_enc, g_dec, residual, squares])
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))
