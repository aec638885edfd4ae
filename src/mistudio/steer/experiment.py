"""An experiment as data: what was written under which steerings, so that it can be written again, token for token.

A record is a JSON file: the experiment, hashes of the weights it used, versions, the tokens of every row. Running it
again gives the same tokens on the same machine; elsewhere rounding may differ, and the comparison says where.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mistudio import __version__
from mistudio.config import load_file, to_dict
from mistudio.errors import ConfigError
from mistudio.files import write_json
from mistudio.steer.apply import Pushes
from mistudio.steer.arms import STEERED, UNSTEERED, Arm, Written, write_arms
from mistudio.steer.controls import comparison_arms, sweep_arms
from mistudio.steer.dose import DoseResponse, check_strengths
from mistudio.steer.effects import Interval
from mistudio.steer.lab import Lab
from mistudio.steer.measures import read_again
from mistudio.steer.report import (
    ArmSummary,
    Strengths,
    effects,
    first_target,
    refuse_overflow,
    strengths,
    summaries,
    sweep_response,
)
from mistudio.steer.tracking import Track, track


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What to write, and how."""

    prompts: tuple[str, ...]
    """Beginnings that every arm continues."""
    pushes: Pushes
    """The steering, in order."""
    seeds: tuple[int, ...] = (16,)
    """Seeds of the sampling, the same in every arm."""
    max_new_tokens: int = 64
    """Tokens a text at most."""
    temperature: float = 0.5
    """0: greedy."""
    controls: bool = False
    """Whether the control arms are written too."""
    ask: str | None = None
    """What the prompt baseline puts before the prompt; None: there is no such arm."""
    sweep: tuple[float, ...] = ()
    """Strengths of the first push to sweep, the other pushes in proportion."""
    words: tuple[str, ...] = ()
    """Words whose share is counted."""
    ce_bound: float = 0.5
    """Rise in cross-entropy up to which a strength is recommended, nats/token."""
    draw: int = 0
    """Seed of the choice of random controls."""
    track: tuple[int, ...] = ()
    """Features whose activation is followed along the unsteered and the steered texts."""
    track_top: int | None = None
    """Instead, how many of each text's strongest features are followed."""
    frequency_penalty: float = 0.0
    """What is taken off a token's score for every time it was there before (TransformerLens's freq_penalty)."""
    double_bos: bool = False
    """Whether a second BOS stands before every prompt, as some servers had it."""

    def __post_init__(self) -> None:
        if not self.pushes:
            raise ConfigError("An experiment needs at least one push: a feature or a vector, and a strength.")
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError('A prompt is empty; give the beginning of a text, such as "Once upon a time".')
        if self.sweep:
            check_strengths(self.sweep)
        if self.track_top is not None and (self.track or self.track_top < 1):
            raise ConfigError("track_top is a number of at least 1, and takes the place of track.")
        if self.ask is not None and not self.controls:
            raise ConfigError("The prompt baseline (ask) is one of the controls; ask for those too.")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out."""

    experiment: Experiment
    """What was run."""
    strengths: list[Strengths]
    """Of each push, in all units."""
    arms: list[ArmSummary]
    """A summary of each arm."""
    effects: dict[str, Interval]
    """Steered less the random controls, by measure; ce_rise: less unsteered."""
    left_out: list[str]
    """Controls that these pushes do not have, and why."""
    dose: DoseResponse | None
    """The sweep, if there is one."""
    rows: list[Written]
    """Every text."""
    tracks: list[Track]
    """The features followed, along each unsteered and steered text; empty if none were."""

    def texts(self, arm: str) -> list[str]:
        """The texts of an arm, in the order of prompts and seeds."""
        return [row.text for row in self.rows if row.arm == arm]


def run_experiment(
    lab: Lab, experiment: Experiment, *, tell: Callable[[str, int, int, str], None] | None = None
) -> Outcome:
    """All arms written in one batch, read again and compared; `tell` and errors as in `write_arms`. ConfigError, too: a
    push is so large that measures overflow."""
    for push in experiment.pushes:
        lab.check(push)
    arms, left_out = _arms(lab, experiment)
    rows = write_arms(
        lab,
        experiment.prompts,
        arms,
        seeds=experiment.seeds,
        max_new_tokens=experiment.max_new_tokens,
        temperature=experiment.temperature,
        frequency_penalty=experiment.frequency_penalty,
        double_bos=experiment.double_bos,
        tell=tell,
    )
    site, target = first_target(lab, experiment.pushes)
    read = read_again(lab, experiment.prompts, rows, site=site, target=target, words=experiment.words)
    refuse_overflow(rows, read)
    followed = [row for row in rows if row.arm in (UNSTEERED, STEERED)]
    response = "words" if experiment.words else "kl" if target is None else "target"
    dose = None
    if experiment.sweep:
        dose = sweep_response(rows, read, experiment.sweep, response=response, ce_bound=experiment.ce_bound)
    return Outcome(
        experiment=experiment,
        strengths=[strengths(lab, push, experiment.prompts[0]) for push in experiment.pushes],
        arms=summaries(rows, read),
        effects=effects(rows, read),
        left_out=left_out,
        dose=dose,
        rows=rows,
        tracks=track(lab, followed, site=site, features=experiment.track, top=experiment.track_top)
        if experiment.track or experiment.track_top
        else [],
    )


def _arms(lab: Lab, experiment: Experiment) -> tuple[list[Arm], list[str]]:
    arms, left_out = [Arm(name=UNSTEERED), Arm(name=STEERED, pushes=(experiment.pushes,))], list[str]()
    if experiment.controls:
        arms, left_out = comparison_arms(
            lab, experiment.pushes, seeds=len(experiment.seeds), draw=experiment.draw, ask=experiment.ask
        )
    if experiment.sweep:
        arms += sweep_arms(experiment.pushes, experiment.sweep)
    return arms, left_out


@dataclass(frozen=True, kw_only=True)
class Record:
    """An experiment with what is needed to run it again, and the tokens it gave."""

    format: Literal["mistudio.steering/1"] = "mistudio.steering/1"
    """Version of this file."""
    model: str
    """Name of the language model."""
    model_sha256: str
    """Hash of the model's weights."""
    sae: str
    """Folder of the SAE."""
    sae_sha256: str
    """Hash of the SAE's weights."""
    vectors: dict[str, str] = field(default_factory=dict)
    """Name → file of each vector of one's own."""
    vectors_sha256: dict[str, str] = field(default_factory=dict)
    """Name → hash of each vector."""
    versions: dict[str, str] = field(default_factory=dict)
    """Package → version."""
    experiment: Experiment
    """What was run."""
    tokens: list[tuple[str, int, int, tuple[int, ...]]]
    """Of each row: arm, number of the prompt, seed, new tokens."""

    def save(self, path: Path) -> Path:
        """The path of the JSON file."""
        write_json(path, to_dict(self))
        return path

    @classmethod
    def load(cls, path: Path) -> "Record":
        """The record in a file. ConfigError: there is none, or it is not exactly what `save` writes."""
        return load_file(cls, path)


