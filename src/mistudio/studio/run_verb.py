"""`mistudio run`: a recipe from text to steering, each stage one of the other verbs, all into one workspace.

With --resume, stages whose result is there are kept, and a stage that was cut short goes on where it was.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console, Group, RenderableType

from mistudio.collect import CollectConfig
from mistudio.config import read_plain, to_dict
from mistudio.errors import ConfigError
from mistudio.evaluate import EvalReport
from mistudio.files import write_json
from mistudio.studio import collect_verb, concepts_verb, eval_verb, topic_steering, train_verb
from mistudio.studio.recipe import Recipe, SAEStage, load_recipe
from mistudio.studio.workspace import refuse_occupied, refuse_url, sae_folder, store_folder


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which recipe, and where to."""

    recipe: Annotated[Path, tyro.conf.Positional]
    """A recipe's YAML file, such as recipes/demo.yaml."""
    workspace: Path
    """Folder for everything; new or empty, unless --resume."""
    resume: bool = False
    """Go on with an interrupted run of the same recipe."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out; also in WORKSPACE/summary.json."""

    workspace: str
    """The folder."""
    evaluations: list[EvalReport]
    """One an SAE."""
    concepts: concepts_verb.Result | None
    """Features matched to concepts."""
    steering: topic_steering.TopicSteering | None
    """Steered stories and their controls."""


def run(config: Config) -> Result:
    """Runs the recipe's stages in order."""
    return run_recipe(load_recipe(config.recipe), config.workspace, config.resume)


def run_recipe(recipe: Recipe, workspace: Path, resume: bool) -> Result:
    """The chain. ConfigError: the workspace is occupied, or was made by another recipe."""
    _claim(recipe, workspace, resume)
    _say(f"1/5 collecting {recipe.collect.tokens:,} tokens at {len(recipe.collect.sites)} sites of {recipe.model}")
    collect_verb.run(_collect_config(recipe, workspace))
    _say(f"2/5 training {len(recipe.saes)} SAEs")
    for stage in recipe.saes:
        if not (sae_folder(workspace, stage.site) / "sae.json").exists():
            train_verb.run(_train_config(recipe, stage, workspace))
    _say("3/5 measuring them on held-out text")
    evaluations = [eval_verb.run(_eval_config(recipe, stage, workspace)) for stage in recipe.saes]
    concepts, steering = None, None
    if recipe.concepts:
        _say(f"4/5 finding what features mean at {recipe.concepts.site}")
        concepts = concepts_verb.run(_concepts_config(recipe, workspace))
    if recipe.steer and concepts:
        _say("5/5 steering with one of them")
        steering = topic_steering.run(Path(concepts.sae), concepts.matches, recipe.steer)
        write_json(workspace / "steering.json", to_dict(steering))
    result = Result(workspace=str(workspace), evaluations=evaluations, concepts=concepts, steering=steering)
    write_json(workspace / "summary.json", to_dict(result))
    return result


def _claim(recipe: Recipe, workspace: Path, resume: bool) -> None:
    """Writes recipe.json into a new workspace; into an old one only the same recipe may go on."""
    refuse_url(workspace)
    kept = workspace / "recipe.json"
    if not resume:
        refuse_occupied(workspace, "Choose another --workspace, or continue the run with --resume.")
    elif kept.exists() and read_plain(kept) != to_dict(recipe):
        raise ConfigError(f"{workspace} was made by another recipe ({kept}); choose another --workspace.")
    workspace.mkdir(parents=True, exist_ok=True)
    write_json(kept, to_dict(recipe))


def _collect_config(recipe: Recipe, workspace: Path) -> CollectConfig:
    stage, out = recipe.collect, store_folder(workspace)
    return CollectConfig(
        sites=stage.sites,
        tokens=stage.tokens,
        out=out,
        model=recipe.model,
        text=recipe.text,
        column=recipe.column,
        separator=recipe.separator,
        held_out=recipe.held_out,
        context=stage.context,
        lm_batch_rows=stage.lm_batch_rows,
        bucket_rows=stage.bucket_rows,
        seed=recipe.seed,
        resume=out.exists(),
    )


def _train_config(recipe: Recipe, stage: SAEStage, workspace: Path) -> train_verb.Config:
    out = sae_folder(workspace, stage.site)
    return train_verb.Config(
        store=str(store_folder(workspace)),
        site=stage.site,
        width=stage.width,
        out=out,
        recipe=stage.recipe,
        train=replace(train_verb.train_config(stage.recipe, stage.options), seed=recipe.seed),
        resume=out.exists(),
    )


def _eval_config(recipe: Recipe, stage: SAEStage, workspace: Path) -> eval_verb.Config:
    return eval_verb.Config(
        sae=sae_folder(workspace, stage.site),
        text=recipe.text,
        column=recipe.column,
        separator=recipe.separator,
        held_out=recipe.held_out,
        rows=recipe.evaluate.rows,
        context=recipe.evaluate.context,
    )


def _concepts_config(recipe: Recipe, workspace: Path) -> concepts_verb.Config:
    assert recipe.concepts is not None
    return concepts_verb.Config(
        sae=sae_folder(workspace, recipe.concepts.site),
        text=recipe.text,
        held_out=recipe.held_out,
        documents=recipe.concepts.documents,
    )


def _say(text: str) -> None:
    Console(stderr=True).print(text, style="bold", highlight=False)


def show(result: Result) -> RenderableType:
    """The tables of all stages."""
    parts: list[RenderableType] = [eval_verb.evaluation_table(result.evaluations)]
    if result.concepts:
        parts.append(concepts_verb.show(result.concepts))
    if result.steering:
        parts.append(topic_steering.show(result.steering))
    folder = sae_folder(Path(result.workspace), result.evaluations[0].site)
    parts.append(f"Everything is in {result.workspace}. Go on with its SAEs, for instance:")
    feature = result.steering.feature if result.steering else 0
    strength = result.steering.strength if result.steering else 10.0
    parts.append(
        f'  mistudio steer "Once upon a time" --sae {folder} --feature {feature} --strength {strength:.3g} --seeds 3'
    )
    return Group(*parts)
