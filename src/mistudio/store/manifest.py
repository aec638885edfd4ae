"""What a store holds (`manifest.json`) and how far an unfinished one has got (`progress.json`), read strictly.

Neither file has a date, a host or a path in it: an interrupted collection that went on is the same, byte for byte, as
one that never stopped.
"""

import json
import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from mistudio.config import from_dict, to_dict
from mistudio.errors import ConfigError, StoreError
from mistudio.files import read_json, write_json
from mistudio.store.checksum import is_checksum
from mistudio.store.dtypes import check_dtype, site_row_bytes
from mistudio.store.order import bucket_count, check_seed
from mistudio.store.outliers import Outliers
from mistudio.store.shard import bucket_shards

FORMAT: Final = "mistudio-store"
VERSION: Final = 4
"""2: checksums (SHA-256), and rows in other number types than float32. 3: what ended the collection, and outliers. 4:
checksums say their algorithm, which is XXH3. Finished stores of all versions are read, and unfinished ones since 3."""
READABLE: Final = (1, 2, 3, VERSION)
RESUMABLE: Final = (3, VERSION)
T = TypeVar("T")


def row_bytes(widths: Mapping[str, int], dtype: str = "float32") -> int:
    """Bytes that one row takes over all sites, and 12 for where it comes from."""
    return sum(site_row_bytes(width, dtype) for width in widths.values()) + 12


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a collection was asked for; a resume must ask for the same."""

    model: str
    """Name of the language model."""
    context: int
    """Tokens a packed row of text has, BOS included."""
    seed: int
    """Seed of the scattering to buckets."""
    expected_rows: int
    """Rows asked for; a text that ends too early gives fewer."""
    bucket_rows: int
    """Rows a bucket holds on average."""
    widths: dict[str, int]
    """Site -> width of its rows."""
    source: dict[str, Any]
    """Where the rows come from: the settings of the collection, as plain data."""
    row_dtype: str = "float32"
    """Number type of the rows on disk."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_dtype(self.row_dtype)
        counts = {"context": self.context, "expected_rows": self.expected_rows, "bucket_rows": self.bucket_rows}
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"{name} = {count}, but at least 1 is needed.")
        if not self.widths:
            raise ConfigError("A store needs at least one site.")
        for site, width in self.widths.items():
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", site) or site == "where":
                raise ConfigError(f"{site!r} cannot be the name of a site; an example is layers.3.resid_post.")
            if width < 1:
                raise ConfigError(f"Site {site} has width {width}, but at least 1 is needed.")

    @property
    def n_buckets(self) -> int:
        """Number of buckets, which is the number of shards of a site."""
        return bucket_count(self.expected_rows, self.bucket_rows)

    @property
    def row_bytes(self) -> int:
        """`row_bytes` of its sites."""
        return row_bytes(self.widths, self.row_dtype)


@dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """One site of a finished store."""

    width: int
    """D."""
    scale: float
    """C = sqrt(mean over rows of the sum over D of x^2), from float64 sums: E||x/C||^2 = 1."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a reader needs to know of a finished store, besides the rows."""

    format: str
    """Always "mistudio-store"."""
    version: int
    """Version of the layout on disk."""
    mistudio_version: str
    """The mistudio that finished the store."""
    dtype: str
    """Number type of the rows: float32, bfloat16, float16 or int8."""
    model: str
    """Name of the language model."""
    context: int
    """Tokens a packed row of text has, BOS included."""
    seed: int
    """Seed of the scattering to buckets."""
    expected_rows: int
    """Rows asked for."""
    bucket_rows: int
    """Rows a bucket holds on average."""
    rows: int
    """Rows held: activations of tokens that are not BOS, EOS or PAD."""
    token_rows: int
    """Packed rows of `context` tokens that the model read for them."""
    bucket_sizes: tuple[int, ...]
    """Rows of each bucket."""
    sites: dict[str, SiteInfo]
    """Site -> width and scale."""
    source: dict[str, Any]
    """Where the rows come from: the settings of the collection, as plain data."""
    checksums: dict[str, tuple[str, ...]] | None = None
    """Site, site/row_scale or where -> checksum of each bucket's rows (`Shard.hash`), as `checksum` says. None: version
    1 had none."""
    statistics_sha256: str | None = None
    """SHA-256 of statistics.safetensors. None: version 1 had none."""
    ended_by: str | None = None
    """Which budget ended the collection: tokens, documents, disk_gb, hours, or text where the text did. None: not
    known, or made from other stores."""
    outliers: Outliers | None = None
    """The rule for rows far longer than the others, and how many there were. None: not looked for."""

    def __post_init__(self) -> None:
        plan = self.plan  # its checks hold here too
        if (self.version == 1) != (self.checksums is None) or (self.version == 1) != (self.statistics_sha256 is None):
            raise ConfigError(f"version {self.version} with{'out' if self.checksums is None else ''} checksums.")
        if self.version == 1 and self.dtype != "float32":
            raise ConfigError(f"dtype {self.dtype!r}, but rows of version 1 are float32.")
        if len(self.bucket_sizes) != plan.n_buckets or min(self.bucket_sizes) < 0:
            raise ConfigError(f"bucket_sizes does not hold one size for each of the {plan.n_buckets} buckets.")
        if sum(self.bucket_sizes) != self.rows or self.rows < 1:
            raise ConfigError(f"rows is {self.rows}, but the buckets hold {sum(self.bucket_sizes)}.")
        for site, info in self.sites.items():
            if not (math.isfinite(info.scale) and info.scale > 0):
                raise ConfigError(f"the scale of {site} is {info.scale}.")
        if self.checksums is not None:
            names = set(bucket_shards(Path(), 0, plan.widths, self.dtype))
            if set(self.checksums) != names or any(len(c) != len(self.bucket_sizes) for c in self.checksums.values()):
                raise ConfigError(f"checksums does not hold one for each bucket of {', '.join(sorted(names))}.")
            every = (checksum for of_buckets in self.checksums.values() for checksum in of_buckets)
            if (odd := next((c for c in every if not is_checksum(c, named=self.version >= 4)), None)) is not None:
                expected = "xxh3_128: and 32 digits" if self.version >= 4 else "64 digits (SHA-256)"
                raise ConfigError(
                    f"{odd!r} is no checksum of version {self.version}, which is {expected}. The file is damaged or "
                    f"edited; copy the store again or collect it again."
                )

    @property
    def plan(self) -> Plan:
        """What the collection was asked for."""
        return Plan(
            model=self.model,
            context=self.context,
            seed=self.seed,
            expected_rows=self.expected_rows,
            bucket_rows=self.bucket_rows,
            widths={site: info.width for site, info in self.sites.items()},
            source=self.source,
            row_dtype=self.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The last checkpoint of an unfinished store: everything after it is cut off when the collection goes on."""

    format: str
    """Always "mistudio-store"."""
    version: int
    """Version of the layout on disk."""
    plan: Plan
    """What the collection was asked for."""
    cursor: int
    """Packed rows of tokens that are done."""
    bucket_sizes: tuple[int, ...]
    """Rows of each bucket at the checkpoint."""
    statistics: str
    """Name of the file with the float64 sums at the checkpoint."""
    outliers: Outliers | None = None
    """As in the manifest, at the checkpoint."""

    def __post_init__(self) -> None:
        if len(self.bucket_sizes) != self.plan.n_buckets or min(self.bucket_sizes) < 0:
            raise ConfigError(f"bucket_sizes does not hold one size for each of the {self.plan.n_buckets} buckets.")
        if self.statistics != f"statistics-{self.rows}.safetensors" or self.cursor < 0:
            raise ConfigError(f"statistics is {self.statistics!r} and cursor {self.cursor} at {self.rows} rows.")

    @property
    def rows(self) -> int:
        """Rows written at the checkpoint."""
        return sum(self.bucket_sizes)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """`folder`/manifest.json, atomically."""
    write_json(folder / "manifest.json", to_dict(manifest))


def write_progress(folder: Path, progress: Progress) -> None:
    """`folder`/progress.json, atomically."""
    write_json(folder / "progress.json", to_dict(progress))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished store. StoreError: none there (it says how far the collection got), or not valid."""
    path = folder / "manifest.json"
    if path.is_file():
        return _read(Manifest, path, READABLE)
    if (folder / "progress.json").is_file():
        progress = read_progress(folder)
        raise StoreError(
            f"{folder} has no manifest.json, so its collection did not finish: {progress.rows:,} of "
            f"{progress.plan.expected_rows:,} rows are there. Continue it with the same settings: "
            f"`mistudio collect ... --out {folder} --resume`."
        )
    raise StoreError(f"There is no activation store at {folder}. Make one with `mistudio collect ... --out {folder}`.")


def manifest_of(data: bytes, name: str) -> Manifest:
    """The manifest in a file's bytes. StoreError: it is not valid; `name` is what the message calls the file."""
    try:
        plain = json.loads(data)
    except ValueError as error:
        raise StoreError(f"{name} is not valid JSON: {error}") from error
    return _parsed(Manifest, plain, name, READABLE)


def read_progress(folder: Path) -> Progress:
    """The last checkpoint of an unfinished store. StoreError: it is not valid."""
    return _read(Progress, folder / "progress.json", RESUMABLE)


def refuse_difference(path: Path | str, found: Plan, wanted: Plan, *, besides: Container[str] = ()) -> None:
    """Nothing. StoreError: the collection at `path` was asked for something else, naming the first difference but
    those in `besides`."""
    old, new = ({**plan.source, **to_dict(plan), "source": None} for plan in (found, wanted))
    for name in new | old:
        if name not in besides and old.get(name) != new.get(name):
            raise StoreError(
                f"{path} was collected with {name} = {old.get(name)!r}; this run wants {new.get(name)!r}. Continue "
                f"with the old setting, or collect into another folder."
            )


def _read(cls: type[T], path: Path, versions: tuple[int, ...]) -> T:
    try:
        return _parsed(cls, read_json(path), str(path), versions)
    except ConfigError as error:
        raise StoreError(str(error)) from error


def _parsed(cls: type[T], data: Any, name: str, versions: tuple[int, ...]) -> T:
    version = data.get("version") if isinstance(data, dict) and data.get("format") == FORMAT else None
    if version is None:
        raise StoreError(f'{name} does not describe a mistudio store: "format" is not "{FORMAT}".')
    if version not in versions:
        readable = " and ".join(filter(None, [", ".join(map(str, versions[:-1])), str(versions[-1])]))
        raise StoreError(
            f"{name} has version {version!r}; this mistudio reads version {readable}. Use the one that wrote it."
        )
    try:
        return from_dict(cls, data, source=name)
    except ConfigError as error:
        raise StoreError(str(error)) from error
