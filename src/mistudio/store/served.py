"""A store behind feed servers, with what a trainer needs of a store: width, scale, mean, manifest, feeds.

The order of rows is worked out here, by the same functions and in the same way as for a local store, and rows are asked
for by place: batches are equal to the local feed's bit for bit, however many servers share the store out, and a place
saved with one goes on with the other. A bucket that several servers have is asked of them in turn.
"""

import hashlib
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Final

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from mistudio.errors import StoreError
from mistudio.store import order, wire
from mistudio.store.connection import PATIENCE, Connection, Patience
from mistudio.store.curve import Key, read_key
from mistudio.store.dtypes import TENSORS
from mistudio.store.feed import DEFAULTS, START, Feed, FeedOptions, JointFeed, Position
from mistudio.store.gather import Batches, default_threads, gather
from mistudio.store.manifest import Manifest, manifest_of
from mistudio.store.reader import Store
from mistudio.store.shard import site_shards

SCHEME: Final = "tcp://"


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one batch, in one bucket and asked for at once."""

    epoch: int
    bucket: int
    start: int
    """Rows of the bucket that come before, in the order of the epoch."""
    rows: int


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy one server is."""

    address: str
    """tcp://HOST:PORT."""
    first_bucket: int
    """It has the buckets from this one on ..."""
    end_bucket: int
    """... up to, not including, this one."""
    trainers: int
    """Connections that asked for something in the last minute."""
    waiting: int
    """Requests that wait."""
    bytes: int
    """Bytes of rows sent since it was started."""
    answer_s: float
    """Time to this answer, seconds."""


@dataclass(frozen=True)
class Offer:
    """What one server says of itself."""

    address: str
    manifest: bytes
    buckets: range
    means: list[bytes]


