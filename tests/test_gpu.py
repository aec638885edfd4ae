"""The sparse step on a CUDA GPU, at a size where everything is cut into tiles, beside the definition on the CPU.

Skipped where there is no GPU. `tests/test_triton.py` holds the same kernels to the definition piece by piece, on a GPU
where there is one.
"""

import math
from dataclasses import replace

import pytest
import torch

from mistudio.sae import SAEConfig
from mistudio.train import TrainConfig, definition, initial_sae
from mistudio.train.definition import Work
from mistudio.train.optimizer import Adam
from mistudio.train.sparse import SparseStep
from mistudio.train.state import TrainState

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
    pytest.mark.filterwarnings("error::UserWarning"),
]

D, F, B = 328, 3000, 1000
CFG = TrainConfig(
    steps=100, batch_rows=B, sparsity_weight=0.1, lr=1e-3, bandwidth=0.02, threshold_init=0.12, adam_eps=1e-3,
    log_threshold=False, engine="sparse",
)  # fmt: skip


def batch(seed, device):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, D, generator=generator) / math.sqrt(D)).to(device)


def sae_on(device, dtype=torch.float32):
    sae = initial_sae(SAEConfig(d_model=D, d_sae=F, scale=1.0), CFG).to(device, dtype)
    sae.theta.data[:20] = -0.2  # these fire on nearly all rows
    sae.W_enc.data = sae.W_enc.data.T.contiguous().T
    return sae


def adam_of(sae):
    return Adam(dict(sae.named_parameters()), CFG.beta2, CFG.adam_eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_gpu_finds_the_entries_that_float64_finds(dtype):
    from mistudio.train.cuda_screen import Screen

    sae, x = sae_on("cuda"), batch(0, "cuda")
    found = Screen(sae.W_enc.detach().T, dtype).select(
        x, sae.b_enc.detach(), sae.b_dec.detach(), sae.theta.detach(), CFG.bandwidth
    )
    z, theta = x.double() @ sae.W_enc.double(), sae.theta.double()
    near = torch.minimum((z - theta).abs(), (z - theta + CFG.bandwidth / 2).abs()).min(dim=0).values < 1e-6
    entries = (z > theta - CFG.bandwidth / 2).T
    matrix = torch.zeros(F, B, dtype=torch.bool, device="cuda")
    matrix[found.indices().long(), found.rows.long()] = True
    assert (matrix == entries)[~near].all()
    assert entries.sum() > 10_000


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_five_steps_on_the_gpu_are_five_steps_as_defined_in_float64(clip_norm):
    cfg, ends = replace(CFG, clip_norm=clip_norm), []
    for device, dtype, compiled in (("cuda", torch.float32, True), ("cpu", torch.float64, False)):
        sae = sae_on(device, dtype)
        step = SparseStep(sae, cfg, adam_of(sae), compiled=compiled)
        terms = [step.update(batch(seed, device).to(dtype), 0.1, cfg.lr) for seed in range(5)]
        ends.append((*sae.parameters(), *(t.loss for t in terms)))
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours.detach().cpu().double(), theirs.detach(), atol=3e-5, rtol=1e-4)


def test_the_visit_is_the_definition_on_the_same_gpu():
    from mistudio.train import cuda, cuda_screen

    results = []
    for bodies in (cuda, definition):
        sae, x = sae_on("cuda"), batch(1, "cuda")
        parameters, adam = {name: p.detach() for name, p in sae.named_parameters()}, adam_of(sae)
        theta, price = parameters["theta"], torch.rand(B, generator=torch.Generator().manual_seed(2)).cuda()
        code = cuda_screen.Screen(parameters["W_enc"].T).select(
            x, parameters["b_enc"], parameters["b_dec"], theta, CFG.bandwidth
        )
        residual, squares, row_l0 = bodies.reconstruct(code, parameters["b_dec"] - x, parameters["W_dec"], theta)
        numbers = (CFG.bandwidth, True, 2 / B, 0.0)
        sums, d_b_dec, touched = bodies.visit(Work(code, x, residual, parameters, theta, price, *numbers), adam, 1e-3)
        results.append((residual, squares, row_l0, sums, d_b_dec, touched, *parameters.values(), *adam.second.values()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_the_same_steps_give_the_same_bits():
    ends = []
    for _ in range(2):
        state = TrainState(sae_on("cuda"), CFG)
        for seed in range(5):
            state.update(batch(seed, "cuda"))
        ends.append(state.tensors())
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []


def test_auto_stays_dense_on_a_gpu():
    assert TrainState(sae_on("cuda"), replace(CFG, engine="auto")).sparse is None
