"""What several SAEs on one stream cost together, beside the same steps one SAE after another.

    python benchmarks/many.py [--size small|demo|16k] [--saes 4] [--rounds 5] [--threads N] [--json FILE]

The SAEs are one planted state (`step.planted`) with slightly different thresholds, as in a sweep. Together
they round and measure x once and look for their entries in one stacked product; the rest of a step is each one's own.
Times are medians over rounds in which both ways take turns. What sharing the stream saves (reading a batch once instead
of once an SAE, or running the language model once) comes on top and is not in these numbers.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from step import SIZES, planted

from mistudio.train.state import TrainState
from mistudio.train.together import update_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=[*SIZES], default="small")
    parser.add_argument("--saes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    sae, x, cfg = planted(SIZES[arguments.size])
    cfg = replace(cfg, engine="sparse")
    states = []
    for i in range(arguments.saes):
        own = copy.deepcopy(sae)
        with torch.no_grad():
            own.theta.mul_(1 + 0.02 * i)
        states.append(TrainState(own, cfg))

    def one_by_one() -> None:
        for state in states:
            state.update(x)

    def together() -> None:
        update_all(states, [(x,)] * len(states))

    ways = {"one by one": one_by_one, "together": together}
    times = measure(ways, arguments.rounds)
    report = {
        "size": arguments.size, "saes": arguments.saes, "threads": arguments.threads, "machine": platform.processor(),
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "spread": {name: (min(taken), max(taken)) for name, taken in times.items()},
    }  # fmt: skip
    for name, taken in times.items():
        print(f"{name:12} {statistics.median(taken):.4f} s a step of {arguments.saes} SAEs "
              f"({min(taken):.4f} to {max(taken):.4f})")  # fmt: skip
    print(f"ratio {statistics.median(times['one by one']) / statistics.median(times['together']):.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round of each way, which take turns; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in times.items()}


if __name__ == "__main__":
    main()
