"""Collection by several workers on one machine or many, through Ray: the model runs there, and one store comes out.

The text is tokenised here and cut into slices; a worker reads a slice with its own copy of the model and writes it to
a folder of its own beside the store, as a small finished store. Slices are taken from there in the order of the text
and go through the writer that every collection goes through, so that the store equals, byte for byte, the one that a
single process makes on such machines, whoever read what: limits, outliers, resume and the exact shuffle are the same.
The price is that all rows pass through this process: it copies about as fast as a disk does.

A worker that dies costs the slices it had in hand; another takes its place and they are read again. Slices that were
complete when this process was killed are not read again by --resume.
"""

import hashlib
import logging
import os
import re
import shutil
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch

from mistudio.collect import LONGEST_CHOSEN_CONTEXT, CollectConfig, collect, read_rows
from mistudio.errors import ConfigError, MistudioError, StoreError
from mistudio.lm import LanguageModel, Site
from mistudio.lm.batches import Batch
from mistudio.store import Store, StoreWriter
from mistudio.store.manifest import Plan, read_manifest
from mistudio.store.outliers import Rows
from mistudio.store.remote import url_of

IN_HAND: Final = 2
"""Slices that a worker has: one it reads and one it reads next."""
_DEATHS_MOST: Final = 3
_SAY_EVERY_S: Final = 30.0
_TOKEN_STORE_BYTES: Final = 128 << 20  # what Ray holds in shared memory: tokens, no rows

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Who reads."""

    workers: int = 2
    """Processes that read, each with a copy of the model and, where there are GPUs, a GPU."""
    slice_tokens: int = 131_072
    """Tokens of a slice, which is what a worker's death may cost twice."""
    address: str | None = None
    """A Ray cluster: HOST:PORT, or auto; None: one is started on this machine and ended with the collection."""

    def __post_init__(self) -> None:
        for name, count in {"workers": self.workers, "slice_tokens": self.slice_tokens}.items():
            if count < 1:
                raise ConfigError(f"{name} = {count}, but at least 1 is needed.")


def collect_with_ray(cfg: CollectConfig, how: ClusterConfig) -> Store:
    """The store that `collect(cfg)` makes, its rows read by `how.workers` workers.

    `cfg.out` is a folder on a disk that this process and all workers share. ConfigError: it is a URL, or Ray is not
    installed. StoreError: workers die one after the other, or what they write is not seen here. Otherwise as `collect`.
    """
    if url_of(cfg.out) is not None:
        raise ConfigError(
            f"{cfg.out} is a URL; with --engine ray the store needs a folder that all workers share. Collect there, "
            f"then `mistudio store copy`."
        )
    ray = _ray()
    mine = _joined(ray, how)
    try:
        gpus = cfg.device is None and ray.cluster_resources().get("GPU", 0) >= 1
        device = cfg.device or ("cuda" if gpus else "cpu")
        dtype = cfg.dtype or ("float32" if device == "cpu" else "bfloat16")
        lm = LanguageModel.load(cfg.model, device="cpu", dtype=dtype, revision=cfg.revision)  # for its tokens
        fleet = Fleet(ray, cfg, how, lm, device, dtype)
        try:
            store = collect(cfg, lm, fleet.read)
        finally:
            fleet.dismiss()
    finally:
        if mine:
            ray.shutdown()
    shutil.rmtree(fleet.slices, ignore_errors=True)
    return store


@dataclass(eq=False)
class _Slice:
    """Consecutive batches of the text, read by one worker."""

    folder: Path
    plan: Plan | None
    """Of the store that it becomes; None: it has no rows."""
    batches: list[Batch]
    complete: bool


@dataclass(eq=False)
class _Member:
    """A worker as it is seen from here."""

    actor: Any
    name: str | None = None  # once it is ready
    in_hand: list[_Slice] = field(default_factory=list)


