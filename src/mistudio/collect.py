"""Text through a language model into a store of activation rows: every site asked for is read in one forward pass.

Only the train part of the text is read, so that held-out text stays unseen by what is trained. The model reads BOS
and EOS, but their rows are dropped, as Gemma Scope does (arXiv:2408.05147, section 3): their norms are not those of
other tokens.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mistudio.config import to_dict
from mistudio.errors import ConfigError
from mistudio.lm import LanguageModel, ModelShape, Site, TokenRow, documents, load_shape, pack
from mistudio.progress import Bar, progress_bar
from mistudio.store import RingFeed, Store, StoreWriter
from mistudio.store.background import Ahead, Behind
from mistudio.store.dtypes import RowDtype
from mistudio.store.extend import bucket_rows_to_extend
from mistudio.store.folder import refuse_occupied, refuse_small_disk
from mistudio.store.manifest import row_bytes
from mistudio.store.writer import make_plan

CHECKPOINT_EVERY_S = 30.0  # where checkpoints fall does not change a bit of the result
LONGEST_CHOSEN_CONTEXT = 1024
BATCHES_AHEAD = 4  # of tokens
BATCHES_BEHIND = 2  # of activations, which are large

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
    """Number type of the model. None: float32 on a CPU, bfloat16 elsewhere."""
    row_dtype: RowDtype = "float32"
    """Number type of the rows on disk; bfloat16 and float16 take half the room, int8 a quarter."""
    resume: bool = False
    """Continue an unfinished collection in `out`; with the same settings the result is the same to the last bit."""
    append: bool = False
    """Go on into the finished store in `out`, up to `tokens` rows in all, in as many buckets as it has."""

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


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What to read while it is trained on, with no store in between; fields as in `CollectConfig`."""

    site: str
    """Where to read, such as layers.3.resid_post."""
    buffer_rows: int = 1_000_000
    """Activation rows in memory, which are shuffled together: 4 · D bytes each."""
    model: str = "demo"
    """Language model: demo (in the package), a Hugging Face name or a local folder."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face model; None: its main branch."""
    text: str = "stories"
    """Text, as for collect; one that ends is read again from its beginning."""
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
    seed: int = 0
    """Seed of the shuffle."""
    device: str | None = None
    """Where the model runs: cpu, cuda, cuda:1; None: a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Number type of the model. None: float32 on a CPU, bfloat16 elsewhere."""

    def __post_init__(self) -> None:
        for name, count in {"lm_batch_rows": self.lm_batch_rows, "buffer_rows": self.buffer_rows}.items():
            if count < 1:
                raise ConfigError(f"{name} = {count}, but at least 1 is needed.")


def stream(cfg: StreamConfig, batch_rows: int, lm: LanguageModel | None = None) -> RingFeed:
    """Endless batches of one site straight from the model; for `train`, as a store's feed is.

    Text and tokens are made ahead in a thread. The model runs when rows are asked for, in the thread that asks: a model
    whose inside is read by two threads at once would give each the other's rows.

    Rows are those a collection of the same text would have, shuffled in blocks of `cfg.buffer_rows`. Resuming reads at
    most twice that many again. TextError, ModelError: as `collect`; a text that ends is begun again.
    """
    docs = partial(documents, cfg.text, column=cfg.column, separator=cfg.separator, part="train", held_out=cfg.held_out)
    docs()  # a missing source is said before the model loads
    (site,) = _sites((cfg.site,), load_shape(cfg.model, cfg.revision) if lm is None else lm.shape)
    if lm is None:
        lm = LanguageModel.load(cfg.model, device=cfg.device, dtype=cfg.dtype, revision=cfg.revision)
    settings = {**to_dict(cfg), "context": _context(cfg.context, lm), "lm_dtype": str(lm.dtype).removeprefix("torch.")}
    model, context = lm, int(settings["context"])
    pack(model, docs(), context)  # a context that is too long is said now

    def rows_from(start: int) -> Iterator[Tensor]:
        texts = (pack(model, docs(), context) for _ in repeat(None))
        batches = (batch for rows in texts for batch in _batches(model, rows, cfg.lm_batch_rows, 0))
        with Ahead(batches, BATCHES_AHEAD) as ahead:
            for batch, done in _from_row(start, ahead):
                yield _read(model, [site], batch)[str(site)][done:].to("cpu", torch.float32)

    return RingFeed(
        rows_from,
        site=str(site),
        width=lm.width(site),
        buffer_rows=cfg.buffer_rows,
        batch_rows=batch_rows,
        seed=cfg.seed,
        settings={name: value for name, value in settings.items() if name not in ("site", "seed", "buffer_rows")},
    )


def _from_row(start: int, batches: "Iterator[_Batch]") -> "Iterator[tuple[_Batch, int]]":
    """The batches from the one with activation row `start` on, each with how many of its rows come before that."""
    for batch in batches:
        if start >= len(batch.where):
            start -= len(batch.where)
        else:
            yield batch, start
            start = 0


