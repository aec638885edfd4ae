"""`mistudio steer`: the same prompt continued with and without features added to the model."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mistudio.errors import ConfigError
from mistudio.steer import (
    METHODS,
    STEERED,
    SUFFIXES,
    UNSTEERED,
    ArmSummary,
    Experiment,
    Interval,
    Lab,
    NPMessage,
    Outcome,
    Push,
    Strengths,
    Track,
    When,
    added_vectors,
    chat_prompt,
    plot_dose_response,
    plot_tracks,
    record,
    run_experiment,
    write_program,
    write_vectors,
)
from mistudio.studio.steer_lab import load_lab
from mistudio.studio.steer_live import live_texts
from mistudio.studio.workspace import refuse_unwritable

SHOWN_PAIRS = 4
"""Pairs of texts shown; all are in the JSON."""
PICTURES = (".png", ".html")
"""Endings of pictures."""
STRENGTHS = {
    "residual": ("30", "raw activation units; with --unit max, multiples of the feature's largest activation"),
    "activation": ("30", "the feature's activation; with --unit max, multiples of its largest one"),
    "share": ("0.5", "shares of the residual's norm"),
    "factor": ("2", "a factor; 1 changes nothing"),
    "max": ("0.5", "multiples of the feature's largest activation"),
}
"""Of each unit, a strength to type and what it counts in."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The prompt, the SAE, and which of its features to add how strongly."""

    prompt: Annotated[str, tyro.conf.Positional]
    """The beginning that every text continues."""
    sae: Path
    """Folder of the SAE."""
    feature: tuple[int, ...] = ()
    """Features to steer by, in this order."""
    strength: tuple[float, ...] = ()
    """One strength a feature and vector, in the method's unit; for add, raw activation units."""
    vector: tuple[Path, ...] = ()
    """Files of vectors to steer by (.npz, .safetensors or .gguf with one array), after the features."""
    method: str = "add"
    """The equation: add, add-keeping-norm, add-relative, clamp, clamp-at-least, clamp-where-active, scale,
    ablate-feature, ablate-direction, orthogonal, projection-set, projection-cap, projection-floor, reconstruct."""
    unit: Literal["own", "max"] = "own"
    """max: strengths are multiples of the feature's largest activation, as `mistudio eval` found it."""
    positions: str = "all"
    """Where: all, no-bos, no-special, prompt, generated, last-prompt, from:12, at:3,5."""
    when: str | None = None
    """Only where another feature is active: 123, or 123>0.5."""
    compare: bool = False
    """Write the control arms too: flipped, random feature, random direction."""
    ask: str | None = None
    """With compare: one more arm that is not steered, with this put before the prompt."""
    sweep: str | None = None
    """Strengths to sweep, such as 0,10,20,40,80."""
    words: str | None = None
    """Words whose share is counted, such as sea,boat,waves."""
    track: tuple[int, ...] = ()
    """Features to follow along the texts, which are then coloured by the first of them."""
    track_top: int | None = None
    """Instead, how many of each text's strongest features to follow."""
    chat: bool = False
    """The prompt is a user's message, put into the model's chat template."""
    ce_bound: float = 0.5
    """Rise in cross-entropy up to which a strength of the sweep is recommended, nats/token."""
    model: str | None = None
    """Language model; None: the one the SAE was trained on."""
    max_new_tokens: int = 64
    """Tokens to write at most."""
    temperature: float = 0.5
    """0: always the likeliest token; else sampled from softmax(logits / temperature)."""
    seed: int = 16
    """First seed of the sampling; the same seeds in every arm."""
    seeds: int = 1
    """How many seeds: texts in each arm."""
    save: Path | None = None
    """File to record the experiment in; `mistudio steer-run FILE` runs it again."""
    plot: Path | None = None
    """Picture of the sweep: .png or .html."""
    track_plot: Path | None = None
    """Picture of the followed features along the texts: .png or .html."""
    export: Path | None = None
    """File to put the steering in for use elsewhere: the vector (.safetensors, .npz; .gguf for llama.cpp), or a program
    (.py) that writes the steered text with torch and transformers alone."""
    stream: bool = False
    """Show the texts of the first seed while they are written."""

    def __post_init__(self) -> None:
        self._check_strengths()
        if self.words is not None and not _words(self.words):
            raise ConfigError(f"--words {self.words!r} names no word; write sea,boat,waves.")
        if self.plot is not None and self.sweep is None:
            raise ConfigError("--plot draws a sweep; give one: --sweep 0,10,20,40,80.")
        if self.track_plot is not None and not self.track and self.track_top is None:
            raise ConfigError("--track-plot draws followed features; say which: --track 123, or --track-top 3.")
        for name, path in (("plot", self.plot), ("track-plot", self.track_plot)):
            if path is not None and path.suffix not in PICTURES:
                raise ConfigError(f"--{name} {path} has none of the endings {', '.join(PICTURES)}.")
        if self.export is not None and self.export.suffix not in (*SUFFIXES, ".py"):
            raise ConfigError(f"--export {self.export} has none of the endings {', '.join((*SUFFIXES, '.py'))}.")
        if self.chat and self.ask is not None:
            raise ConfigError("--ask is put before a prompt; a chat's message is its prompt already.")
        if self.seeds < 1:
            raise ConfigError(f"--seeds {self.seeds}; at least 1 is needed.")

    def _check_strengths(self) -> None:
        """ConfigError: there is nothing to steer by, or not one strength each, where the method takes any."""
        given, wanted = len(self.strength), len(self.feature) + len(self.vector)
        if self.method not in METHODS:
            raise ConfigError(f"There is no method {self.method!r}; the methods are {', '.join(METHODS)}.")
        if not wanted:
            raise ConfigError("Nothing to steer by: give --feature 12 --strength 30, or --vector FILE --strength 2.")
        unit = METHODS[self.method].unit
        if unit is None and given:
            raise ConfigError(f"{self.method} takes no strength; leave --strength out.")
        if unit is None or given == wanted:
            return
        what = "feature" if not self.vector else "direction" if self.feature else "vector"
        needs = f"1 {what} needs 1 strength" if wanted == 1 else f"{wanted} {what}s need {wanted} strengths"
        number, counted_in = STRENGTHS["max" if self.unit == "max" else unit]
        raise ConfigError(
            f"{needs}, and {given or 'none'} {'is' if given < 2 else 'are'} given. Add --strength "
            f"{' '.join([number] * wanted)} ({counted_in})."
        )


