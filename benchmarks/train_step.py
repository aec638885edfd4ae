"""What a dense training step costs over its matrix products: time of a step / time of five B·D·F products, in one run.

    python benchmarks/train_step.py [--width 1536] [--rounds 20]

A dense JumpReLU step needs five products (encode, decode, and the gradients of f, W_dec and W_enc). What is above 1 is
the rest: thresholds, the kernel window, the loss, Adam, the decoder's constraint.
"""

import argparse
import dataclasses
import statistics
import time

import torch

from mistudio import recipes
from mistudio.sae import SAEConfig
from mistudio.train import initial_sae
from mistudio.train.state import TrainState


def main() -> None:
    """Prints the median ratio and its range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    D, F = args.d_model, args.width
    cfg = dataclasses.replace(recipes.quick(), engine="dense")
    state = TrainState(initial_sae(SAEConfig(d_model=D, d_sae=F, scale=1.0), cfg), cfg)
    torch.manual_seed(0)
    x = torch.randn(cfg.batch_rows, D) / D**0.5
    z = torch.randn(cfg.batch_rows, F)
    W = torch.randn(D, F)
    ratios = []
    for _ in range(args.rounds + 2):
        start = time.perf_counter()
        state.update(x)
        middle = time.perf_counter()
        for product in (lambda: x @ W, lambda: z @ W.T, lambda: x @ W, lambda: z.T @ x, lambda: x.T @ z):
            product()
        ratios.append((middle - start) / (time.perf_counter() - middle))
    ratios = ratios[2:]
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
    print(f"step / five products, D={D} F={F} B={cfg.batch_rows}: {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
