"""Recipes: Gemma Scope's numbers are the published ones, and quick meets its target."""

import dataclasses
import math

import pytest
import torch

from mistudio.recipes import batchtopk, differences, gemma_scope, gemma_scope_2, quick, relu, topk
from mistudio.sae import SAEConfig
from mistudio.train import initial_sae, train
from mistudio.train.schedules import length_warnings


def test_gemma_scope_is_the_published_recipe():
    cfg = gemma_scope()
    assert (cfg.bandwidth, cfg.threshold_init, cfg.log_threshold) == (0.001, 0.001, True)
    assert (cfg.lr, cfg.beta2, cfg.adam_eps) == (7e-5, 0.999, 1e-8)
    assert (cfg.lr_warmup_steps, cfg.lr_decay_fraction, cfg.sparsity_warmup_steps) == (1000, 0.0, 10_000)
    assert (cfg.sparsity, cfg.sparsity_weight, cfg.target_l0) == ("l0", 6e-4, None)
    assert (cfg.batch_rows, cfg.steps) == (4096, math.ceil(4e9 / 4096))
    assert (cfg.pre_encoder_bias, cfg.b_dec_init) == (True, "zero")


def test_gemma_scope_2_differs_from_gemma_scope_in_what_its_report_says():
    cfg = gemma_scope_2(target_l0=60.0)
    assert (cfg.sparsity, cfg.target_l0, cfg.sparsity_warmup_steps) == ("target_token_l0", 60.0, 50_000)
    assert cfg.frequency_limit == 0.1
    assert cfg.frequency_weight > 0
    assert list(cfg.prefixes) == sorted(cfg.prefixes) != []
    assert set(differences(cfg)) == {
        "frequency_weight",
        "prefixes",
        "sparsity",
        "sparsity_warmup_steps",
        "sparsity_weight",
        "target_l0",
    }


def test_differences_name_what_is_not_gemma_scopes():
    assert differences(gemma_scope(seed=3)) == {}
    found = differences(quick())
    assert found["bandwidth"] == (0.01, 0.001)
    assert found["sparsity"] == ("target_mean_l0", "l0")
    assert "log_every" not in found
    assert {"lr", "steps", "log_threshold", "b_dec_init", "target_l0"} <= set(found)


@pytest.mark.parametrize("steps", [20, 300, 1500, 10_000])
def test_quick_is_never_shorter_than_its_warm_ups(steps):
    assert length_warnings(quick(steps=steps)) == []


def test_a_warm_up_of_no_penalty_is_not_warned_of():
    cfg = dataclasses.replace(topk(), steps=200, lr_warmup_steps=10)
    assert length_warnings(cfg) == []


def superposition(width, directions, active, rows, seed=0):
    """Endless normalised rows: `active` of `directions` random directions on average, a mean, a little noise."""
    generator = torch.Generator().manual_seed(seed)
    D = torch.nn.functional.normalize(torch.randn(directions, width, generator=generator), dim=1)
    mean = torch.randn(width, generator=generator) / 2

    def draw(n):
        on = torch.rand(n, directions, generator=generator) < active / directions
        strength = 0.5 + torch.rand(n, directions, generator=generator)
        return (on * strength) @ D + mean + 0.05 * torch.randn(n, width, generator=generator)

    scale = draw(4096).square().sum(1).mean().sqrt()
    while True:
        yield draw(rows) / scale


def test_quick_meets_its_target_l0_and_reconstructs():
    cfg = quick(target_l0=4.0, steps=800, batch_rows=256)
    data = superposition(width=32, directions=48, active=3, rows=cfg.batch_rows)
    sae = train(initial_sae(SAEConfig(d_model=32, d_sae=96, scale=1.0), cfg), data, cfg).sae
    x = torch.cat([next(data) for _ in range(16)])
    with torch.no_grad():
        x_hat, f = sae(x)
    l0 = (f > 0).sum(1).float().mean().item()
    fvu = ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert l0 == pytest.approx(4.0, rel=0.05)
    assert fvu < 0.15


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_the_frequency_penalty_leaves_no_feature_above_its_limit(weight):
    """Without it, from a start that is half full, features stand for the data's mean and are on nearly always."""
    cfg = dataclasses.replace(
        quick(target_l0=6.0, steps=250, batch_rows=256),
        b_dec_init="zero",
        bandwidth=0.02,
        threshold_init=0.02,
        start_factor=None,
        encoder_init=1.0,
        lr_width=None,
        beta1=0.0,
        lr=3e-3,
        vector_lr=1.0,
        lr_decay_fraction=0.3,
        beta2=0.999,
        frequency_weight=weight,
    )
    data = superposition(width=32, directions=24, active=4, rows=cfg.batch_rows)
    sae = train(initial_sae(SAEConfig(d_model=32, d_sae=96, scale=1.0), cfg), data, cfg).sae
    with torch.no_grad():
        frequency = (sae.encode(torch.cat([next(data) for _ in range(16)])) > 0).float().mean(0)
    assert (frequency > 0.1).sum() == 0 if weight else (frequency > 0.9).sum() > 0


@pytest.mark.parametrize("recipe", [topk, batchtopk, relu])
def test_the_other_architectures_recipes_reconstruct(recipe):
    cfg = recipe(steps=300, batch_rows=256)
    if cfg.k is not None:
        cfg = dataclasses.replace(cfg, k=4, aux_k=16)
    data = superposition(width=32, directions=48, active=3, rows=cfg.batch_rows)
    last = train(initial_sae(SAEConfig(d_model=32, d_sae=96, scale=1.0), cfg), data, cfg).history[-1]
    assert last["fvu"] < 0.25
    assert last["l0"] == pytest.approx(4.0, rel=0.02) if cfg.k else last["l0"] < 24