def experiment_of(config: Config, prompt: str) -> Experiment:
    """The experiment that the flags describe, on that prompt."""
    directions: list[tuple[int | None, str | None]] = [(index, None) for index in config.feature]
    directions += [(None, str(path)) for path in config.vector]
    numbers = config.strength or (None,) * len(directions)
    pushes = tuple(
        Push(
            feature=feature,
            vector=vector,
            strength=number,
            method=config.method,
            unit=config.unit,
            positions=config.positions,
            when=_when(config.when),
        )
        for (feature, vector), number in zip(directions, numbers, strict=True)
    )
    return Experiment(
        prompts=(prompt,),
        pushes=pushes,
        seeds=tuple(range(config.seed, config.seed + config.seeds)),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        controls=config.compare,
        ask=config.ask,
        sweep=_numbers(config.sweep),
        words=_words(config.words),
        ce_bound=config.ce_bound,
        track=config.track,
        track_top=config.track_top,
    )


def run(config: Config) -> Outcome:
    """All arms of text; writes the record and the plot if asked for."""
    refuse_unwritable(config.save, config.plot, config.track_plot, config.export)
    vectors = {str(path): path for path in config.vector}
    lab, site = load_lab(config.sae, config.model, vectors)
    message = NPMessage(role="user", content=config.prompt)
    prompt = chat_prompt(lab.lm, (message,)) if config.chat else config.prompt
    experiment = experiment_of(config, prompt)
    if config.export is not None:  # first: what cannot be exported is said before anything is written
        _export(lab, experiment, config.export)
    with live_texts(experiment) if config.stream else nullcontext() as tell:
        outcome = run_experiment(lab, experiment, tell=tell)
    if config.save is not None:
        files = {name: str(path) for name, path in vectors.items()}
        record(lab, outcome, sae=str(config.sae), vectors=files).save(config.save)
    if config.plot is not None and outcome.dose is not None:
        plot_dose_response(outcome.dose, config.plot, title=f"{_names(outcome)} at {site}")
    if config.track_plot is not None:
        plot_tracks(outcome.tracks, config.track_plot, title=f"{_names(outcome)} at {site}")
    return outcome


