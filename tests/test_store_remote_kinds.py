"""Stores at s3://, gs:// and hf://, each through its real client against a server of its protocol: the same claims for
all, whatever the server does; and what is peculiar to one."""

import json
import logging
import os
import socket
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import fsspec.config
import huggingface_hub
import pytest
import s3fs
import torch

from command_line import run
from gs_server import GsServer
from hub_server import HubServer
from mistudio.collect import collect
from mistudio.errors import StoreError
from mistudio.store import Store, copy_store, remote, schemes, stores_in, verify
from mistudio.store.remote import Remote
from s3_server import KEYS, S3Server
from test_collect import cfg, lm, text  # noqa: F401 (fixtures)
from test_store import A, digest, make

only_gs = pytest.mark.parametrize("server", ["gs"], indirect=True)
only_hf = pytest.mark.parametrize("server", ["hf"], indirect=True)
pytestmark = [
    pytest.mark.usefixtures("no_waits"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's own
]
STORES = {"s3": "bucket", "gs": "bucket", "hf": "datasets/someone/stores"}


@dataclass(frozen=True)
class Far:
    """A bucket, or repository, and the place in it where a store is or will be."""

    kind: str
    server: object

    @property
    def bucket(self) -> str:
        return STORES[self.kind]

    @property
    def root(self) -> str:
        return f"{self.kind}://{self.bucket}"

    @property
    def url(self) -> str:
        return f"{self.root}/deep/s"

    def names(self) -> set[str]:
        return {name.removeprefix("deep/s/") for name in self.server.names(self.bucket)}

    def get(self, name: str) -> bytes:
        return self.server.get(self.bucket, f"deep/s/{name}")

    def put(self, name: str, data: bytes) -> None:
        self.server.put(self.bucket, f"deep/s/{name}", data)

    def delete(self, name: str) -> None:
        self.server.delete(self.bucket, f"deep/s/{name}")

    def fail_to_write(self, name: str, **how) -> None:
        method, suffix = {"s3": ("PUT", name), "gs": ("POST", name), "hf": ("POST", "/commit/main")}[self.kind]
        self.server.fail(suffix, method=method, **how)


@pytest.fixture(scope="module", params=STORES)
def server(request):
    s3fs.S3FileSystem.clear_instance_cache()
    with {"s3": S3Server, "gs": GsServer, "hf": partial(HubServer, large=500)}[request.param]() as running:
        yield request.param, running
    s3fs.S3FileSystem.clear_instance_cache()
    huggingface_hub.close_session()


@pytest.fixture
def far(server, tmp_path, monkeypatch) -> Far:
    """An empty bucket, and clients that ask the server that has it, with credentials."""
    kind, running = server
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    if kind == "hf":
        running.attach(monkeypatch)
        running.token, running.public = "hf_secret", True
    running.wipe()
    running.forget()
    running.make_bucket(STORES[kind])
    return Far(kind, running)


@pytest.fixture
def local(tmp_path) -> Store:
    return make(tmp_path / "local", rows=90, bucket_rows=30)


@pytest.fixture
def url(far, local) -> str:
    for name in digest(local.path):
        far.put(name, (local.path / name).read_bytes())
    return far.url


def batches(store: Store) -> torch.Tensor:
    feed = store.feed(A, 50, seed=1)
    return torch.cat([next(feed) for _ in range(5)])


# ---- writing, and reading what was written


def test_a_copy_has_the_same_files_feeds_the_same_bits_and_comes_back(far, local, tmp_path):
    done = copy_store(local, far.url)
    assert (done.sent, done.there) == (9, 0)
    assert far.names() == set(digest(local.path))
    assert all(far.get(name) == (local.path / name).read_bytes() for name in far.names())
    assert torch.equal(batches(Store.open(far.url)), batches(local))
    assert verify(far.url).problems == ()
    copy_store(Store.open(far.url), tmp_path / "back")
    assert digest(tmp_path / "back") == digest(local.path)


def test_a_row_type_with_two_files_a_bucket_comes_whole(far, tmp_path):
    local = make(tmp_path / "int8", rows=40, bucket_rows=30, row_dtype="int8")
    copy_store(local, far.url)
    assert torch.equal(batches(Store.open(far.url)), batches(local))


def test_a_store_collected_to_a_url_is_the_one_collected_to_a_disk(far, cfg, lm, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(remote, "PIECE_BYTES", 1 << 16)
    collect(replace(cfg, out=tmp_path / "whole"), lm)
    store = collect(replace(cfg, out=Path(far.url)), lm)
    assert (store.place, store.rows) == (far.url, cfg.tokens)
    copy_store(store, tmp_path / "back")
    assert digest(tmp_path / "back") == digest(tmp_path / "whole")


class _KillError(Exception):
    pass


def copy_until_killed(monkeypatch, store: Store, url: str, shards: int) -> None:
    """A copy that dies when it has sent so many shards."""
    put, left = Remote.put, iter(range(shards))

    def dying(self, name, file):
        if next(left, None) is None:
            raise _KillError
        put(self, name, file)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "put", dying)
        with pytest.raises(_KillError):
            copy_store(store, url)


def test_a_copy_that_was_killed_goes_on_and_sends_nothing_twice(far, local, monkeypatch):
    copy_until_killed(monkeypatch, local, far.url, 4)
    assert len(far.names()) == 5
    with pytest.raises(StoreError, match=r"copying it there did not finish.*mistudio store copy"):
        Store.open(far.url)
    (found,) = stores_in(far.root)
    assert "did not finish" in found.state
    done = copy_store(local, far.url)
    assert (done.there, done.sent) == (4, 5)
    assert far.names() == set(digest(local.path))
    assert copy_store(local, far.url).sent == 0


def test_a_copy_that_the_server_stops_names_the_shard_and_goes_on(far, local, monkeypatch):
    copy_until_killed(monkeypatch, local, far.url, 0)
    far.fail_to_write("00000.safetensors", status=503, times=1000)
    with pytest.raises(StoreError, match=r"/deep/s/\S+/00000\.safetensors failed after 4 attempts"):
        copy_store(local, far.url)
    far.server.forget()
    far.fail_to_write("00000.safetensors", status=500, times=2)
    copy_store(local, far.url)
    assert verify(far.url).problems == ()


def test_a_copy_is_not_mixed_with_another_store(far, local, tmp_path, monkeypatch):
    other = make(tmp_path / "other", rows=90, bucket_rows=30, seed=9)
    copy_until_killed(monkeypatch, local, far.url, 1)
    with pytest.raises(StoreError, match="unfinished copy of another store"):
        copy_store(other, far.url)
    copy_store(local, far.url)
    with pytest.raises(StoreError, match="holds another store"):
        copy_store(other, far.url)
    with pytest.raises(StoreError, match="is not empty"):
        copy_store(other, far.root)


REMOVE = {
    "s3": "aws s3 rm --recursive s3://bucket/deep/s",
    "gs": "gcloud storage rm --recursive gs://bucket/deep/s",
    "hf": "hf repos delete-files someone/stores 'deep/s/' --type dataset",
}


def test_the_store_verbs_work(capsys, far, local, tmp_path):
    code, out, _ = run(capsys, "store", "copy", local.path, far.url)
    assert (code, f"mistudio store verify {far.url}" in out) == (0, True)
    far.server.put(far.bucket, "web/manifest.json", b'{"name": "an app"}')
    code, out, _ = run(capsys, "store", "ls", far.root, "--json")
    assert [(s["path"], s["state"]) for s in json.loads(out)["stores"]] == [(far.url, "finished")]
    code, out, _ = run(capsys, "store", "show", far.url)
    assert (code, out.startswith(f"{far.url}: 90 rows")) == (0, True)
    code, out, _ = run(capsys, "store", "verify", far.url)
    assert (code, out.startswith("Sound: 10 files")) == (0, True)
    code, out, _ = run(capsys, "store", "convert", far.url, "--out", tmp_path / "c", "--sites", A)
    assert (code, Store.open(tmp_path / "c").rows) == (0, 90)
    code, _, err = run(capsys, "store", "rm", far.url, "--yes")
    assert (code, f"`{REMOVE[far.kind]}`" in " ".join(err.split())) == (2, True)


# ---- a server in trouble


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_fails_for_a_while_is_asked_again(far, url, local, status):
    store = Store.open(url)
    far.server.fail("00001.safetensors", status=status, times=3)
    assert (store.bucket(A, 1) == local.bucket(A, 1)).all()
    assert not any(fault.times for fault in far.server.faults)


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_goes_on_failing_is_named_with_the_number_of_attempts(far, url, status):
    store = Store.open(url)
    far.server.fail("00001.safetensors", status=status, times=1000)
    with pytest.raises(StoreError, match=r"deep/s/layers\.3\.resid_post/00001\.safetensors failed after 4 attempts"):
        store.bucket(A, 1)
    far.server.forget()
    assert len(store.bucket(A, 1))


def test_an_answer_that_breaks_off_is_asked_for_again(far, url, local):
    store = Store.open(url)
    far.server.cut("00001.safetensors", after=100, times=3)
    assert (store.bucket(A, 1) == local.bucket(A, 1)).all()


def test_a_shard_changed_on_the_way_is_asked_for_once_more(far, url, local, caplog):
    store = Store.open(url)
    far.server.change("where/00001.safetensors", at=280)
    assert (store.where(1) == local.where(1)).all()
    assert "where/00001.safetensors: checksum" in caplog.text


def test_a_shard_damaged_at_the_other_end_is_named_and_not_kept(far, url, tmp_path):
    data = bytearray(far.get("where/00001.safetensors"))
    data[-1] ^= 1
    far.put("where/00001.safetensors", bytes(data))
    store = Store.open(url)
    with pytest.raises(StoreError, match=r"deep/s/where/00001\.safetensors: checksum of its"):
        store.where(1)
    assert not list((tmp_path / "cache" / "stores").rglob("*.safetensors*"))
    (problem,) = verify(url).problems
    assert "where/00001.safetensors" in problem


@pytest.mark.parametrize("change", [lambda data: data[:-40], lambda data: data + b"x", lambda data: None])
def test_a_shard_of_another_size_is_named_when_the_store_is_opened(far, url, change):
    data = change(far.get("where/00001.safetensors"))
    if data is None:
        far.delete("where/00001.safetensors")
    else:
        far.put("where/00001.safetensors", data)
    with pytest.raises(StoreError, match=r"deep/s/where/00001\.safetensors (is missing|has .* bytes); man"):
        Store.open(url)


def test_credentials_that_do_not_suffice_are_said_to(far, url):
    store = Store.open(url)
    far.server.fail("00001.safetensors", status=403)
    with pytest.raises(StoreError, match=r"where/00001\.safetensors is refused to these credentials.*, or set "):
        store.where(1)


MAKE = {
    "s3": "aws s3 mb s3://bucket",
    "gs": "gcloud storage buckets create gs://bucket",
    "hf": "hf repos create someone/stores --type dataset",
}


def test_a_bucket_that_is_not_there_is_named_with_how_to_make_it(capsys, far, local):
    far.server.wipe()
    code, _, err = run(capsys, "store", "copy", local.path, far.url)
    assert (code, f"{far.url} cannot be listed" in err, f"`{MAKE[far.kind]}`" in err) == (2, True, True)
    with pytest.raises(StoreError, match=rf"no activation store at {far.url}: manifest.json is not there"):
        Store.open(far.url)


def test_marks_of_folders_are_not_files(far, local):
    far.server.put(far.bucket, "deep/s/.keep/", b" ")
    assert copy_store(local, far.url).sent == 9


def test_where_nothing_answers_it_is_said_after_two_attempts(far, url, monkeypatch, caplog):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", nowhere)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", nowhere)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(StoreError, match=rf"{url}/manifest.json cannot be reached: .*Check the network"):
            Store.open(url)
    s3fs.S3FileSystem.clear_instance_cache()
    assert len([line for line in caplog.messages if "attempt" in line]) == 1


