"""What a sparse training step costs and needs against the number of features, at a fixed L0.

    python benchmarks/width.py [--small] [--widths 16384 65536 …] [--rows 2048] [--rounds 3] [--threads N] [--json FILE]

L0 ≈ 70, D = 2304. Every width is a process of its own: seconds are medians of steps after one that is not counted;
memory is the most that was resident during a step beyond the empty process, beside what `sparse_bytes` counts. The
dense trainer's bytes are weights, gradients and Adam's two moments in float32, without its activations. A width that
the machine's free memory is too small for is said to be so before anything is made.

At the end the plan of 2^20 features on one GPU with 80 GB: the bytes counted, not measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peers.step import peak_bytes
from step import machine

D_MODEL, L0 = 2304, 70.0
WIDTHS = (16_384, 32_768, 65_536, 131_072, 262_144, 393_216)
SMALL = ((512, 2048), (512, 8192))
SAMPLE_ENTRIES = 1 << 24
"""Entries of z from which the threshold is taken."""
ENTRY_BYTES = 3 * (4 + 4) + 4
"""Of an entry: value and index by feature and by row, both once more while they are sorted; its place (int32)."""


@dataclass(frozen=True)
class Plan:
    """What a training step holds, in bytes."""

    weights: int
    moments: int
    gradients: int
    rounded: int
    batch: int
    entries: int
    block: int
    vectors: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(vars(self).values())


def sparse_bytes(D: int, F: int, B: int, l0: float, gpu: bool = False) -> Plan:
    """Our sparse step: float32 weights and second moments, on a GPU a bfloat16 copy of W_enc, and what a batch takes.

    No first moment (β₁ = 0), no gradients of weights: a feature's are made, used and dropped while its rows are in
    cache. Entries: twice the L0 are allowed for, since those in the kernel window count too. Vectors: nine numbers for
    each feature (biases, thresholds, their moments, clocks and counters, some of 8 bytes), and the vectors that a step
    makes (sums, bounds, prices: sixteen numbers).
    """
    matrix = 4 * D * F
    return Plan(
        weights=2 * matrix,
        moments=2 * matrix,
        gradients=0,
        rounded=matrix // 2 if gpu else 0,  # a CPU rounds block by block
        batch=B * D * (4 + 2 + 4),  # x, its bfloat16 copy, the residual
        entries=round(2 * B * l0 * ENTRY_BYTES),
        block=2 * max(128 * B, 1 << 22),  # one block of the encoder product, bfloat16
        vectors=F * (9 * 6 + 16 * 4),
    )


def dense_bytes(D: int, F: int) -> int:
    """Any dense float32 trainer with Adam: weights, gradients and two moments; its [B, F] tensors come on top."""
    return 4 * (2 * D * F) * 4


def planted_cheaply(D: int, F: int, B: int, l0: float):
    """(SAE, batch) whose L0 is about `l0`: rows are sums of decoder rows, θ is the quantile of a sample of z."""
    from mistudio.sae import SAEConfig
    from mistudio.train import TrainConfig, initial_sae

    cfg = TrainConfig(
        steps=1000, batch_rows=B, sparsity_weight=1e-3, sparsity_warmup_steps=0, lr=1e-7, lr_warmup_steps=0,
        bandwidth=0.001, log_threshold=False, engine="sparse",
    )  # fmt: skip
    sae = initial_sae(SAEConfig(d_model=D, d_sae=F, scale=1.0), cfg)
    generator = torch.Generator().manual_seed(1)
    popularity = (torch.rand(F, generator=generator).pow(2) + 0.02).double().cumsum(0)
    draws = torch.rand(B, round(l0), generator=generator, dtype=torch.float64) * popularity[-1]
    picks = torch.searchsorted(popularity, draws).clamp_(max=F - 1)
    strength = 0.5 + torch.rand(picks.shape, generator=generator)
    with torch.no_grad():
        x = torch.nn.functional.embedding_bag(picks, sae.W_dec, per_sample_weights=strength, mode="sum")
        x /= x.square().sum(1).mean().sqrt()
        some = x[: max(8, min(B, SAMPLE_ENTRIES // F))]
        z = (some @ sae.W_enc).flatten()
        sae.theta.fill_(float(z.kthvalue(round(z.numel() * (1 - l0 / F))).values))
    return sae, x, cfg


def load_kernels() -> None:
    """Takes a tiny step, so that loading and compiling kernels does not count as a step's memory."""
    from mistudio.train.state import TrainState

    sae, x, cfg = planted_cheaply(16, 64, 8, 4.0)
    TrainState(sae, cfg).update(x)


