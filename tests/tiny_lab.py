"""A lab around a tiny random model: live SAEs at two sites, their statistics, and a vector of one's own.

lab = tiny_lab()      # SAEs at SITE and LATER, width 24; the vector "mine"
"""

import torch

from mistudio.lm import Site
from mistudio.sae import JumpReLUSAE, SAEConfig
from mistudio.steer import Known, Lab
from tiny_models import tiny_lm

SITE = Site(1, "resid_post")
LATER = Site(2, "resid_post")
PROMPT = "the hen had a hat"
"""One that the model goes on from with several different tokens, and with others when it is pushed."""
F = 24


def live_sae(width: int, site: Site, seed: int = 0) -> JumpReLUSAE:
    """Unit decoder rows, encoders that mostly read them: on the tiny model's residuals about half the features fire."""
    sae = JumpReLUSAE(SAEConfig(d_model=width, d_sae=F, hook_name=str(site)))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(F, width, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T + 0.1 * torch.randn(width, F, generator=generator))
        sae.theta.fill_(0.05)
        sae.b_dec.copy_(0.1 * torch.randn(width, generator=generator))
    return sae


def tiny_lab(family: str = "gemma2") -> Lab:
    lm = tiny_lm(family)
    width = lm.width(SITE)
    known = Known(maxima=torch.linspace(1.0, 4.0, F), density=torch.full((F,), 0.2))
    return Lab(
        lm=lm,
        saes={SITE: live_sae(width, SITE), LATER: live_sae(width, LATER, seed=1)},
        known={SITE: known, LATER: known},
        vectors={"mine": torch.randn(width, generator=torch.Generator().manual_seed(7))},
    )
