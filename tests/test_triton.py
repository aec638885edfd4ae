"""The Triton bodies of the sparse step are its definition, and compile for GPUs.

Where there is a GPU, the kernels run on it; else Triton's interpreter runs them on the CPU (`conftest` says so before
Triton is imported).
"""

import functools
import importlib.util
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mistudio.errors import TrainError
from mistudio.sae import SAEConfig
from mistudio.sae.code import FeatureCode, pointers, select
from mistudio.train import TrainConfig, definition, initial_sae, sparse
from mistudio.train.definition import Work
from mistudio.train.optimizer import Adam, normalise_rows_

pytest.importorskip("triton", reason="triton is not installed (it is there for Linux)")

from triton.language import core
from triton.runtime import interpreter

from mistudio.train import cuda, cuda_screen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, F = 24, 21
BANDWIDTH = 0.06
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def small_room(monkeypatch):
    """Room for few candidates: programs that find nothing in it cost the interpreter as much as others."""
    monkeypatch.setattr(cuda_screen, "LEAST_ROOM", 128)


@pytest.fixture(autouse=True, scope="module")
def quick_interpreter():
    """Triton's interpreter searches its language for builtins at every call of a function; here it searches once."""

    @functools.cache
    def builtins(place):
        return [name for name, member in inspect.getmembers(place) if core.is_builtin(member)]

    def patch(place, builder, scope):
        for name in builtins(place):
            if core.is_builtin(member := getattr(place, name)):
                interpreter._patch_attr(place, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(interpreter, "_patch_builtin", patch, raising=False)
        yield


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Case:
    """An SAE (or the weights of a transcoder), a batch, and its entries as the definition finds them."""

    def __init__(self, D=20, E=None, rows=B, planes=1, features=F, theta=0.25, beta1=0.0):
        E, self.beta1 = D if E is None else E, beta1
        self.x = randn(rows, D) / math.sqrt(D)
        self.W_enc, self.W_dec = randn(features, D, seed=1), randn(features, E, seed=2)
        for W in (self.W_enc, self.W_dec):
            normalise_rows_(W)
        self.b_enc, self.b_dec = 0.05 * randn(features, seed=3), 0.02 * randn(D, seed=4)
        self.threshold = torch.full((features,), theta, device=DEVICE)
        self.start = randn(planes * rows, E, seed=5)
        self.price = randn(rows, seed=6)
        noise = 0.3 * randn(planes * rows, D, seed=7) / math.sqrt(D)
        self.many_x = self.x.repeat(planes, 1) + noise if planes > 1 else self.x
        self.D, self.planes = D, planes

    def code(self):
        """The entries, of every plane others."""
        bias = self.b_enc - self.W_enc @ self.b_dec
        code = select(self.many_x, self.W_enc.T, bias, self.threshold, BANDWIDTH)
        return FeatureCode(code.values, code.rows, code.feature_ptr, len(self.many_x))

    def weights(self):
        """A copy of the parameters, and Adam with moments and clocks that differ between features."""
        parameters = {"W_enc": self.W_enc.clone().T, "W_dec": self.W_dec.clone(), "b_dec": self.b_dec.clone()}
        adam = Adam(parameters, 0.99, 1e-3, beta1=self.beta1)
        for name, first in adam.first.items():
            first.copy_(randn(*first.shape, seed=9 + len(name)) / 10)
        for name in ("W_enc", "W_dec"):
            adam.rows(name)[1].copy_(randn(*adam.rows(name)[1].shape, seed=8).square() / 100)
        adam.steps = 7
        adam.row_steps.copy_(torch.arange(len(self.W_dec)) % 8)
        return parameters, adam

    def given(self, parameters, centred, bonus=0.0):
        """The arguments of `visit` and `row_gradients`, with any residual."""
        return (
            self.code(), self.x, self.start, parameters, self.threshold, self.price, BANDWIDTH, centred,
            2 / len(self.x), bonus,
        )  # fmt: skip


def assert_near(ours, theirs, scale=1.0):
    torch.testing.assert_close(ours, theirs, atol=3e-6 * scale, rtol=1e-5)


CASES = {
    "one-block": {},
    "several-blocks-of-columns": {"D": 300, "rows": 20, "features": 20, "theta": 0.1},
    "transcoder": {"D": 20, "E": 33},
    "two-planes": {"planes": 2, "rows": 16, "features": 20},
    "all-entries": {"rows": 12, "features": 9, "theta": -math.inf},
    "no-entries": {"theta": 50.0},
    "more-entries-than-a-part": {"D": 16, "rows": 270, "features": 3, "theta": -0.5},
}


# --- the screen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("transcoder", "two-planes")])
def test_the_screen_finds_the_definitions_entries(name, dtype):
    case = Case(**CASES[name])
    found = cuda_screen.Screen(case.W_enc, dtype).select(case.x, case.b_enc, case.b_dec, case.threshold, BANDWIDTH)
    wanted = case.code()
    assert torch.equal(found.feature_ptr, wanted.feature_ptr)
    assert torch.equal(found.rows, wanted.rows)
    assert_near(found.values, wanted.values)


def test_the_screen_finds_entries_over_several_tiles():
    case = Case(D=70, rows=270, features=140, theta=0.3)
    found = cuda_screen.Screen(case.W_enc).select(case.x, case.b_enc, case.b_dec, case.threshold, BANDWIDTH)
    wanted = case.code()
    assert len(wanted.values) > 512
    assert torch.equal(found.feature_ptr, wanted.feature_ptr)
    assert torch.equal(found.rows, wanted.rows)


def test_the_screen_without_a_centre_and_after_weights_changed():
    case = Case()
    screen = cuda_screen.Screen(case.W_enc)
    touched = torch.zeros(F, dtype=torch.bool, device=DEVICE)
    touched[[3, 20]] = True
    case.W_enc[touched] = 0.7 * case.W_enc.flip(0)[touched]
    screen.refresh(touched)
    found = screen.select(case.x, case.b_enc, None, case.threshold, BANDWIDTH)
    wanted = select(case.x, case.W_enc.T, case.b_enc, case.threshold, BANDWIDTH)
    assert torch.equal(found.feature_ptr, wanted.feature_ptr)
    assert torch.equal(found.rows, wanted.rows)


def test_a_list_of_candidates_that_was_too_short_is_made_anew(monkeypatch):
    monkeypatch.setattr(cuda_screen, "LEAST_ROOM", 8)
    case = Case(rows=16, features=12)
    screen = cuda_screen.Screen(case.W_enc)
    found = screen.select(case.x, case.b_enc, case.b_dec, case.threshold, BANDWIDTH)
    assert screen.room > 8
    assert torch.equal(found.feature_ptr, case.code().feature_ptr)
    assert torch.equal(found.rows, case.code().rows)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_no_entry_hides_in_rounding(dtype):
    """Thresholds at the true z of one row, from either side: as near as float32 can tell."""
    case = Case(D=50, features=24)
    z = (case.x.double() @ case.W_enc.double().T).float()
    for side in (-1, 1):
        case.threshold = z[5] * (1 + side * 1e-5 * z[5].sign())
        found = cuda_screen.Screen(case.W_enc, dtype).select(case.x, 0 * case.b_enc, None, case.threshold, 0.0)
        assert _row(found, 5) == (list(range(24)) if side < 0 else [])


def _row(code, row):
    """The features of a row's entries."""
    return code.indices()[code.rows == row].tolist()


@pytest.mark.parametrize("factor", [1e-7, 1e6])
def test_numbers_beyond_the_range_of_float16_are_found(factor):
    """Below it they vanish, above it they are cut off; both are part of the measured error."""
    case = Case(features=12)
    W = factor * case.W_enc
    found = cuda_screen.Screen(W).select(case.x, factor * case.b_enc, None, factor * case.threshold, 0.0)
    wanted = select(case.x, case.W_enc.T, case.b_enc, case.threshold, 0.0)
    assert torch.equal(found.feature_ptr, wanted.feature_ptr)
    assert torch.equal(found.rows, wanted.rows)


def test_a_weight_that_is_no_number_is_an_entry_in_every_row_and_a_bad_row_has_no_others():
    case = Case(features=12)
    case.W_enc[4, 2] = math.nan
    case.x[7, 3], case.x[8, 3] = math.nan, math.inf
    found = cuda_screen.Screen(case.W_enc).select(case.x, case.b_enc, case.b_dec, case.threshold, BANDWIDTH)
    of_the_weight = found.indices() == 4
    assert found.rows[of_the_weight].tolist() == list(range(B))
    assert found.values[of_the_weight].isnan().all()
    assert not (set(found.rows[~of_the_weight].tolist()) & {7, 8})


def test_a_product_that_errs_more_than_its_bound_is_not_used_again(monkeypatch):
    case = Case()
    screen = cuda_screen.Screen(case.W_enc)
    screen.rounded.mul_(1.5)  # as if it were multiplied wrongly
    with pytest.warns(UserWarning, match="less accurate"):
        found = screen.select(case.x, case.b_enc, case.b_dec, case.threshold, BANDWIDTH)
    assert screen.dtype == torch.float32
    assert torch.equal(found.rows, case.code().rows)


# --- the entries


@pytest.mark.parametrize("name", [n for n in CASES if n != "more-entries-than-a-part"])
def test_the_reconstruction_is_the_definitions(name):
    case = Case(**CASES[name])
    code = case.code()
    ours = cuda.reconstruct(code, case.start.clone(), case.W_dec, case.threshold)
    theirs = definition.reconstruct(code, case.start.clone(), case.W_dec, case.threshold)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert_near(mine, wanted, scale=10)


def test_entries_are_sorted_by_row_over_several_chunks():
    case = Case(D=8, rows=70, features=20, theta=-math.inf)
    code, wanted = case.code(), case.code().by_row()
    assert len(code.values) > 5 * 256
    features, values, row_ptr = cuda.by_row(code, 70)
    assert torch.equal(features, wanted.indices)
    assert torch.equal(values, wanted.values)
    assert torch.equal(row_ptr, wanted.row_ptr)


def step_by(bodies, case, how, centred, bonus):
    """(results, parameters, Adam) after a step by `visit`, or by its two halves."""
    parameters, adam = case.weights()
    given = case.given(parameters, centred, bonus)
    if how == "visit":
        return bodies.visit(Work(*given), adam, 0.05), parameters, adam
    sums, d_b_dec, features, g_enc, g_dec = bodies.row_gradients(Work(*given))
    results = [t.clone() for t in (sums, d_b_dec, features, g_enc, g_dec)]
    bodies.apply_rows(features, g_enc, g_dec, parameters, adam, 0.05)
    return [*results, g_dec], parameters, adam


@pytest.mark.parametrize("how", ["visit", "halves"])
@pytest.mark.parametrize("name", CASES)
def test_a_visit_and_its_halves_are_the_definitions(name, how):
    case = Case(**CASES[name])
    centred = "E" not in CASES[name]
    bonus = 0.01 if name in ("two-planes", "all-entries") else 0.0
    ours, mine, adam = step_by(cuda, case, how, centred, bonus)
    theirs, wanted, defined = step_by(definition, case, how, centred, bonus)
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert_near(ours_, theirs_, scale=10)
    for p in mine:
        assert_near(mine[p], wanted[p], scale=10)
        assert_near(adam.second[p], defined.second[p])
    assert torch.equal(adam.row_steps, defined.row_steps)
    assert_near(mine["W_dec"].norm(dim=1), torch.ones(len(case.W_dec), device=DEVICE))


@pytest.mark.parametrize("how", ["visit", "halves"])
@pytest.mark.parametrize("name", ["one-block", "transcoder"])
def test_steps_with_a_first_moment_are_the_definitions(name, how):
    case = Case(**CASES[name], beta1=0.8)
    (_, mine, adam), (_, wanted, defined) = (
        step_by(bodies, case, how, "E" not in CASES[name], 0.0) for bodies in (cuda, definition)
    )
    for p in mine:
        assert_near(mine[p], wanted[p], scale=10)
        assert_near(adam.first[p], defined.first[p])
        assert_near(adam.second[p], defined.second[p])


def test_only_rows_of_touched_features_change():
    case = Case()
    case.threshold[::2] = 9.0
    _, parameters, _ = step_by(cuda, case, "visit", True, 0.0)
    changed = (parameters["W_dec"] != case.W_dec).any(1) | (case.W_enc != parameters["W_enc"].T).any(1)
    assert not changed[::2].any()
    assert changed[1::2].any()


@pytest.mark.parametrize("name", ["two-planes", "more-entries-than-a-part"])
def test_the_same_step_twice_gives_the_same_bits(name):
    case = Case(**CASES[name])
    results = []
    for _ in range(2):
        out, parameters, adam = step_by(cuda, case, "visit", True, 0.01)
        results.append([*out, *parameters.values(), *adam.second.values()])
        if name == "two-planes":
            results[-1] += cuda.reconstruct(case.code(), case.start.clone(), case.W_dec, case.threshold)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_batch_without_entries_is_a_step_that_changes_nothing():
    case = Case()
    empty = FeatureCode(case.x.new_zeros(0), torch.zeros(0, dtype=torch.int32, device=DEVICE),
                        pointers(torch.zeros(F, dtype=torch.int64, device=DEVICE)), B)  # fmt: skip
    parameters, adam = case.weights()
    given = (empty, *case.given(parameters, True)[1:])
    sums, d_b_dec, touched = cuda.visit(Work(*given), adam, 0.05)
    assert not any(t.any() for t in (sums, d_b_dec, touched))
    assert torch.equal(parameters["W_dec"], case.W_dec)
    residual, squares, row_l0 = cuda.reconstruct(empty, case.start.clone(), case.W_dec, case.threshold)
    assert torch.equal(residual, case.start)
    assert_near(squares, case.start.square().sum(1), scale=10)
    assert not row_l0.any()


# --- whole steps


VARIANTS = {
    "jumprelu": {},
    "clipped-prefixes": {"clip_norm": 0.5, "prefixes": (0.5,)},
    "topk-auxk": {"architecture": "topk", "k": 3, "aux_k": 2, "sparsity_weight": 0.0, "dead_after_rows": 50},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_steps_on_these_bodies_are_two_steps_as_defined(name, monkeypatch):
    common = {"sparsity_weight": 0.3, "bandwidth": BANDWIDTH, "threshold_init": 0.3, "lr": 1e-2, "adam_eps": 1e-3}
    cfg = TrainConfig(steps=10, batch_rows=16, engine="sparse", **{**common, **VARIANTS[name]})
    config, ends = SAEConfig(d_model=20, d_sae=16, scale=1.0), []
    monkeypatch.setattr(sparse, "_bodies", lambda device: (cuda, cuda_screen))
    for compiled in (True, False):
        sae = initial_sae(config, cfg).to(DEVICE)
        sae.W_enc.data = sae.W_enc.data.T.contiguous().T
        adam = Adam(dict(sae.named_parameters()), cfg.beta2, cfg.adam_eps)
        step = sparse.SparseStep(sae, cfg, adam, compiled=compiled)
        dead = torch.arange(16, device=DEVICE) >= 12 if cfg.aux_k else None
        terms = [step.update(randn(16, 20, seed=s) / math.sqrt(20), 0.3, 1e-2, dead=dead) for s in range(2)]
        ends.append((*(p.detach() for p in sae.parameters()), *adam.second.values(), *(t.loss for t in terms)))
        assert terms[0].entries > 16
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=3e-5)


def test_a_gpu_without_triton_is_refused_with_what_to_install(monkeypatch):
    assert sparse.kernels_are_there(torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainError, match="pip install triton"):
        sparse.kernels_are_there(torch.device("cuda"))


# --- compiled, not run


def test_every_kernel_compiles_for_a_gpu_and_keeps_to_their_registers():
    """For sm_90 (an H100 or H200) with Triton's own assembler; a stack is what did not fit into registers."""
    script = Path(__file__).parent / "triton_compile.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", script, "208", "208", "90"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    names = {line.split()[0] for line in lines}
    assert names >= {"screen", "decide", "expand", "reconstruct", "visit", "gradient_parts", "apply_rows"}
    assert all(int(line.split(" stack")[0].split()[-1]) <= 256 for line in lines), done.stdout
    assert all(int(line.split(" shared")[0].split()[-1]) <= 160 * 1024 for line in lines), done.stdout
