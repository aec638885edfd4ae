"""Our training step beside SAELens 6.54.12's JumpReLU step, on the same weights and the same batch, in one run.

    python benchmarks/step_vs_peers.py [--size 16k|64k|small] [--rounds 2]

SAELens runs in an environment of its own (`make test-peers` makes .venv-peers; MISTUDIO_SAELENS_PYTHON names another),
a process for float32 and one for bfloat16 autocast; ours runs before and after them. Both start from the
planted state of `step.py`. Its step is what its trainer does: forward, the firing statistics, backward, clipping,
Adam, zeroed gradients. The ratio is SAELens's median over ours; memory is the peak resident size of each process
beyond what it had before its first step, which for SAELens includes its optimiser's state and for us too.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
BANDWIDTH = 0.001
LR = 1e-7


def timed(step, rounds: int) -> list[float]:
    """Seconds of `rounds` steps after one that is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def resident_megabytes() -> float:
    """The largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def peer(file: str, rounds: int, autocast: bool) -> None:
    """Runs inside SAELens's environment: prints seconds and memory of its step as JSON."""
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    tensors = load_file(file)
    x = tensors.pop("x")
    d_in, d_sae = tensors["W_enc"].shape
    sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(d_in=d_in, d_sae=d_sae, jumprelu_bandwidth=BANDWIDTH))
    with torch.no_grad():
        for name, tensor in tensors.items():
            sae.get_parameter(name).copy_(tensor)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR, betas=(0.0, 0.999))
    since_fired, frequency = torch.zeros(d_sae), torch.zeros(d_sae)
    before = resident_megabytes()

    def step() -> None:
        request = TrainStepInput(
            sae_in=x, dead_neuron_mask=None, coefficients={"l0": 1e-3}, n_training_steps=1, is_logging_step=False
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = sae.training_forward_pass(step_input=request)
            with torch.no_grad():
                firing = output.feature_acts.bool().float()
                since_fired.add_(1)[firing.sum(-2).bool()] = 0
                frequency.add_(firing.sum(0))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    print(json.dumps({"seconds": timed(step, rounds), "peak": resident_megabytes() - before}))


def ours(size_name: str, rounds: int, file: Path) -> dict[str, object]:
    """Our seconds before and after the peer's, and the peer's own."""
    from step import SIZES, planted, stepper  # beside this file

    sae, x, cfg = planted(SIZES[size_name])
    tensors = {name: p.detach().contiguous() for name, p in sae.named_parameters() if name != "theta"}
    save_file({**tensors, "threshold": sae.theta.detach(), "x": x}, file)
    before = resident_megabytes()
    run = stepper(sae, x, cfg, "sparse")
    seconds = timed(run, rounds)
    peak = resident_megabytes() - before
    peers = {mode: ask_peer(file, rounds, mode) for mode in ("float32", "autocast")}
    seconds += timed(run, rounds)
    return {"ours": {"seconds": seconds, "peak": peak}, **peers}


def ask_peer(file: Path, rounds: int, mode: str) -> dict[str, object]:
    """SAELens's seconds and memory in one mode, from a process of its own."""
    python = os.environ.get("MISTUDIO_SAELENS_PYTHON", str(ROOT / ".venv-peers/bin/python"))
    command = [python, __file__, "--peer", str(file), "--rounds", str(rounds), "--mode", mode]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        sys.exit(f"SAELens's side failed; `make test-peers` makes its environment.\n{answer.stderr[-2000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="16k")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        peer(args.peer, args.rounds, args.mode == "autocast")
        return
    with tempfile.TemporaryDirectory() as folder:
        results = ours(args.size, args.rounds, Path(folder) / "state.safetensors")
    own = results.pop("ours")
    mine = statistics.median(own["seconds"])
    print(f"{args.size}: our sparse step {mine:.2f} s, peak {own['peak']:,.0f} MB")
    for name, found in results.items():
        theirs = statistics.median(found["seconds"])
        print(f"  SAELens {name}: {theirs:.2f} s, {theirs / mine:.1f} × ours; peak {found['peak']:,.0f} MB")


if __name__ == "__main__":
    main()
