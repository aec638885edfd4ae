"""Schedules are the published curves."""

import math
from dataclasses import replace

import pytest

from mistudio.config import from_dict, to_dict
from mistudio.errors import ConfigError
from mistudio.train import TrainConfig
from mistudio.train.schedules import length_warnings, lr_at, sparsity_weight_at

CFG = TrainConfig(steps=10_000, sparsity_weight=6e-4, lr=1.0, lr_warmup_steps=1000, sparsity_warmup_steps=500)


def test_learning_rate_warms_up_along_a_cosine_from_a_tenth():
    assert lr_at(CFG, 0) == pytest.approx(0.1)
    assert lr_at(CFG, 250) == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2)  # a line would give 0.325
    assert lr_at(CFG, 500) == pytest.approx(0.55)
    assert lr_at(CFG, 1000) == lr_at(CFG, 9999) == 1.0


def test_learning_rate_decays_linearly_over_the_last_part_only():
    cfg = replace(CFG, lr_decay_fraction=0.3)
    assert lr_at(cfg, 7000) == 1.0
    assert lr_at(cfg, 8500) == pytest.approx(0.5)
    assert lr_at(cfg, 9999) == pytest.approx(1 / 3000)


def test_sparsity_weight_rises_linearly_from_zero():
    assert sparsity_weight_at(CFG, 0) == 0
    assert sparsity_weight_at(CFG, 125) == pytest.approx(6e-4 / 4)
    assert sparsity_weight_at(CFG, 500) == sparsity_weight_at(CFG, 9999) == 6e-4
    assert sparsity_weight_at(replace(CFG, sparsity_warmup_steps=0), 0) == 6e-4


def test_a_run_shorter_than_its_warm_ups_is_warned_about():
    assert length_warnings(CFG) == []
    both = length_warnings(replace(CFG, steps=499))
    assert ["learning-rate warm-up of 1,000" in both[0], "sparsity warm-up of 500" in both[1]] == [True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"lr": 1e300}, "lr must be a positive number up to"),
        ({"bandwidth": math.nan}, "bandwidth must be a positive number"),
        ({"lr_decay_fraction": 1.5}, "lr_decay_fraction must be between 0 and 1"),
        ({"sparsity_weight": -1.0}, "sparsity_weight"),
        ({"target_l0": 32.0}, "no effect with sparsity l0"),
        ({"sparsity": "target_mean_l0"}, "needs a positive target_l0"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(CFG, **change)


def test_a_configuration_survives_plain_data():
    cfg = replace(CFG, sparsity="target_token_l0", target_l0=20.0, wandb="offline")
    assert from_dict(TrainConfig, to_dict(cfg)) == cfg
