"""Two panels on the terminal that fill while the texts are written: unsteered and steered, of the first seed."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from mistudio.steer import STEERED, UNSTEERED, Experiment


@contextmanager
def live_texts(experiment: Experiment) -> Iterator[Callable[[str, int, int, str], None]]:
    """What `write_arms` should tell its pieces to. Written to stderr, so that stdout holds the result alone; without a
    terminal, the steered text is passed on as plain characters."""
    console = Console(file=sys.stderr)
    texts = {UNSTEERED: "", STEERED: ""}

    def panels() -> Columns:
        prompt = experiment.prompts[0]
        shown = [Panel(Text.assemble((prompt, "dim"), text), title=arm, width=58) for arm, text in texts.items()]
        return Columns(shown)

    def wanted(arm: str, prompt: int, seed: int) -> bool:
        return arm in texts and prompt == 0 and seed == experiment.seeds[0]

    if not console.is_terminal:

        def write(arm: str, prompt: int, seed: int, piece: str) -> None:
            if arm == STEERED and wanted(arm, prompt, seed):
                print(piece, end="", file=sys.stderr, flush=True)

        yield write
        print(file=sys.stderr)
        return
    with Live(panels(), console=console, transient=True, refresh_per_second=12) as live:

        def show(arm: str, prompt: int, seed: int, piece: str) -> None:
            if wanted(arm, prompt, seed):
                texts[arm] += piece
                live.update(panels())

        yield show
