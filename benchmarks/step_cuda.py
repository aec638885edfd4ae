"""What a sparse training step costs on a CUDA GPU beside our own dense one, and beside the encoder product alone.

    python benchmarks/step_cuda.py [--size small|16k|131k|1m|all] [--rounds 10] [--json FILE]

The state is planted: rows are sums of about L0 decoder rows, and θ is set so that the measured L0 is the wanted one.
All start from that state. The dense step is `loss_and_gradients` through torch.compile, once in float32 and once
with TF32 products (the only ones that differ from float32 here), and then Adam as in every dense step; sparse is
`engine: sparse`, whose kernels are compiled by Triton on first use, which is not timed. The products are cuBLAS's, in
bfloat16 (what a sparse step could cost at best) and with TF32. Times are medians over rounds, one step after the other
so that large ones fit, by the GPU's own clock; the spread is printed. Memory is the most that is allocated at once,
weights and second moments included; a step that does not fit is said to be out of memory.

Nobody has run this yet: there was no GPU.
"""

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mistudio.sae import JumpReLUSAE, SAEConfig
from mistudio.train import TrainConfig, initial_sae
from mistudio.train import state as state_module
from mistudio.train.loss import loss_and_gradients
from mistudio.train.state import TrainState

LR = 1e-7
"""So small that the planted L0 stays."""


@dataclass(frozen=True)
class Size:
    """D, F, B and the wanted L0."""

    d_model: int
    d_sae: int
    rows: int = 4096
    l0: float = 70


SIZES = {
    "small": Size(512, 4096, 1024, 40),
    "16k": Size(2304, 16_384),
    "131k": Size(2304, 131_072),
    "1m": Size(2304, 1_048_576),
}


def planted(size: Size) -> tuple[JumpReLUSAE, Tensor, TrainConfig]:
    """An SAE and a batch, on the GPU, on which its mean L0 is about `size.l0`."""
    torch.manual_seed(0)
    cfg = TrainConfig(
        steps=1000, batch_rows=size.rows, sparsity_weight=1e-3, sparsity_warmup_steps=0, lr=LR, lr_warmup_steps=0,
        bandwidth=0.001, log_threshold=False,
    )  # fmt: skip
    sae = initial_sae(SAEConfig(d_model=size.d_model, d_sae=size.d_sae, scale=1.0), cfg).cuda()
    popularity = torch.rand(size.d_sae, device="cuda").pow(2) + 0.02  # a few features are frequent, most are rare
    x = torch.empty(size.rows, size.d_model, device="cuda")
    for chunk in x.split(64):
        picks = torch.multinomial(popularity.expand(len(chunk), -1), round(size.l0))
        amounts = 0.5 + torch.rand(picks.shape, device="cuda")
        chunk.copy_((amounts[..., None] * sae.W_dec.detach()[picks]).sum(1))
    x /= x.square().sum(1).mean().sqrt()
    some = torch.randperm(size.d_sae, device="cuda")[:8192]
    z = (x @ sae.W_enc.detach()[:, some]).flatten()
    kept = max(1, round(z.numel() * size.l0 / size.d_sae))
    with torch.no_grad():
        sae.theta.fill_(float(z.topk(kept).values[-1]))
    return sae, x, cfg


def stepper(sae: JumpReLUSAE, x: Tensor, cfg: TrainConfig, engine: str) -> Callable[[], None]:
    """A function that takes one step with that engine, on a copy of the SAE."""
    state = TrainState(copy.deepcopy(sae), replace(cfg, engine=engine))
    return lambda: state.update(x)


def products(sae: JumpReLUSAE, x: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """The encoder product in blocks of features whose output stays in the cache, as the sparse step makes it."""
    W, x = sae.W_enc.detach().T.to(dtype).contiguous(), x.to(dtype)

    def multiply() -> None:
        for block in W.split(8192):
            block @ x.T

    return multiply


def seconds_of(run: Callable[[], None]) -> float:
    """By the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def measure(size: Size, rounds: int) -> dict[str, object]:
    """Seconds, spread and peak bytes of each step that fits."""
    sae, x, cfg = planted(size)
    makers = {
        "sparse": lambda: stepper(sae, x, cfg, "sparse"),
        "dense float32": lambda: stepper(sae, x, cfg, "dense"),
        "dense TF32": lambda: stepper(sae, x, cfg, "dense"),
        "product bfloat16": lambda: products(sae, x, torch.bfloat16),
        "product TF32": lambda: products(sae, x, torch.float32),
    }
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    for name, make in makers.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            run = make()
            times = [timed(name, run) for _ in range(rounds + 3)]
            seconds[name], memory[name] = times[3:], torch.cuda.max_memory_allocated() - before
        except torch.OutOfMemoryError:
            print(f"  {name}: out of memory")
        run = None
        gc.collect()
        torch.cuda.empty_cache()
    l0 = float((sae.pre_activations(x[:64]) > sae.threshold).sum(1).double().mean())
    return {
        "D": size.d_model, "F": size.d_sae, "B": size.rows, "l0": l0,
        "seconds": {n: statistics.median(s) for n, s in seconds.items()},
        "spread": {n: [min(s), max(s)] for n, s in seconds.items()},
        "gigabytes": {n: b / 1e9 for n, b in memory.items()},
    }  # fmt: skip


def timed(name: str, run: Callable[[], None]) -> float:
    """Seconds of a run, with or without TF32 as its name says."""
    torch.set_float32_matmul_precision("high" if "TF32" in name else "highest")
    try:
        return seconds_of(run)
    finally:
        torch.set_float32_matmul_precision("highest")


def report(found: dict[str, object]) -> None:
    """Prints milliseconds and ratios."""
    seconds, spread = found["seconds"], found["spread"]
    print(f"D={found['D']} F={found['F']} B={found['B']} L0={found['l0']:.1f}")
    for name, s in seconds.items():
        low, high = spread[name]
        times = f"{1e3 * s:9.3f} ms ({1e3 * low:.3f}-{1e3 * high:.3f})"
        print(f"  {name:18s} {times}   this / sparse = {s / seconds['sparse']:.2f}")
    print("  peak memory, all told: " + ", ".join(f"{n} {g:.2f} GB" for n, g in found["gigabytes"].items()))


def main() -> None:
    """Prints the table; --json also keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all")
    parser.add_argument("--small", action="store_true", help="the same as --size small")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("step_cuda.py measures CUDA GPUs, and PyTorch sees none here.")
        sys.exit(0)  # `make bench` goes on
    state_module.loss_and_gradients = torch.compile(loss_and_gradients)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit}
    print(machine)
    results = {}
    for name in ["small"] if args.small else list(SIZES) if args.size == "all" else [args.size]:
        results[name] = measure(SIZES[name], args.rounds)
        report(results[name])
        gc.collect()
        torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps({**machine, "sizes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
