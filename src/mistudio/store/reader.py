"""Reads a finished store: scale, mean, rows as stored, and an endless shuffled feed that resumes exactly."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32
from torch import Tensor

from mistudio.errors import StoreError
from mistudio.store.dtypes import ROWS, decode
from mistudio.store.feed import DEFAULTS, START, Feed, FeedOptions, JointFeed, Position
from mistudio.store.manifest import Manifest, read_manifest
from mistudio.store.shard import Shard, bucket_shards, shard_name, site_shards, where_shard
from mistudio.store.statistics import read_statistics


class Store:
    """Activation rows of one or more sites of one model, on disk; made by `open`."""

    def __init__(self, path: Path, manifest: Manifest, means: dict[str, Tensor]):
        self.path, self.manifest = path, manifest
        self._means = means
        self._sound: set[tuple[str, int]] = set()  # shards whose checksum was found right

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """The store in the folder `path`, its files checked against the manifest by size.

        Header and checksum of a file are checked when it is first read through this object.

        StoreError: no store, an unfinished one (it says how far it got and how to go on), a damaged or an unknown one.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for bucket, size in enumerate(manifest.bucket_sizes):
            for shard in bucket_shards(path, bucket, manifest.plan.widths, manifest.dtype).values():
                shard.check_size(size)
        moments = read_statistics(path, manifest)
        return cls(path, manifest, {site: mean.float() for site, (mean, _) in moments.items()})

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
        shards = site_shards(self.path, self._known(site), bucket, self.width(site), self.manifest.dtype)
        return {tensor: self._map(shard_name(site, tensor), shard, bucket) for tensor, shard in shards.items()}

    def where(self, bucket: int) -> Int32[np.ndarray, "B 3"]:
        """Token id, document and offset in the document of each row of `bucket(site, bucket)`; read-only."""
        return self._map("where", where_shard(self.path, bucket), bucket)

    def feed(
        self,
        site: str,
        batch_rows: int,
        *,
        seed: int,
        start: Position = START,
        how: FeedOptions = DEFAULTS,
    ) -> Feed:
        """Endless shuffled batches of a site in normalised units; see `Feed`."""
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
        """Endless shuffled batches of several sites in step, as a transcoder needs them; see `JointFeed`."""
        known = tuple(self._known(site) for site in sites)
        if not known:
            raise StoreError(f"A feed needs at least one site; {self.path} has {', '.join(self.sites)}.")
        return JointFeed(self, known, batch_rows, seed=seed, start=start, how=how)

    def _map(self, name: str, shard: Shard, bucket: int) -> np.ndarray:
        size = self.manifest.bucket_sizes[bucket]
        mapped = shard.map(size)
        if self.manifest.checksums is not None and (name, bucket) not in self._sound:
            shard.check_hash(size, self.manifest.checksums[name][bucket])
            self._sound.add((name, bucket))
        return mapped

    def _known(self, site: str) -> str:
        if site not in self.manifest.sites:
            raise StoreError(f"{self.path} has no site {site!r}; it has {', '.join(self.sites)}.")
        return site
