"""Downloads from a stand-in for the hub (hub_server.py) through huggingface_hub's real client."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from safetensors.numpy import save

from hub_server import HubServer
from make_hostile import flipped, npz_bytes, sound
from mistudio.errors import HubError
from mistudio.hub import transfer
from mistudio.hub.download import Downloaded, Failure, download, download_many
from mistudio.hub.entry import Entry
from mistudio.hub.verify import verify_file
from mistudio.sae.npz import Npz

D, F = 2304, 8
REPO = "google/gemma-scope-2b-pt-res"
REPO_2 = "google/gemma-scope-2-270m-pt"


def entry(layer=20):
    return Entry(
        generation=1,
        repo_id=REPO,
        path=f"layer_{layer}/width_16k/average_l0_71",
        model="google/gemma-2-2b",
        site="res",
        layer=layer,
        width=F,
        l0=71,
        l0_class=None,
        canonical=True,
        neuronpedia_id=None,
        affine=False,
    )


ENTRY = entry()
ENTRY_2 = Entry(
    generation=2,
    repo_id=REPO_2,
    path="resid_post/layer_5_width_16k_l0_small",
    model="google/gemma-3-270m",
    site="res",
    layer=5,
    width=F,
    l0=None,
    l0_class="small",
    canonical=False,
    neuronpedia_id=None,
    affine=False,
)
FILE = f"{ENTRY.path}/params.npz"
DATA = npz_bytes(sound(D, F))
OTHER = npz_bytes(sound(D, F, seed=1))


@pytest.fixture
def slept(monkeypatch):
    """Seconds that the client and we would have slept; nobody sleeps."""
    seconds = []
    clock = SimpleNamespace(sleep=seconds.append, time=__import__("time").time, monotonic=__import__("time").monotonic)
    for module in (file_download, _http, transfer):
        monkeypatch.setattr(module, "time", clock)
    return seconds


@pytest.fixture
def hub(tmp_path, monkeypatch, slept):
    """A hub with one commit of one sound file, and a private cache; huggingface_hub is pointed at them."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        server.commit_id = server.add(REPO, {FILE: DATA})
        yield server
    huggingface_hub.close_session()


def get(wanted=ENTRY, **settings):
    return download(wanted, **{"progress": False} | settings)


def refused(match, wanted=ENTRY, **settings):
    with pytest.raises(HubError, match=match) as refusal:
        get(wanted, **settings)
    message = str(refusal.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def files_under(folder):
    return (
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) if folder.exists() else []
    )


def partials(folder):
    return list(folder.rglob("*.incomplete"))


def bytes_sent(hub):
    """Where each GET of the content began."""
    return [int(r.headers.get("range", "bytes=0-")[6:-1]) for r in hub.seen("GET", "/cdn/")]


def test_a_download_is_in_the_hub_cache_pinned_and_recorded(hub, tmp_path):
    got = get()
    assert isinstance(got, Downloaded)
    assert (got.revision, got.repo_id, got.entry, got.bytes) == (hub.commit_id, REPO, ENTRY, len(DATA))
    assert got.sha256 == hashlib.sha256(DATA).hexdigest()
    assert got.path.read_bytes() == DATA
    assert got.path == Path(huggingface_hub.try_to_load_from_cache(REPO, FILE, revision="main"))
    assert all(hub.commit_id in r.path for r in hub.seen("GET", "/resolve/"))
    records = list((tmp_path / "assets").rglob("*.json"))
    assert len(records) == 1
    record = json.loads(records[0].read_text())
    assert (record["revision"], record["sha256"], record["bytes"]) == (hub.commit_id, got.sha256, len(DATA))
    assert not partials(tmp_path)


