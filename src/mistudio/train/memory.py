"""How much memory a run takes, counted before it starts, and what would fit where it is too little.

    weights and second moments    4 bytes a number each; first moments only where beta1 > 0
    the screen's copy             2 bytes a number of W_enc, for the sparse step on a GPU; a CPU rounds block by block
    a dense step                  gradients of W_enc and W_dec, 4 bytes a number, and about six matrices [b, F] of the b
                                  rows that it works on at once (`micro_rows`), or all that of some features at a time
                                  (`micro_features`)
    a sparse step                 about 28 bytes an entry, and one more residual [B, E] a Matryoshka prefix

A run of a JumpReLU or ReLU SAE begins with dense steps (unless `engine` is sparse), since at first half of all features
fire. Data and the language model are not counted.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from mistudio.errors import TrainError
from mistudio.sae import SAEConfig, TranscoderConfig
from mistudio.train.config import TrainConfig
from mistudio.train.loss import chunk_rows
from mistudio.train.objectives import Trainable
from mistudio.train.sparse import CROSSOVER, PIECE_ENTRIES, SHARED_ROWS, may_be_sparse
from mistudio.train.threads import number

DENSE_MATRICES = 6
"""Matrices [b, F] that a dense step holds at once."""
BLOCK_COPIES = 4
"""With micro_features: a block's gradients, and its rows and moments while they are updated."""
ENTRY_BYTES = 28
"""An entry's value, row and feature, in both orders, and while they are gathered."""
WIDTH_STEP = 128
"""Proposed widths are multiples of this."""


def training_bytes(config: SAEConfig, cfg: TrainConfig, device: torch.device) -> dict[str, int]:
    """What a run holds at its peak: part → bytes."""
    D, F, E = config.d_model, config.d_sae, config.d_model
    skip = 0
    if isinstance(config, TranscoderConfig):
        E, skip = config.d_out, config.d_model * config.d_out * config.skip
    matrices, vectors = (D + E) * F, 2 * F + E + skip
    found = {"weights": 4 * (matrices + vectors), "second moments": 4 * (matrices + vectors)}
    if cfg.beta1 > 0:
        found["first moments"] = found["second moments"]
    sparse, dense_start = may_be_sparse(cfg, device), starts_dense(config, cfg, device)
    if sparse and device.type == "cuda":
        found["the encoder's rounded copy"] = 2 * D * F
    at_once = F if cfg.micro_features is None else min(F, cfg.micro_features)
    if dense_start or (sparse and cfg.clip_norm is not None):
        found["gradients"] = 4 * (matrices + vectors)
    if cfg.micro_features is not None and dense_start:
        found["gradients"] = 4 * (BLOCK_COPIES * (D + E) * at_once + vectors)
    planes = (len(cfg.prefixes) + 3) * 4 * cfg.batch_rows * max(D, E)
    b = chunk_rows(cfg, cfg.batch_rows, at_once, device)
    dense = DENSE_MATRICES * 4 * b * at_once if dense_start else 0
    found["a step's intermediates"] = planes + max(dense, _sparse_step_bytes(config, cfg, device) if sparse else 0)
    return found


def starts_dense(config: SAEConfig, cfg: TrainConfig, device: torch.device) -> bool:
    """Whether steps are computed densely, at least at first."""
    few_from_the_start = cfg.k is not None and cfg.k < CROSSOVER * config.d_sae
    return not may_be_sparse(cfg, device) or (cfg.engine == "auto" and not few_from_the_start)


def _sparse_step_bytes(config: SAEConfig, cfg: TrainConfig, device: torch.device) -> int:
    in_a_row = (CROSSOVER * config.d_sae if cfg.k is None else cfg.k) + (cfg.aux_k or 0)
    entries = ENTRY_BYTES * int(in_a_row * cfg.batch_rows)
    of_the_dead = 0 if cfg.aux_k is None else 4 * config.d_model * config.d_sae
    of_all_threads = number() * min(PIECE_ENTRIES, SHARED_ROWS * config.d_sae) if device.type == "cpu" else 0
    return entries + 3 * 4 * max(PIECE_ENTRIES, of_all_threads) + of_the_dead


def check_memory(saes: Sequence[Trainable], cfgs: Sequence[TrainConfig], available: int | None = None) -> None:
    """Nothing; TrainError before the work starts where runs of these SAEs together would not fit, with what would.

    available: bytes free for them beside their weights, which are there; None: asked of the device.
    """
    devices = {sae.W_enc.device for sae in saes}
    for device in devices:
        here = [(sae, cfg) for sae, cfg in zip(saes, cfgs, strict=True) if sae.W_enc.device == device]
        free = available_bytes(device) if available is None else available
        if free is None:
            continue
        held = sum(p.numel() * p.element_size() for sae, _ in here for p in sae.parameters())
        needed = [training_bytes(sae.config, cfg, device) for sae, cfg in here]
        total = sum(sum(parts.values()) for parts in needed)
        if total > free + held:
            raise TrainError(_too_little(here, needed, free + held, device))


