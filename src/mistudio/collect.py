"""Text through a language model into a store of activation rows: every site asked for is read in one forward pass.

Only the train part of the text is read, so that held-out text stays unseen by what is trained. The model reads BOS
and EOS, but their rows are dropped, as Gemma Scope does (arXiv:2408.05147, section 3): their norms are not those of
other tokens.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mistudio.config import to_dict
from mistudio.errors import ConfigError
from mistudio.lm import LanguageModel, Site, TokenRow, documents, load_shape, pack, separate
from mistudio.lm.batches import MOST_ROWS, Batch, Clock, FirstDocuments, batches, packed_groups, sorted_groups
from mistudio.progress import Bar, progress_bar
from mistudio.store import RingFeed, Store, StoreWriter
from mistudio.store.background import Ahead, Behind
from mistudio.store.dtypes import RowDtype
from mistudio.store.extend import bucket_rows_to_extend
from mistudio.store.folder import refuse_occupied, refuse_small_disk
from mistudio.store.manifest import Plan, refuse_difference, row_bytes
from mistudio.store.outliers import FACTOR, Judged, Rows, judged
from mistudio.store.remote import url_of
from mistudio.store.transfer import collected_to
from mistudio.store.writer import make_plan

CHECKPOINT_EVERY_S = 30.0  # where checkpoints fall does not change a bit of the result
LONGEST_CHOSEN_CONTEXT = 1024
BATCHES_AHEAD = 4  # of tokens
BATCHES_BEHIND = 2  # of activations, which are large
ROWS_SORTED = 4096  # rows of tokens that are sorted by length together
_ENDS = {"text": "the text, which ended early", "hours": "the time; go on with --append"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """What to collect, from which model and text, and where to."""

    sites: tuple[str, ...]
    """Where to read, such as layers.3.resid_post, layers.3.mlp_out or layers.3.attn_z; all in one pass."""
    tokens: int
    """Activation rows to collect at most, one a token and site; BOS, EOS and PAD do not count. The number of buckets
    follows from it."""
    documents: int | None = None
    """Documents of the text's train part to read at most; None: all, until another budget is spent."""
    disk_gb: float | None = None
    """Gigabytes (10^9 bytes) that the rows may take; None: as many as there are."""
    hours: float | None = None
    """Time for this run, loading the model not counted; None: no limit. The store is finished with what there is; a
    resume after a kill has the time anew, and --append goes on later."""
    out: Path
    """Folder of the store, or URL (s3://BUCKET/PATH, gs://, hf://); new or empty, unless --resume."""
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
    packing: Literal["stream", "none"] = "stream"
    """stream: rows of `context` tokens of one document after the other. none: a row has tokens of one document only;
    rows of about one length are read together."""
    lm_batch_rows: int = 16
    """Rows of `context` tokens in one forward pass; with packing none, as many tokens in more and shorter rows."""
    drop_outliers: float | None = None
    """Leave out rows with a norm beyond so many medians, at any site; None: count those beyond 10, and keep them. The
    median is that of the first 4,096 rows."""
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
        _check_lm_batch_rows(self.lm_batch_rows)
        limits = {"documents": self.documents, "disk_gb": self.disk_gb, "hours": self.hours}
        for name, limit in {**limits, "drop_outliers": self.drop_outliers}.items():
            if limit is not None and not 0 < limit < math.inf:
                raise ConfigError(f"{name} = {limit}, but a number above 0 is needed. Leave it out for no limit.")
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
        _check_lm_batch_rows(self.lm_batch_rows)


