"""Stores at URLs: the same rows as on disk, through a cache of bounded size (see also test_store_remote_kinds.py)."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import fsspec
import pytest
import torch

from faulty_server import FileServer
from mistudio.errors import StoreError
from mistudio.store import Cache, Store, convert, copy_store, remote, stores_in
from mistudio.store.cache import default_cache
from mistudio.store.order import bucket_order
from s3_server import KEYS, S3Server
from test_store import A, B, make
from test_store_faults import in_child

s3fs = pytest.importorskip("s3fs")


@pytest.fixture(autouse=True)
def credentials(no_waits, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def server():
    s3fs.S3FileSystem.clear_instance_cache()
    with S3Server() as s3:
        yield s3
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.make_bucket("bucket")
    server.faults.clear()
    server.requests.clear()
    yield server
    if "bucket" in [found["Name"] for found in server.client.list_buckets()["Buckets"]]:
        server.delete_bucket("bucket")


@pytest.fixture
def local(tmp_path) -> Store:
    return make(tmp_path / "local", rows=90, bucket_rows=30)


@pytest.fixture
def url(s3, local) -> str:
    for path in local.path.rglob("*"):
        if path.is_file():
            s3.put("bucket", f"deep/s/{path.relative_to(local.path)}", path.read_bytes())
    return "s3://bucket/deep/s"


@pytest.fixture
def in_memory(local):
    place = "memory://stores/s"
    copy_store(local, place)
    yield place
    fsspec.filesystem("memory").store.clear()


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "stores").rglob("*.safetensors*"))


def batches(store: Store, count: int = 5) -> torch.Tensor:
    feed = store.feed(A, 50, seed=1)
    return torch.cat([next(feed) for _ in range(count)])


# ---- the same bits


def test_a_store_in_a_bucket_feeds_the_same_bits_as_the_one_on_disk(url, local):
    far = Store.open(url)
    assert torch.equal(batches(far), batches(local))
    pair, same = far.joint_feed([A, B], 33, seed=2), local.joint_feed([A, B], 33, seed=2)
    assert all(torch.equal(x, y) for _ in range(7) for x, y in zip(next(pair), next(same), strict=True))
    assert (far.where(1) == local.where(1)).all()
    assert (far.rows, far.scale(B), far.mean(B).tolist()) == (local.rows, local.scale(B), local.mean(B).tolist())
    assert far.place == url


def test_a_feed_of_a_remote_store_resumes_where_the_local_one_stopped(url, local):
    here, far = local.feed(A, 30, seed=4), Store.open(url).feed(A, 30, seed=4)
    for _ in range(4):
        next(here)
    far.restore(json.loads(json.dumps(here.state())))
    assert torch.equal(next(far), next(here))


def test_http_and_memory_give_the_same_bits_too(local, in_memory):
    with FileServer(local.path.parent) as http:
        assert torch.equal(batches(Store.open(f"{http.url}/local")), batches(local))
    assert torch.equal(batches(Store.open(in_memory)), batches(local))
    assert torch.equal(batches(Store.open(f"file://{local.path}")), batches(local))


def test_a_url_that_went_through_a_path_is_the_same_url(in_memory):
    assert Store.open(Path(in_memory)).place == in_memory
    assert remote.url_of(Path("s3://b/x/")) == remote.url_of("s3://b/x") == "s3://b/x"
    assert remote.url_of(Path("stores/s3")) is None
    assert remote.folder_of(Path("file:///tmp/x")) == Path("/tmp/x")


def test_shards_are_read_in_parallel_ranges_and_only_those_that_are_needed(url, s3):
    store = Store.open(url)
    s3.requests.clear()
    s3.most_at_once = 0
    store.bucket(A, 0)
    ranges = [request.range for request in s3.seen("GET", "00000.safetensors")]
    assert len(ranges) == len(set(ranges)) >= 2
    assert all(given.startswith("bytes=") for given in ranges)
    assert {request.path for request in s3.requests} == {f"/bucket/deep/s/{A}/00000.safetensors"}


def test_the_bucket_that_comes_next_is_fetched_while_the_present_one_is_read(url, s3, tmp_path):
    """One batch is asked for, of the first bucket in the order; the one after it comes too, and no third."""
    store = Store.open(url)
    feed = store.feed(A, 5, seed=1)
    next(feed)
    sizes = store.manifest.bucket_sizes
    ahead = [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    for thread in ahead:
        thread.join()
    names = {path.name[:5] for path in cached(tmp_path)}
    assert names == {f"{bucket:05d}" for bucket in bucket_order(1, 0, len(sizes))[:2]}


# ---- the cache


def test_a_second_reader_finds_the_shards_in_the_cache(url, s3):
    batches(Store.open(url))
    s3.requests.clear()
    batches(Store.open(url))
    assert not [request for request in s3.requests if "/layers." in request.path]


def test_the_cache_keeps_within_its_bound_and_puts_away_what_was_used_longest_ago(url, local, tmp_path):
    shard = (local.path / A / "00000.safetensors").stat().st_size
    cache = Cache(folder=tmp_path / "cache" / "stores", max_bytes=2 * shard + 200)
    store = Store.open(url, cache=cache)
    for bucket in (0, 1, 0, 2):
        store.bucket(A, bucket)
        assert sum(path.stat().st_size for path in cached(tmp_path)) <= cache.max_bytes
    names = {path.name for path in cached(tmp_path)}
    assert {"00000.safetensors", "00002.safetensors"} == names
    assert torch.equal(batches(store), batches(local))


def test_rows_that_are_mapped_stay_readable_when_their_shard_is_put_away(url, local, tmp_path):
    shard = max((local.path / A / f"{n:05d}.safetensors").stat().st_size for n in range(3))
    store = Store.open(url, cache=Cache(folder=tmp_path / "cache" / "stores", max_bytes=shard))
    first = store.stored(A, 0)["rows"]
    for bucket in (1, 2):
        store.stored(A, bucket)
    assert not [path for path in cached(tmp_path) if path.name == "00000.safetensors"]
    assert (first == local.stored(A, 0)["rows"]).all()


def test_a_shard_larger_than_the_cache_is_refused_with_what_to_set(url, tmp_path):
    store = Store.open(url, cache=Cache(folder=tmp_path / "c", max_bytes=300))
    with pytest.raises(StoreError, match=r"does not fit into the cache of 300 bytes.*MISTUDIO_CACHE_GB"):
        store.bucket(A, 0)


def test_a_shard_damaged_in_the_cache_is_fetched_again(url, local, tmp_path):
    Store.open(url).bucket(A, 0)
    (path,) = [path for path in cached(tmp_path) if path.name == "00000.safetensors"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert (Store.open(url).bucket(A, 0) == local.bucket(A, 0)).all()
    assert path.read_bytes() == (local.path / A / "00000.safetensors").read_bytes()


def test_what_a_killed_download_left_is_begun_again(url, local, tmp_path):
    store = Store.open(url)
    part = store.path / A / "00000.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half of it")
    assert (store.bucket(A, 0) == local.bucket(A, 0)).all()
    assert not part.exists()


def test_a_reader_killed_at_any_step_leaves_a_sound_cache(in_memory, local, tmp_path):
    def read():
        batches(Store.open(in_memory))

    cache, kill_at, finished = tmp_path / "cache", 0, 0
    while not finished:
        kill_at += 3
        finished = in_child(read, cache, kill_at)
        assert torch.equal(batches(Store.open(in_memory)), batches(local))
        found = {path.name: path.read_bytes() for path in (cache / "stores").rglob(f"{A}/*.safetensors")}
        assert found == {path.name: path.read_bytes() for path in (local.path / A).iterdir()}
        shutil.rmtree(cache)
    assert kill_at > 20


def test_a_store_that_was_replaced_is_not_mixed_with_the_cached_one(url, s3, local, tmp_path):
    batches(Store.open(url))
    other = make(tmp_path / "other", rows=90, bucket_rows=30, seed=6)
    for path in other.path.rglob("*"):
        if path.is_file():
            s3.put("bucket", f"deep/s/{path.relative_to(other.path)}", path.read_bytes())
    assert torch.equal(batches(Store.open(url)), batches(other))


READER = """
import torch
from pathlib import Path
from mistudio.store import Cache, Store, remote
remote.PIECE_BYTES = 300
feed = Store.open({url!r}, cache=Cache(folder=Path({folder!r}), max_bytes={size})).feed({site!r}, 50, seed=1)
print(torch.cat([next(feed) for _ in range(8)]).double().sum().item())
"""


def test_processes_and_threads_share_one_small_cache(url, local, tmp_path):
    """Five readers, two shards' room: each has what the others need put away again and again."""
    cache = Cache(folder=tmp_path / "shared", max_bytes=200 + 2 * (local.path / A / "00000.safetensors").stat().st_size)
    names = {"url": url, "folder": str(cache.folder), "size": cache.max_bytes, "site": A}
    process = subprocess.Popen([sys.executable, "-c", READER.format(**names)], stdout=subprocess.PIPE)
    expected = batches(local, 8).double().sum().item()
    with ThreadPoolExecutor(4) as readers:
        found = list(readers.map(lambda _: batches(Store.open(url, cache=cache), 8).double().sum().item(), range(4)))
    assert found == [expected] * 4
    assert float(process.communicate()[0]) == expected
    assert sum(path.stat().st_size for path in cache.folder.rglob("*.safetensors*")) <= cache.max_bytes


