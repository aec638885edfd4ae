"""What a run will take: rows, bytes, FLOPs, hours and memory, from formulas, before anything is begun.

Collection   rows = tokens (without BOS, EOS, PAD); bytes = rows * sum over sites of D * bytes a number;
             FLOPs = 2 * parameters of the layers up to the last site * tokens (attention scores, small at contexts of
             thousands, and the embedding's look-up are left out)
Training     FLOPs = 12 * D * F * rows: two products forward, four backward, 2 each; a sparse engine does less
             memory = what `train.memory` counts before such a run begins, by its recipe and engine
Evaluation   tokens * (4 forward passes of 2 * all parameters: clean, spliced, zero, mean; and 4 * D * F for the SAE)
Hours        the larger of FLOPs / (devices * peak * MFU) and bytes / rate of the disk

No prices are known here; a rate in money an hour can be given.
"""

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from mistudio.errors import ConfigError
from mistudio.lm import Site, load_shape
from mistudio.sae import SAEConfig
from mistudio.store.dtypes import site_row_bytes
from mistudio.train import TrainConfig
from mistudio.train.memory import training_bytes

GPT3_FLOPS: Final = 3.14e23
"""Training compute of GPT-3, which the Gemma Scope report compares itself with."""
PASSES: Final = 4
"""Forward passes of an evaluation: clean, spliced, with zeros, with the mean."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a language model costs to run."""

    name: str
    """The model's name."""
    n_layers: int
    """L."""
    d_model: int
    """D of the residual stream and of mlp_out."""
    head_width: int
    """D of attn_z."""
    layer_parameters: int
    """Parameters of one layer."""
    parameters: int
    """All parameters, the embedding once where it is tied."""

    def width(self, site: Site) -> int:
        """D of a site. ConfigError: there is no such layer."""
        if site.layer >= self.n_layers:
            raise ConfigError(f"{self.name} has no site {site}: its layers are 0 to {self.n_layers - 1}.")
        return self.head_width if site.kind == "attn_z" else self.d_model

    def forward_flops(self, layers: int | None = None) -> int:
        """FLOPs a token of a forward pass through `layers` layers; None: through all and the head."""
        return 2 * (self.parameters if layers is None else self.layer_parameters * layers)


def _gemma_2(name: str, layers: int, d: int, heads: int, kv_heads: int, head: int, mlp: int) -> ModelSize:
    layer = 2 * d * heads * head + 2 * d * kv_heads * head + 3 * d * mlp + 4 * d
    return ModelSize(
        name=name,
        n_layers=layers,
        d_model=d,
        head_width=heads * head,
        layer_parameters=layer,
        parameters=layers * layer + 256_000 * d + d,
    )


KNOWN: Final[Mapping[str, ModelSize]] = {
    size.name: size
    for size in (
        _gemma_2("gemma-2-2b", 26, 2304, 8, 4, 256, 9216),
        _gemma_2("gemma-2-9b", 42, 3584, 16, 8, 256, 14336),
        _gemma_2("gemma-2-27b", 46, 4608, 32, 16, 128, 36864),
    )
}
"""Models that can be planned for without a network."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the work is done on."""

    name: str
    """Of one device."""
    peak_flops: float
    """FLOPs a second of one device in dense products."""
    disk_bytes_s: float
    """Bytes a second that rows are written and read with."""
    devices: int = 1
    """How many."""
    mfu: float = 0.5
    """Share of the peak that is reached."""
    device: str = "cuda"
    """cpu or cuda (accelerators count as such): training keeps more in memory on some than on others."""

    @property
    def flops_s(self) -> float:
        """FLOPs a second that are reached."""
        return self.devices * self.peak_flops * self.mfu


PEAK_FLOPS: Final[Mapping[str, float]] = {
    "a100": 312e12,
    "h100": 989e12,
    "h200": 989e12,
    "tpu-v3": 123e12,
    "tpu-v5p": 459e12,
}
"""bfloat16 products without sparsity, as the makers state them; a chip each."""


@dataclass(frozen=True, kw_only=True)
class SAEJob:
    """One SAE to train and evaluate."""

    site: str
    """Where."""
    width: int
    """F."""
    rows: int
    """Activation rows it is trained on, repeats included."""
    cfg: TrainConfig
    """How it is trained, from which the memory follows."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One stage."""

    what: str
    """collect, train or evaluate, with site and width."""
    rows: int
    """Rows or tokens."""
    bytes: int
    """Bytes written (collect) or read (train)."""
    flops: float
    """FLOPs."""
    hours: float
    """On the machine given."""
    memory_bytes: int
    """Memory of one device that does it alone."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All stages and their sum."""

    lines: tuple[Line, ...]
    """In order."""
    store_bytes: int
    """Bytes on disk."""
    flops: float
    """Sum."""
    hours: float
    """Sum, one stage after the other."""
    device_hours: float
    """Hours times devices."""
    cost: float | None
    """Device hours times the rate given."""
    gpt3_share: float
    """FLOPs over GPT-3's training."""
    assumptions: tuple[str, ...]
    """What the numbers rest on."""