def stream(cfg: StreamConfig, batch_rows: int, lm: LanguageModel | None = None) -> RingFeed:
    """Endless batches of one site straight from the model; for `train`, as a store's feed is.

    Text and tokens are made ahead in a thread. The model runs when rows are asked for, in the thread that asks: a model
    whose inside is read by two threads at once would give each the other's rows.

    Rows are those a collection of the same text would have, shuffled in blocks of `cfg.buffer_rows`. Resuming reads at
    most twice that many again. TextError, ModelError: as `collect`; a text that ends is begun again.
    """
    docs = partial(documents, cfg.text, column=cfg.column, separator=cfg.separator, part="train", held_out=cfg.held_out)
    docs()  # a missing source is said before the model loads
    (site,) = (load_shape(cfg.model, cfg.revision) if lm is None else lm.shape).sites((cfg.site,))
    if lm is None:
        lm = LanguageModel.load(cfg.model, device=cfg.device, dtype=cfg.dtype, revision=cfg.revision)
    settings = {**to_dict(cfg), "context": _context(cfg.context, lm), "lm_dtype": str(lm.dtype).removeprefix("torch.")}
    model, context = lm, int(settings["context"])
    pack(model, docs(), context)  # a context that is too long is said now

    def rows_from(start: int) -> Iterator[Tensor]:
        texts = (pack(model, docs(), context) for _ in repeat(None))
        found = (batch for rows in texts for batch in batches(model, packed_groups(rows, cfg.lm_batch_rows)))
        with Ahead(found, BATCHES_AHEAD) as ahead:
            for batch, done in _from_row(start, ahead):
                yield read_rows(model, [site], batch)[str(site)][done:].to("cpu", torch.float32)

    return RingFeed(
        rows_from,
        site=str(site),
        width=lm.width(site),
        buffer_rows=cfg.buffer_rows,
        batch_rows=batch_rows,
        seed=cfg.seed,
        settings={name: value for name, value in settings.items() if name not in ("site", "seed", "buffer_rows")},
    )


def _from_row(start: int, found: Iterator[Batch]) -> Iterator[tuple[Batch, int]]:
    """The batches from the one with activation row `start` on, each with how many of its rows come before that."""
    for batch in found:
        if start >= len(batch.where):
            start -= len(batch.where)
        else:
            yield batch, start
            start = 0


Read = Callable[[Iterator[Batch]], Iterator[Rows]]
"""Batches of tokens to the rows of each, in the same order."""


def collect(cfg: CollectConfig, lm: LanguageModel | None = None, read: Read | None = None) -> Store:
    """The finished store of `cfg.tokens` rows a site, or of fewer where another budget or the text ends before; its
    manifest says which.

    lm: a model that is loaded already; None: `cfg.model` is loaded. read: what the model reads, where that is not done
    here (`cluster`); None: by `lm`. A kill loses at most the last 30 seconds, and
    with `cfg.resume` the finished store equals, byte for byte, one that was never interrupted (same machine, device
    and code; not where `cfg.hours` ended it). TextError: no text, or too little for one row. StoreError: the folder is
    in use or holds something else, the disk is too small, an activation is NaN or infinite. ModelError: no such model
    or site.

    Where `cfg.out` is a URL the rows are collected in a folder of mistudio's cache and copied when they are complete.
    """
    if (url := url_of(cfg.out)) is not None:
        return _collect_to(url, cfg, lm, read)
    if not (cfg.resume or cfg.append):
        refuse_occupied(cfg.out)
    # before the model loads, so that a missing source is said at once
    docs = documents(cfg.text, column=cfg.column, separator=cfg.separator, part="train", held_out=cfg.held_out)
    shape = load_shape(cfg.model, cfg.revision) if lm is None else lm.shape
    sites = shape.sites(cfg.sites)
    bytes_a_row = row_bytes({str(site): shape.width(site) for site in sites}, cfg.row_dtype)
    limit = _most_rows(cfg, bytes_a_row)
    if not (cfg.resume or cfg.append):  # before gigabytes of weights are downloaded
        refuse_small_disk(cfg.out, limit * bytes_a_row)
    if lm is None:
        lm = LanguageModel.load(cfg.model, device=cfg.device, dtype=cfg.dtype, revision=cfg.revision)
    context = _context(cfg.context, lm)
    some = FirstDocuments(docs, cfg.documents)
    made = (pack if cfg.packing == "stream" else separate)(lm, some, context)
    rows = chain([next(made)], made)  # a text that gives none is an error before a folder is made
    with _writer(cfg, limit, lm, sites, context) as writer:
        ended_by = None
        if not writer.complete:
            done = writer.rows + (writer.outliers.dropped if writer.outliers else 0)
            groups = _groups(cfg, rows, context)
            on_cpu = read is None and lm.device.type == "cpu"
            read = read or partial(_read_all, lm, sites)
            out_of_time = _fill(writer, read, batches(lm, groups, done), cfg, between=on_cpu)
            ended_by = _ended_by(writer, cfg, some, out_of_time)
        store = writer.finish(ended_by=ended_by)
    if store.manifest.ended_by not in (None, "tokens"):
        ended = store.manifest.ended_by
        log.warning("%s of %s rows were collected: ended by %s.", store.rows, cfg.tokens, _ENDS.get(ended, ended))
    return store