def test_a_disk_that_fills_up_under_the_cache_is_said_and_nothing_half_is_left(in_memory, local, tmp_path, monkeypatch):
    store = Store.open(in_memory)
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "make_room", full)
        with pytest.raises(StoreError, match=rf"{os.strerror(errno.ENOSPC)}. Make room there, or set MISTUDIO_CACHE"):
            store.bucket(A, 0)
    assert not cached(tmp_path)
    assert (store.bucket(A, 0) == local.bucket(A, 0)).all()


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_cache_that_cannot_be_written_is_said(in_memory, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MISTUDIO_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError, match=r"cache at .*/file/stores cannot be written: Not a dir.*MISTUDIO_CACHE to an"):
        Store.open(in_memory)


def test_where_the_cache_is_and_how_large_is_said_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MISTUDIO_CACHE_GB", "0.5")
    assert default_cache() == Cache(folder=tmp_path / "cache" / "stores", max_bytes=500_000_000)
    monkeypatch.setenv("MISTUDIO_CACHE_GB", "much")
    with pytest.raises(StoreError, match="'much'"):
        default_cache()


# ---- a server in trouble


def test_every_further_attempt_is_said(url, s3, local, caplog):
    store = Store.open(url)
    s3.fail("00001.safetensors", status=503, times=3)
    with caplog.at_level("WARNING", logger="mistudio.store.remote"):
        assert (store.bucket(A, 1) == local.bucket(A, 1)).all()
    assert len([line for line in caplog.messages if "attempt" in line and "00001.safetensors" in line]) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:-40]),
            r"is shorter than .* after 4 attempts",
        ),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "has more than the"),
        (lambda path: path.unlink(), "is not there"),
    ],
)
def test_where_files_cannot_be_listed_a_wrong_size_is_found_on_arrival(local, change, message):
    with FileServer(local.path.parent) as http:
        store = Store.open(f"{http.url}/local")
        change(local.path / "where" / "00001.safetensors")
        with pytest.raises(StoreError, match=rf"local/where/00001\.safetensors {message}"):
            store.where(1)


