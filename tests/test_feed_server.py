"""Feed servers: the local feed's batches, bit for bit, through kills, restarts and slices; and peers that mean harm."""

import hashlib
import json
import logging
import shutil
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from faulty_server import FileServer
from mistudio.config import to_dict
from mistudio.errors import StoreError
from mistudio.store import FeedOptions, Position, Store, StoreWriter, serve, wire
from mistudio.store.connection import Connection, Patience
from mistudio.store.curve import make_keys, read_key
from mistudio.store.serve import FeedServer, ServeOptions, open_slice, serving
from mistudio.store.served import ServedStore, open_rows
from mistudio.store.shard import site_shards
from mistudio.studio import train_verb
from mistudio.train.state import TrainState
from test_store import A, B, make

ANY = "tcp://127.0.0.1:0"
QUICK = Patience(ask_again_s=0.05, give_up_s=0.4)
LASTING = Patience(ask_again_s=0.2, give_up_s=30)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return make(tmp_path_factory.mktemp("served") / "s", rows=200, bucket_rows=30)


@pytest.fixture(scope="module")
def server(store):
    with serving(store, ServeOptions(bind=ANY)) as running:
        yield running


@pytest.fixture(scope="module")
def far(server) -> ServedStore:
    return ServedStore.connect(server.address)


