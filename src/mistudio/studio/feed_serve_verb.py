"""`mistudio feed serve`: a store for trainers on this machine or others, until it is stopped (Ctrl-C, SIGTERM)."""

import logging
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro
from rich.console import RenderableType

from mistudio.store.curve import read_key
from mistudio.store.serve import FeedServer, ServeOptions, open_slice

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which store, to whom, and which slice of it."""

    store: Annotated[str, tyro.conf.Positional]
    """Its folder; of a slice, the manifest, the statistics and its own buckets are enough."""
    bind: str = "tcp://127.0.0.1:5555"
    """Where to listen: tcp://HOST:PORT. Only this machine can reach 127.0.0.1; anything else needs --key."""
    key: Path | None = None
    """The server.key of a pair made by `mistudio feed key`."""
    part: int = 0
    """Which slice of the buckets this server has, from 0."""
    parts: int = 1
    """Slices in all, each with a server of its own; a trainer names all of them."""
    readers: int = 2
    """Threads that read rows."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was served."""

    address: str
    """Where."""
    bytes: int
    """Bytes of rows sent."""


def run(config: Config) -> Result:
    """Serves until Ctrl-C or SIGTERM."""
    key = None if config.key is None else read_key(config.key, "server")
    how = ServeOptions(bind=config.bind, key=key, part=config.part, parts=config.parts, readers=config.readers)
    server = FeedServer(open_slice(config.store, how), how)
    log.info(
        "serving buckets %d to %d of %s at %s; train with --store %s. Ctrl-C ends it.",
        server.buckets.start,
        server.buckets.stop - 1,
        config.store,
        server.address,
        server.address,
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    try:
        server.run()
    except KeyboardInterrupt:
        log.info("stopped")
    return Result(address=server.address, bytes=server.bytes)


def _end(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def show(result: Result) -> RenderableType:
    """One line."""
    return f"{result.address}: {result.bytes / 1e9:,.2f} GB of rows were sent."