def _export(lab: Lab, experiment: Experiment, path: Path) -> None:
    if path.suffix in SUFFIXES:
        write_vectors(path, added_vectors(lab, experiment.pushes), model=lab.lm.name)
        return
    write_program(
        path,
        lab,
        experiment.pushes,
        experiment.prompts[0],
        max_new_tokens=experiment.max_new_tokens,
        temperature=experiment.temperature,
        seed=experiment.seeds[0],
    )


def show(result: Outcome) -> RenderableType:
    """The texts side by side, how hard the push was, and the arms' numbers."""
    prompt = result.experiment.prompts[0]
    pairs = zip(result.texts(UNSTEERED), result.texts(STEERED), strict=True)
    parts: list[RenderableType] = [side_by_side(prompt, plain, steered) for plain, steered in list(pairs)[:SHOWN_PAIRS]]
    if result.tracks:
        parts = list(coloured(result)[:SHOWN_PAIRS])
    for push, strength in zip(result.experiment.pushes, result.strengths, strict=True):
        parts.append(Text(_push_line(push, strength), style="dim"))
    parts.append(Text(_where_line(result), style="dim"))
    parts.append(arms_table(result))
    parts += [Text(f"left out: {reason}", style="dim") for reason in result.left_out]
    for name, interval in result.effects.items():
        against = "unsteered" if name == "ce_rise" else "the random controls"
        if result.experiment.controls or name == "ce_rise":
            parts.append(Text(f"effect on {LABELS[name]} against {against}: {interval}"))
    parts += [Text(line) for line in _side_effects(result)]
    if result.dose is not None:
        best = result.dose.recommended
        unit = " × max" if result.experiment.pushes[0].unit == "max" else ""
        advice = "no strength is" if best is None else f"recommended strength {best:g}{unit}: the largest"
        parts.append(Text(f"{advice} within a cross-entropy rise of {result.dose.ce_bound:g} nats/token", style="bold"))
    return Group(*parts)


LABELS = {
    "ce": "cross-entropy",
    "ce_rise": "cross-entropy",
    "kl": "KL",
    "target": "target activation",
    "words": "given words",
    "distinct_2": "distinct-2",
    "longest_repeat": "longest repeat",
    "length": "tokens",
    "size": "push ÷ norm",
}
"""A measure's name in sentences."""

HEADINGS = {"ce": "CE", "target": "target", "words": "words", "longest_repeat": "repeat", "size": "push"}
"""Its name above a column, where that is another one."""

WITH_INTERVAL = ("ce", "target", "words")
"""Measures whose interval stands in the table; the JSON has all."""


def arms_table(result: Outcome) -> Table:
    """One row an arm: means over seeds; with several seeds, 95% intervals."""
    columns = [name for name in LABELS if any(arm.means.get(name) for arm in result.arms)]
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="read again by the unsteered model: cross-entropy (CE) and KL in nats/token, the target's mean "
        "activation, the share of given words, the longest repeat in tokens; push: mean change ÷ residual's norm",
    )
    table.add_column("arm", no_wrap=True)
    for name in columns:
        table.add_column(HEADINGS.get(name, LABELS[name]), justify="right", no_wrap=True)
    for arm in result.arms:
        table.add_row(arm.arm, *(_cell(arm, name) for name in columns))
    return table


