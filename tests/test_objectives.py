"""Every architecture that is trained: its loss is its equation, its engines agree, and it is released as trained."""

import json
from dataclasses import replace

import pytest
import torch

from mistudio import cli
from mistudio.errors import ConfigError, TrainError
from mistudio.hub.formats import native
from mistudio.sae import BatchTopKSAE, JumpReLUSAE, ReLUSAE, SAEConfig, TopKSAE, Transcoder, TranscoderConfig
from mistudio.store import Store
from mistudio.train import initial_sae, train
from mistudio.train.blocked import blocked_update
from mistudio.train.loss import loss, loss_and_gradients
from mistudio.train.objectives import objective_of
from mistudio.train.objectives.auxk import auxiliary_loss
from mistudio.train.objectives.batchtopk import AVERAGED_STEPS, largest_of_batch
from mistudio.train.optimizer import clip_factor
from mistudio.train.sparse import SparseStep
from mistudio.train.state import TrainState
from test_store import A as SITE
from test_store import B as SITE_OUT
from test_store import make
from tiny_training import (
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

E = 9
SAE = SAEConfig(d_model=D, d_sae=F, scale=1.5, hook_name="layers.1.resid_post", hook_layer=1)
CODER = TranscoderConfig(d_model=D, d_out=E, d_sae=F, scale=1.5, scale_out=0.5, hook_name="layers.1.resid_mid")
JUMPRELU = replace(SPARSE_RUN, steps=12, engine="auto", log_every=5, checkpoint_every=5, dead_after_rows=3 * B)
RELU = replace(JUMPRELU, architecture="relu", sparsity="l1")
TOPK = replace(JUMPRELU, architecture="topk", sparsity_weight=0.0, k=4)
BATCHTOPK = replace(TOPK, architecture="batchtopk")
CASES = {
    "jumprelu": (JUMPRELU, SAE),
    "frequency": (replace(JUMPRELU, frequency_weight=2.0), SAE),
    "gemma-scope-2": (
        replace(
            JUMPRELU, sparsity="target_token_l0", target_l0=3.0, frequency_weight=2.0, prefixes=(0.125, 0.5),
            log_threshold=True,
        ),
        SAE,
    ),
    "jumprelu-aux": (replace(JUMPRELU, aux_k=3, aux_weight=0.5, frequency_weight=2.0), SAE),
    "jumprelu-aux-prefixes": (replace(JUMPRELU, aux_k=5, prefixes=(0.25,), log_threshold=True), SAE),
    "no-centre": (replace(JUMPRELU, pre_encoder_bias=False, prefixes=(0.3,)), SAE),
    "relu": (RELU, SAE),
    "relu-prefixes": (replace(RELU, prefixes=(0.25,)), SAE),
    "topk": (TOPK, SAE),
    "topk-aux": (replace(TOPK, aux_k=6), SAE),
    "topk-aux-prefixes": (replace(TOPK, aux_k=6, prefixes=(0.25, 0.5)), SAE),
    "batchtopk": (BATCHTOPK, SAE),
    "batchtopk-aux": (replace(BATCHTOPK, aux_k=3, aux_weight=0.5), SAE),
    "coder": (JUMPRELU, CODER),
    "coder-skip": (replace(JUMPRELU, frequency_weight=1.0, log_threshold=True), replace(CODER, skip=True)),
    "coder-aux": (replace(JUMPRELU, aux_k=4, aux_weight=1.0), CODER),
    "coder-relu-skip-prefixes": (replace(RELU, prefixes=(0.5,)), replace(CODER, skip=True)),
    "coder-batchtopk-aux": (replace(BATCHTOPK, aux_k=5), CODER),
}  # fmt: skip
EVERY = pytest.mark.parametrize("case", CASES)
ENGINES = pytest.mark.parametrize("compiled", [False, True])


def batch(config, seed=0, dtype=torch.float32, rows=B):
    """(x,), or (x, y) for a transcoder."""
    x, y = normal_rows(seed, rows, D).to(dtype), normal_rows(100 + seed, rows, E).to(dtype)
    return (x, y) if isinstance(config, TranscoderConfig) else (x,)


def target(x, y=None):
    return x if y is None else y


def sae_of(cfg, config, dtype=torch.float32):
    """Away from its starting point; its first features seldom fire."""
    sae = initial_sae(config, cfg)
    with torch.no_grad():
        for i, (name, p) in enumerate(sae.named_parameters()):
            if name != "theta":
                p.add_(0.3 * normal_rows(10 + i, *p.shape))
        sae.b_enc[:5] -= 0.2
        if cfg.trains_threshold:
            sae.theta.add_(0.2 * torch.rand(F, generator=torch.Generator().manual_seed(3)))
    return feature_major(sae.to(dtype))


def dead_of(cfg):
    """The first seven features and one more count as dead, where that matters."""
    return None if cfg.aux_k is None else torch.tensor([j < 7 or j == 20 for j in range(F)])


def dense_update(sae, tensors, cfg, adam, weight, lr):
    x, *y = tensors
    return dense_step(sae, x, cfg, adam, weight, lr, *(y or [None]), dead_of(cfg))


def sparse_step(sae, tensors, cfg, adam, weight, lr, compiled):
    x, *y = tensors
    step = SparseStep(sae, cfg, adam, compiled=compiled)
    return step.update(x, weight, lr, *(y or [None]), None, dead_of(cfg))


def trained(sae, cfg):
    return [name for name, _ in sae.named_parameters() if name != "theta" or cfg.trains_threshold]


# --- the two engines


@EVERY
@pytest.mark.parametrize("micro_rows", [None, 7])
def test_the_dense_step_has_the_gradients_of_the_definition(case, micro_rows):
    cfg, config = CASES[case]
    sae, (x, *y) = sae_of(cfg, config, torch.float64), batch(config, dtype=torch.float64)
    defined = loss(sae, x, cfg, 0.37, *(y or [None]), dead_of(cfg))
    names = trained(sae, cfg)
    expected = torch.autograd.grad(defined.loss, [dict(sae.named_parameters())[name] for name in names])
    terms, gradients = loss_and_gradients(
        sae, x, replace(cfg, micro_rows=micro_rows), 0.37, *(y or [None]), dead_of(cfg)
    )
    assert sorted(gradients) == sorted(names)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(gradients[name], gradient, atol=1e-13, rtol=1e-10)
        assert gradient.abs().max() > 1e-4
    for name in ("loss", "mse", "l0", "fired"):
        torch.testing.assert_close(getattr(terms, name), getattr(defined, name).detach())
    if terms.smallest is not None:
        assert terms.smallest == defined.smallest


@EVERY
def test_the_sparse_step_as_defined_is_the_dense_step_in_float64(case):
    cfg, config = CASES[case]
    sparse, dense = (sae_of(cfg, config, torch.float64) for _ in range(2))
    tensors = batch(config, dtype=torch.float64)
    ours = sparse_step(sparse, tensors, cfg, adam_of(sparse, cfg), 0.3, 0.01, compiled=False)
    theirs = dense_update(dense, tensors, cfg, adam_of(dense, cfg), 0.3, 0.01)
    for name in parameters(sparse):
        torch.testing.assert_close(parameters(sparse)[name], parameters(dense)[name], atol=1e-12, rtol=1e-12)
    for name in ("loss", "mse", "l0", "fired"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-12, rtol=1e-12)


@EVERY
@ENGINES
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_every_gradient_is_that_of_the_dense_float64_step_to_float32_rounding(case, compiled, clip_norm):
    """With Adam's ε at 1e4 the update is -lr·g/ε, and the second moment is (1 - β₂)·g²: so both show the gradient."""
    cfg, config, eps = replace(CASES[case][0], clip_norm=clip_norm), CASES[case][1], 1e4
    sparse, dense = sae_of(cfg, config), sae_of(cfg, config, torch.float64)
    tensors, before = batch(config), parameters(dense)
    ours, theirs = adam_of(sparse, cfg, eps), adam_of(dense, cfg, eps)
    terms = sparse_step(sparse, tensors, cfg, ours, 0.3, 0.1 * eps, compiled)
    expected = dense_update(dense, [t.double() for t in tensors], cfg, theirs, 0.3, 0.1 * eps)
    for name in trained(dense, cfg):
        moved, wanted = (parameters(s)[name].double() - before[name] for s in (sparse, dense))
        torch.testing.assert_close(moved, wanted, atol=1e-6, rtol=1e-5)
        assert wanted.abs().max() > 1e-6
        second, wanted = ours.second[name].double().sqrt(), theirs.second[name].sqrt()
        torch.testing.assert_close(second, wanted, atol=2e-6 * float(wanted.max()), rtol=1e-5)
    for name in ("loss", "mse", "l0", "fired"):
        torch.testing.assert_close(getattr(terms, name).double(), getattr(expected, name), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", [name for name, (cfg, _) in CASES.items() if not (cfg.selects or cfg.aux_k)])
@pytest.mark.parametrize("micro_features", [7, 64])
@pytest.mark.parametrize("micro_rows", [None, 5])
def test_a_step_in_blocks_of_features_is_the_dense_step_in_float64(case, micro_features, micro_rows):
    cfg, config = replace(CASES[case][0], micro_rows=micro_rows, micro_features=micro_features), CASES[case][1]
    blocked, dense = (sae_of(cfg, config, torch.float64) for _ in range(2))
    adams = [adam_of(sae, cfg) for sae in (blocked, dense)]
    for seed in range(3):
        x, *y = tensors = batch(config, seed, torch.float64)
        ours = blocked_update(blocked, adams[0], x, *(y or [x]), cfg, 0.3, 0.01)
        theirs = dense_update(dense, tensors, cfg, adams[1], 0.3, 0.01)
        for name in ("loss", "mse", "l0", "fired"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-10, rtol=1e-10)
    for name in parameters(blocked):
        torch.testing.assert_close(parameters(blocked)[name], parameters(dense)[name], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(adams[0].second[name], adams[1].second[name], atol=1e-10, rtol=1e-8)


def test_a_run_that_starts_in_blocks_of_features_goes_the_same_way():
    cfg = replace(JUMPRELU, engine="auto", adam_eps=1e-3)
    ends = []
    for micro_features in (None, 16):
        state = TrainState(sae_of(cfg, SAE), replace(cfg, micro_features=micro_features))
        for seed in range(12):
            state.update(*batch(SAE, seed))
        ends.append(parameters(state.sae))
    for name, p in ends[0].items():
        torch.testing.assert_close(p, ends[1][name], atol=2e-4, rtol=2e-4)


@EVERY
def test_runs_of_both_engines_go_the_same_way(case):
    cfg, config = CASES[case]
    cfg = replace(cfg, adam_eps=1e-3)
    ends = []
    for engine in ("dense", "sparse"):
        state = TrainState(sae_of(cfg, config), replace(cfg, engine=engine))
        for seed in range(12):
            state.update(*batch(config, seed))
        ends.append(parameters(state.sae))
    for name, p in ends[0].items():
        torch.testing.assert_close(p, ends[1][name], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("case", ["jumprelu", "relu", "topk", "batchtopk", "coder"])
def test_entries_that_were_found_before_give_the_same_step(case):
    cfg, config = replace(CASES[case][0], engine="sparse"), CASES[case][1]
    states = [TrainState(sae_of(cfg, config), cfg) for _ in range(2)]
    x, *y = batch(config)
    sae, step = states[1].sae, states[1].sparse
    code = states[1].objective.entries(step, x, sae.threshold.detach(), cfg)
    states[0].update(x, *y)
    states[1].update(x, *(y or [None]), code)
    assert same_bits(states[0].sae, sae)


# --- the equations


@pytest.mark.parametrize("case", ["relu", "topk", "batchtopk", "coder-skip", "coder-relu-skip-prefixes"])
def test_gradients_of_the_loss_equal_finite_differences(case):
    cfg, config = CASES[case]
    sae, (x, *y) = sae_of(cfg, config, torch.float64), batch(config, dtype=torch.float64)
    weight = 0.0 if cfg.trains_threshold else 0.3
    _, gradients = loss_and_gradients(sae, x, cfg, weight, *(y or [None]))
    for name in set(trained(sae, cfg)) - {"theta"}:
        p, h = dict(sae.named_parameters())[name].data, 1e-7
        for i in (0, p.numel() // 2, p.numel() - 1):
            place = tuple(int(n) for n in torch.unravel_index(torch.tensor(i), p.shape))
            p[place] += h
            above = loss(sae, x, cfg, weight, *(y or [None])).loss.item()
            p[place] -= 2 * h
            below = loss(sae, x, cfg, weight, *(y or [None])).loss.item()
            p[place] += h
            assert gradients[name][place].item() == pytest.approx((above - below) / (2 * h), abs=1e-6)


def test_l1_is_the_mean_over_rows_of_the_sum_of_features():
    sae, (x,) = sae_of(RELU, SAE, torch.float64), batch(SAE, dtype=torch.float64)
    x_hat, f = sae(x)
    expected = (x - x_hat).square().sum() / B + 0.37 * f.sum() / B
    assert torch.equal(f, sae.pre_activations(x).relu())
    torch.testing.assert_close(loss(sae, x, RELU, 0.37).loss, expected)


def test_topk_keeps_fewer_than_k_where_fewer_are_positive():
    cfg = replace(TOPK, k=30)  # about half of 40 are positive
    sae, (x,) = sae_of(cfg, SAE, torch.float64), batch(SAE, dtype=torch.float64)
    z = sae.pre_activations(x).detach()
    positive = (z > 0).sum(1)
    assert (positive < 30).any()
    terms, gradients = loss_and_gradients(sae, x, cfg, 0.0)
    assert terms.l0 == positive.clamp(max=30).double().mean()
    adam = adam_of(sae, cfg)
    before = parameters(sae)
    assert torch.equal(sparse_step(sae, (x,), cfg, adam, 0.0, 0.01, compiled=False).fired, terms.fired)
    never = terms.fired == 0
    assert not gradients["W_dec"][never].any()
    assert torch.equal(sae.W_dec[never], before["W_dec"][never])


def test_topk_keeps_the_k_largest_of_each_row():
    sae, (x,) = sae_of(TOPK, SAE), batch(SAE)
    on = objective_of(TOPK).on(sae.pre_activations(x).detach(), sae.threshold, None, TOPK)
    assert on.sum(1).tolist() == [4.0] * B
    z = sae.pre_activations(x).detach()
    assert (torch.where(on > 0, z, torch.inf).amin(1) >= torch.where(on > 0, -torch.inf, z).amax(1)).all()


@pytest.mark.parametrize("bound", [0.0, 0.05, 0.3, 0.45, 0.7, 5.0])
@ENGINES
def test_topk_finds_the_same_entries_whatever_it_expects(bound, compiled):
    """Below all rows' k-th values, between them, and above."""
    sae, (x,) = sae_of(TOPK, SAE), batch(SAE)
    with torch.no_grad():
        sae.b_enc -= 0.2
    x[:3] *= 0.1  # rows with fewer than k
    z = sae.pre_activations(x).detach()
    assert (z > 0).sum(1).min() < 4
    step = SparseStep(sae, TOPK, adam_of(sae, TOPK), compiled=compiled)
    code = objective_of(TOPK).entries(step, x, torch.full((F,), bound), TOPK)
    on = objective_of(TOPK).on(z, z, None, TOPK)
    torch.testing.assert_close(code.by_row().to_dense(), z * on)
    assert (code.by_row().rows().diff() >= 0).all()


def test_topks_bound_lies_below_nearly_all_rows_kth_values():
    sae, (x,) = sae_of(TOPK, SAE), batch(SAE, rows=400)
    state = TrainState(sae, replace(TOPK, batch_rows=400, engine="sparse"))
    kth = sae.pre_activations(x).detach().topk(4, dim=1).values[:, -1].sort().values
    state.update(x)
    torch.testing.assert_close(state.sae.theta.detach(), kth[4].expand(F))


@pytest.mark.parametrize("rows", [1, 5, B])
def test_batchtopk_keeps_the_largest_of_the_batch_however_it_is_cut(rows):
    z = normal_rows(4, B, F)
    cut, values, at, features = largest_of_batch(iter(z.split(rows)), 100)
    expected = z.flatten().topk(100).values
    assert cut == expected[-1]
    assert torch.equal(values.sort(descending=True).values, expected)
    assert torch.equal(z[at.long(), features.long()], values)
    cut, values, *_ = largest_of_batch(iter(z.split(rows)), B * F)
    assert (cut, len(values)) == (0, int((z > 0).sum()))


@pytest.mark.parametrize("bound", [0.0, 0.05, 0.3, 0.5, 5.0])
def test_batchtopk_finds_the_same_entries_whatever_it_expects(bound):
    """Below the cut by much, by little, and above it."""
    sae, (x,) = sae_of(BATCHTOPK, SAE), batch(SAE)
    step = SparseStep(sae, BATCHTOPK, adam_of(sae, BATCHTOPK), compiled=True)
    expected = sae.pre_activations(x).detach().flatten().topk(4 * B).values
    assert 0.3 < expected[-1] < 0.5
    code = objective_of(BATCHTOPK).entries(step, x, torch.full((F,), bound), BATCHTOPK)
    torch.testing.assert_close(code.values.sort(descending=True).values, expected)
    dense = torch.where(sae.pre_activations(x) >= expected[-1] - 1e-6, sae.pre_activations(x), 0.0)
    torch.testing.assert_close(code.by_row().to_dense(), dense.detach())


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_batchtopks_threshold_is_the_mean_of_the_smallest_kept_values(engine, monkeypatch):
    monkeypatch.setattr("mistudio.train.objectives.batchtopk.AVERAGED_STEPS", 4)
    cfg = replace(BATCHTOPK, engine=engine)
    state, mean = TrainState(sae_of(cfg, SAE), cfg), 0.0
    for step in range(9):
        (x,) = batch(SAE, step)
        smallest = state.sae.pre_activations(x).detach().flatten().topk(4 * B).values[-1].item()
        mean += (smallest - mean) * max(1 / (step + 1), 1 / 4)
        state.update(x)
        torch.testing.assert_close(state.sae.theta.detach(), torch.full((F,), mean))
    assert AVERAGED_STEPS > 4


def test_a_batch_without_a_positive_entry_leaves_batchtopks_threshold():
    state = TrainState(sae_of(BATCHTOPK, SAE), BATCHTOPK)
    state.update(*batch(SAE))
    before = state.sae.theta.detach().clone()
    with torch.no_grad():
        state.sae.b_enc.fill_(-100.0)
    state.update(*batch(SAE, 1))
    assert before[0] > 0
    assert torch.equal(state.sae.theta, before)
    state.check_finite()


def test_each_prefix_reconstructs_without_the_features_after_it():
    cfg = replace(JUMPRELU, prefixes=(0.125, 0.5))
    sae, (x,) = sae_of(cfg, SAE, torch.float64), batch(SAE, dtype=torch.float64)
    f = sae.encode(x)
    parts = [(sae.decode(f * (torch.arange(F) < end)) - x).square().sum() / B for end in (5, 20, 40)]
    defined = loss(sae, x, cfg, 0.0)
    torch.testing.assert_close(defined.loss, sum(parts) / 3)
    torch.testing.assert_close(defined.mse, parts[-1])
    with torch.no_grad():
        sae.W_dec[20:] = 0
    torch.testing.assert_close(loss(sae, x, cfg, 0.0).loss, (parts[0] + 2 * parts[1]) / 3)


def test_the_frequency_penalty_charges_features_above_the_limit_and_moves_their_thresholds_alone():
    cfg = replace(JUMPRELU, frequency_weight=2.0, frequency_limit=0.2)
    sae, (x,) = sae_of(cfg, SAE, torch.float64), batch(SAE, dtype=torch.float64)
    with_it, without = (loss_and_gradients(sae, x, c, 0.3) for c in (cfg, JUMPRELU))
    p = with_it[0].fired / B
    assert 3 < (p > 0.2).sum() < F
    torch.testing.assert_close(with_it[0].loss - without[0].loss, 0.3 * 2 * ((p - 0.2).clamp(min=0) / 0.2).sum())
    z = sae.pre_activations(x).detach() - sae.threshold.detach()
    window = (z.abs() < cfg.bandwidth / 2).double().sum(0)
    expected = (p > 0.2) * window * (-0.3 * 2 / (0.2 * B) / cfg.bandwidth)
    torch.testing.assert_close(with_it[1]["theta"] - without[1]["theta"], expected, atol=1e-12, rtol=1e-9)
    assert {n for n in with_it[1] if not torch.equal(with_it[1][n], without[1][n])} == {"theta"}


# --- AuxK


def test_auxks_gradient_reaches_the_dead_features_encoder_and_decoder():
    cfg, dead = replace(TOPK, aux_k=6, aux_weight=0.25), dead_of(replace(TOPK, aux_k=6))
    sae, (x,) = sae_of(cfg, SAE, torch.float64), batch(SAE, dtype=torch.float64)
    plain, helped = (loss_and_gradients(sae, x, cfg, 0.0, None, d) for d in (None, dead))
    left_over = (x - sae.decode(objective_of(cfg).features(sae.pre_activations(x), sae.threshold, cfg)[0])).detach()
    f = sae.pre_activations(x).detach().relu()[:, dead]
    f = f.where(f >= f.topk(6, dim=1).values[:, -1:], 0.0)
    off = f @ sae.W_dec.detach()[dead] - left_over
    torch.testing.assert_close(helped[0].loss - plain[0].loss, 0.25 * off.square().sum() / B)
    assert torch.equal(helped[0].fired, plain[0].fired)
    d_f = 0.25 * 2 / B * (off @ sae.W_dec.detach()[dead].T) * (f > 0)
    extra = {name: helped[1][name] - plain[1][name] for name in helped[1]}
    centred = (x - sae.b_dec).detach()
    torch.testing.assert_close(extra["W_dec"][dead], 0.25 * 2 / B * f.T @ off)
    torch.testing.assert_close(extra["W_enc"][:, dead], centred.T @ d_f)
    torch.testing.assert_close(extra["b_enc"][dead], d_f.sum(0))
    torch.testing.assert_close(extra["b_dec"], -sae.W_enc.detach()[:, dead] @ d_f.sum(0))
    assert d_f.abs().max() > 1e-4
    assert not extra["W_dec"][~dead].any()
    assert not extra["W_enc"][:, ~dead].any()


def test_auxks_definition_equals_finite_differences_with_its_target_held():
    sae, (x,) = sae_of(TOPK, SAE, torch.float64), batch(SAE, dtype=torch.float64)
    residual, dead = normal_rows(8, B, D).double(), dead_of(replace(TOPK, aux_k=6))

    def value():
        return auxiliary_loss(sae.pre_activations(x), sae.W_dec, residual, dead, 6, 0.25)

    (gradient,) = torch.autograd.grad(value(), [sae.W_enc])
    h = 1e-7
    for d, j in ((0, 0), (5, 3), (11, 20)):
        sae.W_enc.data[d, j] += h
        above = value().item()
        sae.W_enc.data[d, j] -= 2 * h
        below = value().item()
        sae.W_enc.data[d, j] += h
        assert gradient[d, j].item() == pytest.approx((above - below) / (2 * h), abs=1e-6)
    assert gradient[:, 20].abs().max() > 1e-3


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize("cfg", [TOPK, BATCHTOPK, JUMPRELU], ids=["topk", "batchtopk", "jumprelu"])
def test_auxk_brings_back_features_whose_outputs_are_too_small_to_be_kept(engine, cfg):
    alive = []
    for aux_k in (None, 8):
        sae = sae_of(cfg, SAE)
        with torch.no_grad():
            sae.W_enc[:, :10] *= 0.01
            sae.b_enc[:10] = 0.01
        state = TrainState(sae, replace(cfg, engine=engine, aux_k=aux_k))
        for seed in range(80):
            state.update(*batch(SAE, seed % 4))
        alive.append(int((state.silent_rows[:10] < cfg.dead_after_rows).sum()))
    assert alive[0] == 0
    assert alive[1] > 0


def test_a_jumprelu_features_threshold_stays_while_auxk_helps_it():
    cfg = replace(JUMPRELU, aux_k=4, frequency_weight=2.0)
    sae, (x,), dead = sae_of(cfg, SAE), batch(SAE), dead_of(cfg)
    plain, helped = (loss_and_gradients(sae, x, cfg, 0.3, None, d)[1]["theta"] for d in (None, dead))
    assert plain[dead].any()
    assert not helped[dead].any()
    assert torch.equal(plain[~dead], helped[~dead])


@pytest.mark.parametrize(("aux_after_rows", "helped"), [(None, [7]), (2 * B, [3, 7])])
def test_auxk_helps_features_that_were_silent_for_aux_after_rows(aux_after_rows, helped):
    state = TrainState(sae_of(JUMPRELU, SAE), replace(JUMPRELU, aux_k=4, aux_after_rows=aux_after_rows))
    assert state.helped() is None
    state.silent_rows[3], state.silent_rows[7] = 2 * B, 3 * B
    assert state.helped().nonzero().squeeze(1).tolist() == helped


def test_auxk_helps_no_more_than_aux_part_of_the_features_in_turn():
    state = TrainState(sae_of(JUMPRELU, SAE), replace(JUMPRELU, aux_k=4, aux_part=3 / F))
    state.silent_rows[:7] = 3 * B
    helped = []
    for state.step in range(7):
        helped += state.helped().nonzero().squeeze(1).tolist()
    assert len(helped) == 3 * 7
    assert all(helped.count(feature) == 3 for feature in range(7))


# --- transcoders, and what is released


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("log_threshold", [False, True])
def test_a_folded_transcoder_is_the_trained_one_in_raw_units(skip, log_threshold):
    cfg = replace(JUMPRELU, log_threshold=log_threshold)
    sae = sae_of(cfg, replace(CODER, skip=skip), torch.float64)
    x, _ = batch(CODER, dtype=torch.float64)
    y_hat, f = sae(x)
    released = sae.fold()
    y_raw, f_raw = released(1.5 * x)
    assert released.folded
    assert (f > 0).any()
    torch.testing.assert_close(f_raw, 0.5 * f)
    torch.testing.assert_close(y_raw, 0.5 * y_hat)
    assert torch.equal(released.W_dec, sae.W_dec)


@pytest.mark.parametrize(
    ("case", "cls"),
    [
        ("jumprelu", JumpReLUSAE),
        ("relu", ReLUSAE),
        ("topk", TopKSAE),
        ("batchtopk", BatchTopKSAE),
        ("coder-skip", Transcoder),
        ("coder-relu-skip-prefixes", Transcoder),
        ("coder-batchtopk-aux", Transcoder),
    ],
)
def test_a_finished_run_saves_an_sae_of_its_own_kind(tmp_path, case, cls):
    cfg, config = CASES[case]
    done = train(initial_sae(config, cfg), sources(config), cfg, folder=tmp_path / "run")
    loaded = native.load(tmp_path / "run")
    assert type(loaded) is cls
    x = batch(config, 77)[0]
    on = objective_of(cfg).on if cfg.architecture == "topk" else None
    z = done.sae.pre_activations(x).detach()
    f = torch.where(on(z, z, None, cfg) > 0, z, 0.0) if on else torch.where(z > done.sae.threshold, z, 0.0)
    scale = 0.5 if cls is Transcoder else 1.5
    torch.testing.assert_close(loaded.encode(1.5 * x), scale * f, atol=1e-5, rtol=1e-4)
    assert (f > 0).any()


def test_a_transcoder_without_a_target_scale_is_refused():
    with pytest.raises(ConfigError, match="scale and scale_out go together"):
        replace(CODER, scale_out=None)
    with pytest.raises(ConfigError, match="no pre_encoder_bias"):
        replace(CODER, pre_encoder_bias=True)


def test_a_topk_transcoder_is_refused():
    with pytest.raises(TrainError, match="no TopK transcoders; train it as batchtopk"):
        train(initial_sae(CODER, TOPK), sources(CODER), TOPK)


# --- the command line


def mistudio(capsys, *arguments):
    options = ["--train.steps", "6", "--train.batch-rows", "32", "--train.checkpoint-every", "3"]
    cli.main(["train", "--json", *map(str, arguments), *options])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_trained_from_two_sites_of_a_store(tmp_path, capsys, skip):
    make(tmp_path / "store", rows=300, bucket_rows=100)
    store, flags = Store.open(tmp_path / "store"), ["--skip"] if skip else []
    here = ["--store", tmp_path / "store", "--site", SITE, "--site-out", SITE_OUT, "--out", tmp_path / "sae"]
    result = mistudio(capsys, *here, "--width", 24, *flags)
    coder = native.load(tmp_path / "sae")
    assert (result["steps"], type(coder), coder.config.skip) == (6, Transcoder, skip)
    assert (coder.config.hook_name, coder.config.hook_name_out) == (SITE, SITE_OUT)
    assert (coder.d_in, coder.d_out) == (store.width(SITE), store.width(SITE_OUT))
    before = (tmp_path / "sae" / "sae.safetensors").read_bytes()
    mistudio(capsys, *here, "--width", 24, *flags, "--resume")
    assert (tmp_path / "sae" / "sae.safetensors").read_bytes() == before


@pytest.mark.parametrize(("recipe", "cls"), [("topk", TopKSAE), ("batchtopk", BatchTopKSAE), ("relu", ReLUSAE)])
def test_the_recipe_chooses_the_architecture(tmp_path, capsys, recipe, cls):
    make(tmp_path / "store", rows=300, bucket_rows=100)
    options = ["--train.k", 3] if recipe != "relu" else ["--train.sparsity-weight", 0.02]
    here = ["--store", tmp_path / "store", "--site", SITE, "--out", tmp_path / "sae", "--width", 24]
    mistudio(capsys, "--recipe", recipe, *here, *options)
    assert type(native.load(tmp_path / "sae")) is cls


def test_a_skip_without_a_target_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        mistudio(capsys, "--store", tmp_path, "--site", SITE, "--out", tmp_path / "sae", "--width", 24, "--skip")
    assert "skip belongs to a transcoder: give --site-out" in capsys.readouterr().err


# --- bits


def sources(config, fail_at=None):
    """Batches as `train` wants them: x alone, or (x, y)."""

    def one(place):
        tensors = batch(config, place)
        return tensors if len(tensors) > 1 else tensors[0]

    return Source(one, fail_at=fail_at)


@pytest.mark.parametrize("case", ["batchtopk-aux", "topk-aux", "jumprelu-aux", "coder-skip", "gemma-scope-2"])
@pytest.mark.parametrize("engine", ["sparse", "auto"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, case, engine):
    cfg, config = replace(CASES[case][0], engine=engine), CASES[case][1]
    train(initial_sae(config, cfg), sources(config), cfg, folder=tmp_path / "whole")
    train(initial_sae(config, cfg), sources(config), cfg, folder=tmp_path / "again")
    with pytest.raises(RuntimeError):
        train(initial_sae(config, cfg), sources(config, fail_at=8), cfg, folder=tmp_path / "run")
    train(initial_sae(config, cfg), sources(config), cfg, folder=tmp_path / "run", resume=True)
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    assert files(tmp_path / "run") == files(tmp_path / "whole")


# --- clipping


def test_gradients_longer_than_clip_norm_are_shortened_and_others_are_not():
    long, short = {"a": torch.full((3,), 2.0), "b": torch.full((4,), 1.0)}, {"a": torch.full((3,), 1e-3)}
    factor = clip_factor(long.values(), 0.5)
    assert float(factor) == pytest.approx(0.5 / 4)
    assert float(clip_factor(short.values(), 0.5)) == 1
    assert float(clip_factor([torch.zeros(3)], 0.5)) == 1


# --- wrong use


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "topk", "sparsity_weight": 0.0}, "topk needs k"),
        ({"architecture": "topk", "k": 4}, "topk has no penalty"),
        ({"k": 4}, "k has no effect with jumprelu"),
        ({"architecture": "relu", "sparsity": "l1", "aux_k": 4}, "aux_k is for jumprelu, topk and batchtopk, not relu"),
        ({"aux_after_rows": 4}, "aux_after_rows has no effect without aux_k"),
        ({"aux_k": 4, "aux_after_rows": 0}, "aux_after_rows must be at least 1"),
        ({"aux_k": 4, "micro_features": 8}, "aux_k needs all features at once; leave micro_features out"),
        ({"architecture": "relu"}, "relu and sparsity l1 need each other"),
        ({"sparsity": "l1"}, "relu and sparsity l1 need each other"),
        ({"architecture": "relu", "sparsity": "l1", "frequency_weight": 1.0}, "which relu does not train"),
        ({"prefixes": (0.5, 0.25)}, "prefixes must rise"),
        ({"prefixes": (0.5, 1.0)}, "prefixes must rise"),
        ({"clip_norm": 0.0}, "clip_norm must be a positive number"),
        ({"clip_norm": 1.0, "micro_features": 8}, "clip_norm needs all features at once; leave micro_features out"),
        ({"micro_features": 0}, "micro_features must be at least 1"),
        ({"micro_rows": 0}, "micro_rows must be at least 1"),
        ({"frequency_weight": -1.0}, "frequency_weight must be a number from 0 to"),
        ({"frequency_limit": 1.0}, "frequency_limit must be between 0 and 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_a_sentence(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(JUMPRELU, **change)


def test_prefixes_closer_than_a_feature_are_refused():
    cfg = replace(JUMPRELU, prefixes=(0.5, 0.501))
    with pytest.raises(TrainError, match="end at \\[20, 20, 40\\]: one would add no feature"):
        TrainState(sae_of(cfg, SAE), cfg)


@pytest.mark.parametrize("cfg", [TOPK, BATCHTOPK])
def test_more_features_than_there_are_cannot_be_kept(cfg):
    with pytest.raises(TrainError, match="k is 41, and the SAE has 40 features"):
        train(initial_sae(SAE, cfg), sources(SAE), replace(cfg, k=41))


@pytest.mark.parametrize("architecture", [RELU, TOPK, BATCHTOPK])
def test_rows_that_are_not_normalised_are_refused_for_every_architecture(architecture):
    source = (9 * x for x in sources(SAE))
    with pytest.raises(TrainError, match=r"mean \|x\|\^2 = .*expected 1"):
        train(initial_sae(SAE, architecture), source, architecture)


def test_targets_that_are_not_normalised_are_refused():
    source = ((x, 9 * y) for x, y in sources(CODER))
    with pytest.raises(TrainError, match=r"the target's mean \|y\|\^2 = .*expected 1"):
        train(initial_sae(CODER, JUMPRELU), source, JUMPRELU)


@pytest.mark.parametrize("helped", [5, 7, 11])
def test_a_dense_step_that_helps_a_few_features_has_the_same_bits_with_any_number_of_threads(helped):
    cfg = replace(JUMPRELU, engine="dense", batch_rows=700, aux_k=4, aux_after_rows=1)
    saes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            state = TrainState(initial_sae(SAEConfig(d_model=192, d_sae=256, scale=1.0), cfg), cfg)
            state.silent_rows[:helped] = 1
            state.update(normal_rows(0, 700, 192))
        finally:
            torch.set_num_threads(1)
        saes.append(state.sae)
    assert same_bits(*saes)
