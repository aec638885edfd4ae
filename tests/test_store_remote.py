"""Stores at URLs: the same rows as on disk, through a cache of bounded size, whatever the server does."""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import torch

from mistudio import cli
from mistudio.errors import StoreError
from mistudio.store import Cache, Store, convert, copy_store, remote, stores_in, verify
from mistudio.store.cache import default_cache
from mistudio.store.order import bucket_order
from s3_server import KEYS, FileServer, S3Server
from test_store import A, B, digest, make
from test_store_faults import in_child

s3fs = pytest.importorskip("s3fs")


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """No waits, no fsync, a cache of the test's own, and pieces so small that a shard has several."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(remote, "WAITS_S", (0, 0, 0))
    monkeypatch.setattr(remote, "PIECE_BYTES", 300)
    monkeypatch.setenv("MISTUDIO_CACHE", str(tmp_path / "cache"))
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


def test_a_row_type_with_two_files_a_bucket_comes_whole(s3, tmp_path):
    local = make(tmp_path / "int8", rows=40, bucket_rows=30, row_dtype="int8")
    copy_store(local, "s3://bucket/int8")
    assert torch.equal(batches(Store.open("s3://bucket/int8")), batches(local))


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
import sys
sys.path.insert(0, {tests!r})
from test_store_remote import A, Cache, Path, Store, batches, remote
remote.PIECE_BYTES = 300
store = Store.open({url!r}, cache=Cache(folder=Path({folder!r}), max_bytes={size}))
print(batches(store, 8).double().sum().item())
"""


def test_processes_and_threads_share_one_small_cache(url, local, tmp_path):
    """Five readers, two shards' room: each has what the others need put away again and again."""
    cache = Cache(folder=tmp_path / "shared", max_bytes=200 + 2 * (local.path / A / "00000.safetensors").stat().st_size)
    names = {"tests": str(Path(__file__).parent), "url": url, "folder": str(cache.folder), "size": cache.max_bytes}
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


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_fails_for_a_while_is_asked_again(url, s3, local, caplog, status):
    store = Store.open(url)
    s3.fail("00001.safetensors", status=status, times=3)
    with caplog.at_level("WARNING", logger="mistudio.store.remote"):
        assert (store.bucket(A, 1) == local.bucket(A, 1)).all()
    assert len([line for line in caplog.messages if "attempt" in line and "00001.safetensors" in line]) == 3


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_goes_on_failing_is_named_with_the_number_of_attempts(url, s3, status):
    store = Store.open(url)
    s3.fail("00001.safetensors", status=status, times=1000)
    with pytest.raises(StoreError, match=r"deep/s/layers\.3\.resid_post/00001\.safetensors failed after 4 attempts"):
        store.bucket(A, 1)
    s3.faults.clear()
    assert len(store.bucket(A, 1))


def test_an_answer_that_breaks_off_is_asked_for_again(url, s3, local):
    store = Store.open(url)
    s3.cut("00001.safetensors", after=100, times=3)
    assert (store.bucket(A, 1) == local.bucket(A, 1)).all()


def test_a_server_that_falls_silent_is_asked_again(s3, url, local, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.3)
    store = Store.open(url)
    s3.stall("00001.safetensors")
    assert (store.bucket(A, 1) == local.bucket(A, 1)).all()


def test_a_shard_changed_on_the_way_is_asked_for_once_more(url, s3, local, caplog):
    store = Store.open(url)
    s3.change("where/00001.safetensors", at=280)
    assert (store.where(1) == local.where(1)).all()
    assert "where/00001.safetensors: SHA-256" in caplog.text


def test_a_shard_damaged_at_the_other_end_is_named_and_not_kept(url, s3, tmp_path):
    key = "deep/s/where/00001.safetensors"
    data = bytearray(s3.get("bucket", key))
    data[-1] ^= 1
    s3.put("bucket", key, bytes(data))
    store = Store.open(url)
    with pytest.raises(StoreError, match=r"s3://bucket/deep/s/where/00001\.safetensors: SHA-256 of its"):
        store.where(1)
    assert not cached(tmp_path)
    (problem,) = verify(url).problems
    assert "where/00001.safetensors" in problem


@pytest.mark.parametrize("change", [lambda data: data[:-40], lambda data: data + b"x", lambda data: None])
def test_a_shard_of_another_size_is_named_when_the_store_is_opened(url, s3, change):
    key = "deep/s/where/00001.safetensors"
    data = change(s3.get("bucket", key))
    if data is None:
        s3.client.delete_object(Bucket="bucket", Key=key)
    else:
        s3.put("bucket", key, data)
    with pytest.raises(StoreError, match=r"s3://bucket/deep/s/where/00001\.safetensors (is missing|has .* bytes); man"):
        Store.open(url)


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


def test_credentials_that_do_not_suffice_are_said_to(url, s3):
    store = Store.open(url)
    s3.fail("00001.safetensors", status=403)
    with pytest.raises(StoreError, match=r"where/00001\.safetensors is refused to these credentials"):
        store.where(1)


def test_a_missing_package_and_an_unknown_kind_of_url_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(StoreError, match=r"pip install 'mistudio\[s3\]'"):
        Store.open("s3://bucket/x")
    with pytest.raises(StoreError, match="ftp://x/y: stores are in folders or at s3://"):
        Store.open("ftp://x/y")