class Worker:
    """What runs in a worker's process: a copy of the model that reads slices."""

    def __init__(self, model: str, revision: str | None, device: str, dtype: str, sites: tuple[str, ...]):
        self._lm = LanguageModel.load(model, device=device, dtype=dtype, revision=revision)
        self._sites = [Site.parse(name) for name in sites]

    def hello(self) -> str:
        """Where this is, once the model is loaded."""
        return f"process {os.getpid()} on {os.uname().nodename}"

    def read(self, folder: Path, plan: Plan, batches: list[Batch]) -> None:
        """The rows of the batches are in `folder`, a finished store of one bucket, in their order, as float32."""
        if _is_complete(folder, plan):
            return
        shutil.rmtree(folder, ignore_errors=True)
        with StoreWriter.of_plan(folder, plan, resume=False) as writer:
            for batch in batches:
                writer.write(read_rows(self._lm, self._sites, batch), batch.where)
            writer.checkpoint(batches[-1].end)
            writer.finish()


class Fleet:
    """Workers, and what each has in hand; `read` is for `collect`."""

    def __init__(
        self, ray: ModuleType, cfg: CollectConfig, how: ClusterConfig, lm: LanguageModel, device: str, dtype: str
    ):
        self.slices = cfg.out.absolute().with_name(f"{cfg.out.name}.slices")
        """Where workers write."""
        self._ray, self._how, self._model = ray, how, lm.name
        self._context = cfg.context or min(lm.shape.context, LONGEST_CHOSEN_CONTEXT)
        self._widths = {str(site): lm.width(site) for site in map(Site.parse, cfg.sites)}
        self._arguments = (cfg.model, cfg.revision, device, dtype, cfg.sites)
        self._actor = ray.remote(num_cpus=1, num_gpus=int(device != "cpu"))(Worker)
        self._members: list[_Member] = []
        self._to_do: deque[_Slice] = deque()  # cut, and in nobody's hand
        self._pending: dict[Any, tuple[_Member, _Slice | None]] = {}  # Ray's reference -> who does what; None: loads
        self._deaths = 0  # since a slice was complete
        for _ in range(how.workers):
            self._hire()

    def read(self, found: Iterator[Batch]) -> Iterator[Rows]:
        """The rows of every batch, in order."""
        slices = self._cut(found)
        waiting: deque[_Slice] = deque()  # in order
        some: _Slice | None
        while True:
            while len(waiting) < (IN_HAND + 1) * self._how.workers and (some := next(slices, None)) is not None:
                waiting.append(some)
                if not some.complete:
                    self._to_do.append(some)
            if not waiting:
                return
            self._hand_out()
            if waiting[0].complete:
                yield from self._rows(waiting.popleft())
            else:
                self._wait()

    def dismiss(self) -> None:
        """No worker runs any more."""
        for member in self._members:
            self._ray.kill(member.actor)
        self._members, self._pending = [], {}

    def _cut(self, found: Iterator[Batch]) -> Iterator[_Slice]:
        """The batches in slices, which end at the same tokens however often the collection was interrupted."""
        rows = max(1, self._how.slice_tokens // self._context)  # of tokens
        for _, some in groupby(found, lambda batch: (batch.end - 1) // rows):
            batches = list(some)
            plan = self._plan(batches)
            yield _Slice(self.slices / f"{batches[-1].end:012d}", plan, batches, complete=plan is None)

    def _plan(self, batches: list[Batch]) -> Plan | None:
        """Of a slice's own store; what it is made of is in its source, so that no other is taken for it. None: it has
        no rows."""
        rows = sum(len(batch.where) for batch in batches)
        if rows == 0:
            return None
        digest = hashlib.sha256(repr(self._arguments).encode())
        for batch in batches:
            for tensor in (batch.tokens, batch.kept, batch.where):
                digest.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        return Plan(
            model=self._model,
            context=self._context,
            seed=0,
            expected_rows=rows,
            bucket_rows=rows,
            widths=self._widths,
            source={"slice": digest.hexdigest()},
        )

    def _rows(self, some: _Slice) -> Iterator[Rows]:
        """What a worker wrote, batch by batch; then its folder goes."""
        stored = {site: np.empty((0, width), dtype=np.float32) for site, width in self._widths.items()}
        if some.plan is not None:
            store = Store.open(some.folder)
            stored = {site: store.bucket(site, 0) for site in self._widths}
        start = 0
        for batch in some.batches:
            stop = start + len(batch.where)
            rows = {site: torch.from_numpy(np.array(values[start:stop])) for site, values in stored.items()}
            yield Rows(rows, batch.where, batch.end)
            start = stop
        shutil.rmtree(some.folder, ignore_errors=True)

    def _hire(self) -> None:
        member = _Member(self._actor.remote(*self._arguments))
        self._members.append(member)
        self._pending[member.actor.hello.remote()] = member, None

    def _hand_out(self) -> None:
        """Workers that are ready have work, those with the least first."""
        ready = [member for member in self._members if member.name is not None]
        while self._to_do and ready:
            member = min(ready, key=lambda member: len(member.in_hand))
            if len(member.in_hand) == IN_HAND:
                return
            some = self._to_do.popleft()
            member.in_hand.append(some)
            self._pending[member.actor.read.remote(some.folder, some.plan, some.batches)] = member, some
            log.debug("slice %s goes to %s", some.folder.name, member.name)

    def _wait(self) -> None:
        """One thing has happened: a worker is ready or has died, or a slice is complete."""
        ready: list[Any] = []
        since = time.monotonic()
        while not ready:
            ready, _ = self._ray.wait(list(self._pending), timeout=_SAY_EVERY_S)
            if not ready:
                log.info("waiting for the workers, for %.0f s", time.monotonic() - since)
        member, some = self._pending.pop(ready[0])
        try:
            answer = self._ray.get(ready[0])
        except self._ray.exceptions.RayActorError as error:
            self._replace(member, error)
            return
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, MistudioError) else error) from None
        if some is None:
            member.name = answer
            log.info("a worker is ready: %s", answer)
            return
        assert some.plan is not None
        if not _is_complete(some.folder, some.plan):
            raise StoreError(
                f"{member.name} wrote {some.folder}, which is not seen here. Choose an --out on a disk that this "
                f"machine and all workers share."
            )
        member.in_hand.remove(some)
        some.complete, self._deaths = True, 0

    def _replace(self, member: _Member, error: Exception) -> None:
        """Another worker takes the place of one that died, and what it had in hand is given out again."""
        name = member.name or "before it was ready"
        self._members.remove(member)
        self._deaths += 1
        if self._deaths > _DEATHS_MOST:
            raise StoreError(
                f"{self._deaths} workers died and no slice came of it; the last ({name}): {_last_line(error)} Give "
                f"them more memory, or use one process (--engine process); then go on with --resume."
            ) from error
        log.warning("a worker died (%s); another takes its place and reads its slices again", name)
        self._pending = {ref: (of, some) for ref, (of, some) in self._pending.items() if of is not member}
        self._to_do.extendleft(reversed(member.in_hand))
        self._hire()


def _is_complete(folder: Path, plan: Plan) -> bool:
    """Whether the folder holds the finished store of this plan."""
    try:
        return read_manifest(folder).plan == plan
    except StoreError:
        return False


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anyone
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Collection by several workers needs Ray. Type: pip install 'mistudio[ray]'") from error
    return ray


def _joined(ray: ModuleType, how: ClusterConfig) -> bool:
    """Ray is at hand; whether it is to be left when all is done. ConfigError: there is no such cluster."""
    if ray.is_initialized():
        return False
    if how.address is None:
        ray.init(
            address="local",
            _node_ip_address="127.0.0.1",  # reached from nowhere else
            num_cpus=how.workers,
            include_dashboard=False,
            object_store_memory=_TOKEN_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        return True
    try:
        if (place := re.fullmatch(r"([^:/]+):(\d{1,5})", how.address)) is not None:
            socket.create_connection((place[1], int(place[2])), timeout=10).close()  # Ray would wait for minutes
        ray.init(address=how.address, log_to_driver=False, logging_level=logging.WARNING)
    except (OSError, OverflowError, ValueError) as error:
        raise ConfigError(f"There is no Ray cluster at {how.address}: {_last_line(error)}") from error
    return True
