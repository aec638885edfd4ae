"""Training: gradients equal autograd's, the optimiser is Adam, and a run stops and goes on without a trace."""

import itertools
import json
import math
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from mistudio.errors import StoreError, TrainError
from mistudio.sae import JumpReLUSAE, SAEConfig
from mistudio.train import Interrupted, Resumable, TrainConfig, initial_sae, train
from mistudio.train.loss import CPU_CHUNK_ROWS, loss, loss_and_gradients
from mistudio.train.optimizer import Adam, normalise_rows_, remove_parallel_
from tiny_training import Source, endless, files, normal_rows

D, F, B = 8, 24, 16
SAE = SAEConfig(d_model=D, d_sae=F, scale=2.0, hook_name="layers.1.resid_post", hook_layer=1)
CFG = TrainConfig(
    steps=20,
    batch_rows=B,
    sparsity_weight=0.01,
    sparsity_warmup_steps=5,
    lr=1e-2,
    lr_warmup_steps=5,
    lr_decay_fraction=0.5,
    bandwidth=0.2,
    threshold_init=0.1,
    log_threshold=False,
    b_dec_init="mean",
    log_every=3,
    checkpoint_every=4,
    dead_after_rows=64,
)


def rows(seed, count=B):
    return normal_rows(seed, count, D)


def run(cfg=CFG, source=None, **options):
    return train(initial_sae(SAE, cfg), Source(rows) if source is None else source, cfg, **options)


# --- the loss


def random_sae(cfg, dtype=torch.float64):
    sae = initial_sae(SAE, cfg).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.rand(p.shape, generator=generator, dtype=dtype))
    return sae


VARIANTS = [
    {"sparsity": sparsity, "target_l0": target, "log_threshold": log, "pre_encoder_bias": bias}
    for sparsity, target in (("l0", None), ("target_mean_l0", 4.0), ("target_token_l0", 4.0))
    for log in (False, True)
    for bias in (False, True)
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_written_out_gradients_equal_autograd(variant):
    cfg = replace(CFG, **variant)
    sae = random_sae(cfg)
    x = rows(0, 2 * CPU_CHUNK_ROWS + 3).double()  # several chunks, the last one short
    defined = loss(sae, x, cfg, weight=0.37)
    expected = torch.autograd.grad(defined.loss, list(sae.parameters()))
    terms, gradients = loss_and_gradients(sae, x, cfg, weight=0.37)
    for (name, _), gradient in zip(sae.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradients[name], gradient, atol=1e-13, rtol=1e-10)
        assert gradient.abs().max() > 1e-6
    for name in ("loss", "mse", "l0", "fired"):
        torch.testing.assert_close(getattr(terms, name), getattr(defined, name).detach())


@pytest.mark.parametrize(
    ("change", "penalty"),
    [
        ({}, lambda l0: l0.mean()),
        ({"sparsity": "target_mean_l0", "target_l0": 4.0}, lambda l0: (l0.mean() / 4 - 1) ** 2),
        ({"sparsity": "target_token_l0", "target_l0": 4.0}, lambda l0: (2 / 4 * (l0 - 4) ** 2).mean()),
    ],
)
def test_the_loss_is_its_equation(change, penalty):
    cfg = replace(CFG, **change)
    sae, x = random_sae(cfg), rows(0).double()
    x_hat, f = sae(x)
    expected = ((x - x_hat) ** 2).sum() / B + 0.37 * penalty((f > 0).sum(1).double())
    torch.testing.assert_close(loss(sae, x, cfg, weight=0.37).loss, expected)


def test_the_sparsity_weight_moves_only_the_thresholds():
    cfg = replace(CFG, pre_encoder_bias=True)
    sae, x = random_sae(cfg), rows(0).double()
    without, with_penalty = (loss_and_gradients(sae, x, cfg, weight)[1] for weight in (0.0, 1.0))
    changed = {name for name in without if not torch.equal(without[name], with_penalty[name])}
    assert changed == {"theta"}
    assert (with_penalty["theta"] - without["theta"]).max() <= 0  # raising θ lowers L0


def test_reconstruction_gradients_equal_finite_differences():
    cfg = replace(CFG, pre_encoder_bias=True)
    sae, x = random_sae(cfg), rows(0).double()
    _, gradients = loss_and_gradients(sae, x, cfg, weight=0.0)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        p, h = dict(sae.named_parameters())[name].data.view(-1), 1e-7
        for i in (0, p.numel() // 2, p.numel() - 1):
            p[i] += h
            above = loss(sae, x, cfg, 0.0).loss.item()
            p[i] -= 2 * h
            below = loss(sae, x, cfg, 0.0).loss.item()
            p[i] += h
            assert gradients[name].view(-1)[i].item() == pytest.approx((above - below) / (2 * h), abs=1e-6)


# --- the optimiser


def test_adam_is_torchs_with_beta1_zero():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=generator)
    ours, theirs = start.clone(), start.clone().requires_grad_()
    adam, reference = Adam({"p": ours}, 0.999, 1e-8), torch.optim.Adam([theirs], lr=0.01, betas=(0.0, 0.999), eps=1e-8)
    for _ in range(50):
        gradient = torch.randn(5, 3, generator=generator)
        adam.update({"p": gradient}, 0.01)
        theirs.grad = gradient.clone()
        reference.step()
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-6)


