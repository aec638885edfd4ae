"""What goes wrong in a run is named by tensor and step, with what to type; and what may be changed on the way."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mistudio.errors import ConfigError, TrainError
from mistudio.sae import SAEConfig
from mistudio.train import TrainConfig, initial_sae, train
from mistudio.train import state as state_module
from mistudio.train.failures import Measured, failures, time_to_look
from mistudio.train.optimizer import FEATURE_AXIS, Adam
from mistudio.train.schedules import lr_at, lr_factor
from mistudio.train.watch import SPIKE_STEPS, Watch
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
PARAMETERS = ("W_enc", "b_enc", "theta", "W_dec", "b_dec")


# --- the learning rate


def test_a_change_multiplies_the_learning_rate_until_the_next_one():
    cfg = replace(CFG, lr_changes=((10, 3.0), (20, 1.0), (30, 0.25)))
    assert [lr_factor(cfg, step) for step in (0, 9, 10, 19, 20, 29, 30, 39)] == [1, 1, 3, 3, 1, 1, 0.25, 0.25]
    assert [lr_at(cfg, step) / lr_at(CFG, step) for step in (3, 15, 35)] == pytest.approx([1, 3, 0.25])


@pytest.mark.parametrize("pairs", [((5, 0.5), (5, 1.0)), ((9, 0.5), (5, 1.0)), ((-1, 0.5),), ((40, 0.5),)])
def test_changes_out_of_order_or_outside_the_run_are_refused(pairs):
    with pytest.raises(ConfigError, match=r"lr_changes must be pairs .* rise from 0 to 39"):
        replace(CFG, lr_changes=pairs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr_changes": ((3, 0.0),)}, "a factor of lr_changes must be a positive number"),
        ({"lr_changes": ((3, math.inf),)}, "a factor of lr_changes must be a positive number"),
        ({"spike_factor": 1.0}, "spike_factor must be a number above 1"),
    ],
)
def test_impossible_numbers_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(CFG, **change)


# --- what is looked at


def looked_at(plant, whole=True, step=3):
    """A watch that looked at healthy tensors at steps 1 and 2 and at planted ones at `step`."""
    sae = initial_sae(SAE, CFG)
    parameters = dict(sae.named_parameters())
    moments = {name: torch.ones_like(p) for name, p in parameters.items()}
    batch, loss, watch = torch.ones(()), torch.ones(()), Watch(PARAMETERS, torch.device("cpu"))
    for healthy in (1, 2):
        watch.look(healthy, batch, loss, parameters, moments, whole=whole)
    with torch.no_grad():
        plant(parameters, moments, batch, loss)
    watch.look(step, batch, loss, parameters, moments, whole=whole)
    return watch, parameters


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", PARAMETERS)
def test_one_bad_entry_of_a_gradient_or_of_a_parameter_is_named(name, value):
    def into_gradient(parameters, moments, *_):
        moments[name].view(-1)[5] = value
        parameters[name].view(-1)[5] = value

    def into_parameter(parameters, *_):
        parameters[name].view(-1)[5] = value

    watch, _ = looked_at(into_gradient)
    assert watch.fault(CFG, 3, {}).startswith(f"The gradient of {name} is not finite at step 3, though batch and loss")
    watch, _ = looked_at(into_parameter)
    assert watch.fault(CFG, 3, {}).startswith(f"{name} is not finite after step 3, though its gradient is.")


@pytest.mark.parametrize("name", ["W_enc", "W_dec"])
def test_a_sparse_step_sees_a_bad_row_at_once_and_a_single_entry_before_it_is_saved(name):
    def into_row(parameters, *_):
        by_feature = parameters[name].T if name == "W_enc" else parameters[name]
        by_feature[7] = math.nan

    def into_entry(parameters, *_):
        parameters[name].view(-1)[-1] = math.nan

    watch, _ = looked_at(into_row, whole=False)
    assert watch.fault(CFG, 3, {}).startswith(f"{name} is not finite after step 3")
    watch, parameters = looked_at(into_entry, whole=False)
    assert watch.fault(CFG, 3, {}) is None
    assert watch.fault(CFG, 3, {f"sae.{name}": parameters[name]}).startswith(
        f"sae.{name} held NaN or infinite values after step 3."
    )


def test_the_cause_is_named_and_not_what_followed_from_it():
    def everything(parameters, moments, batch, loss):
        for tensor in (batch, loss, *moments.values(), *parameters.values()):
            tensor.fill_(math.nan)

    def all_but_the_batch(parameters, moments, batch, loss):
        everything(parameters, moments, torch.ones(()), loss)

    watch, _ = looked_at(everything)
    assert watch.fault(CFG, 3, {}).startswith("The batch of step 3 holds NaN or infinite values.")
    watch, _ = looked_at(all_but_the_batch)
    assert watch.fault(CFG, 3, {}).startswith("The loss of step 3 is not finite, though its batch is. Lower lr")


def test_the_first_bad_step_is_kept():
    watch, parameters = looked_at(lambda parameters, *_: parameters["theta"].fill_(math.nan))
    later = torch.full((), math.nan)
    watch.look(4, later, later, parameters, {}, whole=True)
    assert watch.fault(CFG, 5, {}).startswith("theta is not finite after step 3")


def test_looking_reads_nothing_from_the_device():
    """Tensors on the meta device have no values: whoever reads one fails."""
    watch, cfg = Watch(PARAMETERS, torch.device("meta")), replace(CFG, spike_factor=3.0)
    parameters = {name: p.to("meta") for name, p in initial_sae(SAE, CFG).named_parameters()}
    number = torch.ones((), device="meta")
    for whole in (False, True):
        watch.look(9, number, number, parameters, parameters, whole=whole)
        watch.follow(cfg, 9, number)
    with pytest.raises(NotImplementedError):
        watch.fault(cfg, 9, {})


def test_how_to_go_on_is_what_to_type():
    def spoil(parameters, moments, batch, loss):
        loss.fill_(math.nan)

    watch, _ = looked_at(spoil, step=33)
    assert watch.fault(CFG, 35, {}).endswith(
        "Lower lr (now 0.003) or sparsity_weight; there is no checkpoint from before, start again."
    )
    watch.saved = 30
    changed = replace(CFG, lr_changes=((10, 0.5), (35, 0.1)))
    assert watch.fault(changed, 35, {}).endswith(
        "The checkpoint of step 30 is from before. Lower lr from there on: --resume --train.lr-changes 10 0.5 30 0.15 "
        "(resume=True, lr_changes=((10, 0.5), (30, 0.15)))."
    )


# --- spikes


def followed(losses, cfg):
    watch = Watch(PARAMETERS, torch.device("cpu"))
    for step, loss in enumerate(losses, start=1):
        watch.follow(cfg, step, torch.tensor(loss))
    return watch


def test_a_leap_of_the_loss_is_told_with_its_step_loss_and_mean():
    cfg = replace(CFG, spike_factor=3.0)
    losses = [0.5] * (SPIKE_STEPS + 10) + [1.6, 90.0]
    fault = followed(losses, cfg).fault(cfg, 115, {})
    assert fault.startswith(
        "The loss of step 111 is 1.6, 3.2 times its mean over the last 100 steps, 0.5 (spike_factor"
    )
    assert fault.endswith("If it leaps there again, look at that batch, or raise spike_factor.")
    assert followed(losses, replace(cfg, spike_factor=4.0)).fault(cfg, 115, {}).startswith("The loss of step 112")


def test_no_leap_is_seen_in_the_warm_up_before_enough_steps_or_when_off():
    losses = [0.5] * (SPIKE_STEPS + 10) + [90.0] + [0.5] * 10
    assert followed(losses, CFG).fault(CFG, 121, {}) is None
    for cfg in (replace(CFG, spike_factor=3.0, lr_warmup_steps=111), replace(CFG, spike_factor=300.0)):
        assert followed(losses, cfg).fault(cfg, 121, {}) is None
    early = replace(CFG, spike_factor=3.0)
    assert followed([0.5] * (SPIKE_STEPS - 1) + [90.0], early).fault(early, 100, {}) is None


def test_the_mean_forgets_old_losses():
    cfg = replace(CFG, spike_factor=3.0)
    mean, count = followed([10.0] * 200 + [1.0] * 600, cfg).loss_mean.tolist()
    assert count == SPIKE_STEPS
    assert mean == pytest.approx(1 + 9 * (1 - 1 / SPIKE_STEPS) ** 600)


# --- failures to train


LINE = {"loss": 0.5, "mse": 0.4, "l0": 32.0, "dead": 0, "step": 40}
WELL = Measured(moved=3.0, window=0.05)
AIMED = replace(CFG, sparsity="target_mean_l0", target_l0=32.0, log_threshold=True)


def test_a_healthy_run_is_told_nothing():
    assert failures(CFG, LINE, F, WELL) == {}
    assert failures(AIMED, LINE, F, replace(WELL, moved=0.001)) == {}  # at its target, so nothing had to move


@pytest.mark.parametrize(
    ("kind", "cfg", "line", "measured", "message"),
    [
        (
            "thresholds",
            AIMED,
            {"l0": 400.0},
            {"moved": 0.004},
            r"0\.40%.* L0 is 400, with target_l0 32.*no-log-threshold",
        ),
        ("thresholds", CFG, {}, {"moved": 0.004}, r"moved by 0\.40%.*raise lr \(now 0\.003\)"),
        (
            "bandwidth",
            CFG,
            {},
            {"window": 1e-4},
            r"Only 0\.0001 .*--train\.bandwidth 0\.5 or more",
        ),
        (
            "saturated",
            CFG,
            {"loss": 9.0},
            {},
            r"21\.5 times the reconstruction error.*--train\.sparsity target_mean_l0",
        ),
        (
            "dead",
            CFG,
            {"dead": 12},
            {},
            r"12 of 24 features are dead \(silent for 128 rows\).*--train\.resample-every 4",
        ),
    ],
)
def test_each_failure_is_one_sentence_with_what_to_type(kind, cfg, line, measured, message):
    found = failures(cfg, {**LINE, **line}, F, replace(WELL, **measured))
    assert list(found) == [kind]
    assert re.search(message, found[kind]), found[kind]


def test_other_architectures_are_told_of_dead_features_only():
    cfg = replace(CFG, architecture="topk", k=4, sparsity_weight=0.0)
    assert list(failures(cfg, {**LINE, "dead": 12}, F, Measured(moved=0.0, window=0.0))) == ["dead"]


def test_a_run_is_looked_at_once_half_of_it_and_the_sparsity_warm_up_are_over():
    assert next(step for step in range(1, 41) if time_to_look(CFG, step)) == 20
    assert [step for step in range(1, 41) if time_to_look(replace(CFG, sparsity_warmup_steps=90), step)] == [40]


# --- in a run


def batches():
    return endless(lambda seed: normal_rows(seed, B, D))


def run(cfg=CFG, source=None, **options):
    return train(initial_sae(SAE, cfg), batches() if source is None else source, cfg, **options)


def assert_last_checkpoint_is_good(folder, step):
    paths = sorted((folder / "checkpoints").iterdir())
    assert paths[-1].name == f"step-{step:09d}.safetensors"
    assert all(t.isfinite().all() for t in load_file(paths[-1]).values() if t.is_floating_point())


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_spoiled_gradient_stops_the_run_with_its_name_and_step_and_a_good_checkpoint(tmp_path, monkeypatch, name):
    healthy = state_module.loss_and_gradients
    calls = itertools.count(1)

    def spoiled(*arguments):
        terms, gradients = healthy(*arguments)
        if next(calls) == 13:
            gradients[name].view(-1)[5] = math.nan
        return terms, gradients

    monkeypatch.setattr(state_module, "loss_and_gradients", spoiled)
    with pytest.raises(
        TrainError, match=rf"The gradient of {name} is not finite at step 13.*--train.lr-changes 10 0\.3"
    ):
        run(replace(CFG, engine="dense"), folder=tmp_path)
    assert_last_checkpoint_is_good(tmp_path, 10)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_spoiled_parameter_stops_the_run_with_its_name_and_step_and_a_good_checkpoint(
    tmp_path, monkeypatch, engine, name
):
    healthy = Adam.update

    def spoiled(self, gradients, lr):
        healthy(self, gradients, lr)
        if self.steps == 13:
            by_feature = self.rows(name)[0] if name in FEATURE_AXIS else self.parameters[name].data
            by_feature[3] = math.inf

    monkeypatch.setattr(Adam, "update", spoiled)
    with pytest.raises(TrainError, match=rf"^{name} is not finite after step 13, though its gradient is\."):
        run(replace(CFG, engine=engine), folder=tmp_path)
    assert_last_checkpoint_is_good(tmp_path, 10)


def with_a_leap(at):
    for step, x in enumerate(batches(), start=1):
        yield 8 * x if step == at else x


LONG = replace(CFG, steps=160, checkpoint_every=20)


def test_a_leap_stops_the_run_before_the_next_checkpoint_and_it_goes_on_as_the_sentence_says(tmp_path):
    cfg = replace(LONG, spike_factor=3.0)
    with pytest.raises(TrainError, match=r"The loss of step 131 is .*--resume --train.lr-changes 120 0.3") as stopped:
        run(cfg, with_a_leap(131), folder=tmp_path)
    assert "raise spike_factor" in str(stopped.value)
    assert_last_checkpoint_is_good(tmp_path, 120)
    lower = replace(cfg, lr_changes=((120, 0.3),))
    with pytest.raises(TrainError, match="The loss of step 131 is"):  # the batch is at fault
        run(lower, with_a_leap(131), folder=tmp_path, resume=True)
    done = run(replace(lower, spike_factor=None), with_a_leap(131), folder=tmp_path, resume=True)
    assert done.steps == 160
    assert [line["lr"] for line in done.history if line["step"] in (120, 125)] == pytest.approx([3e-3, 0.9e-3])


def test_without_a_spike_factor_a_leap_is_let_go_and_with_one_nothing_changes_until_it(tmp_path):
    run(LONG, with_a_leap(131))
    plain, watched = run(LONG), run(replace(LONG, spike_factor=50.0))
    assert same_bits(plain.sae, watched.sae)
    assert plain.history == watched.history


def test_the_running_mean_survives_a_resume(tmp_path):
    cfg = replace(LONG, spike_factor=3.0)
    with pytest.raises(TrainError, match="ended after 130"):
        run(cfg, itertools.islice(batches(), 130), folder=tmp_path)
    with pytest.raises(TrainError, match="The loss of step 131 is"):
        run(cfg, with_a_leap(131), folder=tmp_path, resume=True)


def test_a_resumed_run_may_change_the_learning_rate_from_its_checkpoint_on(tmp_path):
    changed = replace(CFG, lr_changes=((20, 0.25), (35, 1.0)))
    run(changed, folder=tmp_path / "whole")
    with pytest.raises(TrainError, match="ended after 20"):
        run(CFG, itertools.islice(batches(), 20), folder=tmp_path / "run")
    for early in ((19, 0.25),), ((0, 2.0), (20, 0.25)):
        with pytest.raises(TrainError, match=r"its last checkpoint is of step 20, and only lr_changes from there on"):
            run(replace(CFG, lr_changes=early), folder=tmp_path / "run", resume=True)
    with pytest.raises(TrainError, match="ended after 32"):
        run(changed, itertools.islice(batches(), 32), folder=tmp_path / "run", resume=True)
    with pytest.raises(TrainError, match="its last checkpoint is of step 32"):  # what is done cannot be undone
        run(CFG, folder=tmp_path / "run", resume=True)
    run(changed, folder=tmp_path / "run", resume=True)
    last = Path("checkpoints") / "step-000000040.safetensors"
    for name in ("metrics.jsonl", last):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_whose_thresholds_stand_still_says_so_once_with_what_to_type(capsys):
    cfg = replace(CFG, log_threshold=True, lr=1e-5, sparsity="target_mean_l0", target_l0=1.0)
    done = run(cfg)
    told = [sentence for sentence in done.warnings if "Thresholds moved by" in sentence]
    assert len(told) == 1
    assert "--train.no-log-threshold" in told[0]
    assert capsys.readouterr().err.count("Thresholds moved by") == 1


def test_a_run_with_dead_features_says_so_with_what_to_type():
    sae = initial_sae(SAE, CFG)
    with torch.no_grad():
        sae.b_enc[:5] = -50.0
    done = train(sae, batches(), CFG)
    assert any("5 of 24 features are dead" in sentence for sentence in done.warnings)
