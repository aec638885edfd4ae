"""A store in a repository of a Hugging Face hub: the same bits as from the disk."""

import json
import re
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfFileSystem

from hub_server import Handler, HubServer, git_hash
from mistudio.errors import StoreError
from mistudio.store import Store, remote, stores_in
from test_store import A, digest, make


class Files(Handler):
    """What `HfFileSystem` asks for besides: details of paths, and ranges with an end."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", unquote(urlsplit(self.path).path))
        if match is None:
            return self.send(404)
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        if (found := self.commit(*match.groups())) is None:
            return None
        files = {path: found[1][path] for path in paths if path in found[1]}
        entries = [{"type": "file", "path": p, "size": len(d), "oid": git_hash(d)} for p, d in files.items()]
        return self.send_json(entries)

    def send_file(self, data, headers, fault):
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or fault.cut_after is not None:
            return super().send_file(data, headers, fault)
        start, end = int(match[1]), min(int(match[2]) + 1, len(data))
        return self.send(206, data[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("MISTUDIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAITS_S", (0, 0))
    monkeypatch.setattr(remote, "PIECE_BYTES", 300)
    with HubServer(large=10**9) as server:
        server.http.RequestHandlerClass = type("Files", (Files,), {"hub": server})
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        HfFileSystem.clear_instance_cache()
        yield server
    HfFileSystem.clear_instance_cache()


def test_a_store_on_a_hub_feeds_the_same_bits(hub, tmp_path):
    local = make(tmp_path / "s", rows=60, bucket_rows=30)
    files = {f"one/{name}": (local.path / name).read_bytes() for name in digest(local.path)}
    hub.add("someone/stores", files)
    far = Store.open("hf://someone/stores/one")
    feed, same = far.feed(A, 25, seed=1), local.feed(A, 25, seed=1)
    assert all(torch.equal(next(feed), next(same)) for _ in range(5))
    (found,) = stores_in("hf://someone/stores")
    assert (found.path, found.state, found.rows) == ("hf://someone/stores/one", "finished", 60)


def test_a_missing_store_on_a_hub_is_one_sentence(hub):
    hub.add("someone/stores", {"x": b"1"})
    with pytest.raises(StoreError, match="no activation store at hf://someone/stores/one"):
        Store.open("hf://someone/stores/one")
