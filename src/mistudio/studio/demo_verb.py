"""`mistudio demo`: the recipe that ships with the package."""

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import RenderableType

from mistudio.studio.recipe import Recipe, load_recipe
from mistudio.studio.run_verb import Result, run_recipe
from mistudio.studio.run_verb import show as show_run


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where to, and how thoroughly."""

    workspace: Path = Path("workspace/demo")
    """Folder for everything; new or empty, unless --resume."""
    fast: bool = False
    """The shortest form, under a minute: too little training for good numbers, but every stage runs."""
    resume: bool = False
    """Go on with an interrupted demo."""


def demo_recipe(fast: bool) -> Recipe:
    """The recipe in the package."""
    with as_file(files("mistudio.studio") / ("demo_fast.yaml" if fast else "demo.yaml")) as path:
        return load_recipe(path)


def run(config: Config) -> Result:
    """Runs it."""
    return run_recipe(demo_recipe(config.fast), config.workspace, config.resume)


def show(result: Result) -> RenderableType:
    """What `mistudio run` shows."""
    return show_run(result)