def test_a_server_without_ranges_is_refused(local):
    with FileServer(local.path.parent, ranges=False) as http:
        store = Store.open(f"{http.url}/local")
        with pytest.raises(StoreError, match=r"answers with whole files.*range requests"):
            store.where(1)


def test_a_bucket_that_vanishes_is_named(url, s3, local):
    store = Store.open(url)
    store.bucket(A, 0)
    s3.delete_bucket("bucket")
    store.bucket(A, 0)  # it is in the cache
    with pytest.raises(StoreError, match=r"s3://bucket/deep/s/.*00001.*is not there \(The specified bucket does not"):
        store.bucket(A, 1)
    with pytest.raises(StoreError, match=r"no activation store at s3://bucket/deep/s.*bucket does not exist"):
        Store.open(url)
    with pytest.raises(StoreError, match=r"s3://bucket/x cannot be listed.*Make the bucket first"):
        copy_store(local, "s3://bucket/x")


def test_without_credentials_it_says_what_to_set(url, monkeypatch, tmp_path):
    monkeypatch.setattr(s3fs.S3FileSystem, "_cache", {})
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match=r"No credentials for s3://bucket/deep/s/.*AWS_ACCESS_KEY_ID and AWS_SECRET"):
        Store.open(url)


def test_a_host_that_has_answered_is_waited_for(in_memory, monkeypatch):
    place = remote.Remote(in_memory)
    manifest, read, left = place.read("manifest.json"), place._fs.cat_file, iter(range(3))

    def away(*args):
        if next(left, None) is not None:
            raise aiohttp.ClientConnectorError(SimpleNamespace(host="h", port=1, ssl=True), OSError("no route"))
        return read(*args)

    monkeypatch.setattr(place._fs, "cat_file", away)
    assert place.read("manifest.json") == manifest


