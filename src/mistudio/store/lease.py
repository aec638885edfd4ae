"""A file that keeps its length while it is read through a memory map.

Reading what a mapped file has lost ends the process (SIGBUS), and no check before reading can exclude that the file is
cut right after it. On Linux a read lease can (fcntl(2), F_SETLEASE): whoever wants to write to the file or to cut it
waits until the lease is given back, for 45 seconds at most. It is for a file's owner, on file systems that have it.
"""

import fcntl
import os
import signal
import sys
from contextlib import suppress
from threading import Lock
from typing import Final

_F_SETSIG: Final = 10  # from <fcntl.h>; Python's module does not name it


class Lease:
    """A block in which nobody cuts an open file, where the system can see to that; elsewhere nothing. Any number of
    threads may be in it."""

    def __init__(self, descriptor: int):
        self._descriptor = os.dup(descriptor)
        self._lock, self._readers, self._held = Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            self._readers += 1
            self._held = self._held or self._taken()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._held and not self._readers and sys.platform == "linux":
                with suppress(OSError):  # the system took it back: this process stood still for longer than it waits
                    fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
                self._held = False

    def __del__(self) -> None:
        os.close(self._descriptor)

    def _taken(self) -> bool:
        if sys.platform != "linux":
            return False
        try:  # whoever waits is told of by a signal: by one that is ignored, in place of SIGIO, which ends the process
            fcntl.fcntl(self._descriptor, _F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError:  # it is another's file, open for writing, or on a file system without leases
            return False
        return True