def child(D: int, F: int, B: int, rounds: int) -> dict[str, object]:
    """Seconds of steps, the peak beyond the empty process, the L0 of the last step; in a process of its own."""
    from mistudio.train.state import TrainState

    load_kernels()
    before = peak_bytes(reset=True)
    sae, x, cfg = planted_cheaply(D, F, B, L0 if F >= 4096 else 30.0)
    state = TrainState(sae, cfg)
    state.update(x)
    making = peak_bytes() - before
    peak_bytes(reset=True)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        state.update(x)
        seconds.append(time.perf_counter() - start)
    step = peak_bytes() - before
    return {"D": D, "F": F, "B": B, "seconds": seconds, "bytes": step, "making": making, "l0": state.metrics()["l0"]}


def available_bytes() -> int:
    """What the machine has left (Linux)."""
    (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    return int(line.split()[1]) * 1024


def ask(D: int, F: int, B: int, rounds: int) -> dict | None:
    """A width's answer, or None where it does not fit, which is said."""
    needed, free = sparse_bytes(D, F, B, L0).total, available_bytes()
    if needed > 0.95 * free:
        print(f"  {F:9,d}  does not fit: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
        return None
    command = [sys.executable, __file__, "--child", f"{D},{F}", "--rows", str(B), "--rounds", str(rounds)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        print(f"  {F:9,d}  failed: {(answer.stderr.strip().splitlines() or ['killed, out of memory'])[-1]}")
        return None
    return json.loads(answer.stdout.splitlines()[-1])


def row(found: dict) -> str:
    """A line of the table."""
    D, F, B, seconds = found["D"], found["F"], found["B"], statistics.median(found["seconds"])
    plan, dense = sparse_bytes(D, F, B, L0).total, dense_bytes(D, F)
    return (
        f"  {F:9,d}  {seconds:7.3f} s ({min(found['seconds']):.3f}-{max(found['seconds']):.3f})  "
        f"{seconds / B * 1e6:8.1f}  {seconds / B / F * 1e12:8.2f}  {found['l0']:6.1f}  "
        f"{found['bytes'] / 1e9:6.2f}  {plan / 1e9:6.2f}  {dense / 1e9:6.2f}"
    )


def print_plan(D: int, F: int, B: int, gigabytes: float) -> None:
    """The bytes of a width on a device."""
    plan = sparse_bytes(D, F, B, L0, gpu=True)
    print(f"Plan: {F:,d} x {D} with batches of {B:,d} on {gigabytes:g} GB (counted)")
    for name, size in vars(plan).items():
        print(f"  {name:10s} {size / 1e9:7.2f} GB")
    fits = "fits" if plan.total < gigabytes * 1e9 else "DOES NOT FIT"
    dense = dense_bytes(D, F)
    print(f"  total      {plan.total / 1e9:7.2f} GB: {fits}; a dense trainer {dense / 1e9:.1f} GB before activations")


def main() -> None:
    """Prints the table and the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two narrow widths, seconds")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if threads := args.threads or int(os.environ.get("BENCH_THREADS", "0")):
        torch.set_num_threads(threads)
        os.environ["BENCH_THREADS"] = str(threads)
    if args.child:
        D, F = map(int, args.child.split(","))
        print(json.dumps(child(D, F, args.rows, args.rounds)))
        return
    shapes = SMALL if args.small else [(D_MODEL, F) for F in args.widths]
    B = 256 if args.small else args.rows
    print(machine(), flush=True)
    print(f"D={shapes[0][0]} B={B} L0 about {L0:g}; GB: measured, counted, and a dense trainer's without activations")
    print("   features  a step               us/row  ps/row/feature   L0   GB measured, counted, dense")
    results = []
    for D, F in shapes:
        found = ask(D, F, B, args.rounds)
        if found:
            results.append(found)
            print(row(found), flush=True)
    print_plan(D_MODEL, 1 << 20, 4096, 80.0)
    if args.json:
        args.json.write_text(json.dumps({**machine(), "widths": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