def test_vectors_take_their_part_of_the_learning_rate_and_matrices_the_whole():
    moved = {}
    for part in (1.0, 0.25):
        parameters = {"W_dec": torch.ones(2, 3), "theta": torch.ones(2)}
        Adam(parameters, 0.999, 1e-8, part).update({"W_dec": torch.ones(2, 3), "theta": torch.ones(2)}, 0.01)
        moved[part] = {name: 1 - p for name, p in parameters.items()}
    torch.testing.assert_close(moved[0.25]["W_dec"], moved[1.0]["W_dec"])
    torch.testing.assert_close(moved[0.25]["theta"], moved[1.0]["theta"] / 4)


def test_the_projected_gradient_is_orthogonal_to_its_decoder_row_whatever_the_norm():
    W, gradient = 3 * torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    across = gradient - (gradient * W).sum(1, keepdim=True) * W / (W * W).sum(1, keepdim=True)
    remove_parallel_(gradient, W)
    torch.testing.assert_close(gradient, across)
    torch.testing.assert_close((gradient * W).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    normalise_rows_(W)
    torch.testing.assert_close(W.norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_decoder_rows_have_norm_1_and_raw_thresholds_stay_above_half_the_window():
    cfg = replace(CFG, sparsity_weight=0.0, lr=0.1)  # nothing holds the thresholds up
    sae = run(cfg).sae
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    assert sae.theta.min() >= torch.tensor(cfg.bandwidth / 2)


# --- a run


def test_training_lowers_the_loss_and_records_it():
    history = run(replace(CFG, steps=60, sparsity_weight=0.0)).history
    assert history[-1]["mse"] < 0.7 * history[0]["mse"]
    assert [line["step"] for line in history] == list(range(3, 61, 3))
    assert history[-1]["tokens"] == 60 * B


def test_a_finished_run_leaves_its_records_and_the_released_sae(tmp_path):
    done = run(folder=tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "run.json",
        "sae.json",
        "sae.safetensors",
    ]
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000000016.safetensors", "step-000000020.safetensors"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == done.history
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["start"]["b_dec"] == "mean of the first batch"
    released = JumpReLUSAE.load(tmp_path / "run")
    assert torch.equal(released.W_enc, done.sae.W_enc)
    torch.testing.assert_close(released.theta, 2.0 * done.sae.threshold)


def test_metrics_are_those_of_the_batches_since_the_last_line():
    cfg = replace(CFG, steps=1, log_every=1)
    sae, x = initial_sae(SAE, cfg), rows(0)
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0))
    x_hat, f = sae(x)
    (line,) = train(initial_sae(SAE, cfg), [x], cfg).history
    assert line["l0"] == pytest.approx((f > 0).sum(1).float().mean().item())
    fvu = ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert line["fvu"] == pytest.approx(fvu, rel=1e-5)


def test_b_dec_starts_at_the_given_mean():
    cfg = replace(CFG, steps=1, lr=1e-12)
    mean = torch.full((D,), 0.25)
    torch.testing.assert_close(run(cfg, mean=mean).sae.b_dec.detach(), mean)
    torch.testing.assert_close(run(cfg).sae.b_dec.detach(), rows(1).mean(0))
    assert run(replace(cfg, b_dec_init="zero")).sae.b_dec.abs().max() < 1e-6