def test_no_attempt_begins_when_patience_is_at_an_end(url, s3, monkeypatch):
    store = Store.open(url)
    monkeypatch.setattr(remote, "PATIENCE_S", -1)
    s3.fail("00001.safetensors", status=503, times=1)
    with pytest.raises(StoreError, match=r"00001\.safetensors failed: .*Try again later"):
        store.where(1)


def test_an_unknown_kind_of_url_is_one_sentence():
    with pytest.raises(StoreError, match="ftp://x/y: stores are in folders or at s3://"):
        Store.open("ftp://x/y")
    with pytest.raises(
        StoreError, match="ftp://x/y: stores are in folders or at s3://"
    ):  # flags are paths: a slash is lost
        remote.url_of(Path("ftp://x/y"))


@pytest.mark.parametrize("scheme", remote.SCHEMES)
def test_every_kind_of_url_is_known_and_says_what_it_needs(scheme):
    assert remote.url_of(f"{scheme}://host/path/") == f"{scheme}://host/path"
    row = remote.SCHEMES[scheme]
    assert row.install
    assert row.credentials
    assert "host" in row.make("host/path")


# ---- writing


def test_the_manifest_is_sent_last(s3, local):
    copy_store(local, "s3://bucket/a/b")
    puts = [request.path.rsplit("/", 1)[1] for request in s3.seen("PUT")]
    assert (puts[0], puts[-1]) == ("copy.json", "manifest.json")


def test_a_damaged_store_is_not_copied(s3, local):
    path = local.path / A / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=r"00001\.safetensors: checksum"):
        copy_store(Store.open(local.path), "s3://bucket/a")
    assert "a/manifest.json" not in s3.names("bucket")


def test_what_is_made_row_by_row_is_not_made_at_a_url(local):
    with pytest.raises(StoreError, match=r"s3://bucket/x is not a folder.*mistudio store copy FOLDER s3://bucket/x"):
        convert(local, Path("s3://bucket/x"), dtype="int8")


def test_nothing_is_written_over_http(local):
    with FileServer(local.path.parent) as http:
        with pytest.raises(StoreError, match=r"cannot be written over http. Write to s3://, gs:// or hf://"):
            copy_store(local, f"{http.url}/x")
        with pytest.raises(StoreError, match="files cannot be listed over http"):
            list(stores_in(http.url))
