"""The messages between feed servers and trainers: a small JSON header, then frames of raw little-endian rows.

A trainer sends one frame, the header of a request; a server answers with a header and what it announces. A request says
everything that its answer depends on (store, order, place), so a server remembers nothing that bears on what a trainer
gets, and one that was started again goes on for all. Nothing is unpickled; a header is read strictly, whoever sent it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from mistudio.config import from_dict, to_dict
from mistudio.errors import ConfigError, StoreError
from mistudio.store.dtypes import site_row_bytes
from mistudio.store.order import check_seed

PROTOCOL: Final = "mistudio-feed"
VERSION: Final = 2
HEADER_BYTES: Final = 16_384
"""A longer header is refused; a server drops the connection before it has taken it in."""
PIECE_BYTES: Final = 8 << 20
"""Rows of one answer take at most this, or are one row."""
CREDIT: Final = 8
"""Requests that a trainer may have without an answer, so at most CREDIT * PIECE_BYTES are under way to it."""
_MOST_SITES: Final = 64
_SHOWN_CHARACTERS: Final = 300
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AskStore:
    """What is served? Answered by `StoreIs`, the manifest as JSON, and a frame with the float32 mean of each site."""

    number: int
    """The request's, repeated in its answer."""


@dataclass(frozen=True, kw_only=True)
class AskLoad:
    """Are you there, and how busy? Answered by `LoadIs`."""

    number: int
    """The request's, repeated in its answer."""


@dataclass(frozen=True, kw_only=True)
class AskRows:
    """Rows start ... start+rows-1 of a bucket in the order of an epoch, as stored. Answered by `RowsAre` and, for each
    site, a frame for each of its tensors."""

    number: int
    """The request's, repeated in its answer."""
    store: str
    """SHA-256 of the manifest."""
    sites: tuple[str, ...]
    """Sites in step."""
    seed: int
    """Seed of the order."""
    epoch: int
    """Epoch of the order."""
    bucket: int
    """Which bucket."""
    start: int
    """Rows of it that come before."""
    rows: int
    """Rows wanted."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name, count in {"epoch": self.epoch, "bucket": self.bucket, "start": self.start, "rows": self.rows}.items():
            if not 0 <= count < 2**63:
                raise ConfigError(f"{name} is from 0 to 2^63 - 1.")
        if self.rows < 1 or not 1 <= len(self.sites) <= _MOST_SITES:
            raise ConfigError(f"rows is at least 1, and sites are 1 to {_MOST_SITES}.")


@dataclass(frozen=True, kw_only=True)
class StoreIs:
    """The answer to `AskStore`."""

    number: int
    """The request's."""
    first_bucket: int
    """The server has the buckets from this one on ..."""
    end_bucket: int
    """... up to, not including, this one."""


@dataclass(frozen=True, kw_only=True)
class LoadIs:
    """The answer to `AskLoad`."""

    number: int
    """The request's."""
    trainers: int
    """Connections that asked for something in the last minute."""
    waiting: int
    """Requests that wait."""
    yours: int
    """Requests for rows that came on this connection and have no answer yet. Where the trainer knows of more, they were
    lost, and it asks again."""
    bytes: int
    """Bytes of rows sent since the server was started."""


@dataclass(frozen=True, kw_only=True)
class RowsAre:
    """The answer to `AskRows`."""

    number: int
    """The request's."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The answer to a request that cannot be met."""

    number: int | None
    """The request's; None where it could not be read."""
    message: str
    """One sentence for a person."""


REQUESTS: Final = {"store?": AskStore, "load?": AskLoad, "rows?": AskRows}
ANSWERS: Final = {"store": StoreIs, "load": LoadIs, "rows": RowsAre, "refusal": Refusal}
_KINDS: Final = {cls: kind for kind, cls in (REQUESTS | ANSWERS).items()}
Request = AskStore | AskLoad | AskRows
Answer = StoreIs | LoadIs | RowsAre | Refusal


def header(message: Request | Answer) -> bytes:
    """The header frame of a message."""
    return json.dumps(
        {"protocol": PROTOCOL, "version": VERSION, "kind": _KINDS[type(message)], **to_dict(message)}
    ).encode()


def refusal(message: str, number: int | None = None) -> bytes:
    """The header of a `Refusal`, its sentence cut where it is long, since a request may be quoted in it."""
    shown = message if len(message) <= _SHOWN_CHARACTERS else f"{message[:_SHOWN_CHARACTERS]} ..."
    return header(Refusal(number=number, message=shown))


def read_request(frame: bytes) -> Request:
    """The request in a header frame from anyone. StoreError: it is none, or of another protocol version."""
    return _read(frame, REQUESTS)


def read_answer(frame: bytes) -> Answer:
    """The answer in a header frame from anyone. StoreError: it is none, or of another protocol version."""
    return _read(frame, ANSWERS)


def _read(frame: bytes, kinds: Mapping[str, type[T]]) -> T:
    if len(frame) > HEADER_BYTES:
        raise StoreError(
            f"A header of {len(frame):,} bytes is no message of a feed; at most {HEADER_BYTES:,} are read."
        )
    try:
        data: Any = json.loads(frame)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{frame[:40]!r} is no message of a feed: it is not JSON.") from error
    if not isinstance(data, dict) or data.pop("protocol", None) != PROTOCOL:
        raise StoreError(f"{frame[:40]!r} is no message of a feed.")
    version, kind = data.pop("version", None), data.pop("kind", None)
    if version != VERSION or isinstance(version, bool):
        raise StoreError(
            f"The other side speaks version {_short(version)} of the feed protocol, this one {VERSION}. "
            f"Use the same mistudio on both."
        )
    if not isinstance(kind, str) or kind not in kinds:
        raise StoreError(f"A message of kind {_short(kind)} is unknown; the kinds are {', '.join(kinds)}.")
    try:
        return from_dict(kinds[kind], data, source=f"message {kind}")
    except ConfigError as error:
        raise StoreError(str(error)) from error


def _short(value: object) -> str:
    return repr(value)[:40]


def rows_at_once(widths: Iterable[int], dtype: str) -> int:
    """Rows of sites of these widths that one answer may hold."""
    return max(1, PIECE_BYTES // sum(site_row_bytes(width, dtype) for width in widths))
