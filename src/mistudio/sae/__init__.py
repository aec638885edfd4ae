"""Sparse autoencoders: one contract, six architectures, their mathematics, weights and files. What is trained has a
JumpReLU SAE's tensors, or a transcoder's, whatever it will be when it is finished."""

from mistudio.sae.base import SAE, SAEConfig
from mistudio.sae.batchtopk import BatchTopKConfig, BatchTopKSAE
from mistudio.sae.gated import GatedConfig, GatedSAE
from mistudio.sae.jumprelu import jumprelu, step
from mistudio.sae.model import JumpReLUSAE, initial_weights
from mistudio.sae.relu import ReLUConfig, ReLUSAE
from mistudio.sae.topk import TopKConfig, TopKSAE
from mistudio.sae.transcoder import Transcoder, TranscoderConfig, initial_transcoder_weights

ARCHITECTURES: dict[str, type[SAE]] = {
    "jumprelu": JumpReLUSAE,
    "relu": ReLUSAE,
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "gated": GatedSAE,
    "transcoder": Transcoder,
}
"""Every architecture by the name that files give it; each is made by `cls(config, weights)`, config a `cls.Config`."""

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "BatchTopKConfig",
    "BatchTopKSAE",
    "GatedConfig",
    "GatedSAE",
    "JumpReLUSAE",
    "ReLUConfig",
    "ReLUSAE",
    "SAEConfig",
    "TopKConfig",
    "TopKSAE",
    "Transcoder",
    "TranscoderConfig",
    "initial_transcoder_weights",
    "initial_weights",
    "jumprelu",
    "step",
]