# ---- Google Cloud Storage


@pytest.mark.parametrize("data", [b"ends in\r", b"\r\n--==0==\r\n", b"0", bytes(6 << 20)])
def test_bytes_are_kept_whatever_they_are(far, data):
    Remote(far.root).write("x", data)
    assert far.server.get(far.bucket, "x") == data


@only_gs
def test_a_large_file_goes_in_pieces_and_arrives_whole(far, tmp_path):
    (tmp_path / "x").write_bytes(os.urandom(6 << 20))
    Remote(far.root).put("x", tmp_path / "x")
    assert far.server.get("bucket", "x") == (tmp_path / "x").read_bytes()


@only_gs
def test_an_upload_that_arrives_changed_is_not_taken_for_done(far, monkeypatch):
    body = b'{"md5Hash": "AAAAAAAAAAAAAAAAAAAAAA==", "size": "3"}'
    far.server.fail("/x", method="POST", status=200, headers={"Location": f"{far.server.url}/upload/y?name=y"}, times=4)
    far.server.fail("/y", method="POST", status=200, body=body, times=4)
    with pytest.raises(StoreError, match=r"gs://bucket/x failed after 4 attempts.*MD5"):
        Remote(far.root).write("x", b"abc")


@pytest.mark.parametrize("server", ["s3", "gs"], indirect=True)
def test_a_server_that_falls_silent_is_asked_again(far, url, local, monkeypatch):
    monkeypatch.setattr(schemes, "TIMEOUT_S", 0.3)
    store = Store.open(url)
    far.server.stall("00001.safetensors")
    assert (store.bucket(A, 1) == local.bucket(A, 1)).all()


