"""The sparse step is the dense step: gradients, optimiser, bits of a rerun and of a resumed run."""

import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch

from mistudio.errors import TrainError
from mistudio.train import initial_sae, sparse, train
from mistudio.train.loss import loss
from mistudio.train.sparse import SparseStep
from mistudio.train.state import TrainState
from tiny_training import (
    SAE,
    SPARSE_RUN,
    B,
    D,
    F,
    Source,
    adam_of,
    dense_step,
    feature_major,
    files,
    normal_rows,
    parameters,
    same_bits,
)

pytest.importorskip("numba")

CFG = SPARSE_RUN
PENALTIES = [("l0", None), ("target_mean_l0", 4.0), ("target_token_l0", 4.0)]
VARIANTS = [
    {"sparsity": sparsity, "target_l0": target, "log_threshold": log, "pre_encoder_bias": bias}
    for (sparsity, target), log, bias in itertools.product(PENALTIES, (False, True), (False, True))
]
NAMES = ("W_enc", "b_enc", "theta", "W_dec", "b_dec")


def batch(seed=0, rows=B, width=D):
    return normal_rows(seed, rows, width)


def sae_of(cfg, dtype=torch.float32, config=SAE, silent=5):
    """Away from its starting point, feature-major as a TrainState makes it; its first features never fire."""
    sae = initial_sae(config, cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in (sae.W_enc, sae.b_enc, sae.b_dec):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        sae.theta.add_(0.2 * torch.rand(sae.theta.shape, generator=generator))
        sae.theta[:silent] = 5.0
    return feature_major(sae.to(dtype))


def edge(sae, x, cfg):
    """How near any z comes to a place where it would be decided otherwise."""
    z = sae.pre_activations(x).detach() - sae.threshold.detach()
    return torch.stack([(z - at).abs().min() for at in (-cfg.bandwidth / 2, 0.0, cfg.bandwidth / 2)]).min()


# --- one step


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_the_definition_is_the_dense_step_in_float64(variant):
    cfg = replace(CFG, **variant)
    sparse_sae, dense_sae, x = sae_of(cfg, torch.float64), sae_of(cfg, torch.float64), batch().double()
    assert edge(dense_sae, x, cfg) > 1e-12
    ours = SparseStep(sparse_sae, cfg, adam_of(sparse_sae, cfg), compiled=False).update(x, 0.3, 0.01)
    theirs = dense_step(dense_sae, x, cfg, adam_of(dense_sae, cfg), 0.3, 0.01)
    for name in NAMES:
        torch.testing.assert_close(parameters(sparse_sae)[name], parameters(dense_sae)[name], atol=1e-12, rtol=1e-12)
    for name in ("loss", "mse", "l0", "fired"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_every_gradient_is_that_of_the_dense_float64_step_to_float32_rounding(variant, compiled):
    """With Adam's ε at 1e4 the update is -lr·g/ε, and the second moment is (1 - β₂)·g²: so both show the gradient."""
    cfg, eps = replace(CFG, **variant), 1e4
    sparse_sae, dense_sae, x = sae_of(cfg), sae_of(cfg, torch.float64), batch()
    assert edge(dense_sae, x.double(), cfg) > 1e-5
    before, defined = parameters(dense_sae), loss(dense_sae, x.double(), cfg, 0.3)
    ours, theirs = adam_of(sparse_sae, cfg, eps), adam_of(dense_sae, cfg, eps)
    terms = SparseStep(sparse_sae, cfg, ours, compiled=compiled).update(x, 0.3, 0.1 * eps)
    expected = dense_step(dense_sae, x.double(), cfg, theirs, 0.3, 0.1 * eps)
    for name in NAMES:
        moved, wanted = (parameters(s)[name].double() - before[name] for s in (sparse_sae, dense_sae))
        torch.testing.assert_close(moved, wanted, atol=1e-6, rtol=1e-5)
        assert wanted.abs().max() > 1e-4
        second, wanted = ours.second[name].double().sqrt(), theirs.second[name].sqrt()
        torch.testing.assert_close(second, wanted, atol=2e-6 * float(wanted.max()), rtol=1e-5)
    for name in ("loss", "mse", "l0", "fired"):
        torch.testing.assert_close(getattr(terms, name).double(), getattr(expected, name), atol=1e-6, rtol=1e-6)
    assert terms.entries == defined.entries


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("side", [-1, 1])
def test_each_half_of_the_window_moves_the_threshold(compiled, side):
    """One feature, whose z lies just below (or above) θ in one row and far below in the others."""
    cfg = replace(CFG, pre_encoder_bias=False)
    sae = sae_of(cfg, silent=F)
    x = 0.01 * batch()
    x[3] = batch()[3]
    j = 7
    with torch.no_grad():
        z = sae.pre_activations(x)[3, j]
        sae.b_enc[j] += 1.0 - z
        sae.theta[j] = 1.0 - side * 0.05
    before = parameters(sae)
    terms = SparseStep(sae, cfg, adam_of(sae, cfg), compiled=compiled).update(x, 1.0, 0.01)
    assert (float(terms.entries), float(terms.l0) * B) == (1, pytest.approx(float(side > 0)))
    moved = {name for name in NAMES if not torch.equal(parameters(sae)[name], before[name])}
    assert moved == ({"theta", "b_dec"} if side < 0 else {*NAMES})
    assert (sae.theta.detach() != before["theta"]).nonzero().flatten().tolist() == [j]
    assert (sae.W_dec.detach() != before["W_dec"]).any(1).nonzero().flatten().tolist() == ([j] if side > 0 else [])


@pytest.mark.parametrize("compiled", [False, True])
def test_thresholds_at_half_the_window_are_treated_as_the_dense_step_does(compiled):
    cfg = replace(CFG, pre_encoder_bias=False)
    pair = [sae_of(cfg, silent=0), sae_of(cfg, torch.float64, silent=0)]
    for sae in pair:
        with torch.no_grad():
            sae.theta.fill_(cfg.bandwidth / 2)  # the window reaches from 0 to ε
    x = batch()
    assert edge(pair[1], x.double(), cfg) > 1e-6
    SparseStep(pair[0], cfg, adam_of(pair[0], cfg, 1e4), compiled=compiled).update(x, 1.0, 1e3)
    dense_step(pair[1], x.double(), cfg, adam_of(pair[1], cfg, 1e4), 1.0, 1e3)
    for name in NAMES:
        torch.testing.assert_close(parameters(pair[0])[name].double(), parameters(pair[1])[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_in_which_nothing_fires_moves_b_dec_alone(compiled):
    sae = sae_of(CFG, silent=F)
    before = parameters(sae)
    terms = SparseStep(sae, CFG, adam_of(sae, CFG), compiled=compiled).update(batch(), 1.0, 0.01)
    assert (float(terms.l0), float(terms.entries)) == (0, 0)
    assert {name for name in NAMES if not torch.equal(parameters(sae)[name], before[name])} == {"b_dec"}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_a_weight_that_is_no_number_reaches_the_loss(compiled, name):
    sae = sae_of(CFG)
    with torch.no_grad():
        (sae.W_enc.T if name == "W_enc" else sae.W_dec)[20, 3] = math.nan
    terms = SparseStep(sae, CFG, adam_of(sae, CFG), compiled=compiled).update(batch(rows=200), 1.0, 0.01)
    assert not terms.loss.isfinite()


# --- the lazy optimiser


def rare(cfg, dtype):
    """An SAE and batches in which features fire from always to almost never, and some not at all."""
    sae = sae_of(cfg, dtype, replace(SAE, d_model=6, d_sae=24), silent=2)
    with torch.no_grad():
        sae.theta.mul_(torch.linspace(0.6, 2.6, 24))
    generator = torch.Generator().manual_seed(11)
    return sae, (torch.randn(6, 6, generator=generator).to(dtype) / math.sqrt(6) for _ in itertools.count())


RARE = replace(CFG, sparsity_weight=0.02, lr=3e-4)
STEPS = 3000


def warming(step):
    return RARE.lr * min(1, (step + 1) / 300)


@pytest.fixture(scope="module")
def dense_end():
    """Parameters and second moments after 3,000 dense steps in float64."""
    sae, batches = rare(RARE, torch.float64)
    adam = adam_of(sae, RARE)
    for step, x in zip(range(STEPS), batches, strict=False):
        dense_step(sae, x, RARE, adam, RARE.sparsity_weight, warming(step))
    return parameters(sae), adam.second


@pytest.mark.parametrize("compiled", [False, True])
def test_three_thousand_lazy_steps_are_three_thousand_dense_steps(compiled, dense_end):
    """In float64, with warm-up, tangent projection and renormalisation. Screening exists in float32 only, so the
    compiled visit is given the definition's entries."""
    sae, batches = rare(RARE, torch.float64)
    adam, counts = adam_of(sae, RARE), torch.zeros(24)
    step = SparseStep(sae, RARE, adam, compiled=compiled)
    step.select = SparseStep(sae, RARE, adam, compiled=False).select
    for i, x in zip(range(STEPS), batches, strict=False):
        counts += step.update(x, RARE.sparsity_weight, warming(i)).fired > 0
    assert (counts == 0).sum() >= 2
    assert ((counts > 0) & (counts < STEPS / 10)).any()
    assert counts.max() > STEPS / 2
    adam.catch_up()
    for name in NAMES:
        torch.testing.assert_close(parameters(sae)[name], dense_end[0][name], atol=1e-12, rtol=0)
        torch.testing.assert_close(adam.second[name], dense_end[1][name], atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("compiled", [False, True])
def test_features_that_never_fire_keep_the_bits_of_their_rows(compiled):
    sae = sae_of(CFG)
    before, adam = parameters(sae), adam_of(sae, CFG)
    adam.second["W_dec"].fill_(1.0)
    step = SparseStep(sae, CFG, adam, compiled=compiled)
    for seed in range(5):
        step.update(batch(seed), 0.3, 0.01)
    assert torch.equal(sae.W_dec[:5], before["W_dec"][:5])
    assert torch.equal(sae.W_enc[:, :5], before["W_enc"][:, :5])
    assert adam.row_steps[:5].tolist() == [0] * 5
    assert adam.row_steps.max() == 5
    adam.catch_up()
    torch.testing.assert_close(adam.second["W_dec"][:5], torch.full((5, D), CFG.beta2**5))
    assert adam.row_steps.tolist() == [5] * F


def test_dense_steps_between_sparse_ones_change_rounding_only():
    sae, reference = sae_of(CFG), sae_of(CFG, torch.float64)
    adam, dense_adam = adam_of(sae, CFG, 1e-3), adam_of(reference, CFG, 1e-3)
    step = SparseStep(sae, CFG, adam, compiled=True)
    for seed in range(20):
        x = batch(seed)
        assert edge(reference, x.double(), CFG) > 1e-6
        if seed % 5 == 3:
            dense_step(sae, x, CFG, adam, 0.3, 1e-3)
            step.stale = True
        else:
            step.update(x, 0.3, 1e-3)
        dense_step(reference, x.double(), CFG, dense_adam, 0.3, 1e-3)
    for name in NAMES:
        torch.testing.assert_close(parameters(sae)[name].double(), parameters(reference)[name], atol=1e-5, rtol=1e-5)


# --- the bits


def wide_run(threads=1, engine="sparse"):
    cfg = replace(CFG, batch_rows=300, engine=engine)
    config = replace(SAE, d_model=33, d_sae=700)
    torch.set_num_threads(threads)
    try:
        state = TrainState(sae_of(cfg, config=config), cfg)
        for seed in range(6):
            state.update(batch(seed, 300, 33))
    finally:
        torch.set_num_threads(1)
    return state.tensors()


def test_the_same_steps_give_the_same_bits_on_any_number_of_threads():
    first = wide_run()
    for threads in (1, 2, 3):
        again = wide_run(threads)
        different = [name for name in first if name != "sums" and not torch.equal(first[name], again[name])]
        assert different == []


def run(folder, cfg, source, resume=False):
    return train(initial_sae(SAE, cfg), source, cfg, folder=folder, resume=resume).sae


AUTO = replace(CFG, engine="auto", threshold_init=0.11, sparsity_weight=30.0, lr=0.05)
"""Starts with many entries and ends with few, so that auto changes from dense to sparse on the way."""


@pytest.fixture
def crossover(monkeypatch):
    """A crossover that the tiny run crosses, and a record of which steps were sparse."""
    monkeypatch.setattr(sparse, "CROSSOVER", 0.3)
    taken, update = [], SparseStep.update

    def recorded(self, *args):
        taken.append(self.adam.steps)
        return update(self, *args)

    monkeypatch.setattr(SparseStep, "update", recorded)
    return taken


@pytest.mark.parametrize("cfg", [CFG, AUTO], ids=["sparse", "auto"])
@pytest.mark.parametrize("died", [8, 14, 27])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, crossover, cfg, died):
    whole = run(tmp_path / "whole", cfg, Source(batch))
    with pytest.raises(RuntimeError):
        run(tmp_path / "run", cfg, Source(batch, fail_at=died))
    resumed = run(tmp_path / "run", cfg, Source(batch), resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert same_bits(whole, resumed)


def test_when_checkpoints_are_written_leaves_no_trace(tmp_path):
    saes = [run(tmp_path / str(every), replace(CFG, checkpoint_every=every), Source(batch)) for every in (3, 10, 1000)]
    assert same_bits(*saes)


def test_the_trained_weights_are_contiguous_again():
    sae = train(initial_sae(SAE, CFG), Source(batch), CFG).sae
    assert all(p.is_contiguous() for p in sae.parameters())


# --- the choice


def test_auto_is_dense_until_the_code_is_sparse(crossover):
    train(initial_sae(SAE, AUTO), Source(batch), AUTO)
    first = crossover[0]
    assert 0 < first < 20
    assert crossover == list(range(first, AUTO.steps))


def test_auto_ends_where_dense_ends_but_for_rounding(crossover):
    cfg = replace(AUTO, adam_eps=1e-3)
    ends = [train(initial_sae(SAE, c), Source(batch), c).sae for c in (cfg, replace(cfg, engine="dense"))]
    assert crossover
    for name in NAMES:
        ours, theirs = (parameters(sae)[name] for sae in ends)
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_dense_is_never_sparse(crossover):
    train(initial_sae(SAE, CFG), Source(batch), replace(CFG, engine="dense"))
    assert crossover == []


@pytest.fixture
def no_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)  # what import sees where a package is absent
    sparse.numba_is_there.cache_clear()
    yield
    sparse.numba_is_there.cache_clear()


def test_without_numba_auto_is_dense_and_says_so_once(no_numba, crossover, recwarn):
    for _ in range(2):
        train(initial_sae(SAE, AUTO), Source(batch), AUTO)
    assert crossover == []
    assert [str(w.message)[:22] for w in recwarn if "numba" in str(w.message)] == ["numba is not installed"]


def test_without_numba_sparse_runs_as_defined(no_numba, crossover):
    with pytest.warns(UserWarning, match="pip install numba"):
        done = train(initial_sae(SAE, CFG), Source(batch), CFG)
    assert len(crossover) == CFG.steps
    dense = train(initial_sae(SAE, CFG), Source(batch), replace(CFG, engine="dense"))
    assert done.history[0]["loss"] == pytest.approx(dense.history[0]["loss"], rel=1e-4)


def test_the_sparse_engine_is_refused_off_cpus_and_gpus():
    with pytest.raises(TrainError, match="runs on CPUs and CUDA GPUs, and the SAE is on meta"):
        TrainState(initial_sae(SAE, CFG).to("meta"), CFG)
