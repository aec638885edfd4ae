"""Runs in the peers' environment: prints seconds and memory of one peer's JumpReLU step as JSON.

    python step.py STATE.safetensors PEER MODE ROUNDS    (PEER: saelens, dictionary_learning; MODE: float32, autocast)

SAELens's step is its SAETrainer's own; dictionary_learning's is its JumpReluTrainer's `update`. The latter's training
loop leaves autocast out on CPUs; here it is given the same context manager that the loop uses on GPUs.
"""

import contextlib
import importlib.util
import json
import os
import resource
import sys
import time
import types
from pathlib import Path

import torch
from safetensors import safe_open

BANDWIDTH = 0.001
LR = 1e-7
OUT_OF_MEMORY = 3
"""The exit code that says so."""


def load_state(file: str) -> dict:
    """The tensors, in memory of their own (a mapped file would count as memory)."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in list(opened.keys())}


def saelens(state: dict, autocast: bool):
    """A function that takes one step with SAELens's trainer."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    x = state.pop("x")
    d_in, d_sae = state["W_enc"].shape
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(d_in=d_in, d_sae=d_sae, jumprelu_bandwidth=BANDWIDTH, l0_coefficient=1e-3)
    )
    put(sae, state)
    cfg = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=len(x), lr=LR, lr_end=LR, adam_beta1=0.0,
        autocast=autocast, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(cfg, sae, iter([]))
    return lambda: trainer.step(x)


def dictionary_learning(state: dict, autocast: bool):
    """A function that takes one step with dictionary_learning's trainer.

    Its package imports a language-model library of an old version before anything else; only its trainers are needed,
    so the package's own __init__ is not run.
    """
    spec = importlib.util.find_spec("dictionary_learning")
    if spec is None or spec.origin is None:
        sys.exit("dictionary_learning is not installed here; `make .venv-peers/.installed` installs it.")
    package = types.ModuleType("dictionary_learning")
    package.__path__ = [str(Path(spec.origin).parent)]
    sys.modules["dictionary_learning"] = package
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer

    x = state.pop("x")
    d_in, d_sae = state["W_enc"].shape
    trainer = JumpReluTrainer(
        steps=10**6, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="none", lr=LR, bandwidth=BANDWIDTH,
        target_l0=70.0, device="cpu",
    )  # fmt: skip
    state["b_enc"] = state["b_enc"] - state["b_dec"] @ state["W_enc"]  # it reads x, not x - b_dec
    put(trainer.ae, state)
    step = iter(range(10**6))

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            trainer.update(next(step), x)

    return run


def put(module, state: dict) -> None:
    """The state becomes the module's parameters."""
    with torch.no_grad():
        for name in list(state):
            module.get_parameter(name).copy_(state.pop(name))


def peak_bytes(reset: bool = False) -> int:
    """The most that was resident since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def limit_memory() -> None:
    """Allocations beyond what the machine has fail here, instead of ending some other process."""
    (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    allowed = int(0.95 * int(line.split()[1]) * 1024)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def out_of_memory(error: Exception) -> bool:
    """Whether torch or Python could not allocate."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "not enough memory" in str(error)


def main() -> None:
    """Seconds of each step but the first, and peak bytes beyond the process before the state was loaded."""
    file, peer, mode, rounds = sys.argv[1:]
    if threads := os.environ.get("BENCH_THREADS"):
        torch.set_num_threads(int(threads))
    make = {"saelens": saelens, "dictionary_learning": dictionary_learning}[peer]
    if peer == "saelens":
        import sae_lens  # noqa: F401  # what the import takes is not the step's
    limit_memory()
    before = peak_bytes(reset=True)
    try:
        step = make(load_state(file), mode == "autocast")
        step()  # makes the optimiser's state
        peak_bytes(reset=True)
        seconds = []
        for _ in range(int(rounds)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            sys.exit(OUT_OF_MEMORY)
        raise
    print(json.dumps({"seconds": seconds, "bytes": peak_bytes() - before}))


if __name__ == "__main__":
    main()