def _collect_to(url: str, cfg: CollectConfig, lm: LanguageModel | None, read: Read | None) -> Store:
    if cfg.append:
        raise ConfigError(f"{url} cannot be appended to. Append to the store on a disk, then copy that to a new place.")

    def refuse_other(found: Plan) -> None:
        source = {**found.source, **json.loads(json.dumps(_settings(cfg)))}
        refuse_difference(url, found, replace(found, row_dtype=cfg.row_dtype, source=source))

    return collected_to(
        url, lambda folder: collect(replace(cfg, out=folder), lm, read), refuse_other, resume=cfg.resume
    )


def _check_lm_batch_rows(rows: int) -> None:
    if rows > MOST_ROWS:
        raise ConfigError(f"lm_batch_rows = {rows:,}, but a model reads at most {MOST_ROWS:,} rows in a pass.")


def _most_rows(cfg: CollectConfig, bytes_a_row: int) -> int:
    """Rows that --tokens and --disk-gb leave room for. ConfigError: none."""
    if cfg.disk_gb is None:
        return cfg.tokens
    rows = int(min(cfg.tokens, cfg.disk_gb * 1e9 / bytes_a_row))
    if rows == 0:
        raise ConfigError(f"disk_gb = {cfg.disk_gb} has no room for a single row of {bytes_a_row:,} bytes.")
    return rows


def _groups(cfg: CollectConfig, rows: Iterator[TokenRow], context: int) -> Iterator[list[TokenRow]]:
    if cfg.packing == "stream":
        return packed_groups(rows, cfg.lm_batch_rows)
    return sorted_groups(rows, cfg.lm_batch_rows * context, ROWS_SORTED)


def _ended_by(writer: StoreWriter, cfg: CollectConfig, some: FirstDocuments, out_of_time: bool) -> str:
    if writer.rows >= writer.plan.expected_rows:
        return "tokens" if writer.rows >= cfg.tokens else "disk_gb"
    if out_of_time:
        return "hours"
    return "documents" if some.spent else "text"


def _fill(writer: StoreWriter, read: Read, found: Iterator[Batch], cfg: CollectConfig, *, between: bool) -> bool:
    """Writes until there are as many rows as planned, or the text or `cfg.hours` ends (True); the last checkpoint is at
    the end.

    Text and tokens are made in one thread and rows are written in another while the model reads, with at most
    `BATCHES_AHEAD` and `BATCHES_BEHIND` batches waiting. `between`, for a model on a CPU: both are done between its
    passes, since a thread that takes a core, or the interpreter, from a pass costs the whole pass that time
    (benchmarks/collect_overhead.py); but not what waits, for a network or for the disk at a checkpoint. What is
    computed and its order are the same.
    """
    left = writer.plan.expected_rows - writer.rows
    clock = Clock(cfg.hours)
    with (
        progress_bar("collect", writer.plan.expected_rows, "tokens", start=writer.rows) as bar,
        nullcontext(found) if between and not cfg.text.startswith("hf:") else Ahead(found, BATCHES_AHEAD) as tokens,
        Behind(BATCHES_BEHIND) as disk,
    ):
        record = _Record(writer, bar)
        rule = writer.outliers or (cfg.drop_outliers or FACTOR, cfg.drop_outliers is not None)
        for piece in judged(read(clock.until_over(tokens)), rule, left):
            if between and disk.idle and not record.checkpoint_is_due():
                record(piece)
            else:
                disk(partial(record, piece))
    if record.cursor > writer.cursor:
        writer.checkpoint(record.cursor)
    return clock.over


