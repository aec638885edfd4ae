"""What a sparse training step costs beside our own dense one and beside its floor, the encoder product alone.

    python benchmarks/step.py [--size small|demo|16k|64k|all] [--rounds 5] [--threads N] [--json FILE] [--crossover]

The state is planted: rows are sums of about L0 decoder rows, and θ is set so that the measured L0 is the wanted one.
Both steps start from that state. Times are medians over rounds in which the dense step, the sparse step and the
products take turns, so that a change of the machine's speed meets all of them; the spread is printed. Memory is what a
step adds to the resident size at its peak, on top of what lasts: weights, second moments, the bfloat16 copy.
"""

import argparse
import copy
import dataclasses
import json
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mistudio.sae import JumpReLUSAE, SAEConfig
from mistudio.train import TrainConfig, initial_sae
from mistudio.train.state import TrainState

BANDWIDTH = 0.001
LR = 1e-7
"""So small that the planted L0 stays."""


@dataclass(frozen=True)
class Size:
    """D, F, B and the wanted L0."""

    d_model: int
    d_sae: int
    rows: int
    l0: float
    dense: bool = True
    """Whether the dense step is timed too."""


SIZES = {
    "small": Size(512, 4096, 1024, 40),
    "demo": Size(192, 1536, 2048, 30),
    "16k": Size(2304, 16_384, 4096, 70),
    "64k": Size(2304, 65_536, 2048, 70, dense=False),
}


def planted(size: Size) -> tuple[JumpReLUSAE, Tensor, TrainConfig]:
    """An SAE and a batch on which its mean L0 is `size.l0`."""
    torch.manual_seed(0)
    cfg = TrainConfig(
        steps=1000, batch_rows=size.rows, sparsity_weight=1e-3, sparsity_warmup_steps=0, lr=LR, lr_warmup_steps=0,
        bandwidth=BANDWIDTH, log_threshold=False,
    )  # fmt: skip
    sae = initial_sae(SAEConfig(d_model=size.d_model, d_sae=size.d_sae, scale=1.0), cfg)
    popularity = torch.rand(size.d_sae).pow(2) + 0.02  # a few features are frequent, most are rare
    x = torch.empty(size.rows, size.d_model)
    for chunk in x.split(256):
        picks = torch.multinomial(popularity.expand(len(chunk), -1), round(size.l0))
        f = torch.zeros(len(chunk), size.d_sae).scatter_(1, picks, 0.5 + torch.rand(picks.shape))
        chunk.copy_(f @ sae.W_dec.detach())
    x /= x.square().sum(1).mean().sqrt()
    some = x[:: max(1, size.rows // 256)]
    z = sae.pre_activations(some).detach().flatten()
    theta = z.kthvalue(round(z.numel() * (1 - size.l0 / size.d_sae))).values
    with torch.no_grad():
        sae.theta.fill_(float(theta))
    return sae, x, cfg


def product(x: Tensor, W: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """The encoder product in blocks whose outputs stay in cache, as the sparse step makes it."""
    x, W = x.to(dtype), W.to(dtype)
    width = max(128, (1 << 22) // len(x))

    def multiply() -> None:
        for first in range(0, len(W), width):
            W[first : first + width] @ x.T

    return multiply


def stepper(sae: JumpReLUSAE, x: Tensor, cfg: TrainConfig, engine: str) -> Callable[[], None]:
    """A function that takes one step with that engine, on a copy of the SAE."""
    settings = {**cfg.__dict__, "engine": engine}
    state = TrainState(copy.deepcopy(sae), TrainConfig(**settings))
    return lambda: state.update(x)


def measure(size: Size, rounds: int) -> dict[str, object]:
    """Seconds of each, the L0, and the peak memory."""
    sae, x, cfg = planted(size)
    W = sae.W_enc.detach().T.contiguous()
    memory, runs = {}, {}
    for engine in ("sparse", "dense") if size.dense else ("sparse",):
        runs[engine] = stepper(sae, x, cfg, engine)
        runs[engine]()
        memory[engine] = peak_of(runs[engine])
    for dtype in (torch.bfloat16, torch.float32):
        runs[f"product {dtype}".replace("torch.", "")] = product(x, W, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    l0 = (sae.pre_activations(x[:256]) > sae.threshold).sum(1).double().mean().item()
    return {
        "D": size.d_model, "F": size.d_sae, "B": size.rows, "l0": l0,
        "seconds": {n: statistics.median(s[1:]) for n, s in seconds.items()},
        "spread": {n: [min(s[1:]), max(s[1:])] for n, s in seconds.items()},
        "megabytes": {n: b / 1e6 for n, b in memory.items()},
    }  # fmt: skip


def crossover(size: Size, rounds: int) -> None:
    """Prints sparse / dense seconds as the L0 rises: where it passes 1, `mistudio.train.sparse.CROSSOVER` belongs."""
    for part in (0.01, 0.02, 0.04, 0.06, 0.08, 0.12):
        sae, x, cfg = planted(dataclasses.replace(size, l0=part * size.d_sae))
        runs = {engine: stepper(sae, x, cfg, engine) for engine in ("sparse", "dense")}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        sparse, dense = (statistics.median(s[1:]) for s in seconds.values())
        print(f"  L0 / F = {part:.2f}: sparse {sparse:.4f} s, dense {dense:.4f} s, ratio {sparse / dense:.2f}")


def resident() -> int:
    """Bytes resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_of(run: Callable[[], None]) -> int:
    """Bytes that become resident during a call at most, on top of those before it (Linux)."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 - before


def report(found: dict[str, object]) -> None:
    """Prints seconds and ratios."""
    seconds, spread = found["seconds"], found["spread"]
    print(f"D={found['D']} F={found['F']} B={found['B']} L0={found['l0']:.1f}, {torch.get_num_threads()} threads")
    for name, s in seconds.items():
        low, high = spread[name]
        print(f"  {name:18s} {s:8.4f} s ({low:.4f}-{high:.4f})   sparse / this = {seconds['sparse'] / s:.2f}")
    print("  peak memory of a step: " + ", ".join(f"{n} {m:.0f} MB" for n, m in found["megabytes"].items()))


def machine() -> dict[str, object]:
    """Where and of what this was measured."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = model[0].split(":")[1].strip() if model else platform.machine()
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit}


def main() -> None:
    """Prints the table; --json also keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="all")
    parser.add_argument("--small", action="store_true", help="the same as --size small")
    parser.add_argument("--crossover", action="store_true", help="sparse / dense against L0, instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    names = ["small"] if args.small else list(SIZES) if args.size == "all" else [args.size]
    print(machine())
    results = {}
    for name in names:
        if args.crossover:
            print(name)
            crossover(SIZES[name], args.rounds)
            continue
        results[name] = measure(SIZES[name], args.rounds)
        report(results[name])
    if args.json:
        args.json.write_text(json.dumps({**machine(), "sizes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
