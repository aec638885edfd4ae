"""Where things lie in a workspace, which is a folder: the store, one folder an SAE, and the reports.

WORKSPACE/store/                 activations (mistudio.store)
WORKSPACE/saes/layers.3.resid_post/
    sae.json sae.safetensors     the SAE in raw units
    run.json metrics.jsonl training.png …   the records of its training, and the last checkpoints
    evaluation.json feature_stats.safetensors activation_frequency.png
    concepts.json                features matched to labelled concepts
WORKSPACE/steering.json  WORKSPACE/summary.json
"""

import os
from functools import lru_cache
from pathlib import Path

from mistudio.errors import ConfigError, SAEError
from mistudio.evaluate import FeatureStats
from mistudio.hub.formats import load_any
from mistudio.lm import LanguageModel, Site
from mistudio.sae import SAE, Transcoder
from mistudio.store.remote import url_of

CONCEPTS = "concepts.json"


def store_folder(workspace: Path) -> Path:
    """The activation store of a workspace."""
    return workspace / "store"


def sae_folder(workspace: Path, site: str) -> Path:
    """The folder of the SAE trained at `site`."""
    return workspace / "saes" / site


def refuse_occupied(folder: Path, remedy: str) -> None:
    """ConfigError: `folder` exists and is not empty, or is a file. `remedy`: what to type."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file, and a folder is needed. {remedy}")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty. {remedy}")


def refuse_url(folder: Path) -> None:
    """ConfigError: `folder`, where SAEs are to be written, is a URL. Only stores go to one."""
    if (url := url_of(folder)) is not None:
        raise ConfigError(f"{url} is a URL, and only stores are written to one. Name a folder for what is trained.")


def refuse_unwritable(*files: Path | None) -> None:
    """ConfigError, before the work whose results they are to hold: a file (None: not asked for) cannot be written."""
    for file in files:
        if file is None:
            continue
        if file.is_dir():
            raise ConfigError(f"{file} is a folder; name a file in it.")
        if not file.parent.is_dir():
            raise ConfigError(f"There is no folder {file.parent} for {file.name}; make it, or name another file.")
        if not os.access(file.parent, os.W_OK):
            raise ConfigError(f"The folder {file.parent} may not be written to; name a file in another one.")


def load_sae(folder: Path, model: str | None, device: str | None = None) -> tuple[LanguageModel, SAE, Site]:
    """The SAE in `folder`, its site, and its language model (or the one named). SAEError: it does not say which."""
    sae = load_any(folder)
    if isinstance(sae, Transcoder):
        raise SAEError(
            f"{folder} holds a transcoder, which reads {sae.config.hook_name or 'one site'} and writes "
            f"{sae.config.hook_name_out or 'another'}; evaluation, concepts and steering need an SAE of one site. For "
            f"a transcoder there are `mistudio sae show {folder}` and, in Python, "
            f"`mistudio.hub.load.load_sae({str(folder)!r})(x)`."
        )
    if sae.config.hook_name is None:
        raise SAEError(f"{folder} does not say which site the SAE was trained on (hook_name).")
    name = model or sae.config.model
    if name is None:
        raise SAEError(f"{folder} does not say which model the SAE was trained on; give it: --model NAME.")
    lm = _loaded(name, device)
    return lm, sae.to(lm.device), Site.parse(sae.config.hook_name)


@lru_cache(maxsize=1)
def _loaded(name: str, device: str | None) -> LanguageModel:
    """The verbs of one process that follow one another share the model."""
    return LanguageModel.load(name, device=device)


def feature_stats(folder: Path) -> FeatureStats:
    """The statistics that `mistudio eval` saved beside the SAE."""
    return FeatureStats.load(folder)
