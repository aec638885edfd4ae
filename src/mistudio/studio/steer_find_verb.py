"""`mistudio steer-find`: the features that steer towards given words, and how well each is suited to steering."""

import math
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mistudio.errors import ConfigError
from mistudio.lm import documents, token_rows
from mistudio.steer import input_scores, logit_lens, output_scores, toward
from mistudio.studio.steer_lab import load_lab


@dataclass(frozen=True, kw_only=True)
class Config:
    """Words to steer towards, or none: the features of highest output score."""

    sae: Path
    """Folder of the SAE, after `mistudio eval`."""
    words: str | None = None
    """Words such as sea,boat,waves: each feature is added, and the rise in their probability measured."""
    prompt: tuple[str, ...] = ("Once upon a time there was a", "One day she saw the")
    """Beginnings that such a word could follow."""
    strength: float = 1.0
    """How much of a feature is added when words are looked for, in multiples of its largest activation."""
    text: str | None = None
    """A text for input scores, such as stories or a file; None: there are none."""
    rows: int = 256
    """Rows of that text read."""
    top: int = 15
    """Features shown."""
    model: str | None = None
    """Language model; None: the one the SAE was trained on."""

    def __post_init__(self) -> None:
        if self.top < 1 or self.rows < 1:
            raise ConfigError(f"--top {self.top} and --rows {self.rows} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Found:
    """One feature."""

    feature: int
    """Its index."""
    toward: float | None
    """Rise in the probability of the words when it is added; None without words."""
    output_score: float
    """In [0, 1): does adding it write what it points at (arXiv 2505.20063)."""
    input_score: float | None
    """In [0, 1]: does it fire on what it points at; None without a text, or if it fired too rarely."""
    max_activation: float
    """Its largest activation, raw units."""
    lens: list[str]
    """The tokens on top of its logit lens."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The best features."""

    sae: str
    """Folder of the SAE."""
    words: list[str]
    """What was looked for."""
    found: list[Found]
    """Best first."""


def run(config: Config) -> Result:
    """Scores every feature for the words, or by its output score, and the best ones in all three ways."""
    lab, site = load_lab(config.sae, config.model)
    words = [word.strip() for word in (config.words or "").split(",") if word.strip()]
    rises = None
    if words:
        rises = toward(lab, site, {"words": words}, prompts=config.prompt, of_max=config.strength)["words"]
    outputs = output_scores(lab, site) if rises is None else None
    order = (outputs if rises is None else rises).nan_to_num(-2).argsort(descending=True)  # type: ignore[union-attr]
    best = [int(i) for i in order[: config.top] if float(lab.known[site].maxima[i]) > 0]
    outputs = output_scores(lab, site, features=best) if outputs is None else outputs
    inputs = None
    if config.text is not None:
        text = documents(config.text, part="held_out")
        rows = token_rows(lab.lm, text, min(lab.lm.shape.context, 128), config.rows)
        inputs = input_scores(lab, site, rows.split(8))
    lens = logit_lens(lab.lm, lab.sae(site).W_dec.detach()[best], 5)
    return Result(
        sae=str(config.sae),
        words=words,
        found=[
            Found(
                feature=i,
                toward=None if rises is None else float(rises[i]),
                output_score=float(outputs[i]),
                input_score=None if inputs is None or math.isnan(float(inputs[i])) else float(inputs[i]),
                max_activation=float(lab.known[site].maxima[i]),
                lens=[lab.lm.to_text([int(token)]) for token in lens[n]],
            )
            for n, i in enumerate(best)
        ],
    )


def show(result: Result) -> RenderableType:
    """A table, and the command that steers by the first one."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("feature", "towards", "output", "input", "max", "points at"):
        table.add_column(name, justify="left" if name == "points at" else "right")
    for f in result.found:
        numbers = ["" if n is None else f"{n:.3f}" for n in (f.toward, f.output_score, f.input_score)]
        table.add_row(str(f.feature), *numbers, f"{f.max_activation:.3g}", Text(" ".join(f.lens).strip()))
    if not result.found:
        return "No feature of this SAE ever fired in its evaluation."
    best = result.found[0].feature
    words = f" --words {','.join(result.words)}" if result.words else ""
    return Group(
        table,
        "towards: rise in the words' probability; output, input: scores of arXiv 2505.20063",
        f'Next: mistudio steer "Once upon a time" --sae {result.sae} --feature {best} --strength 2 --unit max{words}',
    )
