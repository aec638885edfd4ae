"""What the processes of tests/test_mesh.py do; and the runs, so that the test can make them on one process too.

python tests/mesh_worker.py FOLDER PORT...      # 6 free ports; FOLDER/store is there; exit code 0 or 1
"""

import multiprocessing
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from mistudio import cli
from mistudio.errors import MistudioError, TrainError
from mistudio.mesh import SOLO, Mesh
from mistudio.sae import SAEConfig, TranscoderConfig
from mistudio.train import TrainConfig, initial_sae, sparse, train
from tiny_training import Source, normal_rows

D, F, B = 6, 16, 24
CFG = TrainConfig(
    steps=8,
    batch_rows=B,
    sparsity_weight=0.3,
    sparsity_warmup_steps=4,
    lr=1e-2,
    lr_warmup_steps=0,
    adam_eps=1e-3,  # with a small one Adam makes much of rounding
    bandwidth=0.2,
    threshold_init=0.3,
    log_threshold=False,
    b_dec_init="mean",
    dead_after_rows=3 * B,
    log_every=5,
    checkpoint_every=3,
    engine="sparse",
)
TARGET = {"target_l0": 3.0, "sparsity_weight": 1.0}
RUNS = {
    "dense": replace(CFG, engine="dense"),
    "dense-mean": replace(CFG, engine="dense", sparsity="target_mean_l0", beta1=0.8, **TARGET),
    "sparse": CFG,
    "sparse-mean": replace(CFG, sparsity="target_mean_l0", frequency_weight=0.2, beta1=0.8, **TARGET),
    "sparse-token": replace(CFG, sparsity="target_token_l0", log_threshold=True, **TARGET),
    "both": replace(
        CFG, engine="auto", threshold_init=0.101, sparsity_weight=30.0, lr=0.05, b_dec_init="zero", log_every=1
    ),
    "relu": replace(CFG, architecture="relu", sparsity="l1"),
    "relu-dense": replace(CFG, architecture="relu", sparsity="l1", engine="dense"),
    "clip": replace(CFG, clip_norm=0.3),
    "clip-dense": replace(CFG, clip_norm=0.3, engine="dense"),
    "prefixes": replace(CFG, prefixes=(0.25, 0.75)),
    "prefixes-dense": replace(CFG, prefixes=(0.25, 0.75), engine="dense"),
    "blocks": replace(CFG, prefixes=(0.25,), engine="dense", micro_features=3, sparsity="target_mean_l0", **TARGET),
    "topk": replace(CFG, architecture="topk", k=2, aux_k=2, sparsity_weight=0.0, dead_after_rows=2),
    "aux": replace(CFG, aux_k=2, aux_weight=1.0, dead_after_rows=1, aux_part=0.125, prefixes=(0.25,)),
    "aux-dense": replace(CFG, aux_k=2, aux_weight=1.0, dead_after_rows=1, engine="dense"),
    "transcoder": replace(CFG, b_dec_init="zero"),
}
CROSSOVER = 0.3
"""One that the run "both" crosses."""
ON_ONE_AXIS = ("dense-mean", "sparse-mean", "sparse-token", "both", "relu", "aux")
ON = {"features": ON_ONE_AXIS, "rows": (*ON_ONE_AXIS, "topk"), "grid": tuple(name for name in RUNS if name != "topk")}
"""Which runs are made on which mesh: all on one of them."""
SAE = SAEConfig(d_model=D, d_sae=F, scale=2.0, hook_name="layers.1.resid_post", hook_layer=1)
TRANSCODER = TranscoderConfig(d_model=D, d_sae=F, d_out=4, scale=2.0, scale_out=1.0, skip=True)


def rows_here(mesh, pairs=False, **options):
    """The rows of every batch that belong to this process: x, or (x, y) for the transcoder."""
    rows = B // mesh.rows
    mine = slice(mesh.row_rank * rows, (mesh.row_rank + 1) * rows)

    def batch(place):
        x = normal_rows(place, B, D)[mine]
        return (x, x[:, :4].square()) if pairs else x

    return Source(batch, **options)


def run(name, folder, mesh=SOLO, fail_at=None, resume=False):
    """One of RUNS."""
    cfg, pairs = RUNS[name], name == "transcoder"
    sae = initial_sae(TRANSCODER if pairs else SAE, cfg, mesh)
    return train(sae, rows_here(mesh, pairs, fail_at=fail_at), cfg, folder=folder, mesh=mesh, resume=resume)


