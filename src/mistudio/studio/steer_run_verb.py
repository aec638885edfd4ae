"""`mistudio steer-run`: a recorded experiment again, with the same weights, and whether it gives the same tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Group, RenderableType
from rich.text import Text

from mistudio.steer import Outcome, Record, check_record, rows_tokens, run_experiment
from mistudio.studio import steer_verb
from mistudio.studio.steer_lab import load_lab


@dataclass(frozen=True, kw_only=True)
class Config:
    """The record, and where its SAE is now."""

    experiment: Annotated[Path, tyro.conf.Positional]
    """The file that `mistudio steer --save` wrote."""
    sae: Path | None = None
    """Folder of the SAE; None: where it was."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out this time, and how it differs from the record."""

    outcome: Outcome
    """The experiment, run again."""
    same_rows: int
    """Rows whose tokens are the recorded ones."""
    rows: int
    """All rows."""
    first_difference: str | None
    """The first row that differs, and at which of its tokens."""
    recorded_versions: dict[str, str]
    """Versions of the packages that the record was made with."""


def run(config: Config) -> Result:
    """Runs it again. ConfigError: the file is no record, or the weights are others."""
    record = Record.load(config.experiment)
    vectors = {name: Path(file) for name, file in record.vectors.items()}
    lab, _ = load_lab(config.sae or Path(record.sae), record.model, vectors)
    check_record(lab, record)
    outcome = run_experiment(lab, record.experiment)
    pairs = list(zip(record.tokens, rows_tokens(outcome), strict=True))
    different = [(then, now) for then, now in pairs if then != now]
    return Result(
        outcome=outcome,
        same_rows=len(pairs) - len(different),
        rows=len(pairs),
        first_difference=_say(*different[0]) if different else None,
        recorded_versions=record.versions,
    )


def failed(result: Result) -> bool:
    """Whether any row differs."""
    return result.same_rows < result.rows


def show(result: Result) -> RenderableType:
    """The texts and numbers, and whether they are the recorded ones."""
    verdict = f"{result.same_rows} of {result.rows} rows gave the recorded tokens"
    parts: list[RenderableType] = [steer_verb.show(result.outcome), Text(verdict, style="bold")]
    if result.first_difference:
        versions = ", ".join(f"{name} {number}" for name, number in result.recorded_versions.items())
        parts.append(Text(f"first difference: {result.first_difference}; recorded with {versions}"))
    return Group(*parts)


def _say(then: tuple[str, int, int, tuple[int, ...]], now: tuple[str, int, int, tuple[int, ...]]) -> str:
    arm, prompt, seed, tokens = then
    shared = next((i for i, (a, b) in enumerate(zip(tokens, now[3], strict=False)) if a != b), None)
    at = min(len(tokens), len(now[3])) if shared is None else shared
    return f"arm {arm!r}, prompt {prompt}, seed {seed}, new token {at}"
