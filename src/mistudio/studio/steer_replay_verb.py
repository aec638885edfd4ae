"""`mistudio steer-replay`: a steer request of Neuronpedia's run here, and its recorded answer checked by tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Group, RenderableType
from rich.text import Text

from mistudio.errors import ConfigError, SAEError
from mistudio.hub.formats import load_any
from mistudio.lm import LanguageModel, Site
from mistudio.sae import SAE
from mistudio.steer import (
    BEFORE_NOVEMBER_2025,
    STEERED,
    UNSTEERED,
    Lab,
    NPRequest,
    Outcome,
    Parity,
    check_source,
    np_experiment,
    np_lab,
    np_legacy,
    np_parity,
    np_site,
    read_np,
    run_experiment,
)
from mistudio.studio.steer_verb import side_by_side


@dataclass(frozen=True, kw_only=True)
class Config:
    """The request, and the weights to run it with."""

    record: Annotated[Path, tyro.conf.Positional]
    """JSON: Neuronpedia's steer request, or {"request": …, "answer": {"STEERED": …, "DEFAULT": …}}."""
    sae: tuple[Path, ...]
    """Folders of the SAEs that the features are of."""
    model: str | None = None
    """Language model; None: the one the first SAE was trained on."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of model and steering; Neuronpedia's Gemmas are in bfloat16. None: float32 on the CPU, bfloat16 on a GPU."""
    device: str | None = None
    """None: a GPU if there is one."""
    recipe: Literal["np-2026", "np-legacy"] = "np-2026"
    """Whose arithmetic: the server since August 2026, or an older one with its defects."""
    defect: tuple[str, ...] | None = None
    """With np-legacy, which defects: hooks-add-all, generated-unsteered, special-turns, frequency-penalty, double-bos,
    layer-early. None: the first four, as until 21 November 2025."""

    def __post_init__(self) -> None:
        if self.defect is not None and self.recipe != "np-legacy":
            raise ConfigError("Defects are of older servers; add --recipe np-legacy.")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Our texts, and how the recorded ones compare."""

    recipe: str
    """Whose arithmetic."""
    outcome: Outcome
    """Both arms, written here."""
    parity: list[Parity]
    """One entry a recorded text; empty where none can be compared."""
    note: str | None
    """Why there is no parity."""


def run(config: Config) -> Result:
    """Writes both arms by the recipe, and checks the recorded ones if they are greedy."""
    record = read_np(config.record)
    lab = _lab(config, record.request)
    experiment = np_experiment(lab.lm, record.request)
    if config.recipe == "np-legacy":
        lab, experiment = np_legacy(
            lab, record.request, BEFORE_NOVEMBER_2025 if config.defect is None else config.defect
        )
    note: str | None = None
    if not (record.steered or record.default):
        note = "the file has no answer to compare with"
    elif record.request.temperature > 0:
        note = "sampled texts are not compared: Neuronpedia's random numbers are its own"
    parity = np_parity(lab, record, experiment) if note is None else []
    outcome = run_experiment(lab, experiment)
    return Result(recipe=config.recipe, outcome=outcome, parity=parity, note=note)


def show(result: Result) -> RenderableType:
    """The two texts, and a line for each recorded one."""
    prompt = result.outcome.experiment.prompts[0]
    parts: list[RenderableType] = [
        side_by_side(prompt, result.outcome.texts(UNSTEERED)[0], result.outcome.texts(STEERED)[0])
    ]
    parts += [Text(_line(parity)) for parity in result.parity]
    if result.note:
        parts.append(Text(result.note, style="dim"))
    return Group(*parts)


def _line(parity: Parity) -> str:
    if parity.divergence is None:
        return f"{parity.arm}: all {parity.tokens} recorded tokens are the likeliest here"
    d = parity.divergence
    why = "a tie in bfloat16" if d.tie else "not explained by rounding"
    return (
        f"{parity.arm}: the first {parity.same} of {parity.tokens} tokens agree; then {d.ours!r} here and {d.theirs!r} "
        f"there, logits {d.gap:.3g} apart (top 2: {d.top_2_gap:.3g}; bfloat16 step {d.resolution:.3g}): {why}"
    )


def _lab(config: Config, request: NPRequest) -> Lab:
    saes: dict[Site, SAE] = {}
    for folder in config.sae:
        sae = load_any(folder)
        if sae.config.hook_name is None:
            raise SAEError(f"{folder} does not say which site the SAE was trained on (hook_name).")
        saes[Site.parse(sae.config.hook_name)] = sae
    for number, feature in enumerate(request.features):
        if (site := np_site(request, number)) not in saes:
            raise ConfigError(f"Feature {feature.index} is of {feature.layer}; give its SAE too: --sae FOLDER FOLDER.")
        check_source(feature.layer, saes[site])
    name = config.model or next(iter(saes.values())).config.model
    if name is None:
        raise ConfigError("The SAE does not say which model it was trained on; give it: --model NAME.")
    if name.rsplit("/", 1)[-1] != request.modelId:
        raise ConfigError(f"The request is for {request.modelId}, not {name}; give that one with --model.")
    lm = LanguageModel.load(name, device=config.device, dtype=config.dtype)
    return np_lab(Lab(lm=lm, saes={site: sae.to(lm.device) for site, sae in saes.items()}))