def test_google_cloud_without_its_package_says_what_to_install():
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is here")
    with pytest.raises(StoreError, match=r"gs:// needs a package: pip install 'mistudio\[gcs\]'"):
        Store.open("gs://bucket/x")


@pytest.mark.parametrize("scheme", remote.SCHEMES)
def test_every_kind_of_url_is_known_and_says_what_it_needs(scheme):
    assert remote.url_of(f"{scheme}://host/path/") == f"{scheme}://host/path"
    row = remote.SCHEMES[scheme]
    assert row.install
    assert row.credentials
    assert isinstance(row.options(), dict)


# ---- writing


def test_a_copy_has_the_same_files_in_a_bucket_and_back_on_disk(s3, local, tmp_path):
    done = copy_store(local, "s3://bucket/a/b")
    assert (done.sent, done.there) == (9, 0)
    names = [name.removeprefix("a/b/") for name in s3.names("bucket")]
    assert set(names) == set(digest(local.path))
    assert all(s3.get("bucket", f"a/b/{name}") == (local.path / name).read_bytes() for name in names)
    puts = [request.path.rsplit("/", 1)[1] for request in s3.seen("PUT")]
    assert (puts[0], puts[-1]) == ("copy.json", "manifest.json")
    copy_store(Store.open("s3://bucket/a/b"), tmp_path / "back")
    assert digest(tmp_path / "back") == digest(local.path)


def test_a_copy_that_was_interrupted_goes_on_and_sends_nothing_twice(s3, local):
    s3.fail("where/00002.safetensors", status=500, method="PUT", times=1000)
    with pytest.raises(StoreError, match=r"where/00002\.safetensors failed after 4 attempts"):
        copy_store(local, "s3://bucket/a")
    with pytest.raises(StoreError, match=r"copying it there did not finish.*mistudio store copy"):
        Store.open("s3://bucket/a")
    before = len(s3.names("bucket"))
    s3.faults.clear()
    done = copy_store(local, "s3://bucket/a")
    assert (done.there, done.sent) == (before - 1, 9 - before + 1)
    assert "a/copy.json" not in s3.names("bucket")
    assert verify("s3://bucket/a").problems == ()
    assert copy_store(local, "s3://bucket/a").sent == 0


def test_a_copy_is_not_mixed_with_another_store(s3, local, tmp_path):
    other = make(tmp_path / "other", rows=90, bucket_rows=30, seed=9)
    s3.fail("where/00002.safetensors", status=500, method="PUT", times=1000)
    with pytest.raises(StoreError):
        copy_store(local, "s3://bucket/a")
    s3.faults.clear()
    with pytest.raises(StoreError, match="unfinished copy of another store"):
        copy_store(other, "s3://bucket/a")
    copy_store(local, "s3://bucket/a")
    with pytest.raises(StoreError, match="holds another store"):
        copy_store(other, "s3://bucket/a")
    with pytest.raises(StoreError, match="is not empty"):
        copy_store(other, "s3://bucket")


def test_a_damaged_store_is_not_copied(s3, local):
    path = local.path / A / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=r"00001\.safetensors: SHA-256"):
        copy_store(Store.open(local.path), "s3://bucket/a")
    assert "a/manifest.json" not in s3.names("bucket")


def test_what_is_made_row_by_row_is_not_made_at_a_url(local):
    with pytest.raises(StoreError, match=r"s3://bucket/x is not a folder.*mistudio store copy FOLDER s3://bucket/x"):
        convert(local, Path("s3://bucket/x"), dtype="int8")


def test_nothing_is_written_over_http(local):
    with FileServer(local.path.parent) as http, pytest.raises(StoreError, match="http"):
        copy_store(local, f"{http.url}/x")


# ---- the command line


def run(capsys, *arguments):
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_store_verbs_work_on_urls(capsys, s3, local, tmp_path):
    code, out, _ = run(capsys, "store", "copy", local.path, "s3://bucket/runs/one")
    assert (code, "mistudio store verify s3://bucket/runs/one" in out) == (0, True)
    s3.put("bucket", "web/manifest.json", b'{"name": "an app"}')
    code, out, _ = run(capsys, "store", "ls", "s3://bucket", "--json")
    assert [(s["path"], s["state"]) for s in json.loads(out)["stores"]] == [("s3://bucket/runs/one", "finished")]
    code, out, _ = run(capsys, "store", "show", "s3://bucket/runs/one")
    assert (code, out.startswith("s3://bucket/runs/one: 90 rows")) == (0, True)
    code, out, _ = run(capsys, "store", "verify", "s3://bucket/runs/one")
    assert (code, out.startswith("Sound: 10 files")) == (0, True)
    code, _, err = run(capsys, "store", "rm", "s3://bucket/runs/one", "--yes")
    assert (code, "aws s3 rm" in err) == (2, True)
    code, out, _ = run(capsys, "store", "convert", "s3://bucket/runs/one", "--out", tmp_path / "c", "--sites", A)
    assert (code, Store.open(tmp_path / "c").rows) == (0, 90)


def test_an_unfinished_copy_is_listed_as_one(capsys, s3, local):
    s3.fail("where/00002.safetensors", status=500, method="PUT", times=1000)
    with pytest.raises(StoreError):
        copy_store(local, "s3://bucket/half")
    (found,) = stores_in("s3://bucket")
    assert "did not finish" in found.state