class ServedStore:
    """Activation rows of a store that one or more feed servers have between them; made by `connect`."""

    def __init__(self, offers: Sequence[Offer], key: Key | None, patience: Patience):
        self.manifest: Manifest = manifest_of(offers[0].manifest, f"The manifest from {offers[0].address}")
        self.addresses = [offer.address for offer in offers]
        self._offers = offers
        self._digest = hashlib.sha256(offers[0].manifest).hexdigest()
        self._owners = _owners(offers, len(self.manifest.bucket_sizes))
        self._means = _means(offers[0], self.manifest)
        self._key, self._patience = key, patience

    @classmethod
    def connect(
        cls, addresses: str | Sequence[str], key: Path | None = None, patience: Patience = PATIENCE
    ) -> "ServedStore":
        """The store that the servers at these addresses have; tcp://HOST:PORT, several in a list or between commas.

        key: the trainers.key of a server beyond this machine. StoreError: a server does not answer, refuses the key,
        speaks another version or has another store than the first; a bucket is with none of them.
        """
        known = None if key is None else read_key(key, "trainers")
        places = addresses.split(",") if isinstance(addresses, str) else list(addresses)
        return cls([_offer(address.strip(), known, patience) for address in places], known, patience)

    @property
    def rows(self) -> int:
        """Number of rows, the same for every site."""
        return self.manifest.rows

    @property
    def sites(self) -> list[str]:
        """Names of the sites, in the order they were collected in."""
        return list(self.manifest.sites)

    def width(self, site: str) -> int:
        """D of a site. StoreError: the store does not have it."""
        return self.manifest.sites[self._known(site)].width

    def scale(self, site: str) -> float:
        """C of a site, with E||x/C||^2 = 1."""
        return self.manifest.sites[self._known(site)].scale

    def mean(self, site: str) -> Float32[Tensor, " D"]:
        """E[x] of a site in raw units."""
        return self._means[self._known(site)].clone()

    def feed(
        self, site: str, batch_rows: int, *, seed: int, start: Position = START, how: FeedOptions = DEFAULTS
    ) -> Feed:
        """Endless shuffled batches of a site in normalised units; see `Feed`."""
        return Feed(self, self._known(site), batch_rows, seed=seed, start=start, how=how)

    def joint_feed(
        self, sites: Sequence[str], batch_rows: int, *, seed: int, start: Position = START, how: FeedOptions = DEFAULTS
    ) -> JointFeed:
        """Endless shuffled batches of several sites in step; see `JointFeed`. StoreError: no site, or one that is not
        in the store."""
        known = tuple(self._known(site) for site in sites)
        if not known:
            raise StoreError(f"A feed needs at least one site; {self._name} has {', '.join(self.sites)}.")
        return JointFeed(self, known, batch_rows, seed=seed, start=start, how=how)

    def batches(
        self, sites: tuple[str, ...], batch_rows: int, *, seed: int, start: Position, how: FeedOptions
    ) -> Iterator[tuple[tuple[Float32[Tensor, "B _"], ...], Position]]:
        """(A batch of every site, where the next one begins), without end; what a feed is made of."""
        memory = [Batches(batch_rows, self.width(site), how.prefetch + 3) for site in sites]
        scales = [np.float32(self.scale(site)) for site in sites]
        threads = how.threads or default_threads()
        at_once = wire.rows_at_once(map(self.width, sites), self.manifest.dtype)
        sizes = np.array(self.manifest.bucket_sizes, dtype=np.int64)
        with closing(self._arriving(sites, seed, pieces(sizes, seed, start, batch_rows, at_once, how))) as arriving:
            while True:
                if how.pinned:
                    batch = tuple(torch.empty(batch_rows, self.width(site), pin_memory=True) for site in sites)
                else:
                    batch = tuple(of_site.take() for of_site in memory)
                left = [values.numpy() for values in batch]
                while len(left[0]):
                    rows, stored = next(arriving)
                    for values, scale, of_site in zip(left, scales, stored, strict=True):
                        gather(of_site, self.manifest.dtype, np.arange(rows), scale, values[:rows], threads)
                    left = [values[rows:] for values in left]
                    del stored, of_site, values
                del left
                start = _advance(start, batch_rows * how.world, self.rows)
                yield batch, start
                del batch  # so that the memory may be used again as soon as it is given back

    def _arriving(
        self, sites: tuple[str, ...], seed: int, upcoming: Iterator[Piece]
    ) -> Generator[tuple[int, list[dict[str, np.ndarray]]], None, None]:
        """(Rows of the next piece, for each site its tensors as stored), without end.

        Up to `wire.CREDIT` requests are under way, so that servers work while the trainer does.
        """
        with ExitStack() as stack:
            links = {a: stack.enter_context(Connection(a, self._key, self._patience)) for a in self.addresses}
            turns = [cycle([links[address] for address in owners]) for owners in self._owners]
            asked: deque[tuple[Piece, Connection, int]] = deque()
            while True:
                while len(asked) < wire.CREDIT:
                    piece = next(upcoming)
                    link = next(turns[piece.bucket])
                    asked.append((piece, link, link.ask(self._request(piece, sites, seed))))
                piece, link, number = asked.popleft()
                yield piece.rows, self._stored(link.answer(number)[1], sites, piece.rows, link.address)

    def load(self) -> list[Load]:
        """How busy each server is now. StoreError: one does not answer."""
        return [_load(offer, self._key, self._patience) for offer in self._offers]

    def _request(self, piece: Piece, sites: tuple[str, ...], seed: int) -> wire.AskRows:
        return wire.AskRows(
            number=0,
            store=self._digest,
            sites=sites,
            seed=seed,
            epoch=piece.epoch,
            bucket=piece.bucket,
            start=piece.start,
            rows=piece.rows,
        )

    def _stored(
        self, frames: list[memoryview], sites: tuple[str, ...], rows: int, address: str
    ) -> list[dict[str, np.ndarray]]:
        """For each site, tensor -> the rows in an answer's frames, as stored; a view."""
        dtype = self.manifest.dtype
        if len(frames) != len(sites) * len(TENSORS[dtype]):
            raise StoreError(f"{address} sent {len(frames)} frames for {len(sites)} sites of {dtype}.")
        left = iter(frames)
        shards = [site_shards(Path(), site, 0, self.width(site), dtype) for site in sites]
        try:
            return [
                {tensor: shard.of_bytes(next(left), rows) for tensor, shard in of_site.items()} for of_site in shards
            ]
        except StoreError as error:
            raise StoreError(f"{address} sent rows of another size than its manifest says: {error}") from error

    @property
    def _name(self) -> str:
        return ",".join(self.addresses)

    def _known(self, site: str) -> str:
        if site not in self.manifest.sites:
            raise StoreError(f"{self._name} has no site {site!r}; it has {', '.join(self.sites)}.")
        return site


