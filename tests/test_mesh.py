"""Training on several processes is training on one: gloo on this machine, features and rows split, both at once.

One launch of four processes does all of it, because starting them takes longer than what they do.
"""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import mesh_worker
from mesh_worker import RUNS, run, run_group
from mistudio import cli
from mistudio.errors import ConfigError, TrainError
from mistudio.mesh import SOLO, Mesh, MeshConfig
from mistudio.sae import model
from mistudio.train import initial_sae, sparse
from mistudio.train.checkpoint import feature_axis
from test_store import make

SHAPES = tuple(mesh_worker.ON)


def free_ports(count):
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in listening]
    for server in listening:
        server.close()
    return ports


@pytest.fixture(scope="module")
def solo(tmp_path_factory):
    """Every run on one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "CROSSOVER", mesh_worker.CROSSOVER)
        return _solo(tmp_path_factory)


def _solo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solo")
    for name in RUNS:
        run(name, folder / name)
    run_group(folder / "group")
    return folder


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """Every run on every mesh."""
    folder = tmp_path_factory.mktemp("meshes")
    make(folder / "store", rows=300, bucket_rows=100)
    command = [sys.executable, mesh_worker.__file__, folder, *map(str, free_ports(6))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def weights(folder):
    return load_file(folder / "sae.safetensors")


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder, expected):
    """The released weights and the metrics are the same but for rounding."""
    mine, theirs = weights(folder), weights(expected)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], atol=2e-4, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    for ours, wanted in zip(lines(folder), lines(expected), strict=True):
        assert ours == pytest.approx(wanted, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "name"),
    [(shape, name) for shape, names in mesh_worker.ON.items() for name in names],
)
def test_a_run_on_a_mesh_is_the_run_on_one_process(meshes, solo, shape, name):
    assert_same(meshes / shape / name, solo / name)


def test_the_runs_have_features_that_are_on_or_dead_and_change_from_dense_to_sparse(solo):
    for name in RUNS:
        assert all(0.3 < line["l0"] < 12 for line in lines(solo / name)), name
    entries = [line["l0"] / mesh_worker.F for line in lines(solo / "both")]
    assert entries[0] > mesh_worker.CROSSOVER > entries[-1]
    for name in ("topk", "aux", "aux-dense"):
        assert any(line["dead"] for line in lines(solo / name)), name  # so that AuxK has something to do


@pytest.mark.parametrize("shape", SHAPES)
def test_several_saes_share_a_mesh(meshes, solo, shape):
    for i in ("000", "001"):
        assert_same(meshes / shape / "group" / i, solo / "group" / i)


@pytest.mark.parametrize("shape", SHAPES)
def test_only_the_first_process_writes_records_and_each_feature_rank_its_part(meshes, solo, shape):
    checkpoints = sorted(p.name for p in (meshes / shape / "both" / "checkpoints").iterdir())
    last = "step-000000008"
    if shape == "rows":
        assert checkpoints == ["step-000000006.safetensors", f"{last}.safetensors"]
    else:
        assert checkpoints[3:] == [f"{last}.json", *(f"{last}.part-{i}-of-2.safetensors" for i in (0, 1))]
    record, alone = (json.loads((folder / "both" / "run.json").read_text()) for folder in (meshes / shape, solo))
    assert record["sae"] == alone["sae"]


@pytest.mark.parametrize("began", ["features", "rows", "grid"])
def test_a_run_that_began_on_a_mesh_goes_on_on_one_process(meshes, solo, tmp_path, began):
    shutil.copytree(meshes / began / "stopped", tmp_path / "run")
    assert not (tmp_path / "run" / "sae.json").exists()
    assert run("sparse", tmp_path / "run", resume=True).steps == 8
    assert_same(tmp_path / "run", solo / "sparse")


@pytest.mark.parametrize("began", ["from-1-on-4", "from-2-on-4"])
def test_a_run_goes_on_on_more_processes(meshes, solo, began):
    assert_same(meshes / began, solo / "sparse")
    assert len(list((meshes / began / "checkpoints").glob("step-000000008.part-*-of-4.safetensors"))) == 4


def test_a_checkpoint_without_its_list_of_parts_is_not_there(meshes, solo, tmp_path):
    """A process died after some parts were written: the run goes on from the checkpoint before."""
    shutil.copytree(meshes / "features" / "stopped", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-000000006.json").unlink()
    run("sparse", tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", solo / "sparse")
    names = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-000000006.safetensors", "step-000000008.safetensors"} | {
        f"step-000000006.part-{i}-of-2.safetensors" for i in (0, 1)
    }


def test_a_missing_part_is_named(meshes, tmp_path):
    shutil.copytree(meshes / "features" / "stopped", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-000000006.part-1-of-2.safetensors").unlink()
    with pytest.raises(TrainError, match=r"step-000000006\.json is damaged .*part-1-of-2.* Delete it to resume"):
        run("sparse", tmp_path / "run", resume=True)


def test_a_process_that_hangs_stops_the_others_with_a_sentence(meshes):
    said = (meshes / "said").read_text()
    assert "Process 0 of 2 has lost another one: it has ended, or did not answer for 1 s" in said
    assert "--resume" in said


def test_what_processes_do_not_share_is_refused(meshes):
    topk, batchtopk, resample, width = (meshes / "refused").read_text().splitlines()
    assert topk.startswith("topk ranks the features of a whole row, which are spread over 4 processes.")
    assert batchtopk.startswith("batchtopk ranks the features of a whole batch")
    assert resample.startswith("resample_every looks at all features")
    assert width.startswith("A width of 18 does not divide over 4 processes; take 16 or 20")


# --- one process


def test_on_one_process_every_collective_gives_back_what_it_was_given():
    t = torch.arange(4.0)
    for same in (SOLO.sum_features, SOLO.sum_rows, SOLO.mean_rows, SOLO.max_rows, SOLO.join_rows, SOLO.join_features):
        assert same(t) is t
    assert (SOLO.any(True), SOLO.any(False), SOLO.size, SOLO.first) == (True, False, 1, True)
    assert (SOLO.part(7), SOLO.rows_here(5)) == (slice(0, 7), 5)


def test_without_torchrun_the_mesh_is_one_process_or_says_how_to_start_more():
    assert Mesh.from_torchrun() is SOLO
    with pytest.raises(ConfigError, match=r"this is one process. Start 2 of them: torchrun --nproc-per-node 2"):
        Mesh.from_torchrun(features=2)
    with pytest.raises(ConfigError, match="at least 1 process holds features"):
        MeshConfig(features=0)
    with pytest.raises(ConfigError, match="does not divide over 3 replicas"):
        Mesh(rows=3).rows_here(16)


def test_features_that_do_not_divide_torchruns_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"mesh\.features is 3, which does not divide torchrun's 4 processes"):
        Mesh.from_torchrun(features=3)


@pytest.mark.parametrize("config", [mesh_worker.SAE, mesh_worker.TRANSCODER], ids=["sae", "transcoder"])
def test_the_parts_of_first_weights_are_those_of_the_whole(monkeypatch, config):
    monkeypatch.setattr(model, "DRAWN_AT_ONCE", 3)
    parts = [initial_sae(config, mesh_worker.CFG, Mesh(feature_rank=rank, features=4)) for rank in range(4)]
    assert [part.config.d_sae for part in parts] == [4] * 4
    for name, whole in initial_sae(config, mesh_worker.CFG).state_dict().items():
        axis = feature_axis(name)
        mine = [part.state_dict()[name] for part in parts]
        assert torch.equal(mine[1] if axis is None else torch.cat(mine, axis), whole)


# --- the command line


@pytest.fixture(scope="module")
def trained(meshes):
    """`mistudio train` on one process."""
    cli.main(["train", *mesh_worker.flags(meshes), "--out", str(meshes / "cli-on-1")])
    return meshes / "cli-on-1"


def test_the_command_line_splits_features_and_rows(meshes, trained):
    assert_same(meshes / "cli", trained)


def test_torchrun_starts_processes_and_one_of_them_speaks(meshes, trained):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mistudio", "train"]
    done = subprocess.run(
        [*command, *mesh_worker.flags(meshes), "--out", str(meshes / "torchrun"), "--mesh.features", "2", "--json"],
        capture_output=True, text=True, timeout=100, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 6
    assert_same(meshes / "torchrun", trained)