def collect(cfg: CollectConfig, lm: LanguageModel | None = None) -> Store:
    """The finished store of `cfg.tokens` rows a site, or fewer (with a warning) where the text ends before.

    lm: a model that is loaded already; None: `cfg.model` is loaded. A kill loses at most the last 30 seconds, and
    with `cfg.resume` the finished store equals, byte for byte, one that was never interrupted (same machine, device
    and code). TextError: no text, or too little for one row. StoreError: the folder is in use or holds something
    else, the disk is too small, an activation is NaN or infinite. ModelError: no such model or site.
    """
    cfg = _as_extended(cfg)
    if not (cfg.resume or cfg.append):
        refuse_occupied(cfg.out)
    # before the model loads, so that a missing source is said at once
    docs = documents(cfg.text, column=cfg.column, separator=cfg.separator, part="train", held_out=cfg.held_out)
    shape = load_shape(cfg.model, cfg.revision) if lm is None else lm.shape
    sites = _sites(cfg.sites, shape)
    if not (cfg.resume or cfg.append):  # before gigabytes of weights are downloaded
        needed = row_bytes({str(site): shape.width(site) for site in sites}, cfg.row_dtype)
        refuse_small_disk(cfg.out, cfg.tokens * needed)
    if lm is None:
        lm = LanguageModel.load(cfg.model, device=cfg.device, dtype=cfg.dtype, revision=cfg.revision)
    context = _context(cfg.context, lm)
    rows = _peeked(pack(lm, docs, context))
    with _writer(cfg, lm, sites, context) as writer:
        if not writer.complete:
            _fill(writer, lm, sites, _batches(lm, rows, cfg.lm_batch_rows, done=writer.rows), cfg)
        store = writer.finish()
    if store.rows < cfg.tokens:
        log.warning("The text %s ended early: %s of %s rows were collected.", cfg.text, store.rows, cfg.tokens)
    return store


def _fill(
    writer: StoreWriter, lm: LanguageModel, sites: list[Site], batches: "Iterator[_Batch]", cfg: CollectConfig
) -> None:
    """Writes until there are `cfg.tokens` rows or the text ends; the last checkpoint is at the end.

    Text and tokens are made in one thread and rows are written in another while the model reads, with at most
    `BATCHES_AHEAD` and `BATCHES_BEHIND` batches waiting; what is computed and its order do not change.
    """
    left = cfg.tokens - writer.rows
    with (
        progress_bar("collect", cfg.tokens, "tokens", start=writer.rows) as bar,
        Ahead(batches, BATCHES_AHEAD) as ahead,
        Behind(BATCHES_BEHIND) as disk,
    ):
        record = _Record(writer, bar)
        while left > 0 and (batch := next(ahead, None)) is not None:
            activations = _read(lm, sites, batch)
            kept = {site: values[:left] for site, values in activations.items()}
            disk(partial(record, kept, batch.where[:left], batch.end))
            left -= len(batch.where)
    if record.cursor > writer.cursor:
        writer.checkpoint(record.cursor)


@dataclass(frozen=True)
class _Batch:
    """What the model reads in one pass: tokens [N, T], which of them to keep [N, T], and where those come from."""

    tokens: Tensor
    kept: Tensor
    where: Tensor  # [B, 3]
    end: int  # packed rows of the text up to here


class _Record:
    """Writes the rows of one batch after the other, with a checkpoint every `CHECKPOINT_EVERY_S` seconds."""

    def __init__(self, writer: StoreWriter, bar: Bar):
        self.writer, self.bar = writer, bar
        self.cursor, self._last = writer.cursor, time.monotonic()

    def __call__(self, rows: dict[str, Tensor], where: Tensor, end: int) -> None:
        self.writer.write(rows, where)
        self.cursor = end
        if time.monotonic() - self._last >= CHECKPOINT_EVERY_S:
            self.writer.checkpoint(self.cursor)
            self._last = time.monotonic()
        self.bar.advance(len(where))


def _batches(lm: LanguageModel, rows: Iterator[TokenRow], size: int, done: int) -> Iterator[_Batch]:
    """The batches of the text without its first `done` activation rows; they begin at the same packed rows as ever."""
    end = 0
    while some := list(islice(rows, size)):
        origin = torch.from_numpy(np.stack([np.stack([r.tokens, r.document, r.offset], axis=-1) for r in some]))
        tokens = origin[..., 0].long()
        kept = ~lm.is_special(tokens)
        end += len(some)
        past = min(done, int(kept.sum()))
        if past:
            kept.view(-1)[kept.view(-1).nonzero()[:past, 0]] = False
            done -= past
            if not kept.any():
                continue
        yield _Batch(tokens, kept, origin[kept], end)


def _read(lm: LanguageModel, sites: list[Site], batch: _Batch) -> dict[str, Tensor]:
    """Each site's rows [B, D], without BOS, EOS and PAD."""
    read = lm.run(batch.tokens, read=sites).activations
    return {str(site): read[site][batch.kept.to(read[site].device)] for site in sites}


def _writer(cfg: CollectConfig, lm: LanguageModel, sites: list[Site], context: int) -> StoreWriter:
    plan = make_plan(
        widths={str(site): lm.width(site) for site in sites},
        expected_rows=cfg.tokens,
        bucket_rows=cfg.bucket_rows,
        seed=cfg.seed,
        model=lm.name,
        context=context,
        source=_source(cfg, lm),
        row_dtype=cfg.row_dtype,
    )
    if cfg.append:
        return StoreWriter.extend(cfg.out, plan)
    return StoreWriter.of_plan(cfg.out, plan, resume=cfg.resume)


def _as_extended(cfg: CollectConfig) -> CollectConfig:
    """With append, `bucket_rows` is what keeps the number of buckets: a row's bucket depends on that number."""
    if not cfg.append:
        return cfg
    chosen = bucket_rows_to_extend(cfg.out, cfg.tokens)
    return cfg if chosen is None else replace(cfg, bucket_rows=chosen)


def _source(cfg: CollectConfig, lm: LanguageModel) -> dict[str, Any]:
    """All settings that bear on the rows (row_dtype is the store's own), and the number type the model really had."""
    settings = {name: v for name, v in to_dict(cfg).items() if name not in ("out", "resume", "append", "row_dtype")}
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