class _Record:
    """Writes the rows of one batch after the other, with a checkpoint every `CHECKPOINT_EVERY_S` seconds."""

    def __init__(self, writer: StoreWriter, bar: Bar):
        self.writer, self.bar = writer, bar
        self.cursor, self._last = writer.cursor, time.monotonic()

    def __call__(self, piece: Judged) -> None:
        self.writer.write(piece.rows, piece.where)
        self.writer.outliers = (self.writer.outliers or piece.rule).plus(piece.beyond)
        self.cursor = piece.end
        if self.checkpoint_is_due():
            self.writer.checkpoint(self.cursor)
            self._last = time.monotonic()
        self.bar.advance(len(piece.where))

    def checkpoint_is_due(self) -> bool:
        return time.monotonic() - self._last >= CHECKPOINT_EVERY_S


def _read_all(lm: LanguageModel, sites: list[Site], found: Iterator[Batch]) -> Iterator[Rows]:
    """`read_rows` of every batch."""
    return (Rows(read_rows(lm, sites, batch), batch.where, batch.end) for batch in found)


def read_rows(lm: LanguageModel, sites: list[Site], batch: Batch) -> dict[str, Tensor]:
    """Each site's rows [B, D], without BOS, EOS and PAD."""
    read = lm.run(batch.tokens, read=sites).activations
    chosen = batch.kept.flatten().nonzero()[:, 0]  # twice as quick as a mask, and no GPU is waited for
    return {str(site): read[site].flatten(0, 1).index_select(0, chosen.to(read[site].device)) for site in sites}


def _writer(cfg: CollectConfig, limit: int, lm: LanguageModel, sites: list[Site], context: int) -> StoreWriter:
    bucket_rows = cfg.bucket_rows
    if cfg.append:  # a row's bucket depends on the number of buckets, so that is kept
        bucket_rows = bucket_rows_to_extend(cfg.out, limit) or bucket_rows
    lm_dtype = str(lm.dtype).removeprefix("torch.")
    plan = make_plan(
        widths={str(site): lm.width(site) for site in sites},
        expected_rows=limit,
        bucket_rows=bucket_rows,
        seed=cfg.seed,
        model=lm.name,
        context=context,
        source={**_settings(cfg), "bucket_rows": bucket_rows, "part": "train", "lm_dtype": lm_dtype},
        row_dtype=cfg.row_dtype,
    )
    if cfg.append:
        return StoreWriter.extend(cfg.out, plan)
    return StoreWriter.of_plan(cfg.out, plan, resume=cfg.resume)


def _settings(cfg: CollectConfig) -> dict[str, Any]:
    """All settings that bear on the rows, but for the store's own and the time that a run may take."""
    others = ("out", "resume", "append", "row_dtype", "hours")
    return {name: value for name, value in to_dict(cfg).items() if name not in others}


def _context(wanted: int | None, lm: LanguageModel) -> int:
    if wanted is not None:
        return wanted
    chosen = min(lm.shape.context, LONGEST_CHOSEN_CONTEXT)
    log.info("context: %s tokens (chosen; set context to change it)", chosen)
    return chosen
