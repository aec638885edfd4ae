"""Text through a language model into a store of activation rows: every site asked for is read in one forward pass.

Only the train part of the text is read, so that held-out text stays unseen by what is trained. The model reads BOS
and EOS, but their rows are dropped, as Gemma Scope does (arXiv:2408.05147, section 3): their norms are not those of
other tokens.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mistudio.config import to_dict
from mistudio.errors import ConfigError
from mistudio.lm import LanguageModel, ModelShape, Site, TokenRow, documents, load_shape, pack
from mistudio.progress import progress_bar
from mistudio.store import Store, StoreWriter
from mistudio.store.manifest import row_bytes
from mistudio.store.writer import refuse_occupied, refuse_small_disk

CHECKPOINT_EVERY_S = 30.0  # where checkpoints fall does not change a bit of the result
LONGEST_CHOSEN_CONTEXT = 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What to collect, from which model and text, and where to."""

    sites: tuple[str, ...]
    """Where to read, such as layers.3.resid_post, layers.3.mlp_out or layers.3.attn_z; all in one pass."""
    tokens: int
    """Activation rows to collect, one a token and site; BOS, EOS and PAD do not count."""
    out: Path
    """Folder of the store; new or empty, unless --resume."""
    model: str = "demo"
    """Language model: demo (in the package), a Hugging Face name or a local folder."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face model; None: its main branch."""
    text: str = "stories"
    """Text: stories, stories:SEED, a .txt, .md, .jsonl or .parquet file, a folder, or hf:OWNER/NAME/CONFIG:SPLIT."""
    column: str = "text"
    """Column that holds the text, in .jsonl, .parquet and Hugging Face data sets."""
    separator: str | None = None
    """What separates the documents of a plain text file (blank-line: blank lines); None: the file is one document."""
    held_out: float = 0.1
    """Fraction of the documents, chosen by a hash of their text, that is left for evaluation."""
    context: int | None = None
    """Tokens the model reads at a time, BOS included; None: the model's own context, at most 1,024."""
    lm_batch_rows: int = 16
    """Rows of `context` tokens in one forward pass."""
    bucket_rows: int = 1_000_000
    """Activation rows in one shuffle bucket, which is one file a site; it should fit into memory when it is read."""
    seed: int = 0
    """Seed of the scattering of rows to buckets."""
    device: str | None = None
    """Where the model runs: cpu, cuda, cuda:1; None: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number type of the model; rows are stored in float32. None: float32 on a CPU, bfloat16 elsewhere."""
    resume: bool = False
    """Continue an unfinished collection in `out`; with the same settings the result is the same to the last bit."""

    def __post_init__(self) -> None:
        counts = {"tokens": self.tokens, "lm_batch_rows": self.lm_batch_rows, "bucket_rows": self.bucket_rows}
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"{name} = {count}, but at least 1 is needed.")
        if self.context is not None and self.context < 2:
            raise ConfigError(f"context = {self.context}, but a row is BOS and at least one more token.")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out = {self.held_out}, but it is a fraction from 0 up to, but not including, 1.")
        if not self.sites:
            raise ConfigError("sites is empty; name at least one, such as layers.3.resid_post.")


def collect(cfg: CollectConfig, lm: LanguageModel | None = None) -> Store:
    """The finished store of `cfg.tokens` rows a site, or fewer (with a warning) where the text ends before.

    lm: a model that is loaded already; None: `cfg.model` is loaded. A kill loses at most the last 30 seconds, and
    with `cfg.resume` the finished store equals, byte for byte, one that was never interrupted (same machine, device
    and code). TextError: no text, or too little for one row. StoreError: the folder is in use or holds something
    else, the disk is too small, an activation is NaN or infinite. ModelError: no such model or site.
    """
    if not cfg.resume:
        refuse_occupied(cfg.out)
    # before the model loads, so that a missing source is said at once
    docs = documents(cfg.text, column=cfg.column, separator=cfg.separator, part="train", held_out=cfg.held_out)
    shape = load_shape(cfg.model, cfg.revision) if lm is None else lm.shape
    sites = _sites(cfg.sites, shape)
    if not cfg.resume:  # before gigabytes of weights are downloaded
        refuse_small_disk(cfg.out, cfg.tokens * row_bytes({str(site): shape.width(site) for site in sites}))
    if lm is None:
        lm = LanguageModel.load(cfg.model, device=cfg.device, dtype=cfg.dtype, revision=cfg.revision)
    context = _context(cfg.context, lm)
    rows = _peeked(pack(lm, docs, context))
    with _writer(cfg, lm, sites, context) as writer:
        if not writer.complete:
            _fill(writer, lm, sites, islice(rows, writer.cursor, None), cfg)
        store = writer.finish()
    if store.rows < cfg.tokens:
        log.warning("The text %s ended early: %s of %s rows were collected.", cfg.text, store.rows, cfg.tokens)
    return store