def pieces(
    sizes: np.ndarray, seed: int, start: Position, batch_rows: int, at_once: int, how: FeedOptions
) -> Iterator[Piece]:
    """Where the rows of the batches from `start` on are, batch after batch: none goes over the end of a batch or a
    bucket, or has more than `at_once` rows."""
    total = int(sizes.sum())
    place = start
    while True:
        place = _advance(place, how.rank * batch_rows, total)
        left = batch_rows
        while left:
            bucket, done = order.locate(sizes, seed, place.epoch, place.offset)
            rows = min(left, at_once, int(sizes[bucket]) - done)
            yield Piece(place.epoch, bucket, done, rows)
            place = _advance(place, rows, total)
            left -= rows
        place = _advance(place, (how.world - 1 - how.rank) * batch_rows, total)


def _advance(place: Position, rows: int, total: int) -> Position:
    epochs, offset = divmod(place.offset + rows, total)
    return Position(place.epoch + epochs, offset)


def _offer(address: str, key: Key | None, patience: Patience) -> Offer:
    with Connection(address, key, patience) as link:
        head, frames = link.answer(link.ask(wire.AskStore(number=0)))
    if not isinstance(head, wire.StoreIs) or not frames:
        raise StoreError(f"{address} does not say what it serves; it is no feed server of this version.")
    manifest, *means = frames
    return Offer(address, bytes(manifest), range(head.first_bucket, head.end_bucket), [bytes(mean) for mean in means])


def _load(offer: Offer, key: Key | None, patience: Patience) -> Load:
    with Connection(offer.address, key, patience) as link:
        start = time.monotonic()
        head, _ = link.answer(link.ask(wire.AskLoad(number=0)))
        took = time.monotonic() - start
    if not isinstance(head, wire.LoadIs):
        raise StoreError(f"{offer.address} does not say how busy it is; it is no feed server of this version.")
    return Load(
        address=offer.address,
        first_bucket=offer.buckets.start,
        end_bucket=offer.buckets.stop,
        trainers=head.trainers,
        waiting=head.waiting,
        bytes=head.bytes,
        answer_s=took,
    )


def _owners(offers: Sequence[Offer], buckets: int) -> list[list[str]]:
    """For each bucket, the servers that have it. StoreError: their stores differ, or nobody has one."""
    for offer in offers[1:]:
        if offer.manifest != offers[0].manifest:
            raise StoreError(
                f"{offer.address} serves another store than {offers[0].address}. Name servers of one store."
            )
    owners = [[offer.address for offer in offers if bucket in offer.buckets] for bucket in range(buckets)]
    if missing := [bucket for bucket, having in enumerate(owners) if not having]:
        raise StoreError(
            f"Bucket {missing[0]} (of {buckets}; {len(missing)} in all) is with none of the servers "
            f"{', '.join(offer.address for offer in offers)}. Name those of all parts, with commas between."
        )
    return owners


def _means(offer: Offer, manifest: Manifest) -> dict[str, Tensor]:
    """Site -> mean [D]. StoreError: they are not what the manifest says."""
    widths = [info.width for info in manifest.sites.values()]
    if [len(mean) for mean in offer.means] != [4 * width for width in widths]:
        raise StoreError(f"{offer.address} sent means of other widths than its manifest says. Start it again.")
    means = [torch.from_numpy(np.frombuffer(mean, dtype="<f4").astype(np.float32)) for mean in offer.means]
    return dict(zip(manifest.sites, means, strict=True))


def open_rows(place: str, key: Path | None = None) -> Store | ServedStore:
    """The store in a folder, at a URL, or behind the feed servers at tcp://HOST:PORT[,tcp://HOST:PORT ...].

    StoreError: as `Store.open` or `ServedStore.connect`; a key for what is no server.
    """
    if place.startswith(SCHEME):
        return ServedStore.connect(place, key)
    if key is not None:
        raise StoreError(f"A key is for feed servers, and {place} is none; their addresses begin with {SCHEME}.")
    return Store.open(place)
