"""A feed server: one process that gives the rows of a store, or of a slice of its buckets, to any number of trainers.

The order of a feed is a pure function (`order`), so a trainer works out where its next rows are and asks for them by
place; the server keeps no cursor that could be lost. Whoever lags behind, or comes later, asks for what it wants: all
read the same pages through one memory map. Rows go out as they are stored, so int8 rows take a quarter of the network.

One thread talks, a few read: a bucket whose checksum is computed, or a slow disk, stops neither signs of life nor other
trainers. Trainers take turns, a piece each. A trainer that asks for more than its credit is refused, and what it does
not take off the network is dropped beyond that, so none can make the server grow.
"""

import hashlib
import json
import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq

from mistudio.config import to_dict
from mistudio.errors import MistudioError, StoreError
from mistudio.store import order, wire
from mistudio.store.curve import Gate, Key, guard, host_and_port, is_loopback
from mistudio.store.gather import row_order
from mistudio.store.mirror import files_at
from mistudio.store.reader import Store
from mistudio.store.shard import Mapped

ORDERS_BYTES: Final = 256 << 20
"""Orders of buckets kept at hand: 8 bytes a row; each takes about 0.1 s to make for 10^6 rows."""
MAPS: Final = 16
"""Buckets of a site that stay mapped; those of a store at a URL take room in the cache as long."""
TRAINERS_MOST: Final = 1024
"""Trainers that may wait at a time."""
_RECENT_S: Final = 60.0
_DEAD_PEER_MS: Final = (5_000, 20_000)  # a connection is asked for a sign of life, and closed when there is none

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where a server listens, and what it gives to whom."""

    bind: str = "tcp://127.0.0.1:5555"
    """tcp://HOST:PORT; port 0: any free one. Beyond this machine only with a key."""
    key: Key | None = None
    """The server's key; None: anyone on this machine may read."""
    part: int = 0
    """Which of `parts` slices of the buckets this server has."""
    parts: int = 1
    """Servers that share the buckets out."""
    readers: int = 2
    """Threads that read rows."""

    def __post_init__(self) -> None:
        host_and_port(self.bind)
        if not is_loopback(self.bind) and self.key is None:
            raise StoreError(
                f"{self.bind} can be reached from other machines, so a key is needed. Make a pair with "
                f"`mistudio feed key FOLDER` and add --key FOLDER/server.key."
            )
        if not 0 <= self.part < self.parts:
            raise StoreError(f"part = {self.part} of parts = {self.parts}, but parts are 0 to parts - 1.")
        if self.readers < 1:
            raise StoreError(f"readers = {self.readers}, but at least 1 is needed.")