def model_size(name: str, revision: str | None = None) -> ModelSize:
    """The size of a model: from the table for Gemma 2, else from its configuration, with no weights.

    ModelError: no such model, or it cannot be reached.
    """
    known = KNOWN.get(name.removeprefix("google/").removesuffix("-it"))
    if known is not None:
        return known
    from transformers import AutoConfig, AutoModelForCausalLM

    from mistudio.lm.load import DEMO

    shape = load_shape(name, revision)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(str(DEMO) if name == "demo" else name, revision=revision)
        model = AutoModelForCausalLM.from_config(config)
    site, _ = shape.family.locate(Site(0, "resid_post"))
    return ModelSize(
        name=name,
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        head_width=shape.head_width,
        layer_parameters=sum(p.numel() for p in model.get_submodule(site).parameters()),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def training_flops(d: int, width: int, rows: int) -> int:
    """FLOPs of training one SAE by dense products: 12 D F rows."""
    return 12 * d * width * rows


def make_plan(
    model: ModelSize,
    sites: Sequence[str],
    tokens: int,
    saes: Sequence[SAEJob],
    machine: Machine,
    *,
    evaluation_tokens: int = 2048 * 1024,
    row_dtype: str = "float32",
    rate: float | None = None,
) -> Plan:
    """The plan of one collection from one model, and of the SAEs trained on it, one after the other.

    evaluation_tokens: for each SAE; Gemma Scope's were 2,048 rows of 1,024. rate: money for a device and hour.
    ConfigError: an SAE at a site that is not collected, or a site the model does not have.
    """
    parsed = {str(Site.parse(site)): Site.parse(site) for site in sites}
    for sae in saes:
        if str(Site.parse(sae.site)) not in parsed:
            raise ConfigError(f"An SAE at {sae.site} is planned, but only {', '.join(parsed)} is collected.")
    lines = [_collection(model, list(parsed.values()), tokens, row_dtype, machine)]
    for sae in saes:
        d = model.width(Site.parse(sae.site))
        lines.append(_training(sae, d, row_dtype, machine))
        lines.append(_evaluation(model, sae, d, evaluation_tokens, machine))
    flops, hours = sum(line.flops for line in lines), sum(line.hours for line in lines)
    return Plan(
        lines=tuple(lines),
        store_bytes=lines[0].bytes,
        flops=flops,
        hours=hours,
        device_hours=hours * machine.devices,
        cost=None if rate is None else hours * machine.devices * rate,
        gpt3_share=flops / GPT3_FLOPS,
        assumptions=_assumptions(model, machine, evaluation_tokens, row_dtype, rate),
    )


def _collection(model: ModelSize, sites: list[Site], tokens: int, row_dtype: str, machine: Machine) -> Line:
    size = tokens * (sum(site_row_bytes(model.width(site), row_dtype) for site in sites) + 12)
    deepest = 1 + max(site.layer for site in sites)
    flops = model.forward_flops(deepest) * tokens
    memory = 2 * deepest * model.layer_parameters  # bfloat16 weights
    hours = max(flops / machine.flops_s, size / machine.disk_bytes_s) / 3600
    what = f"collect {len(sites)} site{'s' if len(sites) > 1 else ''} of {model.name}"
    return Line(what=what, rows=tokens, bytes=size, flops=flops, hours=hours, memory_bytes=memory)


def _training(sae: SAEJob, d: int, row_dtype: str, machine: Machine) -> Line:
    read = sae.rows * site_row_bytes(d, row_dtype)
    flops = training_flops(d, sae.width, sae.rows)
    config = SAEConfig(d_model=d, d_sae=sae.width)
    return Line(
        what=f"train {sae.site} × {sae.width:,}",
        rows=sae.rows,
        bytes=read,
        flops=flops,
        hours=max(flops / machine.flops_s, read / machine.disk_bytes_s) / 3600,
        memory_bytes=sum(training_bytes(config, sae.cfg, torch.device(machine.device)).values()),
    )


def _evaluation(model: ModelSize, sae: SAEJob, d: int, tokens: int, machine: Machine) -> Line:
    flops = tokens * (PASSES * model.forward_flops() + 4 * d * sae.width)
    return Line(
        what=f"evaluate {sae.site} × {sae.width:,}",
        rows=tokens,
        bytes=0,
        flops=flops,
        hours=flops / machine.flops_s / 3600,
        memory_bytes=2 * model.parameters + 4 * 2 * d * sae.width,
    )


def _assumptions(
    model: ModelSize, machine: Machine, evaluation_tokens: int, row_dtype: str, rate: float | None
) -> tuple[str, ...]:
    found = [
        f"{model.name}: {model.parameters:,} parameters, {model.layer_parameters:,} in each of {model.n_layers} layers",
        f"{machine.devices} × {machine.name}: at most {machine.peak_flops:.3g} FLOP/s, {machine.mfu:.0%} of it reached",
        f"rows move at {machine.disk_bytes_s / 2**30:.3g} GiB/s",
        f"rows are {row_dtype}, 12 bytes a row say where it comes from; one pass through the model for all sites",
        "training takes the hours of dense steps, 12 · D · F FLOPs a row, and the memory that train counts beforehand",
        "stages run one after the other",
        f"each evaluation reads {evaluation_tokens:,} tokens {PASSES} times",
    ]
    if rate is not None:
        found.append(f"a device costs {rate:g} an hour")
    return tuple(found)


def measured_machine(folder: Path, *, devices: int = 1, mfu: float = 0.5) -> Machine:
    """This machine: the fastest of three float32 products of 2048 × 2048, and a file of 64 MiB written to `folder`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 2048
    a = torch.randn(size, size, device=device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        (a @ a).sum().item()
        times.append(time.perf_counter() - start)
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        file.write(bytes(2**26))
        file.flush()
        os.fsync(file.fileno())
        written_s = time.perf_counter() - start
    return Machine(
        name=f"{device}, measured",
        peak_flops=2 * size**3 / min(times),
        disk_bytes_s=2**26 / written_s,
        devices=devices,
        mfu=mfu,
        device=device,
    )