def test_a_download_into_a_folder_lies_under_its_repository_with_its_record_beside(hub, tmp_path):
    got = get(folder=tmp_path / "saes")
    assert files_under(tmp_path / "saes") == [f"{REPO}/{ENTRY.path}/mistudio.json", f"{REPO}/{FILE}"]
    assert got.path.read_bytes() == DATA
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("folder", [None, "saes"])
def test_a_file_that_was_verified_is_neither_downloaded_nor_read_again(hub, tmp_path, monkeypatch, folder):
    folder = None if folder is None else tmp_path / folder
    first = get(folder=folder)
    monkeypatch.setattr("mistudio.hub.download.verify_file", None)
    assert get(folder=folder) == first
    assert len(bytes_sent(hub)) == 1


@pytest.mark.parametrize("folder", [None, "saes"])
def test_a_pinned_revision_at_hand_needs_no_request(hub, tmp_path, folder):
    folder = None if folder is None else tmp_path / folder
    first = get(folder=folder)
    hub.requests.clear()
    assert get(folder=folder, revision=hub.commit_id) == first
    assert not hub.requests


@pytest.mark.parametrize("folder", [None, "saes"])
def test_offline_finds_what_is_at_hand_and_says_what_is_not(hub, tmp_path, folder):
    folder = None if folder is None else tmp_path / folder
    message = refused("without --offline", folder=folder, offline=True)
    assert FILE in message
    first = get(folder=folder)
    hub.requests.clear()
    assert get(folder=folder, offline=True) == first
    refused("at revision 0000", folder=folder, offline=True, revision="0" * 40)
    refused("leave one out", folder=folder, offline=True, force=True)
    assert not hub.requests


