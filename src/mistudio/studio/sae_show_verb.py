"""`mistudio sae show`: what an SAE is, released or on disk."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import RenderableType
from rich.table import Table

from mistudio.hub.entry import Entry
from mistudio.hub.names import names, resolve

TRAINED_ON = {
    1: "text from the pre-training distribution of Gemma 1, not public (report, section 3)",
    2: "pre-training text; instruction-tuned ones fine-tuned on rollouts (Gemma Scope 2 paper)",
}
DASHBOARDS_ON = "monology/pile-uncopyrighted, 24,576 prompts of 128 tokens, for Gemma Scope 1"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which SAE."""

    name: Annotated[str, tyro.conf.Positional]
    """Any name of a released SAE, or a path on this machine."""
    model: str | None = None
    """Completes a name that does not say of which model it is, such as 20-gemmascope-res-16k."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is known, each fact under its name."""

    facts: dict[str, str]
    """Fact → value."""


def run(config: Config) -> Result:
    """Looks it up, or into it."""
    path = Path(config.name)
    return Result(facts=_of_path(path) if path.exists() else _of_entry(resolve(config.name, config.model)))


def _of_entry(entry: Entry) -> dict[str, str]:
    from mistudio.hub.download import find_local

    facts = {"repository": entry.repo_id, "folder": entry.path, "file": entry.filename, "model": entry.model}
    facts |= {"site": _site_words(entry), "features": f"{entry.width:,}", "reads": f"{entry.d_in:,} dimensions"}
    facts["L0"] = _l0_words(entry)
    facts["size"] = f"{entry.bytes_expected:,} bytes of arrays"
    facts["trained on"] = TRAINED_ON[entry.generation]
    facts["dashboards"] = "none known"
    if entry.neuronpedia_id:
        facts["dashboards"] = f"https://www.neuronpedia.org/{entry.neuronpedia_id}"
        facts["dashboards made on"] = DASHBOARDS_ON if entry.generation == 1 else "not known here"
    facts["also called"] = "\n".join(names(entry)[1:])
    local = find_local(entry)
    facts["on this machine"] = "no; mistudio sae download " + entry.hf_path
    if local is not None:
        facts |= {"on this machine": str(local.path), "revision": local.revision, "sha256": local.sha256}
    return facts


def _site_words(entry: Entry) -> str:
    from mistudio.lm.site import Site

    if isinstance(entry.site_name, str):
        return f"{entry.site_name}, in TransformerLens {Site.parse(entry.site_name).hook_name}"
    return "the embedding, unscaled" if entry.site_name is None else " → ".join(entry.site_name)


def _l0_words(entry: Entry) -> str:
    if entry.generation == 2:
        return f"{entry.l0_class}" + (f" (target of training {entry.l0})" if entry.l0 is not None else "")
    return f"{entry.l0} on average" + (", canonical (nearest 100)" if entry.canonical else "")


def _of_path(path: Path) -> dict[str, str]:
    from mistudio.hub.formats import load_any, sniff
    from mistudio.hub.verify import file_sha256

    sae = load_any(path)
    facts = {"path": str(path), "format": sniff(path), "architecture": type(sae).__name__}
    facts |= {"model": sae.config.model or "not stated", "site": sae.config.hook_name or "not stated"}
    facts |= {"features": f"{sae.config.d_sae:,}", "reads": f"{sae.d_in:,} dimensions", "writes": f"{sae.d_out:,}"}
    for name, tensor in sae.state_dict().items():
        facts[name] = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    report = path / "evaluation.json"
    if report.is_file():
        numbers = json.loads(report.read_text())
        facts["measured"] = f"L0 {numbers['l0']:.1f}, FVU {numbers['fvu']:.4f}, delta loss {numbers['delta_loss']:.4f}"
    if path.is_file():
        facts["sha256"] = file_sha256(path)
    return facts


def show(result: Result) -> RenderableType:
    """A table of two columns."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in result.facts.items():
        table.add_row(name, value)
    return table