@contextmanager
def slices(store: Store, parts: int):
    """Addresses of servers that share a store out."""
    servers = [FeedServer(store, ServeOptions(bind=ANY, part=part, parts=parts)) for part in range(parts)]
    threads = [threading.Thread(target=server.run) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield [server.address for server in servers]
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.stop()
            thread.join()


def taken(feed, batches: int) -> torch.Tensor:
    return torch.cat([next(feed) for _ in range(batches)])


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"tcp://127.0.0.1:{listening.getsockname()[1]}"


# ---- the same batches


def test_a_served_store_says_what_the_store_says(store, far):
    assert (far.rows, far.sites, far.manifest) == (store.rows, store.sites, store.manifest)
    for site in (A, B):
        assert (far.width(site), far.scale(site)) == (store.width(site), store.scale(site))
        assert torch.equal(far.mean(site), store.mean(site))


@given(
    batch_rows=st.integers(1, 90),
    world=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
    start=st.builds(Position, st.integers(0, 2**40), st.integers(0, 199)),
    prefetch=st.integers(0, 2),
    piece_rows=st.integers(1, 40),
)
@settings(max_examples=40, deadline=None)
def test_batches_are_the_local_feeds_bit_for_bit(store, far, batch_rows, world, seed, start, prefetch, piece_rows):
    for rank in range(world):
        how = FeedOptions(prefetch=prefetch, rank=rank, world=world)
        local = store.joint_feed([B, A], batch_rows, seed=seed, start=start, how=how)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wire, "PIECE_BYTES", piece_rows * 4 * 5)
            served = far.joint_feed([B, A], batch_rows, seed=seed, start=start, how=how)
            for _ in range(3):
                assert served.state() == local.state()
                assert all(map(torch.equal, next(served), next(local)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_rows_of_every_number_type_are_the_local_feeds(tmp_path, dtype):
    store = make(tmp_path / "s", rows=90, bucket_rows=40, row_dtype=dtype)
    with serving(store, ServeOptions(bind=ANY)) as server:
        served = ServedStore.connect(server.address).feed(A, 31, seed=1)
        local = store.feed(A, 31, seed=1)
        assert all(torch.equal(next(served), next(local)) for _ in range(6))


def test_a_place_saved_with_one_goes_on_with_the_other(store, far):
    whole = taken(store.feed(A, 17, seed=9), 40)
    served, local = far.feed(A, 17, seed=9), store.feed(A, 17, seed=9)
    parts = [taken(served, 13)]
    local.restore(json.loads(json.dumps(served.state())))
    parts.append(taken(local, 13))
    served.restore(json.loads(json.dumps(local.state())))
    parts.append(taken(served, 14))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_servers_with_exclusive_slices_give_every_row_once_an_epoch_and_in_the_local_order(store, parts):
    with slices(store, parts) as addresses:
        served = ServedStore.connect(",".join(reversed(addresses))).feed(A, 25, seed=2)
        local = store.feed(A, 25, seed=2)
        for _ in range(3):  # epochs
            epoch = taken(served, 8)
            assert torch.equal(epoch, taken(local, 8))
            numbers = (epoch * store.scale(A))[:, 0].round().int()
            assert torch.equal(numbers.sort().values, torch.arange(200, dtype=torch.int32))


def test_a_server_needs_the_files_of_its_own_slice_only(store, tmp_path):
    how = [ServeOptions(bind=ANY, part=part, parts=2) for part in range(2)]
    folders = []
    for part in range(2):
        folders.append(tmp_path / f"{part}")
        shutil.copytree(store.path, folders[part])
        other = range(3, 7) if part == 0 else range(3)
        for bucket in other:
            for path in folders[part].glob(f"*/{bucket:05d}.safetensors"):
                path.unlink()
    with serving(open_slice(folders[0], how[0]), how[0]) as one, serving(open_slice(folders[1], how[1]), how[1]) as two:
        served = ServedStore.connect([one.address, two.address]).feed(A, 50, seed=2)
        assert torch.equal(taken(served, 9), taken(store.feed(A, 50, seed=2), 9))
    with pytest.raises(StoreError, match="is missing"):
        open_slice(folders[0], how[1])


def test_servers_that_have_the_same_buckets_are_asked_in_turn(store):
    with serving(store, ServeOptions(bind=ANY)) as one, serving(store, ServeOptions(bind=ANY)) as two:
        served = ServedStore.connect([one.address, two.address])
        assert torch.equal(taken(served.feed(A, 20, seed=2), 30), taken(store.feed(A, 20, seed=2), 30))
        sent = [load.bytes for load in served.load()]
    assert min(sent) > 0.3 * sum(sent)


def test_a_store_at_a_url_is_served_through_a_cache_of_which_each_server_fills_its_own_slice(
    store, tmp_path, monkeypatch
):
    fetched = tmp_path / "cache"
    monkeypatch.setenv("MISTUDIO_CACHE", str(fetched))
    how = [ServeOptions(bind=ANY, part=part, parts=2) for part in range(2)]
    with FileServer(store.path.parent) as http:
        url = f"{http.url}/{store.path.name}"
        with serving(open_slice(url, how[0]), how[0]) as one, serving(open_slice(url, how[1]), how[1]) as two:
            served = ServedStore.connect([one.address, two.address]).feed(A, 25, seed=2)
            assert torch.equal(taken(served, 7), taken(store.feed(A, 25, seed=2), 7))
    assert len(list(fetched.rglob(f"{A}/*.safetensors"))) == 7


def test_many_trainers_at_different_positions_each_get_their_own(store, server):
    def train(number: int) -> bool:
        start = Position(number % 3, 29 * number % 200)
        served = ServedStore.connect(server.address).feed(A, 7 + number, seed=number % 2, start=start)
        return torch.equal(taken(served, 40), taken(store.feed(A, 7 + number, seed=number % 2, start=start), 40))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(train, range(12)))


# ---- servers that die, lag and come back


def test_a_server_that_hangs_is_left_and_the_one_in_its_place_goes_on(store):
    address = free_address()
    with ThreadPoolExecutor(1) as pool:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as hanging:
            hanging.linger = 0
            hanging.bind(address)
            connecting = pool.submit(ServedStore.connect, address, None, LASTING)
            first, _ = hanging.recv_multipart()
            _, alive = hanging.recv_multipart()
            assert isinstance(wire.read_request(alive), wire.AskLoad)
            second = first
            while second == first:  # the connection is made anew
                second, _ = hanging.recv_multipart()
        with serving(store, ServeOptions(bind=address)):
            served = connecting.result().feed(A, 40, seed=1)
            assert torch.equal(taken(served, 10), taken(store.feed(A, 40, seed=1), 10))


ROWS = wire.AskRows(number=0, store="", sites=("a",), seed=0, epoch=0, bucket=0, start=0, rows=1)


def test_requests_that_a_server_lost_are_made_again_and_those_it_has_are_not():
    address = free_address()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server, ThreadPoolExecutor(1) as pool:
        server.linger = 0
        server.bind(address)

        def next_request():
            trainer, frame = server.recv_multipart()
            return trainer, wire.read_request(frame)

        def held(trainer, number):
            load = wire.LoadIs(number=0, trainers=1, waiting=0, yours=number, bytes=0)
            server.send_multipart([trainer, wire.header(load)])

        with Connection(address, None, LASTING) as link:
            numbers = [link.ask(ROWS), link.ask(ROWS)]
            answer = pool.submit(lambda: [link.answer(number) for number in numbers])
            assert [next_request()[1].number for _ in numbers] == numbers
            trainer, probe = next_request()
            assert isinstance(probe, wire.AskLoad)
            held(trainer, 2)
            assert isinstance(next_request()[1], wire.AskLoad)  # it waited, and asked for another sign of life
            held(trainer, 1)
            assert [next_request()[1].number for _ in numbers] == numbers
            for number in numbers:
                server.send_multipart([trainer, wire.header(wire.RowsAre(number=number))])
            assert [head.number for head, _ in answer.result()] == numbers


def test_a_server_that_never_comes_is_given_up_in_a_sentence_after_some_that_say_so(caplog):
    address = free_address()
    with caplog.at_level(logging.WARNING, logger="mistudio"), pytest.raises(StoreError) as caught:
        ServedStore.connect(address, patience=QUICK)
    assert str(caught.value).startswith(f"{address} has not answered for 0 s. Start it (`mistudio feed serve STORE")
    assert caplog.messages[0].startswith(f"Waiting for {address}: it has not answered for 0 s")
    assert len(caplog.messages) <= 4  # at 0.05, 0.1, 0.2 s, where the machine has time for all of them


class Slow:
    """A store whose rows come only when `may` is set."""

    def __init__(self, store: Store):
        self.may, self.asked = threading.Event(), threading.Event()
        self.manifest, self.sites, self.path = store.manifest, store.sites, store.path
        self.width, self.mean = store.width, store.mean
        self._store = store

    def expect(self, sites, buckets):
        pass

    def mapped(self, site, bucket):
        self.asked.set()
        self.may.wait()
        return self._store.mapped(site, bucket)


@contextmanager
def slow_server(store: Store):
    """(a slow store, its server); at the end the rows come."""
    slow = Slow(store)
    with serving(slow, ServeOptions(bind=ANY)) as server:
        try:
            yield slow, server
        finally:
            slow.may.set()


def test_a_server_says_how_many_requests_of_a_trainer_it_has(store):
    digest = hashlib.sha256(json.dumps(to_dict(store.manifest)).encode()).hexdigest()
    with slow_server(store) as (slow, server), Connection(server.address, None, LASTING) as link:
        numbers = [link.ask(replace(ROWS, store=digest, sites=(A,))) for _ in range(3)]
        with Connection(server.address, None, LASTING) as other:
            assert other.answer(other.ask(wire.AskLoad(number=0)))[0].yours == 0
        load, _ = link.answer(link.ask(wire.AskLoad(number=0)))
        assert (load.yours, load.waiting) == (3, 3)
        slow.may.set()
        assert [link.answer(number)[0].number for number in numbers] == numbers


def test_a_slow_server_is_waited_for_and_others_hear_from_it(store, monkeypatch):
    told = threading.Event()

    class Tell(logging.Handler):
        def emit(self, record):
            if "gives signs of life, but no rows" in record.getMessage():
                told.set()

    monkeypatch.setattr(logging.getLogger("mistudio.store.connection"), "handlers", [Tell()])
    with ThreadPoolExecutor(1) as pool, slow_server(store) as (slow, server):
        served = ServedStore.connect(server.address, patience=LASTING)
        waiting = pool.submit(taken, served.feed(A, 20, seed=1), 5)
        assert slow.asked.wait(20)
        (load,) = served.load()
        assert 1 <= load.waiting <= wire.CREDIT
        assert told.wait(20)
        assert not waiting.done()
        slow.may.set()
        assert torch.equal(waiting.result(), taken(store.feed(A, 20, seed=1), 5))


def test_a_server_that_lives_but_gives_no_rows_is_given_up(store):
    with slow_server(store) as (_, server):
        served = ServedStore.connect(server.address, patience=QUICK)
        with pytest.raises(StoreError, match=r"gives signs of life, but no rows, for 0 s.*--resume"):
            next(served.feed(A, 20, seed=1))


def test_a_damaged_bucket_is_named_to_the_trainer(tmp_path):
    store = make(tmp_path / "s", rows=60, bucket_rows=60)
    path = store.path / A / "00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with serving(Store.open(store.path), ServeOptions(bind=ANY)) as server:
        served = ServedStore.connect(server.address)
        with pytest.raises(StoreError, match=r"refuses: .*00000\.safetensors: checksum"):
            next(served.feed(A, 20, seed=1))


def test_a_server_that_comes_back_with_another_store_is_refused(store, tmp_path):
    address = free_address()
    with serving(store, ServeOptions(bind=address)):
        served = ServedStore.connect(address, patience=LASTING)
    with (
        serving(make(tmp_path / "s", rows=200, bucket_rows=31), ServeOptions(bind=address)),
        pytest.raises(StoreError, match="has another store than the run began with"),
    ):
        next(served.feed(A, 20, seed=1))


# ---- who may, and what cannot be


def test_holders_of_the_trainers_key_get_rows_and_nobody_else(store, tmp_path):
    server_key, trainers_key = make_keys(tmp_path / "right")
    _, other_key = make_keys(tmp_path / "other")
    mixed = json.loads(other_key.read_text()) | {"other": json.loads(trainers_key.read_text())["other"]}
    other_key.with_name("mixed.key").write_text(json.dumps(mixed))  # knows the server, is not known to it
    other_key.with_name("mixed.key").chmod(0o600)
    with serving(store, ServeOptions(bind=ANY, key=read_key(server_key, "server"))) as server:
        served = ServedStore.connect(server.address, trainers_key, QUICK)
        assert torch.equal(taken(served.feed(A, 20, seed=1), 5), taken(store.feed(A, 20, seed=1), 5))
        for key in (None, other_key, other_key.with_name("mixed.key")):
            with pytest.raises(StoreError, match=r"does not accept this connection.*--key"):
                ServedStore.connect(server.address, key, LASTING)
        assert served.load()[0].bytes > 0


def test_a_key_for_a_server_without_one_is_refused(server, tmp_path):
    _, trainers_key = make_keys(tmp_path)
    with pytest.raises(StoreError, match="which has a key: it wants"):
        ServedStore.connect(server.address, trainers_key, LASTING)
    with pytest.raises(StoreError, match=r"A key is for feed servers, and here/store is none"):
        open_rows("here/store", trainers_key)


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://192.0.2.1:5555"])
def test_nothing_is_bound_beyond_this_machine_without_a_key(bind):
    with pytest.raises(StoreError, match="can be reached from other machines, so a key is needed"):
        ServeOptions(bind=bind)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"part": 2, "parts": 2}, "part = 2 of parts = 2"),
        ({"readers": 0}, "readers = 0"),
        ({"bind": "127.0.0.1:5"}, "is no address"),
    ],
)
def test_options_that_cannot_be_are_refused(options, says):
    with pytest.raises(StoreError, match=says):
        ServeOptions(**options)