@only_gs
def test_anonymous_callers_are_told_what_to_set_and_shown_no_traceback(capsys, caplog, far):
    body = b'{"error": {"code": 401, "message": "Anonymous caller does not have storage.objects.get access"}}'
    far.server.fail("manifest.json", status=401, body=body)
    with caplog.at_level(logging.INFO):
        code, _, err = run(capsys, "store", "show", far.url)
    assert code == 2
    assert "Anonymous caller" in err
    assert "set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run `gcloud auth application-default login`." in err
    assert not [record for record in caplog.records if record.exc_info]


@only_gs
def test_a_token_that_is_not_renewed_at_once_is_asked_for_again(far, url, local):
    store = Store.open(url)
    far.server.fail("00001.safetensors", status=401, times=2, body=b'{"error": {"message": "Invalid Credentials"}}')
    assert (store.where(1) == local.where(1)).all()


@pytest.mark.parametrize(("content", "problem"), [(None, "was not found"), ("{}", "does not have a valid type")])
@only_gs
def test_a_key_file_that_is_no_key_file_is_named(far, tmp_path, monkeypatch, content, problem):
    key = tmp_path / "key.json"
    if content is not None:
        key.write_text(content)
    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    with pytest.raises(StoreError, match=rf"No credentials for gs://bucket.*key\.json.*{problem}.* Set GOOGLE_APPLIC"):
        Remote(far.root)