def test_the_offline_switch_of_the_environment_is_honoured(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE")
    assert not hub.requests


def test_a_file_that_another_program_put_into_the_cache_is_verified_before_use(hub):
    path = Path(huggingface_hub.hf_hub_download(REPO, FILE))
    hub.requests.clear()
    assert get().path == path
    assert not hub.seen("GET", "/cdn/")
    blob = path.resolve()
    blob.write_bytes(flipped(DATA, 500))
    refused("is damaged: its data do not match their CRC; replace it with --force")
    assert get(force=True).path.read_bytes() == DATA


def test_a_file_changed_after_it_was_recorded_is_verified_again(hub, tmp_path):
    path = get(folder=tmp_path).path
    path.write_bytes(OTHER)
    refused("has sha256 .* replace it with --force", folder=tmp_path)
    path.write_bytes(DATA)
    assert get(folder=tmp_path).revision == hub.commit_id


def test_a_branch_tag_or_commit_is_downloaded_as_the_commit_that_it_is(hub, tmp_path):
    newer = hub.add(REPO, {FILE: OTHER})
    assert get(revision=hub.commit_id).path.read_bytes() == DATA
    got = get(revision="main")
    assert (got.revision, got.path.read_bytes()) == (newer, OTHER)


def test_a_folder_keeps_its_revision_until_force(hub, tmp_path):
    get(folder=tmp_path)
    same = hub.add(REPO, {FILE: DATA, "README.md": b"x"})
    assert get(folder=tmp_path).revision == same
    newer = hub.add(REPO, {FILE: OTHER})
    refused(f"is from revision {same[:12]}.*--force.*--revision {same}", folder=tmp_path)
    assert get(folder=tmp_path, force=True).revision == newer
    assert (tmp_path / REPO / FILE).read_bytes() == OTHER


def test_the_token_goes_to_the_hub_and_not_to_where_the_bytes_are(hub, monkeypatch):
    hub.token = "hf_secret"
    refused(r"\(401\).*HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    get()
    assert hub.seen("GET", "/cdn/")
    assert all("authorization" not in r.headers for r in hub.seen("GET", "/cdn/"))


@pytest.mark.parametrize("folder", [None, "saes"])
def test_a_connection_cut_twice_is_continued_where_it_ended(hub, tmp_path, slept, folder):
    hub.cut("params.npz", after=50_000, times=2)
    got = get(folder=None if folder is None else tmp_path / folder)
    assert got.path.read_bytes() == DATA
    first, second, third = bytes_sent(hub)
    assert first == 0
    assert 40_000 < second <= 50_000
    assert 80_000 < third <= 100_000


@pytest.mark.parametrize("folder", [None, "saes"])
def test_a_download_that_was_given_up_is_continued_by_the_next(hub, tmp_path, folder):
    folder = None if folder is None else tmp_path / folder
    hub.cut("params.npz", after=50_000)
    hub.cut("params.npz", after=0, times=20)
    refused("it goes on where it stopped", folder=folder)
    (partial,) = partials(tmp_path)
    kept = partial.stat().st_size
    assert 40_000 < kept <= 50_000
    hub.faults.clear()
    hub.requests.clear()
    assert get(folder=folder).path.read_bytes() == DATA
    assert bytes_sent(hub) == [kept]
    assert not partials(tmp_path)


def test_a_hub_that_ignores_ranges_gives_the_same_file(hub):
    hub.ranges = False
    hub.cut("params.npz", after=50_000)
    assert get().path.read_bytes() == DATA


def test_a_partial_file_of_other_bytes_is_found_by_the_hash_and_deleted(hub, tmp_path):
    hub.cut("params.npz", after=50_000)
    hub.cut("params.npz", after=0, times=20)
    refused("No connection")
    (partial,) = partials(tmp_path)
    partial.write_bytes(OTHER[: partial.stat().st_size])
    hub.faults.clear()
    refused("downloaded and is not kept")
    assert not partials(tmp_path)
    assert get().path.read_bytes() == DATA


def test_a_truncated_upload_is_refused_and_named_before_any_byte_is_fetched(hub, tmp_path):
    old = hub.add(REPO, {FILE: DATA[: len(DATA) * 2 // 3]})
    hub.add(REPO, {FILE: DATA})
    message = refused("cut short.*take a newer one", revision=old)
    assert f"{REPO}/{FILE} at revision {old[:12]}" in message
    assert f"{len(DATA) * 2 // 3:,} bytes" in message
    assert not bytes_sent(hub)
    assert get().path.read_bytes() == DATA


def test_an_upload_of_nearly_the_right_size_is_refused_after_it_came_and_is_not_kept(hub, tmp_path):
    hub.add(REPO, {FILE: DATA[:-10]})
    message = refused("is not kept.*cut short")
    assert FILE in message
    assert not [name for name in files_under(tmp_path) if not name.endswith(".lock")]


@pytest.mark.parametrize("folder", [None, "saes"])
def test_a_wrong_crc_is_refused_and_the_file_is_not_kept(hub, tmp_path, folder):
    hub.add(REPO, {FILE: flipped(DATA, 5000)})
    refused("is not kept.*W_enc is damaged: its data do not match their CRC", folder=folder and tmp_path / folder)
    left = [name for name in files_under(tmp_path) if not name.endswith(".lock")]
    assert not [name for name in left if "params" in name or "blobs" in name]


def test_a_stream_that_ends_early_is_named_and_continued(hub, tmp_path):
    hub.shorten("params.npz", by=1000)
    refused("did not come whole.*it goes on where it stopped")
    assert get().path.read_bytes() == DATA
    assert bytes_sent(hub) == [0, len(DATA) - 1000]


def test_force_keeps_the_old_file_until_the_new_one_is_verified(hub, tmp_path):
    get(folder=tmp_path)
    hub.add(REPO, {FILE: flipped(DATA, 5000)})
    refused("is not kept", folder=tmp_path, force=True)
    assert (tmp_path / REPO / FILE).read_bytes() == DATA


def test_a_missing_repository_revision_and_file_are_told_apart(hub):
    refused("no repository google/gone on .*404", dataclasses.replace(ENTRY, repo_id="google/gone"))
    refused(f"{REPO} has no revision v9; leave out --revision", revision="v9")
    refused(f"{REPO} has no file layer_3/.*/params.npz at revision main", entry(layer=3))


def test_a_gated_repository_says_where_to_accept_its_terms(hub):
    hub.gated.add(REPO)
    refused(f"gated .403.: accept its terms at {hub.url}/{REPO}, then `hf auth login`, or set HF_TOKEN")


@pytest.mark.parametrize(("status", "reason"), [(401, "private or gated"), (403, "token may not read")])
def test_unauthorised_and_forbidden_are_not_tried_again(hub, slept, status, reason):
    hub.fail("params.npz", status=status, method="HEAD", times=99)
    refused(reason)
    assert not slept
    assert len(hub.requests) == 1


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_hub_that_asks_to_wait_is_waited_for_as_long_as_it_says(hub, slept, method):
    hub.fail("params.npz", status=429, method=method, headers={"Retry-After": "7"})
    assert get().path.read_bytes() == DATA
    assert len(slept) == 1
    assert slept[0] in (7, 8)  # huggingface_hub adds a second


def test_a_hub_that_asks_to_wait_for_long_is_reported_and_not_waited_for(hub, slept):
    hub.fail("params.npz", status=429, method="HEAD", headers={"Retry-After": "3600"})
    refused(r"\(429\): wait 3600 s.*--jobs")
    assert not slept


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_in_trouble_is_tried_again_and_then_reported(hub, slept, method, status):
    hub.fail("params.npz", status=status, method=method, times=2)
    assert get().path.read_bytes() == DATA
    assert slept == [1, 2]
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.fail("params.npz", status=status, method=method, times=99)
    refused(rf"trouble of its own \({status}\)")


def test_a_hub_that_fails_after_the_last_byte_is_reported_and_nothing_is_fetched_twice(hub, monkeypatch):
    real = transfer.fetch

    def fetch(*args, **settings):
        hub.fail("params.npz", status=503, method="HEAD", times=99)
        return real(*args, **settings)

    monkeypatch.setattr("mistudio.hub.download.fetch", fetch)
    refused(r"trouble of its own \(503\)")
    monkeypatch.setattr("mistudio.hub.download.fetch", real)
    hub.faults.clear()
    assert get().path.read_bytes() == DATA
    assert bytes_sent(hub) == [0]


def test_no_network_is_reported_after_one_more_attempt(hub, slept, monkeypatch):
    closed = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", closed)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", closed + "/{repo_id}/resolve/{revision}/{filename}")
    refused(f"No connection to {closed}.*Check the network, HF_ENDPOINT.*--offline")
    assert slept == [1]


def test_a_server_that_is_no_hub_is_recognised(hub):
    hub.add(REPO, {FILE: DATA})
    hub.fail("params.npz", status=200, method="HEAD", headers={"ETag": '"abc"'})
    refused("does not seem to be a Hugging Face hub: see HF_ENDPOINT")


def test_an_etag_that_is_a_path_is_refused(hub):
    headers = {"ETag": '"../../../escape"', "X-Repo-Commit": "a" * 40, "X-Linked-Size": str(len(DATA))}
    hub.fail("params.npz", status=200, method="HEAD", headers=headers)
    refused("does not seem to be a Hugging Face hub")


def test_too_little_room_names_what_is_needed_and_what_is_free(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=0, free=1234))
    message = refused(f"needs {len(DATA):,} more bytes")
    assert "1,234" in message
    assert not bytes_sent(hub)


def test_a_partial_file_counts_as_room_already_taken(hub, tmp_path, monkeypatch):
    hub.cut("params.npz", after=50_000)
    hub.cut("params.npz", after=0, times=20)
    refused("No connection")
    hub.faults.clear()
    (partial,) = partials(tmp_path)
    left = len(DATA) - partial.stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=0, free=left))
    assert get().path.read_bytes() == DATA


def test_a_disk_that_fills_up_is_named_and_the_download_goes_on_later(hub, tmp_path, monkeypatch):
    real = file_download.http_get

    def filling(url, file, **settings):
        write, room = file.write, [60_000]

        def limited(data):
            room[0] -= len(data)
            if room[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(data)

        real(url, SimpleNamespace(write=limited, tell=file.tell, seek=file.seek, truncate=file.truncate), **settings)

    monkeypatch.setattr(transfer, "http_get", filling)
    refused("The disk is full.*blobs.*--folder.*goes on where it stopped")
    monkeypatch.setattr(transfer, "http_get", real)
    assert get().path.read_bytes() == DATA
    assert bytes_sent(hub)[1] > 0


def test_a_folder_that_may_not_be_written_is_named(hub, tmp_path):
    (tmp_path / "file").write_text("")
    refused("did not come whole|may not be written", folder=tmp_path / "file" / "x")


def test_a_damaged_record_is_named(hub, tmp_path):
    get(folder=tmp_path)
    record = tmp_path / REPO / ENTRY.path / "mistudio.json"
    record.write_text('{"format": "else"}')
    refused(f"Delete {record}", folder=tmp_path)
    (result,) = download_many([ENTRY], folder=tmp_path, progress=False)
    assert f"Delete {record}" in str(result.error)


def second_generation(config=None):
    arrays = {(n.lower() if n[0] == "W" else n): a for n, a in sound(640, F).items()}
    files = {f"{ENTRY_2.path}/params.safetensors": save(arrays)}
    return files | ({} if config is None else {f"{ENTRY_2.path}/config.json": config})


@pytest.mark.parametrize("folder", [None, "saes"])
def test_a_second_generation_file_comes_with_its_config_where_there_is_one(hub, tmp_path, folder):
    folder = None if folder is None else tmp_path / folder
    hub.add(REPO_2, second_generation())
    got = get(ENTRY_2, folder=folder)
    assert verify_file(got.path).d_sae == F
    assert not (got.path.parent / "config.json").exists()
    hub.add(REPO_2, second_generation(b'{"l0": 20}'))
    assert json.loads((get(ENTRY_2, folder=folder).path.parent / "config.json").read_text()) == {"l0": 20}


@pytest.mark.parametrize("config", [b"[1, 2]", b"not json", b"\xff\xfe"])
def test_a_config_that_is_none_is_refused_and_not_kept(hub, tmp_path, config):
    hub.add(REPO_2, second_generation(config))
    refused("is not kept", ENTRY_2, folder=tmp_path)
    assert not list(tmp_path.rglob("config.json"))


def test_several_downloads_go_on_after_failures_and_answer_in_order(hub):
    layers = (0, 1, 2, 3, 4)
    data = {entry(layer).path + "/params.npz": npz_bytes(sound(D, F, seed=layer)) for layer in layers}
    data[entry(2).path + "/params.npz"] = b"short"
    hub.add(REPO, data)
    wanted = [*map(entry, layers), entry(layer=9), "no-such-sae"]
    results = download_many(wanted, jobs=3, progress=False)
    assert [isinstance(r, Downloaded) for r in results] == [True, True, False, True, True, False, False]
    assert [r.entry if isinstance(r, Downloaded) else r.wanted for r in results] == wanted
    assert all(isinstance(r, Failure) and isinstance(r.error, HubError) for r in (results[2], results[5], results[6]))
    assert "cut short" in str(results[2].error)
    assert "has no file" in str(results[5].error)


def test_one_file_wanted_twice_is_downloaded_once(hub):
    first, second = download_many([ENTRY, ENTRY], jobs=2, progress=False)
    assert first == second
    assert len(bytes_sent(hub)) == 1


def test_files_that_do_not_fit_together_are_refused_before_the_first(hub, monkeypatch):
    hub.add(REPO, {entry(layer).path + "/params.npz": DATA for layer in range(3)})
    free = 2 * len(DATA) + 100
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, used=0, free=free))
    with pytest.raises(HubError, match="Files missing: 3; the download needs"):
        download_many(list(map(entry, range(3))), progress=False)
    assert not hub.requests
    assert len(download_many(list(map(entry, range(2))), progress=False)) == 2
    assert isinstance(download_many(list(map(entry, range(3))), progress=False)[2], Downloaded)