def test_an_address_that_cannot_be_connected_to_is_refused():
    with pytest.raises(StoreError, match="cannot be connected to"):
        ServedStore.connect("tcp://*:5555", patience=QUICK)


def test_an_address_in_use_and_too_many_parts_are_refused(store, server):
    with pytest.raises(StoreError, match="cannot be had"):
        FeedServer(store, ServeOptions(bind=server.address))
    with pytest.raises(StoreError, match="7 buckets cannot be shared out to 8 servers"):
        FeedServer(store, ServeOptions(bind=ANY, part=0, parts=8))


def test_servers_that_do_not_have_one_store_between_them_are_refused(store, far, tmp_path):
    other = make(tmp_path / "s", rows=60, bucket_rows=60)
    half = ServeOptions(bind=ANY, part=1, parts=2)
    with serving(other, ServeOptions(bind=ANY)) as another, serving(store, half) as second_half:
        with pytest.raises(StoreError, match="serves another store than"):
            ServedStore.connect([second_half.address, another.address])
        with pytest.raises(StoreError, match=r"Bucket 0 \(of 7; 3 in all\) is with none of the servers"):
            ServedStore.connect(second_half.address)


def test_unknown_sites_and_empty_joints_are_refused(far):
    with pytest.raises(StoreError, match=r"has no site 'layers\.9\.nose'; it has layers\.3\.resid_post"):
        far.feed("layers.9.nose", 5, seed=1)
    with pytest.raises(StoreError, match="at least one site"):
        far.joint_feed([], 5, seed=1)