def coloured(result: Outcome) -> list[Columns]:
    """The pairs of texts, each token's background as strong as the first tracked feature is there."""
    by_arm = [[t for t in result.tracks if t.arm == arm] for arm in (UNSTEERED, STEERED)]
    largest = max((row[0] for t in result.tracks for row in t.activations[1:]), default=0.0)

    def panel(t: Track) -> Panel:
        title = f"{t.arm}: feature {t.features[0]}, at most {largest:.3g}"
        return Panel(_colours(t, largest), title=title, width=58)

    return [Columns([panel(t) for t in pair]) for pair in zip(*by_arm, strict=True)]


def _colours(t: Track, largest: float) -> Text:
    text = Text()
    for piece, row in zip(t.pieces, t.activations, strict=True):
        share = min(max(row[0] / largest, 0.0), 1.0) if largest > 0 else 0.0
        level = int(255 - 175 * share)
        text.append(piece, style=f"black on rgb({level},{min(level + 60, 255)},{level})" if share > 0.02 else "")
    return text


def side_by_side(prompt: str, unsteered: str, steered: str) -> Columns:
    """Two panels: the continuation of the untouched model, and the steered one."""
    panels = [
        Panel(Text.assemble((prompt, "dim"), text), title=title, width=58)
        for title, text in ((UNSTEERED, unsteered), (STEERED, steered))
    ]
    return Columns(panels)


def _cell(arm: ArmSummary, name: str) -> str:
    interval: Interval | None = arm.means[name]
    if interval is None:
        return ""
    share = name == "words"
    mean = f"{interval.mean:.1%}" if share else f"{interval.mean:.3g}"
    if interval.n == 1 or name not in WITH_INTERVAL:
        return mean
    low, high = (f"{100 * n:.0f}" if share else f"{n:.2g}" for n in (interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _push_line(push: Push, strength: Strengths) -> str:
    what = f"feature {push.feature}" if push.feature is not None else f"vector {push.vector}"
    number = "" if push.strength is None else f", c = {push.strength:g}{' × max' if push.unit == 'max' else ''}"
    units = [
        None if strength.residual is None else f"{strength.residual:.3g} residual units",
        None if strength.of_max is None else f"{strength.of_max:.3g} × max",
        None if strength.relative is None else f"{strength.relative:.3g} × mean norm over the prompt",
    ]
    said = " = ".join(unit for unit in units if unit)
    return f"{push.method}: {METHODS[push.method].equation}, {what}{number}{' = ' + said if said else ''}"


def _where_line(result: Outcome) -> str:
    row = next(row for row in result.rows if row.arm == STEERED)
    prompt = len(row.context)
    parts = []
    for site, sizes in row.sizes.items():
        of_prompt = sum(size is not None for size in sizes[:prompt])
        of_new = sum(size is not None for size in sizes[prompt:])
        largest = max(size for size in sizes if size is not None)
        parts.append(
            f"at {site} on {of_prompt} of {prompt} prompt tokens and {of_new} of {len(row.tokens)} new ones, "
            f"at most {largest:.3g} × the residual's norm"
        )
    return "pushed " + ("; ".join(parts) if parts else "nowhere: the condition never held")


def _side_effects(result: Outcome) -> list[str]:
    steered = next(arm for arm in result.arms if arm.arm == STEERED)
    lines = []
    for word, changes in (("rose", steered.risen), ("fell", steered.fallen)):
        if changes:
            listed = ", ".join(f"{index} ({change:+.3g})" for index, change in changes)
            lines.append(f"features whose mean activation {word} most when the text is read again: {listed}")
    return lines


def _names(outcome: Outcome) -> str:
    pushes = outcome.experiment.pushes
    return ", ".join(f"{p.method} {'feature ' + str(p.feature) if p.vector is None else p.vector}" for p in pushes)


def _when(text: str | None) -> When | None:
    if text is None:
        return None
    index, _, above = text.partition(">")
    try:
        return When(feature=int(index), above=float(above) if above else 0.0)
    except ValueError as error:
        raise ConfigError(f"--when {text!r} is no condition; write 123, or 123>0.5.") from error


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _numbers(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--sweep {text!r} is no list of numbers; write 0,10,20,40,80.") from error