def _fill(
    writer: StoreWriter, lm: LanguageModel, sites: list[Site], rows: Iterator[TokenRow], cfg: CollectConfig
) -> None:
    """Writes until there are `cfg.tokens` rows or the text ends; the last checkpoint is at the end."""
    cursor, last = writer.cursor, time.monotonic()
    with progress_bar("collect", cfg.tokens, "tokens", start=writer.rows) as bar:
        while writer.rows < cfg.tokens and (batch := list(islice(rows, cfg.lm_batch_rows))):
            activations, where = _read(lm, sites, batch)
            room = cfg.tokens - writer.rows
            writer.write({site: values[:room] for site, values in activations.items()}, where[:room])
            cursor += len(batch)
            if time.monotonic() - last >= CHECKPOINT_EVERY_S:
                writer.checkpoint(cursor)
                last = time.monotonic()
            bar.advance(min(len(where), room))
    if cursor > writer.cursor:
        writer.checkpoint(cursor)


def _read(lm: LanguageModel, sites: list[Site], batch: list[TokenRow]) -> tuple[dict[str, Tensor], Tensor]:
    """Each site's rows [B, D] and where [B, 3] they come from, without BOS, EOS and PAD."""
    origin = np.stack([np.stack([row.tokens, row.document, row.offset], axis=-1) for row in batch])  # [N, T, 3]
    where = torch.from_numpy(origin)
    kept = ~lm.is_special(where[..., 0])  # [N, T]
    tokens = where[..., 0].long().to(lm.device)
    read = lm.run(tokens, read=sites).activations
    return {str(site): read[site][kept.to(read[site].device)] for site in sites}, where[kept]


def _writer(cfg: CollectConfig, lm: LanguageModel, sites: list[Site], context: int) -> StoreWriter:
    start = StoreWriter.resume if cfg.resume else StoreWriter.create
    return start(
        cfg.out,
        widths={str(site): lm.width(site) for site in sites},
        expected_rows=cfg.tokens,
        bucket_rows=cfg.bucket_rows,
        seed=cfg.seed,
        model=lm.name,
        context=context,
        source=_source(cfg, lm),
    )


def _source(cfg: CollectConfig, lm: LanguageModel) -> dict[str, Any]:
    """All settings but `out` and `resume`, which do not bear on the rows, and the number type the model really had."""
    settings = {name: value for name, value in to_dict(cfg).items() if name not in ("out", "resume")}
    return {**settings, "part": "train", "lm_dtype": str(lm.dtype).removeprefix("torch.")}


def _sites(names: Iterable[str], shape: ModelShape) -> list[Site]:
    sites = [Site.parse(name) for name in names]
    for site in sites:
        shape.check(site)
        if sites.count(site) > 1:
            raise ConfigError(f"{site} is named more than once among the sites {', '.join(names)}.")
    return sites


def _context(wanted: int | None, lm: LanguageModel) -> int:
    if wanted is not None:
        return wanted
    chosen = min(lm.shape.context, LONGEST_CHOSEN_CONTEXT)
    log.info("context: %s tokens (chosen; set context to change it)", chosen)
    return chosen


def _peeked(rows: Iterator[TokenRow]) -> Iterator[TokenRow]:
    """The same rows; the first is made now, so that a text that gives none is an error before a folder is made."""
    return chain([next(rows)], rows)  # pack raises TextError rather than ending without a row
