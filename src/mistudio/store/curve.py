"""Who may talk to a feed server: anyone on this machine, or holders of a key (ZeroMQ CURVE), encrypted.

Two files belong together. The server's has its secret key and the trainers' public key; the trainers', which is copied
to every machine that trains, has their secret key and the server's public one. Each side then knows the other; a
trainers' file lets nobody pose as the server.
"""

import ipaddress
import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import zmq
from zmq.utils import z85

from mistudio.config import from_dict, to_dict
from mistudio.errors import ConfigError, StoreError
from mistudio.files import read_json

FORMAT: Final = "mistudio-feed-key"
VERSION: Final = 1
_ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"  # where libzmq asks whether a key is known


@dataclass(frozen=True, kw_only=True)
class Key:
    """One side's file; keys are 32 bytes in Z85."""

    format: str
    """Always "mistudio-feed-key"."""
    version: int
    """Version of the file."""
    side: Literal["server", "trainers"]
    """Whose file this is."""
    public: str
    """Its public key."""
    secret: str
    """Its secret key."""
    other: str
    """The other side's public key."""

    def __post_init__(self) -> None:
        if self.format != FORMAT or self.version != VERSION:
            raise ConfigError(f"this is {self.format!r} version {self.version}, not {FORMAT!r} version {VERSION}.")
        for key in (self.public, self.secret, self.other):
            try:
                whole = len(z85.decode(key)) == 32
            except (KeyError, ValueError, struct.error):
                whole = False
            if not whole:
                raise ConfigError("a key is 40 characters of Z85.")


def make_keys(folder: Path) -> tuple[Path, Path]:
    """New key files `server.key` and `trainers.key` in the folder. StoreError: there are some already."""
    _need_curve()
    (server_public, server_secret), (public, secret) = zmq.curve_keypair(), zmq.curve_keypair()
    keys = {
        "server": (server_public, server_secret, public),
        "trainers": (public, secret, server_public),
    }
    paths = {side: folder / f"{side}.key" for side in keys}
    for path in paths.values():
        if path.exists():
            raise StoreError(f"{path} is there already. Choose another folder, or take the key away first.")
    folder.mkdir(parents=True, exist_ok=True)
    for side, (mine, own_secret, other) in keys.items():
        texts = {"public": mine.decode(), "secret": own_secret.decode(), "other": other.decode()}
        key = from_dict(Key, {"format": FORMAT, "version": VERSION, "side": side, **texts})
        with open(os.open(paths[side], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(to_dict(key), file, indent=2)
    return paths["server"], paths["trainers"]


def read_key(path: Path, side: Literal["server", "trainers"]) -> Key:
    """The key in a file. StoreError: it is missing, no key, the other side's, or open to other users."""
    _need_curve()
    if not path.is_file():
        raise StoreError(f"There is no key file {path}. Make a pair with `mistudio feed key FOLDER`.")
    if path.stat().st_mode & 0o077:
        raise StoreError(f"{path} can be read by other users of this machine. Type: chmod 600 {path}")
    try:
        key = from_dict(Key, read_json(path), source=str(path))
    except ConfigError as error:
        raise StoreError(f"{error} Make a pair of keys with `mistudio feed key FOLDER`.") from error
    if key.side != side:
        raise StoreError(f"{path} is the file of the {key.side}; here the {side}.key of the pair is needed.")
    return key


def host_and_port(address: str) -> tuple[str, str]:
    """Of tcp://HOST:PORT. StoreError: it is not of that form."""
    match = re.fullmatch(r"tcp://(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})", address)
    if match is None or int(match[2]) > 65535:
        raise StoreError(f"{address!r} is no address of a feed server; one is tcp://HOST:PORT.")
    return match[1], match[2]


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach tcp://HOST:PORT."""
    host = host_and_port(address)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name or an interface: it could be anything


def guard(socket: "zmq.Socket[bytes]", key: Key) -> None:
    """The server's socket, not bound yet, takes only connections that know its public key; `Gate` asks for theirs."""
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = key.public.encode(), key.secret.encode()
    socket.zap_domain = b"mistudio"


def unlock(socket: "zmq.Socket[bytes]", key: Key) -> None:
    """The trainer's socket, not connected yet, shows its key and talks only to the server of the pair."""
    socket.curve_publickey, socket.curve_secretkey = key.public.encode(), key.secret.encode()
    socket.curve_serverkey = key.other.encode()


class Gate:
    """Says for libzmq (ZAP, ZeroMQ RFC 27) whether who connects holds the trainers' key; one for a context."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", key: Key):
        self.socket = context.socket(zmq.REP)
        self.socket.bind(_ZAP_ADDRESS)
        self._allowed = z85.decode(key.other)

    def answer(self) -> None:
        """Answers one question."""
        version, number, _, _, _, mechanism, *credentials = self.socket.recv_multipart()
        known = mechanism == b"CURVE" and credentials == [self._allowed]
        status, text = (b"200", b"OK") if known else (b"400", b"unknown key")
        self.socket.send_multipart([version, number, status, text, b"", b""])


def _need_curve() -> None:
    if not zmq.has("curve"):
        raise StoreError("This libzmq was built without CURVE. Install the wheel: pip install --force-reinstall pyzmq")
