"""Reads a finished store: scale, mean, rows as stored, and an endless shuffled feed that resumes exactly."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32
from torch import Tensor

from mistudio.errors import StoreError
from mistudio.store.cache import Cache
from mistudio.store.dtypes import ROWS, decode
from mistudio.store.feed import DEFAULTS, START, Feed, FeedOptions, JointFeed, Position, local_batches
from mistudio.store.manifest import Manifest
from mistudio.store.mirror import Files, files_at
from mistudio.store.shard import Mapped, Shard, shard_name, site_shards, where_shard
from mistudio.store.statistics import FILE, statistics_of


class Store:
    """Activation rows of one or more sites of one model, on disk or at a URL; made by `open`."""

    def __init__(self, files: Files, manifest: Manifest, means: dict[str, Tensor]):
        self.manifest = manifest
        self.path = files.folder
        """Where its files are; for a store at a URL, where in the cache they come to be."""
        self.place = str(files)
        """The folder or URL."""
        self._files, self._means = files, means

    @classmethod
    def open(cls, place: str | Path, buckets: Collection[int] | None = None, *, cache: Cache | None = None) -> "Store":
        """The store in the folder or at the URL `place`, its files checked against the manifest by size.

        Header and checksum of a file are checked when it is first read through this object. From a URL (s3://, gs://,
        hf://, http://, ...; see `remote`) shards are fetched when they are needed into `cache`; None: the one that
        MISTUDIO_CACHE and MISTUDIO_CACHE_GB name. buckets: those that must be there; None: all.

        StoreError: no store, an unfinished one (it says how far it got and how to go on), a damaged or an unknown one;
        a server that does not answer, or refuses.
        """
        files = files_at(place, cache)
        manifest = files.manifest()
        files.check_sizes(manifest, range(len(manifest.bucket_sizes)) if buckets is None else buckets)
        moments = statistics_of(files.read(FILE), f"{files}/{FILE}", manifest)
        return cls(files, manifest, {site: mean.float() for site, (mean, _) in moments.items()})

    @property
    def rows(self) -> int:
        """Number of rows, the same for every site."""
        return self.manifest.rows

    @property
    def sites(self) -> list[str]:
        """Names of the sites, in the order they were asked for."""
        return list(self.manifest.sites)

    def width(self, site: str) -> int:
        """D of a site. StoreError: the store does not have it."""
        return self.manifest.sites[self._known(site)].width

    def scale(self, site: str) -> float:
        """C of a site, with E||x/C||^2 = 1: sqrt(mean over rows of the sum over D of x^2), from float64 sums."""
        return self.manifest.sites[self._known(site)].scale

    def mean(self, site: str) -> Float32[Tensor, " D"]:
        """E[x] of a site in raw units: float64 sums, rounded to float32 here."""
        return self._means[self._known(site)].clone()

    def bucket(self, site: str, bucket: int) -> Float32[np.ndarray, "B D"]:
        """One bucket's rows in raw units, as they were written, rounded to the row dtype; read-only.

        Memory-mapped where rows are float32; otherwise 4 · B · D bytes are allocated.
        """
        stored = self.stored(site, bucket)
        if self.manifest.dtype == "float32":
            return stored[ROWS]
        out = np.empty(stored[ROWS].shape, dtype=np.float32)
        decode(stored, self.manifest.dtype, out)
        return out

    def stored(self, site: str, bucket: int) -> dict[str, np.ndarray]:
        """Tensor -> one bucket's rows as they are on disk, for `dtypes.decode`; read-only and memory-mapped.

        StoreError: a file has another size, header or checksum than the manifest says.
        """
        return {tensor: mapped.rows for tensor, mapped in self.mapped(site, bucket).items()}

    def mapped(self, site: str, bucket: int) -> dict[str, Mapped]:
        """As `stored`, for whoever reads them for a while, and so asks again and again whether the files were cut."""
        shards = site_shards(self.path, self._known(site), bucket, self.width(site), self.manifest.dtype)
        return {tensor: self._map(shard_name(site, tensor), shard, bucket) for tensor, shard in shards.items()}

    def where(self, bucket: int) -> Int32[np.ndarray, "B 3"]:
        """Token id, document and offset in the document of each row of `bucket(site, bucket)`; read-only."""
        return self._map("where", where_shard(self.path, bucket), bucket).rows

    def file(self, name: str) -> bytes:
        """The bytes of manifest.json or statistics.safetensors."""
        return self._files.read(name)

    def feed(
        self,
        site: str,
        batch_rows: int,
        *,
        seed: int,
        start: Position = START,
        how: FeedOptions = DEFAULTS,
    ) -> Feed:
        """Endless shuffled batches of a site in normalised units; see `Feed`. StoreError: no such site, or as there."""
        return Feed(self, self._known(site), batch_rows, seed=seed, start=start, how=how)

    def joint_feed(
        self,
        sites: Sequence[str],
        batch_rows: int,
        *,
        seed: int,
        start: Position = START,
        how: FeedOptions = DEFAULTS,
    ) -> JointFeed:
        """Endless shuffled batches of several sites in step, as a transcoder needs them; see `JointFeed`.

        StoreError: no site, one that the store does not have, or as `JointFeed`.
        """
        known = tuple(self._known(site) for site in sites)
        if not known:
            raise StoreError(f"A feed needs at least one site; {self.place} has {', '.join(self.sites)}.")
        return JointFeed(self, known, batch_rows, seed=seed, start=start, how=how)

    def batches(
        self, sites: tuple[str, ...], batch_rows: int, *, seed: int, start: Position, how: FeedOptions
    ) -> Iterator[tuple[tuple[Float32[Tensor, "B _"], ...], Position]]:
        """(A batch of every site, where the next one begins), without end; what a feed is made of."""
        return local_batches(self, sites, batch_rows, seed, start, how)

    @contextmanager
    def held(self, name: str, shard: Shard, bucket: int) -> Iterator[None]:
        """A block in which the file of a shard, as `bucket_shards` names it, is at its path and is sound."""
        with self._files.held(shard, self.manifest.bucket_sizes[bucket], self._checksum(name, bucket)):
            yield

    def expect(self, sites: Sequence[str], buckets: Sequence[int]) -> None:
        """Says which buckets will be read now or next, so that fetching, reading and checking them is begun."""
        wanted = []
        for bucket in buckets:
            for site in sites:
                shards = site_shards(self.path, site, bucket, self.width(site), self.manifest.dtype)
                wanted += [
                    (shard, self.manifest.bucket_sizes[bucket], self._checksum(shard_name(site, tensor), bucket))
                    for tensor, shard in shards.items()
                ]
        self._files.expect(wanted)

    def _map(self, name: str, shard: Shard, bucket: int) -> Mapped:
        with self.held(name, shard, bucket):
            return self._files.map(shard, self.manifest.bucket_sizes[bucket])

    def _checksum(self, name: str, bucket: int) -> str | None:
        return None if self.manifest.checksums is None else self.manifest.checksums[name][bucket]

    def _known(self, site: str) -> str:
        if site not in self.manifest.sites:
            raise StoreError(f"{self.place} has no site {site!r}; it has {', '.join(self.sites)}.")
        return site
