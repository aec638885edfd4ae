"""Resampling: dead features start again from what is reconstructed worst, and nothing else changes."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mistudio.errors import ConfigError, TrainError
from mistudio.sae import SAEConfig, TranscoderConfig
from mistudio.train import TrainConfig, initial_sae, train
from mistudio.train.objectives import objective_of
from mistudio.train.optimizer import Adam
from mistudio.train.resample import (
    draw_rows,
    due,
    generator_at,
    left_over,
    longest_silent,
    new_features,
    resample,
    restart,
)
from mistudio.train.state import TrainState
from tiny_training import endless, normal_rows, same_bits

D, F, B = 8, 24, 32
SAE = SAEConfig(d_model=D, d_sae=F, scale=1.0)
CFG = TrainConfig(
    steps=40,
    batch_rows=B,
    sparsity_weight=0.01,
    sparsity_warmup_steps=5,
    lr=3e-3,
    lr_warmup_steps=5,
    bandwidth=0.05,
    threshold_init=0.05,
    log_threshold=False,
    dead_after_rows=4 * B,
    log_every=5,
    checkpoint_every=10,
)


def rows(seed, width=D):
    return normal_rows(seed, B, width)


# --- when, which, from where


def test_it_is_done_every_so_many_steps_until_half_of_the_run_or_the_given_step():
    def steps(cfg):
        return [step for step in range(1, cfg.steps + 1) if due(cfg, step)]

    assert steps(CFG) == []
    assert steps(replace(CFG, resample_every=8)) == [8, 16]
    assert steps(replace(CFG, resample_every=8, resample_until=32)) == [8, 16, 24, 32]


def test_the_longest_silent_come_first_and_live_ones_never():
    silent = torch.tensor([5, 900, 100, 3, 900, 101])
    assert longest_silent(silent, 100, most=10).tolist() == [1, 4, 5, 2]
    assert longest_silent(silent, 100, most=3).tolist() == [1, 4, 5]
    assert longest_silent(silent, 1000, most=3).tolist() == []


def test_rows_are_drawn_in_proportion_to_the_squared_loss():
    losses = torch.tensor([1.0, 2.0, 0.0, 3.0])
    first = torch.stack([draw_rows(losses, 1, generator_at(seed=1, step=step)) for step in range(4000)])
    shares = torch.bincount(first[:, 0], minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([1.0, 4.0, 0.0, 9.0]) / 14, atol=0.025, rtol=0)


def test_no_row_is_drawn_twice_and_none_without_loss():
    losses = torch.tensor([1.0, 2.0, 0.0, 3.0])
    assert sorted(draw_rows(losses, 10, generator_at(0, 1)).tolist()) == [0, 1, 3]
    assert draw_rows(torch.zeros(4), 10, generator_at(0, 1)).tolist() == []


def test_a_draw_is_a_function_of_seed_and_step():
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    draws = {
        (seed, step): draw_rows(losses, 5, generator_at(seed, step)).tolist() for seed in (0, 1) for step in (1, 2)
    }
    assert draws[0, 1] == draw_rows(losses, 5, generator_at(0, 1)).tolist()
    assert len({tuple(drawn) for drawn in draws.values()}) == 4


# --- what they start with


def test_a_new_feature_writes_the_residual_of_its_row_and_reads_the_same_direction():
    x, residual = rows(0), rows(1)
    chosen, levels = torch.tensor([3, 7, 30]), torch.full((3,), 0.1)
    new = new_features(x, residual, chosen, same_space=True, norm=0.3, levels=levels, firing_rows=4)
    torch.testing.assert_close(new.W_dec, residual[chosen] / residual[chosen].norm(dim=1, keepdim=True))
    torch.testing.assert_close(new.W_enc, 0.3 * new.W_dec)


@pytest.mark.parametrize("firing_rows", [1, 4, B])
def test_a_new_feature_fires_on_its_own_row_and_as_rarely_as_that_allows(firing_rows):
    x, residual, level = rows(0).double(), rows(1).double(), 0.1
    chosen, levels = torch.arange(10), torch.full((10,), level, dtype=torch.float64)
    new = new_features(
        x,
        residual,
        chosen,
        same_space=True,
        norm=0.3,
        levels=levels,
        firing_rows=firing_rows,
    )
    for j, row in enumerate(chosen.tolist()):
        z = x @ new.W_enc[j] + new.b_enc[j]
        rank = int((z > z[row] + 1e-12).sum()) + 1  # of its own row
        assert int((z > level - 1e-9).sum()) == max(firing_rows, rank)
        assert z[row] > level - 1e-9
        assert z[z > level - 1e-9].min().item() == pytest.approx(level)


def test_a_transcoders_new_feature_reads_in_the_space_of_x():
    x, residual = rows(0), rows(1, width=5)
    chosen, levels = torch.tensor([3, 7]), torch.full((2,), 0.1)
    new = new_features(x, residual, chosen, same_space=False, norm=0.3, levels=levels, firing_rows=4)
    assert new.W_dec.shape == (2, 5)
    apart = x[chosen] - x.mean(0)
    torch.testing.assert_close(new.W_enc, 0.3 * apart / apart.norm(dim=1, keepdim=True))


ARCHITECTURES = {
    "jumprelu": {},
    "log jumprelu": {"log_threshold": True},
    "relu": {"architecture": "relu", "sparsity": "l1"},
    "topk": {"architecture": "topk", "k": 4, "sparsity_weight": 0.0},
    "batchtopk": {"architecture": "batchtopk", "k": 4, "sparsity_weight": 0.0},
}


LIVE = 21


def with_dead(change):
    """An SAE whose features from LIVE on never fire, with Adam, rows of silence and configuration."""
    cfg = replace(CFG, **ARCHITECTURES[change])
    sae = initial_sae(SAE, cfg)
    with torch.no_grad():
        sae.b_enc[LIVE:] = -50.0
    silent = torch.zeros(F, dtype=torch.int64).index_fill(0, torch.arange(LIVE, F), cfg.dead_after_rows)
    adam = Adam(dict(sae.named_parameters()), cfg.beta2, cfg.adam_eps)
    return sae, adam, silent, cfg


@pytest.mark.parametrize("change", ARCHITECTURES)
def test_what_is_left_over_is_the_definitions_residual_whatever_the_pieces(change, monkeypatch):
    sae, _, _, cfg = with_dead(change)
    x = rows(0)
    f, on = objective_of(cfg).features(sae.pre_activations(x), sae.threshold, cfg)
    for entries in (1 << 20, 5 * F):
        monkeypatch.setattr("mistudio.train.resample.CHUNK_ENTRIES", entries)
        found = left_over(sae, x, x, cfg)
        torch.testing.assert_close(found.residual, (x - f @ sae.W_dec - sae.b_dec).detach())
        torch.testing.assert_close(found.l0, on.sum(1).mean().detach())
        torch.testing.assert_close(found.least, torch.where(on > 0, f, torch.inf).min(1).values.detach())


@pytest.mark.parametrize("change", ARCHITECTURES)
def test_dead_features_fire_on_the_batch_they_started_from(change):
    sae, adam, silent, cfg = with_dead(change)
    x, theta = rows(0), sae.theta.detach().clone()
    assert resample(sae, adam, silent, x, x, cfg, step=8) == F - LIVE
    assert silent.tolist() == [0] * F
    _, on = objective_of(cfg).features(sae.pre_activations(x), sae.threshold, cfg)
    assert (on[:, LIVE:].sum(0) >= 1).all()
    assert torch.equal(sae.theta.detach(), theta)  # where it was at the start
    torch.testing.assert_close(sae.W_dec[LIVE:].norm(dim=1), torch.ones(F - LIVE))
    torch.testing.assert_close(
        sae.W_enc[:, LIVE:].norm(dim=0), 0.2 * sae.W_enc[:, :LIVE].norm(dim=0).mean().expand(F - LIVE)
    )


def test_a_threshold_that_moved_starts_again_where_it_began():
    for change, start in (("jumprelu", 0.05), ("log jumprelu", math.log(0.05))):
        sae, adam, silent, cfg = with_dead(change)
        with torch.no_grad():
            sae.theta.fill_(0.7)
        resample(sae, adam, silent, rows(0), rows(0), cfg, step=8)
        torch.testing.assert_close(sae.theta.detach(), torch.tensor([0.7] * LIVE + [start] * (F - LIVE)))


def test_nothing_starts_again_where_nothing_is_dead_or_the_batch_is_spoiled():
    sae, adam, silent, cfg = with_dead("jumprelu")
    before, x = [p.detach().clone() for p in sae.parameters()], rows(0)
    assert resample(sae, adam, torch.zeros_like(silent), x, x, cfg, step=8) == 0
    x[3, 2] = math.nan
    assert resample(sae, adam, silent, x, x, cfg, step=8) == 0
    assert all(torch.equal(p, old) for p, old in zip(sae.parameters(), before, strict=True))


def test_only_these_features_change_and_their_moments_become_the_live_ones_mean():
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "theta": (F,), "W_dec": (F, D), "b_dec": (D,)}
    parameters = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    adam = Adam(parameters, 0.9, 1e-8)
    for second in adam.second.values():
        second.copy_(torch.rand(second.shape, generator=generator, dtype=torch.float64))
    adam.steps, adam.behind = 5, True
    adam.row_steps[:] = torch.arange(F) % 6
    caught_up = Adam(parameters, 0.9, 1e-8)
    for name, second in adam.second.items():
        axis = {"W_enc": 1, "W_dec": 0}.get(name)
        factor = 1.0 if axis is None else (0.9 ** (5.0 - adam.row_steps.double())).unsqueeze(1 - axis)
        caught_up.second[name] = second * factor
    before = {name: p.clone() for name, p in parameters.items()}
    features, live = torch.tensor([2, 20]), torch.arange(F) < 12
    live[2] = False
    levels = torch.full((2,), 0.1, dtype=torch.float64)
    new = new_features(
        rows(0).double(),
        rows(1).double(),
        torch.tensor([1, 5]),
        same_space=True,
        norm=0.2,
        levels=levels,
        firing_rows=3,
    )
    restart(features, new, parameters, adam, live, theta=0.05)
    kept = torch.ones(F, dtype=torch.bool).index_fill(0, features, False)
    assert torch.equal(parameters["W_enc"][:, features], new.W_enc.T)
    assert torch.equal(parameters["W_dec"][features], new.W_dec)
    assert torch.equal(parameters["b_enc"][features], new.b_enc)
    assert parameters["theta"][features].tolist() == [0.05, 0.05]
    assert torch.equal(parameters["b_dec"], before["b_dec"])
    assert adam.row_steps.tolist() == [5] * F
    for name, p in parameters.items():
        if name == "b_dec":
            continue
        by_feature = (lambda t: t.T) if name == "W_enc" else (lambda t: t)
        assert torch.equal(by_feature(p)[kept], by_feature(before[name])[kept])
        moments, expected = by_feature(adam.second[name]), by_feature(caught_up.second[name])
        torch.testing.assert_close(moments[kept], expected[kept])
        torch.testing.assert_close(moments[features], expected[live].mean(0).expand_as(moments[features]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample_every": 0}, "resample_every must be at least 1"),
        ({"resample_until": 10}, "no effect without resample_every"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(CFG, **change)


# --- in a run


def dying_run(cfg, steps_done=None, **options):
    """A run whose features from LIVE on never fire until they start again."""
    sae = initial_sae(SAE, cfg)
    with torch.no_grad():
        sae.b_enc[LIVE:] = -50.0
    source = endless(rows)
    return train(sae, source if steps_done is None else itertools.islice(source, steps_done), cfg, **options)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize("change", ARCHITECTURES)
def test_dead_features_come_back_to_life_and_the_line_says_how_many(change, engine):
    cfg = replace(CFG, engine=engine, **ARCHITECTURES[change])
    without, done = dying_run(cfg), dying_run(replace(cfg, resample_every=8))
    assert [line["dead"] for line in without.history] == [F - LIVE] * 8
    assert [line["dead"] for line in done.history] == [F - LIVE] + [0] * 7
    assert [line["resampled"] for line in done.history] == [0, F - LIVE] + [0] * 6
    assert "resampled" not in without.history[0]


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_a_transcoders_dead_features_start_again_from_what_it_fails_to_write(engine):
    cfg = replace(CFG, engine=engine, resample_every=8, dead_after_rows=4 * B, pre_encoder_bias=False)
    sae = initial_sae(TranscoderConfig(d_model=D, d_sae=F, d_out=5, skip=True, scale=1.0, scale_out=1.0), cfg)
    with torch.no_grad():
        sae.b_enc[LIVE:] = -50.0
    state = TrainState(sae, cfg)
    for seed in range(8):
        state.update(rows(seed), 2 * rows(seed)[:, :5].abs())
    assert int(state.resampled) == F - LIVE
    f = sae(rows(7))[1]
    assert (f[:, LIVE:] > 0).any(0).all()
    state.update(rows(8), 2 * rows(8)[:, :5].abs())
    state.check_finite()


def test_features_that_started_again_learn_what_was_missing():
    """Rows are sums of a few of 24 directions; two thirds of the features begin dead."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)

    def source():
        while True:
            on = (torch.rand(B, F, generator=generator) < 0.06) * (0.5 + torch.rand(B, F, generator=generator))
            yield on @ directions / 1.25

    def last_mse(cfg):
        sae = initial_sae(SAE, cfg)
        with torch.no_grad():
            sae.b_enc[8:] = -50.0
        generator.manual_seed(1)
        return train(sae, source(), cfg).history[-1]["mse"]

    cfg = replace(CFG, steps=300, log_every=100, sparsity_weight=0.02, lr=1e-2)
    assert last_mse(replace(cfg, resample_every=20)) < 0.5 * last_mse(cfg)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_a_run_in_which_nothing_is_due_or_dead_keeps_its_bits(engine):
    cfg = replace(CFG, engine=engine)
    plain = train(initial_sae(SAE, cfg), endless(rows), cfg)
    for change in ({"resample_every": 1000}, {"resample_every": 3}):
        on = replace(cfg, dead_after_rows=10**9, **change)
        other = train(initial_sae(SAE, on), endless(rows), on)
        assert same_bits(plain.sae, other.sae)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize("stopped", [12, 20])
def test_a_resumed_run_starts_the_same_features_again_from_the_same_rows(tmp_path, engine, stopped):
    cfg = replace(
        CFG,
        engine=engine,
        resample_every=8,
        resample_until=32,
        sparsity_weight=0.3,
        sparsity="target_mean_l0",
        target_l0=1.0,
    )
    whole = dying_run(cfg, folder=tmp_path / "whole")
    assert sum(line["resampled"] for line in whole.history) >= F - LIVE
    with pytest.raises(TrainError, match="ended after"):
        dying_run(cfg, stopped, folder=tmp_path / "run")
    dying_run(cfg, folder=tmp_path / "run", resume=True)
    last = Path("checkpoints") / "step-000000040.safetensors"
    for name in ("metrics.jsonl", last):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
