"""What tests of training share: rows of a seed, a source that knows its place, one dense step, a run's files.

def rows(seed):
    return normal_rows(seed, B, D)

train(sae, Source(rows, fail_at=8), cfg, folder=folder)     # the process "dies" after 8 batches
train(sae, endless(rows), cfg)                              # a source without a place
"""

import itertools
import math
import os
import signal

import torch

from mistudio.sae import SAEConfig
from mistudio.train import TrainConfig
from mistudio.train.loss import loss_and_gradients
from mistudio.train.optimizer import Adam, clip_factor, normalise_rows_, remove_parallel_

D, F, B = 12, 40, 24
SAE = SAEConfig(d_model=D, d_sae=F, scale=1.0)
SPARSE_RUN = TrainConfig(
    steps=30,
    batch_rows=B,
    sparsity_weight=0.3,
    sparsity_warmup_steps=0,
    lr=1e-2,
    lr_warmup_steps=0,
    bandwidth=0.2,
    threshold_init=0.3,
    log_threshold=False,
    engine="sparse",
    log_every=7,
    checkpoint_every=10,
)


def normal_rows(seed, *shape):
    """[..., D] float32, rows with E‖x‖² = 1; a function of the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(shape[-1])


def endless(batch):
    """batch(0), batch(1), …"""
    return map(batch, itertools.count())


class Source:
    """batch(1), batch(2), …; it can say and restore its place, as a store's feed does.

    fail_at, signal_at: after that many batches the process "dies" (or `error` is raised), or is sent the signal
    `number`. `who` is a part of the place that stays. `read` counts the batches that this object gave.
    """

    def __init__(self, batch, *, fail_at=None, error=None, signal_at=None, number=signal.SIGTERM, who=None):
        self.batch, self.fail_at, self.signal_at, self.number = batch, fail_at, signal_at, number
        self.error = error or RuntimeError("the machine went away")
        self.who, self.place, self.read = who or {}, 0, 0

    def state(self):
        return {**self.who, "place": self.place}

    def restore(self, state):
        assert state == {**self.who, "place": state["place"]}
        self.place = state["place"]

    def __iter__(self):
        return self

    def __next__(self):
        if self.place == self.fail_at:
            raise self.error
        if self.place == self.signal_at:
            os.kill(os.getpid(), self.number)
        self.place, self.read = self.place + 1, self.read + 1
        return self.batch(self.place)


def files(folder):
    """The bytes of every file below `folder`, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def parameters(sae):
    """A copy of each."""
    return {name: p.detach().clone() for name, p in sae.named_parameters()}


def same_bits(*saes):
    """Whether all parameters are equal."""
    first, *others = ([*sae.parameters()] for sae in saes)
    return all(torch.equal(p, q) for other in others for p, q in zip(first, other, strict=True))


def feature_major(sae):
    """The SAE with unit decoder rows, and W_enc laid out feature by feature, as a TrainState makes it."""
    with torch.no_grad():
        normalise_rows_(sae.W_dec)
    sae.W_enc.data = sae.W_enc.data.T.contiguous().T
    return sae


def adam_of(sae, cfg, eps=None):
    return Adam(dict(sae.named_parameters()), cfg.beta2, cfg.adam_eps if eps is None else eps, beta1=cfg.beta1)


def dense_step(sae, x, cfg, adam, weight, lr, y=None, dead=None):
    """The dense step, written out: what sparse steps are compared with. Its loss terms."""
    terms, gradients = loss_and_gradients(sae, x, cfg, weight, y, dead)
    remove_parallel_(gradients["W_dec"], sae.W_dec)
    if cfg.clip_norm is not None:
        factor = clip_factor(gradients.values(), cfg.clip_norm)
        gradients = {name: g * factor for name, g in gradients.items()}
    adam.update(gradients, lr)
    with torch.no_grad():
        normalise_rows_(sae.W_dec)
    return terms