def run_group(folder, mesh=SOLO):
    """Two SAEs on one stream."""
    cfgs = [RUNS["sparse"], RUNS["dense-mean"]]
    return train([initial_sae(SAE, cfg, mesh) for cfg in cfgs], rows_here(mesh), cfgs, folder=folder, mesh=mesh)


def stopped(name, folder, mesh):
    """A run that dies after its checkpoint of step 6."""
    try:
        run(name, folder, mesh, fail_at=7)
    except RuntimeError:
        return


def refused(mesh):
    """SAEs and configurations that several processes do not share."""
    topk = replace(CFG, architecture="topk", k=3, sparsity_weight=0.0)
    batchtopk = replace(topk, architecture="batchtopk")
    cfgs = [topk, batchtopk, replace(CFG, resample_every=5)]
    return [(initial_sae(SAE, cfg, mesh), cfg) for cfg in cfgs]


def message_of(function, *given, **options):
    """What a call that is refused says."""
    try:
        function(*given, **options)
    except MistudioError as error:
        return str(error)
    return "not refused"


def flags(folder):
    """Of a run of `mistudio train` on the store in `folder`."""
    own = {"store": folder / "store", "site": "layers.3.resid_post", "width": 8}
    numbers = {"steps": 6, "batch-rows": 32, "adam-eps": 0.001, "engine": "dense"}
    return [str(part) for name, value in own.items() for part in (f"--{name}", value)] + [
        str(part) for name, value in numbers.items() for part in (f"--train.{name}", value)
    ]


def set_environment(rank, size, port):
    """As torchrun does."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def mesh_of(rank, size, features, port, timeout_s=60.0):
    """The mesh that torchrun would have started."""
    set_environment(rank, size, port)
    return Mesh.from_torchrun(features=features, timeout_s=timeout_s)


def worker(rank, ports, folder, said):
    """One of four processes; they form one mesh after another."""
    ports = iter(ports)
    for shape, size, features in (("features", 2, 2), ("rows", 2, 1), ("grid", 4, 2)):
        port = next(ports)
        if rank < size:
            with mesh_of(rank, size, features, port) as mesh:
                for name in ON[shape]:
                    run(name, folder / shape / name, mesh)
                run_group(folder / shape / "group", mesh)
                stopped("sparse", folder / shape / "stopped", mesh)
    set_environment(rank, 4, next(ports))
    cli.main(["train", *flags(folder), "--out", str(folder / "cli"), "--mesh.features", "2"])
    with mesh_of(rank, 4, 4, next(ports)) as mesh:
        if mesh.first:
            shutil.copytree(folder / "features" / "stopped", folder / "from-2-on-4")
        mesh.barrier()
        run("sparse", folder / "from-1-on-4", mesh, resume=True)
        run("sparse", folder / "from-2-on-4", mesh, resume=True)
        messages = [message_of(train, sae, [], cfg, mesh=mesh) for sae, cfg in refused(mesh)]
        messages.append(message_of(initial_sae, replace(SAE, d_sae=18), CFG, mesh))
        if mesh.first:
            (folder / "refused").write_text("\n".join(messages))
    port = next(ports)
    if rank < 2:
        _lose_one(rank, port, folder, said)


def _lose_one(rank, port, folder, said):
    """Process 1 hangs, then is gone; what process 0 says of it."""
    with mesh_of(rank, 2, 2, port, timeout_s=1.0) as mesh:
        if rank == 1:
            said.wait()
            os._exit(0)
        try:
            mesh.barrier()
        except TrainError as error:
            (folder / "said").write_text(str(error))
        said.set()


def main(folder, *ports):
    """Four forked processes, so that all is imported and compiled kernels are loaded once; how many of them failed."""
    torch.set_num_threads(1)
    sparse.CROSSOVER = CROSSOVER
    os.fsync = lambda descriptor: None
    stopped("sparse", folder / "from-1-on-4", SOLO)
    context = multiprocessing.get_context("fork")
    said = context.Event()
    processes = [context.Process(target=worker, args=(rank, ports, folder, said)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    ends = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return sum(end != 0 for end in ends)


if __name__ == "__main__":
    sys.exit(min(1, main(Path(sys.argv[1]), *sys.argv[2:])))
