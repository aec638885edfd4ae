"""Our training step beside the peers' JumpReLU steps, on the same weights and the same batch, in one run.

    python benchmarks/step_vs_peers.py [--size 16k|64k|131k|small|all] [--rounds 2] [--threads N] [--json FILE]

Peers: SAELens 6.54.12 and dictionary_learning 0.1.0, each in float32 and in bfloat16 autocast, from an environment of
their own (`make test-peers` makes .venv-peers; MISTUDIO_SAELENS_PYTHON names another). All start from the planted state
of `step.py`. Every mode is a process of its own, one at a time; ours runs before and after them, so that a change of
the machine's speed is seen, and three times as many steps each time, as they are short. One step before the timed ones
is not counted. The ratio is the peer's median over ours.

Memory is the most that is resident during a step beyond what the process had before it loaded the state: weights,
batch, the optimiser's state, gradients and everything in between. A peer that the machine's memory is too small for is
reported as such. The floor is the encoder's product alone, in bfloat16.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from peers.step import OUT_OF_MEMORY, load_state, peak_bytes
from safetensors.torch import save_file
from step import SIZES, machine, planted, product
from width import load_kernels

ROOT = Path(__file__).parent.parent
ALL_SIZES = {**SIZES, "131k": replace(SIZES["64k"], d_sae=131_072)}
PEERS = ("saelens", "dictionary_learning")
MODES = ("float32", "autocast")


def plant(size: str, file: str) -> None:
    """Writes weights and batch; the training configuration is the same in every process."""
    sae, x, _ = planted(ALL_SIZES[size])
    tensors = {name: p.detach().contiguous() for name, p in sae.named_parameters() if name != "theta"}
    save_file({**tensors, "threshold": sae.theta.detach(), "x": x}, file)


def ours(size: str, file: str, rounds: int) -> dict[str, object]:
    """Seconds and memory of our step, seconds of the floor; in a process of its own."""
    from mistudio.pages import in_large_pages
    from mistudio.sae import JumpReLUSAE, SAEConfig
    from mistudio.train import TrainConfig
    from mistudio.train.state import TrainState

    rows = ALL_SIZES[size].rows
    cfg = TrainConfig(
        steps=1000, batch_rows=rows, sparsity_weight=1e-3, sparsity_warmup_steps=0, lr=1e-7, lr_warmup_steps=0,
        bandwidth=0.001, log_threshold=False, engine="sparse",
    )  # fmt: skip
    load_kernels()
    before = peak_bytes(reset=True)
    tensors = load_state(file)
    x = tensors.pop("x")
    in_large_pages([x])  # where a feed's batches lie
    tensors["theta"] = tensors.pop("threshold")
    D, F = tensors["W_enc"].shape
    sae = JumpReLUSAE(SAEConfig(d_model=D, d_sae=F, scale=1.0, pre_encoder_bias=True), tensors)
    del tensors
    state = TrainState(sae, cfg)
    state.update(x)
    peak_bytes(reset=True)
    seconds = timed(lambda: state.update(x), 3 * rounds)
    found: dict[str, object] = {"seconds": seconds, "bytes": peak_bytes() - before}
    multiply = product(x, sae.W_enc.detach().T, torch.bfloat16)
    multiply()
    return {**found, "floor": timed(multiply, rounds)}


def timed(run, rounds: int) -> list[float]:
    """Seconds of each call."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def ask_ours(size: str, file: Path, rounds: int) -> dict:
    """Our side's answer."""
    command = [sys.executable, __file__, "--size", size, "--rounds", str(rounds), "--ours", str(file)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        sys.exit(f"Our side failed.\n{answer.stderr[-3000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def ask_peer(file: Path, peer: str, mode: str, rounds: int) -> dict:
    """A peer's answer; `failed` says why there is none."""
    python = os.environ.get("MISTUDIO_SAELENS_PYTHON", str(ROOT / ".venv-peers/bin/python"))
    if not Path(python).exists():
        sys.exit(f"There is no {python}; `make test-peers` makes it, or set MISTUDIO_SAELENS_PYTHON.")
    command = [python, str(Path(__file__).parent / "peers/step.py"), str(file), peer, mode, str(rounds)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode in (OUT_OF_MEMORY, -signal.SIGKILL):
        return {"failed": "does not fit into this machine's memory"}
    if answer.returncode:
        return {"failed": answer.stderr.strip().splitlines()[-1] if answer.stderr.strip() else "no reason given"}
    return json.loads(answer.stdout.splitlines()[-1])


def measure(size: str, rounds: int) -> dict:
    """Everybody's seconds and bytes at one size; ours before and after the peers."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.safetensors"
        subprocess.run([sys.executable, __file__, "--size", size, "--plant", str(file)], check=True)
        found = {"ours": ask_ours(size, file, rounds)}
        for peer in PEERS:
            for mode in MODES:
                found[f"{peer} {mode}"] = ask_peer(file, peer, mode, rounds)
        after = ask_ours(size, file, rounds)
    for name in ("seconds", "floor"):
        found["ours"][name] += after[name]
    return found


def compare(found: dict) -> dict:
    """Medians, and for every peer's mode and for the best of them: their seconds / ours, their bytes / ours."""
    own = found["ours"]
    mine, floor = statistics.median(own["seconds"]), statistics.median(own["floor"])
    modes = {}
    for name, answer in found.items():
        if name == "ours" or "failed" in answer:
            continue
        seconds = statistics.median(answer["seconds"])
        modes[name] = {"seconds": seconds, "ratio": seconds / mine, "memory_ratio": answer["bytes"] / own["bytes"]}
    best = min(modes.values(), key=lambda mode: mode["seconds"], default=None)
    return {
        "ours": mine, "floor": floor, "over_floor": mine / floor, "modes": modes,
        "best": best and best["ratio"], "least_memory": min((m["memory_ratio"] for m in modes.values()), default=None),
    }  # fmt: skip


def report(size: str, found: dict) -> None:
    """Prints a size's table."""
    shape, result, own = ALL_SIZES[size], compare(found), found["ours"]
    print(f"{size}: D={shape.d_model} F={shape.d_sae} B={shape.rows} L0={shape.l0:g}")
    low, high = min(own["seconds"]), max(own["seconds"])
    print(f"  ours: {result['ours']:.3f} s ({low:.3f}-{high:.3f}), {own['bytes'] / 1e6:,.0f} MB")
    print(f"  floor (bfloat16 encoder product): {result['floor']:.3f} s; ours is {result['over_floor']:.2f} times that")
    for name, answer in found.items():
        if name == "ours":
            continue
        if "failed" in answer:
            print(f"  {name}: {answer['failed']}")
            continue
        mode = result["modes"][name]
        print(
            f"  {name}: {mode['seconds']:.2f} s, {mode['ratio']:.1f} x ours; {answer['bytes'] / 1e6:,.0f} MB, "
            f"{mode['memory_ratio']:.1f} x ours"
        )
    if result["best"]:
        print(
            f"  the fastest mode of all: {result['best']:.1f} x ours; the smallest: {result['least_memory']:.1f} x ours"
        )


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*ALL_SIZES, "all"], default="16k")
    parser.add_argument("--small", action="store_true", help="the same as --size small --rounds 1")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plant", help=argparse.SUPPRESS)
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    args = parser.parse_args()
    threads = args.threads or int(os.environ.get("BENCH_THREADS", "0"))
    if threads:
        torch.set_num_threads(threads)
        os.environ["BENCH_THREADS"] = str(threads)
    if args.plant:
        plant(args.size, args.plant)
        return
    if args.ours:
        print(json.dumps(ours(args.size, args.ours, args.rounds)))
        return
    sizes = ["small"] if args.small else ["16k", "64k", "131k"] if args.size == "all" else [args.size]
    print(machine(), flush=True)
    results = {}
    for size in sizes:
        results[size] = measure(size, 1 if args.small else args.rounds)
        report(size, results[size])
    if args.json:
        args.json.write_text(json.dumps({**machine(), "sizes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