def slice_of(buckets: int, how: ServeOptions) -> range:
    """The buckets of a server: contiguous, and each in exactly one part. StoreError: there are too few for that."""
    if how.parts > buckets:
        raise StoreError(f"A store of {buckets} buckets cannot be shared out to {how.parts} servers.")
    return range(buckets * how.part // how.parts, buckets * (how.part + 1) // how.parts)


def open_slice(path: str | Path, how: ServeOptions) -> Store:
    """The store, of which only the manifest, the statistics and the server's own buckets need be in the folder."""
    return Store.open(path, slice_of(len(files_at(path, None).manifest().bucket_sizes), how))


class FeedServer:
    """Serves `store` while `run` runs; listens from the moment it is made."""

    def __init__(self, store: Store, how: ServeOptions):
        """StoreError: the address cannot be had, or the store has fewer buckets than `how` has parts."""
        self.store, self.how = store, how
        self.buckets = slice_of(len(store.manifest.bucket_sizes), how)
        """The buckets that this server has."""
        self.bytes = 0
        """Bytes of rows sent since the start."""
        self._manifest = json.dumps(to_dict(store.manifest)).encode()
        self._digest = hashlib.sha256(self._manifest).hexdigest()
        largest = max(store.manifest.bucket_sizes)
        self._order = lru_cache(max(4, ORDERS_BYTES // (8 * largest)))(row_order)
        self._mapped = lru_cache(MAPS)(self._bucket)
        self._waiting: dict[bytes, deque[wire.AskRows]] = {}  # of each trainer, what no thread has taken
        self._turns: deque[bytes] = deque()  # trainers with something waiting
        self._seen: dict[bytes, float] = {}  # when each last asked
        self._jobs: queue.SimpleQueue[tuple[bytes, wire.AskRows] | None] = queue.SimpleQueue()
        self._reading: Counter[bytes] = Counter()  # of each trainer, what threads have in hand
        self._open()

    def run(self) -> None:
        """Answers until `stop` is called, or the process is told to end."""
        poller = zmq.Poller()
        sockets = [self._front, self._done, *([self._gate.socket] if self._gate else [])]
        for socket in sockets:
            poller.register(socket, zmq.POLLIN)
        threads = [threading.Thread(target=self._read, name="feed reader") for _ in range(self.how.readers)]
        for thread in threads:
            thread.start()
        try:
            while True:
                ready = dict(poller.poll())
                if self._gate and self._gate.socket in ready:
                    self._gate.answer()
                if self._done in ready and not self._send_rows():
                    return
                if self._front in ready:
                    self._receive()
                self._hand_out()
        finally:
            for _ in threads:
                self._jobs.put(None)
            for thread in threads:
                thread.join()
            self._context.destroy(linger=0)

    def stop(self) -> None:
        """`run` returns, and the address is free; from any thread. Nothing where it has returned."""
        if self._context.closed:
            return
        with self._context.socket(zmq.PUSH) as socket:
            socket.connect(self._inside)
            socket.send(b"")

    def _open(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context(io_threads=self.how.readers)
        self._inside = f"inproc://rows-{id(self)}"
        self._done = self._context.socket(zmq.PULL)  # what the reading threads have ready, or nothing: stop
        self._done.bind(self._inside)
        self._gate = None if self.how.key is None else Gate(self._context, self.how.key)
        self._front = self._context.socket(zmq.ROUTER)
        if self.how.key is not None:
            guard(self._front, self.how.key)
        for option, value in (
            (zmq.MAXMSGSIZE, wire.HEADER_BYTES),
            (zmq.SNDHWM, 2 * wire.CREDIT),
            (zmq.RCVHWM, 2 * wire.CREDIT),
            (zmq.ROUTER_MANDATORY, 1),  # a trainer that went away, or takes nothing, is noticed
            (zmq.LINGER, 0),
            (zmq.HEARTBEAT_IVL, _DEAD_PEER_MS[0]),
            (zmq.HEARTBEAT_TIMEOUT, _DEAD_PEER_MS[1]),
            (zmq.IPV6, int("[" in self.how.bind)),
        ):
            self._front.setsockopt(option, value)
        try:
            self._front.bind(self.how.bind)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise StoreError(
                f"{self.how.bind} cannot be had: {error.strerror}. Choose another one with --bind."
            ) from error
        self.address = self._front.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        """Where it listens, the port that was chosen included."""

    def _receive(self) -> bool:
        """One request is answered, or waits for its turn. False: who asked is gone."""
        trainer, *frames = self._front.recv_multipart()
        if len(frames) != 1:
            return self._send(trainer, [wire.refusal(f"A request is 1 frame, not {len(frames)}.")])
        try:
            request = wire.read_request(frames[0])
        except MistudioError as error:
            return self._send(trainer, [wire.refusal(str(error))])
        if isinstance(request, wire.AskLoad):
            return self._send(trainer, [wire.header(self._load(request.number, trainer))])
        if isinstance(request, wire.AskStore):
            is_ = wire.StoreIs(number=request.number, first_bucket=self.buckets.start, end_bucket=self.buckets.stop)
            means = [self.store.mean(site).numpy().astype("<f4") for site in self.store.sites]
            return self._send(trainer, [wire.header(is_), self._manifest, *means])
        self._note(trainer)
        if refused := self._refused(request, len(self._waiting.get(trainer, ()))):
            return self._send(trainer, [wire.refusal(refused, request.number)])
        if trainer not in self._waiting:
            self._waiting[trainer] = deque()
            self._turns.append(trainer)
        self._waiting[trainer].append(request)
        return True

    def _refused(self, ask: wire.AskRows, waiting: int) -> str | None:
        """Why a request for rows cannot be met; None: it can."""
        sizes = self.store.manifest.bucket_sizes
        if waiting >= 2 * wire.CREDIT or len(self._waiting) > TRAINERS_MOST:
            return f"Too much is asked for at once; a trainer may have {wire.CREDIT} requests waiting."
        if ask.store != self._digest:
            return "This server has another store than the run began with. Serve that one, or begin a new run."
        if unknown := [site for site in ask.sites if site not in self.store.sites]:
            return f"There is no site {unknown[0]!r}; the store has {', '.join(self.store.sites)}."
        if ask.bucket not in self.buckets:
            return f"Bucket {ask.bucket} is not here; this server has {self.buckets.start} to {self.buckets.stop - 1}."
        at_once = wire.rows_at_once(map(self.store.width, ask.sites), self.store.manifest.dtype)
        if ask.start + ask.rows > sizes[ask.bucket] or ask.rows > at_once:
            return (
                f"Rows {ask.start} to {ask.start + ask.rows - 1} of bucket {ask.bucket} cannot be given: it has "
                f"{sizes[ask.bucket]:,}, and {at_once:,} are given at once."
            )
        return None

    def _hand_out(self) -> None:
        """Every thread that is free has a request, the trainers taking turns."""
        while self._turns and self._reading.total() < self.how.readers:
            trainer = self._turns.popleft()
            waiting = self._waiting[trainer]
            self._jobs.put((trainer, waiting.popleft()))
            self._reading[trainer] += 1
            if waiting:
                self._turns.append(trainer)
            else:
                del self._waiting[trainer]

    def _read(self) -> None:
        """A reading thread: requests to rows, one after the other."""
        with self._context.socket(zmq.PUSH) as done:
            done.linger = 0
            done.connect(self._inside)
            while (job := self._jobs.get()) is not None:
                trainer, ask = job
                try:
                    frames = self._rows(ask)
                except Exception as error:  # a thread that ends would leave trainers waiting: they are told
                    if not isinstance(error, MistudioError):
                        log.exception("Rows of bucket %s cannot be read.", ask.bucket)
                    frames = [wire.refusal(str(error) or type(error).__name__, ask.number)]
                done.send_multipart([trainer, *frames], copy=False)

    def _rows(self, ask: wire.AskRows) -> list[Any]:
        size = self.store.manifest.bucket_sizes[ask.bucket]
        chosen = self._order(ask.seed, ask.epoch, ask.bucket, size)[ask.start : ask.start + ask.rows]
        frames: list[Any] = [wire.header(wire.RowsAre(number=ask.number))]
        for site in ask.sites:
            frames += [self._taken(mapped, chosen) for mapped in self._mapped(site, ask.bucket).values()]
        if ask.start == 0:  # the trainer enters the bucket
            self.store.expect(ask.sites, self._next_bucket(ask))
        return frames

    def _bucket(self, site: str, bucket: int) -> dict[str, Mapped]:
        """A bucket of one site that was read through, so that its rows can be taken in any order."""
        self.store.expect([site], [bucket])
        return self.store.mapped(site, bucket)

    def _taken(self, mapped: Mapped, chosen: np.ndarray) -> np.ndarray:
        """The chosen rows. StoreError: the shard was cut; one put in its place will be looked at the next time."""
        try:
            with mapped.uncut():
                return np.take(mapped.rows, chosen, axis=0)
        except StoreError:
            self._mapped.cache_clear()
            raise

    def _next_bucket(self, ask: wire.AskRows) -> list[int]:
        """The bucket of this server that the epoch comes to next, if any."""
        after = order.bucket_order(ask.seed, ask.epoch, len(self.store.manifest.bucket_sizes)).tolist()
        return [bucket for bucket in after[after.index(ask.bucket) + 1 :] if bucket in self.buckets][:1]

    def _send_rows(self) -> bool:
        """Rows that are ready go out. False: it was the call of `stop`."""
        trainer, *frames = self._done.recv_multipart(copy=False)
        if not frames:
            return False
        self._reading -= Counter([trainer.bytes])
        size = sum(len(frame) for frame in frames[1:])
        if self._send(trainer.bytes, frames):
            self.bytes += size
        return True

    def _send(self, trainer: bytes, frames: list[Any]) -> bool:
        """The answer is on its way, or False: the trainer went away, or takes nothing; it will ask again."""
        try:
            self._front.send_multipart([trainer, *frames], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            if self._waiting.pop(trainer, None) is not None:
                self._turns.remove(trainer)
            return False
        return True

    def _note(self, trainer: bytes) -> None:
        """The trainer asked for rows just now; those that have not for a while are forgotten."""
        now = time.monotonic()
        if len(self._seen) >= TRAINERS_MOST:
            self._seen = {name: when for name, when in self._seen.items() if now - when < _RECENT_S}
        if len(self._seen) < TRAINERS_MOST:
            self._seen[trainer] = now

    def _load(self, number: int, trainer: bytes) -> wire.LoadIs:
        now = time.monotonic()
        return wire.LoadIs(
            number=number,
            trainers=sum(now - when < _RECENT_S for when in self._seen.values()),
            waiting=sum(map(len, self._waiting.values())) + self._reading.total(),
            yours=len(self._waiting.get(trainer, ())) + self._reading[trainer],
            bytes=self.bytes,
        )


@contextmanager
def serving(store: Store, how: ServeOptions) -> Iterator[FeedServer]:
    """A server that runs in a thread for the length of a block."""
    server = FeedServer(store, how)
    thread = threading.Thread(target=server.run, name="feed server")
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
