"""New stores from finished ones: converted, merged, split by document. The sources are only read.

Each goes through `StoreWriter`, so that it is as crash-safe as a collection and `resume` goes on with it; every row
read is checked against its checksum first.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from mistudio.errors import ConfigError, StoreError
from mistudio.progress import progress_bar
from mistudio.store.dtypes import RowDtype, decode
from mistudio.store.manifest import Plan
from mistudio.store.order import chosen_documents
from mistudio.store.reader import Store
from mistudio.store.writer import StoreWriter

PIECE_ROWS: Final = 8192
CHECKPOINT_EVERY_S: Final = 30.0
_TEXT_SETTINGS: Final = ("text", "column", "separator", "part", "held_out")


@dataclass(frozen=True)
class _Piece:
    """Rows start ... stop-1 of one bucket of a store, copied in one step."""

    store: Store
    bucket: int
    start: int
    stop: int


Change = Callable[[_Piece, Int32[np.ndarray, "B 3"]], tuple[Int64[np.ndarray, " K"], Int32[np.ndarray, "B 3"]]]
"""(a piece, where its rows come from) -> (which of them to copy, where those are said to come from)."""


def convert(
    store: Store,
    out: Path,
    *,
    dtype: RowDtype | None = None,
    sites: Sequence[str] | None = None,
    resume: bool = False,
) -> Store:
    """The same rows in the same buckets, so that feeds have the same order, in another number type or of fewer sites.

    None: as in `store`. Scale and mean are of the rows as they are kept then. StoreError: an unknown site, a number
    that does not fit, `out` is in use, or the disk is too small.
    """
    chosen = store.sites if sites is None else list(sites)
    source = dict(store.manifest.source)
    if dtype not in (None, store.manifest.dtype):
        source["converted_from"] = [*source.get("converted_from", []), store.manifest.dtype]
    plan = replace(
        store.manifest.plan,
        widths={site: store.width(site) for site in chosen},
        row_dtype=dtype or store.manifest.dtype,
        source=source,
    )
    return _copied(plan, out, [store], _everything, store.manifest.token_rows, keep_buckets=True, resume=resume)


def merge(
    stores: Sequence[Store],
    out: Path,
    *,
    seed: int = 0,
    bucket_rows: int | None = None,
    resume: bool = False,
) -> Store:
    """One store with the rows of all, scattered anew to buckets, so that its shuffle is again exactly uniform.

    Documents are numbered on: those of the second store begin after the last of the first; `source["merged"]` keeps
    each store's settings and its first document. StoreError: the stores differ in model, context, sites or row dtype,
    or two of them hold the same text.
    """
    _refuse_mixture(stores)
    first_documents = [0]
    for store in stores[:-1]:
        first_documents.append(first_documents[-1] + _documents(store))
    if first_documents[-1] + _documents(stores[-1]) >= 2**31:
        raise StoreError("The stores have more than 2^31 documents together. Merge fewer of them.")
    shift = dict(zip(map(id, stores), first_documents, strict=True))

    def numbered_on(piece: _Piece, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(len(where)), where + np.array([0, shift[id(piece.store)], 0], dtype=np.int32)

    parts = [
        {"first_document": first, "rows": store.rows, "source": store.manifest.source}
        for first, store in zip(first_documents, stores, strict=True)
    ]
    plan = replace(
        stores[0].manifest.plan,
        seed=seed,
        expected_rows=sum(store.rows for store in stores),
        bucket_rows=bucket_rows or stores[0].manifest.bucket_rows,
        source={"merged": parts},
    )
    token_rows = sum(store.manifest.token_rows for store in stores)
    return _copied(plan, out, stores, numbered_on, token_rows, keep_buckets=False, resume=resume)


def split(
    store: Store, rest: Path, held_out: Path, *, fraction: float, seed: int = 0, resume: bool = False
) -> tuple[Store, Store]:
    """Two stores: the documents that are not held out, and those that are, each with probability `fraction`.

    All rows of a document go to the same one; every row goes to one. ConfigError: a fraction that leaves one empty, or
    one folder for both.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction = {fraction}, but it is between 0 and 1.")
    if rest.resolve() == held_out.resolve():
        raise ConfigError(f"Both parts would go to {rest}; give each a folder of its own.")
    chosen = chosen_documents(seed, _documents(store), fraction)
    counts = [0, 0]
    for bucket in range(len(store.manifest.bucket_sizes)):
        held = int(chosen[store.where(bucket)[:, 1]].sum())
        counts = [counts[0] + store.manifest.bucket_sizes[bucket] - held, counts[1] + held]
    if 0 in counts:
        raise ConfigError(f"fraction = {fraction} puts all {len(chosen)} documents on one side; choose another one.")
    made = []
    for out, part, rows in ((rest, "rest", counts[0]), (held_out, "held_out", counts[1])):
        settings = {"fraction": fraction, "seed": seed, "part": part, "source": store.manifest.source}
        plan = replace(store.manifest.plan, expected_rows=rows, source={"split": settings})

        def of_part(_: _Piece, where: np.ndarray, wanted: bool = part == "held_out") -> tuple[np.ndarray, np.ndarray]:
            kept = np.flatnonzero(chosen[where[:, 1]] == wanted)
            return kept, where[kept]

        token_rows = store.manifest.token_rows
        made.append(_copied(plan, out, [store], of_part, token_rows, keep_buckets=False, resume=resume))
    return made[0], made[1]