def test_dead_features_are_those_silent_for_long_enough():
    cfg = replace(CFG, steps=4, sparsity_weight=0.0, log_every=1, dead_after_rows=3 * B)
    sae = initial_sae(SAE, cfg)
    with torch.no_grad():
        sae.theta[:5] = 100.0
    assert [line["dead"] for line in train(sae, endless(rows), cfg).history] == [0, 0, 5, 5]


# --- stopping and going on


@pytest.fixture
def uninterrupted(tmp_path):
    run(folder=tmp_path / "whole")
    return files(tmp_path / "whole")


def test_resume_after_a_crash_is_bit_identical(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError):
        run(source=Source(rows, fail_at=11), folder=folder)  # lines to step 9, checkpoint at 8
    assert (folder / "metrics.jsonl").read_text().count("\n") == 3
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "tok')  # a line that was being written
    done = run(folder=folder, resume=True)
    assert files(folder) == uninterrupted
    assert [line["step"] for line in done.history] == [3, 6, 9, 12, 15, 18, 20]


def test_resume_without_a_place_skips_the_batches_that_were_used(tmp_path):
    run(source=endless(rows), folder=tmp_path / "whole")
    with pytest.raises(TrainError, match="ended after 11 of 20 steps"):
        run(source=itertools.islice(endless(rows), 11), folder=tmp_path / "run")
    run(source=endless(rows), folder=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(tmp_path, uninterrupted, number):
    folder, before = tmp_path / "run", signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"after step 7 of 20; .* Continue with --resume"):
        run(source=Source(rows, signal_at=6, number=number), folder=folder)
    assert signal.getsignal(number) is before
    assert (folder / "checkpoints" / "step-000000007.safetensors").is_file()
    run(folder=folder, resume=True)
    assert files(folder) == uninterrupted


def test_batches_that_cannot_go_on_leave_a_checkpoint_and_say_what_to_type(tmp_path, uninterrupted):
    folder, damaged = tmp_path / "run", StoreError("store/00002.safetensors: checksum of its rows is wrong.")
    with pytest.raises(TrainError, match=r"is wrong\. The run stopped after step 3 of 20; .*same command and --resume"):
        run(source=Source(rows, fail_at=3, error=damaged), folder=folder)  # the first regular checkpoint is at step 4
    assert (folder / "checkpoints" / "step-000000003.safetensors").is_file()
    run(folder=folder, resume=True)
    assert files(folder) == uninterrupted