def test_an_interrupt_ends_the_other_transfers_and_keeps_their_bytes(hub, tmp_path, monkeypatch):
    """The first file's verification is interrupted while the second is on its way."""
    hub.add(REPO, {entry(0).path + "/params.npz": DATA, entry(1).path + "/params.npz": OTHER})
    on_its_way, interrupted = threading.Event(), threading.Event()
    real = transfer._TransferBar.update

    def update(bar, n):
        if "layer_1" in bar.label:
            on_its_way.set()
            interrupted.wait(5)
            while not bar.transfers.stopped.is_set():
                pass
        return real(bar, n)

    def interrupt(*_):
        on_its_way.wait(5)
        interrupted.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer._TransferBar, "update", update)
    monkeypatch.setattr("mistudio.hub.download.verify_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download_many([entry(0), entry(1)], jobs=2, progress=False)
    assert len(partials(tmp_path)) == 2


def test_progress_names_the_file_its_bytes_speed_and_time_left(hub, capsys, monkeypatch):
    monkeypatch.setattr("mistudio.progress.LINE_EVERY_S", 0.0)
    download(ENTRY)
    captured = capsys.readouterr()
    text = " ".join(captured.err.split())
    assert f"gemma-scope-2b-pt-res/{ENTRY.path}: 4,096 of {len(DATA):,} B," in text
    assert "/s, " in text
    assert "s left" in text
    assert not captured.out
    assert not capsys.readouterr().err


def test_a_terminal_sees_a_bar_for_each_file(hub, capsys, monkeypatch):
    real = transfer._TransferBar.update

    def update(bar, n):
        real(bar, n)
        bar.transfers.bars.refresh()

    monkeypatch.setattr(transfer._TransferBar, "update", update)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    hub.add(REPO, {entry(0).path + "/params.npz": DATA, entry(1).path + "/params.npz": DATA})
    assert all(isinstance(r, Downloaded) for r in download_many([entry(0), entry(1)], jobs=1))
    captured = capsys.readouterr()
    assert "layer_0/width_16k" in captured.err
    assert "8.2/157.9 kB" in captured.err
    assert not captured.out


def test_no_progress_says_nothing(hub, capsys, monkeypatch):
    monkeypatch.setattr("mistudio.progress.LINE_EVERY_S", 0.0)
    get()
    assert capsys.readouterr() == ("", "")


SCRIPT = """
import sys
from test_hub_download import ENTRY
from mistudio.errors import HubError
from mistudio.hub.download import download
try:
    print(download(ENTRY, progress=False).path)
except HubError as error:
    print(error)
"""


def run_apart(tmp_path, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = (
        inherited | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parent)} | environment
    )
    command = [sys.executable, "-c", SCRIPT]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_mirror_token_and_home_come_from_the_environment(tmp_path):
    with HubServer() as hub:
        hub.token = "hf_secret"
        hub.add(REPO, {FILE: DATA})
        path = Path(run_apart(tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret"))
        assert path.is_relative_to(tmp_path / "home" / "hub")
        assert path.read_bytes() == DATA


def test_verifying_takes_blocks_and_not_the_whole_file(tmp_path, monkeypatch):
    blocks = Npz.blocks
    monkeypatch.setattr(Npz, "blocks", lambda npz, name: blocks(npz, name, 2**16))
    path = tmp_path / "params.npz"
    path.write_bytes(npz_bytes(sound(D, 64)))
    largest = []
    real = np.isfinite
    monkeypatch.setattr(np, "isfinite", lambda block: largest.append(block.nbytes) or real(block))
    verify_file(path)
    assert max(largest) <= 2**16


def test_the_stand_in_answers_the_listings_that_the_client_asks_for(hub):
    api = huggingface_hub.HfApi(endpoint=hub.url)
    assert api.model_info(REPO).sha == hub.commit_id
    (file,) = api.list_repo_tree(REPO, recursive=True)
    assert (file.path, file.size, file.lfs.sha256) == (FILE, len(DATA), hashlib.sha256(DATA).hexdigest())
    assert api.list_repo_files(REPO) == [FILE]