def _copied(
    plan: Plan, out: Path, stores: Sequence[Store], change: Change, token_rows: int, *, keep_buckets: bool, resume: bool
) -> Store:
    pieces = [
        _Piece(store, bucket, start, min(start + PIECE_ROWS, size))
        for store in stores
        for bucket, size in enumerate(store.manifest.bucket_sizes)
        for start in range(0, size, PIECE_ROWS)
    ]
    with StoreWriter.of_plan(out, plan, resume=resume) as writer:
        if not writer.complete:
            _copy(writer, pieces, change, keep_buckets)
        return writer.finish(token_rows)


def _copy(writer: StoreWriter, pieces: list[_Piece], change: Change, keep_buckets: bool) -> None:
    last = time.monotonic()
    with progress_bar("copy", writer.plan.expected_rows, "rows", start=writer.rows) as bar:
        for number in range(writer.cursor, len(pieces)):
            piece = pieces[number]
            kept, where = change(piece, piece.store.where(piece.bucket)[piece.start : piece.stop])
            if len(kept):
                rows = {site: _rows(piece, site, kept) for site in writer.plan.widths}
                buckets = np.full(len(kept), piece.bucket) if keep_buckets else None
                writer.write(rows, torch.from_numpy(np.array(where)), buckets)
            bar.advance(len(kept))
            if time.monotonic() - last >= CHECKPOINT_EVERY_S or number + 1 == len(pieces):
                writer.checkpoint(number + 1)
                last = time.monotonic()


def _rows(piece: _Piece, site: str, kept: Int64[np.ndarray, " K"]) -> Tensor:
    stored = piece.store.stored(site, piece.bucket)
    out = np.empty((len(kept), piece.store.width(site)), dtype=np.float32)
    decode({name: rows[piece.start + kept] for name, rows in stored.items()}, piece.store.manifest.dtype, out)
    return torch.from_numpy(out)


def _everything(_: _Piece, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(where)), where


def _documents(store: Store) -> int:
    """One more than the last document of which the store has rows."""
    sizes = store.manifest.bucket_sizes
    return 1 + max(int(store.where(bucket)[:, 1].max()) for bucket, size in enumerate(sizes) if size)


def _refuse_mixture(stores: Sequence[Store]) -> None:
    if len(stores) < 2:
        raise ConfigError("Merging takes at least two stores.")
    first = stores[0]
    for store in stores[1:]:
        for name in ("model", "context", "row_dtype", "widths"):
            mine, other = vars(store.manifest.plan)[name], vars(first.manifest.plan)[name]
            if mine != other:
                raise StoreError(
                    f"{store.place} has {name} = {mine!r}, {first.place} has {other!r}; merged stores must agree. "
                    f"`mistudio store convert` changes sites and row dtype."
                )
    texts = [_text(store.manifest.source) for store in stores]
    for number, text in enumerate(texts):
        if text in texts[:number]:
            raise StoreError(
                f"{stores[texts.index(text)].place} and {stores[number].place} hold the same text, so rows would be "
                f"there twice. Collect more of it with `mistudio collect --append` instead."
            )


def _text(source: dict[str, Any]) -> dict[str, Any]:
    return {name: source.get(name) for name in _TEXT_SETTINGS} if "text" in source else source