def test_batches_that_cannot_begin_or_that_nobody_records_keep_their_error(tmp_path):
    damaged = StoreError("a shard is missing.")
    with pytest.raises(StoreError, match=r"^a shard is missing\.$"):
        run(source=Source(rows, fail_at=0, error=damaged), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(StoreError, match=r"^a shard is missing\.$"):
        run(source=Source(rows, fail_at=3, error=damaged))


def test_resume_before_the_first_checkpoint_starts_again(tmp_path, uninterrupted):
    with pytest.raises(RuntimeError):
        run(source=Source(rows, fail_at=3), folder=tmp_path / "run")
    run(folder=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == uninterrupted


def test_resuming_a_finished_run_changes_nothing(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    first = run(folder=folder)
    again = run(folder=folder, resume=True)
    assert files(folder) == uninterrupted
    assert again.history == first.history
    assert torch.equal(again.sae.W_dec, first.sae.W_dec)


def test_resume_in_an_empty_folder_starts_the_run(tmp_path, uninterrupted):
    run(folder=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == uninterrupted


def test_resume_with_another_configuration_is_refused_by_field(tmp_path):
    run(folder=tmp_path)
    with pytest.raises(TrainError, match=r"steps was 20, is 30; lr was 0.01, is 0.02"):
        run(replace(CFG, steps=30, lr=0.02), folder=tmp_path, resume=True)
    with pytest.raises(TrainError, match=r"scale was 2.0, is 3.0"):
        train(initial_sae(replace(SAE, scale=3.0), CFG), Source(rows), CFG, folder=tmp_path, resume=True)
    run(replace(CFG, log_every=5, checkpoint_every=9), folder=tmp_path, resume=True)


def test_a_folder_in_use_is_refused(tmp_path):
    run(folder=tmp_path / "run")
    with pytest.raises(TrainError, match=r"holds a run already. Continue it with --resume"):
        run(folder=tmp_path / "run")
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(TrainError, match="not empty and holds no run"):
            run(folder=tmp_path, resume=resume)


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(folder=tmp_path)
    path = tmp_path / "checkpoints" / "step-000000020.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainError, match=r"step-000000020\.safetensors is damaged"):
        run(folder=tmp_path, resume=True)


def test_source_is_resumable_and_a_list_is_not():
    assert isinstance(Source(rows), Resumable)
    assert not isinstance([], Resumable)


# --- wrong use


def test_rows_that_are_not_normalised_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TrainError, match=r"mean \|x\|\^2 = .*expected 1.*divide the activations by"):
        run(source=(7 * x for x in endless(rows)), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_stops_the_run_at_its_step_and_keeps_the_last_checkpoint(tmp_path, value):
    def spoiled():
        for i, x in enumerate(endless(rows)):
            x[3, 2] = value if i == 9 else x[3, 2]
            yield x

    with pytest.raises(TrainError, match="The batch of step 10 holds NaN or infinite values"):
        run(source=spoiled(), folder=tmp_path)
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["step-000000004.safetensors", "step-000000008.safetensors"]
    assert all(t.isfinite().all() for t in load_file(kept[-1]).values() if t.is_floating_point())


def test_a_loss_that_is_not_finite_names_its_step():
    with pytest.raises(TrainError, match=r"The loss of step \d+ is not finite.*Lower lr"):
        run(replace(CFG, lr=1e30))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([torch.zeros(B, D + 1)], r"float32 \[16, 9\]; expected floating-point \[16, 8\]"),
        ([torch.zeros(B, D, dtype=torch.int64)], r"int64 \[16, 8\]"),
        ([], "ended after 0 of 20 steps"),
    ],
)
def test_batches_of_another_kind_are_refused(source, message):
    with pytest.raises(TrainError, match=message):
        run(source=source)


def test_an_sae_that_does_not_fit_the_configuration_is_refused():
    with pytest.raises(TrainError, match=r"SAEConfig.scale is None"):
        train(initial_sae(replace(SAE, scale=None), CFG), Source(rows), CFG)
    with pytest.raises(TrainError, match=r"log_threshold False, the training configuration True.*initial_sae"):
        train(initial_sae(SAE, CFG), Source(rows), replace(CFG, log_threshold=True))
    with pytest.raises(TrainError, match="float32"):
        train(initial_sae(SAE, CFG).double(), Source(rows), CFG)


def test_a_run_shorter_than_its_warm_ups_says_so_once(capsys):
    done = run(replace(CFG, steps=3))
    assert len(done.warnings) == 2
    assert capsys.readouterr().err.count("sparsity warm-up of 5") == 1


# --- loggers


def test_tensorboard_writes_into_the_run_folder(tmp_path):
    pytest.importorskip("tensorboard")
    run(replace(CFG, tensorboard=True), folder=tmp_path)
    assert any((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("change", "module", "extra"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", "tensorboard"),
        ({"wandb": "offline"}, "wandb", "wandb"),
    ],
)
def test_a_logger_that_is_not_installed_names_its_extra(tmp_path, monkeypatch, change, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # what import sees where a package is absent
    with pytest.raises(TrainError, match=rf"mistudio\[{extra}\]"):
        run(replace(CFG, **change), folder=tmp_path)
    with pytest.raises(TrainError, match="pass folder="):
        run(replace(CFG, **change))


def test_a_logger_that_refuses_says_what_to_type(tmp_path, monkeypatch):
    class RefusedError(Exception):
        pass

    def refuse(**_):
        raise RefusedError("No API key configured.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Error=RefusedError, init=refuse))
    with pytest.raises(TrainError, match=r"refuses: No API key configured\. .* --train\.wandb offline; .* --resume"):
        run(replace(CFG, wandb="online"), folder=tmp_path)
    run(folder=tmp_path, resume=True)
