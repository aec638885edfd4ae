"""Collection through Ray: the store of a single process, byte for byte, whichever workers die and if this one does."""

import logging
import os
import random
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import mistudio.collect
from mistudio import cluster
from mistudio.cluster import ClusterConfig, Worker, collect_with_ray
from mistudio.collect import CollectConfig, collect
from mistudio.errors import ConfigError, StoreError
from mistudio.studio import collect_verb
from test_store import digest
from tiny_models import tiny_gemma2, tiny_tokenizer

HOW = ClusterConfig(workers=3, slice_tokens=128)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> CollectConfig:
    folder = tmp_path_factory.mktemp("cluster")
    text = folder / "pages.txt"
    text.write_text("\n\n".join(f"Page {n}: " + "the hen had a hat. " * (1 + n % 4) for n in range(80)))
    tiny_gemma2().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return CollectConfig(
        sites=("layers.1.resid_post", "layers.0.attn_z"),
        tokens=1500,
        out=folder / "whole",
        model=str(folder / "model"),
        text=str(text),
        separator="blank-line",
        held_out=0.25,
        context=16,
        lm_batch_rows=4,
        bucket_rows=400,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(cfg) -> dict[str, str]:
    """The files of the store that a single process makes."""
    return digest(collect(cfg).path)


# ---- every order of events, with Ray played by one process


class _ActorDiedError(Exception):
    pass


class _TaskError(Exception):
    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


class FakeRay:
    """The few functions of Ray that are used. Things happen in an order drawn from a seed; some workers die.

    `dies(calls)` says, for the calls that workers have answered, whether the worker that answers next dies instead;
    what it was reading is half written.
    """

    exceptions = SimpleNamespace(RayActorError=_ActorDiedError, RayTaskError=_TaskError)

    def __init__(self, seed: int, dies):
        self._draw, self._dies = random.Random(seed), dies
        self.calls, self.running = 0, 0

    def is_initialized(self) -> bool:
        return True

    def remote(self, **options):
        assert options == {"num_cpus": 1, "num_gpus": 0}
        return lambda cls: SimpleNamespace(remote=lambda *arguments: self._actor(cls(*arguments)))

    def _actor(self, worker: Worker):
        self.running += 1
        queue = []

        def method(name: str):
            def call(*arguments):
                queue.append(SimpleNamespace(queue=queue, worker=worker, name=name, arguments=arguments))
                return _Ref(queue[-1])

            return SimpleNamespace(remote=call)

        return SimpleNamespace(hello=method("hello"), read=method("read"))

    def wait(self, refs, timeout):
        first = [ref for ref in refs if ref.call.queue[0] is ref.call]  # a worker takes one thing after the other
        return [self._draw.choice(first)], []

    def get(self, ref):
        call = ref.call
        self.calls += 1
        if self._dies(self.calls):
            self.running -= 1
            if call.name == "read":
                call.arguments[0].mkdir(parents=True, exist_ok=True)
                (call.arguments[0] / "progress.json").write_text("{")
            raise _ActorDiedError("The actor died.\nThe worker process was killed.")
        call.queue.pop(0)
        try:
            return vars(Worker)[call.name](call.worker, *call.arguments)
        except StoreError as error:
            raise _TaskError(error) from error

    def kill(self, actor) -> None:
        self.running -= 1


class _Ref:
    def __init__(self, call):
        self.call = call


def play(monkeypatch, seed: int = 0, dies=lambda calls: False) -> FakeRay:
    ray = FakeRay(seed, dies)
    monkeypatch.setattr(cluster, "_ray", lambda: ray)
    return ray


@pytest.mark.parametrize("seed", range(5))
def test_whoever_reads_what_and_dies_when_the_store_is_that_of_a_single_process(cfg, whole, monkeypatch, seed):
    draw = random.Random(100 + seed)
    ray = play(monkeypatch, seed, lambda calls: draw.random() < 0.1)
    out = cfg.out.with_name(f"played{seed}")
    store = collect_with_ray(replace(cfg, out=out), HOW)
    assert store.rows == 1500
    assert digest(out) == whole
    assert ray.running == 0
    assert not out.with_name(f"{out.name}.slices").exists()


@pytest.mark.parametrize("changes", [{"packing": "none"}, {"row_dtype": "int8"}, {"tokens": 10**6}, {"documents": 7}])
def test_every_kind_of_collection_is_that_of_a_single_process(cfg, monkeypatch, tmp_path, changes):
    cfg = replace(cfg, **changes, bucket_rows=10**6)
    alone = collect(replace(cfg, out=tmp_path / "alone"))
    play(monkeypatch)
    collect_with_ray(replace(cfg, out=tmp_path / "many"), HOW)
    assert digest(tmp_path / "many") == digest(alone.path)


def test_a_collection_that_was_cut_short_goes_on_and_keeps_complete_slices(cfg, whole, monkeypatch):
    out = cfg.out.with_name("resumed")
    write = mistudio.collect._Record.__call__
    written = []

    def cut_short(record, piece):
        if len(written) == 12:
            raise KeyboardInterrupt
        written.append(piece)
        write(record, piece)
        record.writer.checkpoint(record.cursor)

    first = play(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(mistudio.collect._Record, "__call__", cut_short)
        with pytest.raises(KeyboardInterrupt):
            collect_with_ray(replace(cfg, out=out), HOW)
    assert first.running == 0
    kept = {path: path.stat().st_mtime_ns for path in out.with_name("resumed.slices").glob("*/manifest.json")}
    assert kept
    taken = []
    rows = cluster.Fleet._rows
    monkeypatch.setattr(
        cluster.Fleet, "_rows", lambda fleet, some: taken.append(stamp(some.folder)) or rows(fleet, some)
    )
    play(monkeypatch, seed=1)
    options = {"out": out, "resume": True, "engine": "ray", "workers": 3, "slice_tokens": 128}
    assert collect_verb.run(collect_verb.Config(**{**vars(cfg), **options})).rows == 1500
    assert digest(out) == whole
    assert set(kept.values()) & set(taken)


def stamp(folder: Path) -> int:
    return (folder / "manifest.json").stat().st_mtime_ns


def test_either_engine_goes_on_with_what_the_other_began(cfg, whole, monkeypatch):
    out = cfg.out.with_name("other_engine")
    left = iter(range(5))
    read = mistudio.collect.read_rows

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return read(*arguments)

    monkeypatch.setattr(mistudio.collect, "CHECKPOINT_EVERY_S", 0.0)
    monkeypatch.setattr(mistudio.collect, "read_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(replace(cfg, out=out))
    play(monkeypatch)
    collect_with_ray(replace(cfg, out=out, resume=True), HOW)
    assert digest(out) == whole


def test_workers_that_only_die_end_the_collection_in_a_sentence(cfg, monkeypatch, tmp_path):
    ray = play(monkeypatch, dies=lambda calls: calls > 3)
    with pytest.raises(StoreError, match=r"4 workers died and no slice came of it; .* was killed\. .*--resume"):
        collect_with_ray(replace(cfg, out=tmp_path / "s"), HOW)
    assert ray.running == 0


def test_an_error_of_a_workers_model_is_said_as_one_of_ones_own(cfg, monkeypatch, tmp_path):
    play(monkeypatch)

    def infinite(lm, sites, batch):
        return {site: values / 0 for site, values in mistudio.collect.read_rows(lm, sites, batch).items()}

    monkeypatch.setattr(cluster, "read_rows", infinite)
    with pytest.raises(StoreError, match="NaN or infinite values"):
        collect_with_ray(replace(cfg, out=tmp_path / "s"), HOW)


def test_slices_that_are_not_seen_here_are_told_from_a_death(cfg, monkeypatch, tmp_path):
    play(monkeypatch)
    monkeypatch.setattr(Worker, "read", lambda *arguments: None)
    with pytest.raises(StoreError, match="on a disk that this machine and all workers share"):
        collect_with_ray(replace(cfg, out=tmp_path / "s"), HOW)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "not an address"])
def test_a_cluster_that_is_not_there_is_said_at_once(cfg, tmp_path, address):
    pytest.importorskip("ray", reason="needs the extra: pip install 'mistudio[ray]'")
    with pytest.raises(ConfigError, match="There is no Ray cluster at"):
        collect_with_ray(replace(cfg, out=tmp_path / "s"), replace(HOW, address=address))


def test_without_ray_the_extra_is_named(cfg, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'mistudio\[ray\]'"):
        collect_with_ray(replace(cfg, out=tmp_path / "s"), HOW)


def test_what_ray_cannot_do_is_said(cfg):
    with pytest.raises(ConfigError, match=r"is a URL; with --engine ray .*mistudio store copy"):
        collect_with_ray(replace(cfg, out="s3://bucket/store"), HOW)
    with pytest.raises(ConfigError, match="workers = 0"):
        ClusterConfig(workers=0)


# ---- with Ray itself


@pytest.fixture
def local_ray(monkeypatch):
    """Two workers' room; as `collect_with_ray` would start it, with less memory."""
    ray = pytest.importorskip("ray", reason="needs the extra: pip install 'mistudio[ray]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    settings = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", _node_ip_address="127.0.0.1", num_cpus=2, object_store_memory=80 << 20, **settings)
    yield
    ray.shutdown()


class Killer(logging.Handler):
    """Kills the worker that is given the second slice."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.said, self._given = [], 0

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
        if found := re.search(r"slice \d+ goes to process (\d+)", self.said[-1]):
            self._given += 1
            if self._given == 2:
                os.kill(int(found[1]), signal.SIGKILL)


def test_two_workers_one_of_them_killed_make_the_store_of_a_single_process(cfg, whole, monkeypatch, local_ray):
    logger = logging.getLogger("mistudio.cluster")
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    monkeypatch.setattr(logger, "handlers", [killer := Killer()])
    out = cfg.out.with_name("ray")
    collect_with_ray(replace(cfg, out=out), replace(HOW, workers=2))
    assert sum("a worker died" in said for said in killer.said) == 1
    assert digest(out) == whole
