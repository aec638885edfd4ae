"""Memory is counted before a run starts: the parts are what the run holds, and what is proposed does fit."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mistudio.errors import TrainError
from mistudio.sae import SAEConfig, TranscoderConfig
from mistudio.train import TrainConfig, initial_sae, memory, train
from mistudio.train.memory import (
    available_bytes,
    check_memory,
    most_micro_features,
    most_micro_rows,
    training_bytes,
    widest,
)
from mistudio.train.sparse import PIECE_ENTRIES
from mistudio.train.state import TrainState

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CFG = TrainConfig(steps=3, batch_rows=2048, sparsity_weight=0.1)
WIDE = SAEConfig(d_model=2304, d_sae=393_216, scale=1.0)
SMALL = SAEConfig(d_model=16, d_sae=512, scale=1.0)


def total(config, cfg, device=CPU):
    return sum(training_bytes(config, cfg, device).values())


@pytest.mark.parametrize("config", [SMALL, TranscoderConfig(d_model=16, d_out=8, d_sae=512, skip=True)])
def test_weights_and_moments_are_counted_to_the_byte(config):
    config = replace(config, scale=1.0, scale_out=1.0) if isinstance(config, TranscoderConfig) else config
    cfg = replace(CFG, batch_rows=8)
    tensors = TrainState(initial_sae(config, cfg), cfg).tensors()
    parts = training_bytes(config, cfg, CPU)
    for part, prefix in (("weights", "sae."), ("second moments", "adam.")):
        named = [t for name, t in tensors.items() if name.startswith(prefix) and name != "adam.row_steps"]
        assert parts[part] == sum(t.numel() * t.element_size() for t in named)


def test_393216_features_of_2304_numbers_take_16_gb_sparsely_and_23_densely():
    parts = training_bytes(WIDE, replace(CFG, engine="sparse"), CPU)
    assert [round(parts[name] / 1e9, 1) for name in ("weights", "second moments")] == [7.3, 7.3]
    assert sum(parts.values()) < 18e9
    assert total(WIDE, CFG) > 22e9
    on_gpu = training_bytes(WIDE, replace(CFG, engine="sparse"), GPU)
    assert round(on_gpu["the encoder's rounded copy"] / 1e9, 1) == 1.8


def test_a_gpu_without_being_asked_takes_dense_steps_only():
    cfg = replace(CFG, architecture="batchtopk", k=64, sparsity_weight=0.0)
    for asked in (CFG, cfg):
        assert training_bytes(WIDE, asked, GPU) == training_bytes(WIDE, replace(asked, engine="dense"), GPU)


def test_a_million_features_fit_into_80_gb():
    assert total(replace(WIDE, d_sae=1 << 20), replace(CFG, engine="sparse"), GPU) < 80e9
    assert total(replace(WIDE, d_sae=1 << 20), replace(CFG, batch_rows=4096, micro_rows=256), GPU) < 80e9


def test_393216_features_can_start_densely_within_24_gb_in_blocks():
    assert total(WIDE, replace(CFG, micro_features=16_384)) < 20e9
    features = most_micro_features(WIDE, CFG, CPU, 20e9)
    assert features is not None
    assert total(WIDE, replace(CFG, micro_features=features)) <= 20e9
    assert total(WIDE, replace(CFG, micro_features=2 * features)) > 20e9
    assert most_micro_features(WIDE, replace(CFG, clip_norm=1.0), CPU, 20e9) is None


def test_architectures_that_keep_k_never_start_densely():
    cfg = replace(CFG, architecture="batchtopk", k=64, sparsity_weight=0.0)
    assert "gradients" not in training_bytes(WIDE, cfg, CPU)
    assert "gradients" in training_bytes(WIDE, replace(cfg, engine="dense"), CPU)
    assert "gradients" in training_bytes(WIDE, replace(cfg, clip_norm=1.0), CPU)


@pytest.mark.parametrize("room", [5e9, 9e9, 13e9])
@pytest.mark.parametrize("engine", ["auto", "sparse"])
def test_the_width_proposed_fits_and_the_next_does_not(room, engine):
    cfg = replace(CFG, engine=engine)
    width = widest(WIDE, cfg, CPU, room)
    assert 0 < width < WIDE.d_sae
    assert total(replace(WIDE, d_sae=width), cfg) <= room < total(replace(WIDE, d_sae=width + 128), cfg)


def test_every_thread_of_a_sparse_step_has_a_piece_of_z(monkeypatch):
    cfg = replace(CFG, engine="sparse")
    one = total(WIDE, cfg), total(WIDE, cfg, GPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert total(WIDE, cfg) - one[0] == 3 * 3 * 4 * PIECE_ENTRIES
    assert total(WIDE, cfg, GPU) == one[1]


def test_the_micro_rows_proposed_fit_and_twice_as_many_do_not():
    config, cfg = replace(WIDE, d_sae=131_072), replace(CFG, batch_rows=4096)
    room = 10e9
    rows = most_micro_rows(config, cfg, GPU, room)
    assert rows is not None
    assert total(config, replace(cfg, micro_rows=rows), GPU) <= room
    assert total(config, replace(cfg, micro_rows=2 * rows), GPU) > room
    assert most_micro_rows(config, cfg, GPU, 1e9) is None


def test_too_little_memory_is_said_with_what_would_fit():
    cfg = replace(CFG, engine="auto")
    sae = initial_sae(SMALL, cfg)
    held = sum(p.numel() * 4 for p in sae.parameters())
    room = total(SMALL, replace(cfg, engine="sparse")) + 1000
    with pytest.raises(TrainError) as said:
        check_memory([sae], [cfg], available=room - held)
    assert re.search(r"Training 512 features takes about .* GB on cpu \(weights .*gradients", str(said.value))
    assert "What would fit: a width of" in str(said.value)
    assert "engine sparse" in str(said.value)
    check_memory([sae], [cfg], available=total(SMALL, cfg) - held)


def test_what_is_proposed_for_393216_features():
    proposed = memory._what_fits(WIDE, CFG, CPU, 20e9)
    assert [re.sub(r"[\d,]+", "n", change) for change in proposed] == [
        "a width of n",
        "micro_features n",
        "engine sparse (for an SAE of which few features fire from the start)",
    ]


def test_several_saes_are_counted_together():
    cfg = replace(CFG, batch_rows=8)
    saes = [initial_sae(SMALL, cfg) for _ in range(3)]
    held = 3 * sum(p.numel() * 4 for p in saes[0].parameters())
    with pytest.raises(TrainError, match=r"these 3 SAEs together takes .* What would fit: 2 of them at a time"):
        check_memory(saes, [cfg] * 3, available=2 * total(SMALL, cfg) + 1000 - held)
    check_memory(saes, [cfg] * 3, available=3 * total(SMALL, cfg) - held)


def test_a_run_that_does_not_fit_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    with pytest.raises(TrainError, match=r"0\.0 GB are there"):
        train(initial_sae(SMALL, CFG), [], CFG, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_do_not_fit_are_refused_before_they_are_drawn():
    for width in (10**11, 10**25):
        with pytest.raises(TrainError, match=r"GB of weights, and .* GB of memory are there\. Lower the width"):
            initial_sae(
                replace(SMALL, d_sae=width), replace(CFG, sparsity="target_mean_l0", target_l0=9.0, start_factor=1.0)
            )


def test_memory_that_cannot_be_told_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    check_memory([initial_sae(SMALL, CFG)], [CFG])


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells")
def test_this_machines_memory_is_a_number():
    assert 1e6 < available_bytes(CPU) < 1e15
    assert available_bytes(torch.device("meta")) is None


def test_a_containers_limit_counts_where_it_is_the_smaller(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_machine", lambda: 10**12)
    monkeypatch.setattr(memory, "_group", lambda: 10**9)
    assert available_bytes(CPU) == 10**9
    (tmp_path / "f").write_text("MemTotal: 5 kB\nMemAvailable:   3 kB\n")
    assert memory._number(tmp_path / "f", "MemAvailable:", 1024) == 3072
    assert memory._number(tmp_path / "f", "Missing:") is None
    (tmp_path / "g").write_text("max\n")
    assert memory._number(tmp_path / "g") is None
