"""Messages of the feed servers: whatever comes is a message or one sentence; keys and addresses are checked."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistudio.errors import StoreError
from mistudio.store import wire
from mistudio.store.curve import host_and_port, is_loopback, make_keys, read_key

ROWS = wire.AskRows(number=7, store="d", sites=("a", "b"), seed=2**64 - 1, epoch=3, bucket=1, start=0, rows=9)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


def sentence(frame: bytes, read=wire.read_request) -> str | None:
    """What the reader says against a frame; None: it is a message."""
    try:
        read(frame)
    except StoreError as error:
        said = str(error)
        assert said
        assert len(wire.refusal(said)) < 3000
        return said
    return None


@pytest.mark.parametrize(
    "message",
    [
        wire.AskStore(number=1),
        wire.AskLoad(number=2),
        ROWS,
        wire.StoreIs(number=3, first_bucket=0, end_bucket=9),
        wire.LoadIs(number=4, trainers=1, waiting=0, yours=0, bytes=2**50),
        wire.RowsAre(number=5),
        wire.Refusal(number=None, message="no"),
    ],
)
def test_a_message_is_read_as_it_was_written(message):
    read = wire.read_request if type(message) in wire.REQUESTS.values() else wire.read_answer
    assert read(wire.header(message)) == message


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_bytes_of_any_kind_get_a_sentence(frame):
    assert sentence(frame)
    assert sentence(frame, wire.read_answer)


@given(JSON)
@settings(max_examples=300)
def test_json_of_any_kind_gets_a_sentence(value):
    assert sentence(json.dumps(value).encode())


@given(name=st.sampled_from(sorted(json.loads(wire.header(ROWS)))), value=JSON)
@settings(max_examples=500)
def test_any_value_of_any_field_is_a_request_or_a_sentence(name, value):
    changed = {**json.loads(wire.header(ROWS)), name: value}
    said = sentence(json.dumps(changed).encode())
    if said is None:
        request = wire.read_request(json.dumps(changed).encode())
        assert isinstance(request, wire.AskRows)
        assert all(isinstance(site, str) for site in request.sites)
        assert all(0 <= count < 2**63 for count in (request.epoch, request.bucket, request.start))
        assert 1 <= request.rows < 2**63


@given(data=st.data())
@settings(max_examples=300)
def test_a_request_with_bytes_changed_cut_or_added_is_a_request_or_a_sentence(data):
    frame = bytearray(wire.header(ROWS))
    for _ in range(data.draw(st.integers(1, 5))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    sentence(bytes(frame[: data.draw(st.integers(0, len(frame)))]))


@pytest.mark.parametrize(
    "frame",
    [
        b"[" * wire.HEADER_BYTES,
        b'{"a":' * 3000,
        b"1" * 9000,
        b'{"number": ' + b"9" * 9000 + b"}",
        b"\xff" * 100,
        b"",
        b"NaN",
        b'"' + b"\\ud800" * 100 + b'"',
        b"{" + b" " * wire.HEADER_BYTES,
    ],
)
def test_nested_long_and_broken_json_gets_a_sentence(frame):
    assert sentence(frame)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 1}, "version 1 of the feed protocol, this one 2. Use the same mistudio"),
        ({"version": True}, "version True"),
        ({"protocol": "http"}, "no message of a feed"),
        ({"kind": "shutdown"}, "kind 'shutdown' is unknown; the kinds are store"),
        ({"kind": ["rows?"]}, "is unknown"),
        ({"rows": 0}, "rows is at least 1"),
        ({"rows": 2**63}, "rows is from 0"),
        ({"start": -1}, "start is from 0"),
        ({"seed": 2**64}, "seed"),
        ({"sites": []}, "sites are 1 to"),
        ({"extra": 1}, "unknown key extra"),
        ({"rows": "9"}, "wanted int, found '9'"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(change, says):
    assert says in sentence(json.dumps({**json.loads(wire.header(ROWS)), **change}).encode())


def test_one_answer_holds_a_piece_or_one_row():
    assert wire.rows_at_once([2304], "float32") == wire.PIECE_BYTES // (4 * 2304)
    assert wire.rows_at_once([2304, 4096], "int8") == wire.PIECE_BYTES // (2304 + 4 + 4096 + 4)
    assert wire.rows_at_once([10**9], "float32") == 1


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.9.9.9:1", True),
        ("tcp://localhost:5555", True),
        ("tcp://[::1]:5555", True),
        ("tcp://0.0.0.0:5555", False),
        ("tcp://*:5555", False),
        ("tcp://eth0:5555", False),
        ("tcp://10.0.0.7:5555", False),
        ("tcp://localhost.example.org:5555", False),
        ("tcp://[::]:5555", False),
    ],
)
def test_only_addresses_of_this_machine_alone_are_loopback(address, loopback):
    assert is_loopback(address) == loopback


@pytest.mark.parametrize("address", ["tcp://", "tcp://host", "tcp://host:99999", "host:5555", "tcp://a b:1", "ipc://x"])
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(StoreError, match=r"is no address of a feed server; one is tcp://HOST:PORT"):
        host_and_port(address)


def test_a_pair_of_keys_fits_and_is_for_its_owner_only(tmp_path):
    server, trainers = make_keys(tmp_path / "keys")
    assert [path.stat().st_mode & 0o777 for path in (server, trainers)] == [0o600, 0o600]
    mine, theirs = read_key(server, "server"), read_key(trainers, "trainers")
    assert (mine.public, mine.other) == (theirs.other, theirs.public)
    assert mine.secret not in trainers.read_text()
    with pytest.raises(StoreError, match="is there already"):
        make_keys(tmp_path / "keys")


def test_key_files_that_do_not_serve_are_refused(tmp_path):
    server, trainers = make_keys(tmp_path)
    with pytest.raises(StoreError, match=r"file of the server; here the trainers\.key"):
        read_key(server, "trainers")
    with pytest.raises(StoreError, match="There is no key file"):
        read_key(tmp_path / "none.key", "server")
    good = json.loads(server.read_text())
    for change in ({"secret": "short"}, {"secret": "~" * 40}, {"secret": "#" * 40}, {"version": 2}, {"more": 1}):
        server.write_text(json.dumps({**good, **change}))
        with pytest.raises(StoreError, match="mistudio feed key"):
            read_key(server, "server")
    os.chmod(trainers, 0o640)
    with pytest.raises(StoreError, match="chmod 600"):
        read_key(trainers, "trainers")
