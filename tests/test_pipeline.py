"""The whole chain on the bundled model, at a size that runs in seconds."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mistudio.collect import StreamConfig
from mistudio.config import to_dict
from mistudio.errors import ConfigError
from mistudio.studio import run_verb, train_live_verb, train_verb
from mistudio.studio.demo_verb import demo_recipe
from mistudio.studio.recipe import CollectStage, ConceptStage, EvalStage, Recipe, SAEStage, SteerStage, load_recipe
from mistudio.studio.topic_steering import topic_share
from mistudio.train.state import TrainState

SITES = ("layers.1.resid_post", "layers.1.attn_z")
OPTIONS = {"steps": 12, "batch_rows": 128, "target_l0": 16, "checkpoint_every": 5, "log_every": 4}
TINY = Recipe(
    name="tiny",
    model="demo",
    text="stories",
    collect=CollectStage(sites=SITES, tokens=1200, context=64, bucket_rows=500),
    saes=tuple(SAEStage(site=site, width=48, options=OPTIONS) for site in SITES),
    evaluate=EvalStage(rows=4, context=64),
    concepts=ConceptStage(site=SITES[0], documents=6),
    steer=SteerStage(
        prompt="Once upon a time", strength_of_max=1.0, samples=2, max_new_tokens=6, temperature=0.8
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workspace where the recipe ran through, and its result."""
    workspace = tmp_path_factory.mktemp("finished") / "workspace"
    return workspace, run_verb.run_recipe(TINY, workspace, resume=False)


def weights(workspace):
    return {site: (workspace / "saes" / site / "sae.safetensors").read_bytes() for site in SITES}


def test_every_stage_leaves_its_result(finished):
    workspace, result = finished
    assert [report.site for report in result.evaluations] == list(SITES)
    assert json.loads((workspace / "summary.json").read_text())["evaluations"][0]["site"] == SITES[0]
    for name in ("sae.json", "metrics.jsonl", "evaluation.json", "training.png", "activation_frequency.png"):
        assert (workspace / "saes" / SITES[0] / name).stat().st_size > 0
    assert len(result.steering.steered) == len(result.steering.random) == 2
    assert result.steering.effect.low <= result.steering.effect.mean <= result.steering.effect.high


def test_a_run_cut_short_and_resumed_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
    whole, result = finished
    calls = []

    def interrupted(config):
        calls.append(config.site)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(config)

    original = train_verb.run
    monkeypatch.setattr(train_verb, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_verb.run_recipe(TINY, tmp_path / "w", resume=False)
    monkeypatch.setattr(train_verb, "run", original)
    resumed = run_verb.run_recipe(TINY, tmp_path / "w", resume=True)
    assert weights(tmp_path / "w") == weights(whole)
    assert replace(resumed, workspace=result.workspace).evaluations == result.evaluations
    assert to_dict(resumed.steering) == to_dict(result.steering)


def test_a_workspace_in_use_is_refused_and_nothing_is_lost(finished):
    workspace, _ = finished
    before = sorted(p.name for p in workspace.iterdir())
    with pytest.raises(ConfigError, match="--resume"):
        run_verb.run_recipe(TINY, workspace, resume=False)
    assert sorted(p.name for p in workspace.iterdir()) == before


def test_another_recipe_may_not_go_on_in_the_same_workspace(finished):
    workspace, _ = finished
    with pytest.raises(ConfigError, match="another recipe"):
        run_verb.run_recipe(replace(TINY, seed=1), workspace, resume=True)


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_in_the_repository_is_valid(path):
    recipe = load_recipe(path)
    for stage in recipe.saes:
        train_verb.train_config(stage.recipe, stage.options)


@pytest.mark.parametrize("fast", [False, True])
def test_the_demos_recipes_are_valid(fast):
    recipe = demo_recipe(fast)
    assert recipe.model == "demo"
    for stage in recipe.saes:
        assert train_verb.train_config(stage.recipe, stage.options).target_l0 <= 32


def test_the_share_of_topic_words_is_counted_over_all_words():
    assert topic_share(["The dolphin swam.", "It was happy!"], "sea") == 2 / 6
    assert topic_share([""], "sea") == 0.0


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    example = Path(__file__).parents[1] / "examples" / "pipeline.py"
    assert len(example.read_text().splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(example), str(tmp_path), "3000"])
    runpy.run_path(str(example))
    assert "delta loss" in capsys.readouterr().out


def test_an_sae_is_trained_straight_from_the_model_and_resumes_to_the_same_bits(tmp_path, monkeypatch):
    def config(out, resume=False):
        options = {"steps": 9, "batch_rows": 64, "target_l0": 16, "checkpoint_every": 4, "log_every": 3}
        return train_live_verb.Config(
            source=StreamConfig(site=SITES[0], context=64, buffer_rows=300, lm_batch_rows=2),
            width=48,
            out=out,
            train=train_verb.train_config("quick", options),
            resume=resume,
        )

    result = train_live_verb.run(config(tmp_path / "whole"))
    assert result.rows == 9 * 64
    update = TrainState.update

    def cut_short(state, *given):
        if state.step == 6:
            raise KeyboardInterrupt
        return update(state, *given)

    monkeypatch.setattr(TrainState, "update", cut_short)
    with pytest.raises(KeyboardInterrupt):
        train_live_verb.run(config(tmp_path / "cut"))
    monkeypatch.setattr(TrainState, "update", update)
    train_live_verb.run(config(tmp_path / "cut", resume=True))
    assert (tmp_path / "cut/sae.safetensors").read_bytes() == (tmp_path / "whole/sae.safetensors").read_bytes()