def _too_little(
    here: list[tuple[Trainable, TrainConfig]], needed: list[dict[str, int]], room: int, device: torch.device
) -> str:
    each = [sum(parts.values()) for parts in needed]
    if len(here) > 1:
        most = max((n for n in range(len(each) + 1) if sum(sorted(each)[:n]) <= room), default=0)
        advice = f"What would fit: {most} of them at a time." if most else "Not even one fits: lower the width."
        return (
            f"Training these {len(here)} SAEs together takes about {_gb(sum(each))} on {device}, and {_gb(room)} are "
            f"there. {advice}"
        )
    sae, cfg = here[0]
    listed = ", ".join(f"{name} {_gb(size)}" for name, size in needed[0].items())
    fits = _what_fits(sae.config, cfg, device, room)
    return (
        f"Training {sae.config.d_sae:,} features takes about {_gb(each[0])} on {device} ({listed}), and {_gb(room)} "
        f"are there. What would fit: {', or '.join(fits) if fits else 'nothing with these settings'}."
    )


def _what_fits(config: SAEConfig, cfg: TrainConfig, device: torch.device, room: int) -> list[str]:
    """The changes of one setting with which the run would fit into `room` bytes."""
    found = []
    if width := widest(config, cfg, device, room):
        found.append(f"a width of {width:,}")
    if (rows := most_micro_rows(config, cfg, device, room)) is not None:
        found.append(f"micro_rows {rows}")
    if (features := most_micro_features(config, cfg, device, room)) is not None:
        found.append(f"micro_features {features:,}")
    if cfg.engine == "auto" and starts_dense(config, cfg, device):
        sparse = dataclasses.replace(cfg, engine="sparse")
        if sum(training_bytes(config, sparse, device).values()) <= room:
            found.append("engine sparse (for an SAE of which few features fire from the start)")
    return found


def most_micro_features(config: SAEConfig, cfg: TrainConfig, device: torch.device, room: int) -> int | None:
    """The largest micro_features, a power of 2, with which the run fits into `room` bytes; None if none does, or the
    run may not have it."""
    if cfg.selects or cfg.aux_k is not None or cfg.clip_norm is not None or not starts_dense(config, cfg, device):
        return None
    features = 1 << (config.d_sae.bit_length() - 1)
    while features >= WIDTH_STEP:
        blocks = dataclasses.replace(cfg, micro_features=features)
        if sum(training_bytes(config, blocks, device).values()) <= room:
            return features
        features //= 2
    return None


def widest(config: SAEConfig, cfg: TrainConfig, device: torch.device, room: int) -> int:
    """The largest number of features, a multiple of WIDTH_STEP, whose run fits into `room` bytes; 0 if none does."""
    low, high = 0, config.d_sae // WIDTH_STEP
    while low < high:
        middle = (low + high + 1) // 2
        sized = dataclasses.replace(config, d_sae=middle * WIDTH_STEP)
        fits = sum(training_bytes(sized, cfg, device).values()) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * WIDTH_STEP


def most_micro_rows(config: SAEConfig, cfg: TrainConfig, device: torch.device, room: int) -> int | None:
    """The largest micro_rows, a power of 2, with which the run fits into `room` bytes; None if none does."""
    if not starts_dense(config, cfg, device):
        return None
    rows = 1 << (chunk_rows(cfg, cfg.batch_rows, config.d_sae, device).bit_length() - 1)
    while rows >= 1:
        pieces = dataclasses.replace(cfg, micro_rows=rows)
        if sum(training_bytes(config, pieces, device).values()) <= room:
            return rows
        rows //= 2
    return None


def available_bytes(device: torch.device) -> int | None:
    """Free memory for new tensors on the device; None where that cannot be told."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    known = [free for free in (_machine(), _group()) if free is not None]
    return min(known, default=None)


def _machine() -> int | None:
    """What Linux says can be had without swapping."""
    return _number(Path("/proc/meminfo"), "MemAvailable:", 1024)


def _group() -> int | None:
    """What the container's limit leaves, where there is one; the page cache can be had back."""
    for folder, limit, used in (
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        most, now = _number(folder / limit), _number(folder / used)
        if most is not None and now is not None:
            cache = sum(_number(folder / "memory.stat", f"{age}active_file") or 0 for age in ("", "in"))
            return max(0, most - max(0, now - cache))
    return None


def _number(path: Path, name: str | None = None, unit: int = 1) -> int | None:
    """The number in a file of the kernel's, or the one after `name`, times `unit`; None where there is none."""
    try:
        words = path.read_text().split()
        found = words[0] if name is None else words[words.index(name) + 1]
        return int(found) * unit
    except (OSError, ValueError, IndexError):
        return None


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