def record(lab: Lab, outcome: Outcome, *, sae: str, vectors: dict[str, str]) -> Record:
    """The record of an outcome; `sae` and `vectors` are where its weights were read from."""
    return Record(
        model=lab.lm.name,
        model_sha256=weights_sha256(lab.lm.model),
        sae=sae,
        sae_sha256=weights_sha256(next(iter(lab.saes.values()))),
        vectors=vectors,
        vectors_sha256={name: _sha256({name: vector}) for name, vector in lab.vectors.items()},
        versions={"mistudio": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        experiment=outcome.experiment,
        tokens=rows_tokens(outcome),
    )


def rows_tokens(outcome: Outcome) -> list[tuple[str, int, int, tuple[int, ...]]]:
    """Arm, prompt, seed and new tokens of every row."""
    return [(row.arm, row.prompt, row.seed, row.tokens) for row in outcome.rows]


def check_record(lab: Lab, found: Record) -> None:
    """ConfigError: the lab's weights are not those of the record."""
    own = {
        "The model": (weights_sha256(lab.lm.model), found.model_sha256),
        "The SAE": (weights_sha256(next(iter(lab.saes.values()))), found.sae_sha256),
        **{
            f"The vector {name!r}": (_sha256({name: vector}), found.vectors_sha256.get(name))
            for name, vector in lab.vectors.items()
        },
    }
    for what, (now, then) in own.items():
        if now != then:
            raise ConfigError(f"{what} is not the experiment's: its sha256 is {now[:12]}…, not {str(then)[:12]}….")


def weights_sha256(module: nn.Module) -> str:
    """A hash of the names, shapes, dtypes and bytes of a module's tensors."""
    return _sha256(module.state_dict())


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
