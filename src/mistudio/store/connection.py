"""A trainer's connection to one feed server: what was asked for comes, also through deaths and restarts of the server.

Requests that have no answer yet are kept. They are sent again when the connection is made anew, so none is lost; each
has a number and only its first answer counts, so none is answered twice. A server that is silent is asked for a sign of
life; without one the connection is made anew. A person is told what is waited for, and after `Patience.give_up_s` the
wait ends with a sentence. A connection is used by one thread.
"""

import logging
import time
from dataclasses import dataclass, replace
from typing import Any, Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from mistudio.errors import StoreError
from mistudio.store import wire
from mistudio.store.curve import Key, host_and_port, unlock

_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_BROKEN_HANDSHAKES: Final = 3
"""So many in a row are no server that was just being killed, but one that wants another key."""
_RECONNECT_MS: Final = (20, 2_000)  # first and longest wait before the next try
_ANSWER_BYTES: Final = 1 << 28  # no frame of a server is longer: a manifest is shorter, rows are PIECE_BYTES or one row

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a trainer waits for a feed server."""

    ask_again_s: float = 5.0
    """Silence after which a server is asked for a sign of life; after as much again the connection is made anew."""
    give_up_s: float = 600.0
    """Longest wait for one answer."""

    def __post_init__(self) -> None:
        if not 0 < self.ask_again_s <= self.give_up_s:
            raise StoreError(f"ask_again_s = {self.ask_again_s} is from 0 to give_up_s = {self.give_up_s}.")


PATIENCE: Final = Patience()


class Connection:
    """To the server at tcp://HOST:PORT; a block that closes it."""

    def __init__(self, address: str, key: Key | None, patience: Patience):
        host_and_port(address)
        self.address = address
        self._key, self._patience = key, patience
        self._asked: dict[int, bytes] = {}  # number -> header of what has no answer yet
        self._probed: frozenset[int] = frozenset()  # what had no answer when a sign of life was asked for
        self._answers: dict[int, tuple[wire.Answer, list[memoryview]]] = {}
        self._number = 0
        self._broken = 0  # handshakes that failed, one after the other
        self._context: zmq.Context[Any] = zmq.Context()
        self._open()

    def ask(self, request: wire.Request) -> int:
        """The number of the request, which is on its way."""
        self._number += 1
        self._asked[self._number] = wire.header(replace(request, number=self._number))
        if self._ready:
            self._socket.send(self._asked[self._number])
        return self._number

    def answer(self, number: int) -> tuple[wire.Answer, list[memoryview]]:
        """The answer to a request and the frames that follow it, waited for.

        StoreError: the server refuses it, or the key, or speaks another version, or did not answer in time.
        """
        waited = _Wait(self._patience)
        while number not in self._answers:
            self._poll(waited)
            if waited.over:
                raise StoreError(
                    f"{self.address} {self._state} for {self._patience.give_up_s:,.0f} s. Start it (`mistudio feed "
                    f"serve STORE --bind {self.address}`) or see what is in between, and go on with --resume."
                )
            if waited.time_to_speak:
                log.warning("Waiting for %s: it %s for %.0f s.", self.address, self._state, waited.seconds)
            if waited.time_to_reconnect:
                self._reopen()
            elif waited.time_to_ask and self._ready:
                self._probed = frozenset(self._asked)
                self._socket.send(wire.header(wire.AskLoad(number=0)))
        return self._answers.pop(number)

    def close(self) -> None:
        """Nothing more is sent or received."""
        self._context.destroy(linger=0)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _state(self) -> str:
        return "gives signs of life, but no rows," if self._alive else "has not answered"

    def _open(self) -> None:
        self._ready = self._alive = False
        self._socket = self._context.socket(zmq.DEALER)
        if self._key is not None:
            unlock(self._socket, self._key)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, _ANSWER_BYTES),
            (zmq.RECONNECT_IVL, _RECONNECT_MS[0]),
            (zmq.RECONNECT_IVL_MAX, _RECONNECT_MS[1]),
            (zmq.IPV6, int("[" in self.address)),
        ):
            self._socket.setsockopt(option, value)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        try:
            self._socket.connect(self.address)
        except zmq.ZMQError as error:
            raise StoreError(f"{self.address} cannot be connected to: {error.strerror}.") from error

    def _reopen(self) -> None:
        self._socket.disable_monitor()
        self._socket.close(linger=0)
        self._open()

    def _poll(self, waited: "_Wait") -> None:
        """What has come in is taken, after at most the time until `waited` wants something done."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        ready = dict(poller.poll(waited.milliseconds))
        if self._monitor in ready:
            self._watch(recv_monitor_message(self._monitor)["event"])
        if self._socket in ready:
            self._receive(self._socket.recv_multipart(copy=False))
            waited.heard()

    def _receive(self, frames: list[Any]) -> None:
        self._alive = True
        try:
            head = wire.read_answer(frames[0].bytes)
        except StoreError as error:
            raise StoreError(f"{self.address}: {error}") from error
        if isinstance(head, wire.Refusal):
            raise StoreError(f"{self.address} refuses: {head.message}")
        if isinstance(head, wire.LoadIs) and head.yours < len(self._probed & self._asked.keys()):
            self._ask_all_again()
        if head.number in self._asked:
            del self._asked[head.number]
            self._answers[head.number] = head, [frame.buffer for frame in frames[1:]]

    def _ask_all_again(self) -> None:
        """What has no answer; should one come twice, the second is left aside."""
        self._probed = frozenset()
        for header in self._asked.values():
            self._socket.send(header)

    def _watch(self, event: int) -> None:
        """What became of the connection."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._ready, self._broken = True, 0
            self._ask_all_again()
            return
        self._ready = self._alive = False
        self._broken += event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        refused = event in (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
        if refused or self._broken >= _BROKEN_HANDSHAKES:
            raise StoreError(
                f"{self.address} does not accept this connection, which has {'a' if self._key else 'no'} key: it wants "
                f"the trainers.key of its own pair, or none, or it is no feed server. Give the right one with --key."
            )


class _Wait:
    """How long one answer has been waited for, and what that calls for."""

    def __init__(self, patience: Patience):
        self._patience = patience
        self._start = self._heard = time.monotonic()
        self._asked = False  # for a sign of life, since something was heard
        self._speak_after = patience.ask_again_s

    @property
    def seconds(self) -> float:
        """Since the wait began."""
        return time.monotonic() - self._start

    @property
    def milliseconds(self) -> int:
        """Until something is to be done."""
        now = time.monotonic()
        silence = self._heard + self._patience.ask_again_s * (2 if self._asked else 1)
        speak = self._start + self._speak_after
        return max(1, int(1000 * (min(silence, speak, self._start + self._patience.give_up_s) - now)) + 1)

    @property
    def over(self) -> bool:
        """It has been too long."""
        return self.seconds >= self._patience.give_up_s

    @property
    def time_to_speak(self) -> bool:
        """A person should be told; true once, then after twice the time."""
        if self.seconds < self._speak_after:
            return False
        self._speak_after *= 2
        return True

    @property
    def time_to_reconnect(self) -> bool:
        """The server was asked for a sign of life and gave none; true once."""
        if not self._asked or time.monotonic() < self._heard + 2 * self._patience.ask_again_s:
            return False
        self.heard()
        return True

    @property
    def time_to_ask(self) -> bool:
        """The server was silent; true once, until it is heard."""
        if self._asked or time.monotonic() < self._heard + self._patience.ask_again_s:
            return False
        self._asked = True
        return True

    def heard(self) -> None:
        """Something came from the server."""
        self._heard, self._asked = time.monotonic(), False