# ---- the hub


@only_hf
def test_a_copy_to_the_hub_is_one_commit_for_each_file_the_manifest_last(far, local):
    before = len(far.server.commits[far.bucket])
    copy_store(local, far.url)
    history = list(far.server.commits[far.bucket].values())[before - 1 :]
    changed = [set(new) ^ set(old) for old, new in pairwise(history)]
    assert all(len(names) == 1 for names in changed)
    names = [min(change).removeprefix("deep/s/") for change in changed]
    assert (len(names), names[0], names[-2:]) == (13, "copy.json", ["manifest.json", "copy.json"])


@only_hf
def test_a_branch_of_a_model_repository_does_too(far, local):
    far.server.add("someone/model", {}, branch="b")
    copy_store(local, "hf://someone/model@b/s")
    assert torch.equal(batches(Store.open("hf://someone/model@b/s")), batches(local))
    with pytest.raises(StoreError, match=r"`hf repos create someone/other --type model`"):
        copy_store(local, "hf://someone/other@b/s")


@only_hf
def test_each_piece_of_a_shard_is_one_request_for_its_bytes(far, url, local):
    store = Store.open(url)
    far.server.requests.clear()
    store.bucket(A, 0)
    size = (local.path / A / "00000.safetensors").stat().st_size
    ranges = [request.range for request in far.server.seen("GET", "/cdn/")]
    assert sorted(ranges) == [f"bytes={at}-{min(at + 299, size)}" for at in range(0, size, 300)]


@only_hf
def test_writing_to_the_hub_without_a_token_says_how_to_get_one(capsys, far, local, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = run(capsys, "store", "copy", local.path, far.url)
    assert code == 2
    assert "writing needs a token" in err
    assert "Set HF_TOKEN, or run `hf auth login`." in err
    assert not far.server.seen("POST")


@only_hf
def test_a_token_that_may_not_write_is_said_to(far, local, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(StoreError, match=r"copy\.json is refused to these credentials.*HF_TOKEN, or run `hf auth"):
        copy_store(local, far.url)


@only_hf
def test_bytes_that_the_hub_does_not_take_are_one_sentence(far, local):
    far.server.fail("", method="PUT", status=400, headers={"X-Error-Message": "no room is left"})
    with pytest.raises(StoreError, match=r"00000\.safetensors is refused: .*no room is left"):
        copy_store(local, far.url)


@only_hf
def test_a_name_that_is_no_repository_is_one_sentence(far, local):
    with pytest.raises(StoreError, match=r"hf://datasets/someone is refused: .*must be 'namespace/name'"):
        copy_store(local, "hf://datasets/someone")


# ---- packages that are not installed


@pytest.mark.parametrize(("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs.core", "gcs")])
def test_a_missing_package_is_named_by_its_extra(capsys, monkeypatch, scheme, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    code, _, err = run(capsys, "store", "show", f"{scheme}://bucket/x")
    assert (code, f"{scheme}:// needs a package: pip install 'mistudio[{extra}]'" in err) == (2, True)
