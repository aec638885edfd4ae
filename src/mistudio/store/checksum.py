"""Checksums of shards, as manifest.json has them: "xxh3_128:" and 32 hexadecimal digits.

XXH3 runs at the speed of memory, so that a feed's first epoch, which checks every shard, costs little more than the
next. With 128 bits it finds every accident of a disk or a network. It does not withstand someone who makes a file on
purpose, and neither would SHA-256 here: who can change a shard can change the manifest. Where a name stands for content
that others could choose (a store behind a server or in a cache, a released SAE) it is SHA-256 still. So it is for
shards in manifests of versions 2 and 3, which have 64 digits and no name before them.
"""

import hashlib
import re
from collections.abc import Callable
from typing import Final, Protocol

import xxhash


class Hash(Protocol):
    """What hashlib and xxhash have in common; `update` lets go of the interpreter's lock."""

    def update(self, data: memoryview | bytes, /) -> None:
        """More bytes."""

    def hexdigest(self) -> str:
        """Of all bytes so far."""


WRITTEN: Final = "xxh3_128"
"""Algorithm of the shards that are written now."""
_OLD: Final = "sha256"
_ALGORITHMS: Final[dict[str, Callable[[], Hash]]] = {WRITTEN: xxhash.xxh3_128, _OLD: hashlib.sha256}
_NAMED: Final = re.compile(r"xxh3_128:[0-9a-f]{32}|sha256:[0-9a-f]{64}")
_UNNAMED: Final = re.compile(r"[0-9a-f]{64}")


def is_checksum(text: str, *, named: bool) -> bool:
    """Whether `text` is a checksum of an algorithm we know; `named`: as manifests have them since version 4."""
    return (_NAMED if named else _UNNAMED).fullmatch(text) is not None


def new_hash(checksum: str | None = None) -> Hash:
    """A hash of no bytes, by the algorithm of `checksum`; None: by the one that is written now."""
    return _ALGORITHMS[WRITTEN if checksum is None else checksum.rpartition(":")[0] or _OLD]()


def written(found: Hash) -> str:
    """What a manifest says of a `new_hash()`."""
    return f"{WRITTEN}:{found.hexdigest()}"


def difference(found: Hash, expected: str, rows: int) -> str | None:
    """How the checksum of so many rows differs from the expected one, for a sentence; None: it does not."""
    name, _, digest = expected.rpartition(":")
    if found.hexdigest() == digest:
        return None
    return (
        f"checksum of its {rows:,} rows ({name or _OLD}) is {found.hexdigest()[:12]}..., manifest.json says "
        f"{digest[:12]}..."
    )
