"""The pure parts of the benchmark scripts: what they count, choose and measure."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import quality
import step_vs_peers
import width
from parts import rows, superposition


def test_a_million_features_fit_80_gb_and_not_for_a_dense_trainer():
    plan = width.sparse_bytes(2304, 1 << 20, 4096, 70.0, gpu=True)
    assert plan.weights == plan.moments == 2 * 4 * 2304 * (1 << 20)
    assert plan.rounded == 2 * 2304 * (1 << 20)
    assert plan.total < 50e9
    assert width.dense_bytes(2304, 1 << 20) > 77e9


def test_the_planted_state_has_about_the_wanted_l0():
    sae, x, _ = width.planted_cheaply(64, 512, 128, 12.0)
    l0 = (sae.pre_activations(x) > sae.threshold).sum(1).double().mean().item()
    assert l0 == pytest.approx(12.0, rel=0.05)
    assert x.square().sum(1).mean().item() == pytest.approx(1.0, rel=1e-4)


def test_the_ratio_is_against_the_peers_best_mode_and_failures_do_not_count():
    found = {
        "ours": {"seconds": [1.0, 3.0, 2.0], "floor": [1.0], "bytes": 100},
        "saelens float32": {"seconds": [40.0], "bytes": 300},
        "saelens autocast": {"seconds": [20.0], "bytes": 250},
        "dictionary_learning float32": {"failed": "does not fit into this machine's memory"},
    }
    result = step_vs_peers.compare(found)
    assert result["best"] == 10.0
    assert result["over_floor"] == 2.0
    assert result["least_memory"] == 2.5
    assert set(result["modes"]) == {"saelens float32", "saelens autocast"}


def test_the_frontier_is_linear_over_log_l0_and_says_nothing_outside():
    points = [(40.0, 0.1), (10.0, 0.3)]
    assert quality.at_l0(points, 20.0) == pytest.approx(0.2)
    assert quality.at_l0(points, 9.0) is None


def line(lr, l0, fvu, **more):
    cell = {"source": "demo", "trainer": "t", "target_l0": 32.0, "lr": lr}
    return {"cell": cell, "validation": {"l0": l0, "fvu": fvu, **more}}


def test_the_best_learning_rate_is_the_lowest_fvu_among_those_that_reach_the_l0():
    lines = [line(1, 33.0, 0.2), line(2, 30.0, 0.15), line(3, 300.0, 0.01), line(4, 32.0, float("nan"))]
    assert quality.chosen(lines, "demo")["t", 32.0]["cell"]["lr"] == 2
    assert quality.chosen([line(3, 300.0, 0.01), line(5, 60.0, 0.1)], "demo")["t", 32.0]["cell"]["lr"] == 5


def test_fvu_of_the_mean_is_one_and_of_an_exact_code_zero():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(4)
    silent = {
        "W_enc": eye,
        "W_dec": eye,
        "b_enc": torch.zeros(4),
        "b_dec": x.mean(0),
        "threshold": torch.full((4,), 99.0),
    }
    found = quality.measured(silent, x)
    assert (found["l0"], found["silent"]) == (0.0, 1.0)
    assert found["fvu"] == pytest.approx(1.0, rel=1e-6)
    both = torch.cat((eye, -eye))
    exact = {
        "W_enc": both.T,
        "W_dec": both,
        "b_enc": torch.zeros(8),
        "b_dec": torch.zeros(4),
        "threshold": torch.zeros(8),
    }
    assert quality.measured(exact, x)["fvu"] == pytest.approx(0.0, abs=1e-12)


def test_true_features_are_found_by_themselves():
    world = superposition.world(32, 64, 5.0)
    _, a = world.draw(2000, seed=1)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    W_dec = world.directions[order] * 3.0
    assert superposition.matched_cosine(W_dec, world.directions) == pytest.approx(1.0, abs=1e-6)
    seen = (a > 0).any(0).double().mean().item()
    assert superposition.f1(W_dec, a[:, order], a, world.directions) == pytest.approx(seen)
    assert superposition.f1(W_dec, torch.zeros_like(a), a, world.directions) == 0.0


def test_the_world_is_sparse_nested_and_follows_its_seed():
    world = superposition.world(32, 64, 5.0)
    x, a = world.draw(4000, seed=1)
    on = a > 0
    assert on.sum(1).double().mean().item() == pytest.approx(5.0, rel=0.2)
    assert (on <= on[:, world.parent]).all()
    assert on[:, :8].double().mean() > 3 * on[:, 32:].double().mean()
    again, _ = superposition.world(32, 64, 5.0).draw(4000, seed=1)
    assert torch.equal(x, again)


def test_rows_are_centred_scaled_and_shuffled_as_one(tmp_path):
    from safetensors.torch import load_file

    parts = {name: torch.randn(50, 3) * 7 + 2 for name in rows.PARTS}
    rows.write_rows(tmp_path / "r.safetensors", parts)
    found = load_file(tmp_path / "r.safetensors")
    assert found["train"].mean(0).abs().max() < 1e-6
    assert found["train"].square().sum(1).mean().item() == pytest.approx(1.0, rel=1e-5)
    back = (parts["held_out"] - parts["train"].mean(0)) / found["held_out"]
    assert (back / back[0, 0] - 1).abs().max() < 1e-3


def test_articles_begin_at_titles_and_every_tenth_is_held_out():
    text = "\n = One = \n\n = = Part = = \n words \n\n = Two = \n more \n"
    assert [article.splitlines()[0] for article in rows.articles(text)] == [" = One = ", " = Two = "]
    parts = rows.by_part(str(n) for n in range(20))
    assert parts["held_out"] == ["1", "11"]
    assert len(parts["train"]) == 16
