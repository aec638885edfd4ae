"""Adam with a first moment: rows step when they have a gradient, however the step is computed; and how runs start."""

import json
import math
from dataclasses import replace

import pytest
import torch

from mistudio.errors import ConfigError
from mistudio.sae import SAEConfig, TranscoderConfig
from mistudio.train import initial_sae, train
from mistudio.train.memory import training_bytes
from mistudio.train.optimizer import Adam
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

CFG = replace(SPARSE_RUN, sparsity_weight=0.05, lr=3e-3, beta1=0.8, beta2=0.95)


def batch(seed):
    return normal_rows(seed, B, D)


def sae_of(cfg, dtype=torch.float64):
    """Features fire from always to almost never, two not at all."""
    sae = initial_sae(SAE, cfg)
    with torch.no_grad():
        sae.theta.mul_(torch.linspace(0.4, 2.6, F))
        sae.theta[:2] = 5.0
    return feature_major(sae.to(dtype))


def test_rows_step_as_in_torchs_sparse_adam_and_vectors_as_in_its_adam():
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(5, 7, generator=generator, dtype=torch.float64) for name in ("W_enc", "W_dec")}
    start |= {"b_dec": torch.randn(7, generator=generator, dtype=torch.float64)}
    ours = {name: p.clone() for name, p in start.items()}
    ours["W_enc"] = ours["W_enc"].T.contiguous()
    theirs = {name: p.clone().requires_grad_() for name, p in start.items()}
    adam = Adam(ours, 0.95, 1e-30, vector_lr=0.5, beta1=0.8)
    how = {"betas": (0.8, 0.95), "eps": 1e-30}  # torch's two add a larger one in different places
    sparse = torch.optim.SparseAdam([theirs["W_enc"], theirs["W_dec"]], lr=0.01, **how)
    dense = torch.optim.Adam([theirs["b_dec"]], lr=0.005, **how)
    for step in range(60):
        features = torch.arange(5)[torch.rand(5, generator=generator) < 0.1 + 0.2 * torch.arange(5)]
        gradients = {name: torch.zeros(5, 7, dtype=torch.float64) for name in ("W_enc", "W_dec")}
        for name, g in gradients.items():
            g[features] = torch.randn(len(features), 7, generator=generator, dtype=torch.float64)
            theirs[name].grad = torch.sparse_coo_tensor(features[None], g[features], g.shape, check_invariants=False)
        theirs["b_dec"].grad = torch.randn(7, generator=generator, dtype=torch.float64)
        sparse.step()
        dense.step()
        vectors = {"b_dec": theirs["b_dec"].grad}
        if step % 2:
            adam.update({"W_enc": gradients["W_enc"].T, "W_dec": gradients["W_dec"], **vectors}, 0.01)
        else:
            adam.update_rows(features, {name: g[features] for name, g in gradients.items()}, 0.01)
            adam.update(vectors, 0.01)
    for name, p in ours.items():
        expected = theirs[name].detach()
        torch.testing.assert_close(p.T if name == "W_enc" else p, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_sparse_steps_are_dense_steps_in_float64(compiled):
    """The compiled visit is given the definition's entries, since screening exists in float32 only."""
    if compiled:
        pytest.importorskip("numba")
    ours, theirs = sae_of(CFG), sae_of(CFG)
    adam, dense_adam, fired = adam_of(ours, CFG), adam_of(theirs, CFG), torch.zeros(F)
    step = SparseStep(ours, CFG, adam, compiled=compiled)
    step.select = SparseStep(ours, CFG, adam, compiled=False).select
    for seed in range(300):
        x = batch(seed).double()
        fired += step.update(x, 0.05, CFG.lr).fired > 0
        dense_step(theirs, x, CFG, dense_adam, 0.05, CFG.lr)
    assert (fired == 0).sum() >= 2
    assert ((fired > 0) & (fired < 100)).any()
    for name, p in parameters(ours).items():
        torch.testing.assert_close(p, parameters(theirs)[name], atol=1e-12, rtol=0)
        torch.testing.assert_close(adam.first[name], dense_adam.first[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{"micro_features": 7}, {"engine": "sparse"}])
def test_other_ways_to_the_step_change_rounding_only(options):
    if options.get("engine") == "sparse":
        pytest.importorskip("numba")
    ends = []
    for more in ({}, options):
        cfg = replace(CFG, engine="dense") if not more else replace(CFG, **{"engine": "dense", **more})
        state = TrainState(sae_of(cfg, torch.float32), cfg)
        for seed in range(20):
            state.update(batch(seed))
        ends.append(parameters(state.sae))
    for name, p in ends[0].items():
        torch.testing.assert_close(ends[1][name], p, atol=2e-5, rtol=0)


@pytest.mark.parametrize("died", [8, 14, 27])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, died):
    def run(folder, source, resume=False):
        return train(initial_sae(SAE, CFG), source, CFG, folder=folder, resume=resume).sae

    whole = run(tmp_path / "whole", Source(batch))
    with pytest.raises(RuntimeError):
        run(tmp_path / "run", Source(batch, fail_at=died))
    resumed = run(tmp_path / "run", Source(batch), resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert same_bits(whole, resumed)


def test_a_run_begun_before_there_was_a_first_moment_goes_on_without(tmp_path):
    cfg = replace(CFG, beta1=0.0)

    def run(source, resume=False):
        return train(initial_sae(SAE, cfg), source, cfg, folder=tmp_path / "run", resume=resume).sae

    with pytest.raises(RuntimeError):
        run(Source(batch, fail_at=14))
    record = tmp_path / "run/run.json"
    start = json.loads(record.read_text())
    for name in ("beta1", "encoder_init", "start_factor", "lr_width"):
        del start["train"][name]
    record.write_text(json.dumps(start))
    resumed = run(Source(batch), resume=True)
    assert same_bits(resumed, train(initial_sae(SAE, cfg), Source(batch), cfg).sae)


def test_features_that_start_again_have_no_first_moment():
    cfg = replace(CFG, engine="dense", resample_every=4, resample_until=4, dead_after_rows=3 * B)
    state = TrainState(sae_of(cfg, torch.float32), cfg)
    for seed in range(3):
        state.update(batch(seed))
    dead = state.silent_rows >= cfg.dead_after_rows
    state.adam.first["b_enc"].fill_(1.0)
    state.update(batch(3))
    again = dead & (state.silent_rows == 0)
    assert again[:2].all()
    for name in ("W_dec", "b_enc", "theta"):
        assert not state.adam.first[name][:2].any()
    assert not state.adam.first["W_enc"][:, :2].any()


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_on_other_widths_matrices_take_another_learning_rate_and_vectors_the_same(engine):
    ends = []
    for lr in ({"lr": 0.02, "vector_lr": 0.5}, {"lr": 0.01, "lr_width": 4 * D}):
        cfg = replace(CFG, engine=engine, **lr)
        state = TrainState(sae_of(cfg, torch.float32), cfg)
        for seed in range(5):
            state.update(batch(seed))
        ends.append(state.sae)
    assert same_bits(*ends)


def test_first_moments_are_counted_and_only_where_they_are():
    cpu = torch.device("cpu")
    with_them, without = (training_bytes(SAE, replace(CFG, beta1=b), cpu) for b in (0.8, 0.0))
    assert with_them.pop("first moments") == with_them["second moments"] == 4 * (2 * D * F + 2 * F + D)
    assert with_them == without


@pytest.mark.parametrize(("d_model", "d_sae"), [(64, 512), (256, 2048)])
@pytest.mark.parametrize("log_threshold", [False, True])
def test_on_rows_that_point_anywhere_a_run_starts_with_the_l0_asked_for(d_model, d_sae, log_threshold):
    target = {"sparsity": "target_mean_l0", "target_l0": 8.0, "start_factor": 4.0}
    cfg = replace(CFG, **target, encoder_init=0.3, bandwidth=1e-3, log_threshold=log_threshold)
    sae = initial_sae(SAEConfig(d_model=d_model, d_sae=d_sae, scale=1.0), cfg)
    rows = normal_rows(0, 4000, d_model)
    with torch.no_grad():
        l0 = float((sae.pre_activations(rows) > sae.threshold).sum(1).float().mean())
    assert l0 == pytest.approx(32.0, rel=0.05)
    assert math.isclose(sae.W_enc.norm(dim=0).mean().item(), 0.3, rel_tol=1e-5)


def test_thresholds_never_start_below_half_the_bandwidth():
    cfg = replace(CFG, sparsity="target_mean_l0", target_l0=30.0, start_factor=9.0)
    assert (initial_sae(SAE, cfg).threshold == CFG.bandwidth / 2).all()


def test_a_transcoders_encoder_starts_short_too():
    config = TranscoderConfig(d_model=D, d_out=9, d_sae=F, scale=1.0, scale_out=1.0)
    short, long = (initial_sae(config, replace(CFG, encoder_init=part)) for part in (0.25, 1.0))
    assert torch.equal(short.W_enc, 0.25 * long.W_enc)
    assert torch.equal(short.W_dec, long.W_dec)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"beta1": 1.0}, "beta1 must be at least 0 and below 1, not 1.0"),
        ({"beta1": -0.1}, "beta1 must be"),
        ({"encoder_init": 0.0}, "encoder_init must be a positive number"),
        ({"start_factor": -3.0}, "start_factor must be a positive number"),
        ({"start_factor": 3.0}, "start_factor multiplies the target_l0 of jumprelu, and there is none"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=said):
        replace(CFG, **wrong)