# ---- hostile peers


@pytest.fixture
def peer(server):
    """A socket that may send what it likes; (send, receive the header of the answer)."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.rcvtimeo = 20_000
        dealer.connect(server.address)
        yield dealer


def said(dealer) -> str:
    answer = wire.read_answer(dealer.recv_multipart()[0])
    assert isinstance(answer, wire.Refusal)
    return answer.message


def ask(server: FeedServer, **changes) -> wire.AskRows:
    digest = server._digest
    fields = {"number": 1, "store": digest, "sites": (A,), "seed": 0, "epoch": 0, "bucket": 0, "start": 0, "rows": 5}
    return wire.AskRows(**{**fields, **changes})


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([b"garbage"], "is no message of a feed"),
        ([b""], "is no message of a feed"),
        ([b"{}", b"more"], "A request is 1 frame, not 2"),
        ([b"x"] * 2000, "not 2000"),
        ([wire.header(wire.RowsAre(number=1))], "kind 'rows' is unknown"),
        ([wire.header(wire.AskLoad(number=1)).replace(b'"version": 2', b'"version": 9')], "version 9 of the feed"),
    ],
)
def test_messages_that_are_none_get_a_sentence_and_the_server_goes_on(store, far, peer, frames, says):
    peer.send_multipart(frames)
    assert says in said(peer)
    assert torch.equal(next(far.feed(A, 9, seed=1)), next(store.feed(A, 9, seed=1)))


def test_frames_of_any_kind_get_an_answer_and_the_server_goes_on(store, far, peer):
    @given(st.lists(st.binary(max_size=300), min_size=1, max_size=6))
    @settings(max_examples=100, deadline=None)
    def send(frames):
        peer.send_multipart(frames)
        assert said(peer)

    send()
    assert torch.equal(next(far.feed(A, 9, seed=1)), next(store.feed(A, 9, seed=1)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"store": "x"}, "another store"),
        ({"sites": ("nose",)}, "no site 'nose'"),
        ({"bucket": 7}, "Bucket 7 is not here; this server has 0 to 6"),
        ({"start": 2**62}, "cannot be given"),
        ({"rows": 2**62}, "cannot be given"),
        ({"rows": 1000}, "cannot be given"),
    ],
)
def test_rows_that_there_are_not_are_refused_in_a_sentence(store, server, peer, changes, says):
    peer.send(wire.header(ask(server, **changes)))
    assert says in said(peer)


def test_an_answer_is_never_longer_than_a_piece(store, server, peer, monkeypatch):
    monkeypatch.setattr(wire, "PIECE_BYTES", 60)
    peer.send(wire.header(ask(server, rows=6)))
    assert "5 are given at once" in said(peer)


def test_a_trainer_that_asks_for_more_than_its_credit_is_refused_the_rest(store):
    with slow_server(store) as (_, server), zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger, peer.rcvtimeo = 0, 20_000
        peer.connect(server.address)
        for number in range(100):
            peer.send(wire.header(ask(server, number=number)))
        assert "Too much is asked for at once; a trainer may have 8 requests waiting" in said(peer)
        (load,) = ServedStore.connect(server.address, patience=LASTING).load()
        assert load.waiting <= 2 * wire.CREDIT + server.how.readers


def raw_connection(address: str) -> socket.socket:
    """A ZMTP 3.0 connection without security, by hand, ready for messages."""
    host, port = address.removeprefix("tcp://").split(":")
    raw = socket.create_connection((host, int(port)), timeout=20)
    raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
    properties = b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    command = b"\x05READY" + properties
    raw.sendall(bytes([4, len(command)]) + command)
    received = b""
    while len(received) < 66 or len(received) < 66 + received[65]:
        received += raw.recv(4096)
    return raw


def closed(raw: socket.socket) -> bool:
    """Whether the other side ends the connection, after what it may still send."""
    try:
        while raw.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("length", [wire.HEADER_BYTES + 1, 2**40, 2**63 - 1, 2**64 - 1])
def test_a_frame_said_to_be_huge_ends_its_connection_and_nothing_else(store, server, far, length):
    with raw_connection(server.address) as raw:
        raw.sendall(b"\x02" + struct.pack(">Q", length) + b"x" * 100)
        assert closed(raw)
    assert torch.equal(next(far.feed(A, 9, seed=1)), next(store.feed(A, 9, seed=1)))


def test_bytes_that_are_no_zeromq_end_their_connection_and_nothing_else(store, server, far):
    host, port = server.address.removeprefix("tcp://").split(":")
    for garbage in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3, bytes(range(256)), b"\xff" * 64):
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            raw.sendall(garbage)
            with suppress(OSError):  # it may be closed already
                raw.shutdown(socket.SHUT_WR)
            assert closed(raw)
    assert torch.equal(next(far.feed(A, 9, seed=1)), next(store.feed(A, 9, seed=1)))


def test_a_server_of_another_kind_or_version_gets_a_sentence(store):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as fake, ThreadPoolExecutor(1) as pool:
        fake.linger = 0
        fake.bind_to_random_port("tcp://127.0.0.1")
        address = fake.getsockopt_string(zmq.LAST_ENDPOINT)
        is_ = wire.header(wire.StoreIs(number=1, first_bucket=0, end_bucket=7))
        manifest = json.dumps({"format": "mistudio-store", "version": 99}).encode()
        for frames, says in (
            ([b"hello"], "no message of a feed"),
            ([is_.replace(b'"version": 2', b'"version": 3')], "version 3 of the feed protocol"),
            ([is_], "does not say what it serves"),
            ([is_, b"{"], "is not valid JSON"),
            ([is_, manifest], "version 99"),
            ([wire.header(wire.RowsAre(number=1)), b""], "does not say what it serves"),
        ):
            connecting = pool.submit(ServedStore.connect, address, None, LASTING)
            trainer, _ = fake.recv_multipart()
            fake.send_multipart([trainer, *frames])
            with pytest.raises(StoreError, match=says):
                connecting.result()


def test_an_answer_that_comes_twice_counts_once_and_rows_of_another_size_are_refused(store, server):
    with Connection(server.address, None, LASTING) as link:
        number = link.ask(ask(server))
        frames = link.answer(number)[1]
        assert frames[0].nbytes == 5 * 12
        link._receive([zmq.Frame(wire.header(wire.RowsAre(number=number)))])
        assert link._answers == {}
    shard = site_shards(store.path, A, 0, 3, "float32")["rows"]
    with pytest.raises(StoreError, match="60 bytes came for 4 rows"):
        shard.of_bytes(frames[0], 4)


@pytest.mark.parametrize(
    ("rows", "says"), [([], "sent 0 frames for 1 sites"), ([b"123"], "another size .* 3 bytes came for 20 rows")]
)
def test_rows_that_are_not_what_was_asked_for_are_refused(store, monkeypatch, rows, says):
    monkeypatch.setattr(FeedServer, "_rows", lambda _, asked: [wire.header(wire.RowsAre(number=asked.number)), *rows])
    with serving(store, ServeOptions(bind=ANY)) as server:
        served = ServedStore.connect(server.address).feed(A, 20, seed=1)
        with pytest.raises(StoreError, match=says):
            next(served)


def test_what_a_server_keeps_of_trainers_is_bounded(store, monkeypatch):
    monkeypatch.setattr(serve, "TRAINERS_MOST", 3)
    with serving(store, ServeOptions(bind=ANY)) as server:
        for _ in range(8):
            with Connection(server.address, None, LASTING) as link:
                link.answer(link.ask(wire.AskLoad(number=0)))
        assert len(server._seen) <= 3


def test_an_sae_trained_through_a_server_and_resumed_on_the_disk_is_the_one_trained_on_the_disk(
    store, server, tmp_path, monkeypatch
):
    def config(place: str, out: Path, resume: bool = False) -> train_verb.Config:
        options = {"steps": 9, "batch_rows": 32, "checkpoint_every": 4, "engine": "dense"}
        cfg = train_verb.train_config("quick", options)
        return train_verb.Config(store=place, site=A, width=8, out=out, train=cfg, resume=resume)

    train_verb.run(config(str(store.path), tmp_path / "local"))
    update = TrainState.update

    def cut_short(state, *batch):
        if state.step == 6:
            raise KeyboardInterrupt
        return update(state, *batch)

    monkeypatch.setattr(TrainState, "update", cut_short)
    with pytest.raises(KeyboardInterrupt):
        train_verb.run(config(server.address, tmp_path / "served"))
    monkeypatch.undo()
    train_verb.run(config(str(store.path), tmp_path / "served", resume=True))
    local, served = (load_file(tmp_path / name / "sae.safetensors") for name in ("local", "served"))
    assert all(torch.equal(local[name], served[name]) for name in local)


# ---- trainers share the page cache


def test_trainers_at_different_positions_share_pages_of_the_files_and_keep_no_bucket_of_their_own(tmp_path):
    rows, width = 20_000, 256  # 20 MB
    with StoreWriter.create(
        tmp_path / "s", widths={A: width}, expected_rows=rows, bucket_rows=rows, seed=0, model="m", context=1, source={}
    ) as writer:
        writer.write({A: torch.ones(rows, width)}, torch.zeros(rows, 3, dtype=torch.int32))
        store = writer.finish()
    mapped = store.mapped(A, 0)["rows"]
    assert np.shares_memory(mapped.rows, np.frombuffer(mapped.file, dtype=np.uint8))
    assert not mapped.rows.flags.writeable
    feeds = [store.feed(A, 500, seed=n, start=Position(0, 977 * n), how=FeedOptions(prefetch=0)) for n in range(8)]
    before = resident("RssAnon")
    for feed in feeds * 20:
        next(feed)
    assert resident("RssAnon") - before < 2 * rows * width * 4  # eight buckets would be eight of it


def resident(name: str) -> int:
    """Bytes of this process's memory: RssAnon is its own, RssFile is shared with the page cache."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
