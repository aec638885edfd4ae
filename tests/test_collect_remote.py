"""Collecting to a URL: the same store as on disk, and an interruption anywhere is made good by the same command."""

from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

import mistudio.store.transfer
from mistudio.collect import CollectConfig, collect
from mistudio.errors import ConfigError, StoreError
from mistudio.lm import LanguageModel
from mistudio.store.mirror import Folder, Mirror
from mistudio.store.remote import Remote
from test_collect import cfg, lm, text  # noqa: F401 (fixtures)
from test_store import digest

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def empty_places(tmp_path, monkeypatch):
    monkeypatch.setenv("MISTUDIO_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").store.clear()
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def whole(cfg: CollectConfig, lm: LanguageModel, tmp_path: Path) -> dict[str, str]:  # noqa: F811
    collect(replace(cfg, out=tmp_path / "whole"), lm)
    return digest(tmp_path / "whole")


def copied(tmp_path: Path) -> dict[str, str]:
    remote = Remote(URL)
    for name in remote.sizes():
        path = tmp_path / "found" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(remote.read(name))
    return digest(tmp_path / "found")


class _KillError(Exception):
    pass


def test_a_store_collected_to_a_url_is_the_one_collected_to_a_disk(cfg, lm, whole, tmp_path):  # noqa: F811
    store = collect(replace(cfg, out=Path(URL)), lm)
    assert (store.place, store.rows) == (URL, cfg.tokens)
    assert copied(tmp_path) == whole
    assert not list((tmp_path / "cache" / "spool").iterdir())


@pytest.mark.parametrize("what", ["forward pass", "upload", "removal"])
def test_an_interrupted_one_goes_on(cfg, lm, whole, tmp_path, monkeypatch, what):  # noqa: F811
    left = iter(range(3))

    def dying(plain):
        def killed(*args, **kwargs):
            if next(left, None) is None:
                raise _KillError
            return plain(*args, **kwargs)

        return killed

    ask = replace(cfg, out=Path(URL), resume=True)
    with monkeypatch.context() as patch:
        if what == "forward pass":
            patch.setattr(lm, "run", dying(lm.run))
        elif what == "upload":
            patch.setattr(Remote, "put", dying(Remote.put))
        else:
            list(left)
            patch.setattr(mistudio.store.transfer, "remove", dying(None))
        with pytest.raises(_KillError):
            collect(ask, lm)
    assert collect(ask, lm).rows == cfg.tokens
    assert copied(tmp_path) == whole
    assert not list((tmp_path / "cache" / "spool").iterdir())
    assert collect(ask, lm).rows == cfg.tokens  # all is done: nothing is


def test_a_place_in_use_other_settings_and_an_append_are_refused(cfg, lm):  # noqa: F811
    ask = replace(cfg, out=Path(URL))
    collect(ask, lm)
    with pytest.raises(StoreError, match="memory://bucket/run is not empty"):
        collect(ask, lm)
    with pytest.raises(StoreError, match=r"held_out = 0\.25; this run wants 0\.5"):
        collect(replace(ask, resume=True, held_out=0.5), lm)
    with pytest.raises(StoreError, match="tokens = 700; this run wants 800"):
        collect(replace(ask, resume=True, tokens=800), lm)
    with pytest.raises(ConfigError, match="cannot be appended to"):
        collect(replace(ask, append=True), lm)


def test_every_kind_of_place_has_the_methods_a_store_needs():
    public = {name for name in vars(Folder) if not name.startswith("_")}
    assert public <= {name for name in vars(Mirror) if not name.startswith("_")}
